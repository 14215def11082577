//! Services and the addresses behind them.

use super::*;
use crate::state::snapshot::Protocol;

/// A Service `a` that selects `app: a`, with these parts of its spec.
fn selecting(spec: &str) -> String {
    format!(
        "---\n{{apiVersion: v1, kind: Service, metadata: {{name: a}}, spec: {{selector: {{app: a}}, {spec}}}}}\n"
    )
}

/// A Pod labelled `app: a` with these parts of its metadata, spec and status.
fn backing(name: &str, meta: &str, spec: &str, status: &str) -> String {
    format!(
        "---\n{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, labels: {{app: a}}{meta}}}, spec: {{{spec}}}, \
         status: {{{status}}}}}\n"
    )
}

/// An `EndpointSlice` of the service `a`.
fn slice(name: &str, family: &str, ports: &str, endpoints: &str) -> String {
    format!(
        "---\n{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: {family}, \
         metadata: {{name: {name}, labels: {{kubernetes.io/service-name: a}}}}, ports: [{ports}], \
         endpoints: [{endpoints}]}}\n"
    )
}

fn behind(text: &str, port: u16) -> Vec<String> {
    let (snapshot, problems) = build(text);
    assert_eq!(problems, [], "{text}");
    addresses(&snapshot.services[A].port_for("default", port).unwrap().cluster)
}

#[test]
fn readiness_of_selected_pods() {
    let ready = |status: &str| format!("podIP: 10.0.0.1, conditions: [{{type: Ready, status: '{status}'}}]");
    let table = [
        (backing("p", "", "", "podIP: 10.0.0.1"), 1),
        (backing("p", "", "", &ready("True")), 1),
        (backing("p", "", "", &ready("False")), 0),
        (backing("p", "", "", &ready("Unknown")), 0),
        (backing("p", ", deletionTimestamp: '2024-01-01T00:00:00Z'", "", &ready("True")), 0),
        (backing("p", ", namespace: other", "", &ready("True")), 0),
        (backing("p", "", "", "podIP: 10.0.0.1, phase: Succeeded"), 0),
        (pod("default", "b", "v1", "10.0.0.1"), 0),
    ];
    for (pod, count) in table {
        assert_eq!(behind(&(selecting("ports: [{port: 80}]") + &pod), 80).len(), count, "{pod}");
    }
    let unready = selecting("publishNotReadyAddresses: true, ports: [{port: 80}]")
        + &backing("p", "", "", &ready("False"));
    assert_eq!(behind(&unready, 80).len(), 1);
    let unselective =
        "---\n{apiVersion: v1, kind: Service, metadata: {name: a}, spec: {ports: [{port: 80}]}}\n".to_owned();
    assert!(behind(&(unselective + &backing("p", "", "", &ready("True"))), 80).is_empty());
}

#[test]
fn target_ports() {
    let containers = "containers: [{name: x, ports: [{name: web, containerPort: 8080, protocol: UDP}, {name: web, containerPort: 8081}]}], \
                      initContainers: [{name: i, ports: [{name: job, containerPort: 1}]}, \
                      {name: s, restartPolicy: Always, ports: [{name: side, containerPort: 9000}]}]";
    let pod = backing("p", "", containers, "podIP: 10.0.0.1");
    let table = [
        ("{port: 80}", vec!["10.0.0.1:80"]),
        ("{port: 80, targetPort: 8000}", vec!["10.0.0.1:8000"]),
        ("{port: 80, targetPort: web}", vec!["10.0.0.1:8081"]),
        ("{port: 80, targetPort: side}", vec!["10.0.0.1:9000"]),
        ("{port: 80, targetPort: job}", vec![]),
        ("{port: 80, targetPort: nobody}", vec![]),
        ("{port: 80, targetPort: 70000}", vec![]),
    ];
    for (port, expected) in table {
        assert_eq!(behind(&(selecting(&format!("ports: [{port}]")) + &pod), 80), expected, "{port}");
    }
}

