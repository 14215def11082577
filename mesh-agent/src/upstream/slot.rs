//! The HTTP/2 connections to one address: as many as the peer's limit of streams asks for, one dialled at a time.
//!
//! Promises: the first connection with room gets the next stream; where none has any and there may be no more of them, a
//! request waits for whichever has some first and belongs to none meanwhile; what nobody has used for a while is closed;
//! whoever waited while somebody dialled in vain is told what came of it, and does not dial again one after the other.
//! Tested below.

use std::{
    future::poll_fn,
    pin::pin,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use h2::client::SendRequest;
use tokio::{sync::Notify, time::Instant};

use super::{
    Kept,
    pool::lock,
    terms::{LOOK, Terms},
};
use crate::{
    error::{Error, Result},
    http2,
    state::snapshot::ConnectionPool,
};

/// Connections to one address; beyond them, requests wait for a stream.
const MOST: usize = 16;

/// One connection, and as many more holders of its mark as there are streams on it.
#[derive(Debug)]
struct Open {
    sender: SendRequest<Bytes>,
    streams: Arc<Mark>,
    made: Instant,
    /// When it last got a stream.
    used: Instant,
    /// Streams that it has had.
    served: u32,
}

/// What the streams of one connection hold.
#[derive(Debug)]
struct Mark {
    made: Instant,
    /// When the last of them has ended, in milliseconds since then.
    ended: AtomicU64,
}

impl Mark {
    fn new(made: Instant) -> Arc<Self> {
        Arc::new(Self { made, ended: AtomicU64::new(0) })
    }
}

/// The connections to one address.
#[derive(Debug, Default)]
struct Connections {
    open: Vec<Open>,
    /// The marks of those that take no more streams and have some left.
    spent: Vec<Arc<Mark>>,
    /// The rule of whoever asked last.
    pool: ConnectionPool,
}

impl Open {
    fn streams(&self) -> usize {
        Arc::strong_count(&self.streams) - 1
    }

    /// Since when it has no stream, if it has none.
    fn unused(&self) -> Option<Instant> {
        let ended = self.made + Duration::from_millis(self.streams.ended.load(Ordering::Relaxed));
        (self.streams() == 0).then(|| ended.max(self.used))
    }

    /// Streams that it has room for, where there may be so many by the rule.
    fn room(&self, most: usize) -> usize {
        self.sender.current_max_send_streams().min(most).saturating_sub(self.streams())
    }

    /// One more of them.
    fn take(&mut self, freed: &Arc<Freed>) -> Found {
        self.used = Instant::now();
        self.served = self.served.saturating_add(1);
        let place = Place { stream: Some(Arc::clone(&self.streams)), freed: Arc::clone(freed) };
        (self.sender.clone(), place)
    }
}

/// A stream's place on a connection: to be held until the stream has ended.
#[derive(Debug)]
pub(super) struct Place {
    /// Let go of before the others are told.
    stream: Option<Arc<Mark>>,
    freed: Arc<Freed>,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(stream) = self.stream.take() {
            let ended = u64::try_from(stream.made.elapsed().as_millis()).unwrap_or(u64::MAX);
            stream.ended.store(ended, Ordering::Relaxed);
        }
        self.freed.notify.notify_one();
    }
}

/// A connection, and a place on it.
type Found = (SendRequest<Bytes>, Place);

/// Tells those who wait for room: one for each stream that may be opened, all where there may be another connection.
#[derive(Debug, Default)]
struct Freed {
    notify: Notify,
    /// Raised before it is looked for room, so that whoever makes some sees it.
    waiting: AtomicUsize,
}

/// Somebody waits, as long as this lives.
struct Waiting<'a>(&'a Freed);

