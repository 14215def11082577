//! The one body type of the path: streamed from a peer, made here, or kept for another try; and what is known of its
//! moving.
//!
//! Promises backpressure (nothing is read from a peer that the other side has not asked for), and that a body which
//! broke off never passes for a whole one. Tested in the files of the room and end to end in the lab.

mod activity;
mod ahead;
mod inform;
mod received;
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
use h2::Reason;
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::Full;
use hyper::body::Incoming;

pub use self::{
    activity::{Activity, Connection, Stall, lasted},
    ahead::{Ahead, Beginning},
    inform::{Inform, Nobody},
    received::Received,
    replay::{Allowance, Fate, Follow, LIMIT, Replay},
};
use crate::error::Error;

/// A body that may break off while nobody takes what it has.
pub trait Breaking: http_body::Body<Data = Bytes, Error = BodyError> + Unpin {
    /// Ready when it has: it is not asked for frames again.
    fn poll_broken(&mut self, _cx: &mut Context<'_>) -> Poll<BodyError> {
        Poll::Pending
    }
}

impl Breaking for Body {}

/// A request or response body. An enum rather than a boxed trait object: no allocation for the common case.
#[derive(Debug, Default)]
pub enum Body {
    /// Nothing.
    #[default]
    Empty,
    /// Made here.
    Full(Full<Bytes>),
    /// Streamed from a peer.
    Peer(Peer),
    /// Streamed from a peer, its bytes counted.
    Metered(Peer, Arc<Meter>),
    /// Streamed from a peer, with what must be held until the end of it (its place on a shared connection).
    Held(Peer, Arc<dyn Any + Send + Sync>),
    /// Streamed from a peer and kept, up to a limit, for another try.
    Replay(Replay),
    /// A copy of what another try is sent, for a mirror.
    Follow(Follow),
    /// Any of these, of which the beginning was read ahead.
    Ahead(Box<Ahead>),
}

/// What a peer streams.
#[derive(Debug)]
pub enum Peer {
    /// Over HTTP/1.
    Http1(Incoming),
    /// Over HTTP/2.
    Http2(Received),
}

/// Why a body broke off.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The HTTP/1 connection it came on.
    #[error(transparent)]
    Http1(#[from] hyper::Error),
    /// The HTTP/2 stream it came on.
    #[error(transparent)]
    Http2(#[from] h2::Error),
    /// The mesh ended it.
    #[error(transparent)]
    Mesh(#[from] Error),
}

impl BodyError {
    /// How the end is told to an HTTP/2 peer: the code that the other side gave, where it gave one.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Http2(error) if error.is_reset() => error.reason().unwrap_or(Reason::INTERNAL_ERROR),
            // Whoever was sending is gone, or had enough.
            Self::Http1(error) if error.is_incomplete_message() || error.is_canceled() => Reason::CANCEL,
            Self::Mesh(error) => error.reset.unwrap_or(Reason::INTERNAL_ERROR),
            Self::Http1(_) | Self::Http2(_) => Reason::INTERNAL_ERROR,
        }
    }
}

/// Counts a body that is on its way, and tells that it moves.
#[derive(Debug)]
pub struct Meter {
    bytes: AtomicU64,
    activity: Arc<Activity>,
}

impl Meter {
    /// Nothing counted yet.
    pub fn new(activity: Arc<Activity>) -> Self {
        Self { bytes: AtomicU64::new(0), activity }
    }

    /// Bytes so far.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Adds bytes that were no frames.
    pub fn add(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Adds a frame.
    pub fn count(&self, frame: &Frame<Bytes>) {
        if let Some(data) = frame.data_ref() {
            self.bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
        }
        self.activity.touch();
    }
}

impl From<Incoming> for Body {
    fn from(incoming: Incoming) -> Self {
        Self::Peer(Peer::Http1(incoming))
    }
}

impl From<Received> for Body {
    fn from(received: Received) -> Self {
        Self::Peer(Peer::Http2(received))
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        Self::Full(Full::new(bytes))
    }
}

impl Body {
    /// The same body with its bytes counted, where a peer streams it; an empty one becomes [`Body::Empty`].
    #[must_use]
    pub fn metered(self, meter: Arc<Meter>) -> Self {
        match self {
            Self::Peer(peer) if peer.is_end_stream() => Self::Empty,
            Self::Peer(peer) => Self::Metered(peer, meter),
            other => other,
        }
    }

    /// The same body, and this is held until it has ended.
    #[must_use]
    pub fn held(self, held: Arc<dyn Any + Send + Sync>) -> Self {
        match self {
            Self::Peer(peer) => Self::Held(peer, held),
            Self::Held(peer, before) => Self::Held(peer, Arc::new((before, held))),
            other => other,
        }
    }
}

impl http_body::Body for Peer {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Http1(body) => Pin::new(body).poll_frame(cx).map_err(BodyError::from),
            Self::Http2(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Http1(body) => body.is_end_stream(),
            Self::Http2(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Http1(body) => body.size_hint(),
            Self::Http2(body) => body.size_hint(),
        }
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Empty => Poll::Ready(None),
            Self::Full(body) => Pin::new(body).poll_frame(cx).map_err(|never| match never {}),
            Self::Peer(body) | Self::Held(body, _) => Pin::new(body).poll_frame(cx),
            Self::Metered(body, meter) => {
                let frame = Pin::new(body).poll_frame(cx);
                if let Poll::Ready(Some(Ok(frame))) = &frame {
                    meter.count(frame);
                }
                frame
            }
            Self::Replay(body) => Pin::new(body).poll_frame(cx),
            Self::Follow(body) => Pin::new(body).poll_frame(cx),
            Self::Ahead(body) => Pin::new(&mut **body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Full(body) => body.is_end_stream(),
            Self::Peer(body) | Self::Held(body, _) | Self::Metered(body, _) => body.is_end_stream(),
            Self::Replay(body) => body.is_end_stream(),
            Self::Follow(body) => body.is_end_stream(),
            Self::Ahead(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Full(body) => body.size_hint(),
            Self::Peer(body) | Self::Held(body, _) | Self::Metered(body, _) => body.size_hint(),
            Self::Replay(body) => body.size_hint(),
            Self::Follow(body) => body.size_hint(),
            Self::Ahead(body) => body.size_hint(),
        }
    }
}
