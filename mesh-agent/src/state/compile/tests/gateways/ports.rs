//! Ports that several servers share, and those whose connections are not read as HTTP.

use super::*;
use crate::state::snapshot::{SniHost, StreamRoute};

fn tls_server(number: u16, protocol: &str, hosts: &str) -> String {
    format!(
        "{{port: {{number: {number}, name: p{number}, protocol: {protocol}}}, hosts: [{hosts}], tls: {{mode: PASSTHROUGH}}}}"
    )
}

fn tcp(number: u16) -> String {
    format!("{{port: {{number: {number}, name: p{number}, protocol: TCP}}, hosts: ['*']}}")
}

#[test]
fn the_oldest_gateway_keeps_what_two_want() {
    let old = written(
        "old 2020-01-01T00:00:00Z",
        &[http("'*'"), tls_server(443, "TLS", "a.example"), tcp(90)].join(", "),
    );
    let new = written(
        "new 2021-01-01T00:00:00Z",
        &[
            tls_server(80, "TLS", "a.example"),
            tls_server(443, "HTTPS", "a.example, b.example"),
            tcp(90),
            tls_server(444, "TLS", "a.example"),
        ]
        .join(", "),
    );
    let (gateway, problems) = serve(&(world() + &new + &old));
    assert_problems(
        &problems,
        &[
            "Gateway edge/new: spec.servers[0].port: port 80 is already one of plain HTTP, by Gateway edge/old: spec.servers[0]",
            "Gateway edge/new: spec.servers[1].hosts[0]: a.example is already a host of Gateway edge/old: spec.servers[1] on port 443",
            "Gateway edge/new: spec.servers[2].port: port 90 is already one of TCP",
        ],
    );
    let names = |number: u16| match &gateway.port(number).unwrap().serves {
        Served::Tls(servers) => ["a.example", "b.example"]
            .map(|name| servers.find(Some(name)).map(|server| server.origin.to_string())),
        other => panic!("{other:?}"),
    };
    let origin = |name: &str, server: usize| Some(format!("Gateway edge/{name}: spec.servers[{server}]"));
    assert_eq!(names(443), [origin("old", 1), origin("new", 1)]);
    assert_eq!(names(444), [origin("new", 3), None]);
    assert!(matches!(gateway.port(80).unwrap().serves, Served::Http(_)));
}

/// Where connections go, by the names they ask for.
fn led(routes: &[Arc<StreamRoute>]) -> Vec<String> {
    let one = |route: &Arc<StreamRoute>| {
        let asks = route.matches.iter().flat_map(|asked| &asked.sni_hosts).map(|host| match host {
            SniHost::Any => "*".to_owned(),
            SniHost::Exact(name) => name.clone(),
            SniHost::Below(rest) => format!("*{rest}"),
        });
        let Backend::Cluster(cluster) = &route.backends[0].backend else { panic!("{route:?}") };
        format!("{} {}", asks.collect::<Vec<_>>().join(","), cluster.service)
    };
    routes.iter().map(one).collect()
}

#[test]
fn what_passes_goes_by_the_most_specific_name() {
    let rule = |sni: &str, service: &str| format!("{{match: [{{sniHosts: [{sni}]}}], {}}}", to(service));
    let spec = |hosts: &str, rules: &str| {
        format!("{{gateways: [edge/one], hosts: [{hosts}], tls: [{rules}], tcp: [{{{}}}]}}", to("b"))
    };
    let text = world()
        + &written("one", &tls_server(443, "TLS", "'*.example'"))
        + &istio(
            "VirtualService shop/old 2020-01-01T00:00:00Z",
            &spec("'*.example'", &rule("'*.example', '*.c.example', z.example", "a")),
        )
        + &istio("VirtualService shop/new 2021-01-01T00:00:00Z", &spec("a.example", &rule("a.example", "a")))
        + &istio("VirtualService shop/none 2021-01-01T00:00:00Z", &spec("a.other", &rule("a.other", "a")));
    let (gateway, problems) = serve(&text);
    assert_problems(
        &problems,
        &["VirtualService shop/none: spec.gateways[0]: no server of Gateway edge/one has any"],
    );
    let Served::Tls(servers) = &gateway.port(443).unwrap().serves else { panic!("TLS") };
    let TlsAction::PassThrough(routes) = &servers.find(Some("q.example")).unwrap().action else {
        panic!("it ends")
    };
    assert_eq!(led(routes), ["z.example a", "a.example a", "*.c.example a", "*.example a"]);
    assert!(servers.find(Some("a.other")).is_none() && servers.find(None).is_none());
}

#[test]
fn bytes_go_where_the_first_match_says() {
    let tcp_rules = "[{match: [{port: 91}], route: [{destination: {host: b, port: {number: 81}}}]}, \
                     {match: [{sourceLabels: {version: v1}}], route: [{destination: {host: b, port: {number: 81}}}]}, \
                     {match: [{port: 90, sourceSubnet: 10.0.0.0/8}], route: [{destination: {host: a}}]}, \
                     {route: [{destination: {host: b, port: {number: 80}}}]}]";
    let text = world()
        + &written("one", &tcp(90))
        + &istio(
            "VirtualService default/t",
            &format!("{{gateways: [edge/one], hosts: ['*'], tcp: {tcp_rules}}}"),
        );
    let gateway = served(&text);
    let Served::Tcp(routes) = &gateway.port(90).unwrap().serves else { panic!("TCP") };
    assert_eq!(led(routes), [" a", " b"]);
    assert_eq!((&*routes[0].name, &*routes[0].origin), ("tcp[2]", "VirtualService default/t"));
    let asked = &routes[0].matches[0];
    assert!(asked.port.is_none() && asked.source_subnet.is_some());
}
