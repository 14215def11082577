//! A request body that can be sent again.
//!
//! Promises: frames are handed on as they come, and kept until [`LIMIT`] bytes; a later try first gets what was kept
//! and then the rest of the stream. Once more than the limit has passed, the body can not be sent again
//! ([`Replay::again`] says no) and nothing more is kept. Tested below.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use super::count_data;

/// How much of a request body is kept for another try, bytes (Linkerd's limit).
pub const LIMIT: usize = 64 << 10;

/// One try's view of the body.
#[derive(Debug)]
pub struct Replay {
    shared: Arc<Mutex<Shared>>,
    /// How many kept frames this view has handed out.
    position: usize,
}

#[derive(Debug)]
struct Shared {
    incoming: Incoming,
    kept: Vec<Kept>,
    kept_bytes: usize,
    overflowed: bool,
    ended: bool,
    count: Arc<AtomicU64>,
}

#[derive(Debug, Clone)]
enum Kept {
    Data(Bytes),
    Trailers(http::HeaderMap),
}

impl Replay {
    /// The first try's view; counts the bytes that come from the client.
    pub fn new(incoming: Incoming, count: Arc<AtomicU64>) -> Self {
        let shared =
            Shared { incoming, kept: Vec::new(), kept_bytes: 0, overflowed: false, ended: false, count };
        Self { shared: Arc::new(Mutex::new(shared)), position: 0 }
    }

    /// A view for another try, unless too much has passed to keep.
    pub fn again(&self) -> Option<Self> {
        let possible = !self.lock().overflowed;
        possible.then(|| Self { shared: Arc::clone(&self.shared), position: 0 })
    }

    /// Whether the whole body was empty or short enough, or nothing was read of it yet.
    fn lock(&self) -> MutexGuard<'_, Shared> {
        // A panic while the lock was held leaves frames that were kept whole: they are still good.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    fn poll_incoming(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = match std::task::ready!(Pin::new(&mut self.incoming).poll_frame(cx)) {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => return Poll::Ready(Some(Err(error))),
            None => {
                self.ended = true;
                return Poll::Ready(None);
            }
        };
        count_data(&frame, &self.count);
        self.keep(&frame);
        Poll::Ready(Some(Ok(frame)))
    }

    fn keep(&mut self, frame: &Frame<Bytes>) {
        self.kept_bytes += frame.data_ref().map_or(0, Bytes::len);
        if self.overflowed || self.kept_bytes > LIMIT {
            self.overflowed = true;
            self.kept = Vec::new();
        } else if let Some(data) = frame.data_ref() {
            self.kept.push(Kept::Data(data.clone()));
        } else if let Some(trailers) = frame.trailers_ref() {
            self.kept.push(Kept::Trailers(trailers.clone()));
        }
    }
}

impl Body for Replay {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = self.get_mut();
        let mut shared = this.shared.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = shared.kept.get(this.position) {
            this.position += 1;
            let frame = match kept.clone() {
                Kept::Data(data) => Frame::data(data),
                Kept::Trailers(trailers) => Frame::trailers(trailers),
            };
            return Poll::Ready(Some(Ok(frame)));
        }
        if shared.ended {
            return Poll::Ready(None);
        }
        let frame = shared.poll_incoming(cx);
        if matches!(frame, Poll::Ready(Some(Ok(_)))) {
            this.position += 1;
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        let shared = self.lock();
        self.position >= shared.kept.len() && (shared.ended || shared.incoming.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        let shared = self.lock();
        if self.position == 0 && shared.kept.is_empty() && !shared.overflowed {
            return shared.incoming.size_hint();
        }
        let kept: usize = shared.kept.iter().skip(self.position).map(Kept::len).sum();
        match shared.incoming.size_hint().exact() {
            Some(rest) => SizeHint::with_exact(rest + kept as u64),
            None => SizeHint::default(),
        }
    }
}

impl Kept {
    fn len(&self) -> usize {
        match self {
            Self::Data(data) => data.len(),
            Self::Trailers(_) => 0,
        }
    }
}

/// Bytes counted so far.
pub fn counted(count: &AtomicU64) -> u64 {
    count.load(Ordering::Relaxed)
}
