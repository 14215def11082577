//! Roots and delegates: which matches come together, and what is said of those that do not.

use super::*;
use crate::state::snapshot::StringMatch;

/// The routes of a root with this match and a delegate with that one, and the problems.
fn delegated(root: &str, delegate: &str) -> (Vec<Arc<HttpRoute>>, Vec<Problem>) {
    let root = format!(
        "{{hosts: [a], http: [{{name: r, match: [{root}], delegate: {{name: d, namespace: shop}}}}]}}"
    );
    let delegate = format!("{{http: [{{match: [{delegate}], route: [{{destination: {{host: {A}}}}}]}}]}}");
    let text = service("default", "a", "{port: 80}")
        + &istio("VirtualService default/a", &root)
        + &istio("VirtualService shop/d", &delegate);
    let (snapshot, problems) = build(&text);
    (routes(&snapshot, A, 80), problems)
}

#[test]
fn a_delegates_match_must_be_covered() {
    let table = [
        ("{uri: {prefix: /a}}", "{uri: {prefix: /a}}", true),
        ("{uri: {prefix: /a}}", "{uri: {prefix: /ab}}", true),
        ("{uri: {prefix: /a}}", "{uri: {exact: /a/b}}", true),
        ("{uri: {prefix: /a}}", "{uri: {prefix: /}}", false),
        ("{uri: {prefix: /a}}", "{uri: {exact: /b}}", false),
        ("{uri: {exact: /a}}", "{uri: {exact: /a}}", true),
        ("{uri: {exact: /a}}", "{uri: {prefix: /a}}", false),
        ("{uri: {prefix: /a}}", "{uri: {regex: '/a.*'}}", false),
        ("{uri: {regex: '/a.*'}}", "{uri: {exact: /a}}", false),
        ("{uri: {regex: '/a.*'}}", "{method: {exact: GET}}", true),
        ("{uri: {prefix: /a}, ignoreUriCase: true}", "{uri: {prefix: /a}}", false),
        ("{headers: {x: {exact: a}}}", "{headers: {x: {exact: a}}}", true),
        ("{headers: {x: {exact: a}}}", "{headers: {x: {exact: b}}}", false),
        ("{headers: {x: {}}}", "{headers: {x: {exact: b}}}", true),
        ("{headers: {x: {exact: a}}}", "{headers: {x: {}}}", false),
        ("{headers: {x: {exact: a}}}", "{headers: {y: {exact: b}}}", true),
        ("{queryParams: {k: {prefix: a}}}", "{queryParams: {k: {exact: b}}}", false),
        ("{method: {exact: GET}}", "{method: {exact: POST}}", false),
        ("{authority: {prefix: a}}", "{authority: {exact: ab}}", true),
        ("{port: 80}", "{port: 80}", true),
        ("{port: 80}", "{port: 81}", false),
        ("{sourceNamespace: shop}", "{sourceNamespace: other}", false),
        ("{sourceLabels: {app: x}}", "{sourceLabels: {app: y}}", false),
        ("{sourceLabels: {app: x}}", "{sourceLabels: {version: v1}}", true),
        ("{gateways: [mesh]}", "{gateways: [mesh, in]}", false),
        ("{gateways: [mesh, in]}", "{gateways: [mesh]}", true),
        ("{uri: {prefix: /a}}, {uri: {prefix: /b}}", "{uri: {prefix: /bc}}", true),
        ("{uri: {prefix: /a}}", "{uri: {prefix: /ab}}, {uri: {prefix: /c}}", false),
    ];
    for (root, delegate, covered) in table {
        let (routes, problems) = delegated(root, delegate);
        assert_eq!(&*routes[0].name == "r", covered, "{root} {delegate}: {routes:?}");
        assert_eq!(problems.is_empty(), covered, "{problems:?}");
        let told =
            |problem: &str| problem.contains("VirtualService shop/d: spec.http[0].match: is not covered by");
        assert!(texts(&problems).iter().all(|problem| told(problem)), "{problems:?}");
    }
}

#[test]
fn both_conditions_are_asked_for() {
    let root = "{name: m, uri: {prefix: /a}, headers: {x: {exact: '1'}}, statPrefix: s, sourceNamespace: shop}, \
                {uri: {prefix: /}}";
    let (routes, problems) = delegated(root, "{name: n, uri: {exact: /ab}, withoutHeaders: {y: {}}}");
    assert_eq!(problems, []);
    let [first, second] = &routes[0].matches[..] else { panic!("two: {routes:?}") };
    assert!(matches!(&first.uri, Some(StringMatch::Exact(path)) if path == "/ab"));
    assert_eq!((first.headers.len(), first.without_headers.len()), (1, 1));
    assert_eq!((first.name.as_deref(), first.stat_prefix.as_deref()), (Some("r.m-n"), Some("s")));
    assert_eq!(first.source_namespace.as_deref(), Some("shop"));
    assert_eq!((second.headers.len(), second.name.as_deref()), (0, Some("r.n")));
}

#[test]
fn rewriting_the_authority_wins_over_headers() {
    let headers = "headers: {request: {set: {host: b.example}}}";
    let spec = format!(
        "{{hosts: [a], http: [{{rewrite: {{authority: a.example}}, {headers}, route: [{{destination: {{host: a}}, {headers}}}]}}]}}"
    );
    let text = service("default", "a", "{port: 80}") + &istio("VirtualService default/a", &spec);
    let route = routes(&build(&text).0, A, 80).remove(0);
    assert_eq!(route.rewrite.authority.as_ref().unwrap(), "a.example");
    let RouteAction::Forward(backends) = &route.action else { panic!("a route") };
    assert!(route.headers.request.authority.is_none() && backends[0].headers.request.authority.is_none());
}
