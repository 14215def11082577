//! The mesh connections of one source pod, kept for the next stream.
//!
//! Keyed by everything that makes a connection what it is: never shared between identities, addresses or
//! expectations. One dial per key however many ask at once; what it comes to is told to all who waited for it.
//! Tested in `tunnel/tests`.

use std::{
    future::Future,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use foldhash::HashMap;
use tokio::{net::TcpStream, sync::watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{MeshConnection, Wire, connect, connect_tunnels, settings::POOL_IDLE};
use crate::{
    error::{Error, Result},
    identity::{SpiffeId, WorkloadIdentity},
    workers::Shard,
};

/// What a pooled connection is for; equal keys may share one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PoolKey {
    source: SpiffeId,
    source_ip: IpAddr,
    destination: SocketAddr,
    expected: Expected,
    wire: Wire,
    shard: Shard,
}

impl PoolKey {
    /// From the pod `source` at `source_ip` to port 15008 at `destination`, who must be one of `expected`.
    /// `wire` is what it is for: [`Wire::Hbone`] for byte streams, [`Wire::MeshH2`] for requests (a peer that does
    /// not know that gives an HBONE connection).
    pub fn new(
        source: SpiffeId,
        source_ip: IpAddr,
        destination: SocketAddr,
        expected: &[SpiffeId],
        wire: Wire,
    ) -> Self {
        let expected = Expected::of(expected);
        Self { source, source_ip, destination, expected, wire, shard: Shard::current() }
    }
}

/// Whom a connection may lead to: nearly always the one identity of one pod.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Expected {
    One(SpiffeId),
    Many(Arc<[SpiffeId]>),
}

impl Expected {
    fn of(expected: &[SpiffeId]) -> Self {
        if let [one] = expected {
            return Self::One(one.clone());
        }
        let mut many = expected.to_vec();
        many.sort();
        many.dedup();
        if let [one] = &many[..] { Self::One(one.clone()) } else { Self::Many(many.into()) }
    }

    fn as_slice(&self) -> &[SpiffeId] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }
}

/// The mesh connections of one source pod.
#[derive(Debug)]
pub struct Pool {
    entries: Arc<Mutex<HashMap<PoolKey, Entry>>>,
    gone: CancellationToken,
    _gone: DropGuard,
}

impl Default for Pool {
    fn default() -> Self {
        let gone = CancellationToken::new();
        Self { entries: Arc::default(), _gone: gone.clone().drop_guard(), gone }
    }
}

#[derive(Debug, Default)]
struct Entry {
    open: Vec<MeshConnection>,
    dialling: Option<watch::Receiver<Option<Result<()>>>>,
}

enum Step<'a> {
    Use(MeshConnection),
    Wait(watch::Receiver<Option<Result<()>>>),
    Dial(Turn<'a>),
}

impl Pool {
    /// A connection of this key with a place for one stream set aside: a pooled one, else one made over what
    /// `dial` gives (never polled when it is not needed). At most 100 streams share a connection; idle ones are
    /// released after 5 minutes.
    ///
    /// # Errors
    /// Those of `dial` and [`connect`], to all who waited for the same attempt.
    pub async fn get<D>(&self, key: &PoolKey, identity: &WorkloadIdentity, dial: D) -> Result<MeshConnection>
    where
        D: Future<Output = Result<TcpStream>>,
    {
        let turn = loop {
            match self.step(key) {
                Step::Use(connection) => return Ok(connection),
                Step::Dial(turn) => break turn,
                Step::Wait(mut attempt) => {
                    // An attempt that is dropped undecided leaves the turn to one of those who waited.
                    if let Ok(outcome) = attempt.wait_for(Option::is_some).await
                        && let Some(Err(error)) = &*outcome
                    {
                        return Err(error.clone());
                    }
                }
            }
        };
        let made = async {
            let stream = dial.await?;
            match key.wire {
                Wire::MeshH2 => connect(stream, identity, key.expected.as_slice()).await,
                Wire::Hbone => connect_tunnels(stream, identity, key.expected.as_slice()).await,
            }
        };
        // Boxed: rare, and every request would have to make room for it.
        turn.finish(Box::pin(made).await)
    }

