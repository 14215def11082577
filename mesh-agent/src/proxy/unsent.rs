//! Bytes that are ready for a client which takes none of them: seen at its socket, where every version's answers end.
//!
//! Promises to know since when a write has waited without any progress. The kernel says that a socket has room again only
//! when a third of its buffer is free, so that what its peer has acknowledged is looked at too, a few times within the
//! limit: a client that has taken anything in each quarter of it is slow, and not stuck. Costs no system call while writes
//! go through. Never ends a connection itself. Tested below, and in the lab (`http/limits.rs`, `http/abuse.rs`).

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::Instant,
};

use crate::{body::Connection, capture, detect::Prefixed};

/// Bytes of a transport that its peer has not acknowledged, where that can be known.
pub(super) type Left<S> = fn(&S) -> Option<u32>;

/// As the kernel says.
pub(super) fn of_socket(client: &Prefixed<TcpStream>) -> Option<u32> {
    capture::unacknowledged(client.inner())
}

/// A transport that is no socket.
pub(super) fn not_known<S>(_: &S) -> Option<u32> {
    None
}

/// What waits at a socket.
#[derive(Debug)]
pub(super) struct Unsent {
    begun: Instant,
    /// Milliseconds after `begun`, and one: 0 is nothing waits.
    since: AtomicU64,
    /// When the writer was last asked to look; as `since`.
    asked: AtomicU64,
    /// The writer is to look, before it waits on.
    look: AtomicBool,
    /// What the peer had not acknowledged when the writer last looked, in bytes.
    left: AtomicU64,
    connection: Arc<Connection>,
}

/// No look was taken yet.
const UNKNOWN: u64 = u64::MAX;

/// How often what waits is looked at within the limit.
const LOOKS: u32 = 4;

/// How often the task of the connection may need to be woken until it has looked.
const WAKES: u32 = 4;

impl Unsent {
    /// Since when bytes wait that the client does not take.
    pub fn since(&self) -> Option<Instant> {
        self.read(&self.since)
    }

    /// When the writer is to be asked to look; `None` while nothing waits.
    pub fn look_at(&self, limit: Duration) -> Option<Instant> {
        let since = self.since()?;
        Some(self.read(&self.asked).map_or(since, |asked| asked.max(since)) + limit / LOOKS)
    }

    /// Asks the writer to look: it does when the task of its connection runs next.
    pub fn ask(&self) {
        self.asked.store(self.now(), Ordering::Relaxed);
        self.look.store(true, Ordering::Relaxed);
    }

    /// Completes once bytes have waited for so long. To be polled by the task of the connection.
    pub async fn stuck(&self, limit: Duration) {
        loop {
            let now = Instant::now();
            let (Some(since), Some(look_at)) = (self.since(), self.look_at(limit)) else {
                tokio::time::sleep(limit / LOOKS).await;
                continue;
            };
            if look_at <= now {
                self.ask();
                for _ in 0..WAKES {
                    if self.look.load(Ordering::Relaxed) {
                        tokio::task::yield_now().await;
                    }
                }
            } else if since + limit <= now {
                return;
            } else {
                tokio::time::sleep_until(look_at.min(since + limit)).await;
            }
        }
    }

    fn read(&self, at: &AtomicU64) -> Option<Instant> {
        let millis = at.load(Ordering::Relaxed).checked_sub(1)?;
        Some(self.begun + Duration::from_millis(millis))
    }

    fn now(&self) -> u64 {
        self.begun.elapsed().as_millis() as u64 + 1
    }

    fn note<T>(&self, written: &Poll<io::Result<T>>, unacknowledged: impl FnOnce() -> Option<u32>) {
        let waits = self.since.load(Ordering::Relaxed) != 0;
        if written.is_pending() != waits {
            let since = if waits { 0 } else { self.now() };
            self.since.store(since, Ordering::Relaxed);
            if waits && self.left.load(Ordering::Relaxed) != UNKNOWN {
                // It has waited for long, and others behind it longer.
                self.left.store(UNKNOWN, Ordering::Relaxed);
                self.connection.taken();
            }
        } else if waits && self.look.load(Ordering::Relaxed) {
            self.look.store(false, Ordering::Relaxed);
            if let Some(left) = unacknowledged() {
                self.looked(left.into());
            }
        }
    }

