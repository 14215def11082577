//! YAML in, snapshot and problems out.
#![expect(clippy::unwrap_used, reason = "tests")]

mod authentication;
mod authorization;
mod bookinfo;
mod churn;
mod client_tls;
mod connection_pool;
mod delegates;
mod endpoints;
mod gateways;
mod incremental;
mod locality;
mod mesh_config;
mod request_authentication;
mod service_policies;
mod starting;
mod streams;
mod views;
mod workload_selector;
mod workloads;

use std::{sync::Arc, sync::atomic::Ordering, time::Duration};

use super::*;
use crate::{
    source::read_text,
    state::{
        defaults,
        snapshot::{Backend, Balancing, Cluster, HttpRoute, RouteAction},
    },
};

fn settings() -> Settings {
    Settings::default()
}

/// Compiles a text whose objects are all accepted.
fn build_on(text: &str, previous: Option<&Snapshot>) -> (Snapshot, Vec<Problem>) {
    let (objects, refused) = read_text(text);
    assert_eq!(refused, [], "{text}");
    compile(&objects, previous, &settings())
}

fn build(text: &str) -> (Snapshot, Vec<Problem>) {
    build_on(text, None)
}

fn texts(problems: &[Problem]) -> Vec<String> {
    problems.iter().map(ToString::to_string).collect()
}

/// Each of the problems, in order, contains its text.
fn assert_problems(problems: &[Problem], expected: &[&str]) {
    let problems = texts(problems);
    assert_eq!(problems.len(), expected.len(), "{problems:#?}");
    for (problem, expected) in problems.iter().zip(expected) {
        assert!(problem.contains(expected), "{problem:?} does not contain {expected:?}");
    }
}

/// A Service in one line.
fn service(namespace: &str, name: &str, ports: &str) -> String {
    format!(
        "---\n{{apiVersion: v1, kind: Service, metadata: {{name: {name}, namespace: {namespace}}}, \
         spec: {{selector: {{app: {name}}}, ports: [{ports}]}}}}\n"
    )
}

/// A Pod in one line, of the app and version in its name.
fn pod(namespace: &str, app: &str, version: &str, ip: &str) -> String {
    format!(
        "---\n{{apiVersion: v1, kind: Pod, metadata: {{name: {app}-{version}, namespace: {namespace}, \
         labels: {{app: {app}, version: {version}}}}}, status: {{podIP: {ip}}}}}\n"
    )
}

/// An Istio object: its first line is `kind namespace/name [created]`, the rest its spec.
fn istio(head: &str, spec: &str) -> String {
    let mut words = head.split_whitespace();
    let kind = words.next().unwrap();
    let (namespace, name) = words.next().unwrap().split_once('/').unwrap();
    let created = words.next().map_or(String::new(), |at| format!(", creationTimestamp: {at}"));
    format!(
        "---\n{{apiVersion: networking.istio.io/v1, kind: {kind}, \
         metadata: {{name: {name}, namespace: {namespace}{created}}}, spec: {spec}}}\n"
    )
}

fn routes(snapshot: &Snapshot, host: &str, port: u16) -> Vec<Arc<HttpRoute>> {
    snapshot.services[host].port_for("default", port).unwrap().routes.to_vec()
}

/// Names of the clusters a route leads to, or the sentence of what is missing.
fn targets(route: &HttpRoute) -> Vec<String> {
    let RouteAction::Forward(backends) = &route.action else { panic!("{route:?}") };
    let target = |backend: &Backend| match backend {
        Backend::Cluster(cluster) => cluster.name.to_string(),
        Backend::Missing(sentence) => sentence.to_string(),
    };
    backends.iter().map(|backend| target(&backend.backend)).collect()
}

fn addresses(cluster: &Cluster) -> Vec<String> {
    cluster.endpoints.iter().map(|endpoint| endpoint.address.to_string()).collect()
}

const A: &str = "a.default.svc.cluster.local";

