//! Plain HTTP connections to apps and to unmeshed endpoints, kept for the next request.
//!
//! Promises: one HTTP/1.1 connection carries one request at a time and is handed back only when its response has
//! ended; HTTP/2 requests to one address share a connection; a request that was never written to a stale connection
//! goes to a fresh one. Never shares between pods: each pod owns its pools. Tested in the lab
//! (`tests/tests/routing.rs`).

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use http::{Request, Response};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::Instant,
};

use super::Dial;
use crate::{
    body::Body,
    error::{Error, Kind, Result},
    state::snapshot::Protocol,
};

/// How long an HTTP/1.1 connection may wait for its next request (shorter than the 60 s after which many servers close;
/// Envoy waits an hour and meets their resets).
const IDLE: Duration = Duration::from_secs(50);

/// Idle HTTP/1.1 connections kept for one address; the rest are closed when they come back.
const IDLE_PER_KEY: usize = 1024;

/// HTTP/2 stream and connection windows towards apps, bytes.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;

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
}

#[derive(Debug)]
struct Idle {
    sender: http1::SendRequest<Body>,
    since: Instant,
}

type Slot = tokio::sync::Mutex<Option<http2::SendRequest<Body>>>;

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
        request: Request<Body>,
        dial: &Dial<'_>,
    ) -> Result<(Response<Body>, Lease)> {
        match protocol {
            Protocol::Http2 => self.send_http2(key, request, dial).await,
            Protocol::Http1 | Protocol::Opaque => self.send_http1(key, request, dial).await,
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
                None => connect_http1(TokioIo::new(dial.connect().await?), key.to).await?,
            };
            match sender.try_send_request(request).await {
                Ok(response) => {
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
        &self,
        key: Key,
        request: Request<Body>,
        dial: &Dial<'_>,
    ) -> Result<(Response<Body>, Lease)> {
        let slot = Arc::clone(lock(&self.shared).entry(key).or_default());
        let mut sender = {
            let mut slot = slot.lock().await;
            match slot.as_ref() {
                Some(sender) if !sender.is_closed() => sender.clone(),
                _ => slot.insert(connect_http2(TokioIo::new(dial.connect().await?), key.to).await?).clone(),
            }
        };
        let response = sender.send_request(request).await.map_err(|error| failure(&error, key.to))?;
        Ok((response.map(Body::from), Lease::shared()))
    }

    fn take(&self, key: &Key) -> Option<http1::SendRequest<Body>> {
        let mut idle = lock(&self.idle);
        let kept = idle.get_mut(key)?;
        // Last in, first out: the warmest connection, and the others may grow old and go.
        while let Some(Idle { sender, since }) = kept.pop() {
            if sender.is_ready() && since.elapsed() < IDLE {
                return Some(sender);
            }
        }
        None
    }

    fn put(&self, key: Key, sender: http1::SendRequest<Body>) {
        let mut idle = lock(&self.idle);
        let kept = idle.entry(key).or_default();
        // The oldest stand in front; what is stale goes when something comes back.
        let stale =
            kept.iter().take_while(|idle| idle.since.elapsed() >= IDLE || idle.sender.is_closed()).count();
        kept.drain(..stale);
        if kept.len() < IDLE_PER_KEY {
            kept.push(Idle { sender, since: Instant::now() });
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each critical section leaves the map whole at every step, so a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sends one request over a stream of its own, which ends with the response.
pub(super) async fn send_on_new<S>(
    stream: TokioIo<S>,
    to: SocketAddr,
    protocol: Protocol,
    request: Request<Body>,
) -> Result<(Response<Body>, Lease)>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let response = match protocol {
        Protocol::Http2 => connect_http2(stream, to).await?.send_request(request).await,
        Protocol::Http1 | Protocol::Opaque => {
            let mut sender = connect_http1(stream, to).await?;
            sender.send_request(request).await
        }
    };
    let response = response.map_err(|error| failure(&error, to))?;
    Ok((response.map(Body::from), Lease::shared()))
}

async fn connect_http1<S>(stream: TokioIo<S>, to: SocketAddr) -> Result<http1::SendRequest<Body>>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (sender, connection) =
        http1::Builder::new().handshake(stream).await.map_err(|error| failure(&error, to))?;
    // Ends with the connection; what went wrong is told to whoever waits for a response.
    tokio::spawn(async move {
        let _ = connection.await;
    });
    Ok(sender)
}

async fn connect_http2<S>(stream: TokioIo<S>, to: SocketAddr) -> Result<http2::SendRequest<Body>>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (sender, connection) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .handshake(stream)
        .await
        .map_err(|error| failure(&error, to))?;
    tokio::spawn(async move {
        let _ = connection.await;
    });
    Ok(sender)
}

/// The kind of a failed exchange: `REFUSED_STREAM` and a GOAWAY that did not cover the request mean that it was not
/// looked at.
pub fn failure(error: &hyper::Error, to: SocketAddr) -> Error {
    let h2 = std::error::Error::source(error).and_then(|cause| cause.downcast_ref::<h2::Error>());
    let refused = h2.is_some_and(|h2| h2.reason() == Some(h2::Reason::REFUSED_STREAM));
    let kind = if refused || error.is_canceled() { Kind::RefusedStream } else { Kind::UpstreamReset };
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
    Error::new(kind, format!("exchange with {to} failed: {error}{cause}"))
}
