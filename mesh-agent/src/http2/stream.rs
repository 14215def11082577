//! One stream at the accepting end, from its request to its last frame.
//!
//! Promises: while an answer is being made, a client that resets the stream ends the making; interim responses go out
//! before the final one; once nothing moves for too long the stream is reset, and no other. Tested in `tests.rs`.

use std::{
    fmt,
    future::poll_fn,
    pin::{Pin, pin},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    task::Poll,
    time::Duration,
};

use atomic_waker::AtomicWaker;
use bytes::Bytes;
use h2::{Reason, RecvStream, server::SendResponse};
use http::{HeaderMap, Response, StatusCode};
use tokio::time::Instant;

use super::{bytes::ByteStream, pipe::Pipe};
use crate::body::{Activity, Breaking, Connection, Inform, Stall};

/// Completes when a stream that has become bytes is over and reported.
pub type Taken = Pin<Box<dyn Future<Output = ()> + Send>>;

/// How a stream is answered.
pub enum Reply<B> {
    /// A response with its body.
    Response(Response<B>),
    /// A CONNECT is granted: this head, and from then on the stream is bytes, which are handed to this.
    Switch(Response<()>, Box<dyn FnOnce(ByteStream) -> Taken + Send>),
}

/// A stream that was accepted. Dropped without an answer, it is reset with `CANCEL`.
pub struct ServerStream {
    reply: SendResponse<Bytes>,
    /// The client's half, where the request is a CONNECT; else it is the request's body.
    receive: Option<RecvStream>,
    shared: Arc<Shared>,
    tally: Arc<Tally>,
    opened: Instant,
}

/// What the maker of the answer and the stream both know.
#[derive(Debug)]
struct Shared {
    activity: Arc<Activity>,
    /// Whether `interim` holds anything: looked at each time the stream is polled, so no lock is taken for nothing.
    has_interim: AtomicBool,
    interim: Mutex<Vec<Response<()>>>,
    /// How many there were.
    informed: AtomicU32,
    waker: AtomicWaker,
}

/// Streams of one connection, and those that were reset before they had an answer.
#[derive(Debug, Default)]
pub(super) struct Tally {
    accepted: AtomicU32,
    reset_early: AtomicU32,
}

/// From how many streams on a connection is judged by how it ends them, and which share may be reset before an answer
/// (those of Envoy: 500, one half).
const JUDGED_FROM: u32 = 500;

/// A stream reset sooner than this without an answer counts as reset early (Envoy's premature reset: 1 s).
const PREMATURE: Duration = Duration::from_secs(1);

/// Interim responses that one request may have.
const MOST_INTERIM: u32 = 32;

impl Tally {
    /// Streams so far.
    pub fn accepted(&self) -> u32 {
        self.accepted.load(Ordering::Relaxed)
    }

    /// Whether most of the streams are opened only to be reset ("rapid reset", CVE-2023-44487).
    pub fn is_abusive(&self) -> bool {
        let accepted = self.accepted();
        accepted >= JUDGED_FROM && self.reset_early.load(Ordering::Relaxed) > accepted / 2
    }
}

impl Inform for Shared {
    fn inform(&self, status: StatusCode, headers: &HeaderMap) {
        // Nothing holds these back as windows hold bodies back: an app that goes on for ever is not listened to.
        if self.informed.fetch_add(1, Ordering::Relaxed) >= MOST_INTERIM {
            return;
        }
        let mut response = Response::new(());
        *response.status_mut() = status;
        response.headers_mut().clone_from(headers);
        self.interim.lock().unwrap_or_else(PoisonError::into_inner).push(response);
        self.has_interim.store(true, Ordering::Release);
        self.waker.wake();
    }
}

impl fmt::Debug for ServerStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerStream").field("id", &self.reply.stream_id()).finish_non_exhaustive()
    }
}