#[test]
fn a_service_without_rules_has_the_default_route() {
    let (snapshot, problems) =
        build(&(service("default", "a", "{port: 80}") + &pod("default", "a", "v1", "10.0.0.1")));
    assert_eq!(problems, []);
    let [route] = &routes(&snapshot, A, 80)[..] else { panic!("one route") };
    assert_eq!((&*route.name, &*route.origin), ("default", "Service default/a"));
    assert!(route.matches.is_empty() && route.timeout.is_none());
    assert_eq!(route.retries.attempts, 2);
    assert_eq!(route.retries.on, defaults::retry_on());
    assert_eq!(targets(route), [format!("outbound|80||{A}")]);
    let cluster = &snapshot.services[A].port_for("default", 80).unwrap().cluster;
    assert_eq!(addresses(cluster), ["10.0.0.1:80"]);
    assert_eq!(
        (cluster.balancing, cluster.connect_timeout),
        (Balancing::LeastRequest, Duration::from_secs(10))
    );
    assert_eq!(snapshot.revision, 1);
}

#[test]
fn what_does_not_exist_answers_503_on_that_route_alone() {
    let table = [
        ("{host: b}", "host: no Service has the host b.default.svc.cluster.local"),
        (
            "{host: a.default}",
            "host: no Service has the host a.default, and a host with dots is taken as it stands",
        ),
        (
            "{host: a, port: {number: 81}}",
            "port: Service default/a (a.default.svc.cluster.local) has no TCP port 81",
        ),
        ("{host: a, subset: v9}", "subset: no DestinationRule defines the subset \"v9\" of a.default"),
    ];
    for (destination, sentence) in table {
        let spec = format!(
            "{{hosts: [a], http: [{{match: [{{uri: {{exact: /x}}}}], route: [{{destination: {destination}}}]}}, \
             {{route: [{{destination: {{host: a}}}}]}}]}}"
        );
        let text = service("default", "a", "{port: 80}") + &istio("VirtualService default/a", &spec);
        let (snapshot, problems) = build(&text);
        let routes = routes(&snapshot, A, 80);
        let expected = format!("VirtualService default/a: spec.http[0].route[0].destination.{sentence}");
        assert!(targets(&routes[0])[0].starts_with(&expected), "{:?}", targets(&routes[0]));
        assert_eq!(targets(&routes[1]), [format!("outbound|80||{A}")]);
        assert_problems(&problems, &[&format!("test.yaml: {expected}")]);
    }
}

#[test]
fn a_destination_without_port_takes_the_only_one_else_the_one_dialled() {
    let spec = "{hosts: [a], http: [{route: [{destination: {host: b}}]}]}";
    let virtual_service = istio("VirtualService default/a", spec);
    let one =
        service("default", "a", "{port: 80}") + &service("default", "b", "{port: 8080}") + &virtual_service;
    let target = |text: &str| targets(&routes(&build(text).0, A, 80)[0]).remove(0);
    assert_eq!(target(&one), "outbound|8080||b.default.svc.cluster.local");
    let ports = "{name: x, port: 80}, {name: y, port: 81}";
    let two = service("default", "a", "{port: 80}") + &service("default", "b", ports) + &virtual_service;
    assert_eq!(target(&two), "outbound|80||b.default.svc.cluster.local");
}

#[test]
fn matches_for_other_ports_and_gateways_are_left_out() {
    let to = "route: [{destination: {host: a, port: {number: 80}}}]";
    let spec = format!(
        "{{hosts: [a], gateways: [mesh, in], http: [{{name: in, match: [{{gateways: [in]}}], {to}}}, \
         {{name: both, match: [{{gateways: [in]}}, {{gateways: [mesh], port: 80}}], {to}}}]}}"
    );
    let ports = "{name: x, port: 80}, {name: y, port: 81}";
    let text = service("default", "a", ports) + &istio("VirtualService default/a", &spec) + &gateways::bare();
    let (snapshot, problems) = build(&text);
    assert_eq!(problems, []);
    let names =
        |port| routes(&snapshot, A, port).iter().map(|route| route.name.to_string()).collect::<Vec<_>>();
    assert_eq!(names(80), ["both"]);
    assert_eq!(routes(&snapshot, A, 80)[0].matches.len(), 1);
    assert_eq!(names(81), ["default"], "a VirtualService that says nothing of a port leaves it as it is");
}

