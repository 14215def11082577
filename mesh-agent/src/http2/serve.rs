//! The accepting end of a connection: every stream is handed to a handler of its own.
//!
//! Promises that what a handler had accepted for sending is sent before the connection ends by us, if the peer takes it;
//! and that a peer which breaks the protocol, opens streams only to reset them, or answers no PING loses this
//! connection and nothing else. Tested in `tests.rs` beside it and in `tunnel/tests`.

use std::{
    future::{Pending, poll_fn},
    pin::pin,
    sync::Arc,
    task::{Poll, ready},
    time::Duration,
};

use ::bytes::Bytes;
use h2::{Ping, PingPong, Reason, RecvStream, server::SendResponse};
use http::{Method, Request};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{self, Instant},
};
use tokio_util::task::TaskTracker;

use super::{
    refused::Along,
    stream::{ServerStream, Tally},
};
use crate::{
    body::{self, Body, Received},
    copy::{Coalesced, Turn},
    drain::Drain,
    error::{Error, Kind, Result},
};

/// How a connection is looked after.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Time for the peer's preface, and for its answer to a goodbye.
    pub handshake: Duration,
    /// How often a PING is sent, and how long its answer may take; `None`: no PING is sent.
    pub ping: Option<(Duration, Duration)>,
    /// How long it may be without a stream before it is closed; `None`: for ever.
    pub idle: Option<Duration>,
    /// How long a connection that is to end stays open for what its last streams have ready and its peer has not taken.
    pub flush: Duration,
}

/// What others know of a connection.
#[derive(Debug)]
pub struct Watch<'a, G> {
    /// Told what becomes a request, where the connection is read along.
    pub along: Option<&'a Along>,
    /// What its streams share, and what is noted of them when it is given up.
    pub connection: Arc<body::Connection>,
    /// Completes when nothing more is to be awaited of the peer, with the reason.
    pub given_up: G,
}

impl Watch<'_, Pending<Error>> {
    /// Nobody watches.
    pub fn none() -> Self {
        Self { along: None, connection: Arc::default(), given_up: std::future::pending() }
    }
}

/// What a stream that is handed out counts in its connection's turn, in bytes: 32 are a turn. Whoever reads what their
/// handlers write can begin then, on another core, in place of when all that has come in is handled.
const A_STREAM: usize = Turn::BYTES / 32;

/// How a connection came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Its peer was done, or it was drained.
    Done,
    /// It was closed because no stream had been open for [`Options::idle`].
    Idle,
}

/// Serves a connection until it ends and every handler is done; `drain` makes it send GOAWAY and end with its last
/// stream, where its agent is only leaving not before there was one: a client that has just connected is about to ask.
/// The request of a CONNECT has no body: its bytes come once it is granted.
///
/// # Errors
/// [`Kind::BadRequest`] when the peer breaks HTTP/2, [`Kind::DownstreamReset`] when the connection breaks with streams
/// open, or why it was given up: its streams have stalled then.
pub async fn serve<S, H, F, G>(
    io: S,
    builder: &h2::server::Builder,
    options: Options,
    drain: &Drain,
    watch: Watch<'_, G>,
    handle: H,
) -> Result<Ended>
where
    S: AsyncRead + AsyncWrite + Unpin,
    H: Fn(Request<Body>, ServerStream) -> F,
    F: Future<Output = ()> + Send + 'static,
    G: Future<Output = Error>,
{
    let Watch { along, connection: shared, given_up } = watch;
    let mut connection = handshake(io, builder, options.handshake).await?;
    let handlers = TaskTracker::new();
    let served = async {
        let ended =
            take_streams(&mut connection, options, drain, (along, &shared), &handlers, handle).await?;
        connection.abrupt_shutdown(Reason::NO_ERROR);
        let _ = time::timeout(options.flush, poll_fn(|cx| connection.poll_closed(cx))).await;
        Ok(ended)
    };
    let outcome = tokio::select! {
        biased;
        outcome = served => outcome,
        why = given_up => {
            shared.give_up();
            Err(why)
        }
    };
    // A GOAWAY that is still to be written gets its chance; then the streams still open break, so that their handlers
    // see the end and report it.
    let _ = time::timeout(Duration::ZERO, poll_fn(|cx| connection.poll_closed(cx))).await;
    drop(connection);
    along.inspect(|along| along.all_accepted());
    handlers.close();
    handlers.wait().await;
    outcome
}

