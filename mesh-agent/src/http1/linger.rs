//! The end of a connection whose client may still be sending: what it sends is read and thrown away for a moment.
//!
//! Closing a socket with unread bytes resets it, and the reset can overtake the answer that says what was wrong. Bounded
//! in bytes and time. Tested in `tests/`.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, ReadBuf},
    time::Sleep,
};

/// How long the client may take to read the answer and close (nginx's `lingering_timeout`: 5 s; our clients are apps
/// on the same node).
const LINGER: Duration = Duration::from_secs(1);

/// How much is thrown away.
const LINGER_BYTES: usize = 1 << 20;

/// A refused connection that waits for its client.
#[derive(Debug)]
pub(super) struct Linger {
    until: Pin<Box<Sleep>>,
    left: usize,
}

impl Linger {
    pub(super) fn new() -> Self {
        Self { until: Box::pin(tokio::time::sleep(LINGER)), left: LINGER_BYTES }
    }

    /// Ready when the client has closed, or has had its share.
    pub(super) fn poll<S: AsyncRead + Unpin>(&mut self, io: &mut S, cx: &mut Context<'_>) -> Poll<()> {
        let mut space = [0; 4 << 10];
        while self.left > 0 {
            let mut buffer = ReadBuf::new(&mut space);
            match Pin::new(&mut *io).poll_read(cx, &mut buffer) {
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {
                    self.left = self.left.saturating_sub(buffer.filled().len());
                }
                Poll::Ready(_) => return Poll::Ready(()),
                Poll::Pending => return self.until.as_mut().poll(cx),
            }
        }
        Poll::Ready(())
    }
}
