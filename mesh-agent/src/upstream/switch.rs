//! Requests that ask for another protocol: `Upgrade` (RFC 9110 §7.8), CONNECT, and CONNECT with a protocol (RFC 8441).
//!
//! Each has a connection of its own, which is never pooled: once the endpoint agrees, it is bytes. The two spellings
//! are turned into one another where client and endpoint speak different versions of HTTP. Tested below and in the lab
//! (`tests/tests/http/upgrade.rs`).

use std::{fmt::Debug, net::SocketAddr};

use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use h2::{Ping, client::SendRequest, ext::Protocol as H2Protocol};
use http::{
    HeaderValue, Method, Request, Response, StatusCode,
    header::{CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, UPGRADE},
    request,
};
use http_body::Body as _;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{Destination, Pod, UpstreamStream, Via, connect, message};
use crate::{
    body::{Body, Received},
    error::{Error, Kind, Result},
    http2::{ByteStream, Failed},
    policy::Permit,
    state::snapshot::Protocol,
};

/// What every WebSocket handshake is completed with (RFC 6455 §1.3).
const WEBSOCKET_GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
const WEBSOCKET: &str = "websocket";

/// What a client wants its connection or stream to become.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Switch {
    /// Another protocol, by its name.
    Upgrade(HeaderValue),
    /// A tunnel to the authority of the request.
    Connect,
}

/// Any byte stream.
pub trait Io: AsyncRead + AsyncWrite + Debug + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Debug + Send + Unpin> Io for T {}

/// What the endpoint said.
pub enum Switched {
    /// It agrees; the head of its answer, and the bytes.
    Agreed(Response<()>, Box<dyn Io>),
    /// It answers as to any other request.
    Answered(Response<Body>),
}

impl Switch {
    /// What this request asks for; to be called before hop-by-hop headers are taken away. `h2c` counts for nothing:
    /// HTTP/2 is known by prior knowledge (RFC 9113 §3.1).
    pub fn asked(parts: &request::Parts) -> Option<Self> {
        if parts.method == Method::CONNECT {
            let protocol = parts.extensions.get::<H2Protocol>();
            return Some(match protocol.map(|protocol| HeaderValue::from_str(protocol.as_str())) {
                Some(Ok(protocol)) => Self::Upgrade(protocol),
                _ => Self::Connect,
            });
        }
        let asks = parts.headers.get_all(CONNECTION).iter().any(|value| {
            let text = value.to_str().unwrap_or_default();
            text.split(',').any(|word| word.trim().eq_ignore_ascii_case("upgrade"))
        });
        let protocol =
            parts.headers.get(UPGRADE).filter(|_| asks && parts.version == http::Version::HTTP_11)?;
        (!names_h2c(protocol.as_bytes())).then(|| Self::Upgrade(protocol.clone()))
    }

    fn is_websocket(&self) -> bool {
        matches!(self, Self::Upgrade(protocol) if protocol.as_bytes().eq_ignore_ascii_case(WEBSOCKET.as_bytes()))
    }

    /// The answer that tells a client of this version that the switch was agreed to. `key` is the client's own.
    pub fn agreed(&self, head: Response<()>, client: Protocol, key: Option<&HeaderValue>) -> Response<()> {
        let (mut parts, ()) = head.into_parts();
        message::strip_hop_by_hop(&mut parts.headers);
        parts.headers.remove(http::header::CONTENT_LENGTH);
        parts.version = http::Version::default();
        match self {
            Self::Upgrade(protocol) if client != Protocol::Http2 => {
                parts.status = StatusCode::SWITCHING_PROTOCOLS;
                parts.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
                parts.headers.insert(UPGRADE, protocol.clone());
                if let Some(key) = key.filter(|_| self.is_websocket()) {
                    parts.headers.insert(SEC_WEBSOCKET_ACCEPT, accept_of(key));
                }
            }
            Self::Upgrade(_) => {
                parts.status = StatusCode::OK;
                parts.headers.remove(SEC_WEBSOCKET_ACCEPT);
            }
            Self::Connect => parts.status = StatusCode::OK,
        }
        Response::from_parts(parts, ())
    }
}

/// Whether one of the protocols of an `Upgrade` list is HTTP/2, whose requests nobody would look at any more.
pub(super) fn names_h2c(protocols: &[u8]) -> bool {
    protocols.split(|byte| *byte == b',').any(|one| one.trim_ascii().eq_ignore_ascii_case(b"h2c"))
}

/// The proof that a WebSocket server has read the key.
fn accept_of(key: &HeaderValue) -> HeaderValue {
    let hash = digest(&SHA1_FOR_LEGACY_USE_ONLY, &[key.as_bytes(), WEBSOCKET_GUID].concat());
    // Base64 is made of characters that a header value may have.
    HeaderValue::try_from(BASE64_STANDARD.encode(hash)).unwrap_or(HeaderValue::from_static(""))
}

