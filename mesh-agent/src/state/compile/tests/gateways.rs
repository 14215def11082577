//! What a gateway's own process serves: which Gateways, which hosts, which routes, and what is said of the rest.

mod ports;
mod tls;

use super::*;
use crate::state::{
    compile::GatewayPod,
    snapshot::{Gateway, Served, TlsAction, VirtualHost, VirtualHosts},
};

fn of_pod(name: &str) -> Settings {
    let gateway = Some(GatewayPod { namespace: "edge".into(), name: name.into() });
    Settings { gateway, ..Settings::default() }
}

/// A pod with these labels, in the namespace of gateways.
fn gateway_pod(labels: &str) -> String {
    format!(
        "---\n{{apiVersion: v1, kind: Pod, metadata: {{name: in, namespace: edge, labels: {{{labels}}}}}, spec: \
         {{serviceAccountName: gw}}, status: {{podIP: 10.9.0.1}}}}\n"
    )
}

/// The gateway's pod and two services in namespace `default`, with a pod each.
fn world() -> String {
    gateway_pod("istio: in, version: v2")
        + &service("default", "a", "{port: 80}")
        + &pod("default", "a", "v1", "10.0.0.1")
        + &service("default", "b", "{port: 80}, {port: 81}")
        + &pod("default", "b", "v1", "10.0.0.2")
}

/// A gateway that is only named.
pub(super) fn bare() -> String {
    istio("Gateway default/in", &format!("{{servers: [{}]}}", http("'*'")))
}

/// `Gateway edge/NAME` with these servers, for the pod above.
fn written(name: &str, servers: &str) -> String {
    istio(&format!("Gateway edge/{name}"), &format!("{{selector: {{istio: in}}, servers: [{servers}]}}"))
}

fn http(hosts: &str) -> String {
    format!("{{port: {{number: 80, name: http, protocol: HTTP}}, hosts: [{hosts}]}}")
}

/// A VirtualService for these gateways and hosts.
fn bound(head: &str, to: &str, hosts: &str, http: &str) -> String {
    istio(
        &format!("VirtualService {head}"),
        &format!("{{gateways: [{to}], hosts: [{hosts}], http: [{http}]}}"),
    )
}

fn to(service: &str) -> String {
    format!("route: [{{destination: {{host: {service}.default.svc.cluster.local}}}}]")
}

fn serve_on(text: &str, before: Option<&Snapshot>) -> (Snapshot, Vec<Problem>) {
    let (objects, refused) = read_text(text);
    assert_eq!(refused, [], "{text}");
    compile(&objects, before, &of_pod("in"))
}

fn serve(text: &str) -> (Arc<Gateway>, Vec<Problem>) {
    let (snapshot, problems) = serve_on(text, None);
    (snapshot.gateway.unwrap(), problems)
}

/// What is served without any problem.
fn served(text: &str) -> Arc<Gateway> {
    let (gateway, problems) = serve(text);
    assert_eq!(problems, [], "{text}");
    gateway
}

fn hosts(gateway: &Gateway, port: u16) -> Arc<VirtualHosts> {
    match &gateway.port(port).unwrap().serves {
        Served::Http(hosts) => Arc::clone(hosts),
        other => panic!("{other:?}"),
    }
}

fn host(gateway: &Gateway, name: &str) -> Arc<VirtualHost> {
    Arc::clone(hosts(gateway, 80).find(Some(name)).unwrap_or_else(|| panic!("{name}: {gateway:?}")))
}

/// The names of a host's routes, or the clusters where they have none.
fn names(gateway: &Gateway, name: &str) -> Vec<String> {
    host(gateway, name).routes.iter().map(|route| route.name.to_string()).collect()
}