#[test]
fn one_family_that_suits_the_service() {
    let dual = backing("p", "", "", "podIPs: [{ip: 10.0.0.1}, {ip: 'fd00::1'}]");
    let six = backing("q", "", "", "podIPs: [{ip: 'fd00::2'}]");
    let table = [
        ("clusterIP: 10.96.0.1", &dual, "10.0.0.1:80"),
        ("clusterIPs: ['fd01::1', 10.96.0.1]", &dual, "[fd00::1]:80"),
        ("clusterIPs: [10.96.0.1, 'fd01::1']", &dual, "10.0.0.1:80"),
        ("clusterIP: None", &dual, "10.0.0.1:80"),
        ("clusterIP: None, ipFamilies: [IPv6, IPv4]", &dual, "[fd00::1]:80"),
        ("clusterIP: 10.96.0.1", &six, "[fd00::2]:80"),
    ];
    for (spec, pod, expected) in table {
        assert_eq!(
            behind(&(selecting(&format!("{spec}, ports: [{{port: 80}}]")) + pod), 80),
            [expected],
            "{spec}"
        );
    }
}

#[test]
fn slices_come_before_selectors() {
    let base = selecting("ports: [{name: x, port: 80}, {name: y, port: 81}]")
        + &backing("p", "", "", "podIP: 10.0.0.9");
    let endpoints = "{addresses: [10.0.0.2], conditions: {ready: true}}, {addresses: [10.0.0.1, 10.0.0.7]}, \
                     {addresses: [10.0.0.3], conditions: {ready: false}}, {addresses: [10.0.0.2]}";
    let text = base.clone()
        + &slice("one", "IPv4", "{name: x, port: 8080}, {name: y, port: 8081, protocol: UDP}", endpoints)
        + &slice("two", "IPv6", "{name: x, port: 8080}", "{addresses: ['fd00::1']}");
    assert_eq!(behind(&text, 80), ["10.0.0.1:8080", "10.0.0.2:8080"]);
    assert!(behind(&text, 81).is_empty());
    let bad = [
        (
            slice("one", "FQDN", "{name: x, port: 80}", "{addresses: [a.example]}"),
            "addressType: FQDN is not supported yet",
        ),
        (slice("one", "IPv4", "{name: x, port: 0}", ""), "ports: 0 is not a port number"),
        (slice("one", "IPv4", "{name: x, port: 80}", "{addresses: [x]}"), "endpoints[0].addresses[0]: \"x\""),
    ];
    for (slice, expected) in bad {
        let (snapshot, problems) = build(&(base.clone() + &slice));
        assert_problems(&problems, &[&format!("EndpointSlice default/one: {expected}")]);
        assert!(snapshot.services[A].port_for("default", 80).unwrap().cluster.endpoints.is_empty());
    }
}

#[test]
fn endpoints_know_their_pod_and_its_subset() {
    let rule = istio("DestinationRule default/a", "{host: a, subsets: [{name: v1, labels: {version: v1}}]}");
    let route = istio(
        "VirtualService default/a",
        "{hosts: [a], http: [{route: [{destination: {host: a, subset: v1}}]}]}",
    );
    let host = "---\n{apiVersion: v1, kind: Pod, metadata: {name: h, labels: {app: a, version: v1}}, \
                spec: {hostNetwork: true}, status: {podIP: 192.0.2.1}}\n";
    let rest = rule
        + &route
        + host
        + &pod("default", "a", "v1", "10.0.0.1")
        + &pod("default", "a", "v2", "10.0.0.2");
    let selected = selecting("ports: [{name: x, port: 80}]") + &rest;
    let target = "targetRef: {kind: Pod, name: h}";
    let endpoints =
        format!("{{addresses: [10.0.0.1]}}, {{addresses: [10.0.0.2]}}, {{addresses: [192.0.2.1], {target}}}");
    let sliced = selected.clone() + &slice("one", "IPv4", "{name: x, port: 80}", &endpoints);
    for text in [selected, sliced] {
        let (snapshot, problems) = build(&text);
        assert_eq!(problems, []);
        let RouteAction::Forward(backends) = &routes(&snapshot, A, 80)[0].action else { panic!("a route") };
        let Backend::Cluster(cluster) = &backends[0].backend else { panic!("a cluster") };
        assert_eq!(addresses(cluster), ["10.0.0.1:80", "192.0.2.1:80"], "{text}");
        let names: Vec<_> =
            cluster.endpoints.iter().map(|e| e.workload.as_ref().map(|w| w.name.to_string())).collect();
        assert_eq!(names, [Some("a-v1".to_owned()), None], "pods of the host network share their address");
        assert_eq!(
            (cluster.subset.as_deref(), &*cluster.name),
            (Some("v1"), "outbound|80|v1|a.default.svc.cluster.local")
        );
    }
}

