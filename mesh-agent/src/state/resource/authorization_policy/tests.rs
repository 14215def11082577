//! What is refused, by which field, and how a scope is read.
#![expect(clippy::unwrap_used, reason = "tests")]

use serde_json::{Value, json};

use super::*;

fn read(spec: &Value) -> Checked<AuthorizationPolicy> {
    check(&ObjectKey::new("AuthorizationPolicy", "app", "p"), false, spec)
}

fn error(spec: &Value) -> FieldError {
    read(spec).map(|_| ()).unwrap_err()
}

fn assert_refused(table: &[(Value, &str, &str)]) {
    for (spec, field, message) in table {
        let error = error(spec);
        assert_eq!(error.field, *field, "{spec}: {}", error.message);
        assert!(error.message.contains(message), "{spec}: {}", error.message);
    }
}

#[test]
fn policies_that_cannot_mean_what_they_say_are_refused() {
    let wildcard = json!({"selector": {"matchLabels": {"app": "a*"}}});
    assert_refused(&[
        (json!({"action": "FORBID"}), "action", "unknown variant"),
        (json!({"rule": []}), "rule", "unknown field"),
        (json!({"action": "DENY"}), "rules", "the rule {} matches everything"),
        (json!({"action": "CUSTOM", "rules": [{}]}), "provider.name", "is required"),
        (json!({"action": "CUSTOM", "provider": {"name": "opa"}}), "rules", "matches nothing"),
        (json!({"provider": {"name": "opa"}}), "provider", "CUSTOM alone"),
        (json!({"rules": [null]}), "rules[0]", "is null"),
        (wildcard, "selector.matchLabels.app", "wildcards"),
        (json!({"selector": {"labels": {}}}), "selector.labels", "unknown field"),
        (
            json!({"selector": {}, "targetRefs": [{"kind": "Service", "name": "a"}]}),
            "targetRefs",
            "only one of selector",
        ),
        (json!({"targetRefs": [{"kind": "Pod", "name": "a"}]}), "targetRefs[0].kind", "only a Service"),
        (json!({"targetRef": {"kind": "Service", "name": "a b"}}), "targetRef.name", "is not a name"),
        (
            json!({"targetRefs": [{"kind": "Service", "name": "a", "namespace": "b"}]}),
            "targetRefs[0].namespace",
            "its own namespace",
        ),
    ]);
}

#[test]
fn sources_that_cannot_mean_what_they_say_are_refused() {
    let source = |source: Value| json!({"rules": [{"from": [{"source": source}]}]});
    let field = |field: &str| format!("rules[0].from[0].source{field}");
    let many = vec!["a"; 17];
    let table = [
        (source(json!({})), "", "at least one field"),
        (source(json!({"principal": ["a"]})), ".principal", "unknown field"),
        (source(json!({"principals": []})), ".principals", "is empty"),
        (source(json!({"principals": ["a", ""]})), ".principals[1]", "may not be empty"),
        (source(json!({"namespaces": ["*a*"]})), ".namespaces[0]", "not at both"),
        (source(json!({"ipBlocks": ["10.0.0.0/33"]})), ".ipBlocks[0]", "nor a subnet"),
        (source(json!({"notRemoteIpBlocks": ["a"]})), ".notRemoteIpBlocks[0]", "nor a subnet"),
        (source(json!({"serviceAccounts": ["*"]})), ".serviceAccounts[0]", "without wildcards"),
        (source(json!({"serviceAccounts": ["a/b/c"]})), ".serviceAccounts[0]", "NAMESPACE"),
        (source(json!({"serviceAccounts": many})), ".serviceAccounts", "more than 16"),
        (
            source(json!({"serviceAccounts": ["a"], "notNamespaces": ["b"]})),
            ".serviceAccounts",
            "together with principals or namespaces",
        ),
    ];
    for (spec, name, message) in table {
        assert_refused(&[(spec, &field(name), message)]);
    }
    assert_refused(&[
        (json!({"rules": [{"from": []}]}), "rules[0].from", "is empty"),
        (json!({"rules": [{"from": [{}]}]}), "rules[0].from[0].source", "is required"),
    ]);
}