#[test]
fn one_virtual_service_holds_whole() {
    let rule = |name: &str, host: &str| {
        format!("{{hosts: [{host}], http: [{{name: {name}, route: [{{destination: {{host: {A}}}}}]}}]}}")
    };
    let named = |host: &str, head: &str| {
        let name = head.split(['/', ' ']).nth(2).unwrap();
        istio(head, &rule(name, host))
    };
    let wild = "'*.svc.cluster.local'";
    let wilder = "'*.local'";
    let table = [
        (
            vec![
                named("a", "VirtualService default/new 2024-02-01T00:00:00Z"),
                named("a", "VirtualService default/old 2024-01-01T00:00:00Z"),
            ],
            "old",
            1,
        ),
        (
            vec![
                named(wild, "VirtualService default/old 2024-01-01T00:00:00Z"),
                named("a", "VirtualService default/new 2024-02-01T00:00:00Z"),
            ],
            "new",
            0,
        ),
        (vec![named(wilder, "VirtualService default/aa"), named(wild, "VirtualService default/bb")], "bb", 0),
        (vec![named("a", "VirtualService default/bb"), named("a", "VirtualService default/aa")], "aa", 1),
        (vec![named(A, "VirtualService zz/same"), named(A, "VirtualService aa/other")], "other", 1),
    ];
    for (objects, winner, conflicts) in table {
        let text = service("default", "a", "{port: 80}") + &objects.concat();
        let (snapshot, problems) = build(&text);
        assert_eq!(&*routes(&snapshot, A, 80)[0].name, winner, "{text}");
        assert_eq!(problems.len(), conflicts, "{problems:?}");
        assert!(texts(&problems).iter().all(|problem| problem.contains("is already routed by")));
    }
}

#[test]
fn rules_that_hold_for_nothing_say_so() {
    let text = service("default", "a", "{port: 80}")
        + &istio("VirtualService default/v", "{hosts: [b], http: [{route: [{destination: {host: a}}]}]}")
        + &istio(
            "VirtualService default/g",
            "{hosts: [b.example], gateways: [in], http: [{route: [{destination: {host: a}}]}]}",
        )
        + &gateways::bare()
        + &istio("DestinationRule default/d", "{host: b}")
        + &istio("DestinationRule other/e", &format!("{{host: {A}}}"))
        + &istio("DestinationRule istio-system/f", &format!("{{host: {A}}}"));
    let expected = [
        "DestinationRule default/d: spec.host: no Service has the host b.default.svc.cluster.local",
        "VirtualService default/v: spec.hosts: no Service has any of these hosts",
    ];
    assert_problems(&build(&text).1, &expected);
}

#[test]
fn destination_rules_are_found_and_merged() {
    let to = "{hosts: [a], http: [{route: [{destination: {host: a, subset: v1}, weight: 1}, \
              {destination: {host: a, subset: v2}, weight: 1}]}]}";
    let base = service("default", "a", "{port: 80}")
        + &pod("default", "a", "v1", "10.0.0.1")
        + &pod("default", "a", "v2", "10.0.0.2")
        + &istio("VirtualService default/a", to);
    let random =
        "trafficPolicy: {loadBalancer: {simple: RANDOM}, connectionPool: {tcp: {connectTimeout: 3s}}}";
    let robin = "trafficPolicy: {loadBalancer: {simple: ROUND_ROBIN}}";
    let text = base
        + &istio(
            "DestinationRule default/one 2024-01-01T00:00:00Z",
            &format!("{{host: a, {random}, subsets: [{{name: v1, labels: {{version: v1}}, {robin}}}]}}"),
        )
        + &istio(
            "DestinationRule default/two 2024-02-01T00:00:00Z",
            &format!(
                "{{host: a, {robin}, subsets: [{{name: v1, labels: {{version: v2}}}}, {{name: v2, labels: {{version: v2}}}}]}}"
            ),
        )
        + &istio("DestinationRule default/wild", &format!("{{host: '*.cluster.local', {robin}}}"))
        + &istio("DestinationRule istio-system/root", &format!("{{host: {A}, {robin}}}"));
    let (snapshot, problems) = build(&text);
    assert_eq!(problems, []);
    let RouteAction::Forward(backends) = &routes(&snapshot, A, 80)[0].action else { panic!("a route") };
    let seen: Vec<_> = backends
        .iter()
        .map(|backend| {
            let Backend::Cluster(cluster) = &backend.backend else { panic!("{backend:?}") };
            (addresses(cluster).concat(), cluster.balancing, cluster.connect_timeout.as_secs())
        })
        .collect();
    // The first policy at the top wins, a subset replaces it block by block, and the first subset of a name wins.
    assert_eq!(
        seen,
        [
            ("10.0.0.1:80".to_owned(), Balancing::RoundRobin, 3),
            ("10.0.0.2:80".to_owned(), Balancing::Random, 3),
        ]
    );
    assert_eq!(snapshot.services[A].port_for("default", 80).unwrap().cluster.balancing, Balancing::Random);
}

