//! Requests and responses between protocols: hop-by-hop headers, the authority, and our own headers.
//!
//! Pure. Tested by the tables below.

use std::net::SocketAddr;

use http::{
    HeaderMap, HeaderName, HeaderValue, Uri, Version,
    header::{CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, HOST, TE, TRANSFER_ENCODING, UPGRADE},
    request,
    uri::{Authority, PathAndQuery, Scheme},
};

use super::switch::names_h2c;
use crate::{
    error::{Error, Kind, Result},
    identity::SpiffeId,
    state::snapshot::Protocol,
    tunnel::{OfClient, may_be_of_connection},
};

/// Headers that speak of one connection only (RFC 9110 §7.6.1), besides those that `Connection` names.
const HOP_BY_HOP: [HeaderName; 7] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    // Of an upgrade to HTTP/2, which is refused (RFC 7540 §3.2.1).
    HeaderName::from_static("http2-settings"),
    HeaderName::from_static("proxy-connection"),
    TRANSFER_ENCODING,
    UPGRADE,
    EXPECT,
];

/// Who the client proved to be, for apps (Envoy's XFCC).
const CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");

/// Takes away what speaks of the connection to the client only. `TE: trailers` stays: gRPC asks for it end to end.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    if !headers.keys().any(may_be_of_connection) {
        return;
    }
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in &named {
        if *name != TE {
            headers.remove(name);
        }
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
    let trailers = headers.get(TE).is_some_and(|te| te.as_bytes().eq_ignore_ascii_case(b"trailers"));
    if !trailers {
        headers.remove(TE);
    }
}

/// Whether the client waits for a 100 before it sends its body, and only we can say it: over HTTP/1 hyper does as soon as the
/// body is wanted (RFC 9110 §10.1.1).
pub fn expects_continue(version: Protocol, headers: &HeaderMap) -> bool {
    let expected =
        || headers.get(EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"));
    version == Protocol::Http2 && expected()
}

/// Brings a request into the one form the path works with: authority in the URI (from `:authority`, the absolute form
/// or `Host`), no `Host` header. A CONNECT without a path gets `/`, so that it can be routed.
/// What names no authority at all (HTTP/1.0) gets the address that was dialled. Cookies that came apart are one line
/// again (RFC 9113 §8.2.3): rules match the whole of it, and HTTP/1.1 knows it no other way.
pub fn normalise(parts: &mut request::Parts, dialled: SocketAddr) -> Result<()> {
    let lengths = parts.headers.get_all(CONTENT_LENGTH).iter().count();
    if lengths > 1 {
        return Err(Error::new(
            Kind::BadRequest,
            format!("{lengths} Content-Length headers in one request (RFC 9110 §8.6)"),
        ));
    }
    let protocol = parts.extensions.get::<h2::ext::Protocol>();
    if protocol.is_some_and(|protocol| names_h2c(protocol.as_str().as_bytes())) {
        return Err(Error::new(
            Kind::BadRequest,
            "a CONNECT asks for h2c, which is no protocol to change to (RFC 9113 §3.1)",
        ));
    }
    let hosts = parts.headers.get_all(HOST).iter().count();
    if hosts > 1 {
        return Err(Error::new(
            Kind::BadRequest,
            format!("{hosts} Host headers in one request (RFC 9112 §3.2)"),
        ));
    }
    let host = parts.headers.remove(HOST);
    let authority = match (parts.uri.authority(), host) {
        (Some(authority), _) => authority.clone(),
        (None, Some(host)) => Authority::try_from(host.as_bytes()).map_err(|error| {
            Error::new(Kind::BadRequest, format!("Host header {host:?} is not a host and port: {error}"))
        })?,
        (None, None) if parts.version == Version::HTTP_11 => {
            return Err(Error::new(
                Kind::BadRequest,
                "HTTP/1.1 request without a Host header (RFC 9112 §3.2)",
            ));
        }
        // An address and port are an authority.
        (None, None) => match Authority::try_from(dialled.to_string()) {
            Ok(authority) => authority,
            Err(_) => return Ok(()),
        },
    };
    if authority.as_str().contains('@') {
        return Err(Error::new(
            Kind::BadRequest,
            "the authority names a user, which a request must not (RFC 9110 §4.2.4)",
        ));
    }
    set_authority(parts, authority);
    join_cookies(&mut parts.headers);
    Ok(())
}

fn join_cookies(headers: &mut HeaderMap) {
    if headers.get_all(COOKIE).iter().nth(1).is_none() {
        return;
    }
    let crumbs: Vec<&[u8]> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    // Values that were valid each are valid with this between them.
    if let Ok(whole) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..])) {
        headers.insert(COOKIE, whole);
    }
}

