//! `tls` and `tcp`.

use super::*;
use crate::state::snapshot::{SniHost, Subnet};

/// A service of some hosts with one entry of `tls` and a route, these fields on top.
fn tls(fields: &Value) -> Value {
    stream("tls", fields)
}

fn stream(list: &str, fields: &Value) -> Value {
    let mut entry = json!({"route": [{"destination": {"host": "a"}}]});
    for (name, value) in fields.as_object().unwrap() {
        entry[name] = value.clone();
    }
    json!({"hosts": ["a.example", "*.b.example"], list: [entry]})
}

fn matching(m: &Value) -> Value {
    tls(&json!({"match": [m]}))
}

#[test]
fn bad_tls() {
    let sni = |name: &str| matching(&json!({"sniHosts": [name]}));
    refused(vec![
        (tls(&json!({})), "tls[0].match", "at least one match condition"),
        (tls(&json!({"match": []})), "tls[0].match", "at least one match condition"),
        (matching(&json!({"port": 443})), "tls[0].match[0].sniHosts", "at least one SNI host"),
        (sni("c.example"), "tls[0].match[0].sniHosts[0]", "not a compatible subset"),
        (sni("*.example"), "tls[0].match[0].sniHosts[0]", "[a.example, *.b.example]"),
        (sni("b.example"), "tls[0].match[0].sniHosts[0]", "not a compatible subset"),
        (sni("*.a.example"), "tls[0].match[0].sniHosts[0]", "not a compatible subset"),
        (sni("a b"), "tls[0].match[0].sniHosts[0]", "not a domain name"),
        (matching(&json!({"sniHosts": ["a.example"], "port": 0})), "tls[0].match[0].port", "nonzero"),
        (
            matching(&json!({"sniHosts": ["a.example"], "destinationSubnets": ["10.0.0.0/8", "x"]})),
            "tls[0].match[0].destinationSubnets[1]",
            "\"x\" is not an address or a subnet",
        ),
        (
            matching(&json!({"sniHosts": ["a.example"], "sourceSubnet": "10.0.0.1"})),
            "tls[0].match[0].sourceSubnet",
            "unknown field",
        ),
        (
            tls(&json!({"match": [{"sniHosts": ["a.example"]}], "route": []})),
            "tls[0].route",
            "TLS route is required",
        ),
        (
            tls(&json!({"match": [{"sniHosts": ["a.example"]}], "timeout": "1s"})),
            "tls[0].timeout",
            "unknown field",
        ),
    ]);
}

#[test]
fn bad_tcp() {
    let tcp = |fields: Value| stream("tcp", &fields);
    refused(vec![
        (tcp(json!({"route": null})), "tcp[0].route", "TCP route is required"),
        (tcp(json!({"match": [{"sniHosts": ["a.example"]}]})), "tcp[0].match[0].sniHosts", "unknown field"),
        (
            tcp(json!({"match": [{}, {"sourceSubnet": "10.0.0.0/40"}]})),
            "tcp[0].match[1].sourceSubnet",
            "10.0.0.0/40",
        ),
        (
            tcp(json!({"route": [{"destination": {"host": "a"}, "headers": {}}]})),
            "tcp[0].route[0].headers",
            "unknown field",
        ),
        (
            tcp(json!({"route": [{"destination": {"host": "a"}, "weight": -1}]})),
            "tcp[0].route[0].weight",
            "weight -1 < 0",
        ),
        (
            tcp(json!({"route": [{"destination": {"host": "a"}}, {"destination": {"host": "b"}}]})),
            "tcp[0].route",
            "total destination weight = 0",
        ),
    ]);
}

#[test]
fn good_tls() {
    let m = json!({
        "sniHosts": ["A.example", "*.b.example", "x.B.example"], "destinationSubnets": ["10.0.0.0/8", "::1"],
        "port": 443, "sourceLabels": {"app": "x"}, "sourceNamespace": "shop", "gateways": ["in"],
    });
    let service = read(&matching(&m)).unwrap();
    let rule = &service.tls[0].matches[0];
    assert!(!rule.mesh && service.http.is_empty() && service.tcp.is_empty());
    let expected = [
        SniHost::Exact("a.example".to_owned()),
        SniHost::Below(".b.example".to_owned()),
        SniHost::Exact("x.b.example".to_owned()),
    ];
    assert_eq!(rule.stream.sni_hosts, expected);
    assert_eq!(
        rule.stream.destination_subnets,
        [Subnet::parse("10.0.0.0/8").unwrap(), Subnet::parse("::1").unwrap()]
    );
    assert_eq!((rule.stream.port, rule.stream.source_namespace.as_deref()), (Some(443), Some("shop")));
    assert_eq!(rule.stream.source_labels, [("app".to_owned(), "x".to_owned())]);
    let any = json!({"hosts": ["*"], "gateways": ["in"],
                     "tls": [{"match": [{"sniHosts": ["*"]}], "route": [{"destination": {"host": "a"}}]}]});
    assert_eq!(read(&any).unwrap().tls[0].matches[0].stream.sni_hosts, [SniHost::Any]);
}

#[test]
fn good_tcp() {
    let match_all = stream("tcp", &json!({}));
    let rule = read(&match_all).unwrap().tcp.remove(0);
    assert!(rule.matches.is_empty());
    assert_eq!((rule.route[0].target.host.as_str(), rule.route[0].weight), ("a", 1));
    let from = stream("tcp", &json!({"match": [{"sourceSubnet": "10.1.0.0/16", "gateways": ["mesh"]}]}));
    let rule = read(&from).unwrap().tcp.remove(0);
    assert!(rule.matches[0].mesh);
    assert_eq!(rule.matches[0].stream.source_subnet, Subnet::parse("10.1.0.0/16"));
}
