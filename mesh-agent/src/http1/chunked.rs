//! A body in chunks (RFC 9112 §7.1): followed byte by byte as it passes, to the end of its trailers.
//!
//! Pure; keeps nothing but the trailer line that is arriving. Tested by the tables of `tests/`.

use memchr::memchr;

use super::{
    Limits,
    Refusal::{self, Malformed, TooManyHeaders},
    field::{self, Field, Known},
};

/// Digits of a chunk's size: those of 2^64 - 1.
const SIZE_DIGITS: u8 = 16;

/// Bytes of the extensions of one chunk, and of all chunks of a body (hyper takes 16 KiB in all).
const CHUNK_EXTENSIONS: usize = 256;
const BODY_EXTENSIONS: usize = 8 << 10;

/// Bytes of trailers that hyper takes.
const TRAILERS: usize = (16 << 10) - 64;

/// A chunked body that is passing.
#[derive(Debug, Default)]
pub(super) struct Follower {
    at: At,
    /// Bytes of extensions: of this chunk, of the chunks before.
    extensions: (usize, usize),
    /// The trailer line that is arriving, the bytes of all lines, and their number.
    line: Vec<u8>,
    trailer_bytes: usize,
    trailers: usize,
}

#[derive(Debug, Clone, Copy, Default)]
enum At {
    #[default]
    Start,
    Size {
        size: u64,
        digits: u8,
    },
    Extension(u64),
    /// The LF after a size and its extensions.
    SizeLf(u64),
    Data(u64),
    DataCr,
    DataLf,
    Trailers,
}

/// How far a body has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    /// It goes on after the bytes looked at.
    GoesOn,
    /// It ended after so many of them.
    Ended(usize),
    /// The first so many are fine; the next byte is not.
    Refused(usize, Refusal),
}

impl Follower {
    /// Looks at the next bytes.
    pub(super) fn follow(&mut self, bytes: &[u8], limits: &Limits) -> Seen {
        let mut seen = 0;
        while seen < bytes.len() {
            let rest = &bytes[seen..];
            match self.step(rest, limits) {
                Ok((taken, false)) => seen += taken,
                Ok((taken, true)) => return Seen::Ended(seen + taken),
                Err(refusal) => return Seen::Refused(seen, refusal),
            }
        }
        Seen::GoesOn
    }

    /// Takes one or more bytes (there is one): how many, and whether they end the body.
    fn step(&mut self, rest: &[u8], limits: &Limits) -> Result<(usize, bool), Refusal> {
        let byte = rest[0];
        self.at = match self.at {
            At::Start => At::Size { size: digit(byte).ok_or(SIZE)?, digits: 1 },
            At::Size { size, digits } => self.size(byte, size, digits)?,
            At::Extension(size) => return self.extension(rest, size),
            At::SizeLf(size) => {
                expect(byte, b'\n', "chunk size that does not end with CRLF (RFC 9112 §7.1)")?;
                if size == 0 { At::Trailers } else { At::Data(size) }
            }
            At::Data(left) => {
                let taken = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
                let left = left - taken as u64;
                self.at = if left == 0 { At::DataCr } else { At::Data(left) };
                return Ok((taken, false));
            }
            At::DataCr => {
                expect(byte, b'\r', AFTER_DATA)?;
                At::DataLf
            }
            At::DataLf => {
                expect(byte, b'\n', AFTER_DATA)?;
                At::Start
            }
            At::Trailers => return self.trailers(rest, limits),
        };
        Ok((1, false))
    }

    fn size(&mut self, byte: u8, size: u64, digits: u8) -> Result<At, Refusal> {
        match byte {
            b'\r' => Ok(At::SizeLf(size)),
            b';' => {
                self.extensions = (1, self.extensions.0 + self.extensions.1);
                Ok(At::Extension(size))
            }
            _ if digits == SIZE_DIGITS => Err(SIZE),
            _ => Ok(At::Size { size: (size << 4) | digit(byte).ok_or(SIZE)?, digits: digits + 1 }),
        }
    }

    fn extension(&mut self, rest: &[u8], size: u64) -> Result<(usize, bool), Refusal> {
        let end = memchr(b'\r', rest);
        let extension = &rest[..end.unwrap_or(rest.len())];
        self.extensions.0 += extension.len();
        let (chunk, before) = self.extensions;
        if chunk > CHUNK_EXTENSIONS || chunk + before > BODY_EXTENSIONS {
            return Err(Malformed("chunk extensions of more bytes than are taken (RFC 9112 §7.1.1)"));
        }
        if !field::is_value(extension) {
            return Err(Malformed("control character in a chunk extension (RFC 9112 §7.1.1)"));
        }
        if end.is_some() {
            self.at = At::SizeLf(size);
        }
        Ok((extension.len() + usize::from(end.is_some()), false))
    }

    fn trailers(&mut self, rest: &[u8], limits: &Limits) -> Result<(usize, bool), Refusal> {
        let end = memchr(b'\n', rest);
        let taken = end.map_or(rest.len(), |end| end + 1);
        self.trailer_bytes += taken;
        if self.trailer_bytes > limits.head_bytes.min(TRAILERS) {
            return Err(Malformed("trailers of more bytes than are taken (RFC 9112 §7.1.2)"));
        }
        self.line.extend_from_slice(&rest[..end.unwrap_or(rest.len())]);
        if end.is_none() {
            return Ok((taken, false));
        }
        let line = field::without_cr(&self.line)?;
        if line.is_empty() {
            return Ok((taken, true));
        }
        self.trailers += 1;
        if self.trailers > limits.headers {
            return Err(TooManyHeaders(limits.headers));
        }
        if matches!(
            Field::read(line)?.known(),
            Known::Host | Known::ContentLength | Known::TransferEncoding | Known::Upgrade
        ) {
            return Err(Malformed("trailer that frames or routes the message (RFC 9110 §6.5.1)"));
        }
        self.line.clear();
        Ok((taken, false))
    }
}

const SIZE: Refusal = Malformed("chunk size that is not 1 to 16 hexadecimal digits (RFC 9112 §7.1)");
const AFTER_DATA: &str = "chunk whose data do not end with CRLF (RFC 9112 §7.1)";

fn digit(byte: u8) -> Option<u64> {
    char::from(byte).to_digit(16).map(u64::from)
}

fn expect(byte: u8, wanted: u8, otherwise: &'static str) -> Result<(), Refusal> {
    if byte == wanted { Ok(()) } else { Err(Malformed(otherwise)) }
}
