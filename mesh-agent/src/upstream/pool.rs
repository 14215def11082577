//! Plain HTTP connections to apps and to unmeshed endpoints, kept for the next request.
//!
//! Promises: one HTTP/1.1 connection carries one request at a time and is handed back only when its response has
//! ended; HTTP/2 requests to one address share connections; what nobody uses is closed; a request that was never written to a stale connection
//! goes to a fresh one. Never shares between pods: each pod owns its pools. Tested in the lab
//! (`tests/tests/routing.rs`).

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use foldhash::HashMap;
use http::{
    Request, Response,
    header::{CONTENT_LENGTH, TRANSFER_ENCODING},
};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Notify,
    time::{Instant, sleep_until},
};

use super::{
    Dial, Kept,
    connect::{connect_http1, connect_http2, dial_http1, dial_http2, failure, h2_failure},
    message,
    slot::Slot,
    terms::{LOOK, Terms},
};
use crate::{
    body::{Body, Inform},
    error::{Error, Kind, Result},
    http2,
    state::snapshot::{ClusterId, Protocol},
    tunnel::{Introduction, strip_mesh_headers},
    workers::Shard,
};

/// Idle HTTP/1.1 connections kept for one address; the rest are closed when they come back.
const IDLE_PER_KEY: usize = 1024;

/// How often a request that a new connection to an app has not taken is given to another (Istio's default for inbound
/// traffic: `reset-before-request`, twice).
pub const AGAIN: u32 = 2;

/// How many of them are looked at for one that can take a request at once.
const LOOKED_AT: usize = 16;

/// What connections may be shared for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// Where to.
    pub to: SocketAddr,
    /// The client the app is shown, if one is.
    pub client: Option<IpAddr>,
    /// Under whose rule.
    pub cluster: Option<ClusterId>,
    /// Over which TLS.
    pub tls: Option<ClusterId>,
    /// For which client, where the app is told of it by the connection: as in Envoy, for one connection of a client.
    pub introduces: Option<Introduction>,
    /// By whom.
    pub shard: Shard,
}

impl Key {
    /// Whose connections of a cluster may be used: those of the thread that asks, where they are not counted out to all
    /// of them together.
    pub fn shard(kept: &Kept<'_>) -> Shard {
        if kept.pool.connections.is_some() { Shard::SHARED } else { Shard::current() }
    }
}

/// Connections of one pod in one direction.
#[derive(Debug, Default)]
pub struct Pool {
    idle: Mutex<HashMap<Key, Vec<Idle>>>,
    shared: Mutex<HashMap<Key, Arc<Slot>>>,
    /// Whether somebody looks after connections that grow old; changed under the lock of `idle`.
    swept: AtomicBool,
    /// When they look next, in milliseconds since the beginning; changed under the lock of `idle`.
    looks: AtomicU64,
    begun: Begun,
    /// Told when there is one that grows old sooner.
    sooner: Arc<Notify>,
}

/// When a pool was made.
#[derive(Debug)]
struct Begun(Instant);

impl Default for Begun {
    fn default() -> Self {
        Self(Instant::now())
    }
}

/// One HTTP/1.1 connection.
#[derive(Debug)]
struct Connection {
    sender: http1::SendRequest<Body>,
    made: Instant,
    /// Requests that it has had.
    served: u32,
    /// Told when it is kept no longer.
    terms: Terms,
}

#[derive(Debug)]
struct Idle {
    connection: Connection,
    since: Instant,
}

impl Idle {
    fn is_stale(&self, now: Instant) -> bool {
        self.connection.sender.is_closed() || self.until().is_some_and(|until| until <= now)
    }

    /// When it is closed.
    fn until(&self) -> Option<Instant> {
        self.connection.terms.until(self.since, self.connection.made)
    }
}

/// What must outlive the response body: the HTTP/1.1 connection, which is free again when the body has ended.
#[derive(Debug)]
pub struct Lease {
    h1: Option<(Arc<Pool>, Key, Connection)>,
}

impl Lease {
    /// A lease of a stream of a shared connection: nothing to hand back.
    pub fn shared() -> Self {
        Self { h1: None }
    }

    /// The response has ended: the connection may serve again. Without this call it is closed.
    pub fn finished(self) {
        let Some((pool, key, connection)) = self.h1 else { return };
        if connection.terms.is_spent(connection.served, connection.made, Instant::now()) {
            return;
        }
        // It may have to see to its end first, which is done before long: a task to wait for that would cost more.
        pool.put(key, connection);
    }
}

impl Pool {
    /// Sends a request in the form its protocol wants, over a kept connection or a new one.
    pub async fn send(
        self: &Arc<Self>,
        key: Key,
        protocol: Protocol,
        mut request: Box<Request<Body>>,
        inform: &Arc<dyn Inform>,
        dial: &Dial<'_>,
        kept: Kept<'_>,
    ) -> Result<(Response<Body>, Lease)> {
        match protocol {
            Protocol::Http2 => self.send_http2(key, request, &**inform, dial, kept).await,
            Protocol::Http1 | Protocol::Opaque => {
                informed(&mut request, inform);
                self.send_http1(key, request, dial, kept).await
            }
        }
    }

