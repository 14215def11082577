//! HTTP connections to apps and to what is not in the mesh, as they are made, and what their failures mean.
//!
//! Never keeps one: that is the pool's (`pool.rs`). Tested in the lab (`tests/tests/routing.rs`).

use std::net::SocketAddr;

use bytes::Bytes;
use h2::client::SendRequest;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use super::Dial;
use crate::{
    body::Body,
    copy::Coalesced,
    error::{Error, Kind, Result},
    http2::{self, Failed},
    report::FlowGuard,
    state::snapshot::{Pings, Protocol},
};

/// HTTP/2 stream and connection windows towards apps, bytes.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;
/// Header list taken from an app, bytes: a head of 60 KiB (Envoy) as HTTP/2 counts it.
const HEADER_LIST: u32 = 64 << 10;

pub(super) async fn dial_http1(dial: &Dial<'_>, to: SocketAddr) -> Result<http1::SendRequest<Body>> {
    let stream = TokioIo::new(dial.open(Protocol::Http1).await?);
    connect_http1(stream, to, dial.begin_flow()).await
}

pub(super) async fn dial_http2(
    dial: &Dial<'_>,
    to: SocketAddr,
    pings: Option<Pings>,
) -> Result<(SendRequest<Bytes>, impl Future<Output = ()> + Send + 'static)> {
    connect_http2(dial.open(Protocol::Http2).await?, to, dial.begin_flow(), pings).await
}

pub(super) async fn connect_http1<S>(
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

/// The second half is what the connection does, to its end: its own, or that nobody answers its PINGs.
pub(super) async fn connect_http2<S>(
    stream: S,
    to: SocketAddr,
    flow: Option<FlowGuard>,
    pings: Option<Pings>,
) -> Result<(SendRequest<Bytes>, impl Future<Output = ()> + Send + 'static)>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let handshake = http2_client().handshake(Coalesced::new(stream)).await;
    let (sender, mut connection) = handshake.map_err(|error| h2_failure(&error.into(), to))?;
    let asked = pings.map(|pings| (connection.ping_pong(), pings));
    let connection = async move {
        match asked {
            None => drop(connection.await),
            Some((ping_pong, Pings { interval, timeout })) => tokio::select! {
                _ = connection => {}
                () = http2::keep_alive(ping_pong, interval, timeout) => {
                    tracing::debug!(peer = %to, "connection ended: no answer to PING");
                }
            },
        }
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
pub(super) fn failure(error: &hyper::Error, to: SocketAddr) -> Error {
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
