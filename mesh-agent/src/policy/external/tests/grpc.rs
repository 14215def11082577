//! Checks over gRPC, and what their responses mean.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::{sync::Arc, time::Duration};

use proptest::prelude::*;

use super::{
    super::{
        change as apply,
        messages::{BoolValue, HeaderValue as Value, HttpStatus, Status, Unread},
        tests::{request, shown, with_question},
    },
    *,
};
use crate::state::snapshot::{BodyInCheck, CheckProtocol};

fn provider(raw: bool) -> Provider {
    Provider {
        name: "opa".into(),
        protocol: CheckProtocol::Grpc,
        host: Arc::from("opa.auth.svc.cluster.local"),
        port: 9191,
        timeout: Duration::from_millis(1500),
        fail_open: false,
        status_on_error: StatusCode::FORBIDDEN,
        body: Some(BodyInCheck { most: 100, partial: true, raw }),
    }
}

/// The message of a call, read back.
fn message(call: &Request<Bytes>) -> AttributeContext {
    let message = unframed(call.body()).unwrap();
    CheckRequest::decode(message).unwrap().attributes.unwrap()
}

#[test]
fn a_check_tells_who_asks_whom_for_what() {
    let headers = [("x-team", "a"), ("x-team", "b"), ("x-request-id", "7")];
    let (parts, ()) = request("PUT", "http://shop:80/cart?x=1", &headers).into_parts();
    let asked = |raw| {
        let subject = Subject::Request(&parts, shown(Some("body"), true));
        with_question(subject, |question| check(&provider(raw), question).unwrap())
    };
    let call = asked(false);
    assert_eq!(
        call.uri(),
        "http://opa.auth.svc.cluster.local:9191/envoy.service.auth.v3.Authorization/Check"
    );
    assert_eq!((call.method(), call.version()), (&Method::POST, Version::HTTP_2));
    let expected = [("content-type", "application/grpc"), ("te", "trailers"), ("grpc-timeout", "1500m")];
    for (name, value) in expected {
        assert_eq!(call.headers()[name], value);
    }
    let said = message(&call);
    let (source, destination) = (said.source.unwrap(), said.destination.unwrap());
    let at = |peer: &Peer| peer.address.clone().unwrap().socket_address.unwrap();
    let port = |number| Some(PortSpecifier::PortValue(number));
    assert_eq!((at(&source).address, at(&source).port), ("10.0.0.1".to_owned(), port(4000)));
    assert_eq!((at(&destination).address, at(&destination).port), ("10.0.0.9".to_owned(), port(8080)));
    assert_eq!(source.principal, "spiffe://cluster.local/ns/app/sa/client");
    assert_eq!(destination.principal, "spiffe://cluster.local/ns/app/sa/server");
    assert_eq!(destination.labels["app"], "pod");
    let sent = said.request.unwrap();
    assert!(sent.time.unwrap().seconds > 1_600_000_000);
    let http = sent.http.unwrap();
    assert_eq!((&*http.id, &*http.method, &*http.path), ("7", "PUT", "/cart?x=1"));
    assert_eq!((&*http.host, &*http.scheme, &*http.protocol), ("shop:80", "http", "HTTP/1.1"));
    assert_eq!((http.size, &*http.body, &*http.raw_body), (9, "body", &[][..]));
    for (name, value) in [
        ("x-team", "a,b"),
        (":method", "PUT"),
        (":path", "/cart?x=1"),
        (":authority", "shop:80"),
        ("x-envoy-auth-partial-body", "true"),
    ] {
        assert_eq!(http.headers[name], value, "{name}");
    }
    let raw = message(&asked(true)).request.unwrap().http.unwrap();
    assert_eq!((&*raw.body, &*raw.raw_body), ("", &b"body"[..]));
}

#[test]
fn of_a_connection_only_its_ends_and_its_server_name_are_told() {
    let said = with_question(Subject::Connection(Some("db.example.com")), |question| {
        message(&check(&provider(false), question).unwrap())
    });
    assert_eq!(said.tls_session.unwrap().sni, "db.example.com");
    assert!(said.request.unwrap().http.is_none());
}

fn trailers(status: &'static str) -> HeaderMap {
    HeaderMap::from_iter([(HeaderName::from_static("grpc-status"), HeaderValue::from_static(status))])
}

fn response(message: &CheckResponse) -> Response<Bytes> {
    let bytes = message.encode_to_vec();
    let mut framed = vec![0];
    framed.extend(u32::try_from(bytes.len()).unwrap().to_be_bytes());
    framed.extend(bytes);
    Response::new(framed.into())
}

fn said(code: i32, http_response: Option<HttpResponse>) -> Result<Answer, String> {
    let status = Some(Status { code, message: String::new() });
    answer(&response(&CheckResponse { status, http_response }), Some(&trailers("0")))
}

fn option(key: &str, value: &str, append: Option<bool>, action: AppendAction) -> HeaderValueOption {
    let header = Value { key: key.to_owned(), value: value.to_owned(), raw_value: Vec::new() };
    let append = append.map(|value| BoolValue { value });
    HeaderValueOption { header: Some(header), append, append_action: action.into() }
}

