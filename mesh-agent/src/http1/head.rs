//! The head of a request: read line by line as it arrives, and checked before any of it is handed on.
//!
//! Pure. Tested by the tables of `tests/`.

use http::Uri;
use memchr::memchr;

use super::{
    Limits,
    Refusal::{self, Malformed, TargetTooLong, TooManyHeaders},
    field::{self, Field, Known},
};

/// Longest method (`VERSION-CONTROL` of RFC 3253 has 15 bytes).
const LONGEST_METHOD: usize = 32;

/// Largest `Content-Length` that hyper takes: it keeps two values for itself.
const LARGEST_LENGTH: u64 = u64::MAX - 2;

/// What a checked head says about what follows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    /// Bytes of the head itself.
    pub(super) bytes: usize,
    pub(super) body: Framing,
    /// CONNECT, or with an `Upgrade` header: what follows may be another protocol.
    pub(super) may_switch: bool,
    pub(super) http10: bool,
}

/// Where a body ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Framing {
    Length(u64),
    Chunked,
}

/// A head that is arriving.
#[derive(Debug, Default)]
pub(super) struct Scanner {
    /// Bytes looked at; lines before it are checked.
    searched: usize,
    /// Where the line that is arriving starts.
    line: usize,
    request: Option<RequestLine>,
    headers: usize,
    host: bool,
    length: Option<u64>,
    chunked: bool,
    upgrade: bool,
}

#[derive(Debug, Clone, Copy)]
struct RequestLine {
    connect: bool,
    http10: bool,
}

impl Scanner {
    /// Looks at what has arrived; `bytes` is the head from its start, and has grown since the last call.
    pub(super) fn scan(&mut self, bytes: &[u8], limits: &Limits) -> Result<Option<Head>, Refusal> {
        while let Some(at) = memchr(b'\n', &bytes[self.searched..]) {
            let end = self.searched + at;
            let line = field::without_cr(&bytes[self.line..end])?;
            (self.searched, self.line) = (end + 1, end + 1);
            let fits = end < limits.head_bytes;
            match self.request {
                None => self.request = Some(request_line(line, limits)?),
                Some(request) if line.is_empty() && fits => return self.complete(request, end + 1).map(Some),
                Some(_) if fits => self.header(line, limits)?,
                Some(_) => {}
            }
            if !fits {
                return Err(Refusal::head_too_large(limits));
            }
        }
        self.searched = bytes.len();
        if self.request.is_none() && bytes.len() > longest_line(limits) {
            // No valid request line is as long: this says what is wrong with it before it has ended.
            return Err(request_line(bytes, limits).err().unwrap_or(TargetTooLong(limits.target_bytes)));
        }
        if bytes.len() >= limits.head_bytes {
            return Err(Refusal::head_too_large(limits));
        }
        Ok(None)
    }

    fn header(&mut self, line: &[u8], limits: &Limits) -> Result<(), Refusal> {
        self.headers += 1;
        if self.headers > limits.headers {
            return Err(TooManyHeaders(limits.headers));
        }
        let field = Field::read(line)?;
        match field.known() {
            Known::Host if self.host => {
                return Err(Malformed("several Host headers in one request (RFC 9112 §3.2)"));
            }
            Known::Host => self.host = true,
            Known::ContentLength if self.length.is_some() => {
                return Err(Malformed("several Content-Length headers in one request (RFC 9112 §6.3)"));
            }
            Known::ContentLength => self.length = Some(length(field.value)?),
            Known::TransferEncoding if self.chunked => {
                return Err(Malformed("several Transfer-Encoding headers in one request (RFC 9112 §6.1)"));
            }
            Known::TransferEncoding if !field.value.eq_ignore_ascii_case(b"chunked") => {
                return Err(Malformed("Transfer-Encoding that is not `chunked` (RFC 9112 §6.1)"));
            }
            Known::TransferEncoding => self.chunked = true,
            Known::Upgrade => self.upgrade = true,
            Known::Other => {}
        }
        Ok(())
    }