/// Hands out streams until there are to be no more. Where that is no error, none is open.
async fn take_streams<S, H, F>(
    connection: &mut h2::server::Connection<Coalesced<S>, Bytes>,
    options: Options,
    drain: &Drain,
    (along, shared): (Option<&Along>, &Arc<body::Connection>),
    handlers: &TaskTracker,
    handle: H,
) -> Result<Ended>
where
    S: AsyncRead + AsyncWrite + Unpin,
    H: Fn(Request<Body>, ServerStream) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let pings = connection.ping_pong();
    let keep_alive = async {
        match options.ping {
            Some((interval, limit)) => keep_alive(pings, interval, limit).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(keep_alive);
    let tally = Arc::new(Tally::default());
    let unused = unused(handlers, &tally, options.idle);
    tokio::pin!(unused);
    // Made once: for each stream anew, they would be put in line with everybody who waits for the same.
    let (started, left) = (drain.started(), drain.left());
    tokio::pin!(started, left);
    let (mut draining, mut ending) = (false, Ended::Done);
    // A peer that is told to leave answers the PING that comes with it; one that is gone does not, and is not waited for.
    let mut goodbye = None;
    // No handler is left, and what they had ready may take until then.
    let mut rest = None;
    let mut turn = Turn::default();
    loop {
        tokio::select! {
            accepted = accept(connection, along, rest.is_some(), &mut turn) => match accepted {
                Some(Ok((request, reply))) => {
                    rest = None;
                    let (request, receive) = into_body(request);
                    let stream = ServerStream::new(reply, receive, Arc::clone(&tally), Arc::clone(shared));
                    handlers.spawn(handle(request, stream));
                    if tally.is_abusive() {
                        connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
                        break Err(broken(&"most of its streams are opened only to be reset"));
                    }
                }
                // A peer that leaves without ceremony takes nothing with it when no stream is open.
                Some(Err(error)) if error.is_io() && handlers.is_empty() => break Ok(ending),
                Some(Err(error)) => break Err(ended(&error)),
                None => break Ok(ending),
            },
            () = &mut started, if !draining => {
                draining = true;
                connection.graceful_shutdown();
            }
            () = &mut left, if !draining && tally.accepted() > 0 => {
                draining = true;
                goodbye = Some(Instant::now() + options.handshake);
                connection.graceful_shutdown();
            }
            () = &mut keep_alive => {
                break Err(Error::new(Kind::DownstreamReset, "it answers no PING any more"));
            }
            () = left_alone(goodbye, handlers, options.handshake), if rest.is_none() => {
                rest = Some(Instant::now() + options.flush);
            }
            () = time::sleep_until(rest.unwrap_or_else(Instant::now)), if rest.is_some() => break Ok(ending),
            () = &mut unused, if !draining => {
                (draining, ending) = (true, Ended::Idle);
                goodbye = Some(Instant::now() + options.handshake);
                connection.graceful_shutdown();
            }
        }
    }
}

async fn handshake<S>(
    io: S,
    builder: &h2::server::Builder,
    limit: Duration,
) -> Result<h2::server::Connection<Coalesced<S>, Bytes>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    time::timeout(limit, builder.handshake(Coalesced::new(io)))
        .await
        .map_err(|_| broken(&format_args!("no HTTP/2 preface within {limit:?}")))?
        .map_err(|error| ended(&error))
}

/// The next stream, and how it is answered; `None` when the connection has ended, or, where it is `to_end`, when all of
/// every stream is written.
async fn accept<S>(
    connection: &mut h2::server::Connection<Coalesced<S>, Bytes>,
    along: Option<&Along>,
    to_end: bool,
    turn: &mut Turn,
) -> Option<std::result::Result<(Request<RecvStream>, SendResponse<Bytes>), h2::Error>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    poll_fn(|cx| {
        ready!(turn.poll(cx));
        let accepted = pin!(connection.accept()).poll(cx);
        if accepted.is_ready() {
            turn.took(A_STREAM);
        } else {
            turn.over();
        }
        match (&accepted, along) {
            (Poll::Ready(Some(Ok((_, reply)))), Some(along)) => along.accepted(reply.stream_id()),
            (_, Some(along)) => along.all_accepted(),
            (_, None) => {}
        }
        if to_end && accepted.is_pending() && !connection.has_streams() {
            return Poll::Ready(None);
        }
        accepted
    })
    .await
}

/// Completes after `at`, once no stream is open any more.
async fn left_alone(at: Option<Instant>, handlers: &TaskTracker, look_again: Duration) {
    let Some(at) = at else { return std::future::pending().await };
    time::sleep_until(at).await;
    while !handlers.is_empty() {
        time::sleep(look_again).await;
    }
}

/// Completes after a whole idle time without a stream.
async fn unused(handlers: &TaskTracker, tally: &Tally, idle: Option<Duration>) {
    let Some(idle) = idle else { return std::future::pending().await };
    loop {
        let before = tally.accepted();
        time::sleep(idle).await;
        if handlers.is_empty() && tally.accepted() == before {
            return;
        }
    }
}

fn into_body(request: Request<RecvStream>) -> (Request<Body>, Option<RecvStream>) {
    let (parts, receive) = request.into_parts();
    if parts.method == Method::CONNECT {
        return (Request::from_parts(parts, Body::Empty), Some(receive));
    }
    let body = Body::from(Received::new(&parts.headers, receive));
    (Request::from_parts(parts, body), None)
}

fn broken(why: &dyn std::fmt::Display) -> Error {
    Error::new(Kind::BadRequest, format!("the peer breaks HTTP/2: {why}"))
}

fn ended(error: &h2::Error) -> Error {
    if error.is_io() {
        return Error::new(Kind::DownstreamReset, format!("the connection broke: {error}"));
    }
    broken(error)
}

/// Returns when the peer no longer answers.
pub async fn keep_alive(pings: Option<PingPong>, interval: Duration, limit: Duration) {
    let Some(mut pings) = pings else { return std::future::pending().await };
    loop {
        time::sleep(interval).await;
        match time::timeout(limit, pings.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            // The connection is closing: its own future tells why.
            Ok(Err(_)) => return std::future::pending().await,
            Err(_) => return,
        }
    }
}
