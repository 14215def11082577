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

use super::pool::lock;
use crate::{
    error::{Error, Result},
    http2,
};

/// Connections to one address; beyond them, requests wait for a stream.
const MOST: usize = 16;

/// One connection, and as many more holders of its mark as there are streams on it.
#[derive(Debug)]
struct Open {
    sender: SendRequest<Bytes>,
    streams: Arc<()>,
    /// When it last got a stream.
    used: Instant,
}

impl Open {
    fn streams(&self) -> usize {
        Arc::strong_count(&self.streams) - 1
    }

    /// Streams that it has room for.
    fn room(&self) -> usize {
        self.sender.current_max_send_streams().saturating_sub(self.streams())
    }

    /// One more of them.
    fn take(&mut self, freed: &Arc<Freed>) -> Found {
        self.used = Instant::now();
        let place = Place { stream: Some(Arc::clone(&self.streams)), freed: Arc::clone(freed) };
        (self.sender.clone(), place)
    }
}

/// A stream's place on a connection: to be held until the stream has ended.
#[derive(Debug)]
pub(super) struct Place {
    /// Let go of before the others are told.
    stream: Option<Arc<()>>,
    freed: Arc<Freed>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.stream = None;
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
    open: Mutex<Vec<Open>>,
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
    pub async fn get<D, C>(self: &Arc<Self>, dial: impl FnOnce() -> D) -> Result<Found>
    where
        D: Future<Output = Result<(SendRequest<Bytes>, C)>>,
        C: Future<Output = ()> + Send + 'static,
    {
        match self.look() {
            Room::Stream(found) => Ok(found),
            // Boxed: rare, and every request would have to make room for it.
            Room::Connection | Room::None => Box::pin(self.wait(dial)).await,
        }
    }