    /// A pooled connection of this key with a place for one stream set aside, if there is one.
    pub fn ready(&self, key: &PoolKey) -> Option<MeshConnection> {
        reserve(&lock(&self.entries), key)
    }

    /// How many connections it keeps.
    pub fn connections(&self) -> usize {
        lock(&self.entries).values().map(|entry| entry.open.len()).sum()
    }

    fn step(&self, key: &PoolKey) -> Step<'_> {
        let mut entries = lock(&self.entries);
        if let Some(connection) = reserve(&entries, key) {
            return Step::Use(connection);
        }
        let entry = entries.entry(key.clone()).or_default();
        if let Some(attempt) = &entry.dialling {
            return Step::Wait(attempt.clone());
        }
        let (outcome, attempt) = watch::channel(None);
        entry.dialling = Some(attempt);
        Step::Dial(Turn { pool: self, key: key.clone(), outcome })
    }
}

/// A place on the first pooled connection that has one. The key is not copied for that.
fn reserve(entries: &HashMap<PoolKey, Entry>, key: &PoolKey) -> Option<MeshConnection> {
    entries.get(key)?.open.iter().find_map(MeshConnection::reserve)
}

fn lock(entries: &Mutex<HashMap<PoolKey, Entry>>) -> MutexGuard<'_, HashMap<PoolKey, Entry>> {
    // Nothing in the critical sections can leave the map half changed.
    entries.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The right, and the duty, to dial for a key.
struct Turn<'a> {
    pool: &'a Pool,
    key: PoolKey,
    outcome: watch::Sender<Option<Result<()>>>,
}

impl Turn<'_> {
    fn finish(self, made: Result<MeshConnection>) -> Result<MeshConnection> {
        let outcome: Result<()> = made.as_ref().map(|_| ()).map_err(Error::clone);
        let mine = made.map(|connection| {
            // The first place of a connection just made is free, unless it is closed already: then the caller
            // learns it from its first stream.
            let mine = connection.reserve().unwrap_or_else(|| connection.clone());
            let entries = Arc::downgrade(&self.pool.entries);
            let release = release_when_done(entries, self.key.clone(), connection.clone());
            // Without the pool nothing keeps the connection but its streams.
            tokio::spawn(self.pool.gone.clone().run_until_cancelled_owned(release));
            lock(&self.pool.entries).entry(self.key.clone()).or_default().open.push(connection);
            mine
        });
        self.end_turn();
        self.outcome.send_replace(Some(outcome));
        mine
    }

    fn end_turn(&self) {
        let mut entries = lock(&self.pool.entries);
        if let Some(entry) = entries.get_mut(&self.key) {
            entry.dialling = None;
            if entry.open.is_empty() {
                entries.remove(&self.key);
            }
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        // Already ended unless the caller went away in the middle.
        if self.outcome.borrow().is_none() {
            self.end_turn();
        }
    }
}

/// Takes a connection out of the pool when it closes or is retired, or when no stream was on it for a whole idle time.
async fn release_when_done(
    entries: Weak<Mutex<HashMap<PoolKey, Entry>>>,
    key: PoolKey,
    connection: MeshConnection,
) {
    loop {
        let (before, _) = connection.usage();
        let ended = tokio::time::timeout(POOL_IDLE, connection.done()).await.is_ok();
        let Some(entries) = entries.upgrade() else { return };
        let mut entries = lock(&entries);
        // Under the lock, so that nobody is given a place at the same moment.
        if !ended && connection.usage() != (before, false) {
            continue;
        }
        if let Some(entry) = entries.get_mut(&key) {
            entry.open.retain(|kept| !kept.is_same(&connection));
            if entry.open.is_empty() && entry.dialling.is_none() {
                entries.remove(&key);
            }
        }
        return;
    }
}
