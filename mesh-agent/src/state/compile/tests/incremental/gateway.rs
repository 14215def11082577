//! A gateway follows changes of endpoints as services do.

use std::collections::BTreeMap;

use super::*;
use crate::state::snapshot::{ByHost, Gateway, Served, TlsAction, TlsServers, VirtualHosts};

/// What a gateway has of its own, in all forms.
pub(super) fn forms() -> Vec<Vec<String>> {
    let server = |number: u16, protocol: &str, tls: &str| {
        format!(
            "{{port: {{number: {number}, name: p{number}, protocol: {protocol}}}, hosts: ['*'], tls: {tls}}}"
        )
    };
    let plain = server(80, "HTTP", "{httpsRedirect: true}");
    let all = [
        plain.clone(),
        server(443, "TLS", "{mode: PASSTHROUGH}"),
        server(444, "HTTPS", "{mode: ISTIO_MUTUAL}"),
        server(445, "TLS", "{mode: ISTIO_MUTUAL}"),
        server(90, "TCP", "null"),
    ];
    let of = |servers: &[String]| {
        istio("Gateway default/gw", &format!("{{selector: {{app: o}}, servers: [{}]}}", servers.join(", ")))
    };
    let routed = |http: &str, to: &str| {
        istio(
            "VirtualService default/edge",
            &format!(
                "{{gateways: [gw], hosts: [x.example, y.example, b], http: [{http}], \
                 tcp: [{{route: [{{destination: {{host: {to}, port: {{number: 90}}}}}}]}}], \
                 tls: [{{match: [{{sniHosts: [x.example]}}], route: [{{destination: {{host: c, port: {{number: 90}}}}}}]}}]}}"
            ),
        )
    };
    let rest =
        "{route: [{destination: {host: c, port: {number: 80}}}], mirror: {host: a, port: {number: 80}}}";
    let subset =
        "{match: [{uri: {prefix: /x}}], route: [{destination: {host: a, subset: v2, port: {number: 80}}}]}";
    vec![
        vec![of(&all), of(&[plain]), of(&all).replace("app: o", "app: p")],
        vec![routed(&format!("{subset}, {rest}"), "b"), routed(subset, "a"), routed(rest, "nobody")],
        vec![istio(
            "VirtualService other/edge",
            &format!(
                "{{gateways: [default/gw], hosts: [y.example, b.default.svc.cluster.local], http: [{rest}]}}"
            )
            .replace("host: a,", "host: a.default.svc.cluster.local,")
            .replace("host: c,", "host: c.default.svc.cluster.local,"),
        )],
    ]
}

/// What is said by name of each of these hosts.
const NAMES: [Option<&str>; 5] =
    [Some("x.example"), Some("y.example"), Some("b.default.svc.cluster.local"), Some("nobody"), None];

fn found<T>(all: &ByHost<T>) -> impl Iterator<Item = (&'static str, &T)> {
    NAMES.into_iter().filter_map(|name| Some((name.unwrap_or("-"), all.find(name)?)))
}

/// All that a gateway says.
pub(super) fn say(snapshot: &Snapshot, said: &mut BTreeMap<String, String>) {
    let Some(gateway) = &snapshot.gateway else { return };
    said.insert("gateway".to_owned(), gateway.workload.name.to_string());
    let mut hosts = |of: &str, hosts: &VirtualHosts| {
        for (name, host) in found(hosts) {
            let says = format!("{} {} {:?}", host.domain, host.https_redirect, said_of_routes(&host.routes));
            said.insert(format!("{of} {name}"), says);
        }
    };
    let mut others = Vec::new();
    for port in &gateway.ports {
        let of = format!("gateway {}", port.number);
        match &port.serves {
            Served::Http(all) => hosts(&of, all),
            Served::Tcp(routes) => others.push((of, said_of_streams(routes))),
            Served::Tls(servers) => {
                for (name, server) in found(servers) {
                    match &server.action {
                        TlsAction::Http(_, all) => hosts(&format!("{of} {name}"), all),
                        TlsAction::PassThrough(routes) | TlsAction::Stream(_, routes) => {
                            others.push((format!("{of} {name}"), said_of_streams(routes)));
                        }
                    }
                }
            }
        }
    }
    said.extend(others.into_iter().map(|(of, says)| (of, format!("{says:?}"))));
}

