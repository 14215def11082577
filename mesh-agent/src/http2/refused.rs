//! What the `h2` crate keeps to itself of a connection, found by reading along on it: requests that it refuses (a header
//! list beyond what it decodes, a stream beyond those allowed at a time, a request that is no message), and heads that
//! do not get done.
//!
//! Promises to tell each refusal once, when its answer has gone out, and no request that we are given; and never to change
//! a byte. Never judges a frame: that is `h2`'s. Tested below and in the lab (`http/limits.rs`, `http/abuse.rs`).

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
    /// Those of them that `h2` has reset: it may give us one all the same, if it was a request before it broke.
    reset: Vec<(u32, Reason)>,
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
#[derive(Clone)]
pub struct Along(Arc<Shared>);

struct Shared {
    /// Only the connection's own task takes it: never waited for.
    open: Mutex<Open>,
    refused: Box<dyn Fn(StreamRefusal) + Send + Sync>,
}

impl std::fmt::Debug for Along {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Along").field(&*self.lock()).finish()
    }
}

impl Along {
    /// This stream is a request now.
    pub(super) fn accepted(&self, stream: h2::StreamId) {
        let (stream, mut open) = (stream.as_u32(), self.lock());
        if !open.take(stream) {
            open.reset.retain(|(reset, _)| *reset != stream);
        }
    }

    /// No stream is about to become a request: of those that are reset none will.
    pub(super) fn all_accepted(&self) {
        // Taken out first: nothing is locked while it is told.
        let reset = std::mem::take(&mut self.lock().reset);
        for (_, reason) in reset {
            (self.0.refused)(StreamRefusal::Malformed(reason));
        }
    }

    /// Completes once a head has not got done within this time.
    pub async fn head_late(&self, limit: Duration) {
        lasted(|| self.lock().head_began, limit).await;
    }

