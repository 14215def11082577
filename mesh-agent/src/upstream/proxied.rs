//! Byte streams that an HTTP proxy hands on (`trafficPolicy.tunnel`): the endpoint is the proxy, and is asked for its
//! target by CONNECT or POST before any byte of the client's.
//!
//! Promises that the client's bytes come after the proxy has agreed, or not at all. Never reads what is in them. Tested below on a
//! paused clock, and in the lab (`tests/tests/http_tunnels.rs`).

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

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::time::Duration;

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        time::Instant,
    };

    use super::*;
    use crate::report::samples;

    fn tunnel(ask: Ask) -> HttpTunnel {
        HttpTunnel { ask, target: "a.example:443".parse().unwrap() }
    }

    /// A cluster whose proxies are spoken to so, within two seconds.
    fn cluster(upgrade: bool) -> Cluster {
        let mut cluster = Cluster::clone(&samples::cluster("a"));
        (cluster.pool.upgrade, cluster.connect_timeout) = (upgrade, Duration::from_secs(2));
        cluster
    }

    #[tokio::test(start_paused = true)]
    async fn a_proxy_that_does_not_answer_is_given_up_in_time() {
        for (ask, upgrade) in
            [(Ask::Connect, false), (Ask::Connect, true), (Ask::Post, false), (Ask::Post, true)]
        {
            let (near, _far) = tokio::io::duplex(1 << 10);
            let (begun, at) = (Instant::now(), ([10, 0, 0, 1], 3128).into());
            let asked = through_proxy(UpstreamStream::Pipe(near), &tunnel(ask), &cluster(upgrade), at).await;
            let error = asked.map(drop).unwrap_err();
            assert_eq!(
                (error.kind, begun.elapsed()),
                (Kind::ConnectFailure, Duration::from_secs(2)),
                "{error}"
            );
        }
    }

    #[tokio::test]
    async fn nothing_of_the_clients_is_said_before_the_proxy_agrees() {
        let (near, mut far) = tokio::io::duplex(1 << 10);
        let at = ([10, 0, 0, 1], 3128).into();
        let (tunnel, cluster) = (tunnel(Ask::Connect), cluster(false));
        let proxy = async {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(far.read_u8().await.unwrap());
            }
            assert_eq!(head, b"CONNECT a.example:443 HTTP/1.1\r\nhost: a.example:443\r\n\r\n");
            // Bytes of the target behind the head are the tunnel's.
            far.write_all(b"HTTP/1.1 200 OK\r\n\r\nhello").await.unwrap();
            let mut said = [0; 3];
            far.read_exact(&mut said).await.unwrap();
            assert_eq!(&said, b"hey");
        };
        let client = async {
            let stream = UpstreamStream::Pipe(near);
            let mut stream = through_proxy(stream, &tunnel, &cluster, at).await.unwrap();
            let mut greeting = [0; 5];
            stream.read_exact(&mut greeting).await.unwrap();
            assert_eq!(&greeting, b"hello");
            stream.write_all(b"hey").await.unwrap();
            stream.flush().await.unwrap();
            stream
        };
        tokio::join!(client, proxy);
    }
}