impl ServerStream {
    pub(super) fn new(
        reply: SendResponse<Bytes>,
        receive: Option<RecvStream>,
        tally: Arc<Tally>,
        connection: Arc<Connection>,
    ) -> Self {
        tally.accepted.fetch_add(1, Ordering::Relaxed);
        let shared = Shared {
            activity: Arc::new(Activity::on(connection)),
            has_interim: AtomicBool::new(false),
            interim: Mutex::default(),
            informed: AtomicU32::new(0),
            waker: AtomicWaker::new(),
        };
        Self { reply, receive, shared: Arc::new(shared), tally, opened: Instant::now() }
    }

    /// Its number on the connection.
    pub fn id(&self) -> h2::StreamId {
        self.reply.stream_id()
    }

    /// Tells whether anything moves on it.
    pub fn activity(&self) -> Arc<Activity> {
        Arc::clone(&self.shared.activity)
    }

    /// Where interim responses go.
    pub fn informer(&self) -> Arc<dyn Inform> {
        Arc::clone(&self.shared) as Arc<dyn Inform>
    }

    /// Answers with what `making` comes to, and sees it through to the last frame.
    pub async fn run<B>(mut self, making: impl Future<Output = Reply<B>>, stall: Stall)
    where
        B: Breaking,
    {
        let Some(reply) = self.make(making).await else {
            // Who has waited for an answer and gives up is no flood.
            if self.opened.elapsed() < PREMATURE {
                self.tally.reset_early.fetch_add(1, Ordering::Relaxed);
            }
            return;
        };
        match reply {
            Reply::Response(response) => self.respond(response, stall).await,
            Reply::Switch(head, take) => {
                if let Some(stream) = self.grant(head) {
                    take(stream).await;
                }
            }
        }
    }

    /// `None` when the client has reset the stream meanwhile.
    async fn make<B>(&mut self, making: impl Future<Output = Reply<B>>) -> Option<Reply<B>> {
        let mut making = pin!(making);
        poll_fn(|cx| {
            if let Poll::Ready(reply) = making.as_mut().poll(cx) {
                self.send_interim();
                return Poll::Ready(Some(reply));
            }
            self.shared.waker.register(cx.waker());
            self.send_interim();
            self.reply.poll_reset(cx).map(|_| None)
        })
        .await
    }

    fn send_interim(&mut self) {
        if !self.shared.has_interim.swap(false, Ordering::AcqRel) {
            return;
        }
        let mut interim = self.shared.interim.lock().unwrap_or_else(PoisonError::into_inner);
        for response in interim.drain(..) {
            // Fails only when the client is gone, which the answer finds out.
            let _ = self.reply.send_informational(response);
        }
    }

    async fn respond<B>(mut self, response: Response<B>, stall: Stall)
    where
        B: Breaking,
    {
        let (parts, body) = response.into_parts();
        let no_body = body.is_end_stream();
        let Ok(stream) = self.reply.send_response(Response::from_parts(parts, ()), no_body) else { return };
        if no_body {
            return;
        }
        let mut pipe = Pipe::new(body, stream);
        tokio::select! {
            biased;
            _ = &mut pipe => {}
            () = self.shared.activity.stalled(stall) => pipe.reset(Reason::CANCEL),
        }
    }

    /// Grants a CONNECT. `None` when the client is gone; what is no CONNECT cannot be granted and is reset.
    pub fn grant(mut self, head: Response<()>) -> Option<ByteStream> {
        let Some(receive) = self.receive.take() else {
            self.reply.send_reset(Reason::INTERNAL_ERROR);
            return None;
        };
        let send = self.reply.send_response(head, false).ok()?;
        Some(ByteStream::new(send, receive, None))
    }

    /// Answers with a status and no body.
    pub fn refuse(mut self, status: StatusCode) {
        let mut response = Response::new(());
        *response.status_mut() = status;
        // The only reason to fail is a client that is gone.
        let _ = self.reply.send_response(response, true);
    }
}
