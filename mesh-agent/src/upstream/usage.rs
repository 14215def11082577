//! What a pod has in use of a cluster whose rule limits it (`connectionPool`): connections, requests, retries, and who
//! waits for a connection.
//!
//! Promises: no limit is ever exceeded, however many ask at the same instant; what is freed goes to whoever has waited
//! longest, and who gives up waiting takes nothing along. A pod's use of a cluster outlives changes of the rule: a
//! lower limit lets nothing new in until enough has ended. Where a rule limits nothing, nothing is counted. Tested below,
//! and in the lab (`tests/tests/connection_pool.rs`).

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, Weak,
        atomic::{AtomicU32, Ordering},
    },
};

use arc_swap::ArcSwap;
use tokio::sync::Notify;

use super::pool::lock;
use crate::{
    error::{Error, Kind, Limit, Result},
    state::snapshot::{ClusterId, ClusterState, ConnectionPool, Protocol},
};

/// What one pod has in use of each limited cluster; swapped as a whole when one more comes into use: reading takes no lock.
#[derive(Debug, Default)]
pub struct Usages {
    by_cluster: ArcSwap<HashMap<ClusterId, Known>>,
    /// Held by whoever changes the map, so that no change is lost.
    changing: Mutex<()>,
}

#[derive(Debug, Clone)]
struct Known {
    usage: Arc<Usage>,
    cluster: Weak<ClusterState>,
}

impl Usages {
    /// What is in use of this cluster; `None` where nothing of it is limited.
    pub fn of(&self, limits: &ConnectionPool, cluster: &Arc<ClusterState>) -> Option<Arc<Usage>> {
        if !limits.counts() {
            return None;
        }
        if let Some(known) = self.by_cluster.load().get(&cluster.id) {
            return Some(Arc::clone(&known.usage));
        }
        Some(self.add(cluster))
    }

    fn add(&self, cluster: &Arc<ClusterState>) -> Arc<Usage> {
        let _changing = lock(&self.changing);
        let mut known = HashMap::clone(&self.by_cluster.load());
        // Those of clusters that are no more.
        known.retain(|_, known| known.cluster.strong_count() > 0);
        let new = || Known { usage: Arc::default(), cluster: Arc::downgrade(cluster) };
        let usage = Arc::clone(&known.entry(cluster.id).or_insert_with(new).usage);
        self.by_cluster.store(Arc::new(known));
        usage
    }
}

/// What one pod has in use of one cluster.
#[derive(Debug, Default)]
pub struct Usage {
    connections: Mutex<Queue>,
    /// Of HTTP/2, where a connection has so many.
    streams: Mutex<Queue>,
    pending: AtomicU32,
    requests: AtomicU32,
    retries: AtomicU32,
}

/// What there are so many of, and who waits for one.
#[derive(Debug, Default)]
struct Queue {
    used: u32,
    /// How many there may be, by whoever asked last.
    limit: u32,
    /// Who waits, in turn.
    waiting: BTreeMap<u64, Arc<Notify>>,
    next_ticket: u64,
}

/// Something in use, until this is dropped.
#[derive(Debug)]
pub struct Used {
    usage: Arc<Usage>,
    what: What,
}

#[derive(Debug, Clone, Copy)]
enum What {
    Connection,
    Stream,
    Pending,
    Request,
    Retry,
}

impl Drop for Used {
    fn drop(&mut self) {
        match self.what {
            What::Connection | What::Stream => self.usage.hand_on(self.what),
            What::Pending => self.usage.pending.sub(),
            What::Request => self.usage.requests.sub(),
            What::Retry => self.usage.retries.sub(),
        }
    }
}

/// What a request has in use for as long as it is under way.
#[derive(Debug)]
pub struct RequestPlace {
    _connection: Option<Used>,
    _request: Option<Used>,
}

impl Usage {
    /// A place for a request: over HTTP/1 a connection, over HTTP/2 one of the streams of all connections, for which it waits
    /// its turn as far as requests may wait; over either version one of the requests that may be under way.
    ///
    /// # Errors
    /// [`Kind::Full`], with what there is no more of.
    pub async fn request(
        self: &Arc<Self>,
        most: &ConnectionPool,
        protocol: Protocol,
    ) -> Result<RequestPlace> {
        let connection = match (most.connections, protocol, most.streams) {
            (None, ..) | (_, Protocol::Http2, None) => None,
            (Some(limit), Protocol::Http2, Some(each)) => {
                Some(self.turn(What::Stream, limit.saturating_mul(each), most).await?)
            }
            (Some(limit), ..) => Some(self.turn(What::Connection, limit, most).await?),
        };
        let request = self.count(&self.requests, most.requests, What::Request, Limit::Requests)?;
        Ok(RequestPlace { _connection: connection, _request: request })
    }

