//! Holds requests to what the port of their pod takes: rate limits and adaptive concurrency, at the pod's node.
//!
//! Asked of every request that policies have let in, however it comes: through services and past them, from this node and
//! from others, in plaintext. Who asks is whom the certificate or the kernel names. Of bytes that are no requests nothing is
//! asked. The kubelet's probes are not held up. Tested in the lab (`tests/tests/rate_limits.rs`, `adaptive_concurrency.rs`);
//! what is let in, in `limit/`.

use std::{net::SocketAddr, sync::Arc};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Response, StatusCode,
    header::{CONTENT_TYPE, RETRY_AFTER},
};
use tokio::time::Instant;

use super::Mesh;
use crate::{
    error::{Error, Kind, Result},
    limit::{
        concurrency::{self, Admitted},
        rate::{self, Asking, Over, Quota},
    },
    policy::{Asked, Head},
    report::Reporter,
    state::snapshot::{Guard, RateLimit},
};

/// What a request has been given, until its response has ended.
#[derive(Debug, Default)]
pub(super) struct Ticket {
    admitted: Option<Place>,
    /// Of the limit that has least left.
    quota: Option<Quota>,
}

/// A place among the requests under way.
#[derive(Debug)]
struct Place {
    admitted: Admitted,
    guard: Arc<Guard>,
    app: SocketAddr,
    reporter: Arc<Reporter>,
}

impl Ticket {
    /// Tells the client what it has left.
    pub fn tell(&self, headers: &mut HeaderMap) {
        if let Some(quota) = &self.quota {
            rate::tell(quota, headers);
        }
    }

    /// The response is whole.
    pub fn finished(&self) {
        let Some(Place { admitted, guard, app, reporter }) = &self.admitted else { return };
        if let Some(limit) = admitted.finished() {
            reporter.concurrency_limit(&guard.service, *app, limit);
        }
    }
}

/// Whether bytes for this address of a pod are read, so that the requests in them can be held to its limits.
pub(super) fn reads_requests(mesh: &Mesh, app: SocketAddr) -> bool {
    mesh.snapshot.load().guards.contains_key(&app)
}

/// Whether limits ask for the path of a request, which then needs its normal form.
pub(super) fn reads_paths(mesh: &Mesh, app: SocketAddr) -> bool {
    let snapshot = mesh.snapshot.load();
    snapshot
        .guards
        .get(&app)
        .is_some_and(|guard| guard.limits.iter().any(|limit| !limit.rule.paths.is_empty()))
}

/// Lets a request in, or not.
///
/// # Errors
/// [`Kind::RateLimited`], with what the client is told; [`Kind::ConcurrencyLimit`].
pub(super) fn admit(mesh: &Mesh, asked: &Asked<'_>, head: &Head<'_>) -> Result<Ticket> {
    let snapshot = mesh.snapshot.load();
    let Some(guard) = snapshot.guards.get(&asked.destination) else { return Ok(Ticket::default()) };
    let now = Instant::now();
    let admitted = place(mesh, guard, asked.destination, now)?;
    let asking = Asking { source: asked.source, method: head.method, path: head.path, now };
    match rate::take_all(&guard.limits, &asking) {
        Ok(quota) => Ok(Ticket { admitted, quota }),
        Err(Over { limit, left, wait }) => {
            mesh.reporter.rate_limited(&guard.service, &limit.rule.name);
            Err(over(guard, limit, asked, &left, rate::seconds(wait)))
        }
    }
}

fn place(mesh: &Mesh, guard: &Arc<Guard>, app: SocketAddr, now: Instant) -> Result<Option<Place>> {
    let Some(concurrency) = &guard.concurrency else { return Ok(None) };
    match concurrency::admit(&concurrency.rule, &concurrency.state, now) {
        Ok(admitted) => {
            let (guard, reporter) = (Arc::clone(guard), Arc::clone(&mesh.reporter));
            Ok(Some(Place { admitted, guard, app, reporter }))
        }
        Err(limit) => {
            mesh.reporter.concurrency_refused(&guard.service);
            let text = format!("reached_concurrency_limit: {limit} requests are under way at {app}");
            Err(Error::new(Kind::ConcurrencyLimit, text))
        }
    }
}

/// Envoy's words for it.
fn over(guard: &Guard, limit: &RateLimit, asked: &Asked<'_>, left: &Quota, wait: u64) -> Error {
    let mut response = Response::new(Bytes::from_static(b"local_rate_limited"));
    *response.status_mut() = StatusCode::TOO_MANY_REQUESTS;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    headers.insert("x-envoy-ratelimited", HeaderValue::from_static("true"));
    headers.insert(RETRY_AFTER, wait.max(1).into());
    rate::tell(left, headers);
    let source = asked.source.map_or_else(|| "no identity".to_owned(), ToString::to_string);
    let text = format!("rate limit {:?} of {} is used up by {source}", limit.rule.name, guard.service);
    Error { answer: Some(Arc::new(response)), ..Error::new(Kind::RateLimited, text) }
}