impl Freed {
    fn wait(&self) -> Waiting<'_> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        Waiting(self)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What there is to be had.
enum Room {
    Stream(Found),
    /// Another connection.
    Connection,
    None,
}

/// The connections to one address.
#[derive(Debug, Default)]
pub(super) struct Slot {
    connections: Mutex<Connections>,
    dialling: tokio::sync::Mutex<()>,
    /// Dials that have come to something.
    dialled: AtomicU64,
    /// The last that failed: which it was, and why.
    failed: Mutex<Option<(u64, Error)>>,
    freed: Arc<Freed>,
}

impl Slot {
    /// A connection with room for another stream: one that is open, else one that `dial` makes (its second half is
    /// what the connection itself does, to its end), else the first that comes to have some.
    ///
    /// # Errors
    /// Why there is no connection, by this dial or one that was waited for.
    pub async fn get<D, C>(self: &Arc<Self>, kept: Kept<'_>, dial: impl FnOnce() -> D) -> Result<Found>
    where
        D: Future<Output = Result<(SendRequest<Bytes>, C)>>,
        C: Future<Output = ()> + Send + 'static,
    {
        match self.look(kept.pool) {
            Room::Stream(found) => Ok(found),
            // Boxed: rare, and every request would have to make room for it.
            Room::Connection | Room::None => Box::pin(self.wait(kept, dial)).await,
        }
    }

    async fn wait<D, C>(self: &Arc<Self>, kept: Kept<'_>, dial: impl FnOnce() -> D) -> Result<Found>
    where
        D: Future<Output = Result<(SendRequest<Bytes>, C)>>,
        C: Future<Output = ()> + Send + 'static,
    {
        let _waiting = self.freed.wait();
        // Held, once there has been no connection to be had, until there is one.
        let mut pending = None;
        loop {
            let before = self.dialled.load(Ordering::Acquire);
            let _turn = {
                // In line before looking: what is freed after that look is told. Left before dialling, so that nothing is
                // told to who does not listen; dropped, it hands on what it was told.
                let mut freed = pin!(self.freed.notify.notified());
                freed.as_mut().enable();
                match self.look(kept.pool) {
                    Room::Stream(found) => return Ok(found),
                    Room::Connection => tokio::select! {
                        turn = self.dialling.lock() => turn,
                        () = freed => continue,
                    },
                    Room::None => {
                        if let Some(usage) = kept.usage.filter(|_| pending.is_none()) {
                            pending = usage.wait(kept.pool)?;
                        }
                        freed.await;
                        continue;
                    }
                }
            };
            match self.look(kept.pool) {
                Room::Stream(found) => return Ok(found),
                Room::Connection => {}
                Room::None => continue,
            }
            if let Some((which, error)) = &*lock(&self.failed)
                && *which > before
            {
                return Err(error.clone());
            }
            let made = dial().await;
            let which = self.dialled.fetch_add(1, Ordering::AcqRel) + 1;
            return match made {
                Ok((sender, connection)) => Ok(self.opened(sender, connection)),
                Err(error) => {
                    *lock(&self.failed) = Some((which, error.clone()));
                    Err(error)
                }
            };
        }
    }

    /// Takes a new connection, and its first stream.
    fn opened(
        self: &Arc<Self>,
        sender: SendRequest<Bytes>,
        connection: impl Future<Output = ()> + Send + 'static,
    ) -> Found {
        let now = Instant::now();
        let mut open = Open { sender, streams: Mark::new(now), made: now, used: now, served: 0 };
        let found = open.take(&self.freed);
        let (slot, mark) = (Arc::downgrade(self), Arc::downgrade(&open.streams));
        let mut connections = lock(&self.connections);
        connections.open.push(open);
        connections.retire(now);
        drop(connections);
        tokio::spawn(drive(connection, slot, Arc::clone(&self.freed), mark));
        found
    }

    /// Closes what is kept no longer. When the next is due to be, or at least to be looked at; `None`: there is none.
    pub fn sweep(&self, now: Instant) -> Option<Instant> {
        let mut connections = lock(&self.connections);
        let (before, terms) = (connections.open.len(), Terms::of(&connections.pool));
        connections.retire(now);
        let until = |open: &Open| open.unused().and_then(|unused| terms.until(unused, open.made));
        connections
            .open
            .retain(|open| !http2::is_closed(&open.sender) && until(open).is_none_or(|until| until > now));
        if connections.open.len() < before {
            self.freed.notify.notify_waiters();
        }
        // One that is in use may be unused in an instant.
        let due = connections.open.iter().filter_map(|open| until(open).or_else(|| terms.sooner()));
        let due = due.fold(now + LOOK, Instant::min);
        (connections.number() > 0).then_some(due)
    }

    /// Closes what has no stream now.
    pub fn close_idle(&self) {
        let mut connections = lock(&self.connections);
        let before = connections.open.len();
        connections.open.retain(|open| open.streams() > 0);
        if connections.open.len() < before {
            self.freed.notify.notify_waiters();
        }
    }

    /// The first with room.
    fn look(&self, pool: &ConnectionPool) -> Room {
        let now = Instant::now();
        let most = pool.connections.map_or(MOST, |most| (most as usize).clamp(1, MOST));
        let mut connections = lock(&self.connections);
        connections.pool = *pool;
        connections.open.retain(|open| !http2::is_closed(&open.sender));
        connections.retire(now);
        let streams = connections.streams();
        let with_room = connections.open.iter_mut().find(|open| open.room(streams) > 0);
        if let Some(found) = with_room.map(|open| open.take(&self.freed)) {
            connections.retire(now);
            return Room::Stream(found);
        }
        if connections.number() < most { Room::Connection } else { Room::None }
    }

    /// Streams that the connection with this mark has room for; `None`: it takes none any more.
    fn room(&self, mark: &Weak<Mark>) -> Option<usize> {
        let connections = lock(&self.connections);
        let has_mark = |open: &&Open| std::ptr::eq(Arc::as_ptr(&open.streams), mark.as_ptr());
        let found = connections.open.iter().find(has_mark)?;
        (!http2::is_closed(&found.sender)).then(|| found.room(connections.streams()))
    }
}

impl Connections {
    /// Streams that one of them may have.
    fn streams(&self) -> usize {
        self.pool.streams.map_or(usize::MAX, |streams| streams as usize)
    }

    /// How many there are, with those that finish what they have.
    fn number(&mut self) -> usize {
        self.spent.retain(|streams| Arc::strong_count(streams) > 1);
        self.open.len() + self.spent.len()
    }

    /// Gives no more streams to those that have had all they may. With its last handle and stream gone a connection says
    /// goodbye and ends.
    fn retire(&mut self, now: Instant) {
        let terms = Terms::of(&self.pool);
        let spent = self.open.extract_if(.., |open| terms.is_spent(open.served, open.made, now));
        self.spent.extend(spent.map(|open| open.streams));
    }
}

/// Sees a connection through to its end. What its peer says may be room for those who wait: another limit of streams, or
/// a goodbye.
async fn drive(connection: impl Future<Output = ()>, slot: Weak<Slot>, freed: Arc<Freed>, mark: Weak<Mark>) {
    let mut connection = pin!(connection);
    let mut closed = false;
    poll_fn(|cx| {
        let done = connection.as_mut().poll(cx);
        let waiting = freed.waiting.load(Ordering::Relaxed);
        if !closed
            && waiting > 0
            && let Some(slot) = slot.upgrade()
        {
            let room = slot.room(&mark);
            closed = room.is_none();
            match room {
                Some(room) => (0..room.min(waiting)).for_each(|_| freed.notify.notify_one()),
                None => freed.notify.notify_waiters(),
            }
        }
        done
    })
    .await;
}

#[cfg(test)]
mod tests;
