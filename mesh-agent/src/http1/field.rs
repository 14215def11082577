//! One line of a head or of trailers, byte by byte.
//!
//! Pure. Tested by the tables of `tests/`.

use memchr::memchr;

use super::Refusal::{self, Malformed};

const TOKEN: u8 = 1;
const VALUE: u8 = 2;
const TARGET: u8 = 4;
const PATH: u8 = 8;

/// What a token and RFC 3986's paths and queries may hold besides letters and digits. About those no two readers differ.
const TOKEN_MARKS: &[u8] = b"!#$%&'*+-.^_`|~";
const PATH_MARKS: &[u8] = b"-._~%!$&'()*+,;=:@/?";

/// What each byte may stand in.
static CLASS: [u8; 256] = marked(marked(classes(), TOKEN_MARKS, TOKEN), PATH_MARKS, PATH);

const fn classes() -> [u8; 256] {
    let mut table = [0; 256];
    let mut at = 0;
    while at < table.len() {
        let byte = at as u8;
        if byte.is_ascii_alphanumeric() {
            table[at] |= TOKEN | PATH;
        }
        if byte == b'\t' || byte >= b' ' && byte != 0x7f {
            table[at] |= VALUE;
        }
        if byte.is_ascii_graphic() && byte != b'#' {
            table[at] |= TARGET;
        }
        at += 1;
    }
    table
}

const fn marked(mut table: [u8; 256], marks: &[u8], class: u8) -> [u8; 256] {
    let mut at = 0;
    while at < marks.len() {
        table[marks[at] as usize] |= class;
        at += 1;
    }
    table
}

fn all(bytes: &[u8], class: u8) -> bool {
    bytes.iter().all(|byte| CLASS[usize::from(*byte)] & class != 0)
}

/// A token (RFC 9110 §5.6.2).
pub(super) fn is_token(bytes: &[u8]) -> bool {
    !bytes.is_empty() && all(bytes, TOKEN)
}

/// Bytes of a header's value: no control characters but the tab.
pub(super) fn is_value(bytes: &[u8]) -> bool {
    all(bytes, VALUE)
}

/// Bytes that may stand in a target: visible, and no fragment.
pub(super) fn is_target(bytes: &[u8]) -> bool {
    all(bytes, TARGET)
}

/// A path with its query, in plain characters only.
pub(super) fn is_plain_path(bytes: &[u8]) -> bool {
    bytes.first() == Some(&b'/') && all(bytes, PATH)
}

/// A header line, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Field<'a> {
    pub(super) name: &'a [u8],
    /// Without the blanks around it.
    pub(super) value: &'a [u8],
}

/// Headers that decide where a message ends, or whose it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Known {
    Host,
    ContentLength,
    TransferEncoding,
    Upgrade,
    Other,
}

impl<'a> Field<'a> {
    /// Reads one line, its CRLF taken off.
    pub(super) fn read(line: &'a [u8]) -> Result<Self, Refusal> {
        if matches!(line.first(), Some(b' ' | b'\t')) {
            return Err(Malformed("header line that starts with a blank (obsolete folding, RFC 9112 §5.2)"));
        }
        let Some(colon) = memchr(b':', line) else {
            return Err(Malformed("header line without a colon (RFC 9112 §5)"));
        };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if matches!(name.last(), Some(b' ' | b'\t')) {
            return Err(Malformed("blank between a header's name and its colon (RFC 9112 §5.1)"));
        }
        if !is_token(name) {
            return Err(Malformed("header name that is not a token (RFC 9110 §5.1)"));
        }
        if !is_value(&line[colon + 1..]) {
            return Err(Malformed("control character in a header's value (RFC 9110 §5.5)"));
        }
        Ok(Self { name, value })
    }

    pub(super) fn known(&self) -> Known {
        let is = |name: &[u8]| self.name.eq_ignore_ascii_case(name);
        match self.name.len() {
            4 if is(b"host") => Known::Host,
            7 if is(b"upgrade") => Known::Upgrade,
            14 if is(b"content-length") => Known::ContentLength,
            17 if is(b"transfer-encoding") => Known::TransferEncoding,
            _ => Known::Other,
        }
    }
}

/// Takes the CR off a line whose LF is off already.
pub(super) fn without_cr(line: &[u8]) -> Result<&[u8], Refusal> {
    line.strip_suffix(b"\r").ok_or(Malformed("line that ends with a bare LF (RFC 9112 §2.2)"))
}