impl Pod {
    /// Sends a request that asks for another protocol, on a connection of its own.
    ///
    /// # Errors
    /// Those of [`Pod::open`]; [`Kind::NoUpgrade`] when the endpoint cannot be asked, or answers as no endpoint may.
    pub async fn switch(
        &self,
        permit: &Permit,
        to: &Destination<'_>,
        request: Request<Body>,
        wanted: &Switch,
        client: SocketAddr,
    ) -> Result<Switched> {
        let (mut parts, body) = request.into_parts();
        let app = match to.via {
            Via::Local(pod) => Some(&pod.identity().id),
            Via::Mesh(workload) => Some(&workload.identity),
            Via::Plain => None,
        };
        if let Some(app) = app {
            // The app's agent sees bytes only.
            message::client_certificate(&mut parts.headers, Some(&self.identity().id), app);
        }
        let stream = self.open(permit, to, client).await?;
        ask_on(stream, (to.address, to.protocol), Request::from_parts(parts, body), wanted).await
    }

    /// The same, of the app of this pod; it is shown the client's address.
    ///
    /// # Errors
    /// Those of [`Pod::switch`].
    pub async fn switch_to_app(
        &self,
        to: &Destination<'_>,
        request: Request<Body>,
        wanted: &Switch,
        client: SocketAddr,
    ) -> Result<Switched> {
        let stream = self.open_app(to.address, client, to.connect_timeout, to.kept.introduces).await?;
        ask_on(UpstreamStream::Tcp(stream), (to.address, to.protocol), request, wanted).await
    }
}

/// Asks whoever is at the other end of a fresh stream, and speaks this protocol.
pub(super) async fn ask_on(
    stream: UpstreamStream,
    (to, spoken): (SocketAddr, Protocol),
    request: Request<Body>,
    wanted: &Switch,
) -> Result<Switched> {
    let (parts, body) = request.into_parts();
    match spoken {
        Protocol::Http2 if body.is_end_stream() => by_connect(stream, to, parts, wanted).await,
        Protocol::Http2 => Err(Error::new(
            Kind::BadRequest,
            "a request with a body cannot ask for another protocol over HTTP/2 (RFC 8441 §4)",
        )),
        Protocol::Http1 | Protocol::Opaque => {
            by_upgrade(stream, to, Request::from_parts(parts, body), wanted).await
        }
    }
}

/// HTTP/1.1: `Upgrade` and 101, or CONNECT and 2xx.
async fn by_upgrade(
    stream: UpstreamStream,
    to: SocketAddr,
    request: Request<Body>,
    wanted: &Switch,
) -> Result<Switched> {
    let (mut parts, body) = request.into_parts();
    let own_key = in_http1(&mut parts, wanted);
    let (mut sender, connection) = http1::Builder::new()
        .handshake::<_, Body>(TokioIo::new(stream))
        .await
        .map_err(|error| connect::failure(&error, to))?;
    tokio::spawn(async move {
        // What went wrong is told to whoever waits for the response or holds the stream.
        let _ = connection.with_upgrades().await;
    });
    let request = Request::from_parts(parts, body);
    let mut response = sender.send_request(request).await.map_err(|error| connect::failure(&error, to))?;
    let agreed = match wanted {
        Switch::Upgrade(_) => response.status() == StatusCode::SWITCHING_PROTOCOLS,
        Switch::Connect => response.status().is_success(),
    };
    if !agreed {
        return Ok(Switched::Answered(response.map(Body::from)));
    }
    if let Some(key) = own_key
        && response.headers().get(SEC_WEBSOCKET_ACCEPT) != Some(&accept_of(&key))
    {
        return Err(Error::new(
            Kind::NoUpgrade,
            format!("{to} answered another WebSocket handshake than ours"),
        ));
    }
    let upgraded = hyper::upgrade::on(&mut response).await.map_err(|error| connect::failure(&error, to))?;
    Ok(Switched::Agreed(response.map(drop), Box::new(TokioIo::new(upgraded))))
}

/// Spells the request as HTTP/1.1 does; gives the key of a WebSocket handshake whose client has none of its own.
fn in_http1(parts: &mut request::Parts, wanted: &Switch) -> Option<HeaderValue> {
    let mut own_key = None;
    if let Switch::Upgrade(protocol) = wanted {
        if parts.method == Method::CONNECT {
            parts.method = Method::GET;
        }
        if wanted.is_websocket() && !parts.headers.contains_key(SEC_WEBSOCKET_KEY) {
            let key = BASE64_STANDARD.encode(fastrand::u128(..).to_be_bytes());
            own_key = HeaderValue::try_from(key).ok();
            parts.headers.extend(own_key.clone().map(|key| (SEC_WEBSOCKET_KEY, key)));
        }
        message::for_http1(parts);
        parts.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        parts.headers.insert(UPGRADE, protocol.clone());
    } else {
        message::for_connect(parts);
    }
    parts.extensions = http::Extensions::new();
    own_key
}

