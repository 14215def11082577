//! A body as HTTP/2 brings it: the frames of one stream, at either end.
//!
//! Promises: the peer may send only what was taken from here (its flow-control window is given back as frames are
//! handed on); a stream that is reset before its end is an error, whatever the code. Tested in `http2/tests.rs`.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::RecvStream;
use http::{HeaderMap, header::CONTENT_LENGTH};
use http_body::{Body, Frame, SizeHint};

use super::BodyError;

/// The body of a message that came over HTTP/2.
#[derive(Debug)]
pub struct Received {
    stream: RecvStream,
    /// What `content-length` promises and has not come yet; h2 itself sees that it is kept.
    left: Option<u64>,
    data_done: bool,
}

impl Received {
    /// The body that belongs to a message's headers.
    pub fn new(headers: &HeaderMap, stream: RecvStream) -> Self {
        let length = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        Self { stream, left: length, data_done: false }
    }
}

impl Body for Received {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        if !this.data_done {
            match ready!(this.stream.poll_data(cx)) {
                Some(Ok(data)) => {
                    let length = data.len();
                    this.left = this.left.map(|left| left.saturating_sub(length as u64));
                    // Fails only when the stream is gone, which the next poll tells.
                    let _ = this.stream.flow_control().release_capacity(length);
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                None => this.data_done = true,
            }
        }
        match ready!(this.stream.poll_trailers(cx)) {
            Ok(trailers) => Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers)))),
            Err(error) => Poll::Ready(Some(Err(error.into()))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.stream.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        match self.left {
            // A response to HEAD has a length and no body.
            _ if self.is_end_stream() => SizeHint::with_exact(0),
            Some(left) => SizeHint::with_exact(left),
            None => SizeHint::default(),
        }
    }
}
