//! Native requests of `mesh-h2`: an app's HTTP request as a stream of its own, told by two headers of ours; a third
//! tells in the response that it is not the app's.
//!
//! Those headers are believed only from an authenticated mesh peer, so they are taken out of whatever apps send,
//! in both directions. Tested by the unit tests below and, over the wire, by `tunnel/tests`.

use std::net::SocketAddr;

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Uri, Version,
    header::{CONNECTION, HOST, TE, TRANSFER_ENCODING, UPGRADE},
    uri::{Authority, PathAndQuery, Scheme},
};

use super::{introduction::Introduction, settings::OWN_PORTS};
use crate::{
    body::Body,
    error::{Error, Kind, Result},
    state::snapshot::Protocol,
};

/// Port of the app in the peer pod; makes a stream a native request.
pub const MESH_PORT: HeaderName = HeaderName::from_static("mesh-port");
/// What the app speaks: `http/1.1` or `h2`.
pub const MESH_APP_PROTOCOL: HeaderName = HeaderName::from_static("mesh-app-protocol");

/// In a response that the peer's agent makes in the place of the app's: why there is none (a word of [`Kind`]).
pub const MESH_FAILURE: HeaderName = HeaderName::from_static("mesh-failure");

/// In a request: whom the app is to be told that its connection is for ([`Introduction`]).
pub const MESH_INTRODUCES: HeaderName = HeaderName::from_static("mesh-introduces");

/// In a request that came in at a gateway: what that has verified of its client ([`OfClient`]).
pub const MESH_OF_CLIENT: HeaderName = HeaderName::from_static("mesh-of-client");

/// What a gateway has verified of the certificate of a request's client, as an app is told of it. Goes beside the headers of
/// the request, where no client can write it.
#[derive(Debug, Clone)]
pub struct OfClient(pub HeaderValue);

const HTTP1: &str = "http/1.1";
const HTTP2: &str = "h2";

/// In a response by which the peer's agent refuses to ask the app at all: that it is not the app's. The client gets the
/// response as it stands; a health check learns nothing from it.
pub const MESH_REFUSAL: HeaderName = HeaderName::from_static("mesh-refusal");

/// Headers that end with the connection they came on (RFC 9110, section 7.6.1), beside those that `Connection` and
/// `TE` name.
const HOP_BY_HOP: [HeaderName; 5] = [
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    HeaderName::from_static("http2-settings"),
    TRANSFER_ENCODING,
    UPGRADE,
];

/// Takes our headers out of a message: of requests that apps send, and of responses of apps.
pub fn strip_mesh_headers(headers: &mut HeaderMap) {
    // One look at the names is cheaper than looking each of ours up, and most messages have none.
    if !headers.keys().any(|name| name.as_str().starts_with("mesh-")) {
        return;
    }
    headers.remove(MESH_PORT);
    headers.remove(MESH_APP_PROTOCOL);
    headers.remove(MESH_FAILURE);
    headers.remove(MESH_REFUSAL);
    headers.remove(MESH_INTRODUCES);
    headers.remove(MESH_OF_CLIENT);
}

/// Failures to get a response of the app that the source is told of: what its retries ask for.
const TOLD: [Kind; 5] =
    [Kind::ConnectFailure, Kind::UpstreamReset, Kind::RefusedStream, Kind::Overload, Kind::ConcurrencyLimit];

/// Says in a response that it stands for this failure, where that is of interest to the source.
pub fn tell_failure(headers: &mut HeaderMap, kind: Kind) {
    if TOLD.contains(&kind) {
        headers.insert(MESH_FAILURE, HeaderValue::from_static(kind.row().word));
    } else if matches!(
        kind,
        Kind::Denied
            | Kind::ExternalDenied
            | Kind::ExternalError
            | Kind::Revoked
            | Kind::Token(_)
            | Kind::RateLimited
    ) {
        headers.insert(MESH_REFUSAL, HeaderValue::from_static(kind.row().word));
    }
}

/// Why the peer's agent has refused to ask the app.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It may not be asked, or not by this client.
    Policy,
    /// Its pod is asked too much already: a rate limit.
    Busy,
}

/// Keeps what a mesh peer says of its response, before its headers are taken out.
pub fn note_refusal<B>(response: &mut Response<B>) {
    if let Some(word) = response.headers().get(MESH_REFUSAL) {
        let is_busy = word.as_bytes() == Kind::RateLimited.row().word.as_bytes();
        response.extensions_mut().insert(if is_busy { Refusal::Busy } else { Refusal::Policy });
    }
}

/// Why a response is not the app's, which was not asked: by the word of the peer's agent.
pub fn refusal<B>(response: &Response<B>) -> Option<Refusal> {
    response.extensions().get().copied()
}

