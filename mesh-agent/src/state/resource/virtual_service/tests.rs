//! Fields of a `VirtualService`: what is accepted, what is refused, and where the error points.
#![expect(clippy::unwrap_used, reason = "tests")]

mod additions;
mod streams;

use serde_json::{Value, json};

use super::*;
use crate::state::{
    defaults,
    snapshot::{Abort, PathRewrite, Percentage, RedirectPort},
};

fn read(spec: &Value) -> Checked<VirtualService> {
    check(&ObjectKey::new("VirtualService", "default", "reviews"), None, &BTreeMap::new(), spec)
}

/// A service with one rule: a plain route with these fields on top.
#[expect(clippy::needless_pass_by_value, reason = "called with json! literals")]
fn rule(fields: Value) -> Value {
    let mut rule = json!({"route": [{"destination": {"host": "reviews"}}]});
    for (name, value) in fields.as_object().unwrap() {
        rule[name] = value.clone();
    }
    json!({"hosts": ["reviews"], "http": [rule]})
}

fn good(fields: Value) -> HttpRule {
    read(&rule(fields)).unwrap().http.remove(0)
}

fn refused(table: Vec<(Value, &str, &str)>) {
    for (spec, field, message) in table {
        let error = read(&spec).unwrap_err();
        assert_eq!(error.field, field, "{spec}: {}", error.message);
        assert!(error.message.contains(message), "{spec}: {}", error.message);
    }
}

#[test]
fn bad_specs() {
    let http = json!([{"route": [{"destination": {"host": "a"}}]}]);
    let with_hosts = |hosts: Value| json!({"hosts": hosts, "http": http});
    refused(vec![
        (with_hosts(json!(["*"])), "hosts[0]", "wildcard host *"),
        (with_hosts(json!(["a", "a.*.b"])), "hosts[1]", "not a domain name"),
        (with_hosts(json!(["a", "b", "a"])), "hosts[2]", "duplicate hosts"),
        (json!({"hosts": ["a"]}), "http", "http, tcp or tls must be provided"),
        (json!({"hosts": ["a"], "http": [], "tls": []}), "http", "http, tcp or tls must be provided"),
        (json!({"hosts": ["a"], "http": http, "exportTo": ["*", "."]}), "exportTo", "both public"),
        (json!({"hosts": "a", "http": http}), "hosts", "invalid type"),
    ]);
    assert!(
        read(&json!({"hosts": ["*"], "gateways": ["in"], "http": http})).is_ok_and(|service| !service.mesh)
    );
}

#[test]
fn bad_rules() {
    refused(vec![
        (rule(json!({"tmeout": "2s"})), "http[0].tmeout", "unknown field"),
        (rule(json!({"timeout": "2"})), "http[0].timeout", "not a duration"),
        (rule(json!({"timeout": "1us"})), "http[0].timeout", "1ms"),
        (rule(json!({"redirect": {"uri": "/"}})), "http[0].redirect", "both route and redirect"),
        (
            rule(json!({"directResponse": {"status": 200}})),
            "http[0].directResponse",
            "both route and directResponse",
        ),
        (rule(json!({"route": []})), "http[0]", "is required"),
        (
            rule(json!({"route": [], "redirect": {"uri": "/"}, "rewrite": {"uri": "/"}})),
            "http[0].redirect",
            "both rewrite and redirect",
        ),
        (
            rule(json!({"route": [], "redirect": {"uri": "/"}, "fault": {}})),
            "http[0].redirect",
            "both fault and redirect",
        ),
        (
            rule(json!({"headers": {"request": {"set": {"a b": "c"}}}})),
            "http[0].headers.request.set.a b",
            "header name",
        ),
    ]);
}

