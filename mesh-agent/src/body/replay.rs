//! A request body that can be sent again, and copied to a mirror.
//!
//! Promises: frames are handed on as they come, and kept until [`LIMIT`] bytes; a later try first gets what was kept
//! and then the rest of the stream. Once more than the limit has passed, the body can not be sent again
//! ([`Replay::again`] says no) and nothing more is kept; nor is what comes while its pod is to be sparing. The latest try alone reads on. A mirror ([`Follow`]) gets what was kept, as it comes, never
//! asks for anything itself, and breaks off where the body becomes too long. Tested in the lab (`tests/tests/http/`).

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use super::{BodyError, Meter, Peer};
use crate::error::{Error, Kind};

/// How much of a request body is kept for another try or a mirror, bytes (Linkerd's limit).
pub const LIMIT: usize = 64 << 10;

/// What the bodies of a pod's requests may keep.
#[derive(Debug, Default)]
pub struct Allowance {
    /// Set while there is too little memory for anything to be kept.
    sparing: AtomicBool,
    /// Bytes of bodies under way that are declared, will be kept, and have not come yet.
    promised: AtomicU64,
}

impl Allowance {
    /// Whether nothing is kept of what comes from now on.
    pub fn set_sparing(&self, sparing: bool) {
        self.sparing.store(sparing, Relaxed);
    }

    /// Bytes that requests which were taken on will come to keep.
    pub fn promised(&self) -> u64 {
        self.promised.load(Relaxed)
    }
}

/// One try's view of the body.
#[derive(Debug)]
pub struct Replay {
    shared: Arc<Mutex<Shared>>,
    /// How many kept frames this view has handed out.
    position: usize,
    /// Which try it is for: only the latest one's view gets anything.
    turn: u64,
}

/// A mirror's view of the body.
#[derive(Debug)]
pub struct Follow {
    shared: Arc<Mutex<Shared>>,
    position: usize,
}

#[derive(Debug)]
struct Shared {
    peer: Peer,
    meter: Arc<Meter>,
    kept: Vec<Kept>,
    kept_bytes: usize,
    allowance: Arc<Allowance>,
    /// How much of what its pod's allowance has down as still to come is this body's.
    promised: u64,
    overflowed: bool,
    ended: bool,
    /// Views that may still ask the peer for more.
    views: usize,
    /// The latest try.
    turn: u64,
    /// Whoever waits for the peer.
    reader: Option<Waker>,
    followers: Vec<Waker>,
}

#[derive(Debug, Clone)]
enum Kept {
    Data(Bytes),
    Trailers(http::HeaderMap),
}

impl Replay {
    /// The first try's view; counts the bytes that come from the client. `allowance`: its
    /// pod's.
    pub fn new(peer: Peer, meter: Arc<Meter>, allowance: Arc<Allowance>) -> Self {
        // What is not declared may be little, and come late: a call that streams.
        let promised = peer.size_hint().exact().map_or(0, |size| size.min(LIMIT as u64));
        allowance.promised.fetch_add(promised, Relaxed);
        let shared = Shared {
            peer,
            meter,
            kept: Vec::new(),
            kept_bytes: 0,
            allowance,
            promised,
            overflowed: false,
            ended: false,
            views: 1,
            turn: 0,
            reader: None,
            followers: Vec::new(),
        };
        Self { shared: Arc::new(Mutex::new(shared)), position: 0, turn: 0 }
    }

    /// A view for another try, unless too much has passed to keep. The views before it break off.
    pub fn again(&self) -> Option<Self> {
        let mut shared = lock(&self.shared);
        if shared.overflowed {
            return None;
        }
        shared.views += 1;
        shared.turn += 1;
        if let Some(reader) = shared.reader.take() {
            reader.wake();
        }
        Some(Self { shared: Arc::clone(&self.shared), position: 0, turn: shared.turn })
    }

    /// A view for a mirror, from the first byte on; breaks off at once where too much has passed already.
    pub fn follow(&self) -> Follow {
        Follow { shared: Arc::clone(&self.shared), position: 0 }
    }

    /// Whether the body is declared to be longer than what is kept.
    pub fn is_too_long(&self) -> bool {
        lock(&self.shared).peer.size_hint().lower() > LIMIT as u64
    }
}

impl Follow {
    /// To be asked in the end whether it was too long to be copied whole.
    pub fn fate(&self) -> Fate {
        Fate(Arc::clone(&self.shared))
    }
}

