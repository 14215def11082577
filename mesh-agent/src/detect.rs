//! What a client speaks: as declared, else by its first bytes.
//!
//! Never consumes: the bytes read stay in front of the stream ([`Prefixed`]). Never guesses when bytes are missing:
//! it waits for more until the caller's time limit. Tested by the tables below.

use std::{
    future::poll_fn,
    io,
    mem::MaybeUninit,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::state::snapshot::Protocol;

/// The client preface of HTTP/2 with prior knowledge (RFC 9113 §3.4).
const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Longest request line looked at before an HTTP-looking start is taken at its word, bytes (the limit that the
/// HTTP/1 parser puts on a request line is its own).
const LONGEST_LINE: usize = 8 << 10;

/// Longest method token considered (`VERSION-CONTROL` of RFC 3253 has 15).
const LONGEST_METHOD: usize = 20;

/// Bytes asked for in one read: most request heads fit.
const FIRST_READ: usize = 1 << 10;

/// Largest `ClientHello` read for its server name; with post-quantum key shares they have some 2 KiB.
const LONGEST_HELLO: usize = 16 << 10;

/// What the bytes so far say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Enough to tell.
    Is(Protocol),
    /// More bytes are needed.
    Undecided,
}

/// Judges the first bytes of a client. What is decided stays decided, however many bytes follow.
pub fn judge(bytes: &[u8]) -> Verdict {
    let bytes = &bytes[..bytes.len().min(LONGEST_LINE)];
    if bytes.starts_with(H2_PREFACE) {
        return Verdict::Is(Protocol::Http2);
    }
    if H2_PREFACE.starts_with(bytes) {
        return Verdict::Undecided;
    }
    judge_http1(bytes)
}

/// HTTP/1 is recognised by its whole request line: a method alone (`GET key`) is also what other protocols send.
fn judge_http1(bytes: &[u8]) -> Verdict {
    let opaque = Verdict::Is(Protocol::Opaque);
    let is_method = |b: &u8| b.is_ascii_uppercase() || *b == b'-';
    let method = bytes.iter().take_while(|b| is_method(b)).count();
    if method > LONGEST_METHOD || (method == 0 && !bytes.is_empty()) {
        return opaque;
    }
    let Some(after_method) = bytes.get(method) else { return Verdict::Undecided };
    if *after_method != b' ' {
        return opaque;
    }
    let line_end = bytes.iter().position(|b| *b == b'\n');
    let line = line_end.map_or(bytes, |end| &bytes[..end]);
    if line.iter().any(|b| b.is_ascii_control() && *b != b'\r') {
        return opaque;
    }
    let Some(_) = line_end else {
        return if bytes.len() >= LONGEST_LINE { Verdict::Is(Protocol::Http1) } else { Verdict::Undecided };
    };
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let version = line.rsplit(|b| *b == b' ').next().unwrap_or_default();
    if version.starts_with(b"HTTP/1.") { Verdict::Is(Protocol::Http1) } else { opaque }
}

/// Whether the first bytes of a server may be those of one that speaks HTTP: an answer before there was a request, or the
/// settings with which an HTTP/2 server begins (RFC 9113 section 3.4), whole or not.
pub fn may_be_http_server(bytes: &[u8]) -> bool {
    const ANSWER: &[u8] = b"HTTP/";
    const SETTINGS: u8 = 4;
    let answer = bytes.starts_with(ANSWER) || ANSWER.starts_with(bytes);
    let settings = bytes.first() == Some(&0) && bytes.get(3).is_none_or(|kind| *kind == SETTINGS);
    answer || settings
}

/// Reads until the bytes tell what the client speaks. End of file before that is opaque: whatever came is handed on.
///
/// Cancel safe: what was read before stays in `stream`.
pub async fn by_first_bytes<S: AsyncRead + Unpin>(stream: &mut Prefixed<S>) -> io::Result<Protocol> {
    loop {
        if let Verdict::Is(protocol) = judge(&stream.prefix) {
            return Ok(protocol);
        }
        if stream.read_more().await? == 0 {
            return Ok(Protocol::Opaque);
        }
    }
}

/// For a port that is declared HTTP: tells HTTP/2 from HTTP/1 and never says opaque, so that garbage gets a 400.
pub async fn http_version<S: AsyncRead + Unpin>(stream: &mut Prefixed<S>) -> io::Result<Protocol> {
    loop {
        let bytes = &stream.prefix[..];
        if bytes.starts_with(H2_PREFACE) {
            return Ok(Protocol::Http2);
        }
        if !H2_PREFACE.starts_with(bytes) {
            return Ok(Protocol::Http1);
        }
        if stream.read_more().await? == 0 {
            return Ok(Protocol::Http1);
        }
    }
}

/// Waits until the client has said something, or has ended its side.
///
/// Cancel safe: what was read stays in `stream`.
pub async fn first_bytes<S: AsyncRead + Unpin>(stream: &mut Prefixed<S>) -> io::Result<()> {
    if stream.is_unread() {
        stream.read_more().await?;
    }
    Ok(())
}

/// The server name in a client's TLS `ClientHello`; `None` for a client that names none or speaks no TLS.
///
/// Cancel safe: what was read before stays in `stream`.
pub async fn server_name<S: AsyncRead + Unpin>(stream: &mut Prefixed<S>) -> io::Result<Option<String>> {
    loop {
        match hello(&stream.prefix) {
            Hello::Name(name) => return Ok(Some(name)),
            Hello::None => return Ok(None),
            Hello::Undecided => {}
        }
        if stream.prefix.len() >= LONGEST_HELLO || stream.read_more().await? == 0 {
            return Ok(None);
        }
    }
}

/// The first byte of a record in which a handshake begins (RFC 8446 section 5.1).
const HANDSHAKE: u8 = 0x16;

/// What the first bytes say of the server's name.
enum Hello {
    Name(String),
    None,
    Undecided,
}

/// Whether what a client has said so far may be TLS.
pub fn may_be_tls<S>(stream: &Prefixed<S>) -> bool {
    stream.prefix.first().is_none_or(|first| *first == HANDSHAKE)
}

fn hello(bytes: &[u8]) -> Hello {
    match bytes.first() {
        None => return Hello::Undecided,
        Some(first) if *first != HANDSHAKE => return Hello::None,
        Some(_) => {}
    }
    let mut acceptor = rustls::server::Acceptor::default();
    let mut left = bytes;
    while !left.is_empty() {
        // Reading from memory cannot fail; what is no TLS is told by `accept`.
        if !matches!(acceptor.read_tls(&mut left), Ok(1..)) {
            break;
        }
        match acceptor.accept() {
            Ok(Some(accepted)) => {
                let name = accepted.client_hello().server_name().map(str::to_owned);
                return name.map_or(Hello::None, Hello::Name);
            }
            Ok(None) => {}
            Err(_) => return Hello::None,
        }
    }
    Hello::Undecided
}

/// A stream with bytes that were already read from it put back in front.
#[derive(Debug)]
pub struct Prefixed<S> {
    prefix: BytesMut,
    inner: S,
}

impl<S> Prefixed<S> {
    /// A stream of which nothing was read yet.
    pub fn new(inner: S) -> Self {
        Self { prefix: BytesMut::new(), inner }
    }

    /// A stream of which this was read already.
    pub const fn after(prefix: BytesMut, inner: S) -> Self {
        Self { prefix, inner }
    }

    /// Whether no byte has come so far, of those that were asked for.
    pub fn is_unread(&self) -> bool {
        self.prefix.is_empty()
    }

    /// The stream below.
    pub fn inner(&self) -> &S {
        &self.inner
    }

    /// What was read already, and the stream below.
    pub fn into_parts(self) -> (BytesMut, S) {
        (self.prefix, self.inner)
    }
}

impl<S: AsyncRead + Unpin> Prefixed<S> {
    /// Cancel safe: bytes are in the prefix or were not read.
    async fn read_more(&mut self) -> io::Result<usize> {
        poll_fn(|cx| {
            // On the stack: who says nothing is waited for without a buffer.
            let mut space = [MaybeUninit::uninit(); FIRST_READ];
            let mut read = ReadBuf::uninit(&mut space);
            ready!(Pin::new(&mut self.inner).poll_read(cx, &mut read))?;
            self.prefix.extend_from_slice(read.filled());
            Poll::Ready(Ok(read.filled().len()))
        })
        .await
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefixed<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.prefix.is_empty() {
            return Pin::new(&mut this.inner).poll_read(cx, out);
        }
        let take = this.prefix.len().min(out.remaining());
        out.put_slice(&this.prefix[..take]);
        this.prefix.advance(take);
        if this.prefix.is_empty() {
            this.prefix = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prefixed<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[test]
    fn servers_that_speak_first_may_be_http() {
        for (bytes, expected) in [
            (&b""[..], true),
            (b"HT", true),
            (b"HTTP/1.1 408 Request Timeout\r\n", true),
            (b"\0", true),
            (b"\0\0\x12\x04\0\0\0\0\0", true),
            (b"\0\0\x12\x05\0\0\0\0\0", false),
            (b"HELO", false),
            (b"220 mail.example.com ESMTP\r\n", false),
            (b"J\0\0\0\n8.0.36", false),
            (b"+OK", false),
        ] {
            assert_eq!(may_be_http_server(bytes), expected, "{bytes:?}");
        }
    }

    #[test]
    fn first_bytes_decide() {
        use Protocol::{Http1, Http2, Opaque};
        let table: &[(&[u8], Verdict)] = &[
            (b"", Verdict::Undecided),
            (b"G", Verdict::Undecided),
            (b"GET /reviews/0 HTTP/1.1\r\n", Verdict::Is(Http1)),
            (b"GET / HTTP/1.0\r\nHost: a\r\n\r\n", Verdict::Is(Http1)),
            (b"M-SEARCH * HTTP/1.1\r\n", Verdict::Is(Http1)),
            (b"GET /half", Verdict::Undecided),
            (b"GET key\r\n", Verdict::Is(Opaque)),
            (b"get / HTTP/1.1\r\n", Verdict::Is(Opaque)),
            (b"GET / SPDY/3\r\n", Verdict::Is(Opaque)),
            (b"GET /\0 HTTP/1.1\r\n", Verdict::Is(Opaque)),
            (b"PRI * HT", Verdict::Undecided),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Verdict::Is(Http2)),
            (b"\x16\x03\x01\x02", Verdict::Is(Opaque)),
            (b"*1\r\n$4\r\nPING\r\n", Verdict::Is(Opaque)),
            (b"ABCDEFGHIJKLMNOPQRSTUVWXYZ / HTTP/1.1\r\n", Verdict::Is(Opaque)),
        ];
        for (bytes, verdict) in table {
            assert_eq!(judge(bytes), *verdict, "{}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn a_line_too_long_to_wait_for_is_judged_once() {
        let start = [b"GET /".as_slice(), &[b'x'; LONGEST_LINE - 5]].concat();
        assert_eq!(judge(&start[..LONGEST_LINE - 1]), Verdict::Undecided);
        assert_eq!(judge(&start), Verdict::Is(Protocol::Http1));
        for more in [b" SPDY/3\r\n".as_slice(), b"\0", b"x"] {
            assert_eq!(judge(&[&start, more].concat()), Verdict::Is(Protocol::Http1));
        }
    }

    #[tokio::test]
    async fn split_preface_is_waited_for_and_nothing_is_lost() -> io::Result<()> {
        let (mut client, server) = tokio::io::duplex(64);
        let mut stream = Prefixed::new(server);
        let sending = async {
            for byte in H2_PREFACE {
                client.write_all(&[*byte]).await?;
                tokio::task::yield_now().await;
            }
            client.shutdown().await
        };
        let (protocol, sent) = tokio::join!(by_first_bytes(&mut stream), sending);
        sent?;
        assert_eq!(protocol?, Protocol::Http2);
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await?;
        assert_eq!(all, H2_PREFACE);
        Ok(())
    }

    #[tokio::test]
    async fn the_server_name_is_read_from_a_hello_in_pieces() -> io::Result<()> {
        let (mut client, server) = tokio::io::duplex(8);
        let config = rustls::ClientConfig::builder_with_provider(std::sync::Arc::new(
            rustls::crypto::aws_lc_rs::default_provider(),
        ));
        let config = config.with_safe_default_protocol_versions().map_err(io::Error::other)?;
        let config = config.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth();
        let name = rustls_pki_types::ServerName::try_from("db.example.com").map_err(io::Error::other)?;
        let mut tls =
            rustls::ClientConnection::new(std::sync::Arc::new(config), name).map_err(io::Error::other)?;
        let mut bytes = Vec::new();
        tls.write_tls(&mut bytes)?;
        let mut stream = Prefixed::new(server);
        let (name, sent) = tokio::join!(server_name(&mut stream), client.write_all(&bytes));
        sent?;
        assert_eq!(name?.as_deref(), Some("db.example.com"));
        assert_eq!(stream.prefix, bytes);
        for other in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"\x16\x03\x01\x00\x02hi", b"\x16\x03\x01"] {
            let (mut client, server) = tokio::io::duplex(64);
            client.write_all(other).await?;
            drop(client);
            assert_eq!(server_name(&mut Prefixed::new(server)).await?, None);
        }
        Ok(())
    }

    #[tokio::test]
    async fn a_declared_http_port_takes_garbage_for_http1() -> io::Result<()> {
        let (mut client, server) = tokio::io::duplex(64);
        client.write_all(b"\0garbage\r\n\r\n").await?;
        assert_eq!(http_version(&mut Prefixed::new(server)).await?, Protocol::Http1);
        Ok(())
    }
}