fn set_authority(parts: &mut request::Parts, authority: Authority) {
    let mut uri = std::mem::take(&mut parts.uri).into_parts();
    uri.scheme = uri.scheme.or(Some(Scheme::HTTP));
    uri.authority = Some(authority);
    uri.path_and_query = uri.path_and_query.or(Some(PathAndQuery::from_static("/")));
    // Scheme, authority and path are all there, which is the only thing `from_parts` can miss.
    parts.uri = Uri::from_parts(uri).unwrap_or_default();
}

/// A normalised request as HTTP/1.1 wants it: origin form and `Host`.
pub fn for_http1(parts: &mut request::Parts) {
    if let Some(authority) = parts.uri.authority()
        && let Ok(host) = HeaderValue::from_str(authority.as_str())
    {
        parts.headers.insert(HOST, host);
    }
    let path = parts.uri.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
    parts.uri = Uri::from(path);
    parts.version = Version::HTTP_11;
}

/// A normalised CONNECT as every version wants it: nothing but the authority.
pub fn for_connect(parts: &mut request::Parts) {
    let mut uri = http::uri::Parts::default();
    uri.authority = parts.uri.authority().cloned();
    if let Some(host) = uri.authority.as_ref().and_then(|a| HeaderValue::from_str(a.as_str()).ok()) {
        parts.headers.insert(HOST, host);
    }
    // An authority alone is a valid target; without one the request was refused before.
    parts.uri = Uri::from_parts(uri).unwrap_or_default();
    parts.version = Version::HTTP_11;
}

/// A normalised request as HTTP/2 wants it.
pub fn for_http2(parts: &mut request::Parts) {
    parts.version = Version::HTTP_2;
    parts.headers.remove(HOST);
}

/// The request goes over TLS: over HTTP/2 that stands in its scheme (RFC 9113 §8.3.1).
pub fn over_tls(uri: &mut Uri) {
    if uri.scheme().is_some() {
        set_scheme(uri, Scheme::HTTPS);
    }
}

/// Says by what a normalised request has come.
pub fn set_scheme(uri: &mut Uri, scheme: Scheme) {
    let mut parts = std::mem::take(uri).into_parts();
    parts.scheme = Some(scheme);
    // It was whole with another scheme.
    *uri = Uri::from_parts(parts).unwrap_or_default();
}

/// A response on its way to the client.
pub fn for_client(headers: &mut HeaderMap, status: http::StatusCode) {
    strip_hop_by_hop(headers);
    if status == http::StatusCode::NO_CONTENT || status.is_informational() {
        headers.remove(CONTENT_LENGTH);
    }
}

/// Tells the app who the client proved to be, in the place of whatever the request says: an app may write anything.
pub fn client_certificate(headers: &mut HeaderMap, client: Option<&SpiffeId>, own: &SpiffeId) {
    show_certificate(headers, certificate_of(client, own).as_ref());
}

/// What an app is told of a client that proved to be this.
pub fn certificate_of(client: Option<&SpiffeId>, own: &SpiffeId) -> Option<HeaderValue> {
    let text = client.map(|client| format!("By={own};Subject=\"\";URI={client}"))?;
    // An identity is made of characters that a header value may have.
    HeaderValue::try_from(text).ok()
}

/// As [`client_certificate`], of a connection that has many requests.
pub fn show_certificate(headers: &mut HeaderMap, certificate: Option<&HeaderValue>) {
    match certificate {
        Some(certificate) => drop(headers.insert(CLIENT_CERT, certificate.clone())),
        None => drop(headers.remove(CLIENT_CERT)),
    }
}

/// Puts before it what a gateway has verified of its own client, whose request this is.
pub fn show_client_of_gateway(parts: &mut request::Parts) {
    let Some(OfClient(of_client)) = parts.extensions.remove() else { return };
    let Some(gateway) = parts.headers.get(CLIENT_CERT) else { return };
    let both = [of_client.as_bytes(), gateway.as_bytes()].join(&b","[..]);
    // Of two header values.
    if let Ok(both) = HeaderValue::from_bytes(&both) {
        parts.headers.insert(CLIENT_CERT, both);
    }
}