/// HTTP/2: CONNECT, with the protocol in a pseudo-header.
async fn by_connect(
    stream: UpstreamStream,
    to: SocketAddr,
    mut parts: request::Parts,
    wanted: &Switch,
) -> Result<Switched> {
    let broke = |error: h2::Error| connect::h2_failure(&Failed::from(error), to);
    let (sender, mut connection) =
        connect::http2_client().handshake::<_, Bytes>(stream).await.map_err(broke)?;
    let pings = connection.ping_pong();
    tokio::spawn(async move {
        let _ = connection.await;
    });
    parts.extensions = http::Extensions::new();
    parts.method = Method::CONNECT;
    if let Switch::Upgrade(protocol) = wanted {
        // Its settings come before the answer to anything.
        if let Some(mut pings) = pings {
            pings.ping(Ping::opaque()).await.map_err(broke)?;
        }
        if !sender.is_extended_connect_protocol_enabled() {
            let detail = format!("{to} takes no other protocol over HTTP/2 (RFC 8441)");
            return Err(Error::new(Kind::NoUpgrade, detail));
        }
        parts.headers.remove(SEC_WEBSOCKET_KEY);
        parts.extensions.insert(H2Protocol::from(protocol.to_str().unwrap_or(WEBSOCKET)));
    } else {
        message::for_connect(&mut parts);
    }
    message::for_http2(&mut parts);
    connect(sender, Request::from_parts(parts, ())).await.map_err(broke)
}

/// HTTP/2: any request, whose body and whose answer's body are the bytes.
pub(super) async fn stream_on(
    stream: UpstreamStream,
    to: SocketAddr,
    mut parts: request::Parts,
) -> Result<Switched> {
    let broke = |error: h2::Error| connect::h2_failure(&Failed::from(error), to);
    let (sender, connection) = connect::http2_client().handshake::<_, Bytes>(stream).await.map_err(broke)?;
    tokio::spawn(async move {
        let _ = connection.await;
    });
    message::for_http2(&mut parts);
    connect(sender, Request::from_parts(parts, ())).await.map_err(broke)
}

async fn connect(
    sender: SendRequest<Bytes>,
    request: Request<()>,
) -> std::result::Result<Switched, h2::Error> {
    let mut sender = sender.ready().await?;
    let (response, send) = sender.send_request(request, false)?;
    let (head, receive) = response.await?.into_parts();
    if !head.status.is_success() {
        let body = Body::from(Received::new(&head.headers, receive));
        return Ok(Switched::Answered(Response::from_parts(head, body)));
    }
    let bytes = ByteStream::new(send, receive, None);
    Ok(Switched::Agreed(Response::from_parts(head, ()), Box::new(bytes)))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use http::HeaderName;

    use super::*;

    fn parts(request: request::Builder) -> request::Parts {
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn what_asks_for_a_switch() {
        let upgrade = |connection: &str, upgrade: &str| {
            Switch::asked(&parts(Request::get("/").header(CONNECTION, connection).header(UPGRADE, upgrade)))
        };
        let websocket = Switch::Upgrade(HeaderValue::from_static("websocket"));
        assert_eq!(upgrade("keep-alive, Upgrade", "websocket"), Some(websocket.clone()));
        assert_eq!(upgrade("keep-alive", "websocket"), None);
        assert_eq!(upgrade("upgrade, http2-settings", "h2c"), None);
        assert_eq!(upgrade("upgrade, http2-settings", "x, H2C"), None);
        let old = Request::get("/").version(http::Version::HTTP_10).header(CONNECTION, "upgrade");
        assert_eq!(Switch::asked(&parts(old.header(UPGRADE, "websocket"))), None);
        assert_eq!(Switch::asked(&parts(Request::connect("a:1"))), Some(Switch::Connect));
        let mut extended = parts(Request::connect("http://a/chat"));
        extended.extensions.insert(H2Protocol::from_static("websocket"));
        assert_eq!(Switch::asked(&extended), Some(websocket));
    }

    #[test]
    fn the_agreement_is_spelled_as_the_client_wants_it() {
        let websocket = Switch::Upgrade(HeaderValue::from_static("websocket"));
        // The example of RFC 6455 §1.3.
        let key = HeaderValue::from_static("dGhlIHNhbXBsZSBub25jZQ==");
        let head = || Response::builder().header("sec-websocket-protocol", "chat").body(()).unwrap();
        let one = websocket.agreed(head(), Protocol::Http1, Some(&key));
        assert_eq!(one.status(), StatusCode::SWITCHING_PROTOCOLS);
        assert_eq!(one.headers()[SEC_WEBSOCKET_ACCEPT], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert_eq!(
            (&one.headers()[CONNECTION], &one.headers()[UPGRADE]),
            (&"upgrade".parse().unwrap(), &"websocket".parse().unwrap())
        );
        assert_eq!(one.headers()["sec-websocket-protocol"], "chat");
        let two = websocket.agreed(one, Protocol::Http2, None);
        assert_eq!(two.status(), StatusCode::OK);
        let mut left: Vec<_> = two.headers().keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["sec-websocket-protocol"]);
    }
}