#[test]
fn a_gateway_serves_what_selects_its_pod() {
    let text = world()
        + &written("one", &http("'*'"))
        + &istio("Gateway other/all", &format!("{{servers: [{}]}}", http("'*'").replace("80", "81")))
        + &istio(
            "Gateway edge/not",
            &format!("{{selector: {{istio: out}}, servers: [{}]}}", http("'*'").replace("80", "82")),
        )
        + &istio(
            "Gateway edge/half",
            &format!("{{selector: {{istio: in, more: x}}, servers: [{}]}}", http("'*'").replace("80", "83")),
        )
        + &bound("shop/a", "edge/one", "a.example", &format!("{{{}}}", to("a")));
    let (snapshot, problems) = serve_on(&text, None);
    assert_eq!(problems, []);
    let gateway = snapshot.gateway.clone().unwrap();
    assert_eq!(gateway.ports.iter().map(|port| port.number).collect::<Vec<_>>(), [80, 81]);
    assert_eq!(gateway.workload.identity.to_string(), "spiffe://cluster.local/ns/edge/sa/gw");
    assert!(Arc::ptr_eq(&gateway.workload, &snapshot.workloads[&"10.9.0.1".parse().unwrap()]));
    let host = host(&gateway, "a.example");
    assert_eq!((&*host.domain, &*host.origin), ("a.example", "Gateway edge/one: spec.servers[0]"));
    assert!(!host.https_redirect);
    assert_eq!(targets(&host.routes[0]), ["outbound|80||a.default.svc.cluster.local"]);
    assert!(hosts(&gateway, 80).find(Some("b.example")).is_none(), "nobody is bound for it");
    assert_eq!(hosts(&gateway, 81).values().count(), 0);
    // Its clusters are known, and their endpoints are those of everybody.
    assert_eq!(gateway.clusters().map(|cluster| addresses(cluster)).collect::<Vec<_>>(), [["10.0.0.1:80"]]);
    assert!(snapshot.clusters().any(|cluster| Arc::ptr_eq(cluster, gateway.clusters().next().unwrap())));
}

#[test]
fn others_compile_nothing_of_it() {
    let text = world() + &written("one", &http("'*'"));
    assert!(build(&text).0.gateway.is_none());
    let (objects, _) = read_text(&text);
    assert!(compile(&objects, None, &of_pod("away")).0.gateway.is_none(), "its pod is not known yet");
}

#[test]
fn a_gateways_pod_may_have_no_address_of_its_own() {
    let shared = gateway_pod("istio: in").replace("spec: {", "spec: {hostNetwork: true, ");
    let gateway = served(&(shared + &written("one", &http("'*'"))));
    assert_eq!(gateway.workload.identity.to_string(), "spiffe://cluster.local/ns/edge/sa/gw");
}

#[test]
fn hosts_are_those_that_both_have() {
    /// Hosts of the server, of the VirtualService, and names with the domains that have them.
    type Row<'t> = (&'t str, &'t str, &'t [(&'t str, &'t str)]);
    let table: [Row<'_>; 9] = [
        ("'*'", "a.example, b.example", &[("a.example", "a.example"), ("b.example", "b.example")]),
        ("'*.example'", "a.example, b.other", &[("a.example", "a.example")]),
        ("a.example, b.example", "'*.example'", &[("a.example", "a.example"), ("b.example", "b.example")]),
        ("'*.example'", "'*.a.example'", &[("x.a.example", "*.a.example")]),
        ("'*.a.example'", "'*'", &[("x.a.example", "*.a.example")]),
        ("'*'", "'*'", &[("whatever", "*")]),
        ("A.example", "a.EXAMPLE", &[("a.example", "a.example")]),
        ("shop/a.example, other/b.example", "a.example, b.example", &[("a.example", "a.example")]),
        // Short names are Services of its own namespace.
        ("'*'", "a", &[("a.shop.svc.cluster.local", "a.shop.svc.cluster.local")]),
    ];
    for (server, service, expected) in table {
        let text = world()
            + &written("one", &http(server))
            + &bound("shop/a", "edge/one", service, &format!("{{{}}}", to("a")));
        let gateway = served(&text);
        let found = hosts(&gateway, 80);
        assert_eq!(found.values().count(), expected.len(), "{server} {service}: {found:?}");
        for (name, domain) in expected {
            assert_eq!(&*host(&gateway, name).domain, *domain, "{server} {service}");
        }
    }
}

