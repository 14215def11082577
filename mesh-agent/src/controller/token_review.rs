//! Tokens of Kubernetes, shown to its API server: `TokenReview` (authentication.k8s.io/v1), bound to our audience.
//!
//! Nothing is kept from one review to the next, so that a token ends when its pod or node does. Our own token and the API
//! server's roots are read anew each time: both change. Tested in `tests/token_review.rs`.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs::default_provider, version::TLS13};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use tokio::{net::TcpStream, sync::Semaphore};
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;
use zeroize::Zeroizing;

use super::authentication::{Caller, Unauthenticated};
use crate::config::ServiceAccountName;

/// Where a pod finds what it needs to speak to the API server.
const ACCOUNT_DIR: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// How long the API server may take.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(5);
/// Reviews at once: who floods us with tokens does not flood the API server.
const AT_ONCE: usize = 32;
/// Largest answer taken: it holds the token that was sent, and a few names.
const LARGEST_ANSWER: usize = 128 * 1024;
const PATH: &str = "/apis/authentication.k8s.io/v1/tokenreviews";
/// What the user name of a service account begins with.
const USER: &str = "system:serviceaccount:";
/// Names the node that a token is bound to, from Kubernetes 1.32 on.
const NODE: &str = "authentication.kubernetes.io/node-name";

/// Where the API server is, and how the two know each other.
#[derive(Debug, Clone)]
pub struct ApiServer {
    /// Its name or address.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// PEM file of whom to believe about its certificate.
    pub roots: PathBuf,
    /// File of our own token.
    pub token: PathBuf,
}

impl ApiServer {
    /// That of the cluster this process runs in.
    ///
    /// # Errors
    /// When it runs in none.
    pub fn of_the_cluster() -> Result<Self> {
        let variable = |name: &str| {
            std::env::var(name).with_context(|| format!("{name} is not set: this is no pod of a cluster"))
        };
        let host = variable("KUBERNETES_SERVICE_HOST")?;
        let port = variable("KUBERNETES_SERVICE_PORT")?;
        let port = port.parse().with_context(|| format!("KUBERNETES_SERVICE_PORT is {port:?}"))?;
        let dir = Path::new(ACCOUNT_DIR);
        Ok(Self { host, port, roots: dir.join("ca.crt"), token: dir.join("token") })
    }
}

/// Reviews of tokens.
#[derive(Debug)]
pub struct Reviews {
    api: ApiServer,
    audience: String,
    room: Semaphore,
}

impl Reviews {
    /// Of tokens for this audience.
    pub fn new(api: ApiServer, audience: &str) -> Self {
        Self { api, audience: audience.to_owned(), room: Semaphore::new(AT_ONCE) }
    }

    /// Who shows this token, as the API server has it.
    pub(super) async fn caller(&self, token: &str) -> Result<Caller, Unauthenticated> {
        let reviewed = tokio::time::timeout(REVIEW_TIMEOUT, self.review(token)).await;
        let (host, port) = (&self.api.host, self.api.port);
        let unheard = |reason: String| {
            Unauthenticated::Unheard(format!(
                "the API server at {host}:{port} cannot be asked about the token: {reason}"
            ))
        };
        match reviewed {
            Ok(Ok(status)) => self.read(status).map_err(Unauthenticated::Refused),
            Ok(Err(error)) => Err(unheard(format!("{error:#}"))),
            Err(_) => Err(unheard(format!("it did not answer within {REVIEW_TIMEOUT:?}"))),
        }
    }

    fn read(&self, status: TokenReviewStatus) -> Result<Caller, String> {
        if status.authenticated != Some(true) {
            let reason = status.error.unwrap_or_else(|| "it gives no reason".to_owned());
            return Err(format!("the API server does not take the token: {reason}"));
        }
        // One that knows nothing of audiences names none, and has looked at its own.
        if !status.audiences.iter().flatten().any(|audience| *audience == self.audience) {
            return Err(format!("the token is for another audience than {:?}", self.audience));
        }
        let user = status.user.unwrap_or_default();
        let name = user.username.unwrap_or_default();
        let account = name.strip_prefix(USER).and_then(|account| account.split_once(':'));
        let Some((namespace, account)) = account else {
            return Err(format!("the token is of {name:?}, which is no service account"));
        };
        let account = ServiceAccountName { namespace: namespace.to_owned(), name: account.to_owned() };
        let node = user.extra.and_then(|mut extra| extra.remove(NODE)).and_then(|mut names| names.pop());
        Ok(Caller { account, node })
    }

    async fn review(&self, token: &str) -> Result<TokenReviewStatus> {
        let _room = self.room.acquire().await?;
        let review = TokenReview {
            spec: TokenReviewSpec { audiences: Some(vec![self.audience.clone()]), token: token.to_owned() },
            ..TokenReview::default()
        };
        let body = Bytes::from(serde_json::to_vec(&review)?);
        let ApiServer { host, port, token: file, .. } = &self.api;
        let ours = Zeroizing::new(read(file).await?);
        let ours = std::str::from_utf8(&ours).with_context(|| format!("{}", file.display()))?.trim();
        let authority = match host.parse::<IpAddr>() {
            Ok(IpAddr::V6(address)) => format!("[{address}]:{port}"),
            _ => format!("{host}:{port}"),
        };
        let request = Request::builder()
            .method(Method::POST)
            .uri(PATH)
            .header(header::HOST, authority)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::ACCEPT, "application/json")
            .header(header::AUTHORIZATION, format!("Bearer {ours}"))
            .body(Full::new(body))
            .with_context(|| format!("{} holds what is no token", file.display()))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(self.connect().await?)).await?;
        let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), LARGEST_ANSWER).collect().await;
        let body = body.map_err(|error| anyhow::anyhow!("its answer: {error}"))?.to_bytes();
        if !matches!(status, StatusCode::OK | StatusCode::CREATED) {
            let said = String::from_utf8_lossy(&body[..body.len().min(512)]).into_owned();
            bail!("it answered {status} (may this controller create tokenreviews?): {said}");
        }
        let review: TokenReview = serde_json::from_slice(&body).context("its answer is no TokenReview")?;
        review.status.context("its answer has no status")
    }

    async fn connect(&self) -> Result<tokio_rustls::client::TlsStream<TcpStream>> {
        let ApiServer { host, port, roots: file, .. } = &self.api;
        let text = read(file).await?;
        let mut roots = RootCertStore::empty();
        for root in CertificateDer::pem_slice_iter(&text) {
            let about = || format!("{}", file.display());
            roots.add(root.with_context(about)?).with_context(about)?;
        }
        ensure!(!roots.is_empty(), "{} holds no certificate", file.display());
        let tls = ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_protocol_versions(&[&TLS13])?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from(host.clone()).with_context(|| format!("{host:?}"))?;
        let stream = TcpStream::connect((host.as_str(), *port)).await.context("connecting")?;
        TlsConnector::from(Arc::new(tls)).connect(name, stream).await.context("TLS")
    }
}

async fn read(path: &Path) -> Result<Vec<u8>> {
    tokio::fs::read(path).await.with_context(|| format!("reading {}", path.display()))
}