    /// An answer went out before we were given the stream, if that is so.
    fn answered(&self, frame: &Frame) {
        let mut open = self.lock();
        if !matches!(frame.kind, HEADERS | RST_STREAM) || !open.take(frame.stream) {
            return;
        }
        let refusal = match frame.kind {
            HEADERS => StreamRefusal::HeaderList,
            _ if frame.code == Reason::REFUSED_STREAM => StreamRefusal::TooMany,
            _ => return open.reset.push((frame.stream, frame.code)),
        };
        drop(open);
        (self.0.refused)(refusal);
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The accepting end's transport, read along.
#[derive(Debug)]
pub struct ReadAlong<S> {
    io: S,
    received: Frames,
    sent: Frames,
    along: Along,
}

impl<S> ReadAlong<S> {
    /// `refused` is called from within the connection's task; it must not block.
    pub fn new(io: S, refused: impl Fn(StreamRefusal) + Send + Sync + 'static) -> (Self, Along) {
        let along = Along(Arc::new(Shared { open: Mutex::default(), refused: Box::new(refused) }));
        let received = Frames { skip: PREFACE, ..Frames::default() };
        let io = Self { io, received, sent: Frames::default(), along: along.clone() };
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
        let along = &self.along;
        self.sent.feed(bytes, |frame| along.answered(&frame));
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

impl<S: AsyncRead + Unpin> AsyncRead for ReadAlong<S> {
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

impl<S: AsyncWrite + Unpin> AsyncWrite for ReadAlong<S> {
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

#[cfg(test)]
mod tests {
    use std::future::Pending;

    use bytes::Bytes;
    use h2::client::SendRequest;
    use http::{Request, StatusCode};
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        sync::mpsc,
    };

    use super::*;
    use crate::{
        drain::Drain,
        error::Error,
        http2::{
            ServerStream, Watch, serve,
            tests::{OPTIONS, PREFACE, TestResult, echo},
        },
    };

    fn reading(along: &Along) -> Watch<'_, Pending<Error>> {
        Watch { along: Some(along), ..Watch::none() }
    }

    type Refusals = Arc<Mutex<Vec<StreamRefusal>>>;

    fn lock<T>(told: &Mutex<T>) -> MutexGuard<'_, T> {
        told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has what is told of a connection remembered.
    fn remembering<S>(io: S) -> (ReadAlong<S>, Along, Refusals) {
        let told = Refusals::default();
        let telling = Arc::clone(&told);
        let (io, along) = ReadAlong::new(io, move |refusal| lock(&telling).push(refusal));
        (io, along, told)
    }

    /// A connection to a server that reads along, and what it is told, in order.
    async fn read_along(
        server: h2::server::Builder,
    ) -> std::result::Result<(SendRequest<Bytes>, Refusals), h2::Error> {
        // Small pipes, so that frames come in pieces; both prefaces have room.
        let (near, far) = tokio::io::duplex(64);
        let (far, along, told) = remembering(far);
        tokio::spawn(
            async move { serve(far, &server, OPTIONS, &Drain::default(), reading(&along), echo).await },
        );
        let (sender, connection) = h2::client::handshake(near).await?;
        tokio::spawn(connection);
        Ok((sender, told))
    }

    fn large(bytes: usize) -> std::result::Result<Request<()>, http::Error> {
        Request::get("http://a/").header("x-large", "x".repeat(bytes)).body(())
    }

    #[tokio::test]
    async fn a_header_list_that_is_not_decoded_is_told_once() -> TestResult {
        let mut server = h2::server::Builder::new();
        server.max_header_list_size(1000);
        let (sender, told) = read_along(server).await?;
        let mut sender = sender.ready().await?;
        // Whole ones before, between and after.
        let mut answers = Vec::new();
        for bytes in [10, 1500, 20, 1500, 30] {
            let (answer, _) = sender.send_request(large(bytes)?, true)?;
            answers.push(answer);
            sender = sender.ready().await?;
        }
        let mut statuses = Vec::new();
        for answer in answers {
            statuses.push(answer.await?.status().as_u16());
        }
        assert_eq!(statuses, [200, 431, 200, 431, 200]);
        assert_eq!(*lock(&told), [StreamRefusal::HeaderList; 2]);
        Ok(())
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_that_does_not_get_done_is_known() -> TestResult {
        const LIMIT: Duration = Duration::from_secs(10);
        let (mut near, far) = tokio::io::duplex(1 << 10);
        let (mut far, along) = ReadAlong::new(far, |_| {});
        let reading = tokio::spawn(async move {
            let mut buffer = [0; 64];
            while far.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
        });
        let late = || tokio::time::timeout(LIMIT * 2, along.head_late(LIMIT));
        let headers = |length: u8, flags: u8| [0, 0, length, 1, flags, 0, 0, 0, 1];
        near.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await?;
        // A whole one; one whose frame is cut; its rest, which leaves the block open; the last frame of that.
        for (bytes, is_late) in [
            ([&headers(2, 4)[..], b"ab"].concat(), false),
            ([&headers(3, 0)[..], b"ab"].concat(), true),
            (b"c".to_vec(), true),
            (vec![0, 0, 0, 9, 4, 0, 0, 0, 1], false),
            ([&headers(1, 4)[..], b"a"].concat(), false),
            // Data that stays away is another's to judge.
            (vec![0, 0, 9, 0, 0, 0, 0, 0, 1], false),
        ] {
            near.write_all(&bytes).await?;
            // The clock stands still until what was written is read.
            tokio::time::sleep(Duration::from_millis(1)).await;
            assert_eq!(late().await.is_ok(), is_late, "{bytes:?}");
        }
        drop(near);
        Ok(reading.await?)
    }

    #[tokio::test]
    async fn a_request_that_is_no_message_is_told() -> TestResult {
        let (sender, told) = read_along(h2::server::Builder::new()).await?;
        let mut sender = sender.ready().await?;
        // Two lengths that differ (RFC 9113 section 8.1.1).
        let odd =
            Request::post("http://a/").header("content-length", "1").header("content-length", "2").body(())?;
        let (answer, _body) = sender.send_request(odd, false)?;
        let reset = answer.await.err().and_then(|error| error.reason());
        assert_eq!(reset, Some(Reason::PROTOCOL_ERROR));
        let (answer, _) = sender.ready().await?.send_request(large(10)?, true)?;
        assert_eq!(answer.await?.status(), StatusCode::OK);
        assert_eq!(*lock(&told), [StreamRefusal::Malformed(Reason::PROTOCOL_ERROR)]);
        Ok(())
    }

    #[tokio::test]
    async fn a_request_that_breaks_before_it_is_accepted_is_no_refusal() -> TestResult {
        // Three streams in one segment, the middle one with a byte more than its length: h2 resets it before we have it.
        let head = |stream: u8, fields: &[u8]| {
            let length = u8::try_from(3 + fields.len()).unwrap_or_default();
            [&[0, 0, length, 1, 4, 0, 0, 0, stream, 0x83, 0x86, 0x84], fields].concat()
        };
        let data = |stream: u8, flags: u8| [0, 0, 2, 0, flags, 0, 0, 0, stream, b'a', b'b'];
        // content-length, the 28th of the static table (RFC 7541 appendix A), not indexed.
        let one_byte = [0x0f, 0x0d, 1, b'1'];
        let bytes =
            [&head(1, &[])[..], &data(1, 1), &head(3, &one_byte), &data(3, 0), &head(5, &[]), &data(5, 1)];
        let (mut near, far) = tokio::io::duplex(1 << 16);
        near.write_all(&[PREFACE, &bytes.concat()].concat()).await?;
        let (far, along, told) = remembering(far);
        let (accepting, mut accepted) = mpsc::unbounded_channel();
        let handle = move |request, stream: ServerStream| {
            let _ = accepting.send(u32::from(stream.id()));
            echo(request, stream)
        };
        let serving = tokio::spawn(async move {
            let server = h2::server::Builder::new();
            serve(far, &server, OPTIONS, &Drain::default(), reading(&along), handle).await
        });
        for stream in [1, 3, 5] {
            assert_eq!(accepted.recv().await, Some(stream));
        }
        drop(near);
        let _ = serving.await?;
        assert_eq!(*lock(&told), []);
        Ok(())
    }
}