/// Whether the request is gRPC, by content type.
pub fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(http::header::CONTENT_TYPE).is_some_and(|value| {
        let value = value.as_bytes();
        value == b"application/grpc"
            || value.starts_with(b"application/grpc+")
            || value.starts_with(b"application/grpc;")
    })
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    const DIALLED: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 80);

    fn parts(request: http::request::Builder) -> Option<request::Parts> {
        request.body(()).ok().map(|request| request.into_parts().0)
    }

    #[test]
    fn hop_by_hop_headers_go_and_te_trailers_stays() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "close, x-mine"),
            ("x-mine", "1"),
            ("keep-alive", "timeout=5"),
            ("te", "trailers"),
            ("upgrade", "h2c"),
            ("x-theirs", "2"),
        ] {
            headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        strip_hop_by_hop(&mut headers);
        let mut left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["te", "x-theirs"]);
    }

    #[test]
    fn the_client_of_a_gateway_stands_before_the_gateway() {
        let shown = |own: Option<&'static str>, of_client: Option<&'static str>| {
            let mut parts = parts(Request::get("/")).unwrap_or_else(|| panic!());
            parts.headers.extend(own.map(|own| (CLIENT_CERT, HeaderValue::from_static(own))));
            if let Some(of_client) = of_client {
                parts.extensions.insert(OfClient(HeaderValue::from_static(of_client)));
            }
            show_client_of_gateway(&mut parts);
            parts.headers.get(CLIENT_CERT).and_then(|cert| cert.to_str().ok().map(str::to_owned))
        };
        assert_eq!(shown(Some("By=a"), Some("Hash=1")).as_deref(), Some("Hash=1,By=a"));
        assert_eq!(shown(Some("By=a"), None).as_deref(), Some("By=a"));
        assert_eq!(shown(None, Some("Hash=1")), None);
    }

    #[test]
    fn authority_comes_from_host_or_the_absolute_form() {
        let mut by_host =
            parts(Request::get("/reviews/0?x=1").header("host", "reviews:9080")).unwrap_or_else(|| panic!());
        assert!(normalise(&mut by_host, DIALLED).is_ok());
        assert_eq!(by_host.uri, "http://reviews:9080/reviews/0?x=1");
        for_http1(&mut by_host);
        assert_eq!(by_host.uri, "/reviews/0?x=1");
        assert_eq!(by_host.headers[HOST], "reviews:9080");

        let mut absolute =
            parts(Request::get("http://a/b").header("host", "other")).unwrap_or_else(|| panic!());
        assert!(normalise(&mut absolute, DIALLED).is_ok());
        assert_eq!(absolute.uri, "http://a/b");
    }

    #[test]
    fn cookies_become_one_line() {
        let request =
            Request::get("/").header("host", "a").header("cookie", "a=1").header("cookie", "b=2; c=3");
        let mut request = parts(request).unwrap_or_else(|| panic!());
        assert!(normalise(&mut request, DIALLED).is_ok());
        let lines: Vec<_> = request.headers.get_all(COOKIE).iter().collect();
        assert_eq!(lines, ["a=1; b=2; c=3"]);
    }

    #[test]
    fn bad_requests_are_named() {
        let none = parts(Request::get("/"));
        let two = parts(Request::get("/").header("host", "a").header("host", "b"));
        let garbage = parts(Request::get("/").header("host", "a b/c"));
        let lengths = parts(
            Request::get("/").header("host", "a").header("content-length", "1").header("content-length", "1"),
        );
        for request in [none, two, garbage, lengths] {
            let mut request = request.unwrap_or_else(|| panic!());
            assert_eq!(normalise(&mut request, DIALLED).map_err(|e| e.kind), Err(Kind::BadRequest));
        }
    }

    #[test]
    fn client_certificates_are_told_only_of_who_proved_something() {
        let id = |account: &str| -> SpiffeId {
            format!("spiffe://cluster.local/ns/default/sa/{account}").parse().unwrap_or_else(|_| panic!())
        };
        let forged = || HeaderMap::from_iter([(CLIENT_CERT, HeaderValue::from_static("URI=forged"))]);
        let mut headers = forged();
        client_certificate(&mut headers, None, &id("server"));
        assert!(headers.is_empty());
        let mut headers = forged();
        client_certificate(&mut headers, Some(&id("a")), &id("b"));
        let expected = "By=spiffe://cluster.local/ns/default/sa/b;Subject=\"\";URI=spiffe://cluster.local/ns/default/sa/a";
        assert_eq!(headers[CLIENT_CERT], expected);
    }

    #[test]
    fn grpc_is_told_by_content_type() {
        for (value, grpc) in
            [("application/grpc", true), ("application/grpc+proto", true), ("application/grpc-web", false)]
        {
            let headers =
                HeaderMap::from_iter([(http::header::CONTENT_TYPE, HeaderValue::from_static(value))]);
            assert_eq!(is_grpc(&headers), grpc, "{value}");
        }
    }
}
