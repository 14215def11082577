//! The wrapper around a client's stream, as hyper reads and writes it.
//!
//! At any time hyper holds bytes of at most one request: a head is handed on once it is complete and checked, the body
//! passes up to its last byte, and only a further read gets the next head. Bodies go straight into hyper's buffer; the
//! one buffer of the edge holds heads, and what came with them. Tested in `tests/`.

use std::{
    future::poll_fn,
    io::{self, IoSlice},
    mem::MaybeUninit,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use super::{
    Limits,
    Refusal::{self, Malformed},
    chunked::{Follower, Seen},
    gate::Gate,
    head::{Framing, Head, Scanner},
    linger::Linger,
    writing::Writing,
};

/// Bytes asked for while a head is awaited: most heads fit.
const READ: usize = 4 << 10;

/// Empty lines passed over before a request line (RFC 9112 §2.2: at least one).
const EMPTY_LINES: u8 = 4;

/// What hyper reads in the place of bytes that were refused.
const STAND_IN: &[u8] = b"GET / HTTP/1.1\r\nhost: refused\r\nconnection: close\r\n\r\n";

/// Between the client's stream and hyper's HTTP/1 connection.
#[derive(Debug)]
pub struct Edge<S> {
    io: S,
    limits: Limits,
    gate: Arc<Gate>,
    /// Read and not handed on.
    buffer: BytesMut,
    state: State,
    writing: Writing,
    /// The connection ends with a refusal; the second is there once the way back is closed.
    refused: bool,
    linger: Option<Linger>,
}

/// What hyper's next read gets.
#[derive(Debug)]
enum State {
    /// A head, once it is complete; and the empty lines before it so far.
    Head(Scanner, u8),
    /// The rest of a checked head, which is in the buffer.
    Handing { left: usize, head: Head },
    /// A body of which so many bytes are to come.
    Length(u64, After),
    /// A body in chunks.
    Chunked(Box<Follower>, After),
    /// Nothing, until the service has said whether the protocol is switched.
    Undecided,
    /// Whatever comes: it is no longer HTTP.
    Switched,
    /// The stand-in, from this byte on; then end of file.
    Refused(usize),
    /// End of file.
    Ended,
}

/// What comes after a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    Request,
    PerhapsSwitch,
}

impl After {
    fn state(self) -> State {
        match self {
            Self::Request => State::Head(Scanner::default(), 0),
            Self::PerhapsSwitch => State::Undecided,
        }
    }
}

impl<S> Edge<S> {
    /// Puts the edge before a stream that starts with a request.
    pub fn new(io: S, limits: Limits) -> (Self, Arc<Gate>) {
        let gate = Arc::new(Gate::default());
        let edge = Self {
            io,
            limits: limits.bearable(),
            gate: Arc::clone(&gate),
            buffer: BytesMut::new(),
            state: After::Request.state(),
            writing: Writing::new(),
            refused: false,
            linger: None,
        };
        (edge, gate)
    }

    /// The stream below.
    pub fn inner(&self) -> &S {
        &self.io
    }

    /// Gives an empty buffer back. Whether the edge is between requests, and the last answer through.
    pub fn rest(&mut self) -> bool {
        if self.buffer.is_empty() {
            self.buffer = BytesMut::new();
        }
        matches!(self.state, State::Head(..)) && self.writing.is_through()
    }

    /// The next state comes from what is buffered, or `false`: more has to be read.
    fn scan_head(&mut self, cx: &Context<'_>) -> bool {
        let State::Head(scanner, empty) = &mut self.state else { return true };
        while self.buffer.starts_with(b"\r\n") && *empty < EMPTY_LINES {
            self.buffer.advance(2);
            *empty += 1;
        }
        if self.buffer.is_empty() || *self.buffer == *b"\r" && *empty < EMPTY_LINES {
            return false;
        }
        match scanner.scan(&self.buffer, &self.limits) {
            Ok(None) if self.gate.head_expired() => self.refuse(Refusal::HeadTimeout, cx),
            Ok(None) => return false,
            Ok(Some(head)) => {
                self.gate.hand_on(&head, cx);
                self.writing.request(head.http10);
                self.state = State::Handing { left: head.bytes, head };
            }
            Err(refusal) => self.refuse(refusal, cx),
        }
        true
    }