#[test]
fn a_server_may_be_for_its_own_namespace() {
    let text = world()
        + &written("one", &http("./a.example"))
        + &bound("shop/a", "edge/one", "a.example", &format!("{{name: theirs, {}}}", to("a")))
        + &bound("edge/b", "one", "a.example", &format!("{{name: own, {}}}", to("b")));
    let (gateway, problems) = serve(&text);
    assert_eq!(names(&gateway, "a.example"), ["own"]);
    let told = "VirtualService shop/a: spec.gateways[0]: no server of Gateway edge/one has any of spec.hosts for namespace shop";
    assert_problems(&problems, &[told]);
}

#[test]
fn gateways_are_named_in_every_form() {
    for name in ["edge/one", "one", "./one", "one.edge", "one.edge.svc.cluster.local"] {
        let text = world()
            + &written("one", &http("'*'"))
            + &bound("edge/a", name, "a.example", &format!("{{name: r, {}}}", to("a")));
        assert_eq!(names(&served(&text), "a.example"), ["r"], "{name}");
    }
}

#[test]
fn several_services_of_one_host_are_one_and_what_takes_all_is_last() {
    let asks =
        |name: &str, uri: &str| format!("{{name: {name}, match: [{{uri: {{prefix: {uri}}}}}], {}}}", to("a"));
    let all = |name: &str| format!("{{name: {name}, {}}}", to("a"));
    let text = world()
        + &written("one", &http("'*'"))
        // Never asked: what takes everything is before it.
        + &bound("shop/old 2020-01-01T00:00:00Z", "edge/one", "a.example", &[asks("o1", "/o"), all("o2"), asks("o3", "/p")].join(", "))
        + &bound("shop/new 2022-01-01T00:00:00Z", "edge/one", "a.example", &[asks("n1", "/n"), all("n2")].join(", "))
        + &bound("a/middle 2021-01-01T00:00:00Z", "edge/one", "a.example, b.example", &[asks("m1", "/m"), asks("m2", "/")].join(", "));
    let gateway = served(&text);
    assert_eq!(names(&gateway, "a.example"), ["o1", "m1", "n1", "o2"]);
    assert_eq!(names(&gateway, "b.example"), ["m1", "m2"], "a prefix of every path takes everything too");

    // One rule, two matches: its parts go their own ways.
    let both =
        format!("{{name: both, match: [{{uri: {{exact: /x}}}}, {{}}, {{uri: {{exact: /y}}}}], {}}}", to("a"));
    let text = world()
        + &written("one", &http("'*'"))
        + &bound("shop/old 2020-01-01T00:00:00Z", "edge/one", "a.example", &both)
        + &bound("shop/new 2022-01-01T00:00:00Z", "edge/one", "a.example", &asks("n", "/n"));
    let gateway = served(&text);
    assert_eq!(names(&gateway, "a.example"), ["both", "n", "both"]);
    let matches: Vec<usize> =
        host(&gateway, "a.example").routes.iter().map(|route| route.matches.len()).collect();
    assert_eq!(matches, [1, 1, 1]);
}

#[test]
fn only_what_asks_for_nothing_takes_everything() {
    for (asked, last) in [
        ("{uri: {prefix: /}}", true),
        ("{uri: {regex: '.*'}}", true),
        ("{ignoreUriCase: true}", true),
        ("{port: 80}", true),
        ("{gateways: [edge/one]}", true),
        ("{sourceLabels: {istio: in}}", true),
        ("{uri: {exact: /}}", false),
        ("{method: {exact: GET}}", false),
        ("{scheme: {exact: http}}", false),
        ("{authority: {exact: a.example}}", false),
        ("{headers: {x: {}}}", false),
        ("{withoutHeaders: {x: {}}}", false),
        ("{queryParams: {x: {}}}", false),
    ] {
        let rule = format!("{{name: first, match: [{asked}], {}}}", to("a"));
        let text = world()
            + &written("one", &http("'*'"))
            + &bound("shop/old 2020-01-01T00:00:00Z", "edge/one", "a.example", &rule)
            + &bound(
                "shop/new 2022-01-01T00:00:00Z",
                "edge/one",
                "a.example",
                &format!("{{name: other, match: [{{uri: {{exact: /o}}}}], {}}}", to("b")),
            );
        let found = names(&served(&text), "a.example");
        assert_eq!(found == ["other", "first"], last, "{asked}: {found:?}");
    }
}