/// The failure that a response of the peer's agent stands for.
pub(super) fn told_failure(headers: &HeaderMap) -> Option<Kind> {
    let word = headers.get(MESH_FAILURE)?.as_bytes();
    TOLD.into_iter().find(|kind| kind.row().word.as_bytes() == word)
}

/// Whether a header may speak of one connection only. One look at the names is cheaper than looking each of them up, and most
/// messages have none.
pub fn may_be_of_connection(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "connection"
            | "expect"
            | "http2-settings"
            | "keep-alive"
            | "proxy-connection"
            | "te"
            | "transfer-encoding"
            | "upgrade"
    )
}

fn strip_hop_by_hop(headers: &mut HeaderMap) {
    if !headers.keys().any(may_be_of_connection) {
        return;
    }
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        // `TE: trailers` is what gRPC lives by; HTTP/2 keeps it.
        .filter(|name| name != TE)
        .collect();
    headers.remove(CONNECTION);
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
    let asks_for_trailers = headers.get_all(TE).iter().any(|value| {
        value
            .to_str()
            .is_ok_and(|text| text.split(',').any(|one| one.trim().eq_ignore_ascii_case("trailers")))
    });
    headers.remove(TE);
    if asks_for_trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
}

/// The request as it goes over the wire: HTTP/2, our two headers, nothing of the connection it came on.
pub(super) fn to_wire(
    mut request: Box<Request<Body>>,
    destination: SocketAddr,
    protocol: Protocol,
) -> Result<Box<Request<Body>>> {
    let bad = |detail: String| Error::new(Kind::BadRequest, detail);
    let (mut parts, body) = std::mem::take(&mut *request).into_parts();
    if parts.method == Method::CONNECT {
        return Err(bad("an app's CONNECT travels as bytes in a tunnel, not as a native request".to_owned()));
    }
    let app = match protocol {
        Protocol::Http1 => HTTP1,
        Protocol::Http2 => HTTP2,
        Protocol::Opaque => return Err(bad("bytes travel in a tunnel, not as a native request".to_owned())),
    };
    let mut uri = parts.uri.into_parts();
    if uri.authority.is_none() {
        uri.authority = Some(authority(parts.headers.get(HOST), destination)?);
    }
    uri.scheme = Some(Scheme::HTTP);
    uri.path_and_query.get_or_insert_with(|| PathAndQuery::from_static("/"));
    parts.uri =
        Uri::from_parts(uri).map_err(|error| bad(format!("the request has no valid target: {error}")))?;
    parts.version = Version::HTTP_2;
    parts.headers.remove(HOST);
    strip_hop_by_hop(&mut parts.headers);
    parts.headers.insert(MESH_PORT, destination.port().into());
    parts.headers.insert(MESH_APP_PROTOCOL, HeaderValue::from_static(app));
    match parts.extensions.remove::<Introduction>() {
        Some(introduction) => drop(parts.headers.insert(MESH_INTRODUCES, introduction.to_header())),
        None => drop(parts.headers.remove(MESH_INTRODUCES)),
    }
    match parts.extensions.remove::<OfClient>() {
        Some(OfClient(certificate)) => drop(parts.headers.insert(MESH_OF_CLIENT, certificate)),
        None => drop(parts.headers.remove(MESH_OF_CLIENT)),
    }
    *request = Request::from_parts(parts, body);
    Ok(request)
}

/// The authority of a request without one in its target: its Host, or (HTTP/1.0) the app's own address.
fn authority(host: Option<&HeaderValue>, destination: SocketAddr) -> Result<Authority> {
    let bytes = match host {
        Some(host) if !host.is_empty() => host.as_bytes().to_vec(),
        _ => destination.to_string().into_bytes(),
    };
    Authority::try_from(bytes).map_err(|error| {
        Error::new(Kind::BadRequest, format!("the Host header {host:?} is not a host: {error}"))
    })
}

/// Whom the app is to be told that its connection is for.
pub(super) fn introduced(headers: &HeaderMap) -> Result<Option<Introduction>> {
    single(headers, &MESH_INTRODUCES)?.map(Introduction::from_header).transpose()
}

/// What a gateway has verified of the client.
pub(super) fn of_client(headers: &HeaderMap) -> Result<Option<OfClient>> {
    let said = single(headers, &MESH_OF_CLIENT)?;
    Ok(said.and_then(|_| headers.get(MESH_OF_CLIENT).cloned()).map(OfClient))
}

/// Port and protocol of a native request, its headers stripped; `None` for a stream without them.
pub(super) fn from_wire(headers: &mut HeaderMap) -> Result<Option<(u16, Protocol)>> {
    let target = read(headers)?;
    strip_mesh_headers(headers);
    Ok(target)
}