    async fn send_http1(
        self: &Arc<Self>,
        key: Key,
        mut request: Box<Request<Body>>,
        dial: &Dial<'_>,
        kept: Kept<'_>,
    ) -> Result<(Response<Body>, Lease)> {
        let terms = Terms::of(kept.pool);
        // A pod's own app: who speaks for it is the last that can send again.
        let mut again = if key.client.is_some() { AGAIN } else { 0 };
        loop {
            let waits = self.take(&key, terms);
            let fresh = waits.is_none();
            let mut connection = if let Some(connection) = waits {
                connection
            } else {
                self.make_room(kept);
                // Boxed: rare, and every request would have to make room for it.
                let sender = Box::pin(dial_http1(dial, key.to)).await?;
                Connection { sender, made: Instant::now(), served: 0, terms }
            };
            connection.served = connection.served.saturating_add(1);
            match connection.sender.try_send_request(*request).await {
                Ok(response) => {
                    one_length(&response, key.to)?;
                    let lease = Lease { h1: Some((Arc::clone(self), key, connection)) };
                    return Ok((response.map(Body::from), lease));
                }
                // The kept connection was closed under us and the request was not written: not the request's fault.
                Err(mut error) => match error.take_message() {
                    Some(unsent) if !fresh => request = unsent.into(),
                    Some(unsent) if again > 0 => (request, again) = (unsent.into(), again - 1),
                    _ => return Err(failure(error.error(), key.to)),
                },
            }
        }
    }

    async fn send_http2(
        self: &Arc<Self>,
        key: Key,
        request: Box<Request<Body>>,
        inform: &dyn Inform,
        dial: &Dial<'_>,
        kept: Kept<'_>,
    ) -> Result<(Response<Body>, Lease)> {
        let slot = Arc::clone(lock(&self.shared).entry(key).or_default());
        self.look_after(&lock(&self.idle));
        let (sender, place) = loop {
            let (sender, place) = slot.get(kept, || dial_http2(dial, key.to, kept.pool.pings)).await?;
            if let Some(due) = Terms::of(kept.pool).sooner()
                && self.looks_later(due)
            {
                self.look_by(due, &lock(&self.idle));
            }
            // Ready at once: it has room. One that has ended meanwhile has sent nothing.
            if let Ok(sender) = sender.ready().await {
                break (sender, place);
            }
        };
        let sent = http2::send(sender, request, Some(inform)).await;
        let response = sent.map_err(|failed| h2_failure(&failed, key.to))?;
        Ok((response.map(|body| body.held(Arc::new(place))), Lease::shared()))
    }

    fn take(&self, key: &Key, terms: Terms) -> Option<Connection> {
        let mut idle = lock(&self.idle);
        let kept = idle.get_mut(key)?;
        let now = Instant::now();
        // Last in, first out: the warmest connection, and the others may grow old and go. Those that have yet to see to the end
        // of their last exchange are left where they are.
        for at in (kept.len().saturating_sub(LOOKED_AT)..kept.len()).rev() {
            let next = &mut kept[at];
            // The rule may have changed since.
            next.connection.terms = terms;
            let Connection { sender, made, served, .. } = &next.connection;
            if next.is_stale(now) || terms.is_spent(*served, *made, now) {
                kept.remove(at);
            } else if sender.is_ready() {
                return Some(kept.remove(at).connection);
            }
        }
        None
    }

    fn put(self: &Arc<Self>, key: Key, connection: Connection) {
        let due = connection.terms.sooner();
        let mut idle = lock(&self.idle);
        let kept = idle.entry(key).or_default();
        if kept.len() < IDLE_PER_KEY {
            kept.push(Idle { connection, since: Instant::now() });
        }
        if let Some(due) = due.filter(|due| self.looks_later(*due)) {
            self.look_by(due, &idle);
        }
        self.look_after(&idle);
    }

    /// Closes what waits longest of a cluster's connections, where there would be one too many with the next.
    fn make_room(&self, kept: Kept<'_>) {
        let (Some(usage), Some(most)) = (kept.usage, kept.pool.connections) else { return };
        // The next is among those in use already.
        let may_wait = most.saturating_sub(usage.connections()) as usize;
        let mut idle = lock(&self.idle);
        let waiting = |idle: &HashMap<Key, Vec<Idle>>| {
            let of_cluster = idle.iter().filter(|(key, _)| key.cluster == kept.cluster);
            let oldest = |(key, waiting): (&Key, &Vec<Idle>)| Some((waiting.first()?.since, *key));
            let number: usize = of_cluster.clone().map(|(_, waiting)| waiting.len()).sum();
            (number, of_cluster.filter_map(oldest).min_by_key(|(since, _)| *since))
        };
        while let (number, Some((_, key))) = waiting(&idle)
            && number > may_wait
        {
            idle.entry(key).and_modify(|waiting| drop(waiting.remove(0)));
        }
    }

