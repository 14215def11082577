//! What holds of matching and of header operations whatever is written and whatever is sent.

use std::collections::BTreeMap;

use http::{HeaderMap, HeaderName, Method};
use proptest::{collection::vec, option, prelude::*, sample::select};

use super::*;
use crate::state::{
    defaults,
    snapshot::{Fault, HeaderMatch, RouteAction},
};

/// Few names and values, so that what is asked for is often there.
const NAMES: [&str; 4] = ["x-a", "x-b", "x-c", "end-user"];

fn text() -> impl Strategy<Value = String> {
    "[ab/]{0,3}"
}

fn string_match() -> impl Strategy<Value = StringMatch> {
    prop_oneof![
        text().prop_map(StringMatch::Exact),
        "[ab/]{1,2}".prop_map(StringMatch::Prefix),
        "[ab]{1,2}[*+?]?"
            .prop_map(|regex| StringMatch::Regex(Regex::new(&format!("^(?:{regex})$")).unwrap())),
    ]
}

fn header_match() -> impl Strategy<Value = (HeaderName, HeaderMatch)> {
    let value = prop_oneof![
        1 => Just(HeaderMatch::Present),
        3 => string_match().prop_map(HeaderMatch::Value),
    ];
    (select(&NAMES[..]).prop_map(HeaderName::from_static), value)
}

/// One condition, as a match that asks for nothing else.
fn condition() -> impl Strategy<Value = RequestMatch> {
    let path = string_match().prop_map(|m| match m {
        StringMatch::Exact(path) => StringMatch::Exact(format!("/{path}")),
        StringMatch::Prefix(path) => StringMatch::Prefix(format!("/{path}")),
        regex @ StringMatch::Regex(_) => regex,
    });
    let empty = RequestMatch::default;
    prop_oneof![
        (path, any::<bool>()).prop_map(move |(uri, ignore)| RequestMatch {
            uri: Some(uri),
            ignore_uri_case: ignore,
            ..empty()
        }),
        select(&["GET", "POST"][..]).prop_map(move |method| RequestMatch {
            method: Some(StringMatch::Exact(method.to_owned())),
            ..empty()
        }),
        string_match().prop_map(move |m| RequestMatch { authority: Some(m), ..empty() }),
        header_match().prop_map(move |m| RequestMatch { headers: vec![m], ..empty() }),
        header_match().prop_map(move |m| RequestMatch { without_headers: vec![m], ..empty() }),
        ("[kl]", string_match()).prop_map(move |m| RequestMatch { query_params: vec![m], ..empty() }),
        select(&[80_u16, 81][..]).prop_map(move |port| RequestMatch { port: Some(port), ..empty() }),
        select(&["shop", "other"][..])
            .prop_map(move |of| RequestMatch { source_namespace: Some(of.to_owned()), ..empty() }),
        select(&["client", "other"][..]).prop_map(move |app| RequestMatch {
            source_labels: vec![("app".to_owned(), app.to_owned())],
            ..empty()
        }),
    ]
}

/// One match that asks for all of these; of what can be said once only, the first is taken.
fn all_of(conditions: &[RequestMatch]) -> (RequestMatch, Vec<RequestMatch>) {
    let mut all = RequestMatch::default();
    let mut taken = Vec::new();
    for one in conditions.iter().cloned() {
        let twice = (all.uri.is_some() && one.uri.is_some())
            || (all.method.is_some() && one.method.is_some())
            || (all.authority.is_some() && one.authority.is_some())
            || (all.port.is_some() && one.port.is_some())
            || (all.source_namespace.is_some() && one.source_namespace.is_some());
        if twice {
            continue;
        }
        taken.push(one.clone());
        all.ignore_uri_case |= one.ignore_uri_case;
        all.uri = all.uri.or(one.uri);
        all.method = all.method.or(one.method);
        all.authority = all.authority.or(one.authority);
        all.port = all.port.or(one.port);
        all.source_namespace = all.source_namespace.or(one.source_namespace);
        all.headers.extend(one.headers);
        all.without_headers.extend(one.without_headers);
        all.query_params.extend(one.query_params);
        all.source_labels.extend(one.source_labels);
    }
    (all, taken)
}

