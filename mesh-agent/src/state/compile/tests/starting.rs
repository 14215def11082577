//! Pods that have no address yet are known to who certifies them, whatever the changes were.

use std::path::Path;

use super::*;

fn of_cluster(node: Option<&str>) -> Settings {
    let netns = Netns::Node(Path::new("/run/pods").into());
    Settings { node: node.map(Into::into), netns, ..Settings::default() }
}

fn pod(ip: Option<&str>, more: &str) -> String {
    let status = ip.map(|ip| format!("status: {{podIP: {ip}}}\n")).unwrap_or_default();
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: cart, namespace: shop, uid: u1}}\n\
         spec: {{nodeName: a, serviceAccountName: cart, containers: []{more}}}\n{status}"
    )
}

fn namespace(mode: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, labels: {{mesh.io/dataplane-mode: {mode}}}}}\n"
    )
}

fn set(compiled: &mut Compiled, yaml: &str) {
    let (objects, refused) = read_text(yaml);
    assert_eq!(refused, [], "{yaml}");
    compiled.apply(objects.into_iter().map(|(key, object)| Change::Set(key, object)).collect());
}

fn known(compiled: &Compiled) -> Vec<String> {
    let starting = compiled.snapshot().starting.values();
    starting.map(|pod| format!("{} on {}", pod.identity, pod.node)).collect()
}

#[test]
fn a_pod_is_known_from_its_node_to_its_address() {
    let mut compiled = Compiled::new(of_cluster(None));
    set(&mut compiled, &namespace("node"));
    set(&mut compiled, &pod(None, ""));
    assert_eq!(known(&compiled), ["spiffe://cluster.local/ns/shop/sa/cart on a"]);
    // Its namespace leaves the mesh, and comes back.
    set(&mut compiled, &namespace("none"));
    assert!(known(&compiled).is_empty());
    set(&mut compiled, &namespace("node"));
    assert_eq!(known(&compiled).len(), 1);
    set(&mut compiled, &pod(Some("10.0.0.7"), ""));
    assert!(known(&compiled).is_empty(), "it has an address");
    assert!(compiled.snapshot().workload_at([10, 0, 0, 7].into()).is_some_and(|pod| pod.enrolled));
    set(&mut compiled, &pod(None, ""));
    compiled.apply(vec![Change::Gone(ObjectKey::new("Pod", "shop", "cart"))]);
    assert!(known(&compiled).is_empty(), "it is gone");
}

#[test]
fn pods_of_the_host_and_agents_are_not_asked_about() {
    let mut compiled = Compiled::new(of_cluster(None));
    set(&mut compiled, &namespace("node"));
    set(&mut compiled, &pod(None, ", hostNetwork: true"));
    assert!(known(&compiled).is_empty());
    let mut agent = Compiled::new(of_cluster(Some("a")));
    set(&mut agent, &namespace("node"));
    set(&mut agent, &pod(None, ""));
    assert!(known(&agent).is_empty());
}