    /// Sees to it that old connections are closed, as long as there are any.
    fn look_after(self: &Arc<Self>, _idle: &MutexGuard<'_, HashMap<Key, Vec<Idle>>>) {
        if !self.swept.swap(true, Ordering::Relaxed) {
            tokio::spawn(sweep(Arc::downgrade(self)));
        }
    }

    /// Whether nobody looks by then.
    fn looks_later(&self, due: Instant) -> bool {
        self.milliseconds(due) < self.looks.load(Ordering::Relaxed)
    }

    fn look_by(&self, due: Instant, _idle: &MutexGuard<'_, HashMap<Key, Vec<Idle>>>) {
        self.looks.store(self.milliseconds(due), Ordering::Relaxed);
        self.sooner.notify_one();
    }

    fn milliseconds(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.begun.0).as_millis()).unwrap_or(u64::MAX)
    }

    /// Closes what nobody uses now, however short a time that is.
    pub fn close_idle(&self) {
        lock(&self.idle).clear();
        lock(&self.shared).retain(|_, slot| {
            slot.close_idle();
            true
        });
    }

    /// Closes what is kept no longer. When to look again; `None`: nothing is left.
    fn sweep(&self) -> Option<Instant> {
        let now = Instant::now();
        let mut next = now + LOOK;
        let mut idle = lock(&self.idle);
        for kept in idle.values_mut() {
            kept.retain(|idle| !idle.is_stale(now));
            next = kept.iter().filter_map(Idle::until).fold(next, Instant::min);
        }
        idle.retain(|_, kept| !kept.is_empty());
        let mut shared = lock(&self.shared);
        shared.retain(|_, slot| {
            let due = slot.sweep(now);
            next = due.map_or(next, |due| next.min(due));
            // Somebody waits for it, or something of it is open.
            due.is_some() || Arc::strong_count(slot) > 1
        });
        if idle.is_empty() && shared.is_empty() {
            self.swept.store(false, Ordering::Relaxed);
            // Whoever is next to look does so at once.
            self.looks.store(0, Ordering::Relaxed);
            return None;
        }
        self.looks.store(self.milliseconds(next), Ordering::Relaxed);
        Some(next)
    }
}

async fn sweep(pool: Weak<Pool>) {
    loop {
        let (due, sooner) = {
            let Some(pool) = pool.upgrade() else { return };
            let Some(due) = pool.sweep() else { return };
            (due, Arc::clone(&pool.sooner))
        };
        tokio::select! {
            () = sleep_until(due) => {}
            () = sooner.notified() => {}
        }
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each critical section leaves what it guards whole at every step, so a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sends one request over a stream of its own, which ends with the response.
pub(super) async fn send_on_new<S>(
    stream: S,
    to: SocketAddr,
    protocol: Protocol,
    mut request: Request<Body>,
    inform: &Arc<dyn Inform>,
) -> Result<(Response<Body>, Lease)>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let response = match protocol {
        Protocol::Http2 => {
            let (sender, connection) = connect_http2(stream, to, None, None).await?;
            tokio::spawn(connection);
            let sent = http2::send(sender, Box::new(request), Some(&**inform)).await;
            sent.map_err(|failed| h2_failure(&failed, to))?
        }
        Protocol::Http1 | Protocol::Opaque => {
            let mut sender = connect_http1(TokioIo::new(stream), to, None).await?;
            informed(&mut request, inform);
            let response = sender.send_request(request).await.map_err(|error| failure(&error, to))?;
            one_length(&response, to)?;
            response.map(Body::from)
        }
    };
    Ok((response, Lease::shared()))
}

/// A body in chunks that states its length as well: the two may differ, and whoever reads it next may believe the other
/// (RFC 9112 §6.3).
fn one_length<B>(response: &Response<B>, from: SocketAddr) -> Result<()> {
    let headers = response.headers();
    if headers.contains_key(TRANSFER_ENCODING) && headers.contains_key(CONTENT_LENGTH) {
        let text = format!("{from} answers with both Transfer-Encoding and Content-Length");
        return Err(Error::new(Kind::UpstreamReset, text));
    }
    Ok(())
}

/// Has hyper hand the interim responses to this request to `inform`, without what is of the connection they came on:
/// over HTTP/2 that would break the stream.
fn informed(request: &mut Request<Body>, inform: &Arc<dyn Inform>) {
    let inform = Arc::clone(inform);
    hyper::ext::on_informational(request, move |response| {
        let mut headers = response.headers().clone();
        message::strip_hop_by_hop(&mut headers);
        strip_mesh_headers(&mut headers);
        inform.inform(response.status(), &headers);
    });
}

#[cfg(test)]
mod tests;