fn tls(gateway: &Gateway, port: u16) -> &TlsServers {
    match &gateway.port(port).unwrap().serves {
        Served::Tls(servers) => servers,
        other => panic!("{other:?}"),
    }
}

/// Counted by identity: what does not lead to the endpoint stays the very same.
#[test]
fn a_change_of_one_endpoint_makes_anew_of_a_gateway_what_leads_to_it() {
    let rule = |host: &str, service: &str| {
        istio(
            &format!("VirtualService default/{service}"),
            &format!(
                "{{gateways: [gw], hosts: [{host}], http: [{{route: [{{destination: {{host: {service}, port: {{number: 80}}}}}}]}}], \
                 tls: [{{match: [{{sniHosts: [{host}]}}], route: [{{destination: {{host: {service}, port: {{number: 90}}}}}}]}}]}}"
            ),
        )
    };
    let servers = "{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}, \
                   {port: {number: 443, name: a, protocol: TLS}, hosts: [a.example], tls: {mode: PASSTHROUGH}}, \
                   {port: {number: 443, name: b, protocol: TLS}, hosts: [b.example], tls: {mode: PASSTHROUGH}}";
    let at = |name: &str, ip: &str| slice(&format!("{name}-1"), name, &format!("{{addresses: [{ip}]}}"));
    let text = crate::state::compile::tests::pod("other", "o", "v1", "10.0.1.1")
        + &istio("Gateway default/gw", &format!("{{servers: [{servers}]}}"))
        + &backed("a", 1, "")
        + &backed("b", 2, "")
        + &at("a", "10.0.0.1")
        + &at("b", "10.0.0.2")
        + &rule("a.example", "a")
        + &rule("b.example", "b")
        + &rule("c.example", "a").replace("name: a, namespace", "name: c, namespace");
    let gateway = Some(GatewayPod { namespace: "other".into(), name: "o-v1".into() });
    let mut compiled = Compiled::new(Settings { gateway, ..Settings::default() });
    let mut apply = |text: &str| {
        let changes = objects(text).into_iter().map(|(key, object)| Change::Set(key, object));
        compiled.apply(changes.collect());
        assert_eq!(*compiled.problems(), BTreeSet::new());
        compiled.snapshot().gateway.clone().unwrap()
    };
    let before = apply(&text);
    let after = apply(&at("a", "10.0.0.9"));
    let host = |gateway: &Gateway, name: &str| match &gateway.port(80).unwrap().serves {
        Served::Http(hosts) => Arc::clone(hosts.find(Some(name)).unwrap()),
        other => panic!("{other:?}"),
    };
    assert!(Arc::ptr_eq(&host(&before, "b.example"), &host(&after, "b.example")));
    for name in ["a.example", "c.example"] {
        let host = host(&after, name);
        let RouteAction::Forward(to) = &host.routes[0].action else { panic!("{host:?}") };
        let Backend::Cluster(cluster) = &to[0].backend else { panic!("{host:?}") };
        assert_eq!(addresses(cluster), ["10.0.0.9:8080"], "{name}");
    }
    let server = |gateway: &Gateway, name: &str| Arc::clone(tls(gateway, 443).find(Some(name)).unwrap());
    assert!(Arc::ptr_eq(&server(&before, "b.example"), &server(&after, "b.example")));
    assert!(!Arc::ptr_eq(&server(&before, "a.example"), &server(&after, "a.example")));
    // Of a service that it does not lead to, it hears nothing.
    let other = apply(&(backed("d", 4, "") + &at("d", "10.0.0.4")));
    assert!(Arc::ptr_eq(&other, &apply(&at("d", "10.0.0.5"))));
    // Another pod of its name may serve other gateways.
    let moved = apply(&crate::state::compile::tests::pod("other", "o", "v1", "10.0.1.2"));
    assert_eq!(moved.workload.ips, ["10.0.1.2".parse::<std::net::IpAddr>().unwrap()]);
}