    /// What only the whole head can tell.
    fn complete(&self, request: RequestLine, bytes: usize) -> Result<Head, Refusal> {
        if self.chunked && self.length.is_some() {
            return Err(Malformed("Transfer-Encoding together with Content-Length (RFC 9112 §6.1)"));
        }
        if self.chunked && request.http10 {
            return Err(Malformed("Transfer-Encoding in an HTTP/1.0 request (RFC 9112 §6.1)"));
        }
        if !self.host && !request.http10 {
            return Err(Malformed("HTTP/1.1 request without a Host header (RFC 9112 §3.2)"));
        }
        let length = self.length.unwrap_or(0);
        if request.connect && (self.chunked || length > 0) {
            return Err(Malformed("CONNECT request with content (RFC 9110 §9.3.6)"));
        }
        let body = if self.chunked { Framing::Chunked } else { Framing::Length(length) };
        let may_switch = request.connect || self.upgrade;
        Ok(Head { bytes, body, may_switch, http10: request.http10 })
    }
}

/// No request line that is valid has more bytes than this, its CRLF included.
fn longest_line(limits: &Limits) -> usize {
    LONGEST_METHOD + limits.target_bytes + b"  HTTP/1.1\r\n".len()
}

/// Reads a request line, its CRLF taken off.
fn request_line(line: &[u8], limits: &Limits) -> Result<RequestLine, Refusal> {
    let method_end = memchr(b' ', line).unwrap_or(line.len());
    let method = &line[..method_end];
    if method.len() > LONGEST_METHOD || !field::is_token(method) {
        return Err(Malformed("request line that does not start with a method (RFC 9112 §3)"));
    }
    let rest = line.get(method_end + 1..).unwrap_or_default();
    let target_end = memchr(b' ', rest).unwrap_or(rest.len());
    let target = &rest[..target_end];
    if target.len() > limits.target_bytes {
        return Err(TargetTooLong(limits.target_bytes));
    }
    check_target(method, target)?;
    let http10 = match rest.get(target_end + 1..) {
        Some(b"HTTP/1.1") => false,
        Some(b"HTTP/1.0") => true,
        Some(_) => {
            return Err(Malformed("request line that does not end with HTTP/1.1 or HTTP/1.0 (RFC 9112 §3)"));
        }
        None => return Err(Malformed("request line without a version (RFC 9112 §3)")),
    };
    Ok(RequestLine { connect: method == b"CONNECT", http10 })
}

/// A target in the form that its method asks for (RFC 9112 §3.2).
fn check_target(method: &[u8], target: &[u8]) -> Result<(), Refusal> {
    const WRONG: Refusal = Malformed("request target that is not a valid one (RFC 9112 §3.2)");
    let connect = method == b"CONNECT";
    if !connect && field::is_plain_path(target) {
        return Ok(());
    }
    if target.is_empty() {
        return Err(Malformed("request line without a target, or with two blanks (RFC 9112 §3)"));
    }
    if !field::is_target(target) {
        return Err(Malformed("request target with a fragment or other forbidden bytes (RFC 9112 §3.2)"));
    }
    let uri = Uri::try_from(target).map_err(|_| WRONG)?;
    let ok = match (uri.scheme(), uri.authority()) {
        (None, Some(_)) => connect,
        (Some(_), Some(_)) => !connect,
        (_, None) if target == b"*" => method == b"OPTIONS",
        (_, None) => !connect && target[0] == b'/',
    };
    if ok { Ok(()) } else { Err(WRONG) }
}

fn length(value: &[u8]) -> Result<u64, Refusal> {
    const WRONG: Refusal = Malformed("Content-Length that is not a number of bytes (RFC 9110 §8.6)");
    // `str::parse` alone would take a plus sign.
    if !value.iter().all(u8::is_ascii_digit) {
        return Err(WRONG);
    }
    let digits = str::from_utf8(value).map_err(|_| WRONG)?;
    digits.parse().ok().filter(|length| *length <= LARGEST_LENGTH).ok_or(WRONG)
}