    async fn wait<D, C>(self: &Arc<Self>, dial: impl FnOnce() -> D) -> Result<Found>
    where
        D: Future<Output = Result<(SendRequest<Bytes>, C)>>,
        C: Future<Output = ()> + Send + 'static,
    {
        let _waiting = self.freed.wait();
        loop {
            let before = self.dialled.load(Ordering::Acquire);
            let _turn = {
                // In line before looking: what is freed after that look is told. Left before dialling, so that nothing is
                // told to who does not listen; dropped, it hands on what it was told.
                let mut freed = pin!(self.freed.notify.notified());
                freed.as_mut().enable();
                match self.look() {
                    Room::Stream(found) => return Ok(found),
                    Room::Connection => tokio::select! {
                        turn = self.dialling.lock() => turn,
                        () = freed => continue,
                    },
                    Room::None => {
                        freed.await;
                        continue;
                    }
                }
            };
            match self.look() {
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
        let mut open = Open { sender, streams: Arc::default(), used: Instant::now() };
        let found = open.take(&self.freed);
        let (slot, mark) = (Arc::downgrade(self), Arc::downgrade(&open.streams));
        lock(&self.open).push(open);
        tokio::spawn(drive(connection, slot, Arc::clone(&self.freed), mark));
        found
    }

    /// Closes what has had no stream for so long; whether any connection is left.
    pub fn sweep(&self, idle: Duration) -> bool {
        let mut open = lock(&self.open);
        let before = open.len();
        // With its last handle gone a connection says goodbye and ends.
        open.retain(|open| {
            !http2::is_closed(&open.sender) && (open.streams() > 0 || open.used.elapsed() < idle)
        });
        if open.len() < before {
            self.freed.notify.notify_waiters();
        }
        !open.is_empty()
    }

    /// The first with room.
    fn look(&self) -> Room {
        let mut open = lock(&self.open);
        open.retain(|open| !http2::is_closed(&open.sender));
        let may_be_more = open.len() < MOST;
        match open.iter_mut().find(|open| open.room() > 0) {
            Some(found) => Room::Stream(found.take(&self.freed)),
            None if may_be_more => Room::Connection,
            None => Room::None,
        }
    }

    /// Streams that the connection with this mark has room for; `None`: it takes none any more.
    fn room(&self, mark: &Weak<()>) -> Option<usize> {
        let open = lock(&self.open);
        let found = open.iter().find(|open| std::ptr::eq(Arc::as_ptr(&open.streams), mark.as_ptr()))?;
        (!http2::is_closed(&found.sender)).then(|| found.room())
    }
}

/// Sees a connection through to its end. What its peer says may be room for those who wait: another limit of streams, or
/// a goodbye.
async fn drive(connection: impl Future<Output = ()>, slot: Weak<Slot>, freed: Arc<Freed>, mark: Weak<()>) {
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
mod tests {
    use std::{pin::Pin, task::Poll};

    use tokio::{
        io::{AsyncWriteExt as _, DuplexStream},
        task::JoinSet,
    };

    use super::*;
    use crate::error::Kind;

    type TestResult = std::result::Result<(), Box<dyn std::error::Error + Send + Sync>>;

    /// Frames of a peer: no more streams than this at a time, and a goodbye that covers the first stream.
    const fn settings(streams: u8) -> [u8; 15] {
        [0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, streams]
    }
    const GOODBYE: [u8; 17] = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0];

    /// A slot, and the far ends of the connections dialled for it.
    #[derive(Default)]
    struct Dialled {
        slot: Arc<Slot>,
        peers: Mutex<Vec<DuplexStream>>,
    }

    impl Dialled {
        /// So many places on connections to peers that let this many streams be open and answer none.
        async fn places(&self, count: usize, streams: u8) -> Result<Vec<Place>> {
            let mut places = Vec::new();
            for _ in 0..count {
                places.push(self.get(streams).await?.1);
            }
            Ok(places)
        }

        async fn get(&self, streams: u8) -> Result<Found> {
            self.slot.get(|| self.dial(streams)).await
        }

        async fn dial(&self, streams: u8) -> Result<(SendRequest<Bytes>, impl Future<Output = ()> + use<>)> {
            let failed = |error: &dyn std::error::Error| Error::new(Kind::ConnectFailure, error.to_string());
            let (near, mut far) = tokio::io::duplex(1 << 16);
            far.write_all(&settings(streams)).await.map_err(|error| failed(&error))?;
            let handshake = h2::client::handshake(near).await;
            let (sender, mut connection) = handshake.map_err(|error| failed(&error))?;
            lock(&self.peers).push(far);
            // Until its settings are known.
            poll_fn(|cx| {
                let _ = Pin::new(&mut connection).poll(cx);
                let known = sender.current_max_send_streams() == streams as usize;
                if known { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
            let connection = async {
                let _ = connection.await;
            };
            Ok((sender, connection))
        }

        /// The places taken on each connection.
        fn taken(&self) -> Vec<usize> {
            lock(&self.slot.open).iter().map(Open::streams).collect()
        }
    }

    async fn waits(future: Pin<&mut impl Future>) -> bool {
        let mut future = future;
        poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx).is_pending())).await
    }

    #[tokio::test]
    async fn another_connection_is_made_when_all_streams_are_taken() -> TestResult {
        let dialled = Dialled::default();
        let _places = dialled.places(6, 2).await?;
        assert_eq!(dialled.taken(), [2, 2, 2]);
        Ok(())
    }

    #[tokio::test]
    async fn where_all_are_full_the_first_place_that_is_freed_is_taken() -> TestResult {
        let dialled = Dialled::default();
        let mut places = dialled.places(MOST * 2, 2).await?;
        let (mut first, mut second) = (pin!(dialled.get(2)), pin!(dialled.get(2)));
        assert!(waits(first.as_mut()).await && waits(second.as_mut()).await);
        assert_eq!(dialled.taken(), [2; MOST], "who waits belongs to none");
        drop(places.remove(19));
        assert_eq!(dialled.taken()[9], 1);
        let _first = first.await?;
        assert_eq!(dialled.taken(), [2; MOST]);
        assert!(waits(second.as_mut()).await);
        drop(places.remove(7));
        let _second = second.await?;
        Ok(())
    }

    #[tokio::test]
    async fn who_gives_up_when_told_leaves_it_to_the_next() -> TestResult {
        let dialled = Dialled::default();
        let mut places = dialled.places(MOST, 1).await?;
        let mut first = Box::pin(dialled.get(1));
        let mut second = pin!(dialled.get(1));
        assert!(waits(first.as_mut()).await && waits(second.as_mut()).await);
        drop(places.remove(9));
        drop(first);
        second.await?;
        Ok(())
    }

    #[tokio::test]
    async fn where_the_connections_die_those_who_wait_get_a_new_one() -> TestResult {
        let dialled = Dialled::default();
        let _places = dialled.places(MOST, 1).await?;
        let mut waiting = pin!(async { tokio::join!(dialled.get(1), dialled.get(1)) });
        assert!(waits(waiting.as_mut()).await);
        lock(&dialled.peers).clear();
        let (first, second) = waiting.await;
        let _places = (first?, second?);
        assert_eq!(dialled.taken(), [1, 1]);
        Ok(())
    }

    #[tokio::test]
    async fn what_a_peer_says_may_be_room() -> TestResult {
        let dialled = Dialled::default();
        let mut places = dialled.places(MOST, 1).await?;
        for (frame, taken) in [(&settings(2)[..], 2), (&GOODBYE, 1)] {
            let mut waiting = pin!(dialled.get(1));
            assert!(waits(waiting.as_mut()).await);
            let mut peer = lock(&dialled.peers).remove(3);
            peer.write_all(frame).await?;
            places.push(waiting.await?.1);
            lock(&dialled.peers).insert(3, peer);
            assert_eq!((dialled.taken().len(), dialled.taken()[3]), (MOST, taken));
        }
        Ok(())
    }

    #[tokio::test(start_paused = true)]
    async fn who_waited_for_a_dial_in_vain_is_told_with_it() -> TestResult {
        let dialled = Dialled::default();
        let begun = Instant::now();
        let mut waiting = JoinSet::new();
        for _ in 0..10 {
            let slot = Arc::clone(&dialled.slot);
            waiting.spawn(async move {
                let black_hole = async {
                    tokio::time::sleep(Duration::from_secs(10)).await;
                    Err::<(_, std::future::Ready<()>), _>(Error::new(Kind::ConnectFailure, "no answer"))
                };
                slot.get(|| black_hole).await.map(drop).map_err(|error| error.kind)
            });
        }
        for outcome in waiting.join_all().await {
            assert_eq!(outcome, Err(Kind::ConnectFailure));
        }
        assert_eq!(begun.elapsed().as_secs(), 10);
        // Who comes later dials again.
        assert!(dialled.get(1).await.is_ok());
        Ok(())
    }
}
