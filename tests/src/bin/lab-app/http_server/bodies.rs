//! Bodies of the HTTP server: made, read and measured.

use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use http_body_util::{BodyExt, BodyStream, StreamBody};
use hyper::{
    HeaderMap, Response,
    body::{Frame, Incoming},
    header::{HeaderValue, TRAILER},
};
use lab::apps::{Consumed, Pattern};
use tokio::time::{Instant, sleep, sleep_until};

use super::{Body, Failure};

/// Bodies come in pieces of this size.
const CHUNK: u64 = 16 * 1024;
/// How long the beginning of a body that is cut has to be written.
const BEFORE_CUT: Duration = Duration::from_millis(20);
static FILLING: [u8; CHUNK as usize] = [b'x'; CHUNK as usize];
/// How much of a body goes into its checksum.
const CHECKED: u64 = 1024 * 1024;

/// A body that was read.
#[derive(Debug)]
pub struct Reading {
    pub consumed: Consumed,
    pub trailers: HeaderMap,
}

/// Reads a body to its end, or until it breaks off, at most `rate` bytes a second (0: as fast as it comes).
pub async fn read(mut body: Incoming, rate: u64) -> Reading {
    let (mut pattern, mut trailers, mut broken) = (Pattern::default(), HeaderMap::new(), None);
    let mut checksum = 0xcbf2_9ce4_8422_2325_u64;
    let mut pace = Pace::new(rate);
    while let Some(frame) = body.frame().await {
        let frame = match frame {
            Ok(frame) => frame,
            Err(error) => {
                broken = Some(error.to_string());
                break;
            }
        };
        if let Some(data) = frame.data_ref() {
            let checked = data.len().min(CHECKED.saturating_sub(pattern.at()) as usize);
            for byte in &data[..checked] {
                checksum = (checksum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
            }
            pattern.check(data);
            pace.after(data.len() as u64).await;
        } else if let Ok(last) = frame.into_trailers() {
            trailers = last;
        }
    }
    let (bytes, intact) = (pattern.at(), pattern.intact());
    Reading { consumed: Consumed { bytes, intact, checksum, broken }, trailers }
}

/// Holds a transfer back to a number of bytes a second.
#[derive(Debug)]
pub struct Pace {
    rate: u64,
    due: Instant,
}

impl Pace {
    /// 0 holds nothing back.
    pub fn new(rate: u64) -> Self {
        Self { rate, due: Instant::now() }
    }

    /// Waits as long as these bytes should have taken.
    pub async fn after(&mut self, bytes: u64) {
        if self.rate > 0 {
            self.due += Duration::from_secs_f64(bytes as f64 / self.rate as f64);
            sleep_until(self.due).await;
        }
    }
}

/// A body of `x`.
pub fn filling(size: u64) -> Body {
    let chunks = (0..size.div_ceil(CHUNK)).map(move |n| {
        let length = (size - n * CHUNK).min(CHUNK) as usize;
        Ok(Frame::data(Bytes::from_static(&FILLING).slice(..length)))
    });
    boxed(stream::iter(chunks))
}

/// A body of the lab's pattern.
pub fn pattern(size: u64) -> Body {
    let mut pattern = Pattern::default();
    let chunks = std::iter::from_fn(move || {
        let left = size - pattern.at();
        (left > 0).then(|| Ok(Frame::data(Bytes::copy_from_slice(pattern.next(left)))))
    });
    boxed(stream::iter(chunks))
}

fn boxed(frames: impl Stream<Item = Result<Frame<Bytes>, Failure>> + Send + Sync + 'static) -> Body {
    BodyExt::boxed(StreamBody::new(frames))
}

/// Begins a body and breaks off, once what it began with was written.
pub fn cut(failure: Failure) -> Body {
    let begun = stream::once(async { Ok(Frame::data(Bytes::from_static(b"so far so g"))) });
    let broken = stream::once(async {
        // hyper writes what it has whenever a body has nothing ready.
        sleep(BEFORE_CUT).await;
        Err(failure)
    });
    boxed(begun.chain(broken))
}

/// A trailer of the app's own, and the request's back.
pub fn with_trailers(response: Response<Body>, mut trailers: HeaderMap) -> Result<Response<Body>> {
    trailers.insert("x-lab-trailer", HeaderValue::from_static("last"));
    // Over HTTP/1.1 only what was announced is sent.
    let names: Vec<&str> = trailers.keys().map(hyper::header::HeaderName::as_str).collect();
    let names = HeaderValue::try_from(names.join(", "))?;
    // And only after a body of no declared size.
    let mut response = response.map(|body| {
        let last = stream::once(async move { Ok(Frame::trailers(trailers)) });
        boxed(BodyStream::new(body).chain(last))
    });
    response.headers_mut().insert(TRAILER, names);
    Ok(response)
}
