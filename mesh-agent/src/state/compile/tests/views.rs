//! What depends on the client's namespace: that it is there where it differs, only there, and remembered apart.

use super::*;

/// Services `a` and `b` in `default`, and a pod in each of `default`, `shop` and `other`.
fn world() -> String {
    service("default", "a", "{port: 80}")
        + &service("default", "b", "{port: 80}")
        + &pod("default", "a", "v1", "10.0.0.1")
        + &pod("shop", "client", "v1", "10.0.9.1")
        + &pod("other", "client", "v1", "10.0.9.2")
}

fn policy(head: &str, host: &str, more: &str) -> String {
    let spec = format!("{{host: {host}, trafficPolicy: {{loadBalancer: {{simple: RANDOM}}}}{more}}}");
    istio(&format!("DestinationRule {head}"), &spec)
}

/// Namespaces that have a view of a service, sorted.
fn viewers(snapshot: &Snapshot, host: &str) -> Vec<String> {
    let mut viewers: Vec<_> = snapshot.services[host].views.keys().map(ToString::to_string).collect();
    viewers.sort();
    viewers
}

const B: &str = "b.default.svc.cluster.local";

#[test]
fn only_those_who_see_something_else_have_a_view() {
    let route = "{hosts: [a], http: [{route: [{destination: {host: b}}]}]}";
    let route = istio("VirtualService default/a", route);
    let limited = |to: &str| {
        let spec =
            format!("{{hosts: [a], exportTo: [{to}], http: [{{route: [{{destination: {{host: b}}}}]}}]}}");
        istio("VirtualService default/a", &spec)
    };
    let table: [(String, &[&str], &[&str]); 9] = [
        (String::new(), &[], &[]),
        (policy("default/r", A, ""), &[], &[]),
        (policy("istio-system/r", A, ""), &[], &[]),
        (policy("shop/r", A, ""), &["shop"], &[]),
        // Nobody is there to look.
        (policy("empty/r", A, ""), &[], &[]),
        // Where a route leads counts too.
        (policy("shop/r", B, "") + &route, &["shop"], &["shop"]),
        (policy("default/r", B, ", exportTo: [other]") + &route, &["other"], &["other"]),
        (limited("., other"), &["default", "other"], &[]),
        (policy("shop/r", "'*.local'", ""), &["shop"], &["shop"]),
    ];
    for (rules, of_a, of_b) in table {
        let (snapshot, problems) = build(&(world() + &rules));
        assert_eq!(problems, [], "{rules}");
        assert_eq!(viewers(&snapshot, A), of_a, "{rules}");
        assert_eq!(viewers(&snapshot, B), of_b, "{rules}");
    }
}

#[test]
fn a_cluster_that_is_the_same_for_all_is_shared() {
    let route = "{hosts: [a], http: [{route: [{destination: {host: a}, weight: 1}, {destination: {host: b}, weight: 1}]}]}";
    let text = world() + &istio("VirtualService default/a", route) + &policy("shop/r", B, "");
    let (snapshot, problems) = build(&text);
    assert_eq!(problems, []);
    let of = |namespace: &str| {
        let port = snapshot.services[A].port_for(namespace, 80).unwrap();
        let RouteAction::Forward(backends) = &port.routes[0].action else { panic!("a route") };
        let cluster = |place: usize| {
            let Backend::Cluster(cluster) = &backends[place].backend else { panic!("a cluster") };
            Arc::clone(cluster)
        };
        (cluster(0), cluster(1))
    };
    let ((a, b), (shop_a, shop_b)) = (of("default"), of("shop"));
    assert!(Arc::ptr_eq(&a, &shop_a) && !Arc::ptr_eq(&b, &shop_b));
    assert_eq!((b.view.as_deref(), shop_b.view.as_deref()), (None, Some("shop")));
    assert_eq!((b.balancing, shop_b.balancing), (Balancing::LeastRequest, Balancing::Random));
    assert!(Arc::ptr_eq(&b, &of("other").1));
}

#[test]
fn each_view_remembers_its_own() {
    let text = world() + &policy("shop/r", A, "");
    let (first, _) = build(&text);
    let cluster = |snapshot: &Snapshot, namespace: &str| {
        Arc::clone(&snapshot.services[A].port_for(namespace, 80).unwrap().cluster)
    };
    cluster(&first, "shop").endpoints[0].state.in_flight.store(7, Ordering::Relaxed);
    cluster(&first, "shop").state.active.store(5, Ordering::Relaxed);
    cluster(&first, "default").endpoints[0].state.in_flight.store(2, Ordering::Relaxed);
    let (second, _) = build_on(&(text + &pod("default", "a", "v2", "10.0.0.2")), Some(&first));
    let in_flight =
        |namespace: &str| cluster(&second, namespace).endpoints[0].state.in_flight.load(Ordering::Relaxed);
    assert_eq!((in_flight("shop"), in_flight("default"), in_flight("other")), (7, 2, 2));
    assert_eq!(cluster(&second, "shop").state.active.load(Ordering::Relaxed), 5);
    assert_eq!(cluster(&second, "default").state.active.load(Ordering::Relaxed), 0);
}

#[test]
fn mirrors_and_streams_are_remembered_too() {
    let spec = "{hosts: [a], http: [{mirror: {host: b}, route: [{destination: {host: a}}]}], \
                tcp: [{route: [{destination: {host: a, subset: v1}}]}]}";
    let text = world()
        + &istio("VirtualService default/a", spec)
        + &istio("DestinationRule default/a", "{host: a, subsets: [{name: v1, labels: {version: v1}}]}");
    let (first, problems) = build(&text);
    assert_eq!(problems, []);
    let of = |snapshot: &Snapshot| {
        let port = snapshot.services[A].port_for("default", 80).unwrap();
        let backends = [&port.routes[0].mirrors[0].backend, &port.streams[0].backends[0].backend];
        backends.map(|backend| {
            let Backend::Cluster(cluster) = backend else { panic!("a cluster") };
            Arc::clone(cluster)
        })
    };
    for (n, cluster) in of(&first).iter().enumerate() {
        cluster.state.next.store(n as u64 + 1, Ordering::Relaxed);
    }
    let (second, _) = build_on(&text, Some(&first));
    assert_eq!(of(&second).map(|cluster| cluster.state.next.load(Ordering::Relaxed)), [1, 2]);
}

#[test]
fn invisible_services_keep_their_address() {
    let text = "---\n{apiVersion: v1, kind: Service, metadata: {name: a, annotations: {networking.istio.io/exportTo: shop}}, \
                spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}}\n";
    let (snapshot, problems) = build(text);
    assert_eq!(problems, []);
    let ip = "10.96.0.1".parse().unwrap();
    assert!(snapshot.service_at(ip, "shop").is_some() && snapshot.service_at(ip, "default").is_none());
    assert!(snapshot.vips.contains_key(&ip));
}

#[test]
fn views_grow_with_what_is_written() {
    let (services, namespaces) = (60, 30);
    let mut text: String =
        (0..services).map(|n| service("default", &format!("s{n}"), "{port: 80}")).collect();
    for n in 0..namespaces {
        text += &pod(&format!("n{n}"), "client", "v1", &format!("10.0.9.{n}"));
        text += &policy(&format!("n{n}/r"), &format!("s{n}.default.svc.cluster.local"), "");
    }
    let (snapshot, problems) = build(&text);
    assert_eq!(problems, []);
    let views: usize = snapshot.services.values().map(|service| service.views.len()).sum();
    assert_eq!(views, namespaces, "one for each rule, not one for each service and namespace");
}
