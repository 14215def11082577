//! An authority reached over the network, by Istio's certificate service: `mesh-agent controller`, or istiod.
//!
//! Promises that a key never leaves this process, that what comes back is looked at before it is used (`answer.rs`), that
//! every wait has an end, and that an error names the authority. Token and roots are read anew each time they are used:
//! both change while the agent runs. Tested by `remote/tests.rs` and `tests/certificate_authority.rs`.

#[cfg(test)]
mod tests;

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwapOption;
use http::{Uri, uri::PathAndQuery};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{CertificateParams, DistinguishedName, PublicKeyData, SanType};
use rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs::default_provider, version::TLS13};
use rustls_pki_types::ServerName;
use tokio::{net::TcpStream, sync::Mutex};
use tokio_rustls::TlsConnector;
use tonic::{body::Body, client::Grpc, metadata::AsciiMetadataValue};
use tonic_prost::ProstCodec;
use zeroize::Zeroizing;

use super::{
    CaError, SpiffeId,
    answer::{self, Checked},
    ca::{Credential, LeafPolicy, Urgency},
    istio::{CREATE_CERTIFICATE, CertificateRequest, CertificateResponse},
    key::SecretKey,
    turns::Turns,
};
use crate::{
    error::{Error, Kind, Result},
    grpc::Connection,
};

/// How long an authority may take for one certificate, the connection to it included.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest answer taken: a leaf, a chain and a bundle of roots are a few kilobytes.
const LARGEST_ANSWER: usize = 256 * 1024;
/// Largest token taken.
const LARGEST_TOKEN: u64 = 16 * 1024;
/// Largest bundle of roots taken from a file.
const LARGEST_BUNDLE: u64 = 1024 * 1024;

/// Where an authority is, and how the two know each other.
#[derive(Debug, Clone)]
pub struct RemoteCaConfig {
    /// `HOST:PORT`.
    pub address: String,
    /// The name its certificate has to have.
    pub server_name: String,
    /// PEM file: whom to believe about its certificate, and about peers where it sends no roots.
    pub roots: PathBuf,
    /// File of the token that shows who this agent is.
    pub token: PathBuf,
}

/// The authority.
pub(super) struct RemoteCa {
    config: RemoteCaConfig,
    server_name: ServerName<'static>,
    turns: Turns,
    /// One connection for all requests, made anew when it has ended.
    connection: Mutex<Option<http2::SendRequest<Body>>>,
    /// Why it was not heard the last time, if it was not.
    trouble: ArcSwapOption<String>,
}

impl fmt::Debug for RemoteCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteCa").field("config", &self.config).finish_non_exhaustive()
    }
}

impl fmt::Display for RemoteCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the certificate authority at {}", self.config.address)
    }
}

/// What went wrong; the authority's name is added where it is known.
type Attempt<T> = std::result::Result<T, String>;

impl RemoteCa {
    pub(super) fn new(config: RemoteCaConfig) -> std::result::Result<Self, CaError> {
        let server_name = ServerName::try_from(config.server_name.clone())
            .map_err(|_| CaError::ServerName(config.server_name.clone()))?;
        let (turns, connection, trouble) = (Turns::new(), Mutex::new(None), ArcSwapOption::empty());
        Ok(Self { config, server_name, turns, connection, trouble })
    }

    /// Why it was not heard the last time it was asked, if it was not.
    pub(super) fn trouble(&self) -> Option<Arc<String>> {
        self.trouble.load_full()
    }

    /// A new key for `id`, certified by the authority.
    pub(super) async fn certify(
        &self,
        id: &SpiffeId,
        policy: LeafPolicy,
        urgency: Urgency,
    ) -> Result<Credential> {
        let failed = |reason: &dyn fmt::Display| {
            Error::new(Kind::TlsFailure, super::ca::no_certificate(id, self, reason))
        };
        let _turn = self.turns.take(urgency).await.map_err(|error| failed(&error))?;
        let (key, csr) = request_for(id).map_err(|error| failed(&error))?;
        let seconds = i64::try_from(policy.lifetime.as_secs()).unwrap_or(i64::MAX);
        let request = CertificateRequest::impersonating(id.to_string(), csr, seconds);
        let answered = tokio::time::timeout(ANSWER_TIMEOUT, self.ask(request)).await;
        let response = answered.unwrap_or_else(|_| {
            // Whatever is wrong with the connection, the next request need not wait for it too.
            if let Ok(mut connection) = self.connection.try_lock() {
                connection.take();
            }
            Err(Failure::Unheard(format!("it did not answer within {ANSWER_TIMEOUT:?}")))
        });
        self.trouble.store(match &response {
            Err(Failure::Unheard(reason)) => Some(Arc::new(reason.clone())),
            _ => None,
        });
        let response = response.map_err(|failure| failed(&failure))?;
        let Checked { chain, roots, info } = self
            .check(id, &response, &key)
            .await
            .map_err(|reason| failed(&format!("its answer is not used: {reason}")))?;
        let key = key.for_handshakes().map_err(|error| failed(&error))?;
        Ok(Credential { chain, key, roots: Some(roots), info })
    }

    async fn ask(&self, request: CertificateRequest) -> std::result::Result<CertificateResponse, Failure> {
        let token = self.token().await.map_err(Failure::Unheard)?;
        let sender = self.sender().await.map_err(Failure::Unheard)?;
        let origin = Uri::builder()
            .scheme("https")
            .authority(self.config.address.as_str())
            .path_and_query("/")
            .build()
            .map_err(|error| Failure::Unheard(error.to_string()))?;
        let mut client =
            Grpc::with_origin(Connection(sender), origin).max_decoding_message_size(LARGEST_ANSWER);
        client.ready().await.map_err(|error| Failure::Unheard(error.to_string()))?;
        let mut request = tonic::Request::new(request);
        request.metadata_mut().insert("authorization", token);
        let codec = ProstCodec::<CertificateRequest, CertificateResponse>::default();
        let path = PathAndQuery::from_static(CREATE_CERTIFICATE);
        match client.unary(request, path, codec).await {
            Ok(response) => Ok(response.into_inner()),
            Err(status) => Err(Failure::of(&status)),
        }
    }

