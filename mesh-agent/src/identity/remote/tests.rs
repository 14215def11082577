//! Authorities that answer badly, or not at all: none of it is used, and all of it is told.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use hyper::service::service_fn;
use rcgen::{KeyPair, SubjectPublicKeyInfo};
use rustls::{ServerConfig, sign::SingleCertAndKey};
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use tokio::{net::TcpListener, sync::Notify};
use tokio_rustls::TlsAcceptor;
use tonic::{
    Request, Response, Status,
    codegen::{BoxFuture, Service},
    server::Grpc,
};
use x509_parser::{certification_request::X509CertificationRequest, prelude::FromDer as _};

use super::*;
use crate::identity::{
    Authority, EmbeddedCa,
    ca::{leaf_params, self_signed},
};

type TestResult = std::result::Result<(), Box<dyn std::error::Error>>;

const REVIEWS: &str = "spiffe://cluster.local/ns/default/sa/reviews";
const RATINGS: &str = "spiffe://cluster.local/ns/default/sa/ratings";

/// How an authority answers.
#[derive(Debug, Clone, Copy)]
enum Manner {
    /// As it should, a root behind the leaf.
    Well,
    /// Without the root.
    NoRoot,
    Nothing,
    Garbage,
    OtherKey,
    OtherIdentity,
    OtherRoot,
    Expired,
    /// Not before it is let to.
    Late,
    Never,
}

/// A leaf whose time has ended an hour ago.
fn expired(
    ca: &EmbeddedCa,
    id: &SpiffeId,
    key: &impl PublicKeyData,
) -> std::result::Result<CertificateDer<'static>, rcgen::Error> {
    let name = SanType::URI(id.to_string().try_into()?);
    let ended = OffsetDateTime::now_utc() - Duration::from_hours(1);
    let leaf = leaf_params(vec![name], ended - Duration::from_hours(1), ended);
    Ok(leaf.signed_by(key, &ca.signer().issuer)?.der().clone())
}

struct Fake {
    ca: EmbeddedCa,
    other: EmbeddedCa,
    manner: Manner,
    asked: AtomicU32,
    let_to: Notify,
}

fn pem(der: &[u8]) -> String {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", STANDARD.encode(der))
}

impl Fake {
    fn answer(&self, request: &CertificateRequest) -> std::result::Result<Vec<String>, String> {
        use rustls_pki_types::{CertificateSigningRequestDer, pem::PemObject as _};
        let text = |error: &dyn fmt::Display| error.to_string();
        let der = CertificateSigningRequestDer::from_pem_slice(request.csr.as_bytes())
            .map_err(|error| text(&error))?;
        let (_, csr) = X509CertificationRequest::from_der(&der).map_err(|error| text(&error))?;
        let spki = csr.certification_request_info.subject_pki.raw;
        let asked = SubjectPublicKeyInfo::from_der(spki).map_err(|error| text(&error))?;
        let stranger = KeyPair::generate().map_err(|error| text(&error))?;
        let stranger = SubjectPublicKeyInfo::from_der(&stranger.subject_public_key_info())
            .map_err(|error| text(&error))?;
        let id = if matches!(self.manner, Manner::OtherIdentity) { RATINGS } else { REVIEWS };
        let policy = LeafPolicy {
            lifetime: Duration::from_secs(request.validity_duration.unsigned_abs()),
            ..LeafPolicy::default()
        };
        let key = if matches!(self.manner, Manner::OtherKey) { &stranger } else { &asked };
        let id = id.parse().map_err(|error| text(&error))?;
        let leaf = match self.manner {
            Manner::Expired => vec![expired(&self.ca, &id, key).map_err(|error| text(&error))?],
            _ => self.ca.issue(&id, key, policy).map_err(|error| text(&error))?.chain,
        };
        let root = |ca: &EmbeddedCa| pem(&ca.bundle()[0]);
        Ok(match self.manner {
            Manner::Nothing => vec![],
            Manner::Garbage => vec!["-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".into()],
            Manner::NoRoot => vec![pem(&leaf[0])],
            Manner::OtherRoot => vec![pem(&leaf[0]), root(&self.other)],
            _ => vec![pem(&leaf[0]) + &root(&self.other), root(&self.ca)],
        })
    }
}

/// One call, as tonic's server wants it.
struct Call(Arc<Fake>);