type Headers = Vec<(&'static str, String)>;

/// The same headers with their names in another order; values of one name keep theirs, for they are one list (RFC 9110
/// section 5.3).
fn turned(given: &Headers, order: &Headers) -> Headers {
    let mut left = given.clone();
    let mut next = |name: &'static str| {
        let place = left.iter().position(|(other, _)| *other == name).unwrap();
        left.remove(place)
    };
    order.iter().map(|(name, _)| next(name)).collect()
}

fn headers() -> impl Strategy<Value = Headers> {
    vec((select(&NAMES[..]), "[ab]{0,3}"), 0..6)
}

fn sent() -> impl Strategy<Value = Parts> {
    let query = option::of(vec(("[kl]", "[ab]{0,2}"), 0..3));
    let parts = (select(&["GET", "POST"][..]), "[abAB/]{0,3}", query, "[ab]{1,2}", headers());
    parts.prop_map(|(method, path, query, host, headers)| {
        let query = query.map(|query| {
            let params: Vec<String> = query.iter().map(|(name, value)| format!("{name}={value}")).collect();
            format!("?{}", params.join("&"))
        });
        let mut parts = request(&format!("/{path}{}", query.unwrap_or_default()), &[("host", &host)]);
        parts.method = Method::from_bytes(method.as_bytes()).unwrap();
        parts.headers.extend(map(&headers));
        parts
    })
}

fn map(headers: &[(&'static str, String)]) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        map.append(*name, value.parse().unwrap());
    }
    map
}

/// Whether a route with these matches takes the request.
fn takes(matches: Vec<RequestMatch>, request: &Parts) -> bool {
    let route = HttpRoute {
        name: "r".into(),
        origin: "o".into(),
        matches,
        action: RouteAction::Direct { status: StatusCode::OK, body: bytes::Bytes::new() },
        fault: Fault::default(),
        headers: HeaderOps::default(),
        rewrite: Rewrite::default(),
        timeout: None,
        retries: defaults::retry_policy(),
        mirrors: Vec::new(),
        cors: None,
        stat_name: None,
    };
    find(&[Arc::new(route)], request, 80, &source()).is_some()
}

fn op() -> impl Strategy<Value = HeaderOp> {
    let pairs = || {
        vec((select(&NAMES[..]), "[a-z]{0,3}"), 0..3).prop_map(|pairs| {
            let pairs = pairs.into_iter();
            pairs.map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap())).collect()
        })
    };
    let remove = vec(select(&NAMES[..]).prop_map(HeaderName::from_static), 0..2);
    (pairs(), pairs(), remove).prop_map(|(set, add, remove)| HeaderOp { set, add, remove, authority: None })
}

type Values = BTreeMap<String, Vec<Vec<u8>>>;

/// Values by name, in their order.
fn values(headers: &HeaderMap) -> Values {
    let mut values = Values::new();
    for (name, value) in headers {
        values.entry(name.to_string()).or_default().push(value.as_bytes().to_vec());
    }
    values
}

