//! Serving a mesh connection: every stream is a tunnel, a native request, or neither.
//!
//! The caller decides about each (policy, dialling the app) and answers it: a tunnel is granted with 200 only once the
//! app's own connection stands. Tested in `tunnel/tests`.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use http::{HeaderMap, Request, Response, StatusCode, header::FORWARDED};
use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    Wire, native,
    server::tunnel_destination,
    settings::{HANDSHAKE_TIMEOUT, PING_INTERVAL, PING_TIMEOUT, server_builder},
};
use crate::{
    body::Body,
    drain::Drain,
    error::{Error, Kind, Result},
    http2::{self, ByteStream, ServerStream, Watch},
    state::snapshot::Protocol,
};

/// What came in on one stream of a mesh connection.
#[derive(Debug)]
pub enum MeshStream {
    /// A CONNECT to an address of the pod.
    Tunnel(Tunnel),
    /// A native request, our headers already stripped.
    Http {
        /// The request.
        request: Box<Request<Body>>,
        /// Port of the app.
        port: u16,
        /// What the app speaks.
        protocol: Protocol,
        /// Where it is answered.
        stream: ServerStream,
    },
    /// What this wire does not carry, an address that is not the pod's, or a port of the mesh itself: to be answered
    /// 400.
    Neither {
        /// Why.
        error: Error,
        /// Where it is answered.
        stream: ServerStream,
    },
}

/// A CONNECT waiting for its answer. Dropped without one, it is answered 503.
#[derive(Debug)]
pub struct Tunnel {
    /// Where to: an address of the pod, and no port of the mesh.
    pub destination: SocketAddr,
    /// What came with the CONNECT (`baggage`, `forwarded`, `traceparent`).
    pub headers: HeaderMap,
    stream: Option<ServerStream>,
}

impl Tunnel {
    /// Whose connection it is, as the peer says (`forwarded: for="ip:port"`, as ztunnel writes it).
    pub fn client(&self) -> Option<SocketAddr> {
        let value = self.headers.get(FORWARDED)?.to_str().ok()?;
        let elements = value.split(';').filter_map(|pair| pair.trim().split_once('='));
        let (_, client) = elements.into_iter().find(|(name, _)| name.eq_ignore_ascii_case("for"))?;
        client.trim_matches('"').parse().ok()
    }

    /// Answers 200 and gives the bytes.
    ///
    /// # Errors
    /// [`Kind::DownstreamReset`] when the client is gone.
    pub fn accept(mut self) -> Result<ByteStream> {
        let granted = self.stream.take().and_then(|stream| stream.grant(Response::new(())));
        granted.ok_or_else(|| Error::new(Kind::DownstreamReset, "the client of a tunnel is gone"))
    }

    /// Answers with this status and ends the stream (HBONE: 401 denied by policy, 503 cannot be reached).
    pub fn refuse(mut self, status: StatusCode) {
        if let Some(stream) = self.stream.take() {
            stream.refuse(status);
        }
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        if let Some(stream) = self.stream.take() {
            stream.refuse(StatusCode::SERVICE_UNAVAILABLE);
        }
    }
}

/// Serves one mesh connection until it ends; `drain` makes it send GOAWAY and end with its last stream, what that has
/// ready having this long to be `flush`ed. It is given up, whatever is open on it, when `withdrawn` completes.
///
/// # Errors
/// [`Kind::BadRequest`] when the peer breaks HTTP/2, [`Kind::DownstreamReset`] when the connection breaks, or why it was
/// given up.
pub async fn serve<S, H, F, G>(
    stream: S,
    wire: Wire,
    pod_ips: &[IpAddr],
    drain: &Drain,
    flush: Duration,
    withdrawn: G,
    handle: H,
) -> Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
    H: Fn(MeshStream) -> F,
    F: Future<Output = ()> + Send + 'static,
    G: Future<Output = Error>,
{
    let options = http2::Options {
        handshake: HANDSHAKE_TIMEOUT,
        ping: Some((PING_INTERVAL, PING_TIMEOUT)),
        idle: None,
        flush,
    };
    let classified = |request, stream| handle(classify(request, stream, wire, pod_ips));
    let watch = Watch { along: None, connection: Arc::default(), given_up: withdrawn };
    http2::serve(stream, &server_builder(wire), options, drain, watch, classified).await.map(drop)
}

/// Tells native requests from tunnels and checks either against the pod's addresses.
fn classify(mut request: Request<Body>, stream: ServerStream, wire: Wire, pod_ips: &[IpAddr]) -> MeshStream {
    // Taken out on either wire: the app never sees them, and on HBONE they mean nothing.
    let told = native::introduced(request.headers())
        .and_then(|introduced| Ok((introduced, native::of_client(request.headers())?)));
    let native = native::from_wire(request.headers_mut());
    if wire == Wire::MeshH2 {
        match native {
            Ok(Some((port, protocol))) => {
                let (introduced, of_client) = match told {
                    Ok(told) => told,
                    Err(error) => return MeshStream::Neither { error, stream },
                };
                if let Some(introduction) = introduced {
                    request.extensions_mut().insert(introduction);
                }
                if let Some(of_client) = of_client {
                    request.extensions_mut().insert(of_client);
                }
                let request = Box::new(request);
                return MeshStream::Http { request, port, protocol, stream };
            }
            Ok(None) => {}
            Err(error) => return MeshStream::Neither { error, stream },
        }
    }
    match tunnel_destination(request.method(), request.uri().authority(), pod_ips) {
        Ok(destination) => {
            let headers = std::mem::take(request.headers_mut());
            MeshStream::Tunnel(Tunnel { destination, headers, stream: Some(stream) })
        }
        Err(error) => MeshStream::Neither { error, stream },
    }
}
