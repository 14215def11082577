//! Requests against routes, written as users write them.
#![expect(clippy::unwrap_used, reason = "tests")]

mod properties;

use std::{collections::BTreeMap, sync::Arc};

use http::{HeaderValue, Method, Request, StatusCode, request::Parts};
use regex::Regex;

use super::*;
use crate::{
    identity::SpiffeId,
    source::read_text,
    state::{
        compile::{Settings, compile},
        snapshot::{
            Authentication, Backend, CapturePolicy, HeaderOp, HeaderOps, HttpRoute, PathRewrite, Redirect,
            RedirectPort, RequestMatch, Rewrite, StringMatch, Workload,
        },
    },
};

fn source() -> Workload {
    Workload {
        namespace: "shop".into(),
        name: "client".into(),
        ips: Vec::new(),
        node: None,
        identity: SpiffeId {
            trust_domain: "cluster.local".into(),
            namespace: "shop".into(),
            service_account: "client".into(),
        },
        labels: BTreeMap::from([("app".into(), "client".into())]),
        view: None,
        enrolled: true,
        netns: None,
        announced: false,
        capture: CapturePolicy::default(),
        authorization: Arc::default(),
        authentication: Authentication::default(),
        workload_name: "client".into(),
        canonical_service: "client".into(),
        canonical_revision: "latest".into(),
    }
}

fn request(uri: &str, headers: &[(&str, &str)]) -> Parts {
    let mut request = Request::builder().uri(uri);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap().into_parts().0
}

/// The routes of a service `a` whose `VirtualService` has these `http` entries.
fn routes(http: &str) -> Arc<[Arc<HttpRoute>]> {
    let indented: String = http.lines().flat_map(|line| ["  ", line, "\n"]).collect();
    let text = format!(
        "{{apiVersion: v1, kind: Service, metadata: {{name: a}}, spec: {{ports: [{{port: 80}}]}}}}\n---\n\
         apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: a}}\nspec:\n  hosts: [a]\n  \
         http:\n{indented}"
    );
    let (objects, problems) = read_text(&text);
    assert_eq!(problems, [], "{text}");
    let settings = Settings::default();
    let (snapshot, problems) = compile(&objects, None, &settings);
    assert_eq!(problems, []);
    Arc::clone(&snapshot.services["a.default.svc.cluster.local"].port_for("default", 80).unwrap().routes)
}

fn matching(m: &str) -> Arc<[Arc<HttpRoute>]> {
    routes(&format!("- match: [{m}]\n  route: [{{destination: {{host: a}}}}]"))
}