#[test]
fn a_match_holds_where_it_says() {
    for (asked, holds) in [
        ("{port: 80}", true),
        ("{port: 81}", false),
        ("{gateways: [edge/one]}", true),
        ("{gateways: [one]}", false),
        ("{gateways: [mesh]}", false),
        ("{gateways: [mesh, edge/one], sourceLabels: {no: such}}", true),
        ("{sourceLabels: {version: v2}}", true),
        ("{sourceLabels: {version: v1}}", false),
        ("{sourceNamespace: edge}", true),
        ("{sourceNamespace: shop}", false),
    ] {
        let rule = format!("{{match: [{asked}], {}}}", to("a"));
        let text =
            world() + &written("one", &http("'*'")) + &bound("shop/a", "edge/one, mesh", "a.example", &rule);
        let (gateway, _) = serve(&text);
        let found = hosts(&gateway, 80);
        assert_eq!(found.find(Some("a.example")).is_some(), holds, "{asked}");
        for host in found.values() {
            let decided = &host.routes[0].matches[0];
            let left = (decided.port, decided.source_labels.len(), &decided.source_namespace);
            assert_eq!(left, (None, 0, &None), "{asked}: decided already");
        }
    }
}

#[test]
fn a_service_for_gateways_and_the_mesh_holds_for_both() {
    let spec = format!("{{gateways: [mesh, edge/one], hosts: [a], http: [{{name: r, {}}}]}}", to("b"));
    let text = world() + &written("one", &http("'*'")) + &istio("VirtualService default/a", &spec);
    let (snapshot, problems) = serve_on(&text, None);
    assert_eq!(problems, []);
    assert_eq!(names(snapshot.gateway.as_ref().unwrap(), A), ["r"]);
    assert_eq!(&*routes(&snapshot, A, 80)[0].name, "r");
    // For gateways alone it is nothing between pods.
    let (snapshot, problems) = serve_on(&text.replace("mesh, ", ""), None);
    assert_eq!(problems, []);
    assert_eq!(&*routes(&snapshot, A, 80)[0].name, "default");
}

#[test]
fn who_does_not_see_a_service_is_not_routed_by_it() {
    let spec = |export: &str| {
        format!(
            "{{gateways: [edge/one], hosts: [a.example], exportTo: [{export}], http: [{{name: r, {}}}]}}",
            to("a")
        )
    };
    for (export, seen) in [("'*'", true), ("edge", true), (".", false), ("shop", false)] {
        let text =
            world() + &written("one", &http("'*'")) + &istio("VirtualService default/a", &spec(export));
        assert_eq!(hosts(&served(&text), 80).find(Some("a.example")).is_some(), seen, "{export}");
    }
}

#[test]
fn rules_are_those_that_the_gateways_pod_sees() {
    let subset = |head: &str, version: &str| {
        istio(
            &format!("DestinationRule {head}"),
            &format!("{{host: {A}, subsets: [{{name: s, labels: {{version: {version}}}}}]}}"),
        )
    };
    let route = format!("{{route: [{{destination: {{host: {A}, subset: s}}}}]}}");
    let text = world()
        + &pod("default", "a", "v2", "10.0.0.3")
        + &written("one", &http("'*'"))
        + &bound("shop/a", "edge/one", "a.example", &route)
        + &subset("default/a", "v1")
        + &subset("edge/a", "v2");
    let gateway = served(&text);
    let clusters: Vec<_> = gateway.clusters().collect();
    assert_eq!(addresses(clusters[0]), ["10.0.0.3:80"], "the rule of its own namespace comes first");
    assert_eq!(clusters[0].view.as_deref(), Some("edge"));
}