#[test]
fn code_0_alone_is_a_yes() {
    assert!(matches!(said(0, None), Ok(Answer::Allowed(_))));
    assert!(matches!(said(0, Some(HttpResponse::Ok(OkHttpResponse::default()))), Ok(Answer::Allowed(_))));
    assert!(said(0, Some(HttpResponse::Denied(DeniedHttpResponse::default()))).is_err());
    for code in [1, 7, 16, -1] {
        let Ok(Answer::Denied(refusal)) = said(code, None) else { panic!("{code}") };
        assert_eq!(refusal.status(), 403);
    }
    // A status that is not there is that of a yes in protobuf; the whole message may not be missing.
    assert!(matches!(
        answer(&response(&CheckResponse::default()), Some(&trailers("0"))),
        Ok(Answer::Allowed(_))
    ));
}

#[test]
fn what_cannot_be_read_is_no_answer() {
    let good = || response(&CheckResponse::default());
    for status in ["1", "4", "7", "14", "x", ""] {
        assert!(answer(&good(), Some(&trailers(status))).is_err(), "{status:?}");
    }
    assert!(answer(&good(), None).unwrap_err().contains("broke off"));
    let mut other = good();
    *other.status_mut() = StatusCode::NOT_FOUND;
    assert!(answer(&other, Some(&trailers("0"))).unwrap_err().contains("404"));
    for body in
        [&b""[..], b"\0\0\0\0", b"\0\0\0\0\x01", b"\x01\0\0\0\0", b"\0\0\0\0\0\0", b"\0\0\0\0\x01\xff"]
    {
        let broken = Response::new(Bytes::copy_from_slice(body));
        assert!(answer(&broken, Some(&trailers("0"))).is_err(), "{body:?}");
    }
    // Trailers alone, which may stand where headers do.
    let mut alone = Response::new(Bytes::new());
    *alone.headers_mut() = trailers("14");
    assert!(answer(&alone, None).unwrap_err().contains("14"));
}