#[test]
fn bad_matches() {
    let m = |m: Value| rule(json!({"match": [{"uri": {"prefix": "/"}}, m]}));
    refused(vec![
        (m(json!({"url": {}})), "http[0].match[1].url", "unknown field"),
        (m(json!({"uri": {}})), "http[0].match[1].uri", "one of exact"),
        (m(json!({"uri": {"regex": "["}})), "http[0].match[1].uri.regex", "not a regular expression"),
        (m(json!({"uri": {"suffix": "x"}})), "http[0].match[1].uri.suffix", "unknown field"),
        (m(json!({"method": {"prefix": ""}})), "http[0].match[1].method.prefix", "not be empty"),
        (
            m(json!({"headers": {"end user": {"exact": "a"}}})),
            "http[0].match[1].headers.end user",
            "header name",
        ),
        (
            m(json!({"headers": {"uri": {"exact": "a"}}})),
            "http[0].match[1].headers.uri",
            "with the field uri",
        ),
        (m(json!({"headers": {"x": {"regex": "("}}})), "http[0].match[1].headers.x.regex", "not a regular"),
        (
            m(json!({"queryParams": {"x": {"regex": "("}}})),
            "http[0].match[1].queryParams.x.regex",
            "not a regular",
        ),
        (m(json!({"port": 0})), "http[0].match[1].port", "nonzero"),
        (m(json!({"port": 70000})), "http[0].match[1].port", "70000"),
        (m(json!({"statPrefix": 1})), "http[0].match[1].statPrefix", "invalid type"),
    ]);
}

#[test]
fn bad_routes() {
    let route = |route: Value| rule(json!({"route": route}));
    let two = |a: Value, b: Value| {
        route(
            json!([{"destination": {"host": "a"}, "weight": a}, {"destination": {"host": "b"}, "weight": b}]),
        )
    };
    refused(vec![
        (route(json!([{"weight": 1}])), "http[0].route[0]", "missing field `destination`"),
        (route(json!([{"destination": {}}])), "http[0].route[0].destination", "missing field `host`"),
        (
            route(json!([{"destination": {"host": ""}}])),
            "http[0].route[0].destination.host",
            "not a domain name",
        ),
        (route(json!([{"destination": {"host": "*.a"}}])), "http[0].route[0].destination.host", "wildcard"),
        (
            route(json!([{"destination": {"host": "a", "port": {"number": 0}}}])),
            "http[0].route[0].destination.port.number",
            "nonzero",
        ),
        (two(json!(90), json!(-10)), "http[0].route[1].weight", "weight -10 < 0"),
        (two(json!(90), json!("10")), "http[0].route[1].weight", "invalid type"),
        (two(json!(0), json!(0)), "http[0].route", "total destination weight = 0"),
        (two(json!(null), json!(null)), "http[0].route", "total destination weight = 0"),
        (two(json!(2_000_000_000), json!(2_000_000_000)), "http[0].route", "too large"),
        (
            route(json!([{"destination": {"host": "a"}, "headers": {"response": {"remove": ["a b"]}}}])),
            "http[0].route[0].headers.response.remove[0]",
            "header name",
        ),
    ]);
}

#[test]
fn weights() {
    let of = |weights: &[u32]| -> Vec<(usize, u32)> {
        let route: Vec<Value> =
            weights.iter().map(|weight| json!({"destination": {"host": "a"}, "weight": weight})).collect();
        let RuleAction::Forward(route) = good(json!({"route": route})).action else { panic!("a route") };
        route.iter().map(|destination| (destination.index, destination.weight)).collect()
    };
    assert_eq!(of(&[0]), [(0, 1)], "a single destination ignores its weight");
    assert_eq!(of(&[7]), [(0, 1)]);
    assert_eq!(of(&[90, 0, 10]), [(0, 90), (2, 10)], "those of weight 0 are left out");
    assert_eq!(of(&[1, 2]), [(0, 1), (1, 2)], "any sum will do");
}

