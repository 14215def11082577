//! A kept HTTP/1 connection of a client that has nothing to ask for now.
//!
//! Promises: such a connection holds its socket, what is reported of it and a timer, and no buffer; what serving requests takes
//! is made anew when the next one begins to arrive. A busy connection never comes here: it costs a request nothing. Never
//! loses or repeats a byte: a connection is parked only while hyper awaits a head of which nothing has come. Tested in the lab
//! (`tests/tests/memory_of_idle_connections.rs`, and the limits in `tests/tests/http/`).

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use hyper::server::conn::http1::Parts;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _},
    time::{Instant, sleep_until},
};

use crate::{capture, drain::Drain, http1::Edge};

/// How long a connection has had no request when it is parked: longer than the pauses of a client that has more to ask, and so
/// long that the timer of a busy connection is seldom due.
pub(super) const AFTER: Duration = Duration::from_millis(500);

/// How many have been parked when what they have freed is worth giving back, at some 20 KiB each.
const MANY: u32 = 1000;

/// Why a connection is not parked any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Parked {
    /// The next request has begun to arrive.
    Asked,
    /// None has for too long; the connection is closed.
    Idle,
    /// The client has left, or the pod drains; the connection is closed.
    Ended,
}

/// What is left of a connection that hyper has served. `None` where hyper holds bytes, which it never does when it awaits a
/// head: then the connection can only be closed.
pub(super) fn edge_of<S, F>(parts: Parts<TokioIo<Edge<S>>, F>) -> Option<Edge<S>> {
    let Parts { io, read_buf, .. } = parts;
    let mut edge = io.into_inner();
    if read_buf.is_empty() && edge.rest() {
        return Some(edge);
    }
    tracing::error!(bytes = read_buf.len(), "a connection is closed: it was parked within a request");
    None
}

/// Until there is something to do. `since`: when the last request had ended; `idle`: how long there may be none.
pub(super) async fn wait<S>(
    edge: &mut Edge<S>,
    drain: &Drain,
    since: Instant,
    idle: Option<Duration>,
) -> Parked
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    static PARKED: AtomicU32 = AtomicU32::new(0);
    if PARKED.fetch_add(1, Ordering::Relaxed) % MANY == MANY - 1 {
        capture::give_back_soon();
    }
    let too_long = async {
        match idle {
            Some(idle) => sleep_until(since + idle).await,
            None => std::future::pending().await,
        }
    };
    let parked = tokio::select! {
        biased;
        begun = edge.begun() => if matches!(begun, Ok(true)) { Parked::Asked } else { Parked::Ended },
        () = drain.started() => Parked::Ended,
        () = too_long => Parked::Idle,
    };
    if parked != Parked::Asked {
        // Who has gone needs no goodbye.
        let _ = edge.shutdown().await;
    }
    parked
}