fn read(headers: &HeaderMap) -> Result<Option<(u16, Protocol)>> {
    let Some(port) = single(headers, &MESH_PORT)? else { return Ok(None) };
    let bad = |name: &HeaderName, value: &str, expected: &str| {
        Error::new(Kind::BadRequest, format!("{name}: {value:?} is not {expected}"))
    };
    // Digits only: `u16::from_str` takes a plus sign.
    let number = port.bytes().all(|byte| byte.is_ascii_digit()).then(|| port.parse::<u16>().ok()).flatten();
    let number = number.filter(|port| *port != 0).ok_or_else(|| bad(&MESH_PORT, port, "a port"))?;
    check_port(number)?;
    let protocol = match single(headers, &MESH_APP_PROTOCOL)? {
        Some(HTTP1) => Protocol::Http1,
        Some(HTTP2) => Protocol::Http2,
        other => return Err(bad(&MESH_APP_PROTOCOL, other.unwrap_or_default(), "http/1.1 or h2")),
    };
    Ok(Some((number, protocol)))
}

fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>> {
    let mut values = headers.get_all(name).iter();
    let Some(first) = values.next() else { return Ok(None) };
    match (first.to_str(), values.next()) {
        (Ok(text), None) => Ok(Some(text)),
        _ => Err(Error::new(Kind::BadRequest, format!("{name} must have one value of plain text"))),
    }
}

