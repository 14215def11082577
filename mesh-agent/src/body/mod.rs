//! The one body type of the path: streamed from a peer, made here, or kept for another try.

mod replay;

use std::{
    any::Any,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use http_body_util::Full;
use hyper::body::Incoming;

pub use self::replay::{LIMIT, Replay, counted};

/// A request or response body. An enum rather than a boxed trait object: no allocation for the common case.
#[derive(Debug, Default)]
pub enum Body {
    /// Nothing.
    #[default]
    Empty,
    /// Made here.
    Full(Full<Bytes>),
    /// Streamed from a peer.
    Incoming(Incoming),
    /// Streamed from a peer, its bytes counted.
    Counted(Incoming, Arc<AtomicU64>),
    /// Streamed from a peer, with what must be held until the end of it (its place on a shared connection).
    Held(Incoming, Arc<dyn Any + Send + Sync>),
    /// Streamed from a peer and kept, up to a limit, for another try.
    Replay(Replay),
}

impl From<Incoming> for Body {
    fn from(incoming: Incoming) -> Self {
        Self::Incoming(incoming)
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        Self::Full(Full::new(bytes))
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match self.get_mut() {
            Self::Empty => Poll::Ready(None),
            Self::Full(body) => Pin::new(body).poll_frame(cx).map_err(|never| match never {}),
            Self::Incoming(body) | Self::Held(body, _) => Pin::new(body).poll_frame(cx),
            Self::Counted(body, count) => {
                let frame = Pin::new(body).poll_frame(cx);
                if let Poll::Ready(Some(Ok(frame))) = &frame {
                    count_data(frame, count);
                }
                frame
            }
            Self::Replay(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Full(body) => body.is_end_stream(),
            Self::Incoming(body) | Self::Held(body, _) | Self::Counted(body, _) => body.is_end_stream(),
            Self::Replay(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Full(body) => body.size_hint(),
            Self::Incoming(body) | Self::Held(body, _) | Self::Counted(body, _) => body.size_hint(),
            Self::Replay(body) => body.size_hint(),
        }
    }
}

/// Adds a data frame's length to a count.
pub fn count_data(frame: &Frame<Bytes>, count: &AtomicU64) {
    if let Some(data) = frame.data_ref() {
        count.fetch_add(data.len() as u64, Ordering::Relaxed);
    }
}
