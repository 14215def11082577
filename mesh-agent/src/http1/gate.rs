//! What the edge and the service behind hyper tell each other.
//!
//! Both count requests: the edge the heads it hands on, the gate the calls of the service. hyper calls the service once
//! per head, in order, so equal counts mean the same request. Tested in `tests/`.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    task::{Context, Waker},
};

use http::{HeaderMap, HeaderName, StatusCode, header};
use tokio::time::Instant;

use super::{Refusal, head::Head};

/// Bytes of interim responses that wait for one request; what comes on top is dropped.
const INTERIM_BYTES: usize = 16 << 10;

/// Headers that speak of the connection or frame a message: never in an interim response.
const NOT_INTERIM: [HeaderName; 8] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::TRANSFER_ENCODING,
    header::CONTENT_LENGTH,
    header::TRAILER,
    header::TE,
    header::UPGRADE,
];

/// What edge and service share.
#[derive(Debug, Default)]
pub struct Gate {
    shared: Mutex<Shared>,
    /// Whether `Shared::interim` has bytes: looked at before every write, without the lock.
    informed: AtomicBool,
    /// Requests being answered: one, or none.
    turns: AtomicU32,
    /// Whether bytes wait for the end of the turn.
    held_back: AtomicBool,
    /// What hyper was told last is that nothing has come of the next head.
    awaiting: AtomicBool,
}

/// A request is being answered until this is dropped: as long as it is, hyper gets no other.
#[derive(Debug)]
pub struct Turn(Arc<Gate>);

