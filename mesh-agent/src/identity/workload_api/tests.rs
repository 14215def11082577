//! A Workload API in this process: what it gives is used, what it does not give is refused, what it replaces is replaced.

use std::{
    convert::Infallible,
    task::{Context, Poll},
};

use hyper::service::service_fn;
use rcgen::{KeyPair, PublicKeyData as _, SubjectPublicKeyInfo};
use tokio::{net::UnixListener, sync::mpsc};
use tonic::{
    Request, Response, Status,
    codegen::{BoxFuture, Service, tokio_stream::wrappers::ReceiverStream},
    server::Grpc as ServerGrpc,
};

use super::*;
use crate::identity::{Authority, EmbeddedCa, LeafPolicy};

type Outcome<T> = std::result::Result<T, Box<dyn std::error::Error>>;
type TestResult = Outcome<()>;

const REVIEWS: &str = "spiffe://cluster.local/ns/default/sa/reviews";
const RATINGS: &str = "spiffe://cluster.local/ns/default/sa/ratings";
/// How long something may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(20);

/// One call: everything the watch holds, and each change of it.
struct Call(watch::Receiver<X509SvidResponse>);

impl Service<Request<X509SvidRequest>> for Call {
    type Response = Response<ReceiverStream<std::result::Result<X509SvidResponse, Status>>>;
    type Error = Status;
    type Future = BoxFuture<Self::Response, Status>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::result::Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<X509SvidRequest>) -> Self::Future {
        let mut messages = self.0.clone();
        Box::pin(async move {
            if request.metadata().get("workload.spiffe.io").is_none_or(|value| value != "true") {
                return Err(Status::invalid_argument("security header missing"));
            }
            let (sender, receiver) = mpsc::channel(1);
            tokio::spawn(async move {
                loop {
                    let message = messages.borrow_and_update().clone();
                    if sender.send(Ok(message)).await.is_err() || messages.changed().await.is_err() {
                        return;
                    }
                }
            });
            Ok(Response::new(ReceiverStream::new(receiver)))
        })
    }
}

/// Serves at this socket; the API is gone when the sender is dropped.
fn serve(socket: &Path, first: X509SvidResponse) -> Outcome<watch::Sender<X509SvidResponse>> {
    let listener = UnixListener::bind(socket)?;
    let (sender, messages) = watch::channel(first);
    tokio::spawn(async move {
        let mut gone = messages.clone();
        let accept = async {
            while let Ok((stream, _)) = listener.accept().await {
                let messages = messages.clone();
                let answer = service_fn(move |request| {
                    let call = Call(messages.clone());
                    async move {
                        let codec = ProstCodec::<X509SvidResponse, X509SvidRequest>::default();
                        Ok::<_, Infallible>(ServerGrpc::new(codec).server_streaming(call, request).await)
                    }
                });
                let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                tokio::spawn(server.serve_connection(TokioIo::new(stream), answer));
            }
        };
        tokio::select! {
            () = accept => {}
            _ = gone.wait_for(|_| false) => {}
        }
    });
    Ok(sender)
}