/// The same operations on a plain map: set, then add, then remove.
fn model(mut headers: Values, op: &HeaderOp) -> Values {
    for (name, value) in &op.set {
        headers.insert(name.to_string(), vec![value.as_bytes().to_vec()]);
    }
    for (name, value) in &op.add {
        headers.entry(name.to_string()).or_default().push(value.as_bytes().to_vec());
    }
    for name in &op.remove {
        headers.remove(name.as_str());
    }
    headers
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_match_holds_when_each_of_its_parts_does(
        conditions in vec(condition(), 0..4),
        request in sent(),
    ) {
        let (all, mut parts) = all_of(&conditions);
        for part in &mut parts {
            // It belongs to the uri, whichever condition brought it.
            part.ignore_uri_case = all.ignore_uri_case;
        }
        let each = parts.into_iter().all(|part| takes(vec![part], &request));
        prop_assert_eq!(takes(vec![all], &request), each);
    }

    #[test]
    fn a_further_condition_never_makes_a_match_wider(
        conditions in vec(condition(), 1..4),
        mut further in condition(),
        request in sent(),
    ) {
        let (before, _) = all_of(&conditions);
        // To ignore the case is no condition: it takes one back.
        further.ignore_uri_case = before.ignore_uri_case && before.uri.is_some();
        let (after, _) = all_of(&[before.clone(), further]);
        prop_assert!(!takes(vec![after], &request) || takes(vec![before], &request));
    }

    #[test]
    fn a_further_match_never_makes_a_route_narrower(
        conditions in vec(condition(), 1..4),
        further in condition(),
        request in sent(),
    ) {
        let more = [&conditions[..], &[further]].concat();
        prop_assert!(!takes(conditions, &request) || takes(more, &request));
    }

    #[test]
    fn headers_may_come_in_any_order(
        conditions in vec(condition(), 0..4),
        request in sent(),
        (given, order) in headers().prop_flat_map(|headers| (Just(headers.clone()), Just(headers).prop_shuffle())),
    ) {
        let (all, _) = all_of(&conditions);
        let (mut one, mut other) = (request.clone(), request);
        one.headers.extend(map(&given));
        other.headers.extend(map(&turned(&given, &order)));
        prop_assert_eq!(takes(vec![all.clone()], &one), takes(vec![all], &other));
    }

    #[test]
    fn operations_are_set_then_add_then_remove(given in headers(), op in op()) {
        let mut headers = map(&given);
        let expected = model(values(&headers), &op);
        apply_response(&mut headers, &op);
        prop_assert_eq!(values(&headers), expected);
    }

    #[test]
    fn what_is_not_named_stays_byte_for_byte(
        bytes in vec(0x80_u8..=0xff, 0..5),
        given in headers(),
        op in op(),
    ) {
        let mut headers = map(&given);
        headers.append("x-untouched", HeaderValue::from_bytes(&bytes).unwrap());
        headers.append("x-untouched", HeaderValue::from_static(" second"));
        let before = headers.clone();
        apply_response(&mut headers, &op);
        let both: Vec<_> = headers.get_all("x-untouched").iter().collect();
        prop_assert_eq!(both, before.get_all("x-untouched").iter().collect::<Vec<_>>());
        let named = |name: &HeaderName| {
            op.set.iter().chain(&op.add).any(|(named, _)| named == name) || op.remove.contains(name)
        };
        for name in before.keys().filter(|name| !named(name)) {
            let after: Vec<_> = headers.get_all(name).iter().collect();
            prop_assert_eq!(after, before.get_all(name).iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn set_and_remove_may_be_done_twice(given in headers(), op in op()) {
        let op = HeaderOp { add: Vec::new(), ..op };
        let mut once = map(&given);
        apply_response(&mut once, &op);
        let mut twice = once.clone();
        apply_response(&mut twice, &op);
        prop_assert_eq!(values(&once), values(&twice));
    }

    #[test]
    fn requests_and_responses_are_changed_alike(given in headers(), op in op()) {
        let mut response = map(&given);
        let mut asked = request("/", &[]);
        asked.headers = response.clone();
        apply_response(&mut response, &op);
        apply_request(&mut asked, &op);
        prop_assert_eq!(values(&response), values(&asked.headers));
    }
}

proptest! {
    // Each compiles a configuration of its own.
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn an_escaped_regex_is_an_exact_match(written in "[ -~]{1,12}", other in "[ -~]{0,12}") {
        let quoted = |text: &str| serde_json::to_string(text).unwrap();
        let exact = matching(&format!("{{headers: {{x: {{exact: {}}}}}}}", quoted(&written)));
        let regex = matching(&format!("{{headers: {{x: {{regex: {}}}}}}}", quoted(&regex::escape(&written))));
        let longer = format!("{written}{written}");
        for value in [&written, &other, &longer] {
            let mut request = request("/", &[]);
            request.headers.insert("x", value.parse().unwrap());
            let takes = |routes: &[Arc<HttpRoute>]| find(routes, &request, 80, &source()).is_some();
            prop_assert_eq!(takes(&exact), takes(&regex));
            prop_assert_eq!(takes(&exact), *value == written);
        }
    }
}