    /// A connection for bytes: at once, or not at all.
    ///
    /// # Errors
    /// [`Kind::Full`], where there is no more.
    pub fn stream(self: &Arc<Self>, most: &ConnectionPool) -> Result<Option<Used>> {
        let Some(limit) = most.connections else { return Ok(None) };
        let taken = self.take(&mut lock(&self.connections), limit);
        if taken { Ok(Some(self.used(What::Connection))) } else { Err(full(Limit::Connections, limit)) }
    }

    /// Connections in use.
    pub fn connections(&self) -> u32 {
        lock(&self.connections).used
    }

    /// A place among those who wait for a connection.
    ///
    /// # Errors
    /// [`Kind::Full`], where there is no more.
    pub fn wait(self: &Arc<Self>, most: &ConnectionPool) -> Result<Option<Used>> {
        self.count(&self.pending, most.pending, What::Pending, Limit::Pending)
    }

    /// One of the retries that may be under way; `None` where there is no more.
    pub fn retry(self: &Arc<Self>, most: u32) -> Option<Used> {
        self.retries.add(most).then(|| self.used(What::Retry))
    }

    /// A connection or stream, after those who came before.
    async fn turn(self: &Arc<Self>, what: What, limit: u32, most: &ConnectionPool) -> Result<Used> {
        let waiting = {
            let mut queue = lock(self.queue(what));
            if self.take(&mut queue, limit) {
                return Ok(self.used(what));
            }
            if !self.pending.add(most.pending.unwrap_or(u32::MAX)) {
                return Err(full(Limit::Pending, most.pending.unwrap_or(u32::MAX)));
            }
            let (ticket, told) = (queue.next_ticket, Arc::new(Notify::new()));
            queue.next_ticket += 1;
            queue.waiting.insert(ticket, Arc::clone(&told));
            Waiting { usage: self, what, ticket, told, taken: false }
        };
        Ok(waiting.take().await)
    }

    /// Takes one, if there is one left for who comes last.
    fn take(&self, queue: &mut MutexGuard<'_, Queue>, limit: u32) -> bool {
        queue.limit = limit;
        // A limit that was raised is room that nobody has told of.
        self.let_in(queue);
        let room = queue.used < limit;
        queue.used += u32::from(room);
        room
    }

    /// Has those who wait go on, as far as there is room.
    fn let_in(&self, queue: &mut MutexGuard<'_, Queue>) {
        while queue.used < queue.limit
            && let Some((_, told)) = queue.waiting.pop_first()
        {
            queue.used += 1;
            self.pending.sub();
            told.notify_one();
        }
    }

    /// One has ended: whoever waits has it next.
    fn hand_on(&self, what: What) {
        let mut queue = lock(self.queue(what));
        queue.used -= 1;
        self.let_in(&mut queue);
    }

    fn queue(&self, what: What) -> &Mutex<Queue> {
        if matches!(what, What::Stream) { &self.streams } else { &self.connections }
    }

    fn count(
        self: &Arc<Self>,
        counter: &AtomicU32,
        most: Option<u32>,
        what: What,
        limit: Limit,
    ) -> Result<Option<Used>> {
        let Some(most) = most else { return Ok(None) };
        if counter.add(most) { Ok(Some(self.used(what))) } else { Err(full(limit, most)) }
    }

    fn used(self: &Arc<Self>, what: What) -> Used {
        Used { usage: Arc::clone(self), what }
    }
}

/// Somebody who waits for a connection or stream, until it is taken or given up.
struct Waiting<'a> {
    usage: &'a Arc<Usage>,
    what: What,
    ticket: u64,
    told: Arc<Notify>,
    taken: bool,
}

impl Waiting<'_> {
    async fn take(mut self) -> Used {
        self.told.notified().await;
        self.taken = true;
        self.usage.used(self.what)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.taken {
            return;
        }
        let waited = lock(self.usage.queue(self.what)).waiting.remove(&self.ticket).is_some();
        if waited {
            self.usage.pending.sub();
        } else {
            // It was given one and does not want it any more.
            self.usage.hand_on(self.what);
        }
    }
}

/// A count that knows its limit only when it is asked.
trait Count {
    /// One more; whether that is within the limit.
    fn add(&self, limit: u32) -> bool;
    /// One less.
    fn sub(&self);
}

impl Count for AtomicU32 {
    fn add(&self, limit: u32) -> bool {
        let more = |count| (count < limit).then(|| count + 1);
        self.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).is_ok()
    }

    fn sub(&self) {
        self.fetch_sub(1, Ordering::AcqRel);
    }
}

fn full(limit: Limit, most: u32) -> Error {
    Error::new(Kind::Full(limit), format!("{most} {} are all that connectionPool allows", limit.words()))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests;
