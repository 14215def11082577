//! Checks over HTTP, and what their responses mean.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use http::HeaderMap;

use super::{
    super::{
        change,
        tests::{request, shown, with_question},
    },
    *,
};

fn list(names: &[&str]) -> Box<[TextMatch]> {
    names.iter().map(|name| TextMatch::parse(name).unwrap()).collect()
}

fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
    let pairs =
        pairs.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
    pairs.collect()
}

fn ask(
    terms: &HttpCheck,
    request: Request<()>,
    body: Option<&'static str>,
) -> Result<Request<Bytes>, String> {
    let (parts, ()) = request.into_parts();
    with_question(Subject::Request(&parts, shown(body, false)), |question| check(terms, question))
}

fn text(headers: &HeaderMap) -> String {
    let mut lines: Vec<_> =
        headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
    lines.sort();
    lines.join("\n")
}

#[test]
fn a_check_has_the_method_host_and_path_of_the_request_and_the_headers_that_are_listed() {
    let secret = [("authorization", "Bearer a"), ("cookie", "a=1"), ("x-team", "blue"), ("x-other", "1")];
    let asked = request("POST", "http://shop.example.com/cart?x=1", &secret);
    let plain = ask(&HttpCheck::default(), asked.clone(), None).unwrap();
    assert_eq!(plain.method(), "POST");
    assert_eq!(plain.uri(), "http://shop.example.com/cart?x=1");
    assert_eq!(text(plain.headers()), "authorization: Bearer a\ncontent-length: 0");
    assert!(plain.body().is_empty());

    let terms = HttpCheck {
        path_prefix: "/check".into(),
        request_headers: list(&["x-*", "cookie"]),
        added_headers: Box::new([(HeaderName::from_static("x-team"), HeaderValue::from_static("mesh"))]),
        ..HttpCheck::default()
    };
    let full = ask(&terms, asked, Some("body")).unwrap();
    assert_eq!(full.uri(), "http://shop.example.com/check/cart?x=1");
    assert_eq!(
        text(full.headers()),
        "authorization: Bearer a\ncontent-length: 4\ncookie: a=1\nx-envoy-auth-partial-body: false\nx-other: 1\n\
         x-team: mesh"
    );
    assert_eq!(full.body(), "body");
}

#[test]
fn what_is_no_request_of_http_cannot_be_asked_about() {
    let connect = request("CONNECT", "http://a/", &[]);
    assert!(ask(&HttpCheck::default(), connect, None).unwrap_err().contains("CONNECT"));
    let connection =
        with_question(Subject::Connection(None), |question| check(&HttpCheck::default(), question));
    assert!(connection.unwrap_err().contains("no request"));
}

fn response(status: u16, pairs: &[(&'static str, &'static str)]) -> Response<Bytes> {
    let mut response = Response::new(Bytes::from_static(b"told"));
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    *response.headers_mut() = headers(pairs);
    response
}

#[test]
fn status_200_alone_is_a_yes_and_5xx_is_no_answer() {
    let terms = HttpCheck::default();
    for status in [500, 503, 599] {
        assert!(answer(&terms, response(status, &[])).is_err(), "{status}");
    }
    for status in [201, 204, 302, 401, 403, 404, 429] {
        let Ok(Answer::Denied(refusal)) = answer(&terms, response(status, &[])) else { panic!("{status}") };
        assert_eq!((refusal.status().as_u16(), &**refusal.body()), (status, &b"told"[..]));
    }
    let Ok(Answer::Allowed(changes)) = answer(&terms, response(200, &[("x-user", "joe")])) else { panic!() };
    assert!(changes.request.is_empty() && changes.response.is_empty());
}

#[test]
fn a_yes_changes_the_headers_that_are_listed() {
    let terms = HttpCheck {
        upstream_on_allow: list(&["x-user", "x-group*", "content-length", "connection"]),
        downstream_on_allow: list(&["set-cookie", "mesh-*"]),
        ..HttpCheck::default()
    };
    let said = response(
        200,
        &[
            ("x-user", "joe"),
            ("x-groups", "a"),
            ("x-groups", "b"),
            ("x-secret", "1"),
            ("content-length", "4"),
            ("connection", "close"),
            ("set-cookie", "s=1"),
            ("mesh-failure", "overload"),
            ("x-envoy-auth-headers-to-remove", "x-gone, host, x-also"),
        ],
    );
    let Ok(Answer::Allowed(changes)) = answer(&terms, said) else { panic!() };
    let mut request = headers(&[("x-user", "forged"), ("x-gone", "1"), ("x-also", "1"), ("x-kept", "1")]);
    change(&mut request, &changes.request);
    assert_eq!(text(&request), "x-groups: a\nx-groups: b\nx-kept: 1\nx-user: joe");
    let mut told = headers(&[("set-cookie", "old=1")]);
    change(&mut told, &changes.response);
    assert_eq!(text(&told), "set-cookie: s=1");
}

#[test]
fn a_no_tells_the_client_all_or_what_is_listed() {
    let said = &[
        ("x-reason", "no"),
        ("x-other", "1"),
        ("www-authenticate", "Basic"),
        ("location", "/login"),
        ("content-length", "4"),
        ("host", "a"),
    ];
    let told = |terms: &HttpCheck| match answer(terms, response(401, said)) {
        Ok(Answer::Denied(refusal)) => text(refusal.headers()),
        other => panic!("{other:?}"),
    };
    let all = "location: /login\nwww-authenticate: Basic\nx-other: 1\nx-reason: no";
    assert_eq!(told(&HttpCheck::default()), all);
    let terms = HttpCheck { downstream_on_deny: list(&["x-reason"]), ..HttpCheck::default() };
    assert_eq!(told(&terms), "location: /login\nwww-authenticate: Basic\nx-reason: no");
}
