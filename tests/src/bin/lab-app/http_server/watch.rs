//! What the HTTP server counts: requests, how many at once, and whose client left early.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use hyper::body::{Body as _, Frame, SizeHint};
use lab::apps::Stats;
use tokio::sync::watch;

use super::{Body, Failure};

/// Counts, and whoever waits in `/hold`.
#[derive(Debug)]
pub struct Watch {
    accepted: AtomicU64,
    stats: Mutex<Stats>,
    /// Counts releases.
    releases: watch::Sender<u64>,
}

impl Default for Watch {
    fn default() -> Self {
        Self { accepted: AtomicU64::new(0), stats: Mutex::default(), releases: watch::Sender::new(0) }
    }
}

impl Watch {
    fn lock(&self) -> MutexGuard<'_, Stats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Numbers a connection, from 1.
    pub fn connection(&self) -> u64 {
        self.accepted.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub fn stats(&self) -> Stats {
        self.lock().clone()
    }

    /// Ends once somebody releases, unless the client leaves before.
    pub async fn hold(&self) {
        let mut releases = self.releases.subscribe();
        self.lock().held += 1;
        let _held = Held(self);
        // The sender lives as long as `self`.
        let _ = releases.changed().await;
    }

    /// Releases whoever is held, and says how many.
    pub fn release(&self) -> u64 {
        let stats = self.lock();
        self.releases.send_modify(|releases| *releases += 1);
        stats.held
    }
}

struct Held<'a>(&'a Watch);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.lock().held -= 1;
    }
}

/// A request that is not answered to its end yet. Dropped before it is done, its client has left.
#[derive(Debug)]
pub struct Open {
    watch: Arc<Watch>,
    target: String,
    done: bool,
}

impl Open {
    /// Counts a request, and says how often its target has been asked for.
    /// `number` is the request's on its connection.
    pub fn begin(watch: &Arc<Watch>, target: &str, id: Option<&str>, number: u64) -> (Self, u64) {
        let mut stats = watch.lock();
        stats.connections += u64::from(number == 1);
        stats.open += 1;
        stats.peak = stats.peak.max(stats.open);
        if let Some(id) = id {
            *stats.ids.entry(id.to_owned()).or_default() += 1;
        }
        let times = stats.paths.entry(target.to_owned()).or_default();
        *times += 1;
        let times = *times;
        drop(stats);
        (Self { watch: Arc::clone(watch), target: target.to_owned(), done: false }, times)
    }
}

impl Open {
    /// Ends without an answer, as the server wants it.
    pub fn end(mut self) {
        self.done = true;
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let mut stats = self.watch.lock();
        stats.open -= 1;
        if !self.done {
            *stats.aborted.entry(std::mem::take(&mut self.target)).or_default() += 1;
        }
    }
}

/// A body that notices whether it was sent to its end.
pub struct Watched {
    body: Body,
    open: Open,
}

impl Watched {
    pub fn new(body: Body, open: Open) -> Self {
        Self { body, open }
    }
}

impl hyper::body::Body for Watched {
    type Data = Bytes;
    type Error = Failure;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Failure>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        // A body that fails does so on demand: that is an end of the server's own making. Trailers are the end, too.
        self.open.done |= !matches!(&frame, Some(Ok(frame)) if frame.is_data());
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.open.done |= self.body.is_end_stream();
    }
}
