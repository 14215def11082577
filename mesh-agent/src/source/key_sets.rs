//! Key sets as an agent has them: told by the controller, never fetched by the node.
//!
//! Promises that a set is only taken for a URI that the agent's own configuration names, and that what was told last stays
//! in force while the controller is silent. Until a set is there, the tokens that need it are refused. Tested with the
//! controller that tells it (`controller/tests`).

use std::{collections::HashMap, sync::Arc, time::Duration};

use http::{Uri, uri::PathAndQuery};
use hyper::client::conn::http2::SendRequest;
use tokio::sync::watch;
use tonic::{Request, Status, body::Body, client::Grpc, metadata::AsciiMetadataValue};
use tonic_prost::ProstCodec;
use zeroize::Zeroizing;

use crate::{
    grpc::Connection,
    state::snapshot::{KeySet, Snapshot},
};

/// Path of the call.
pub const WATCH_KEY_SETS: &str = "/mesh.v1.KeySets/Watch";

/// What a request names as its host: there is but one on a connection to the controller.
const ORIGIN: &str = "https://mesh-controller";

/// Largest message taken: a set of a mebibyte, and what is said of it.
const LARGEST: usize = (1 << 20) + (64 << 10);

/// How long after a failure the controller is asked again, and at the most after later ones.
const BACK_OFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// `mesh.v1.WatchKeySets`: asks for all of them.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct WatchKeySets {}

/// `mesh.v1.KeySet`: what is known of one.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct KeySetMessage {
    /// Where it is fetched from.
    #[prost(string, tag = "1")]
    pub uri: String,
    /// The set as it was last fetched.
    #[prost(string, optional, tag = "2")]
    pub jwks: Option<String>,
    /// Why it was not fetched the last time; empty where it was.
    #[prost(string, tag = "3")]
    pub trouble: String,
}

/// What has been told, by URI.
#[derive(Debug, Default)]
pub struct Told(HashMap<String, Arc<KeySet>>);

impl Told {
    /// Takes a message over.
    fn take(&mut self, message: KeySetMessage) {
        let KeySetMessage { uri, jwks, trouble } = message;
        if !trouble.is_empty() {
            tracing::warn!(%uri, error = %trouble, kept = jwks.is_some(), "the controller has not fetched a key set");
        }
        match jwks.as_deref().map(KeySet::parse) {
            Some(Ok(keys)) => drop(self.0.insert(uri, Arc::new(keys))),
            Some(Err(why)) => tracing::warn!(%uri, "what the controller says is no key set: {why}"),
            None => {}
        }
    }

    /// Puts the sets where the path looks for them.
    fn apply(&self, snapshot: &Snapshot) {
        for (uri, cell) in &snapshot.key_sets {
            if let Some(keys) = self.0.get(&**uri)
                && cell.get().is_none_or(|before| !Arc::ptr_eq(&before, keys))
            {
                cell.set(Arc::clone(keys));
            }
        }
    }
}

/// Follows the controller over one connection, until that ends.
///
/// # Errors
/// Why it has ended.
pub async fn follow(
    connection: SendRequest<Body>,
    token: &str,
    told: &mut Told,
    snapshots: &mut watch::Receiver<Arc<Snapshot>>,
) -> Result<(), Status> {
    let mut request = Request::new(WatchKeySets {});
    let bearer = AsciiMetadataValue::try_from(format!("Bearer {token}"));
    let bearer = bearer.map_err(|_| Status::unauthenticated("the agent's token is not one line of text"))?;
    request.metadata_mut().insert("authorization", bearer);
    let origin = Uri::from_static(ORIGIN);
    let mut grpc = Grpc::with_origin(Connection(connection), origin).max_decoding_message_size(LARGEST);
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let codec = ProstCodec::<WatchKeySets, KeySetMessage>::default();
    let path = PathAndQuery::from_static(WATCH_KEY_SETS);
    let mut messages = grpc.server_streaming(request, path, codec).await?.into_inner();
    loop {
        let snapshot = Arc::clone(&snapshots.borrow_and_update());
        told.apply(&snapshot);
        tokio::select! {
            message = messages.message() => match message? {
                Some(message) => told.take(message),
                None => return Ok(()),
            },
            changed = snapshots.changed() => if changed.is_err() { return Ok(()) },
        }
    }
}

/// Follows the controller for as long as there is a configuration, over one connection after the other. `connect` makes a
/// connection and reads the agent's token.
pub async fn run<F>(connect: impl Fn() -> F, mut snapshots: watch::Receiver<Arc<Snapshot>>)
where
    F: Future<Output = Result<(SendRequest<Body>, Zeroizing<String>), String>>,
{
    let mut told = Told::default();
    let mut back_off = BACK_OFF.0;
    loop {
        let snapshot = Arc::clone(&snapshots.borrow_and_update());
        told.apply(&snapshot);
        // Who needs none asks for none.
        if snapshot.key_sets.is_empty() {
            if snapshots.changed().await.is_err() {
                return;
            }
            continue;
        }
        let ended = match connect().await {
            Ok((connection, token)) => follow(connection, &token, &mut told, &mut snapshots).await,
            Err(why) => Err(Status::unavailable(why)),
        };
        if snapshots.has_changed().is_err() {
            return;
        }
        back_off = if ended.is_ok() { BACK_OFF.0 } else { (back_off * 2).min(BACK_OFF.1) };
        if let Err(status) = ended {
            tracing::warn!(error = status.message(), again_in = ?back_off, "the controller tells no key sets");
        }
        tokio::select! {
            () = tokio::time::sleep(back_off) => {}
            changed = snapshots.changed() => if changed.is_err() { return },
        }
    }
}
