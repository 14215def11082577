//! The way back to the client: hyper's bytes untouched, and interim responses where they cannot land inside another.
//!
//! What the edge knows of hyper: it flushes its IO only when its own buffer is empty, it tries to flush after each
//! response before it asks for the next head, and between a request's head and its final response it writes at most
//! `100 Continue`. So when the last it did before it took a head was a flush, every earlier response is through, and
//! until the next write there is a place for interim responses. Never holds back or changes a byte of hyper's. Tested
//! in `tests/`, against hyper.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Buf;
use tokio::io::AsyncWrite;

use super::gate::Gate;

/// What hyper writes by itself before a final response.
const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// Where the way back stands.
#[derive(Debug)]
pub(super) struct Writing {
    /// hyper has written nothing since it flushed, so that its buffer was empty then.
    flushed: bool,
    /// The current request's final response has not begun, and all before it is through.
    open: bool,
    /// Interim responses that are being written.
    interim: io::Cursor<Vec<u8>>,
}

impl Writing {
    pub(super) fn new() -> Self {
        Self { flushed: true, open: false, interim: io::Cursor::default() }
    }

    /// hyper takes the head of a request.
    pub(super) fn request(&mut self, http10: bool) {
        self.open = self.flushed && !http10;
    }

    /// Writes the interim responses that there is a place for.
    pub(super) fn poll_interim<S: AsyncWrite + Unpin>(
        &mut self,
        io: &mut S,
        gate: &Gate,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            while self.interim.has_remaining() {
                let written = ready!(Pin::new(&mut *io).poll_write(cx, self.interim.chunk()))?;
                if written == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                self.interim.advance(written);
            }
            match gate.take_interim() {
                Some(bytes) if self.open => self.interim = io::Cursor::new(bytes),
                _ => return Poll::Ready(Ok(())),
            }
        }
    }

    /// hyper flushes: all it has written is through.
    pub(super) fn flushed(&mut self) {
        self.flushed = true;
    }

    /// Whether nothing is on its way back.
    pub(super) fn is_through(&self) -> bool {
        self.flushed && !self.interim.has_remaining()
    }

    /// hyper has written the first `written` bytes of these.
    pub(super) fn wrote(&mut self, written: usize, bytes: &[u8]) {
        self.flushed = false;
        if self.open && written > 0 && !(written == CONTINUE.len() && bytes == CONTINUE) {
            self.open = false;
        }
    }

    /// The same for several buffers.
    pub(super) fn wrote_vectored(&mut self, written: usize, buffers: &[IoSlice<'_>]) {
        let mut filled = buffers.iter().filter(|buffer| !buffer.is_empty());
        match (filled.next(), filled.next()) {
            (Some(only), None) => self.wrote(written, only),
            _ => self.wrote(written, b""),
        }
    }
}