impl Turn {
    /// As [`Gate::body_refusal`].
    pub fn body_refusal(&self) -> Option<Refusal> {
        self.0.body_refusal()
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.turns.fetch_sub(1, Ordering::AcqRel);
        if self.0.held_back.swap(false, Ordering::AcqRel) {
            wake(self.0.lock().waker.clone());
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    /// Heads handed to hyper; the stand-in counts.
    handed: u64,
    /// Requests that hyper has called the service with.
    called: u64,
    /// Which request is a stand-in, and for what.
    refused: Option<(u64, Refusal)>,
    body_refusal: Option<Refusal>,
    /// Since when a head is arriving.
    head_began: Option<Instant>,
    head_expired: bool,
    /// After a request that may switch protocols, until the service has said.
    switch: Switch,
    /// Interim responses, and the request they are for.
    interim: Vec<u8>,
    interim_for: u64,
    /// The connection's task.
    waker: Option<Waker>,
}

#[derive(Debug, Clone, Copy, Default)]
enum Switch {
    /// The last request cannot switch.
    #[default]
    No,
    Undecided,
    Decided(bool),
}

impl Gate {
    /// To be called first thing for each request, in the order of hyper's calls: a refusal means that this request
    /// stands for bytes that were refused. Answer with it and nothing else.
    pub fn next_request(&self) -> Option<Refusal> {
        let mut shared = self.lock();
        shared.called += 1;
        shared.refused.filter(|(at, _)| *at == shared.called).map(|(_, refusal)| refusal)
    }

    /// The answer to the request of this call begins; to be called before the call returns its future, and held until
    /// the answer has been handed to hyper, or given up. Meanwhile a client that leaves is noticed.
    pub fn turn(self: &Arc<Self>) -> Turn {
        self.turns.fetch_add(1, Ordering::AcqRel);
        Turn(Arc::clone(self))
    }

    pub(super) fn is_busy(&self) -> bool {
        self.turns.load(Ordering::Acquire) > 0
    }

    /// Has the connection's task woken when the turn ends: something waits for that.
    pub(super) fn wake_after_turn(&self, cx: &Context<'_>) {
        self.lock().remember(cx);
        self.held_back.store(true, Ordering::SeqCst);
        // It may have ended just before.
        if !self.is_busy() {
            cx.waker().wake_by_ref();
        }
    }

    /// Why the body that is being read broke off, when the edge refused it.
    pub fn body_refusal(&self) -> Option<Refusal> {
        self.lock().body_refusal
    }

    /// Says whether the connection switches protocols, after CONNECT or a request with an `Upgrade` header: the edge
    /// hands nothing more to hyper until it is told. With `true`, what follows the request's own body is not HTTP and
    /// passes untouched; to be called before the 101 or 2xx is returned to hyper. With `false`, HTTP goes on; every
    /// other answer to such a request needs it, or the client's next request waits for ever. The first word counts, and
    /// for other requests none does.
    pub fn switched(&self, yes: bool) {
        let waker = {
            let mut shared = self.lock();
            let Switch::Undecided = shared.switch else { return };
            shared.switch = Switch::Decided(yes);
            shared.waker.clone()
        };
        wake(waker);
    }

    /// Queues an interim response (1xx, but for 101) for the request that the service was called with last. It is
    /// written before the final response; where that has begun, or earlier responses are still on their way, or the
    /// client speaks HTTP/1.0, it is dropped. Headers of the connection are left out.
    pub fn inform(&self, status: StatusCode, headers: &HeaderMap) {
        if !status.is_informational() || status == StatusCode::SWITCHING_PROTOCOLS {
            return;
        }
        let head = interim(status, headers);
        let waker = {
            let mut shared = self.lock();
            if shared.interim_for != shared.called {
                shared.interim.clear();
                shared.interim_for = shared.called;
            }
            if shared.interim.len() + head.len() > INTERIM_BYTES {
                return;
            }
            shared.interim.extend_from_slice(&head);
            self.informed.store(true, Ordering::Release);
            shared.waker.clone()
        };
        wake(waker);
    }

    /// Whether the first bytes of a request head have arrived and the head is not complete.
    pub fn is_mid_head(&self) -> bool {
        self.head_began().is_some()
    }

    /// Whether all that came is answered, and hyper awaits a head of which nothing has come. What it has still to write of the
    /// last answer is not known here.
    pub fn awaits_head(&self) -> bool {
        !self.is_busy() && self.awaiting.load(Ordering::Relaxed)
    }

    /// Since when a head is arriving that is not complete.
    pub fn head_began(&self) -> Option<Instant> {
        self.lock().head_began
    }

    /// The time for a head ran out: where one is arriving, it is refused as [`Refusal::HeadTimeout`].
    pub fn expire_head(&self) {
        let waker = {
            let mut shared = self.lock();
            if shared.head_began.is_none() {
                return;
            }
            shared.head_expired = true;
            shared.waker.clone()
        };
        wake(waker);
    }

    /// A checked head goes to hyper.
    pub(super) fn hand_on(&self, head: &Head, cx: &Context<'_>) {
        self.waits(false);
        let mut shared = self.lock();
        shared.handed += 1;
        shared.end_head();
        shared.switch = if head.may_switch { Switch::Undecided } else { Switch::No };
        shared.remember(cx);
    }

    /// A stand-in goes to hyper, for bytes that are no request.
    pub(super) fn refuse(&self, refusal: Refusal, cx: &Context<'_>) {
        self.waits(false);
        let mut shared = self.lock();
        shared.handed += 1;
        shared.end_head();
        shared.refused = Some((shared.handed, refusal));
        shared.remember(cx);
    }

    pub(super) fn refuse_body(&self, refusal: Refusal) {
        self.lock().body_refusal = Some(refusal);
    }

    /// hyper gets no more for now: `nothing` tells whether none of the next head has come.
    pub(super) fn waits(&self, nothing: bool) {
        self.awaiting.store(nothing, Ordering::Relaxed);
    }

    /// The edge waits for more of a head; `arriving` tells whether any of it is there.
    pub(super) fn wait_for_head(&self, arriving: bool, cx: &Context<'_>) {
        let mut shared = self.lock();
        if arriving && shared.head_began.is_none() {
            shared.head_began = Some(Instant::now());
        }
        shared.remember(cx);
    }

    pub(super) fn head_expired(&self) -> bool {
        self.lock().head_expired
    }

    /// The service's word on switching; none yet, and the task is woken by it.
    pub(super) fn decision(&self, cx: &Context<'_>) -> Option<bool> {
        let mut shared = self.lock();
        match shared.switch {
            Switch::Decided(yes) => Some(yes),
            Switch::No => Some(false),
            Switch::Undecided => {
                shared.remember(cx);
                None
            }
        }
    }

    /// The interim responses for the request handed on last.
    pub(super) fn take_interim(&self) -> Option<Vec<u8>> {
        if !self.informed.load(Ordering::Acquire) {
            return None;
        }
        let mut shared = self.lock();
        self.informed.store(false, Ordering::Release);
        let interim = std::mem::take(&mut shared.interim);
        (shared.interim_for == shared.handed).then_some(interim)
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    fn end_head(&mut self) {
        (self.head_began, self.head_expired) = (None, false);
    }

    fn remember(&mut self, cx: &Context<'_>) {
        match &mut self.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
    }
}

fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}

/// An interim response as it goes on the wire.
fn interim(status: StatusCode, headers: &HeaderMap) -> Vec<u8> {
    let mut head =
        format!("HTTP/1.1 {} {}\r\n", status.as_str(), status.canonical_reason().unwrap_or("")).into_bytes();
    for (name, value) in headers {
        // A `HeaderValue` may hold what this edge itself would refuse: other crates make them unchecked.
        if NOT_INTERIM.contains(name) || !super::field::is_value(value.as_bytes()) {
            continue;
        }
        head.extend_from_slice(name.as_str().as_bytes());
        head.extend_from_slice(b": ");
        head.extend_from_slice(value.as_bytes());
        head.extend_from_slice(b"\r\n");
    }
    head.extend_from_slice(b"\r\n");
    head
}
