//! How much one connection moves before the others of its thread have their turn.
//!
//! A thread does one thing after the other, and looks for what has come in when nothing is left to do: a connection that always
//! finds bytes would let the others wait for as long as the runtime allows, hundreds of turns. Tested below.

use std::{
    pin::pin,
    task::{Context, Poll},
};

use tokio::task::yield_now;

/// What has been moved in this turn, bytes.
#[derive(Debug, Default)]
pub struct Turn(usize);

impl Turn {
    /// Bytes of one turn: a fraction of a millisecond, encryption included.
    pub const BYTES: usize = 256 << 10;

    /// So much has been moved.
    pub fn took(&mut self, bytes: usize) {
        self.0 += bytes;
    }

    /// There was nothing more to move: others have their turn anyway.
    pub fn over(&mut self) {
        self.0 = 0;
    }

    /// Pending once when the turn is over: woken when the runtime has looked for what has come in for others.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.0 < Self::BYTES {
            return Poll::Ready(());
        }
        self.0 = 0;
        // What it asks the runtime for stands though it is dropped.
        pin!(yield_now()).poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    #[tokio::test]
    async fn who_has_moved_much_is_woken_behind_the_others() {
        let mut turn = Turn::default();
        turn.took(Turn::BYTES - 1);
        poll_fn(|cx| turn.poll(cx)).await;
        turn.took(1);
        let other = tokio::spawn(async {});
        poll_fn(|cx| turn.poll(cx)).await;
        assert!(other.is_finished());
        // Which began another.
        turn.took(Turn::BYTES);
        turn.over();
        assert!(poll_fn(|cx| Poll::Ready(turn.poll(cx).is_ready())).await);
    }
}
