//! A body whose beginning somebody has looked at.
//!
//! Promises that whoever gets the body afterwards gets all of it, in the frames in which it came, and that no more is held
//! than was asked for and the frame that went beyond it. Tested below.

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt as _;

use super::{Body, BodyError};

/// Frames that were read ahead, and what comes after them.
#[derive(Debug)]
pub struct Ahead {
    frames: VecDeque<Frame<Bytes>>,
    rest: Body,
}

/// The beginning of a body.
#[derive(Debug)]
pub struct Beginning {
    /// So much of it.
    pub bytes: Bytes,
    /// Whether there is more.
    pub partial: bool,
}

impl Body {
    /// Waits for the first `most` bytes, or for the end where that comes before; the body is whole afterwards.
    ///
    /// # Errors
    /// That of the body, which has broken off.
    pub async fn look_ahead(&mut self, most: usize) -> Result<Beginning, BodyError> {
        let mut rest = std::mem::take(self);
        let (mut frames, mut bytes, mut partial) = (VecDeque::new(), BytesMut::new(), false);
        while !partial && let Some(frame) = rest.frame().await.transpose()? {
            if let Some(data) = frame.data_ref() {
                let room = most - bytes.len();
                partial = data.len() > room;
                bytes.extend_from_slice(&data[..data.len().min(room)]);
            }
            frames.push_back(frame);
        }
        *self = if frames.is_empty() { rest } else { Self::Ahead(Box::new(Ahead { frames, rest })) };
        Ok(Beginning { bytes: bytes.freeze(), partial })
    }
}

impl http_body::Body for Ahead {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        match this.frames.pop_front() {
            Some(frame) => Poll::Ready(Some(Ok(frame))),
            None => Pin::new(&mut this.rest).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.frames.is_empty() && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let read: usize = self.frames.iter().filter_map(Frame::data_ref).map(Bytes::len).sum();
        let (read, rest) = (read as u64, self.rest.size_hint());
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower().saturating_add(read));
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(read));
        }
        hint
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use http_body::Body as _;

    use super::*;

    async fn looked_at(text: &'static str, most: usize) -> (String, bool, String, Option<u64>) {
        let mut body = Body::from(Bytes::from_static(text.as_bytes()));
        let beginning = body.look_ahead(most).await.unwrap();
        let size = body.size_hint().exact();
        let all = body.collect().await.unwrap().to_bytes();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        (text(&beginning.bytes), beginning.partial, text(&all), size)
    }

    #[tokio::test]
    async fn the_beginning_is_shown_and_the_whole_goes_on() {
        assert_eq!(looked_at("hello", 5).await, ("hello".into(), false, "hello".into(), Some(5)));
        assert_eq!(looked_at("hello", 9).await, ("hello".into(), false, "hello".into(), Some(5)));
        assert_eq!(looked_at("hello", 4).await, ("hell".into(), true, "hello".into(), Some(5)));
        assert_eq!(looked_at("", 4).await, (String::new(), false, String::new(), Some(0)));
    }

    #[tokio::test]
    async fn what_was_looked_at_can_be_looked_at_again() {
        let mut body = Body::from(Bytes::from_static(b"hello"));
        for (most, seen) in [(2, "he"), (4, "hell"), (8, "hello")] {
            assert_eq!(body.look_ahead(most).await.unwrap().bytes, seen);
        }
        assert!(!body.is_end_stream());
        assert_eq!(body.collect().await.unwrap().to_bytes(), "hello");
    }
}