#[test]
fn the_root_namespace_rules_where_the_service_has_none() {
    let rule = |namespace: &str, simple: &str| {
        let spec = format!(
            "{{host: '*.default.svc.cluster.local', trafficPolicy: {{loadBalancer: {{simple: {simple}}}}}}}"
        );
        istio(&format!("DestinationRule {namespace}/r"), &spec)
    };
    let base = service("default", "a", "{port: 80}");
    let balancing = |text: &str| build(text).0.services[A].port_for("default", 80).unwrap().cluster.balancing;
    assert_eq!(balancing(&(base.clone() + &rule("istio-system", "RANDOM"))), Balancing::Random);
    let both = base + &rule("istio-system", "RANDOM") + &rule("default", "ROUND_ROBIN");
    assert_eq!(balancing(&both), Balancing::RoundRobin);
}

#[test]
fn what_endpoints_and_clusters_remember_survives() {
    let spec = "{hosts: [a], http: [{route: [{destination: {host: a, subset: v1}}]}]}";
    let base = service("default", "a", "{port: 80}")
        + &istio("DestinationRule default/a", "{host: a, subsets: [{name: v1, labels: {version: v1}}]}")
        + &istio("VirtualService default/a", spec)
        + &pod("default", "a", "v1", "10.0.0.1");
    let (first, _) = build(&base);
    let subset = |snapshot: &Snapshot| {
        let RouteAction::Forward(backends) = &routes(snapshot, A, 80)[0].action else { panic!("a route") };
        let Backend::Cluster(cluster) = &backends[0].backend else { panic!("a cluster") };
        Arc::clone(cluster)
    };
    let whole =
        |snapshot: &Snapshot| Arc::clone(&snapshot.services[A].port_for("default", 80).unwrap().cluster);
    subset(&first).endpoints[0].state.in_flight.store(7, Ordering::Relaxed);
    subset(&first).state.next.store(5, Ordering::Relaxed);
    let (second, _) = build_on(&(base + &pod("default", "a", "v2", "10.0.0.2")), Some(&first));
    assert_eq!(second.revision, 2);
    assert_eq!(subset(&second).endpoints[0].state.in_flight.load(Ordering::Relaxed), 7);
    assert_eq!(subset(&second).state.next.load(Ordering::Relaxed), 5);
    assert_eq!(whole(&second).endpoints[0].state.in_flight.load(Ordering::Relaxed), 0, "counted by cluster");
    assert_eq!(whole(&second).endpoints.len(), 2);
    let ip = "10.0.0.1".parse().unwrap();
    assert!(Arc::ptr_eq(first.workload_at(ip).unwrap(), second.workload_at(ip).unwrap()));
}

#[test]
fn retries_fill_in_what_is_not_said() {
    let spec = "{hosts: [a], http: [{retries: {attempts: 5}, timeout: 3s, route: [{destination: {host: a}}]}, \
                {retries: {attempts: 0}, route: [{destination: {host: a}}]}]}";
    let text = service("default", "a", "{port: 80}") + &istio("VirtualService default/a", spec);
    let routes = routes(&build(&text).0, A, 80);
    assert_eq!((routes[0].retries.attempts, &routes[0].retries.on), (5, &defaults::retry_on()));
    assert_eq!(
        (routes[0].timeout, routes[0].retries.backoff),
        (Some(Duration::from_secs(3)), Duration::from_millis(25))
    );
    assert_eq!(routes[1].retries.attempts, 0);
}
