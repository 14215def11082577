//! The key sets that the configuration names, kept fresh, and told to the agents of the nodes.
//!
//! Promises: each URI is fetched once for the whole mesh, anew every 20 minutes (Istio), and sooner after a failure, ever
//! less often; what was fetched last stays good while fetching fails; what the configuration names no more is forgotten.
//! An agent that asks is told every set that there is and from then on every change. Tested in `tests/` beside this file.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{mpsc, watch},
    task::AbortHandle,
};
use tokio_util::sync::CancellationToken;
use tonic::{
    Request, Response, Status,
    body::Body,
    codegen::{BoxFuture, tokio_stream::wrappers::ReceiverStream},
    server::{Grpc, ServerStreamingService},
};
use tonic_prost::ProstCodec;

use super::jwks::{Fetched, Fetcher};
use crate::{
    source::key_sets::{KeySetMessage, WatchKeySets},
    state::snapshot::{KeySet, Snapshot},
};

/// How often a set is fetched anew (Istio's `PILOT_JWT_PUB_KEY_REFRESH_INTERVAL`).
const REFRESH: Duration = Duration::from_mins(20);

/// How long after the first failure it is tried again, and at the most after later ones: each time twice as long.
const BACK_OFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_mins(5));

/// What is known of each URI.
pub type Known = BTreeMap<Arc<str>, State>;

/// What is known of one URI.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    /// The set as it was last fetched.
    pub keys: Option<Arc<KeySet>>,
    /// Why it was not fetched the last time, if it was not.
    pub trouble: Option<Arc<str>>,
}

/// Key sets as they are now.
#[derive(Debug, Clone)]
pub struct KeySets {
    known: watch::Sender<Arc<Known>>,
    ended: CancellationToken,
}

impl Default for KeySets {
    fn default() -> Self {
        Self { known: watch::Sender::new(Arc::default()), ended: CancellationToken::new() }
    }
}

impl KeySets {
    /// Follows the configuration: fetches what it names, for as long as there is one.
    pub async fn follow(&self, fetcher: Fetcher, mut snapshots: watch::Receiver<Arc<Snapshot>>) {
        let mut fetching: HashMap<Arc<str>, Fetching> = HashMap::new();
        loop {
            let snapshot = Arc::clone(&snapshots.borrow_and_update());
            let same = |uri: &Arc<str>, task: &Fetching| {
                snapshot.key_sets.get(uri).is_some_and(|cell| cell.timeout == task.timeout)
            };
            fetching.retain(|uri, task| same(uri, task));
            self.change(|known| known.retain(|uri, _| snapshot.key_sets.contains_key(uri)));
            for (uri, cell) in &snapshot.key_sets {
                fetching.entry(Arc::clone(uri)).or_insert_with(|| {
                    let (all, fetcher) = (self.clone(), fetcher.clone());
                    let (uri, timeout) = (Arc::clone(uri), cell.timeout);
                    let task = tokio::spawn(async move { all.keep(&fetcher, &uri, timeout).await });
                    Fetching { timeout, task: task.abort_handle() }
                });
            }
            if snapshots.changed().await.is_err() {
                return;
            }
        }
    }

    /// Tells nobody any more: who listens goes to another controller.
    pub fn end(&self) {
        self.ended.cancel();
    }

    /// What is known of a URI now.
    pub fn state(&self, uri: &str) -> State {
        self.known.borrow().get(uri).cloned().unwrap_or_default()
    }

    /// Told whenever something of it changes.
    pub fn changes(&self) -> watch::Receiver<Arc<Known>> {
        self.known.subscribe()
    }

    /// Fetches one set for ever.
    async fn keep(&self, fetcher: &Fetcher, uri: &Arc<str>, timeout: Duration) {
        let mut back_off = BACK_OFF.0;
        loop {
            let fetched = fetcher.fetch(uri, timeout).await;
            let wait = if fetched.is_ok() { REFRESH } else { back_off };
            back_off = if fetched.is_ok() { BACK_OFF.0 } else { (back_off * 2).min(BACK_OFF.1) };
            self.learn(uri, fetched, wait);
            // So that what began at once does not go on at once.
            tokio::time::sleep(wait.mul_f64(0.9 + 0.2 * fastrand::f64())).await;
        }
    }

    pub(super) fn learn(&self, uri: &Arc<str>, fetched: Fetched, wait: Duration) {
        let before = self.state(uri);
        let now = match fetched {
            Ok(keys) => State { keys: Some(keys), trouble: None },
            Err(why) => {
                let kept = before.keys.is_some();
                tracing::warn!(%uri, error = %why, kept, again_in = ?wait, "a key set was not fetched");
                State { keys: before.keys.clone(), trouble: Some(why.into()) }
            }
        };
        if now != before {
            tracing::info!(%uri, keys = now.keys.as_ref().map_or(0, |keys| keys.len()), "a key set");
            self.change(|known| drop(known.insert(Arc::clone(uri), now.clone())));
        }
    }

    fn change(&self, change: impl FnOnce(&mut Known)) {
        self.known.send_if_modified(|known| {
            let mut changed = Known::clone(known);
            change(&mut changed);
            let differs = changed != **known;
            if differs {
                *known = Arc::new(changed);
            }
            differs
        });
    }

    /// Answers a call of [`crate::source::key_sets::WATCH_KEY_SETS`], whose caller has shown who it is.
    pub async fn serve<B>(&self, request: http::Request<B>) -> http::Response<Body>
    where
        B: http_body::Body + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
    {
        let mut grpc = Grpc::new(ProstCodec::<KeySetMessage, WatchKeySets>::default());
        grpc.server_streaming(Watch(self.clone()), request).await
    }

    /// Sends every set that there is, and then every change, until nobody listens.
    async fn tell(self, to: mpsc::Sender<Result<KeySetMessage, Status>>) {
        let mut changes = self.known.subscribe();
        let mut told = Known::new();
        loop {
            let known = Arc::clone(&changes.borrow_and_update());
            for (uri, state) in known.iter().filter(|(uri, state)| told.get(*uri) != Some(*state)) {
                if to.send(Ok(message(uri, state))).await.is_err() {
                    return;
                }
            }
            told = Known::clone(&known);
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = to.closed() => return,
                () = self.ended.cancelled() => return,
            }
        }
    }
}

fn message(uri: &Arc<str>, state: &State) -> KeySetMessage {
    KeySetMessage {
        uri: uri.to_string(),
        jwks: state.keys.as_ref().map(|keys| keys.text().to_owned()),
        trouble: state.trouble.as_deref().unwrap_or_default().to_owned(),
    }
}

/// The task that fetches a set; it ends with this.
struct Fetching {
    timeout: Duration,
    task: AbortHandle,
}

impl Drop for Fetching {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One call, as tonic's server wants it.
struct Watch(KeySets);

impl ServerStreamingService<WatchKeySets> for Watch {
    type Response = KeySetMessage;
    type ResponseStream = ReceiverStream<Result<KeySetMessage, Status>>;
    type Future = BoxFuture<Response<Self::ResponseStream>, Status>;

    fn call(&mut self, _request: Request<WatchKeySets>) -> Self::Future {
        let (to, stream) = mpsc::channel(1);
        tokio::spawn(self.0.clone().tell(to));
        Box::pin(async move { Ok(Response::new(ReceiverStream::new(stream))) })
    }
}