impl Service<Request<CertificateRequest>> for Call {
    type Response = Response<CertificateResponse>;
    type Error = Status;
    type Future = BoxFuture<Self::Response, Status>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::result::Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<CertificateRequest>) -> Self::Future {
        let fake = Arc::clone(&self.0);
        Box::pin(async move {
            fake.asked.fetch_add(1, Ordering::Relaxed);
            match fake.manner {
                Manner::Never => return std::future::pending().await,
                Manner::Late => fake.let_to.notified().await,
                _ => {}
            }
            let asked = request.get_ref();
            if asked.impersonated() != Some(REVIEWS) || request.metadata().get("authorization").is_none() {
                return Err(Status::invalid_argument(format!("{request:?}")));
            }
            let cert_chain = fake.answer(asked).map_err(Status::internal)?;
            Ok(Response::new(CertificateResponse { cert_chain }))
        })
    }
}

/// A running authority, and what an agent has to know of it.
async fn authority(
    manner: Manner,
) -> std::result::Result<(tempfile::TempDir, RemoteCaConfig), Box<dyn std::error::Error>> {
    let (dir, config, _) = served(manner).await?;
    Ok((dir, config))
}

async fn served(
    manner: Manner,
) -> std::result::Result<(tempfile::TempDir, RemoteCaConfig, Arc<Fake>), Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    let (ca, other) =
        (EmbeddedCa::open(dir.path(), "cluster.local")?, EmbeddedCa::in_memory("cluster.local")?);
    let key = ca.issue_server(&["ca.test".to_owned()], LeafPolicy::default())?.key;
    let mut tls = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    tls.alpn_protocols = vec![b"h2".to_vec()];
    let (tls, fake) = (
        TlsAcceptor::from(Arc::new(tls)),
        Arc::new(Fake { ca, other, manner, asked: AtomicU32::new(0), let_to: Notify::new() }),
    );
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let config = RemoteCaConfig {
        address: listener.local_addr()?.to_string(),
        server_name: "ca.test".into(),
        roots: dir.path().join("ca-cert.pem"),
        token: dir.path().join("token"),
    };
    fs::write(&config.token, "token\n")?;
    let served = Arc::clone(&fake);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (tls, fake) = (tls.clone(), Arc::clone(&fake));
            tokio::spawn(async move {
                let answer = service_fn(move |request| {
                    let call = Call(Arc::clone(&fake));
                    async move {
                        let mut grpc =
                            Grpc::new(ProstCodec::<CertificateResponse, CertificateRequest>::default());
                        Ok::<_, std::convert::Infallible>(grpc.unary(call, request).await)
                    }
                });
                if let Ok(stream) = tls.accept(stream).await {
                    let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                    // Its end is the client's affair.
                    let _ = server.serve_connection(TokioIo::new(stream), answer).await;
                }
            });
        }
    });
    Ok((dir, config, served))
}

#[tokio::test]
async fn what_is_asked_and_answered_well_is_used() -> TestResult {
    let id: SpiffeId = REVIEWS.parse()?;
    let policy = LeafPolicy { lifetime: Duration::from_hours(3), ..LeafPolicy::default() };
    for manner in [Manner::Well, Manner::NoRoot] {
        let (_dir, config) = authority(manner).await?;
        let ca = RemoteCa::new(config)?;
        let credential = ca.certify(&id, policy, Urgency::Now).await?;
        assert_eq!(credential.info.identity, id);
        let life = credential.info.not_after - credential.info.not_before;
        assert_eq!(life, policy.lifetime + policy.backdate, "{manner:?}");
        // What was sent with the leaf in one text, a root all the same, is believed: it comes from the authority.
        let roots = if matches!(manner, Manner::Well) { 2 } else { 1 };
        assert_eq!(
            (credential.chain.len(), credential.roots.map(|roots| roots.all.len())),
            (1, Some(roots)),
            "{manner:?}"
        );
        assert!(ca.trouble().is_none());
    }
    Ok(())
}