    /// Whether any of a head is there: an empty line is none.
    fn is_mid_head(&self) -> bool {
        !self.buffer.is_empty() && *self.buffer != *b"\r"
    }

    fn refuse(&mut self, refusal: Refusal, cx: &Context<'_>) {
        self.gate.refuse(refusal, cx);
        self.writing.request(false);
        self.buffer = BytesMut::new();
        self.refused = true;
        self.state = State::Refused(0);
    }

    /// Hands on what is buffered of a head and of the body that follows it, as far as `out` has room.
    fn hand_buffered(&mut self, out: &mut ReadBuf<'_>) {
        while out.remaining() > 0 && !self.buffer.is_empty() {
            let room = out.remaining().min(self.buffer.len());
            match &mut self.state {
                State::Handing { left, head } => {
                    let taken = room.min(*left);
                    out.put_slice(&self.buffer[..taken]);
                    self.buffer.advance(taken);
                    *left -= taken;
                    if *left == 0 {
                        self.state = after_head(head);
                    }
                }
                State::Length(left, after) => {
                    let taken = room.min(usize::try_from(*left).unwrap_or(usize::MAX));
                    out.put_slice(&self.buffer[..taken]);
                    self.buffer.advance(taken);
                    *left -= taken as u64;
                    if *left == 0 {
                        self.state = after.state();
                    }
                }
                State::Chunked(follower, after) => {
                    let seen = follower.follow(&self.buffer[..room], &self.limits);
                    let after = *after;
                    let taken = self.seen(seen, room, after);
                    out.put_slice(&self.buffer[..taken]);
                    self.buffer.advance(taken);
                }
                State::Switched => {
                    out.put_slice(&self.buffer[..room]);
                    self.buffer.advance(room);
                }
                State::Head(..) | State::Undecided | State::Refused(_) | State::Ended => return,
            }
        }
    }

    /// Takes a look at `length` bytes of a chunked body into account: how many of them go to hyper.
    fn seen(&mut self, seen: Seen, length: usize, after: After) -> usize {
        match seen {
            Seen::GoesOn => length,
            Seen::Ended(taken) => {
                self.state = after.state();
                taken
            }
            // End of file inside the chunks: hyper takes that for a broken body, whatever was before.
            Seen::Refused(taken, refusal) => {
                self.gate.refuse_body(refusal);
                self.refused = true;
                self.state = State::Ended;
                taken
            }
        }
    }
}

fn after_head(head: &Head) -> State {
    let after = if head.may_switch { After::PerhapsSwitch } else { After::Request };
    match head.body {
        Framing::Length(0) => after.state(),
        Framing::Length(length) => State::Length(length, after),
        Framing::Chunked => State::Chunked(Box::default(), after),
    }
}

impl<S: AsyncRead + Unpin> Edge<S> {
    /// Waits, at [rest](Edge::rest) and without a buffer, until something has come, which is kept for the next read; `false` at
    /// the end of file. Cancel safe.
    ///
    /// # Errors
    /// Those of the stream.
    pub async fn begun(&mut self) -> io::Result<bool> {
        poll_fn(|cx| {
            let mut space = [MaybeUninit::uninit(); READ];
            let mut read = ReadBuf::uninit(&mut space);
            ready!(Pin::new(&mut self.io).poll_read(cx, &mut read))?;
            self.buffer.extend_from_slice(read.filled());
            Poll::Ready(Ok(!read.filled().is_empty()))
        })
        .await
    }

    /// While a request is answered hyper reads only to see whether its client leaves; what the client sends meanwhile
    /// waits here, so that hyper has one request at a time.
    fn poll_leaving(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.buffer.len() < READ {
            self.buffer.reserve(READ);
            match tokio_util::io::poll_read_buf(Pin::new(&mut self.io), cx, &mut self.buffer) {
                Poll::Ready(Ok(0)) if self.buffer.is_empty() => {
                    self.state = State::Ended;
                    return Poll::Ready(Ok(()));
                }
                // A request of its is here and not handed on yet: that one comes first.
                Poll::Ready(Ok(0)) | Poll::Pending => break,
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            }
        }
        self.gate.waits(self.buffer.is_empty());
        if !self.buffer.is_empty() {
            // hyper reads again only when it is woken: to it, there was nothing to read.
            self.gate.wake_after_turn(cx);
        }
        Poll::Pending
    }