#[test]
fn bad_answers() {
    let redirect = |redirect: Value| rule(json!({"route": [], "redirect": redirect}));
    let direct = |direct: Value| rule(json!({"route": [], "directResponse": direct}));
    let rewrite = |rewrite: Value| rule(json!({"rewrite": rewrite}));
    refused(vec![
        (redirect(json!({})), "http[0].redirect", "must specify"),
        (redirect(json!({"uri": "/", "redirectCode": 200})), "http[0].redirect.redirectCode", "200"),
        (redirect(json!({"uri": "/", "redirectCode": 304})), "http[0].redirect.redirectCode", "304"),
        (redirect(json!({"scheme": "ftp"})), "http[0].redirect.scheme", "invalid redirect scheme"),
        (redirect(json!({"uri": "/a b"})), "http[0].redirect.uri", "not a path"),
        (redirect(json!({"authority": "a b"})), "http[0].redirect.authority", "host name"),
        (
            redirect(json!({"port": 80, "derivePort": "FROM_REQUEST_PORT"})),
            "http[0].redirect.derivePort",
            "cannot both",
        ),
        (redirect(json!({"derivePort": "X"})), "http[0].redirect.derivePort", "unknown variant"),
        (direct(json!({"status": 199})), "http[0].directResponse.status", "200 to 600"),
        (direct(json!({"status": 601})), "http[0].directResponse.status", "200 to 600"),
        (direct(json!({"status": 200, "body": {}})), "http[0].directResponse.body", "string or bytes"),
        (
            direct(json!({"status": 200, "body": {"string": "x".repeat(1024 * 1024 + 1)}})),
            "http[0].directResponse.body",
            "1048577",
        ),
        (rewrite(json!({})), "http[0].rewrite", "must specify"),
        (rewrite(json!({"uri": "/a#b"})), "http[0].rewrite.uri", "not a path"),
        (
            rewrite(json!({"uri": "/", "uriRegexRewrite": {"match": "a", "rewrite": "b"}})),
            "http[0].rewrite.uriRegexRewrite",
            "only contain one",
        ),
        (
            rewrite(json!({"uriRegexRewrite": {"match": "(", "rewrite": "b"}})),
            "http[0].rewrite.uriRegexRewrite.match",
            "not a regular expression",
        ),
        (
            rewrite(json!({"uriRegexRewrite": {"match": "(a)", "rewrite": "\\2"}})),
            "http[0].rewrite.uriRegexRewrite.rewrite",
            "names a group",
        ),
        (
            rewrite(json!({"uriRegexRewrite": {"match": "(a)", "rewrite": "b\\"}})),
            "http[0].rewrite.uriRegexRewrite.rewrite",
            "backslash",
        ),
    ]);
}

#[test]
fn good_answers() {
    let answer = |fields: Value| good(fields).action;
    let redirect = json!({"route": [], "redirect": {"derivePort": "FROM_PROTOCOL_DEFAULT"}});
    let RuleAction::Redirect(redirect) = answer(redirect) else { panic!("a redirect") };
    assert_eq!(redirect.status, defaults::REDIRECT_STATUS);
    assert!(matches!(redirect.port, Some(RedirectPort::ProtocolDefault)));
    let direct = json!({"route": null, "directResponse": {"status": 503, "body": {"bytes": "aGk="}}});
    let RuleAction::Direct { status, body } = answer(direct) else { panic!("an answer") };
    assert_eq!((status.as_u16(), &body[..]), (503, &b"hi"[..]));
    let regex = json!({"match": "^/(\\d+)/x", "rewrite": "/$1/\\1\\\\"});
    let Some(PathRewrite::Regex(_, replacement)) =
        good(json!({"rewrite": {"uriRegexRewrite": regex}})).rewrite.unwrap().path
    else {
        panic!("a regex")
    };
    assert_eq!(replacement, "/$$1/${1}\\");
}

#[test]
fn bad_faults() {
    let fault = |fault: Value| rule(json!({"fault": fault}));
    refused(vec![
        (fault(json!({})), "http[0].fault", "must have an abort and/or a delay"),
        (fault(json!({"delay": {}})), "http[0].fault.delay.fixedDelay", "needs fixedDelay"),
        (fault(json!({"delay": {"fixedDelay": "0s"}})), "http[0].fault.delay.fixedDelay", "1ms"),
        (
            fault(json!({"delay": {"exponentialDelay": "1s"}})),
            "http[0].fault.delay.exponentialDelay",
            "not supported",
        ),
        (
            fault(json!({"delay": {"fixedDelay": "1s", "percentage": {"value": 0.00009}}})),
            "http[0].fault.delay.percentage.value",
            "the least above 0",
        ),
        (
            fault(json!({"delay": {"fixedDelay": "1s", "percentage": {"value": 100.1}}})),
            "http[0].fault.delay.percentage.value",
            "0..100",
        ),
        (
            fault(json!({"delay": {"fixedDelay": "1s", "percent": -1}})),
            "http[0].fault.delay.percent",
            "0..100",
        ),
        (fault(json!({"abort": {}})), "http[0].fault.abort", "either httpStatus or grpcStatus"),
        (
            fault(json!({"abort": {"httpStatus": 500, "grpcStatus": "ABORTED"}})),
            "http[0].fault.abort",
            "either httpStatus or grpcStatus",
        ),
        (fault(json!({"abort": {"httpStatus": 99}})), "http[0].fault.abort.httpStatus", "200 to 600"),
        (fault(json!({"abort": {"grpcStatus": "LATE"}})), "http[0].fault.abort.grpcStatus", "LATE"),
        (fault(json!({"abort": {"http2Error": "x"}})), "http[0].fault.abort.http2Error", "not supported"),
    ]);
}

