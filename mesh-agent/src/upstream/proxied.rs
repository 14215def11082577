//! Byte streams that an HTTP proxy hands on (`trafficPolicy.tunnel`): the endpoint is the proxy, and is asked for its
//! target by CONNECT or POST before any byte of the client's.
//!
//! Promises that the client's bytes come after the proxy has agreed, or not at all. Never reads what is in them. Tested in the
//! lab (`tests/tests/http_tunnels.rs`).

use std::{io, net::SocketAddr};

use futures_util::TryStreamExt as _;
use http::{HeaderValue, Request, Response, StatusCode, Uri, header::HOST, uri::Scheme};
use http_body::Frame;
use http_body_util::{BodyDataStream, StreamBody};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::{io::AsyncRead, time::timeout};
use tokio_util::io::{ReaderStream, StreamReader};

use super::{
    UpstreamStream, connect,
    switch::{self, Io, Switch, Switched},
};
use crate::{
    body::Body,
    error::{Error, Kind, Result},
    state::snapshot::{Ask, Cluster, HttpTunnel, Protocol},
};

/// What waits to become part of a request's body, bytes.
const WAITING: usize = 16 << 10;

/// The bytes of the tunnel's target, through the proxy at the other end of this stream, which has to agree within the time to connect.
///
/// # Errors
/// [`Kind::ConnectFailure`], where it refuses or does not answer in time; what else is wrong with it, by its kind.
pub async fn through_proxy(
    stream: UpstreamStream,
    tunnel: &HttpTunnel,
    cluster: &Cluster,
    at: SocketAddr,
) -> Result<UpstreamStream> {
    let (spoken, limit) = (spoken(cluster), cluster.connect_timeout);
    let late = |_| refused(at, tunnel, &format!("nothing within {limit:?}"));
    let asked = match tunnel.ask {
        Ask::Connect => timeout(limit, by_connect(stream, tunnel, (at, spoken))).await.map_err(late)??,
        Ask::Post => timeout(limit, by_post(stream, tunnel, (at, spoken))).await.map_err(late)??,
    };
    match asked {
        Ok(bytes) => Ok(UpstreamStream::Proxied(bytes)),
        Err(status) => Err(refused(at, tunnel, &format!("it answers {status}"))),
    }
}

fn refused(proxy: SocketAddr, tunnel: &HttpTunnel, why: &str) -> Error {
    Error::new(Kind::ConnectFailure, format!("no tunnel through {proxy} ({tunnel}): {why}"))
}

/// What the proxies are spoken to in: HTTP/1.1, as in Istio, unless the rule asks for HTTP/2 (`h2UpgradePolicy: UPGRADE`).
pub fn spoken(cluster: &Cluster) -> Protocol {
    if cluster.pool.upgrade { Protocol::Http2 } else { Protocol::Http1 }
}

/// What came of asking: the bytes, or the status that is no agreement.
type Asked = std::result::Result<Box<dyn Io>, StatusCode>;

async fn by_connect(
    stream: UpstreamStream,
    tunnel: &HttpTunnel,
    (proxy, spoken): (SocketAddr, Protocol),
) -> Result<Asked> {
    let request = request(tunnel, Scheme::HTTP, Body::Empty);
    let switched = switch::ask_on(stream, (proxy, spoken), request, &Switch::Connect).await?;
    Ok(match switched {
        Switched::Agreed(_, bytes) => Ok(bytes),
        Switched::Answered(response) => Err(response.status()),
    })
}

/// The request, before it is spelled as its version wants it.
fn request<B>(tunnel: &HttpTunnel, scheme: Scheme, body: B) -> Request<B> {
    let mut uri = http::uri::Parts::default();
    uri.authority = Some(tunnel.target.clone());
    if tunnel.ask == Ask::Post {
        uri.scheme = Some(scheme);
        uri.path_and_query = Some(http::uri::PathAndQuery::from_static("/"));
    }
    let mut request = Request::new(body);
    *request.method_mut() = tunnel.ask.method();
    // An authority alone is a whole target, and so are all three parts.
    *request.uri_mut() = Uri::from_parts(uri).unwrap_or_default();
    request
}

async fn by_post(
    stream: UpstreamStream,
    tunnel: &HttpTunnel,
    (proxy, spoken): (SocketAddr, Protocol),
) -> Result<Asked> {
    if spoken == Protocol::Http2 {
        let scheme = if matches!(stream, UpstreamStream::Tls(_)) { Scheme::HTTPS } else { Scheme::HTTP };
        let (parts, ()) = request(tunnel, scheme, ()).into_parts();
        return Ok(match switch::stream_on(stream, proxy, parts).await? {
            Switched::Agreed(_, bytes) => Ok(bytes),
            Switched::Answered(response) => Err(response.status()),
        });
    }
    let (near, far) = tokio::io::duplex(WAITING);
    let (read_sent, sent) = (ReaderStream::new(far), near);
    let body = StreamBody::new(read_sent.map_ok(Frame::data));
    let broke = |error| connect::failure(&error, proxy);
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broke)?;
    // What went wrong is told to whoever waits for the response or reads its body.
    tokio::spawn(connection);
    let (mut parts, body) = request(tunnel, Scheme::HTTP, body).into_parts();
    parts.headers.insert(HOST, host(tunnel));
    parts.uri = Uri::from_static("/");
    let response = sender.send_request(Request::from_parts(parts, body)).await.map_err(broke)?;
    if !response.status().is_success() {
        return Ok(Err(response.status()));
    }
    Ok(Ok(Box::new(tokio::io::join(received(response), sent))))
}

fn received(response: Response<hyper::body::Incoming>) -> impl AsyncRead + std::fmt::Debug + Send + Unpin {
    StreamReader::new(BodyDataStream::new(response.into_body()).map_err(io::Error::other))
}

fn host(tunnel: &HttpTunnel) -> HeaderValue {
    // An authority has no byte that a header may not have.
    HeaderValue::from_str(tunnel.target.as_str()).unwrap_or(HeaderValue::from_static(""))
}
