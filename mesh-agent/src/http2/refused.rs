//! What the `h2` crate keeps to itself of a connection, found by reading along on it: requests that it refuses (a header
//! list beyond what it decodes, a stream beyond those allowed at a time, a request that is no message), and heads that
//! do not get done.
//!
//! Promises to tell each refusal once, when its answer goes out, and never to change a byte. Never judges a frame:
//! that is `h2`'s. Tested in `tests.rs` beside it and in the lab (`http/limits.rs`, `http/abuse.rs`).

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use h2::Reason;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

use crate::body::lasted;

/// Why a stream got an answer without ever becoming a request of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamRefusal {
    /// Its header list is larger than what is decoded; answered with 431.
    HeaderList,
    /// More streams are open than the settings allow; reset with `REFUSED_STREAM`.
    TooMany,
    /// What it says is no request (RFC 9113 section 8.1.1); reset with this code.
    Malformed(Reason),
}

/// The client's preface, RFC 9113 section 3.4.
const PREFACE: u32 = 24;

/// Bytes of a frame's header, and of the code that follows it in a `RST_STREAM`.
const HEADER: usize = 9;
const CODE: usize = 4;

const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const CONTINUATION: u8 = 9;

/// The flag of the last frame of a header block.
const END_HEADERS: u8 = 4;

/// Streams without an answer that are remembered; what a client opens beyond, after a GOAWAY, has none to come.
const MOST_OPEN: usize = 4096;

/// Streams that the client has opened and that we have not been given, ascending.
#[derive(Debug, Default)]
struct Open {
    streams: VecDeque<u32>,
    newest: u32,
    /// Since when a header block is arriving that is not complete.
    head_began: Option<Instant>,
}

impl Open {
    fn opened(&mut self, stream: u32) {
        // Anything else is trailers, or breaks the protocol.
        if stream <= self.newest {
            return;
        }
        self.newest = stream;
        if self.streams.len() == MOST_OPEN {
            self.streams.pop_front();
        }
        self.streams.push_back(stream);
    }

    fn take(&mut self, stream: u32) -> bool {
        // They are accepted in the order of their opening: nearly always the first.
        let found = match self.streams.front() {
            Some(first) if *first == stream => Some(0),
            _ => self.streams.binary_search(&stream).ok(),
        };
        found.is_some_and(|at| self.streams.remove(at).is_some())
    }
}

/// What is known of a connection that is read along; told of every stream that becomes a request, so that those remain
/// which do not.
#[derive(Debug, Clone)]
pub struct Along {
    /// Only the connection's own task takes it: never waited for.
    open: Arc<Mutex<Open>>,
}

impl Along {
    /// This stream is a request now.
    pub fn accepted(&self, stream: h2::StreamId) {
        self.lock().take(stream.as_u32());
    }

    /// Completes once a head has not got done within this time.
    pub async fn head_late(&self, limit: Duration) {
        lasted(|| self.lock().head_began, limit).await;
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The accepting end's transport, read along.
#[derive(Debug)]
pub struct ReadAlong<S, F> {
    io: S,
    received: Frames,
    sent: Frames,
    along: Along,
    refused: F,
}

impl<S, F: FnMut(StreamRefusal)> ReadAlong<S, F> {
    /// `refused` is called from within the connection's writes; it must not block.
    pub fn new(io: S, refused: F) -> (Self, Along) {
        let along = Along { open: Arc::default() };
        let received = Frames { skip: PREFACE, ..Frames::default() };
        let io = Self { io, received, sent: Frames::default(), along: along.clone(), refused };
        (io, along)
    }

    fn note_received(&mut self, bytes: &[u8]) {
        let along = &self.along;
        let (before, mut another) = (self.received.mid_block(), false);
        self.received.feed(bytes, |frame| {
            if frame.kind == HEADERS {
                another = true;
                along.lock().opened(frame.stream);
            }
        });
        // Few heads come in pieces: nothing to note of the others.
        let now = self.received.mid_block();
        if before != now || now && another {
            along.lock().head_began = now.then(Instant::now);
        }
    }

    fn note_sent(&mut self, bytes: &[u8]) {
        let (along, refused) = (&self.along, &mut self.refused);
        self.sent.feed(bytes, |frame| {
            let refusal = match frame.kind {
                HEADERS => StreamRefusal::HeaderList,
                RST_STREAM if frame.code == Reason::REFUSED_STREAM => StreamRefusal::TooMany,
                RST_STREAM => StreamRefusal::Malformed(frame.code),
                _ => return,
            };
            if along.lock().take(frame.stream) {
                refused(refusal);
            }
        });
    }
}

/// Where one direction of the connection is within its frames.
#[derive(Debug, Default)]
struct Frames {
    /// Bytes to come that are of no interest.
    skip: u32,
    head: [u8; HEADER + CODE],
    have: usize,
    /// The last frame was of a header block, which is what `skip` stands for.
    in_block: bool,
    /// More frames of that block are to come.
    unfinished: bool,
}

/// What is looked at of a frame.
struct Frame {
    kind: u8,
    stream: u32,
    /// Of a `RST_STREAM`.
    code: Reason,
}

impl Frames {
    fn feed(&mut self, mut bytes: &[u8], mut seen: impl FnMut(Frame)) {
        while !bytes.is_empty() {
            let passed = (self.skip as usize).min(bytes.len());
            bytes = &bytes[passed..];
            // No more than `skip`, which is 32 bits.
            self.skip -= passed as u32;
            let taken = (self.wanted() - self.have).min(bytes.len());
            self.head[self.have..self.have + taken].copy_from_slice(&bytes[..taken]);
            bytes = &bytes[taken..];
            self.have += taken;
            if self.have == self.wanted() {
                self.skip = self.length() - (self.have - HEADER) as u32;
                self.have = 0;
                self.in_block = matches!(self.head[3], HEADERS | CONTINUATION);
                if self.in_block {
                    self.unfinished = self.head[4] & END_HEADERS == 0;
                }
                seen(self.frame());
            }
        }
    }

    /// Whether a header block has begun and not ended.
    fn mid_block(&self) -> bool {
        self.unfinished || self.in_block && self.skip > 0
    }

    /// Bytes to be read of the frame that begins here.
    fn wanted(&self) -> usize {
        let is_reset = self.have >= HEADER && self.head[3] == RST_STREAM && self.length() as usize >= CODE;
        if is_reset { HEADER + CODE } else { HEADER }
    }

    fn length(&self) -> u32 {
        u32::from_be_bytes([0, self.head[0], self.head[1], self.head[2]])
    }

    fn frame(&self) -> Frame {
        let [_, _, _, kind, _, a, b, c, d, code @ ..] = self.head;
        // The first bit is reserved, RFC 9113 section 4.1.
        Frame { kind, stream: u32::from_be_bytes([a & 0x7f, b, c, d]), code: u32::from_be_bytes(code).into() }
    }
}

impl<S: AsyncRead + Unpin, F: FnMut(StreamRefusal) + Unpin> AsyncRead for ReadAlong<S, F> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buffer))?;
        self.note_received(&buffer.filled()[before..]);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin, F: FnMut(StreamRefusal) + Unpin> AsyncWrite for ReadAlong<S, F> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.io).poll_write(cx, bytes))?;
        self.note_sent(&bytes[..written]);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, slices))?;
        let mut left = written;
        for slice in slices {
            let part = left.min(slice.len());
            self.note_sent(&slice[..part]);
            left -= part;
        }
        Poll::Ready(Ok(written))
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
