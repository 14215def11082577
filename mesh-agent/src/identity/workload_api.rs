//! Certificates from SPIRE, or whoever else serves the SPIFFE Workload API (its specification, sections 4 and 5).
//!
//! Promises that only what the API gives to this agent is used, looked at first as any answer is (`answer.rs`); that the
//! stream is followed, so that a certificate or bundle that SPIRE replaces is replaced here at once; and that what was
//! given stays in use, for as long as it is valid, while the API is away. Keys are wiped from our buffers once they can sign.
//! Tested by `workload_api/tests.rs`.

#[cfg(test)]
mod tests;

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use http::{Uri, uri::PathAndQuery};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::{crypto::aws_lc_rs::sign::any_supported_type, sign::SigningKey};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::{net::UnixStream, sync::watch};
use tokio_util::task::AbortOnDropHandle;
use tonic::{client::Grpc, metadata::AsciiMetadataValue};
use tonic_prost::ProstCodec;
use x509_parser::prelude::{FromDer as _, X509Certificate};
use zeroize::Zeroizing;

use super::{
    SpiffeId,
    answer::{self, Checked},
    ca::{Credential, no_certificate},
};
use crate::{
    error::{Error, Kind, Result},
    grpc::Connection,
};

/// How long the first answer may take.
const FIRST_ANSWER: Duration = Duration::from_secs(10);
/// First and longest wait before the API is called again; doubled after each failure.
const CALL_AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Largest message taken: it holds every certificate of this agent, and a bundle for each.
const LARGEST_MESSAGE: usize = 16 * 1024 * 1024;
/// Identities that an error names.
const NAMED: usize = 10;
/// The method that gives certificates, again at each change.
const FETCH: &str = "/SpiffeWorkloadAPI/FetchX509SVID";

/// `X509SVIDRequest`.
#[derive(Clone, PartialEq, prost::Message)]
struct X509SvidRequest {}

/// `X509SVIDResponse`.
#[derive(Clone, PartialEq, prost::Message)]
struct X509SvidResponse {
    #[prost(message, repeated, tag = "1")]
    svids: Vec<X509Svid>,
}

/// `X509SVID`.
#[derive(Clone, PartialEq, prost::Message)]
struct X509Svid {
    #[prost(string, tag = "1")]
    spiffe_id: String,
    /// Certificates in DER, one behind the other, leaf first.
    #[prost(bytes = "vec", tag = "2")]
    certificates: Vec<u8>,
    /// PKCS #8.
    #[prost(bytes = "vec", tag = "3")]
    key: Vec<u8>,
    /// Roots of the trust domain in DER, one behind the other.
    #[prost(bytes = "vec", tag = "4")]
    bundle: Vec<u8>,
}

/// What the API gave for one identity.
struct Svid {
    id: SpiffeId,
    chain: Vec<CertificateDer<'static>>,
    key: Arc<dyn SigningKey>,
    bundle: Vec<CertificateDer<'static>>,
}

/// What is known of the API.
#[derive(Default)]
struct Known {
    /// Grows with each answer.
    generation: u64,
    svids: Vec<Svid>,
    /// Why it is not heard, if it is not.
    trouble: Option<Arc<String>>,
}

impl Known {
    fn is_nothing(&self) -> bool {
        self.generation == 0 && self.trouble.is_none()
    }
}

/// The API, followed for as long as this is held.
pub(super) struct WorkloadApi {
    socket: PathBuf,
    known: watch::Receiver<Known>,
    changes: watch::Receiver<u64>,
    _following: AbortOnDropHandle<()>,
}

impl fmt::Debug for WorkloadApi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkloadApi").field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl fmt::Display for WorkloadApi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the SPIFFE Workload API at {}", self.socket.display())
    }
}

impl WorkloadApi {
    /// Begins to follow the API at this socket. Takes a tokio runtime.
    pub(super) fn follow(socket: PathBuf) -> Self {
        let (known_tx, known) = watch::channel(Known::default());
        let (changes_tx, changes) = watch::channel(0);
        let following = tokio::spawn(follow(socket.clone(), known_tx, changes_tx));
        Self { socket, known, changes, _following: AbortOnDropHandle::new(following) }
    }

    /// Changes with each answer of the API.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.clone()
    }

    /// Why the API is not heard, where it has never been.
    pub(super) fn trouble(&self) -> Option<Arc<String>> {
        let known = self.known.borrow();
        known.trouble.clone().filter(|_| known.generation == 0)
    }

    /// The certificate that the API gives for `id`.
    pub(super) async fn certify(&self, id: &SpiffeId) -> Result<Credential> {
        let failed =
            |reason: &dyn fmt::Display| Error::new(Kind::TlsFailure, no_certificate(id, self, reason));
        let mut known = self.known.clone();
        let answered = known.wait_for(|known| !known.is_nothing());
        let known = match tokio::time::timeout(FIRST_ANSWER, answered).await {
            Ok(known) => known.map_err(|_| failed(&"it is not followed any more; restart the agent"))?,
            Err(_) => return Err(failed(&format!("it did not answer within {FIRST_ANSWER:?}"))),
        };
        let Some(svid) = known.svids.iter().find(|svid| svid.id == *id) else {
            let reason = match &known.trouble {
                Some(trouble) => trouble.to_string(),
                None => not_among(&known.svids),
            };
            return Err(failed(&reason));
        };
        let key = svid.key.public_key().ok_or_else(|| failed(&"its key is of an unknown kind"))?;
        let Checked { chain, roots, info } = answer::check(svid.chain.clone(), &svid.bundle, id, &key)
            .map_err(|reason| failed(&format!("its answer is not used: {reason}")))?;
        Ok(Credential { chain, key: Arc::clone(&svid.key), roots: Some(roots), info })
    }
}