#[tokio::test]
async fn nothing_that_is_wrong_is_used() -> TestResult {
    for (manner, expected) in [
        (Manner::Nothing, "it has no certificate"),
        (Manner::Garbage, "what is no certificate"),
        (Manner::OtherKey, "for another key than the one it was asked for"),
        (Manner::OtherIdentity, "is for spiffe://cluster.local/ns/default/sa/ratings, asked was"),
        (Manner::OtherRoot, "its chain does not hold: invalid peer certificate"),
        (Manner::Expired, "certificate expired"),
    ] {
        let (_dir, config) = authority(manner).await?;
        let address = config.address.clone();
        let ca = RemoteCa::new(config)?;
        let asked = ca.certify(&REVIEWS.parse()?, LeafPolicy::default(), Urgency::Now).await;
        let Err(error) = asked else { return Err(format!("{manner:?} was used").into()) };
        let begins = format!("no certificate for {REVIEWS} from the certificate authority at {address}: ");
        assert!(error.detail.starts_with(&begins), "{manner:?}: {error}");
        assert!(error.detail.contains(expected), "{manner:?}: {error}");
    }
    Ok(())
}

#[tokio::test]
async fn files_that_are_missing_are_named() -> TestResult {
    let (dir, good) = authority(Manner::Well).await?;
    let missing = dir.path().join("missing");
    let empty = dir.path().join("empty");
    fs::write(&empty, "")?;
    for (config, path, expected) in [
        (RemoteCaConfig { token: missing.clone(), ..good.clone() }, &missing, "No such file"),
        (RemoteCaConfig { roots: missing.clone(), ..good.clone() }, &missing, "No such file"),
        (RemoteCaConfig { roots: empty.clone(), ..good.clone() }, &empty, "it holds no certificate"),
        (RemoteCaConfig { token: empty.clone(), ..good.clone() }, &empty, "it is empty"),
    ] {
        let ca = RemoteCa::new(config)?;
        let asked = ca.certify(&REVIEWS.parse()?, LeafPolicy::default(), Urgency::Now).await;
        let Err(error) = asked else { return Err("certified".into()) };
        let path = path.display().to_string();
        assert!(error.detail.contains(&path) && error.detail.contains(expected), "{error}");
    }
    let bad = RemoteCa::new(RemoteCaConfig { server_name: "not a name".into(), ..good });
    assert!(matches!(bad, Err(CaError::ServerName(_))));
    Ok(())
}

#[tokio::test]
async fn nobody_waits_for_an_authority_that_does_not_answer() -> TestResult {
    let (_dir, config) = authority(Manner::Never).await?;
    let authority = Authority::remote(config, "cluster.local")?;
    let Err(error) = authority.identity(&REVIEWS.parse()?).await else { return Err("certified".into()) };
    assert!(error.detail.contains("it has not answered yet"), "{error}");
    Ok(())
}

#[tokio::test]
async fn what_comes_late_is_there_for_who_asks_again() -> TestResult {
    let (_dir, config, fake) = served(Manner::Late).await?;
    let authority = Authority::remote(config, "cluster.local")?;
    let id = REVIEWS.parse()?;
    // Asked for ahead, then by two who do not wait so long.
    authority.prefetch(&id);
    for _ in 0..2 {
        let Err(error) = authority.identity(&id).await else { return Err("certified".into()) };
        assert!(error.detail.contains("it has not answered yet"), "{error}");
    }
    fake.let_to.notify_one();
    let identity = authority.identity_within(&id, Duration::from_secs(20)).await?;
    assert_eq!(identity.certificate().identity, id);
    assert_eq!(fake.asked.load(Ordering::Relaxed), 1, "it was asked for the same again");
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn asking_has_an_end() -> TestResult {
    // A listener that never accepts: the kernel takes the connection, and nobody says anything.
    let silent = TcpListener::bind("127.0.0.1:0").await?;
    let dir = tempfile::tempdir()?;
    let root = self_signed("cluster.local", &SecretKey::generate()?, OffsetDateTime::now_utc())?;
    let config = RemoteCaConfig {
        address: silent.local_addr()?.to_string(),
        server_name: "ca.test".into(),
        roots: dir.path().join("root"),
        token: dir.path().join("token"),
    };
    fs::write(&config.roots, root.pem())?;
    fs::write(&config.token, "token")?;
    let ca = RemoteCa::new(config)?;
    let asked = ca.certify(&REVIEWS.parse()?, LeafPolicy::default(), Urgency::Now).await;
    let Err(error) = asked else { return Err("certified".into()) };
    assert!(error.detail.ends_with("it did not answer within 10s"), "{error}");
    assert_eq!(ca.trouble().as_deref().map(String::as_str), Some("it did not answer within 10s"));
    Ok(())
}