/// Refuses the mesh's own ports as a destination: nobody borrows a pod's listeners from outside.
pub(super) fn check_port(port: u16) -> Result<()> {
    if OWN_PORTS.contains(&port) {
        return Err(Error::new(
            Kind::IllegalDestination,
            format!("port {port} is the mesh's own and never a destination"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    type TestResult = std::result::Result<(), Box<dyn std::error::Error>>;

    const APP: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 7)), 9080);

    #[test]
    fn an_http1_request_becomes_a_native_one() -> TestResult {
        let request = Request::get("/a?b=c")
            .header(HOST, "reviews:9080")
            .header(CONNECTION, "keep-alive, x-private, te")
            .header("x-private", "1")
            .header("x-kept", "2")
            .header(TE, "gzip, trailers")
            .header(UPGRADE, "websocket")
            .header(TRANSFER_ENCODING, "chunked")
            .header(MESH_PORT, "22")
            .header(MESH_INTRODUCES, "v1 1.1.1.1:1 2.2.2.2:2")
            .body(Body::Empty)?;
        let wire = to_wire(Box::new(request), APP, Protocol::Http1)?;
        assert_eq!(wire.uri().to_string(), "http://reviews:9080/a?b=c");
        assert_eq!(wire.version(), Version::HTTP_2);
        let mut names: Vec<_> =
            wire.headers().iter().map(|(name, value)| (name.as_str(), value.to_str().ok())).collect();
        names.sort_unstable();
        let expected = [
            ("mesh-app-protocol", Some("http/1.1")),
            ("mesh-port", Some("9080")),
            ("te", Some("trailers")),
            ("x-kept", Some("2")),
        ];
        assert_eq!(names, expected);
        Ok(())
    }

    #[test]
    fn whom_the_app_is_told_of_arrives_and_goes_no_further() -> TestResult {
        let ends = Some((SocketAddr::from(([10, 0, 0, 5], 51000)), SocketAddr::from(([10, 96, 0, 1], 80))));
        let introduction = Introduction { version: crate::state::snapshot::ProxyProtocol::V2, ends };
        let mut request = Request::get("/x").header(HOST, "a").body(Body::Empty)?;
        request.extensions_mut().insert(introduction);
        let mut wire = to_wire(Box::new(request), APP, Protocol::Http1)?;
        assert_eq!(introduced(wire.headers())?, Some(introduction));
        assert!(from_wire(wire.headers_mut())?.is_some());
        assert_eq!(introduced(wire.headers())?, None);
        wire.headers_mut().insert(MESH_INTRODUCES, HeaderValue::from_static("v1 somebody"));
        assert!(introduced(wire.headers()).is_err());
        Ok(())
    }

    #[test]
    fn what_a_gateway_knows_of_a_client_arrives_and_nobody_else_says_it() -> TestResult {
        let mut request = Request::get("/x").header(HOST, "a").body(Body::Empty)?;
        request.extensions_mut().insert(OfClient(HeaderValue::from_static("Hash=1")));
        let mut wire = to_wire(Box::new(request), APP, Protocol::Http1)?;
        let told = |headers: &HeaderMap| of_client(headers).map(|of| of.map(|OfClient(value)| value));
        assert_eq!(told(wire.headers())?, Some(HeaderValue::from_static("Hash=1")));
        assert!(from_wire(wire.headers_mut())?.is_some());
        assert_eq!(told(wire.headers())?, None);
        let said = Request::get("/x").header(HOST, "a").header(MESH_OF_CLIENT, "Hash=2").body(Body::Empty)?;
        assert_eq!(told(to_wire(Box::new(said), APP, Protocol::Http1)?.headers())?, None);
        let mut headers = HeaderMap::from_iter([(MESH_OF_CLIENT, HeaderValue::from_static("Hash=2"))]);
        strip_mesh_headers(&mut headers);
        assert!(headers.is_empty());
        Ok(())
    }

    #[test]
    fn the_authority_is_the_requests_own() -> TestResult {
        let absolute = Request::get("http://a.example/x").header(HOST, "b.example").body(Body::Empty)?;
        assert_eq!(
            to_wire(Box::new(absolute), APP, Protocol::Http2)?.uri().to_string(),
            "http://a.example/x"
        );
        let without = Request::get("/x").body(Body::Empty)?;
        assert_eq!(
            to_wire(Box::new(without), APP, Protocol::Http1)?.uri().to_string(),
            "http://10.0.0.7:9080/x"
        );
        let asterisk = Request::options("*").header(HOST, "b.example").body(Body::Empty)?;
        assert_eq!(to_wire(Box::new(asterisk), APP, Protocol::Http1)?.uri().path(), "*");
        let bad = Request::get("/x").header(HOST, "a b/c").body(Body::Empty)?;
        assert_eq!(
            to_wire(Box::new(bad), APP, Protocol::Http1).map_err(|error| error.kind).err(),
            Some(Kind::BadRequest)
        );
        Ok(())
    }

    #[test]
    fn failures_to_reach_the_app_are_told_and_no_others() {
        for kind in TOLD {
            let mut headers = HeaderMap::new();
            tell_failure(&mut headers, kind);
            assert_eq!(told_failure(&headers), Some(kind));
            strip_mesh_headers(&mut headers);
            assert!(headers.is_empty());
        }
        let mut headers = HeaderMap::new();
        tell_failure(&mut headers, Kind::Denied);
        assert_eq!(told_failure(&headers), None);
        let mut response = Response::new(());
        note_refusal(&mut response);
        assert_eq!(refusal(&response), None);
        response.headers_mut().clone_from(&headers);
        note_refusal(&mut response);
        assert_eq!(refusal(&response), Some(Refusal::Policy));
        tell_failure(response.headers_mut(), Kind::RateLimited);
        note_refusal(&mut response);
        assert_eq!(refusal(&response), Some(Refusal::Busy));
        strip_mesh_headers(&mut headers);
        assert!(headers.is_empty());
        tell_failure(&mut headers, Kind::Timeout);
        assert!(headers.is_empty());
    }

    #[test]
    fn connect_and_bytes_are_never_native() -> TestResult {
        let connect = Request::connect("a.example:80").body(Body::Empty)?;
        assert!(to_wire(Box::new(connect), APP, Protocol::Http1).is_err());
        assert!(to_wire(Box::new(Request::new(Body::Empty)), APP, Protocol::Opaque).is_err());
        Ok(())
    }

    #[test]
    fn our_headers_are_read_strictly_and_taken_out() -> TestResult {
        let headers = |pairs: &[(&HeaderName, &'static str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in pairs {
                headers.append(*name, HeaderValue::from_static(value));
            }
            headers
        };
        let mut good = headers(&[(&MESH_PORT, "80"), (&MESH_APP_PROTOCOL, "h2"), (&HOST, "a")]);
        assert_eq!(from_wire(&mut good)?, Some((80, Protocol::Http2)));
        assert_eq!(good.len(), 1);
        let mut without_port = headers(&[(&MESH_APP_PROTOCOL, "h2")]);
        assert_eq!(from_wire(&mut without_port)?, None);
        assert!(without_port.is_empty());
        for pairs in [
            &[(&MESH_PORT, "80")][..],
            &[(&MESH_PORT, "80"), (&MESH_APP_PROTOCOL, "h3")],
            &[(&MESH_PORT, "+80"), (&MESH_APP_PROTOCOL, "h2")],
            &[(&MESH_PORT, "0"), (&MESH_APP_PROTOCOL, "h2")],
            &[(&MESH_PORT, ""), (&MESH_APP_PROTOCOL, "h2")],
            &[(&MESH_PORT, "65536"), (&MESH_APP_PROTOCOL, "h2")],
            &[(&MESH_PORT, "80"), (&MESH_PORT, "81"), (&MESH_APP_PROTOCOL, "h2")],
            &[(&MESH_PORT, "15008"), (&MESH_APP_PROTOCOL, "h2")],
        ] {
            assert!(from_wire(&mut headers(pairs)).is_err(), "{pairs:?}");
        }
        Ok(())
    }
}
