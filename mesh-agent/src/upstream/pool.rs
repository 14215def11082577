//! Plain HTTP connections to apps and to unmeshed endpoints, kept for the next request.
//!
//! Promises: one HTTP/1.1 connection carries one request at a time and is handed back only when its response has
//! ended; HTTP/2 requests to one address share connections; what nobody uses is closed; a request that was never written to a stale connection
//! goes to a fresh one. Never shares between pods: each pod owns its pools. Tested in the lab
//! (`tests/tests/routing.rs`).

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use h2::client::SendRequest;
use http::{
    Request, Response,
    header::{CONTENT_LENGTH, TRANSFER_ENCODING},
};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::Instant,
};

use super::{Dial, message, slot::Slot};
use crate::{
    body::{Body, Inform},
    error::{Error, Kind, Result},
    http2::{self, Failed},
    report::FlowGuard,
    state::snapshot::Protocol,
    tunnel::strip_mesh_headers,
};

/// How long a connection may wait for its next request (shorter than the 60 s after which many servers close;
/// Envoy waits an hour and meets their resets).
const IDLE: Duration = Duration::from_secs(50);

/// Idle HTTP/1.1 connections kept for one address; the rest are closed when they come back.
const IDLE_PER_KEY: usize = 1024;

/// HTTP/2 stream and connection windows towards apps, bytes.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;
/// Header list taken from an app, bytes: a head of 60 KiB (Envoy) as HTTP/2 counts it.
const HEADER_LIST: u32 = 64 << 10;

/// What connections may be shared for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// Where to.
    pub to: SocketAddr,
    /// The client the app is shown, if one is.
    pub client: Option<IpAddr>,
}

/// Connections of one pod in one direction.
#[derive(Debug, Default)]
pub struct Pool {
    idle: Mutex<HashMap<Key, Vec<Idle>>>,
    shared: Mutex<HashMap<Key, Arc<Slot>>>,
    /// Whether somebody looks after connections that grow old; changed under the lock of `idle`.
    swept: AtomicBool,
}

#[derive(Debug)]
struct Idle {
    sender: http1::SendRequest<Body>,
    since: Instant,
}

impl Idle {
    fn is_stale(&self, idle: Duration) -> bool {
        self.since.elapsed() >= idle || self.sender.is_closed()
    }
}

/// What must outlive the response body: the HTTP/1.1 connection, which is free again when the body has ended.
#[derive(Debug)]
pub struct Lease {
    h1: Option<(Arc<Pool>, Key, http1::SendRequest<Body>)>,
}

impl Lease {
    /// A lease of a stream of a shared connection: nothing to hand back.
    pub fn shared() -> Self {
        Self { h1: None }
    }

    /// The response has ended: the connection may serve again. Without this call it is closed.
    pub fn finished(self) {
        let Some((pool, key, mut sender)) = self.h1 else { return };
        if sender.is_ready() {
            pool.put(key, sender);
        } else {
            tokio::spawn(async move {
                if sender.ready().await.is_ok() {
                    pool.put(key, sender);
                }
            });
        }
    }
}

impl Pool {
    /// Sends a request in the form its protocol wants, over a kept connection or a new one.
    pub async fn send(
        self: &Arc<Self>,
        key: Key,
        protocol: Protocol,
        mut request: Request<Body>,
        inform: &Arc<dyn Inform>,
        dial: &Dial<'_>,
    ) -> Result<(Response<Body>, Lease)> {
        match protocol {
            Protocol::Http2 => self.send_http2(key, request, &**inform, dial).await,
            Protocol::Http1 | Protocol::Opaque => {
                informed(&mut request, inform);
                self.send_http1(key, request, dial).await
            }
        }
    }

    async fn send_http1(
        self: &Arc<Self>,
        key: Key,
        mut request: Request<Body>,
        dial: &Dial<'_>,
    ) -> Result<(Response<Body>, Lease)> {
        loop {
            let kept = self.take(&key);
            let fresh = kept.is_none();
            let mut sender = match kept {
                Some(sender) => sender,
                // Boxed: rare, and every request would have to make room for it.
                None => Box::pin(dial_http1(dial, key.to)).await?,
            };
            match sender.try_send_request(request).await {
                Ok(response) => {
                    one_length(&response, key.to)?;
                    let lease = Lease { h1: Some((Arc::clone(self), key, sender)) };
                    return Ok((response.map(Body::from), lease));
                }
                // The kept connection was closed under us and the request was not written: not the request's fault.
                Err(mut error) => match error.take_message() {
                    Some(unsent) if !fresh => request = unsent,
                    _ => return Err(failure(error.error(), key.to)),
                },
            }
        }
    }

    async fn send_http2(
        self: &Arc<Self>,
        key: Key,
        request: Request<Body>,
        inform: &dyn Inform,
        dial: &Dial<'_>,
    ) -> Result<(Response<Body>, Lease)> {
        let slot = Arc::clone(lock(&self.shared).entry(key).or_default());
        self.look_after(&lock(&self.idle));
        let (sender, place) = loop {
            let (sender, place) = slot.get(|| dial_http2(dial, key.to)).await?;
            // Ready at once: it has room. One that has ended meanwhile has sent nothing.
            if let Ok(sender) = sender.ready().await {
                break (sender, place);
            }
        };
        let sent = http2::send(sender, request, Some(inform)).await;
        let response = sent.map_err(|failed| h2_failure(&failed, key.to))?;
        Ok((response.map(|body| body.held(Arc::new(place))), Lease::shared()))
    }