fn one_behind_the_other(certificates: &[CertificateDer<'_>]) -> Vec<u8> {
    certificates.iter().flat_map(|certificate| certificate.iter().copied()).collect()
}

/// What the API gives for `name`: a certificate of `ca` for `certified`, under these roots.
fn svid(ca: &EmbeddedCa, name: &str, certified: &str, roots: &EmbeddedCa) -> Outcome<X509Svid> {
    let key = KeyPair::generate()?;
    let public = SubjectPublicKeyInfo::from_der(&key.subject_public_key_info())?;
    let issued = ca.issue(&certified.parse()?, &public, LeafPolicy::default())?;
    Ok(X509Svid {
        spiffe_id: name.to_owned(),
        certificates: one_behind_the_other(&issued.chain),
        key: key.serialize_der(),
        bundle: one_behind_the_other(&roots.bundle()),
    })
}

fn good(ca: &EmbeddedCa, name: &str) -> Outcome<X509Svid> {
    svid(ca, name, name, ca)
}

async fn why(api: &WorkloadApi, id: &str) -> Outcome<String> {
    match tokio::time::timeout(LIMIT, api.certify(&id.parse()?)).await? {
        Ok(_) => Err("certified".into()),
        Err(error) => Ok(error.detail),
    }
}

#[tokio::test]
async fn what_the_api_gives_is_used_and_nothing_else() -> TestResult {
    let (dir, ca) = (tempfile::tempdir()?, EmbeddedCa::in_memory("cluster.local")?);
    let socket = dir.path().join("api.sock");
    let other = X509Svid { spiffe_id: "spiffe://cluster.local/agent".into(), ..good(&ca, RATINGS)? };
    let _api = serve(&socket, X509SvidResponse { svids: vec![other, good(&ca, REVIEWS)?] })?;
    let api = WorkloadApi::follow(socket.clone());
    let credential = api.certify(&REVIEWS.parse()?).await?;
    assert_eq!(credential.info.identity.to_string(), REVIEWS);
    let reason = why(&api, RATINGS).await?;
    assert_eq!(
        reason,
        format!(
            "no certificate for {RATINGS} from the SPIFFE Workload API at {}: it does not give that identity to this \
             agent (it gives: {REVIEWS}); register it with the agent as its parent",
            socket.display()
        )
    );
    Ok(())
}

#[tokio::test]
async fn what_is_wrong_is_not_used() -> TestResult {
    let (dir, ca) = (tempfile::tempdir()?, EmbeddedCa::in_memory("cluster.local")?);
    let stranger = EmbeddedCa::in_memory("cluster.local")?;
    let other_key = X509Svid { key: KeyPair::generate()?.serialize_der(), ..good(&ca, REVIEWS)? };
    let no_bundle = X509Svid { bundle: vec![], ..good(&ca, REVIEWS)? };
    let no_leaf = X509Svid { certificates: vec![], ..good(&ca, REVIEWS)? };
    let cut = X509Svid { certificates: vec![0x30, 0x82, 0x01], ..good(&ca, REVIEWS)? };
    let bad_key = X509Svid { key: b"key".to_vec(), ..good(&ca, REVIEWS)? };
    for (number, (svid, expected)) in [
        (svid(&ca, REVIEWS, RATINGS, &ca)?, "is for spiffe://cluster.local/ns/default/sa/ratings"),
        (svid(&ca, REVIEWS, REVIEWS, &stranger)?, "its chain does not hold"),
        (other_key, "for another key"),
        (no_bundle, "it has no roots"),
        (no_leaf, "it has no certificate"),
        (cut, "it gives: none"),
        (bad_key, "it gives: none"),
    ]
    .into_iter()
    .enumerate()
    {
        let socket = dir.path().join(number.to_string());
        let _api = serve(&socket, X509SvidResponse { svids: vec![svid] })?;
        let reason = why(&WorkloadApi::follow(socket), REVIEWS).await?;
        assert!(reason.contains(expected), "{expected}: {reason}");
    }
    Ok(())
}

#[tokio::test]
async fn what_the_api_replaces_is_replaced_at_once_and_kept_while_it_is_away() -> TestResult {
    let (dir, ca) = (tempfile::tempdir()?, EmbeddedCa::in_memory("cluster.local")?);
    let socket = dir.path().join("api.sock");
    let api = serve(&socket, X509SvidResponse { svids: vec![good(&ca, REVIEWS)?] })?;
    let authority = Authority::spiffe(socket.clone(), "cluster.local")?;
    let id = REVIEWS.parse()?;
    let asked = async {
        loop {
            if let Ok(identity) = authority.identity(&id).await {
                return identity;
            }
            tokio::task::yield_now().await;
        }
    };
    let identity = tokio::time::timeout(LIMIT, asked).await?;
    let first = identity.certificate().serial;
    let mut renewals = identity.renewals();
    // Another certificate, under another root.
    let next = EmbeddedCa::in_memory("cluster.local")?;
    api.send(X509SvidResponse { svids: vec![good(&next, REVIEWS)?] })?;
    tokio::time::timeout(LIMIT, renewals.changed()).await??;
    let second = identity.certificate().serial;
    assert_ne!(first, second);

    drop(api);
    std::fs::remove_file(&socket)?;
    assert!(identity.server_config().is_ok() && identity.certificate().serial == second);
    drop(identity);
    // What was given serves for a new handle, too.
    assert_eq!(authority.identity(&id).await?.certificate().serial, second);
    Ok(())
}

#[tokio::test]
async fn an_api_that_is_not_there_is_named_and_called_again() -> TestResult {
    let (dir, ca) = (tempfile::tempdir()?, EmbeddedCa::in_memory("cluster.local")?);
    let socket = dir.path().join("api.sock");
    let api = WorkloadApi::follow(socket.clone());
    let reason = why(&api, REVIEWS).await?;
    let at = format!("from the SPIFFE Workload API at {}: cannot connect", socket.display());
    assert!(reason.contains(&at), "{reason}");
    let _api = serve(&socket, X509SvidResponse { svids: vec![good(&ca, REVIEWS)?] })?;
    let mut changes = api.changes();
    tokio::time::timeout(LIMIT, changes.changed()).await??;
    api.certify(&REVIEWS.parse()?).await?;
    Ok(())
}