fn not_among(svids: &[Svid]) -> String {
    let mut names: Vec<_> = svids.iter().map(|svid| svid.id.to_string()).take(NAMED).collect();
    if svids.len() > NAMED {
        names.push(format!("and {} more", svids.len() - NAMED));
    }
    let given = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    format!(
        "it does not give that identity to this agent (it gives: {given}); register it with the agent as its parent"
    )
}

/// Calls the API, and again whenever the stream has ended.
async fn follow(socket: PathBuf, known: watch::Sender<Known>, changes: watch::Sender<u64>) {
    let mut again = CALL_AGAIN.0;
    loop {
        let before = *changes.borrow();
        let ended = stream(&socket, &known, &changes).await;
        if *changes.borrow() > before {
            again = CALL_AGAIN.0;
        }
        let reason = ended.err().unwrap_or_else(|| "the stream ended".to_owned());
        let socket = socket.display();
        tracing::warn!(%socket, reason, ?again, "the SPIFFE Workload API is away; what it gave stays in use while valid");
        known.send_modify(|known| known.trouble = Some(Arc::new(reason)));
        tokio::time::sleep(again).await;
        again = (again * 2).min(CALL_AGAIN.1);
    }
}

/// Takes what the API says until its stream ends.
async fn stream(
    socket: &Path,
    known: &watch::Sender<Known>,
    changes: &watch::Sender<u64>,
) -> std::result::Result<(), String> {
    let stream = UnixStream::connect(socket).await.map_err(|error| format!("cannot connect: {error}"))?;
    let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .map_err(|error| format!("HTTP/2: {error}"))?;
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let mut client = Grpc::with_origin(Connection(sender), Uri::from_static("http://localhost/"))
        .max_decoding_message_size(LARGEST_MESSAGE);
    client.ready().await.map_err(|error| error.to_string())?;
    let mut request = tonic::Request::new(X509SvidRequest {});
    // Shows that no browser was made to send this (section 4 of the specification of its endpoint).
    request.metadata_mut().insert("workload.spiffe.io", AsciiMetadataValue::from_static("true"));
    let codec = ProstCodec::<X509SvidRequest, X509SvidResponse>::default();
    let said = |status: tonic::Status| format!("{:?}: {}", status.code(), status.message());
    let answer = client.server_streaming(request, PathAndQuery::from_static(FETCH), codec).await;
    let mut messages = answer.map_err(said)?.into_inner();
    while let Some(message) = messages.message().await.map_err(said)? {
        let svids = read(message);
        tracing::info!(socket = %socket.display(), certificates = svids.len(), "certificates of the SPIFFE Workload API");
        let generation = *changes.borrow() + 1;
        // In this order: who is told of a change finds it.
        known.send_replace(Known { generation, svids, trouble: None });
        changes.send_replace(generation);
    }
    Ok(())
}

/// What can be used of a message; for the rest the log says why not.
fn read(message: X509SvidResponse) -> Vec<Svid> {
    let mut svids: Vec<Svid> = Vec::new();
    for svid in message.svids {
        let name = svid.spiffe_id.clone();
        match one(svid) {
            // The first of an identity is the default (section 5.2).
            Ok(svid) if svids.iter().all(|known| known.id != svid.id) => svids.push(svid),
            Ok(_) => {}
            Err(reason) => {
                tracing::warn!(id = name, reason, "a certificate of the SPIFFE Workload API is not used");
            }
        }
    }
    svids
}

fn one(svid: X509Svid) -> std::result::Result<Svid, String> {
    let X509Svid { spiffe_id, certificates: chain, key, bundle } = svid;
    let key = Zeroizing::new(key);
    let id: SpiffeId = spiffe_id.parse().map_err(|error| format!("{error}"))?;
    let key = any_supported_type(&PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.as_slice())))
        .map_err(|error| format!("its key: {error}"))?;
    let chain = certificates(&chain).map_err(|error| format!("its certificates: {error}"))?;
    let bundle = certificates(&bundle).map_err(|error| format!("its bundle: {error}"))?;
    Ok(Svid { id, chain, key, bundle })
}

/// Certificates in DER, one behind the other.
fn certificates(mut der: &[u8]) -> std::result::Result<Vec<CertificateDer<'static>>, String> {
    let mut certificates = Vec::new();
    while !der.is_empty() {
        let (rest, _) = X509Certificate::from_der(der).map_err(|error| error.to_string())?;
        let (one, _) = der.split_at(der.len() - rest.len());
        certificates.push(CertificateDer::from(one.to_vec()));
        der = rest;
    }
    Ok(certificates)
}