    fn take(&self, key: &Key) -> Option<http1::SendRequest<Body>> {
        let mut idle = lock(&self.idle);
        let kept = idle.get_mut(key)?;
        // Last in, first out: the warmest connection, and the others may grow old and go.
        while let Some(warmest) = kept.pop() {
            if warmest.sender.is_ready() && !warmest.is_stale(IDLE) {
                return Some(warmest.sender);
            }
        }
        None
    }

    fn put(self: &Arc<Self>, key: Key, sender: http1::SendRequest<Body>) {
        let mut idle = lock(&self.idle);
        let kept = idle.entry(key).or_default();
        if kept.len() < IDLE_PER_KEY {
            kept.push(Idle { sender, since: Instant::now() });
        }
        self.look_after(&idle);
    }

    /// Sees to it that old connections are closed, as long as there are any.
    fn look_after(self: &Arc<Self>, _idle: &MutexGuard<'_, HashMap<Key, Vec<Idle>>>) {
        if !self.swept.swap(true, Ordering::Relaxed) {
            tokio::spawn(sweep(Arc::downgrade(self)));
        }
    }

    /// Closes what nobody uses now, however short a time that is.
    pub fn close_idle(&self) {
        self.sweep(Duration::ZERO);
    }

    /// Closes what has been idle for so long; whether nothing is left.
    fn sweep(&self, limit: Duration) -> bool {
        let mut idle = lock(&self.idle);
        for kept in idle.values_mut() {
            kept.retain(|idle| !idle.is_stale(limit));
        }
        idle.retain(|_, kept| !kept.is_empty());
        let mut shared = lock(&self.shared);
        // Nobody waits for it, and nothing of it is open.
        shared.retain(|_, slot| slot.sweep(limit) || Arc::strong_count(slot) > 1);
        let empty = idle.is_empty() && shared.is_empty();
        if empty {
            self.swept.store(false, Ordering::Relaxed);
        }
        empty
    }
}

async fn sweep(pool: Weak<Pool>) {
    loop {
        tokio::time::sleep(IDLE / 2).await;
        let Some(pool) = pool.upgrade() else { return };
        if pool.sweep(IDLE) {
            return;
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
            let (sender, connection) = connect_http2(stream, to, None).await?;
            tokio::spawn(connection);
            let sent = http2::send(sender, request, Some(&**inform)).await;
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

async fn dial_http1(dial: &Dial<'_>, to: SocketAddr) -> Result<http1::SendRequest<Body>> {
    let stream = TokioIo::new(dial.connect().await?);
    connect_http1(stream, to, dial.begin_flow()).await
}

async fn dial_http2(
    dial: &Dial<'_>,
    to: SocketAddr,
) -> Result<(SendRequest<Bytes>, impl Future<Output = ()> + Send + 'static)> {
    connect_http2(dial.connect().await?, to, dial.begin_flow()).await
}

async fn connect_http1<S>(
    stream: TokioIo<S>,
    to: SocketAddr,
    flow: Option<FlowGuard>,
) -> Result<http1::SendRequest<Body>>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (sender, connection) =
        http1::Builder::new().handshake(stream).await.map_err(|error| failure(&error, to))?;
    // Ends with the connection; what went wrong is told to whoever waits for a response.
    tokio::spawn(async move {
        let _ = connection.await;
        drop(flow);
    });
    Ok(sender)
}

/// The second half is what the connection does, to its end.
async fn connect_http2<S>(
    stream: S,
    to: SocketAddr,
    flow: Option<FlowGuard>,
) -> Result<(SendRequest<Bytes>, impl Future<Output = ()> + Send + 'static)>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let handshake = http2_client().handshake(stream).await;
    let (sender, connection) = handshake.map_err(|error| h2_failure(&error.into(), to))?;
    let connection = async move {
        let _ = connection.await;
        drop(flow);
    };
    Ok((sender, connection))
}

/// The HTTP/2 client of apps and of what is not in the mesh.
pub(super) fn http2_client() -> h2::client::Builder {
    let mut builder = h2::client::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(HEADER_LIST)
        .enable_push(false);
    builder
}

/// The kind of a failed exchange over HTTP/1.
pub fn failure(error: &hyper::Error, to: SocketAddr) -> Error {
    let kind = if error.is_canceled() { Kind::RefusedStream } else { Kind::UpstreamReset };
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
    Error::new(kind, format!("exchange with {to} failed: {error}{cause}"))
}

/// The kind of a failed exchange over HTTP/2.
pub(super) fn h2_failure(failed: &Failed, to: SocketAddr) -> Error {
    let Failed { error, untouched } = failed;
    let kind = if *untouched { Kind::RefusedStream } else { Kind::UpstreamReset };
    let made = Error::new(kind, format!("exchange with {to} failed: {error}"));
    Error { reset: error.reason().filter(|_| error.is_reset()), ..made }
}
