//! Serving an HBONE connection: every stream is a tunnel, or it is answered 400 here.
//!
//! The caller decides about each tunnel (policy, dialling the app) and answers it: 200 only once the app's own
//! connection stands. Tested in `tunnel/tests`.

use std::{
    fmt,
    future::Future,
    net::{IpAddr, SocketAddr},
};

use bytes::Bytes;
use h2::{Ping, PingPong, RecvStream, server::SendResponse};
use http::{HeaderMap, Request, Response, StatusCode};
use tokio::{net::TcpStream, task::JoinSet, time};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;

use super::{
    failure,
    hbone::TunnelStream,
    server::tunnel_destination,
    settings::{HANDSHAKE_TIMEOUT, PING_INTERVAL, PING_TIMEOUT, tunnel_server_builder},
};
use crate::error::{Error, Kind, Result};

/// A CONNECT waiting for its answer. Dropped without one, it is answered 503.
pub struct Tunnel {
    /// Where to: an address of the pod, and no port of the mesh.
    pub destination: SocketAddr,
    /// What came with the CONNECT (`baggage`, `forwarded`, `traceparent`).
    pub headers: HeaderMap,
    stream: Option<(SendResponse<Bytes>, RecvStream)>,
}

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnel").field("destination", &self.destination).finish_non_exhaustive()
    }
}

impl Tunnel {
    /// Answers 200 and gives the bytes.
    ///
    /// # Errors
    /// [`Kind::DownstreamReset`] when the client is gone.
    pub fn accept(mut self) -> Result<TunnelStream> {
        let gone = |error: &dyn fmt::Display| {
            Error::new(Kind::DownstreamReset, format!("the client of a tunnel is gone: {error}"))
        };
        let (mut reply, receive) = self.stream.take().ok_or_else(|| gone(&"already answered"))?;
        let send = reply.send_response(Response::new(()), false).map_err(|error| gone(&error))?;
        Ok(TunnelStream::new(send, receive, None))
    }

    /// Answers with this status and ends the stream (HBONE: 401 denied by policy, 503 cannot be reached).
    pub fn refuse(mut self, status: StatusCode) {
        if let Some((reply, _)) = self.stream.take() {
            answer(reply, status);
        }
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        if let Some((reply, _)) = self.stream.take() {
            answer(reply, StatusCode::SERVICE_UNAVAILABLE);
        }
    }
}

fn answer(mut reply: SendResponse<Bytes>, status: StatusCode) {
    let mut response = Response::new(());
    *response.status_mut() = status;
    // The only reason to fail is a client that is gone.
    let _ = reply.send_response(response, true);
}

/// Serves the tunnels of one HBONE connection until it ends; `drain` makes it send GOAWAY and end with its last
/// stream. What is no tunnel of this pod is answered 400 and logged.
///
/// # Errors
/// [`Kind::BadRequest`] when the peer breaks HTTP/2, [`Kind::DownstreamReset`] when the connection breaks.
pub async fn serve_tunnels<H, F>(
    stream: TlsStream<TcpStream>,
    pod_ips: &[IpAddr],
    drain: &CancellationToken,
    handle: H,
) -> Result<()>
where
    H: Fn(Tunnel) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let peer = stream.get_ref().0.peer_addr().map_err(|error| {
        Error::new(Kind::DownstreamReset, format!("the peer of a mesh connection left: {error}"))
    })?;
    let mut connection = time::timeout(HANDSHAKE_TIMEOUT, tunnel_server_builder().handshake(stream))
        .await
        .map_err(|_| Error::new(Kind::BadRequest, format!("{peer} sent no HTTP/2 preface within 10 s")))?
        .map_err(|error| failure::serving(&error, peer))?;
    let keep_alive = keep_alive(connection.ping_pong());
    tokio::pin!(keep_alive);
    let (mut tunnels, mut draining) = (JoinSet::new(), false);
    let ended = loop {
        tokio::select! {
            accepted = connection.accept() => match accepted {
                Some(Ok((request, reply))) => {
                    if let Some(tunnel) = judge(request, reply, pod_ips, peer) {
                        tunnels.spawn(handle(tunnel));
                    }
                }
                Some(Err(error)) => break broke(&error, peer, &mut tunnels),
                None => break Ok(()),
            },
            () = drain.cancelled(), if !draining => {
                draining = true;
                connection.graceful_shutdown();
            }
            () = &mut keep_alive => {
                break Err(Error::new(Kind::DownstreamReset, format!("{peer} answers no PING any more")));
            }
            Some(_) = tunnels.join_next() => {}
        }
    };
    // Breaks the streams still open, so that their handlers see the end and report it.
    drop(connection);
    while tunnels.join_next().await.is_some() {}
    ended
}

/// A peer that leaves without ceremony takes nothing with it when no stream is open.
fn broke(error: &h2::Error, peer: SocketAddr, tunnels: &mut JoinSet<()>) -> Result<()> {
    while tunnels.try_join_next().is_some() {}
    if error.is_io() && tunnels.is_empty() { Ok(()) } else { Err(failure::serving(error, peer)) }
}

/// The tunnel that a stream asks for; answers what asks for none.
fn judge(
    request: Request<RecvStream>,
    reply: SendResponse<Bytes>,
    pod_ips: &[IpAddr],
    peer: SocketAddr,
) -> Option<Tunnel> {
    let (parts, receive) = request.into_parts();
    match tunnel_destination(&parts.method, parts.uri.authority(), pod_ips) {
        Ok(destination) => {
            Some(Tunnel { destination, headers: parts.headers, stream: Some((reply, receive)) })
        }
        Err(error) => {
            tracing::info!(%peer, %error, "stream answered 400");
            answer(reply, StatusCode::BAD_REQUEST);
            None
        }
    }
}

/// Returns when the peer no longer answers.
pub(super) async fn keep_alive(pings: Option<PingPong>) {
    let Some(mut pings) = pings else { return std::future::pending().await };
    loop {
        time::sleep(PING_INTERVAL).await;
        match time::timeout(PING_TIMEOUT, pings.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            // The connection is closing: its own future tells why.
            Ok(Err(_)) => return std::future::pending().await,
            Err(_) => return,
        }
    }
}