#[test]
fn a_yes_changes_headers() {
    use AppendAction::{AddIfAbsent, AppendIfExistsOrAdd, OverwriteIfExists};
    let ok = OkHttpResponse {
        headers: vec![
            option("x-set", "new", None, AppendIfExistsOrAdd),
            option("x-append", "more", Some(true), AppendIfExistsOrAdd),
            option("x-append-none", "more", Some(true), AppendIfExistsOrAdd),
            option("x-absent", "new", None, AddIfAbsent),
            option("x-present", "new", None, AddIfAbsent),
            option("x-over", "new", None, OverwriteIfExists),
            option("x-over-none", "new", None, OverwriteIfExists),
            option("Content-Length", "7", None, AppendIfExistsOrAdd),
        ],
        headers_to_remove: vec!["x-gone".into(), "Host".into()],
        response_headers_to_add: vec![
            option("x-told", "1", None, AppendIfExistsOrAdd),
            option("x-more", "2", Some(true), AppendIfExistsOrAdd),
        ],
        ..OkHttpResponse::default()
    };
    let Ok(Answer::Allowed(changes)) = said(0, Some(HttpResponse::Ok(ok))) else { panic!() };
    let names = ["x-set", "x-append", "x-present", "x-over", "x-gone"];
    let mut headers: HeaderMap = names
        .map(|name| (HeaderName::from_static(name), HeaderValue::from_static("old")))
        .into_iter()
        .collect();
    apply(&mut headers, &changes.request);
    let values = |headers: &HeaderMap, name| {
        headers.get_all(name).iter().map(|value| value.to_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    for (name, expected) in [
        ("x-set", &["new"][..]),
        ("x-append", &["old", "more"]),
        ("x-append-none", &[]),
        ("x-absent", &["new"]),
        ("x-present", &["old"]),
        ("x-over", &["new"]),
        ("x-over-none", &[]),
        ("x-gone", &[]),
        ("content-length", &[]),
    ] {
        assert_eq!(values(&headers, name), expected, "{name}");
    }
    let mut told = HeaderMap::from_iter([(HeaderName::from_static("x-more"), HeaderValue::from_static("1"))]);
    apply(&mut told, &changes.response);
    assert_eq!(
        (values(&told, "x-told"), values(&told, "x-more")),
        (vec!["1".into()], vec!["1".into(), "2".into()])
    );
}

#[test]
fn a_yes_that_cannot_be_honoured_is_no_answer() {
    let bad = |ok: OkHttpResponse| said(0, Some(HttpResponse::Ok(ok))).unwrap_err();
    let header = |key: &str, value: &str| OkHttpResponse {
        headers: vec![option(key, value, None, AppendAction::AppendIfExistsOrAdd)],
        ..OkHttpResponse::default()
    };
    assert!(bad(header(":path", "/x")).contains(":path"));
    assert!(bad(header("x y", "")).contains("no header"));
    assert!(bad(header("x", "a\nb")).contains("no header can have"));
    let query = OkHttpResponse { query_parameters_to_set: vec![Unread {}], ..OkHttpResponse::default() };
    assert!(bad(query).contains("query"));
}

#[test]
fn a_no_has_status_headers_and_body() {
    let refused = |code| {
        let denied = DeniedHttpResponse {
            status: Some(HttpStatus { code }),
            headers: vec![option("location", "/login", None, AppendAction::AppendIfExistsOrAdd)],
            body: "go away".into(),
        };
        said(7, Some(HttpResponse::Denied(denied)))
    };
    let Ok(Answer::Denied(refusal)) = refused(302) else { panic!() };
    assert_eq!((refusal.status().as_u16(), &**refusal.body()), (302, &b"go away"[..]));
    assert_eq!(refusal.headers()["location"], "/login");
    for code in [1, 99, 101, 1000, -5, 70_000] {
        assert!(refused(code).is_err(), "{code}");
    }
}

proptest! {
    /// An authorizer may be anybody's: whatever it sends, it is an answer or none.
    #[test]
    fn any_bytes_can_be_read(body in proptest::collection::vec(any::<u8>(), 0..64), framed in any::<bool>()) {
        let mut bytes = body;
        if framed {
            let length = u32::try_from(bytes.len()).unwrap().to_be_bytes();
            bytes.splice(0..0, [0].into_iter().chain(length));
        }
        let _ = answer(&Response::new(bytes.into()), Some(&trailers("0")));
    }
}

/// The numbers of the fields, written out: both ends of the other tests have them from one place.
#[test]
fn the_messages_are_envoys_on_the_wire() {
    let socket = SocketAddress { address: "a".into(), port: Some(PortSpecifier::PortValue(7)) };
    let peer = Peer {
        address: Some(Address { socket_address: Some(socket) }),
        service: "s".into(),
        labels: HashMap::from([("k".into(), "v".into())]),
        principal: "p".into(),
    };
    let peer_bytes = [
        &b"\x0a\x07\x0a\x05\x12\x01a\x18\x07"[..],
        b"\x12\x01s",
        b"\x1a\x06\x0a\x01k\x12\x01v",
        b"\x22\x01p",
    ]
    .concat();
    assert_eq!(peer.encode_to_vec(), peer_bytes);
    let http = HttpRequest {
        id: "i".into(),
        method: "m".into(),
        headers: HashMap::from([("k".into(), "v".into())]),
        path: "/".into(),
        host: "h".into(),
        scheme: "c".into(),
        size: 9,
        protocol: "r".into(),
        body: "b".into(),
        raw_body: b"w".to_vec(),
    };
    let http_bytes = [
        &b"\x0a\x01i\x12\x01m\x1a\x06\x0a\x01k\x12\x01v\x22\x01/\x2a\x01h\x32\x01c"[..],
        b"\x48\x09\x52\x01r\x5a\x01b\x62\x01w",
    ]
    .concat();
    assert_eq!(http.encode_to_vec(), http_bytes);
    let request =
        Asked { time: Some(Timestamp { seconds: 1, nanos: 2 }), http: Some(HttpRequest::default()) };
    assert_eq!(request.encode_to_vec(), b"\x0a\x04\x08\x01\x10\x02\x12\x00");
    let attributes = AttributeContext {
        source: Some(Peer::default()),
        destination: Some(Peer::default()),
        request: Some(Asked::default()),
        tls_session: Some(TlsSession { sni: "n".into() }),
    };
    let check = CheckRequest { attributes: Some(attributes) };
    assert_eq!(check.encode_to_vec(), b"\x0a\x0b\x0a\x00\x12\x00\x22\x00\x62\x03\x0a\x01n");

    let denied = b"\x0a\x02\x08\x07\x12\x1a\x0a\x03\x08\x91\x03\x12\x0e\x0a\x06\x0a\x01k\x12\x01v\x12\x02\x08\x01\x18\x00\x1a\x03not";
    let read = CheckResponse::decode(&denied[..]).unwrap();
    let header = option("k", "v", Some(true), AppendAction::AppendIfExistsOrAdd);
    let expected = DeniedHttpResponse {
        status: Some(HttpStatus { code: 401 }),
        headers: vec![header.clone()],
        body: "not".into(),
    };
    assert_eq!(read.status, Some(Status { code: 7, message: String::new() }));
    assert_eq!(read.http_response, Some(HttpResponse::Denied(expected)));
    let ok = b"\x1a\x28\x12\x0e\x0a\x06\x0a\x01k\x12\x01v\x12\x02\x08\x01\x18\x00\x2a\x01r\x32\x0e\x0a\x06\x0a\x01k\x12\x01v\x12\x02\x08\x01\x18\x00\x3a\x00\x42\x01q";
    let read = CheckResponse::decode(&ok[..]).unwrap();
    let expected = OkHttpResponse {
        headers: vec![header.clone()],
        headers_to_remove: vec!["r".into()],
        response_headers_to_add: vec![header],
        query_parameters_to_set: vec![Unread {}],
        query_parameters_to_remove: vec!["q".into()],
    };
    assert_eq!(read.http_response, Some(HttpResponse::Ok(expected)));
}
