//! Whose `connectionPool` holds, and whose `tunnel`.

use super::*;
use crate::state::snapshot::{Cluster, ConnectionPool};

/// The pool of port 80 of the service, and of its subset v1, and whether its connections are never direct.
fn pools(policy: &str, of_subset: &str) -> [(ConnectionPool, bool); 2] {
    clusters(policy, of_subset).map(|cluster| (cluster.pool, cluster.limits_connections))
}

fn clusters(policy: &str, of_subset: &str) -> [Arc<Cluster>; 2] {
    let to = "{hosts: [a], http: [{route: [{destination: {host: a, subset: v1}}]}]}";
    let rule = format!(
        "{{host: a, trafficPolicy: {{{policy}}}, subsets: [{{name: v1, labels: {{version: v1}}, trafficPolicy: {{{of_subset}}}}}]}}"
    );
    let text = service("default", "a", "{port: 80}")
        + &istio("VirtualService default/a", to)
        + &istio("DestinationRule default/a", &rule);
    let (snapshot, problems) = build(&text);
    assert_eq!(problems, []);
    let RouteAction::Forward(backends) = &routes(&snapshot, A, 80)[0].action else { panic!("a route") };
    let Backend::Cluster(subset) = &backends[0].backend else { panic!("{backends:?}") };
    let whole = &snapshot.services[A].port_for("default", 80).unwrap().cluster;
    assert_ne!(whole.state.id, subset.state.id, "each is counted by itself");
    [whole, subset].map(Arc::clone)
}

#[test]
fn a_block_replaces_the_one_above_it_whole() {
    let of = |connections, requests| ConnectionPool { connections, requests, ..ConnectionPool::UNLIMITED };
    let (tcp, http) =
        ("connectionPool: {tcp: {maxConnections: 5}}", "connectionPool: {http: {http2MaxRequests: 7}}");
    let whole = (of(Some(5), None), true);
    assert_eq!(pools("", ""), [(ConnectionPool::UNLIMITED, false); 2]);
    assert_eq!(pools(tcp, "loadBalancer: {simple: RANDOM}"), [whole, whole]);
    assert_eq!(pools(tcp, http), [whole, (of(None, Some(7)), true)]);
    // What a port has of its own is all that it has.
    let port = format!("portLevelSettings: [{{port: {{number: 80}}, {http}}}]");
    assert_eq!(pools(&format!("{tcp}, {port}"), ""), [(of(None, Some(7)), true); 2]);
    let bare = "portLevelSettings: [{port: {number: 80}, loadBalancer: {simple: RANDOM}}]";
    assert_eq!(pools(tcp, bare), [whole, (ConnectionPool::UNLIMITED, false)]);
    let other = "portLevelSettings: [{port: {number: 81}, connectionPool: {}}]";
    assert_eq!(pools(&format!("{tcp}, {other}"), ""), [whole, whole]);
}

#[test]
fn a_budget_of_retries_comes_before_a_number_of_them() {
    let retries = |pools: [(ConnectionPool, bool); 2]| pools.map(|(pool, _)| pool.retries);
    let most = "connectionPool: {http: {maxRetries: 5}}";
    assert_eq!(retries(pools(most, "")), [Some(5), Some(5)]);
    assert_eq!(retries(pools(&format!("{most}, retryBudget: {{}}"), "")), [None, None]);
    assert_eq!(retries(pools(most, "retryBudget: {}")), [Some(5), None]);
}

#[test]
fn a_tunnel_holds_for_each_port_and_for_subsets_without_their_own() {
    let tunnels = |policy: &str, of_subset: &str| {
        let shown = |cluster: Arc<Cluster>| {
            // Bytes that went from app to app would pass the proxy by.
            assert_eq!(cluster.tunnel.is_some(), cluster.limits_connections, "{policy}, {of_subset}");
            cluster.tunnel.as_ref().map_or_else(String::new, ToString::to_string)
        };
        clusters(policy, of_subset).map(shown)
    };
    let (one, other) = (
        "tunnel: {targetHost: one.example, targetPort: 1}",
        "tunnel: {protocol: POST, targetHost: other.example, targetPort: 2}",
    );
    let [by_one, by_other] = ["CONNECT one.example:1", "POST other.example:2"];
    assert_eq!(tunnels("", ""), ["", ""]);
    assert_eq!(tunnels(one, ""), [by_one, by_one]);
    assert_eq!(tunnels(one, other), [by_one, by_other]);
    assert_eq!(tunnels("", other), ["", by_other]);
    // What a port has of its own is all of that but the tunnel, which ports have not.
    let of_port = "portLevelSettings: [{port: {number: 80}, loadBalancer: {simple: RANDOM}}]";
    assert_eq!(tunnels(&format!("{one}, {of_port}"), ""), [by_one, by_one]);
}