/// A match, a request's URI and headers, and whether they go together.
type Case = (&'static str, &'static str, &'static [(&'static str, &'static str)], bool);

#[test]
fn one_match() {
    let table: &[Case] = &[
        ("{}", "/x", &[], true),
        ("{uri: {exact: /a}}", "/a?q=1", &[], true),
        ("{uri: {exact: /a}}", "/a/", &[], false),
        ("{uri: {exact: /a}}", "/A", &[], false),
        ("{uri: {exact: /a}, ignoreUriCase: true}", "/A", &[], true),
        ("{uri: {prefix: /foo}}", "/foobar", &[], true),
        ("{uri: {prefix: /foo}}", "/fo", &[], false),
        ("{uri: {prefix: /foo}, ignoreUriCase: true}", "/FOObar", &[], true),
        ("{uri: {prefix: /foo}, ignoreUriCase: true}", "/f", &[], false),
        ("{uri: {regex: '/v[0-9]+'}}", "/v12", &[], true),
        ("{uri: {regex: '/v[0-9]+'}}", "/v12/x", &[], false),
        ("{uri: {regex: '/v[0-9]+'}, ignoreUriCase: true}", "/V12", &[], false),
        ("{scheme: {exact: http}}", "/", &[], true),
        ("{scheme: {exact: https}}", "https://a/", &[], true),
        ("{method: {exact: GET}}", "/", &[], true),
        ("{method: {regex: 'POST|PUT'}}", "/", &[], false),
        ("{authority: {exact: 'a:80'}}", "/", &[("host", "a:80")], true),
        ("{authority: {prefix: a}}", "http://a.b/", &[("host", "other")], true),
        ("{authority: {exact: a}}", "/", &[], false),
        ("{headers: {End-User: {exact: jason}}}", "/", &[("end-user", "jason")], true),
        ("{headers: {end-user: {exact: jason}}}", "/", &[("end-user", "jasonx")], false),
        ("{headers: {end-user: {exact: jason}}}", "/", &[], false),
        ("{headers: {x: {regex: '[a-c]+'}}}", "/", &[("x", "zzz"), ("x", "abc")], false),
        ("{headers: {x: {regex: '[a-z]+,abc'}}}", "/", &[("x", "zzz"), ("x", "abc")], true),
        ("{withoutHeaders: {x: {exact: abc}}}", "/", &[("x", "zzz"), ("x", "abc")], true),
        ("{scheme: {exact: https}}", "/", &[("x-forwarded-proto", "https")], true),
        ("{scheme: {exact: https}}", "http://a/", &[("x-forwarded-proto", "https")], false),
        ("{scheme: {exact: ws}}", "/", &[("x-forwarded-proto", "ws")], false),
        ("{headers: {x: {}}}", "/", &[("x", "")], true),
        ("{headers: {x: {regex: '*'}}}", "/", &[], false),
        ("{headers: {x: {exact: a}, y: {exact: b}}}", "/", &[("x", "a")], false),
        ("{withoutHeaders: {x: {}}}", "/", &[], true),
        ("{withoutHeaders: {x: {}}}", "/", &[("x", "1")], false),
        ("{withoutHeaders: {x: {exact: a}}}", "/", &[("x", "b")], true),
        ("{withoutHeaders: {x: {exact: a}}}", "/", &[], true),
        ("{withoutHeaders: {x: {exact: ''}}}", "/", &[], false),
        ("{queryParams: {k: {exact: v}}}", "/?a=b&k=v", &[], true),
        ("{queryParams: {k: {exact: v}}}", "/?k=w&k=v", &[], false),
        ("{queryParams: {k: {exact: ''}}}", "/?k", &[], true),
        ("{queryParams: {k: {}}}", "/?k=1", &[], true),
        ("{queryParams: {k: {}}}", "/", &[], false),
        ("{queryParams: {k: {regex: '[0-9]+'}}}", "/?k=12", &[], true),
        ("{port: 80}", "/", &[], true),
        ("{sourceNamespace: shop}", "/", &[], true),
        ("{sourceNamespace: other}", "/", &[], false),
        ("{sourceLabels: {app: client}}", "/", &[], true),
        ("{sourceLabels: {app: client, version: v1}}", "/", &[], false),
        ("{gateways: [mesh, in]}", "/", &[], true),
        ("{uri: {exact: /a}, headers: {x: {exact: b}}}", "/a", &[], false),
        ("{uri: {exact: /a}}, {headers: {x: {exact: b}}}", "/c", &[("x", "b")], true),
    ];
    for (m, uri, headers, expected) in table {
        let routes = matching(m);
        let found = find(&routes, &request(uri, headers), 80, &source());
        assert_eq!(found.is_some(), *expected, "{m} on {uri} {headers:?}");
    }
}

#[test]
fn bytes_that_are_no_text_match_no_regex() {
    let routes = matching("{headers: {x: {regex: '.*'}}}");
    let mut request = request("/", &[]);
    request.headers.insert("x", HeaderValue::from_bytes(b"\xff").unwrap());
    assert!(find(&routes, &request, 80, &source()).is_none());
}

#[test]
fn the_first_route_wins_and_says_what_matched() {
    let routes = routes(
        "- name: one\n  match: [{uri: {prefix: /a}}, {uri: {prefix: /b}}]\n  route: [{destination: {host: a}}]\n\
         - name: two\n  match: [{uri: {exact: /abc}}]\n  route: [{destination: {host: a}}]\n\
         - route: [{destination: {host: a}}]",
    );
    let name = |uri: &str| {
        let request = request(uri, &[]);
        let (route, matched) = find(&routes, &request, 80, &source()).unwrap();
        (route.name.to_string(), matched.map(|m| format!("{:?}", m.uri)))
    };
    assert_eq!(name("/abc"), ("one".to_owned(), Some("Some(Prefix(\"/a\"))".to_owned())));
    assert_eq!(name("/b"), ("one".to_owned(), Some("Some(Prefix(\"/b\"))".to_owned())));
    assert_eq!(name("/c"), ("http[2]".to_owned(), None));
}

#[test]
fn draws_follow_the_weights() {
    let backend = |weight: u32| WeightedBackend {
        weight,
        headers: HeaderOps::default(),
        backend: Backend::Missing("x".into()),
    };
    let backends = [backend(90), backend(10)];
    fastrand::seed(42);
    let hits = (0..10_000).filter(|_| draw(&backends).weight == 10).count();
    assert!((900..1_100).contains(&hits), "{hits}");
    assert_eq!(draw(&[backend(1)]).weight, 1);
    let largest = [backend(u32::MAX), backend(u32::MAX)];
    draw(&largest);
}

#[test]
fn shares_hit_as_often_as_they_say() {
    fastrand::seed(42);
    let count =
        |percent: u32| (0..10_000).filter(|_| hits(Percentage(percent * Percentage::PERCENT))).count();
    assert_eq!(count(0), 0);
    assert_eq!(count(100), 10_000);
    assert!((900..1_100).contains(&count(10)));
}

#[test]
fn an_upgrade_is_a_get_however_it_is_spelled() {
    let mut asks = http::Extensions::new();
    asks.insert(h2::ext::Protocol::from_static("websocket"));
    assert_eq!(method(&Method::CONNECT, &asks), Method::GET);
    assert_eq!(method(&Method::CONNECT, &http::Extensions::new()), Method::CONNECT);
    assert_eq!(method(&Method::POST, &http::Extensions::new()), Method::POST);
    let gets = RequestMatch { method: Some(StringMatch::Exact("GET".to_owned())), ..RequestMatch::default() };
    let (mut request, ()) = Request::connect("http://a/").body(()).unwrap().into_parts();
    assert!(!matching::holds(&gets, &request, 80, &source()));
    request.extensions = asks;
    assert!(matching::holds(&gets, &request, 80, &source()));
}

fn matched(uri: Option<StringMatch>) -> RequestMatch {
    RequestMatch { uri, ..RequestMatch::default() }
}

#[test]
fn paths_are_rewritten() {
    let prefix = |prefix: &str| Some(matched(Some(StringMatch::Prefix(prefix.to_owned()))));
    let exact = |exact: &str| Some(matched(Some(StringMatch::Exact(exact.to_owned()))));
    let uri = |uri: &str| PathRewrite::Uri(uri.to_owned());
    let regex = |m: &str, to: &str| PathRewrite::Regex(Regex::new(m).unwrap(), to.to_owned());
    let table = [
        ("/a/b?q=1", uri("/x"), prefix("/a"), "/x/b?q=1"),
        ("/a/b", uri("/"), prefix("/a/"), "/b"),
        ("/a/b", uri("/"), prefix("/a"), "//b"),
        ("/a", uri("x"), prefix("/a"), "/x"),
        ("/a?q=1", uri("/x"), exact("/a"), "/x?q=1"),
        ("/a?q=1", uri("/x?r=2"), exact("/a"), "/x?r=2"),
        ("/a/1", uri("/x"), Some(matched(Some(StringMatch::Regex(Regex::new("^(?:/a/.)$").unwrap())))), "/x"),
        ("/a", uri("/v2/"), None, "/v2/a"),
        ("/a", uri("/"), Some(matched(None)), "/a"),
        ("/a/1/a/2?q=a", regex("a/([0-9])", "b/${1}${1}"), None, "/b/11/b/22?q=a"),
        ("/a", regex("zzz", "y"), None, "/a"),
        ("http://h/a", uri("/x"), exact("/a"), "http://h/x"),
    ];
    for (from, path, matched, to) in table {
        let mut request = request(from, &[("host", "h")]);
        let change = Rewrite { path: Some(path), authority: None };
        rewrite(&mut request, &change, matched.as_ref());
        assert_eq!(request.uri.to_string(), to, "{change:?}");
        assert_eq!(request.headers["host"], "h");
    }
}

#[test]
fn the_authority_changes_wherever_it_stands() {
    let change = Rewrite { path: None, authority: Some("new:8080".parse().unwrap()) };
    let mut h1 = request("/a", &[("host", "old")]);
    rewrite(&mut h1, &change, None);
    assert_eq!((h1.headers["host"].to_str().unwrap(), h1.uri.to_string().as_str()), ("new:8080", "/a"));
    let mut h2 = request("http://old/a", &[]);
    rewrite(&mut h2, &change, None);
    assert_eq!(h2.uri, "http://new:8080/a");
    assert!(!h2.headers.contains_key("host"));
    let mut none = request("/a", &[]);
    apply_request(&mut none, &HeaderOp { authority: Some("x".parse().unwrap()), ..HeaderOp::default() });
    assert_eq!(none.headers["host"], "x");
}

#[test]
fn set_then_add_then_remove() {
    let pair = |name: &'static str, value: &'static str| {
        (http::HeaderName::from_static(name), HeaderValue::from_static(value))
    };
    let op = HeaderOp {
        set: vec![pair("a", "set"), pair("gone", "x")],
        add: vec![pair("a", "added"), pair("b", "added")],
        remove: vec![http::HeaderName::from_static("gone")],
        authority: None,
    };
    let mut request = request("/", &[("a", "1"), ("a", "2"), ("b", "1")]);
    apply_request(&mut request, &op);
    let values =
        |name: &str| request.headers.get_all(name).iter().map(|v| v.to_str().unwrap()).collect::<Vec<_>>();
    assert_eq!(values("a"), ["set", "added"]);
    assert_eq!(values("b"), ["1", "added"]);
    assert!(values("gone").is_empty());
    let mut response = http::HeaderMap::new();
    apply_response(&mut response, &op);
    assert_eq!(response.len(), 3);
}

#[test]
fn locations() {
    let redirect = |uri: &str, authority: &str, port: Option<RedirectPort>, scheme: &str| Redirect {
        uri: Some(uri.to_owned()).filter(|text| !text.is_empty()),
        prefix: false,
        authority: Some(authority.to_owned()).filter(|text| !text.is_empty()),
        port,
        scheme: Some(scheme.to_owned()).filter(|text| !text.is_empty()),
        status: StatusCode::MOVED_PERMANENTLY,
    };
    let number = |number| Some(RedirectPort::Number(number));
    let table = [
        (redirect("/x", "", None, ""), "h", "http://h/x?q=1"),
        (redirect("/x?r=2", "", None, ""), "h:8080", "http://h:8080/x?r=2"),
        (redirect("", "new", None, ""), "h:8080", "http://new/a?q=1"),
        (redirect("", "new:81", None, ""), "h", "http://new:81/a?q=1"),
        (redirect("", "", None, "https"), "h", "https://h/a?q=1"),
        (redirect("", "", None, "https"), "h:80", "https://h/a?q=1"),
        (redirect("", "", None, "https"), "h:8443", "https://h:8443/a?q=1"),
        (redirect("", "", number(443), "https"), "h:8080", "https://h/a?q=1"),
        (redirect("", "", number(80), ""), "h:8080", "http://h/a?q=1"),
        (redirect("", "", number(80), "https"), "h", "https://h:80/a?q=1"),
        (redirect("", "new:81", number(82), ""), "h", "http://new:82/a?q=1"),
        (redirect("", "", Some(RedirectPort::ProtocolDefault), ""), "h:8080", "http://h/a?q=1"),
        (redirect("", "", Some(RedirectPort::RequestPort), ""), "h", "http://h:9080/a?q=1"),
        (redirect("", "", number(81), ""), "[2001:db8::1]", "http://[2001:db8::1]:81/a?q=1"),
    ];
    for (redirect, host, expected) in table {
        let request = request("/a?q=1", &[("host", host)]);
        assert_eq!(location(&redirect, &request, None, 9080), expected, "{redirect:?} at {host}");
    }
}