    /// Nothing is written while a write waits: what is left gets less by what the peer takes alone.
    fn looked(&self, left: u64) {
        let before = self.left.swap(left, Ordering::Relaxed);
        if before != UNKNOWN && left < before {
            self.since.store(self.now(), Ordering::Relaxed);
            self.connection.taken();
        }
    }
}

/// A client's transport, whose writes are watched.
#[derive(Debug)]
pub(super) struct Watched<S> {
    io: S,
    /// What its peer has not acknowledged.
    left: Left<S>,
    unsent: Arc<Unsent>,
}

impl<S> Watched<S> {
    /// Also notes for `connection` what a slow client takes.
    pub fn new(io: S, left: Left<S>, connection: Arc<Connection>) -> (Self, Arc<Unsent>) {
        let unsent = Arc::new(Unsent {
            begun: Instant::now(),
            since: AtomicU64::new(0),
            asked: AtomicU64::new(0),
            look: AtomicBool::new(false),
            left: AtomicU64::new(UNKNOWN),
            connection,
        });
        (Self { io, left, unsent: Arc::clone(&unsent) }, unsent)
    }

    fn note<T>(&self, written: &Poll<io::Result<T>>) {
        self.unsent.note(written, || (self.left)(&self.io));
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, bytes);
        self.note(&written);
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, slices);
        self.note(&written);
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::body::{Activity, Stall};

    #[tokio::test(start_paused = true)]
    async fn what_waits_is_known_and_progress_ends_the_wait() -> io::Result<()> {
        const LIMIT: Duration = Duration::from_secs(10);
        let (near, mut far) = tokio::io::duplex(8);
        let (mut near, unsent) = Watched::new(near, not_known, Arc::default());
        near.write_all(b"12345678").await?;
        assert_eq!(unsent.since(), None);
        let writing = tokio::spawn(async move { near.write_all(b"12345678").await });
        let begun = Instant::now();
        let reading = async {
            tokio::time::sleep(Duration::from_secs(7)).await;
            far.read_exact(&mut [0; 4]).await
        };
        let (read, ()) = tokio::join!(reading, unsent.stuck(LIMIT));
        read?;
        // Anew from the last progress.
        assert_eq!(begun.elapsed().as_secs(), 17);
        far.read_exact(&mut [0; 12]).await?;
        writing.await??;
        assert_eq!(unsent.since(), None);
        Ok(())
    }

    /// Takes nothing for good; what is left gets less every 3 s, for 30 s.
    struct Slow(Instant);

    impl Slow {
        fn left(&self) -> u32 {
            100 - self.0.elapsed().as_secs().min(30) as u32 / 3
        }
    }

    impl AsyncWrite for Slow {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Pending
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_peer_acknowledges_is_progress_though_no_write_goes_through() -> io::Result<()> {
        const LIMIT: Duration = Duration::from_secs(16);
        let (connection, begun) = (Arc::<Connection>::default(), Instant::now());
        let activity = Activity::on(Arc::clone(&connection));
        activity.handed_over();
        let stall = Stall { idle: None, flush: LIMIT };
        let (mut slow, unsent) = Watched::new(Slow(begun), |slow| Some(slow.left()), connection);
        // In one task, as a connection and what watches it are.
        let stuck = async { tokio::join!(unsent.stuck(LIMIT), activity.stalled(stall)) };
        tokio::select! {
            biased;
            written = slow.write_all(b"1") => written?,
            _ = stuck => {}
        }
        // Seen at the next look, at the latest.
        let waited = begun.elapsed().as_secs();
        assert!((46..=50).contains(&waited), "{waited}");
        Ok(())
    }
}