#[test]
fn good_faults() {
    let delay = |delay: Value| good(json!({"fault": {"delay": delay}})).fault.unwrap().delay.unwrap();
    let (share, time) = delay(json!({"fixedDelay": "2s", "percentage": {"value": 0.1}}));
    assert_eq!((share, time), (Percentage(1_000), Duration::from_secs(2)));
    assert_eq!(delay(json!({"fixedDelay": "2s", "percent": 50})).0, Percentage(500_000));
    assert_eq!(delay(json!({"fixedDelay": "2s", "percentage": {"value": 100}})).0, Percentage::WHOLE);
    assert_eq!(delay(json!({"fixedDelay": "2s", "percentage": {"value": 0.0001}})).0, Percentage(1));
    assert_eq!(delay(json!({"fixedDelay": "2s"})).0, Percentage(0), "unset hits nothing");
    let abort = |abort: Value| good(json!({"fault": {"abort": abort}})).fault.unwrap().abort.unwrap().1;
    assert!(matches!(abort(json!({"httpStatus": 555})), Abort::Http(status) if status == 555));
    assert!(matches!(abort(json!({"grpcStatus": "UNAVAILABLE"})), Abort::Grpc(14)));
    assert!(matches!(abort(json!({"grpcStatus": "8"})), Abort::Grpc(8)));
}

#[test]
fn retries() {
    let bad = |retries: Value| rule(json!({"retries": retries}));
    refused(vec![
        (bad(json!({"attempts": -1})), "http[0].retries.attempts", "negative"),
        (bad(json!({"attempts": 0, "perTryTimeout": "2s"})), "http[0].retries.attempts", "set to 0"),
        (bad(json!({"retryOn": "5xx"})), "http[0].retries.attempts", "set to 0"),
        (bad(json!({"attempts": 1, "perTryTimeout": "0s"})), "http[0].retries.perTryTimeout", "1ms"),
        (
            bad(json!({"attempts": 1, "retryOn": "5xx,often"})),
            "http[0].retries.retryOn",
            "\"often\" is not a valid",
        ),
        (bad(json!({"attempts": 1, "retryOn": "700"})), "http[0].retries.retryOn", "700"),
        (bad(json!({"retryRemoteLocalities": true})), "http[0].retries.attempts", "set to 0"),
        (bad(json!({"retryIgnorePreviousHosts": false})), "http[0].retries.attempts", "set to 0"),
    ]);
    let read = |retries: Value| good(json!({"retries": retries})).retries.unwrap();
    assert_eq!(read(json!({"attempts": 0})).attempts, 0);
    let all = read(json!({
        "attempts": 3, "perTryTimeout": "250ms", "backoff": "10ms",
        "retryOn": "5xx, gateway-error,reset,connect-failure,refused-stream,retriable-4xx,503,unavailable,internal,\
                    retriable-headers,envoy-ratelimited,reset-before-request,http3-post-connect-failure"
    }));
    assert_eq!(all.per_try_timeout, Some(Duration::from_millis(250)));
    let expected = RetryOn {
        server_error: true,
        gateway_error: true,
        reset: true,
        connect_failure: true,
        refused_stream: true,
        retriable_4xx: true,
        status_codes: vec![503],
        grpc: vec![14, 13],
        retriable_headers: true,
        envoy_ratelimited: true,
        reset_before_request: true,
    };
    assert_eq!(all.on, Some(expected));
    assert!(read(json!({"attempts": 1})).on.is_none());
}

#[test]
fn no_timeout_has_two_spellings() {
    assert_eq!(good(json!({})).timeout, None);
    assert_eq!(good(json!({"timeout": "0s"})).timeout, Some(Duration::ZERO));
    assert_eq!(good(json!({"timeout": "1m30s"})).timeout, Some(Duration::from_secs(90)));
}