#[test]
fn operations_that_cannot_mean_what_they_say_are_refused() {
    let operation = |operation: Value| json!({"rules": [{"to": [{"operation": operation}]}]});
    let table = [
        (json!({}), "", "at least one field"),
        (json!({"ports": ["70000"]}), ".ports[0]", "0 to 65535"),
        (json!({"ports": ["+80"]}), ".ports[0]", "0 to 65535"),
        (json!({"ports": [80]}), ".ports[0]", "invalid type"),
        (json!({"paths": ["/{id}"]}), ".paths[0]", "{*} and {**}"),
        (json!({"paths": ["/a{*}"]}), ".paths[0]", "whole segments"),
        (json!({"paths": ["/{*}/b*"]}), ".paths[0]", "whole segments"),
        (json!({"paths": ["/{**}/a/{*}"]}), ".paths[0]", "the last of its kind"),
        (json!({"notHosts": []}), ".notHosts", "is empty"),
        (json!({"verbs": ["GET"]}), ".verbs", "unknown field"),
    ];
    for (written, name, message) in table {
        assert_refused(&[(operation(written), &format!("rules[0].to[0].operation{name}"), message)]);
    }
    assert_refused(&[(json!({"rules": [{"to": [{}]}]}), "rules[0].to[0].operation", "is required")]);
}

#[test]
fn conditions_that_cannot_mean_what_they_say_are_refused() {
    let table = [
        (json!({"values": ["a"]}), ".key", "is required"),
        (json!({"key": "source.ip"}), ".values", "at least one of"),
        (json!({"key": "source.ip", "values": ["a"]}), ".values[0]", "nor a subnet"),
        (json!({"key": "destination.port", "notValues": ["a"]}), ".notValues[0]", "not a port"),
        (json!({"key": "source.user", "values": ["a"]}), ".key", "not an attribute"),
        (json!({"key": "request.headers[a b]", "values": ["a"]}), ".key", "header name"),
        (json!({"key": "request.headers[]", "values": ["a"]}), ".key", "header name"),
        (json!({"key": "request.auth.claims[]", "values": ["a"]}), ".key", "not an attribute"),
        (json!({"key": "experimental.envoy.filters.a[b]", "values": ["a"]}), ".key", "not an attribute"),
    ];
    for (condition, name, message) in table {
        let spec = json!({"rules": [{"when": [condition]}]});
        assert_refused(&[(spec, &format!("rules[0].when[0]{name}"), message)]);
    }
}

#[test]
fn scopes_and_annotations_are_read() {
    let labels = |pairs: &[(&str, &str)]| {
        Scope::Labels(pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
    };
    let table = [
        (Value::Null, labels(&[])),
        (json!({}), labels(&[])),
        (json!({"selector": {}}), labels(&[])),
        (json!({"selector": {"matchLabels": {"app": "a"}}}), labels(&[("app", "a")])),
        (json!({"targetRef": {"kind": "Service", "name": "a"}}), Scope::Services(vec!["a".into()])),
        (
            json!({"targetRefs": [{"group": "", "kind": "Service", "name": "a"}, {"kind": "Service", "name": "b"}]}),
            Scope::Services(vec!["a".into(), "b".into()]),
        ),
    ];
    for (spec, scope) in table {
        assert_eq!(read(&spec).unwrap().scope, scope, "{spec}");
    }
    let gateway =
        json!({"targetRef": {"group": "gateway.networking.k8s.io", "kind": "GatewayClass", "name": "a"}});
    let read = read(&gateway).unwrap();
    assert_eq!(read.scope, Scope::Services(Vec::new()));
    assert_eq!(read.passed_over[0].field, "targetRef");
    let annotated = |value: &str| dry_run(&[(DRY_RUN.to_owned(), value.to_owned())].into());
    assert_eq!(
        (annotated("true"), annotated("false"), dry_run(&BTreeMap::new())),
        (Ok(true), Ok(false), Ok(false))
    );
    assert_eq!(annotated("yes").unwrap_err().field, "annotations.istio.io/dry-run");
}
