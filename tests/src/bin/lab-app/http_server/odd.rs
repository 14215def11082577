//! Answers that hyper would not give: written to the socket past it, or told it by an error of the right type.

use anyhow::{Context as _, Result};
use hyper::{HeaderMap, Version, header::HeaderValue};

use super::{Asked, Connection, Failure};
use crate::frames::{END_HEADERS, Frame, GOAWAY, HEADERS};

/// `CANCEL`, where no code is asked for.
const CANCEL: u64 = 8;
/// What a 103 announces.
const LINK: &str = "</style.css>; rel=preload; as=style";
/// A header is at most this long.
const HEADER_VALUE: u64 = 4000;

/// An error that hyper turns into `RST_STREAM` with this code; over HTTP/1.1 the connection is reset.
pub fn reset(connection: &Connection, code: Option<u64>) -> Result<Failure> {
    connection.wire.reset_on_close()?;
    let code = u32::try_from(code.unwrap_or(CANCEL))?;
    Ok(Failure::Reset(h2::Reason::from(code).into()))
}

/// Says that no stream was processed, and ends the connection; the error is for hyper.
pub async fn goaway(connection: &Connection, code: u64) -> Result<Failure> {
    let mut payload = 0_u32.to_be_bytes().to_vec();
    payload.extend(u32::try_from(code)?.to_be_bytes());
    connection.wire.write(&Frame::new(GOAWAY, 0, 0, payload).encode()).await?;
    connection.wire.end()?;
    Ok(Failure::Ended)
}

/// 103 with a `Link`, `times` times (1).
pub async fn early_hints(asked: &Asked<'_>, version: Version, times: Option<u64>) -> Result<()> {
    let hints = if version == Version::HTTP_2 {
        // Clients use odd streams one after the other.
        let stream = u32::try_from(asked.number * 2 - 1)?;
        Frame::new(HEADERS, END_HEADERS, stream, hints_in_hpack()).encode()
    } else {
        format!("HTTP/1.1 103 Early Hints\r\nLink: {LINK}\r\n\r\n").into_bytes()
    };
    for _ in 0..times.unwrap_or(1) {
        asked.connection.wire.write(&hints).await?;
    }
    Ok(())
}

/// `:status: 103` and `link`, as literals that touch no table.
fn hints_in_hpack() -> Vec<u8> {
    // A literal without indexing; the name is entry 8 (`:status`), or entry 45 (`link`) of the static table.
    let mut block = b"\x08\x03103\x0f\x1e".to_vec();
    block.push(LINK.len() as u8);
    block.extend(LINK.as_bytes());
    block
}

/// Headers whose names and values have this many bytes together.
pub fn fill_headers(headers: &mut HeaderMap, mut bytes: u64) -> Result<()> {
    let name = hyper::header::HeaderName::from_static("x-lab-filling");
    while bytes > 0 {
        let value = bytes.saturating_sub(name.as_str().len() as u64).clamp(1, HEADER_VALUE);
        let value = HeaderValue::try_from("x".repeat(value as usize)).context("a value of letters")?;
        bytes = bytes.saturating_sub((name.as_str().len() + value.len()) as u64);
        headers.try_append(&name, value)?;
    }
    Ok(())
}
