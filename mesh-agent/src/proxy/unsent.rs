//! Bytes that are ready for a client which takes none of them: seen at its socket, where every version's answers end.
//!
//! Promises to know since when a write has waited without any progress. Never ends a connection itself. Tested below,
//! and in the lab (`http/limits.rs`, `http/abuse.rs`).

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

use crate::body::lasted;

/// What waits at a socket.
#[derive(Debug)]
pub(super) struct Unsent {
    begun: Instant,
    /// Milliseconds after `begun`, and one: 0 is nothing waits.
    since: AtomicU64,
}

impl Unsent {
    /// Since when bytes wait that the client does not take.
    pub fn since(&self) -> Option<Instant> {
        let millis = self.since.load(Ordering::Relaxed).checked_sub(1)?;
        Some(self.begun + Duration::from_millis(millis))
    }

    /// Completes once bytes have waited for so long.
    pub async fn stuck(&self, limit: Duration) {
        lasted(|| self.since(), limit).await;
    }

    fn note<T>(&self, written: &Poll<io::Result<T>>) {
        let waits = self.since.load(Ordering::Relaxed) != 0;
        if written.is_pending() != waits {
            let since = if waits { 0 } else { self.begun.elapsed().as_millis() as u64 + 1 };
            self.since.store(since, Ordering::Relaxed);
        }
    }
}

/// A client's transport, whose writes are watched.
#[derive(Debug)]
pub(super) struct Watched<S> {
    io: S,
    unsent: Arc<Unsent>,
}

impl<S> Watched<S> {
    pub fn new(io: S) -> (Self, Arc<Unsent>) {
        let unsent = Arc::new(Unsent { begun: Instant::now(), since: AtomicU64::new(0) });
        (Self { io, unsent: Arc::clone(&unsent) }, unsent)
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
        self.unsent.note(&written);
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, slices);
        self.unsent.note(&written);
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

    #[tokio::test(start_paused = true)]
    async fn what_waits_is_known_and_progress_ends_the_wait() -> io::Result<()> {
        const LIMIT: Duration = Duration::from_secs(10);
        let (near, mut far) = tokio::io::duplex(8);
        let (mut near, unsent) = Watched::new(near);
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
}
