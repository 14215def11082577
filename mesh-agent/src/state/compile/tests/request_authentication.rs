//! Which `RequestAuthentication`s hold for which pods and ports, and whose keys are carried over.

use super::*;
use crate::state::snapshot::{KeySet, Keys, Tokens};

const KEYS: &str =
    r#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc"}]}"#;

fn tokens_of(place: &str, scope: &str, keys: &str) -> String {
    let (namespace, name) = place.split_once('/').unwrap();
    format!(
        "---\n{{apiVersion: security.istio.io/v1beta1, kind: RequestAuthentication, \
         metadata: {{name: {name}, namespace: {namespace}}}, \
         spec: {{{scope}, jwtRules: [{{issuer: {name}, {keys}}}]}}}}\n"
    )
}

fn inline(place: &str, scope: &str) -> String {
    tokens_of(place, scope, &format!("jwks: '{KEYS}'"))
}

fn tokens(snapshot: &Snapshot, ip: &str) -> Arc<Tokens> {
    Arc::clone(&snapshot.workload_at(ip.parse().unwrap()).unwrap().authentication.tokens)
}

/// The issuers that are believed at a port of a pod.
fn issuers(snapshot: &Snapshot, ip: &str, port: u16) -> Vec<String> {
    tokens(snapshot, ip).of(port).map(|rule| rule.issuer.to_string()).collect()
}

#[test]
fn all_that_select_a_pod_hold_together() {
    let text = [
        pod("app", "web", "v1", "10.0.0.1"),
        pod("app", "db", "v1", "10.0.0.2"),
        pod("other", "web", "v1", "10.0.0.3"),
        service("app", "web", "{name: http, port: 80, targetPort: 8080}"),
        inline("app/all", "selector: {}"),
        inline("app/web", "selector: {matchLabels: {app: web}}"),
        inline("app/port", "targetRefs: [{kind: Service, name: web}]"),
        inline("app/gone", "targetRefs: [{kind: Service, name: gone}]"),
        inline("istio-system/mesh", "selector: {matchLabels: {version: v1}}"),
        inline("istio-system/v2", "selector: {matchLabels: {version: v2}}"),
    ]
    .concat();
    let (snapshot, problems) = build(&text);
    let missing = "RequestAuthentication app/gone: spec.targetRefs[0].name: there is no Service app/gone";
    assert_problems(&problems, &[missing]);
    assert_eq!(issuers(&snapshot, "10.0.0.1", 8080), ["mesh", "all", "port", "web"]);
    assert_eq!(issuers(&snapshot, "10.0.0.1", 80), ["mesh", "all", "web"]);
    assert_eq!(issuers(&snapshot, "10.0.0.2", 80), ["mesh", "all"]);
    assert_eq!(issuers(&snapshot, "10.0.0.3", 80), ["mesh"]);
}

/// A port carries bytes where Services say so and none says otherwise.
#[test]
fn ports_that_are_declared_to_carry_bytes_are_not_read() {
    let web = |name: &str, ports: &str| {
        service("app", name, ports)
            .replace("{app: ", "{version: v1, app: ")
            .replace(&format!("app: {name}}}, ports"), "app: web}, ports")
    };
    let text = [
        pod("app", "web", "v1", "10.0.0.1"),
        web("one", "{name: tcp, port: 70, targetPort: 7000}, {name: tcp-b, port: 71, targetPort: 7100}"),
        web("two", "{name: http, port: 71, targetPort: 7100}, {name: grpc, port: 90}, {name: x, port: 91}"),
        web("three", "{name: tcp, port: 90}"),
        inline("app/all", "selector: {}"),
    ]
    .concat();
    let (snapshot, problems) = build(&text);
    assert_problems(&problems, &[]);
    let tokens = tokens(&snapshot, "10.0.0.1");
    for (port, read, requests) in
        [(7000, false, false), (7100, true, true), (90, true, true), (91, true, false), (5000, true, false)]
    {
        assert_eq!((tokens.reads(port), tokens.asks_for_requests(port)), (read, requests), "{port}");
    }
}

#[test]
fn fetched_keys_are_carried_over_by_their_uri() {
    let uri = "jwksUri: 'https://issuer/keys'";
    let text = [
        pod("app", "web", "v1", "10.0.0.1"),
        tokens_of("app/one", "selector: {}", uri),
        tokens_of("app/two", "selector: {}", uri),
        tokens_of("app/three", "selector: {}", "jwksUri: 'https://other/keys'"),
    ]
    .concat();
    let (first, problems) = build(&text);
    assert_problems(&problems, &[]);
    assert_eq!(first.key_sets.len(), 2);
    first.key_sets["https://issuer/keys"].set(KeySet::parse(KEYS).unwrap().into());
    let there = |snapshot: &Snapshot| -> Vec<bool> {
        tokens(snapshot, "10.0.0.1").of(80).map(|rule| rule.keys.get().is_some()).collect()
    };
    assert_eq!(there(&first), [true, false, true], "one, three, two");

    // Read anew, and changed beside them: the same keys, and pods of which nothing has changed stay what they are.
    let (second, _) = build_on(&text, Some(&first));
    assert_eq!(there(&second), [true, false, true]);
    assert!(Arc::ptr_eq(&tokens(&first, "10.0.0.1"), &tokens(&second, "10.0.0.1")));
    let (third, _) = build_on(&[text, inline("app/zero", "selector: {}")].concat(), Some(&second));
    assert_eq!(there(&third), [true, false, true, true]);
    let rules = tokens(&third, "10.0.0.1");
    let Some(Keys::Remote(cell)) = rules.of(80).next().map(|rule| &rule.keys) else { unreachable!() };
    assert!(Arc::ptr_eq(cell, &third.key_sets["https://issuer/keys"]));

    // What nobody asks for any more is forgotten.
    let (fourth, _) = build_on(&pod("app", "web", "v1", "10.0.0.1"), Some(&third));
    assert!(fourth.key_sets.is_empty() && tokens(&fourth, "10.0.0.1").rules.is_empty());
}