    /// Awaits a head and hands it over to the states that follow.
    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.scan_head(cx) {
            self.buffer.reserve(READ);
            let read = tokio_util::io::poll_read_buf(Pin::new(&mut self.io), cx, &mut self.buffer);
            match read {
                Poll::Ready(Ok(0)) if self.is_mid_head() => {
                    self.refuse(Malformed("end of file inside a request's head (RFC 9112 §8)"), cx);
                }
                Poll::Ready(Ok(0)) => self.state = State::Ended,
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    self.gate.waits(!self.is_mid_head());
                    self.gate.wait_for_head(self.is_mid_head(), cx);
                    return Poll::Pending;
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Reads a part of a body straight into hyper's buffer.
    fn poll_body(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = out.filled().len();
        match &mut self.state {
            State::Length(left, after) => {
                ready!(Pin::new(&mut (&mut self.io).take(*left)).poll_read(cx, out))?;
                let read = out.filled().len() - before;
                *left = left.saturating_sub(read as u64);
                match (read, *left) {
                    (0, _) => self.state = State::Ended,
                    (_, 0) => self.state = after.state(),
                    _ => {}
                }
            }
            State::Chunked(follower, after) => {
                ready!(Pin::new(&mut self.io).poll_read(cx, out))?;
                let read = &out.filled()[before..];
                if read.is_empty() {
                    self.state = State::Ended;
                    return Poll::Ready(Ok(()));
                }
                let seen = follower.follow(read, &self.limits);
                let (after, length) = (*after, read.len());
                let taken = self.seen(seen, length, after);
                if !self.refused {
                    self.buffer.extend_from_slice(&out.filled()[before + taken..]);
                }
                out.set_filled(before + taken);
            }
            _ => ready!(Pin::new(&mut self.io).poll_read(cx, out))?,
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Edge<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = out.filled().len();
        while out.remaining() > 0 {
            match this.state {
                State::Head(..) if this.gate.is_busy() => return this.poll_leaving(cx),
                State::Head(..) => {
                    ready!(this.poll_head(cx))?;
                    continue;
                }
                State::Undecided => {
                    let Some(yes) = this.gate.decision(cx) else { return Poll::Pending };
                    this.state = if yes { State::Switched } else { After::Request.state() };
                    continue;
                }
                // hyper would take the end of file behind the stand-in for a client that has left before the answer.
                State::Refused(from) if from == STAND_IN.len() && this.gate.is_busy() => {
                    this.gate.wake_after_turn(cx);
                    return Poll::Pending;
                }
                State::Refused(from) if from == STAND_IN.len() => break,
                State::Refused(from) => {
                    let taken = out.remaining().min(STAND_IN.len() - from);
                    out.put_slice(&STAND_IN[from..from + taken]);
                    this.state = State::Refused(from + taken);
                    break;
                }
                State::Ended => break,
                State::Handing { .. } | State::Length(..) | State::Chunked(..) | State::Switched => {}
            }
            if this.buffer.is_empty() {
                return this.poll_body(cx, out);
            }
            this.hand_buffered(out);
            if out.filled().len() > before {
                break;
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Edge<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.writing.poll_interim(&mut this.io, &this.gate, cx))?;
        let written = ready!(Pin::new(&mut this.io).poll_write(cx, bytes))?;
        this.writing.wrote(written, bytes);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.writing.poll_interim(&mut this.io, &this.gate, cx))?;
        let written = ready!(Pin::new(&mut this.io).poll_write_vectored(cx, buffers))?;
        this.writing.wrote_vectored(written, buffers);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.writing.poll_interim(&mut this.io, &this.gate, cx))?;
        this.writing.flushed();
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.linger.is_none() {
            ready!(Pin::new(&mut this.io).poll_shutdown(cx))?;
            // An upload that was answered early may still be coming.
            let coming = matches!(this.state, State::Length(..) | State::Chunked(..));
            if !this.refused && !coming {
                return Poll::Ready(Ok(()));
            }
        }
        this.linger.get_or_insert_with(Linger::new).poll(&mut this.io, cx).map(Ok)
    }
}