/// What has become of a body that was followed.
#[derive(Debug)]
pub struct Fate(Arc<Mutex<Shared>>);

impl Fate {
    /// More of it came than is kept: whoever followed it was cut off.
    pub fn was_too_long(&self) -> bool {
        lock(&self.0).overflowed
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        let mut shared = lock(&self.shared);
        shared.views -= 1;
        if shared.views == 0 {
            shared.wake();
        }
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    // A panic while the lock was held leaves frames that were kept whole: they are still good.
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn poll_peer(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = match std::task::ready!(Pin::new(&mut self.peer).poll_frame(cx)) {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => return Poll::Ready(Some(Err(error))),
            None => {
                self.ended = true;
                self.promise(0);
                self.wake();
                return Poll::Ready(None);
            }
        };
        self.meter.count(&frame);
        self.keep(&frame);
        let came = frame.data_ref().map_or(0, Bytes::len) as u64;
        self.promise(if self.overflowed { 0 } else { self.promised.saturating_sub(came) });
        // Whoever sends the body may not ask again after its last frame.
        self.ended = self.peer.is_end_stream();
        self.wake();
        Poll::Ready(Some(Ok(frame)))
    }

    fn keep(&mut self, frame: &Frame<Bytes>) {
        self.kept_bytes += frame.data_ref().map_or(0, Bytes::len);
        if self.overflowed || self.kept_bytes > LIMIT || self.allowance.sparing.load(Relaxed) {
            self.overflowed = true;
            self.kept = Vec::new();
        } else if let Some(data) = frame.data_ref() {
            self.kept.push(Kept::Data(data.clone()));
        } else if let Some(trailers) = frame.trailers_ref() {
            self.kept.push(Kept::Trailers(trailers.clone()));
        }
    }

    /// So much is still to come, and no more than was.
    fn promise(&mut self, left: u64) {
        self.allowance.promised.fetch_sub(self.promised - left, Relaxed);
        self.promised = left;
    }

    fn kept(&self, position: usize) -> Option<Frame<Bytes>> {
        self.kept.get(position).map(|kept| match kept.clone() {
            Kept::Data(data) => Frame::data(data),
            Kept::Trailers(trailers) => Frame::trailers(trailers),
        })
    }

    fn wake(&mut self) {
        self.followers.drain(..).for_each(Waker::wake);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.promise(0);
    }
}

impl Body for Replay {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        let mut shared = lock(&this.shared);
        if this.turn != shared.turn {
            let error = Error::new(Kind::UpstreamReset, "another try has taken over");
            let error = Error { reset: Some(h2::Reason::CANCEL), ..error };
            return Poll::Ready(Some(Err(BodyError::Mesh(error))));
        }
        if let Some(frame) = shared.kept(this.position) {
            drop(shared);
            this.position += 1;
            return Poll::Ready(Some(Ok(frame)));
        }
        if shared.ended {
            return Poll::Ready(None);
        }
        let frame = shared.poll_peer(cx);
        if frame.is_pending() {
            shared.reader = Some(cx.waker().clone());
        }
        drop(shared);
        if matches!(frame, Poll::Ready(Some(Ok(_)))) {
            this.position += 1;
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        let shared = lock(&self.shared);
        self.position >= shared.kept.len() && (shared.ended || shared.peer.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        let shared = lock(&self.shared);
        if self.position == 0 && shared.kept.is_empty() && !shared.overflowed {
            return shared.peer.size_hint();
        }
        let kept: usize = shared.kept.iter().skip(self.position).map(Kept::len).sum();
        match shared.peer.size_hint().exact() {
            Some(rest) => SizeHint::with_exact(rest + kept as u64),
            None => SizeHint::default(),
        }
    }
}

impl Body for Follow {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        let mut shared = lock(&this.shared);
        let broken = |why| Poll::Ready(Some(Err(BodyError::Mesh(Error::new(Kind::Overflow, why)))));
        if shared.overflowed {
            return broken("the request body is too long to be mirrored");
        }
        if let Some(frame) = shared.kept(this.position) {
            drop(shared);
            this.position += 1;
            return Poll::Ready(Some(Ok(frame)));
        }
        if shared.ended {
            return Poll::Ready(None);
        }
        if shared.views == 0 {
            return broken("the request that is mirrored has ended before its body");
        }
        shared.followers.push(cx.waker().clone());
        Poll::Pending
    }

    fn is_end_stream(&self) -> bool {
        let shared = lock(&self.shared);
        shared.ended && !shared.overflowed && self.position >= shared.kept.len()
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