    /// The token as it is now.
    async fn token_text(&self) -> Attempt<Zeroizing<String>> {
        let path = &self.config.token;
        let text = Zeroizing::new(read(path, LARGEST_TOKEN).await.map_err(|error| about(path, &error))?);
        let text = std::str::from_utf8(&text).map_err(|error| about(path, &error))?.trim();
        if text.is_empty() {
            return Err(about(path, &"it is empty; `mesh-agent token` makes a token"));
        }
        Ok(Zeroizing::new(text.to_owned()))
    }

    async fn token(&self) -> Attempt<AsciiMetadataValue> {
        let path = &self.config.token;
        let header = Zeroizing::new(format!("Bearer {}", *self.token_text().await?));
        let mut value = AsciiMetadataValue::try_from(header.as_str())
            .map_err(|_| about(path, &"it holds what is no token"))?;
        value.set_sensitive(true);
        Ok(value)
    }

    /// The connection that is there, or a new one. Those who ask meanwhile wait for the same one.
    async fn sender(&self) -> Attempt<http2::SendRequest<Body>> {
        let mut connection = self.connection.lock().await;
        if let Some(sender) = connection.as_ref().filter(|sender| !sender.is_closed()) {
            return Ok(sender.clone());
        }
        let sender = self.connect().await?;
        *connection = Some(sender.clone());
        Ok(sender)
    }

    /// A connection of its own, and the token, for who calls another service there.
    pub(super) async fn call(&self) -> Attempt<(http2::SendRequest<Body>, Zeroizing<String>)> {
        let token = self.token_text().await?;
        let connected = tokio::time::timeout(ANSWER_TIMEOUT, self.connect()).await;
        let sender = connected.unwrap_or_else(|_| Err(format!("no connection within {ANSWER_TIMEOUT:?}")));
        let sender = sender.map_err(|error| format!("{self}: {error}"))?;
        Ok((sender, token))
    }

    async fn connect(&self) -> Attempt<http2::SendRequest<Body>> {
        let roots = self.roots().await?;
        let tls = client_config(&roots).map_err(|error| about(&self.config.roots, &error))?;
        let stream = TcpStream::connect(&self.config.address)
            .await
            .map_err(|error| format!("cannot connect: {error}"))?;
        // Small messages, each waited for.
        let _ = stream.set_nodelay(true);
        let stream = TlsConnector::from(Arc::new(tls))
            .connect(self.server_name.clone(), stream)
            .await
            .map_err(|error| format!("TLS with the server {:?}: {error}", self.config.server_name))?;
        let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .map_err(|error| format!("HTTP/2: {error}"))?;
        let address = self.config.address.clone();
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(address, %error, "the connection to the certificate authority ended");
            }
        });
        Ok(sender)
    }

    async fn roots(&self) -> Attempt<Vec<rustls_pki_types::CertificateDer<'static>>> {
        let path = &self.config.roots;
        let text = read(path, LARGEST_BUNDLE).await.map_err(|error| about(path, &error))?;
        let roots = answer::certificates(&[text]).map_err(|error| about(path, &error))?;
        if roots.is_empty() { Err(about(path, &"it holds no certificate")) } else { Ok(roots) }
    }

    async fn check(
        &self,
        id: &SpiffeId,
        response: &CertificateResponse,
        key: &SecretKey,
    ) -> Attempt<Checked> {
        let sent = answer::certificates(&response.cert_chain).map_err(|error| error.to_string())?;
        let (chain, mut roots) = answer::split_roots(sent).map_err(|error| error.to_string())?;
        if roots.is_empty() {
            roots = self.roots().await?;
        }
        answer::check(chain, &roots, id, &key.subject_public_key_info()).map_err(|error| error.to_string())
    }
}

/// How an authority was not heard.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// It was not asked, or is not there.
    #[error("{0}")]
    Unheard(String),
    /// It said no.
    #[error("{0}")]
    Refused(String),
}

impl Failure {
    fn of(status: &tonic::Status) -> Self {
        let said = format!("{:?}: {}", status.code(), status.message());
        // A status that came over the wire has no source.
        match std::error::Error::source(status) {
            Some(source) => Self::Unheard(format!("{said} ({source})")),
            None => Self::Refused(said),
        }
    }
}

fn about(path: &Path, error: &dyn fmt::Display) -> String {
    format!("{}: {error}", path.display())
}

async fn read(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let file = tokio::fs::File::open(path).await?;
    let mut contents = Vec::new();
    tokio::io::AsyncReadExt::read_to_end(&mut tokio::io::AsyncReadExt::take(file, most + 1), &mut contents)
        .await?;
    if contents.len() as u64 > most {
        return Err(io::Error::other(format!("it is longer than {most} bytes")));
    }
    Ok(contents)
}

/// A new key, and the request for its certificate: the identity as its only name, as ztunnel asks.
fn request_for(id: &SpiffeId) -> std::result::Result<(SecretKey, String), rcgen::Error> {
    let key = SecretKey::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(id.to_string().try_into()?)];
    let csr = params.serialize_request(&key)?.pem()?;
    Ok((key, csr))
}

fn client_config(
    roots: &[rustls_pki_types::CertificateDer<'static>],
) -> std::result::Result<ClientConfig, rustls::Error> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone())?;
    }
    let mut config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(store)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}