#[test]
fn delegates_and_mirrors_are_as_in_the_mesh() {
    let root = format!(
        "{{match: [{{uri: {{prefix: /d}}}}], delegate: {{name: d, namespace: default}}}}, {{name: rest, {}, mirror: {{host: {A}}}}}",
        to("b").replace("cluster.local", "cluster.local, port: {number: 81}")
    );
    let text = world()
        + &written("one", &http("'*'"))
        + &bound("shop/a", "edge/one", "a.example", &root)
        + &istio(
            "VirtualService default/d",
            "{http: [{name: delegated, route: [{destination: {host: a}}]}]}",
        );
    let gateway = served(&text);
    assert_eq!(names(&gateway, "a.example"), ["delegated", "rest"]);
    let found = host(&gateway, "a.example");
    assert_eq!(
        targets(&found.routes[0]),
        [format!("outbound|80||{A}")],
        "a short host is in the delegate's namespace"
    );
    assert_eq!(targets(&found.routes[1]), ["outbound|81||b.default.svc.cluster.local"]);
    assert!(matches!(&found.routes[1].mirrors[0].backend, Backend::Cluster(cluster) if *cluster.host == *A));
}

#[test]
fn https_redirect_is_for_every_host_of_its_server() {
    let server = http("'*.example', b.other").replace("hosts:", "tls: {httpsRedirect: true}, hosts:");
    let text = world()
        + &written("one", &server)
        + &written("two", &http("'*'"))
        + &bound("shop/a", "edge/one", "a.example, c.other", &format!("{{{}}}", to("a")))
        + &bound("shop/b", "edge/two", "b.other, d.other", &format!("{{{}}}", to("a")));
    let gateway = served(&text);
    let found = ["a.example", "x.example", "b.other", "d.other"]
        .map(|name| (host(&gateway, name).https_redirect, host(&gateway, name).routes.len()));
    assert_eq!(found, [(true, 1), (true, 0), (true, 1), (false, 1)]);
    assert!(hosts(&gateway, 80).find(Some("c.other")).is_none());
}

#[test]
fn what_leads_nowhere_is_said_by_whoever_serves_it_and_by_everybody() {
    let rules = "{route: [{destination: {host: nobody}}]}, {route: [{destination: {host: b, port: {number: 99}}}], mirror: {host: none}}";
    let text = world()
        + &written("one", &http("'*'"))
        + &bound(
            "default/a",
            "edge/one, two, mesh",
            "a.example",
            &rules.replace("}, {", "}, {match: [{uri: {exact: /}}], "),
        )
        + &istio(
            "VirtualService default/t",
            "{gateways: [edge/one], hosts: ['*'], tls: [{match: [{sniHosts: [x]}], route: [{destination: {host: lost}}]}]}",
        );
    let expected = [
        "VirtualService default/a: spec.gateways[1]: there is no Gateway default/two",
        "spec.http[0].route[0].destination.host: no Service has the host nobody.default.svc.cluster.local",
        "spec.http[1].mirror.host: no Service has the host none.default",
        "spec.http[1].route[0].destination.port: Service default/b (b.default.svc.cluster.local) has no TCP port 99",
        "VirtualService default/t: spec.tls[0].route[0].destination.host: no Service has the host lost.default",
    ];
    assert_problems(&build(&text).1, &expected);
    // What takes everything hides the second rule from the gateway, and nothing passes through it.
    let (gateway, problems) = serve(&text);
    assert_problems(&problems, &expected[..2]);
    assert!(
        matches!(&host(&gateway, "a.example").routes[0].action, RouteAction::Forward(to) if matches!(to[0].backend, Backend::Missing(_)))
    );
}

#[test]
fn what_is_the_same_for_several_is_one() {
    let text = world()
        + &written("one", &http("'*'"))
        + &bound("shop/a", "edge/one", "a.example, b.example, '*.c.example'", &format!("{{{}}}", to("a")));
    let gateway = served(&text);
    let tables: Vec<_> = hosts(&gateway, 80).values().map(|host| Arc::as_ptr(&host.routes)).collect();
    assert_eq!(tables.len(), 3);
    assert!(tables.iter().all(|table| std::ptr::addr_eq(*table, tables[0])), "{tables:?}");
}