#[test]
fn cluster_addresses_and_ports() {
    let ports = "ports: [{name: http, port: 80}, {name: dns, port: 53, protocol: UDP}, {name: x, port: 5432}, {name: y, port: 9000}]";
    let text = selecting(&format!("clusterIPs: [10.96.0.1, 'fd01::1'], {ports}"))
        + "---\n{apiVersion: v1, kind: Service, metadata: {name: headless}, spec: {clusterIP: None, ports: [{port: 80}]}}\n";
    let (snapshot, problems) = build(&text);
    assert_eq!(problems, []);
    assert_eq!(snapshot.vips.len(), 2);
    let service = snapshot.service_at("fd01::1".parse().unwrap(), "default").unwrap();
    let seen: Vec<_> = service.ports.iter().map(|port| (port.port, port.protocol)).collect();
    assert_eq!(seen, [(80, Some(Protocol::Http1)), (5432, Some(Protocol::Opaque)), (9000, None)]);
    assert!(snapshot.services["headless.default.svc.cluster.local"].vips.is_empty());
}

#[test]
fn endpoints_of_headless_services_are_dialled_by_their_addresses() {
    let service = |name: &str, spec: &str| {
        format!(
            "---\n{{apiVersion: v1, kind: Service, metadata: {{name: {name}}}, spec: {{{spec}, selector: {{app: a}}}}}}\n"
        )
    };
    let rules = "---\n{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {name: b}, spec: {host: b, \
                 trafficPolicy: {loadBalancer: {simple: ROUND_ROBIN}, connectionPool: {tcp: {maxConnections: 7}}}}}\n";
    let ports = "ports: [{name: http, port: 80, targetPort: 8080}, {name: tcp, port: 81, targetPort: 9000}]";
    let text = selecting("clusterIPs: [10.96.0.1], ports: [{name: http, port: 8080}]")
        + &service("b", &format!("clusterIP: None, {ports}"))
        + &service("c", &format!("clusterIP: None, {ports}"))
        // Without an address it is not headless yet.
        + &service("a-new", "ports: [{name: http, port: 80, targetPort: 7070}]")
        + &backing("p", "", "nodeName: n", "podIP: 10.0.0.5")
        + rules;
    let (snapshot, problems) = build(&text);
    assert_eq!(problems, []);
    let at = |port: u16| {
        let found = snapshot.headless_at(([10, 0, 0, 5], port).into(), "default");
        found.map(|(service, port)| (&*service.name, port))
    };
    assert_eq!([at(8080), at(9000), at(80), at(7070)], [Some(("b", 80)), Some(("b", 81)), None, None]);
    let cluster = &snapshot.services["b.default.svc.cluster.local"].ports[0].cluster;
    assert_eq!((cluster.balancing, cluster.pool.connections), (Balancing::RoundRobin, Some(7)));
}

#[test]
fn services_that_cannot_be_as_written() {
    let second = |spec: &str| {
        format!("---\n{{apiVersion: v1, kind: Service, metadata: {{name: b}}, spec: {{{spec}}}}}\n")
    };
    let base = selecting("clusterIP: 10.96.0.1, ports: [{port: 80}]");
    let table = [
        (
            second("clusterIP: 10.96.0.1"),
            "spec.clusterIP: 10.96.0.1 is already an address of Service default/a",
        ),
        (second("clusterIPs: [x]"), "spec.clusterIPs[0]: \"x\" is not an address"),
        (
            second("type: ExternalName, externalName: x.example"),
            "spec.type: ExternalName is not supported yet",
        ),
        (second("ports: [{name: x, port: 80}, {name: y, port: 80}]"), "spec.ports[1].port: 80"),
        (second("ports: [{port: 0}]"), "spec.ports[0].port: 0"),
    ];
    for (text, expected) in table {
        let (snapshot, problems) = build(&(base.clone() + &text));
        assert_problems(&problems, &[&format!("Service default/b: {expected}")]);
        assert_eq!(&*snapshot.service_at("10.96.0.1".parse().unwrap(), "default").unwrap().name, "a");
    }
}
