//! Pods: address, enrolment, names.

use std::path::{Path, PathBuf};

use super::*;
use crate::state::snapshot::Workload;

/// A Pod with this metadata, spec and status, all in flow style.
fn raw(meta: &str, spec: &str, status: &str) -> String {
    format!(
        "---\n{{apiVersion: v1, kind: Pod, metadata: {{{meta}}}, spec: {{{spec}}}, status: {{{status}}}}}\n"
    )
}

fn only(text: &str) -> Arc<Workload> {
    let (snapshot, problems) = build(text);
    assert_eq!(problems, [], "{text}");
    assert_eq!(snapshot.workloads.len(), 1, "{text}");
    Arc::clone(snapshot.workloads.values().next().unwrap())
}

#[test]
fn enrolment() {
    const NETNS: &str = "annotations: {mesh.io/netns: /run/netns/a}";
    let namespace = |mode: &str| {
        format!(
            "---\n{{apiVersion: v1, kind: Namespace, metadata: {{name: default, labels: {{mesh.io/dataplane-mode: {mode}}}}}}}\n"
        )
    };
    let label = |mode: &str| format!("name: a, labels: {{mesh.io/dataplane-mode: {mode}}}, {NETNS}");
    let plain = format!("name: a, {NETNS}");
    let table = [
        (String::new(), plain.clone(), false, 0),
        (String::new(), label("node"), true, 0),
        (namespace("node"), plain.clone(), true, 0),
        (namespace("node"), label("none"), false, 0),
        (namespace("none"), label("node"), true, 0),
        (namespace("node"), label("sidecar"), true, 1),
        (namespace("ambient"), plain, false, 1),
        (namespace("node"), "name: a".to_owned(), false, 1),
    ];
    for (namespace, meta, enrolled, problems) in table {
        let (snapshot, found) = build(&(namespace + &raw(&meta, "", "podIP: 10.0.0.1")));
        assert_eq!(found.len(), problems, "{meta}: {found:?}");
        assert_eq!(snapshot.workloads.values().next().unwrap().enrolled, enrolled, "{meta}");
    }
}

/// What the agent of node `n` of a cluster, or its controller, makes of a pod on `on`: whether it is in the mesh, and where its
/// network namespace is.
fn in_a_cluster(agent_of: Option<&str>, on: &str, meta: &str) -> (bool, Option<PathBuf>) {
    let text = raw(&format!("name: a, {meta}"), &format!("nodeName: {on}"), "podIP: 10.0.0.1");
    let netns = Netns::Node(Path::new("/run/pods").into());
    let settings = Settings { netns, node: agent_of.map(Arc::from), ..settings() };
    let (snapshot, problems) = compile(&read_text(&text).0, None, &settings);
    assert_eq!(problems, [], "{text}");
    let pod = snapshot.workloads.values().next().unwrap();
    (pod.enrolled, pod.netns.clone())
}

#[test]
fn in_a_cluster_labels_say_who_joins_and_agents_who_has_joined() {
    const LABEL: &str = "labels: {mesh.io/dataplane-mode: node}";
    let here = Some(PathBuf::from("/run/pods/0b1c-2d"));
    let uid = "uid: 0b1c-2d";
    let announced = ["mesh.io/enrolled: 'true'", "ambient.istio.io/redirection: enabled"];
    assert_eq!(in_a_cluster(Some("n"), "n", &format!("{uid}, {LABEL}")), (true, here.clone()));
    assert_eq!(in_a_cluster(Some("n"), "n", uid), (false, here.clone()));
    assert_eq!(in_a_cluster(Some("n"), "m", &format!("{uid}, {LABEL}")), (false, None), "not joined yet");
    assert_eq!(
        in_a_cluster(None, "m", &format!("{uid}, {LABEL}")),
        (true, None),
        "it may have a certificate"
    );
    for annotation in announced {
        let meta = format!("{uid}, annotations: {{{annotation}}}");
        assert_eq!(in_a_cluster(Some("n"), "m", &meta), (true, None), "{annotation}");
        assert_eq!(in_a_cluster(Some("n"), "n", &meta), (false, here.clone()), "{annotation}");
    }
    for other in ["mesh.io/enrolled: 'false'", "ambient.istio.io/redirection: disabled"] {
        assert!(!in_a_cluster(Some("n"), "m", &format!("{uid}, annotations: {{{other}}}")).0, "{other}");
    }
}

#[test]
fn in_a_cluster_nobody_names_a_network_namespace() {
    let foreign = "uid: u, annotations: {mesh.io/netns: /proc/1/ns/net}";
    assert_eq!(in_a_cluster(Some("n"), "n", foreign).1, Some("/run/pods/u".into()));
    for uid in ["../../proc/1/ns/net", "/proc/1", "..", "''"] {
        assert_eq!(in_a_cluster(Some("n"), "n", &format!("uid: {uid}")).1, None, "{uid}");
    }
}

#[test]
fn addresses_identify_one_pod_or_none() {
    let status = "podIP: 10.0.0.1";
    let none = [
        raw("name: a", "hostNetwork: true", status),
        raw("name: a", "", &format!("{status}, phase: Succeeded")),
        raw("name: a", "", &format!("{status}, phase: Failed")),
    ];
    for text in none {
        let (snapshot, problems) = build(&text);
        assert!(snapshot.workloads.is_empty() && problems.is_empty(), "{text} {problems:?}");
    }
    let (snapshot, problems) = build(
        &(raw("name: a", "", "podIPs: [{ip: 10.0.0.1}, {ip: 10.0.0.2}]") + &raw("name: b", "", status)),
    );
    assert_problems(
        &problems,
        &["Pod default/b: status.podIPs: 10.0.0.1 is also the address of Pod default/a"],
    );
    assert_eq!(snapshot.workloads.keys().map(ToString::to_string).collect::<Vec<_>>(), ["10.0.0.2"]);
    let bad = [
        ("podIPs: [{ip: 10.0.0.1}, {ip: x}]", "status.podIPs[1].ip: \"x\""),
        ("podIP: 0.0.0.0", "status.podIP: \"0.0.0.0\""),
        ("podIP: '::1'", "status.podIP: \"::1\""),
        ("podIP: ''", "status.podIPs: is required here"),
    ];
    for (status, expected) in bad {
        let (snapshot, problems) = build(&raw("name: a", "", status));
        assert_problems(&problems, &[expected]);
        assert!(snapshot.workloads.is_empty());
    }
    let mapped = only(&raw("name: a", "", "podIP: '::ffff:10.0.0.1'"));
    assert_eq!(mapped.ips[0].to_string(), "10.0.0.1", "canonical");
}

#[test]
fn names_for_metrics() {
    let owner = |kind: &str, name: &str| {
        format!(
            "ownerReferences: [{{apiVersion: apps/v1, kind: {kind}, name: {name}, uid: x, controller: true}}]"
        )
    };
    let hash = "pod-template-hash: 5b4c6d";
    let table = [
        ("name: a".to_owned(), ["a", "a", "latest"]),
        (format!("name: web-5b4c6d-x2z, labels: {{{hash}}}"), ["web", "web", "latest"]),
        (format!("name: web-5b4c6d-x2z, labels: {{{hash}}}, {}", owner("ReplicaSet", "shop-5b4c6d")), ["shop", "shop", "latest"]),
        (format!("name: db-0, {}", owner("StatefulSet", "db")), ["db", "db", "latest"]),
        ("name: a, labels: {app: b, version: v1}".to_owned(), ["a", "b", "v1"]),
        (
            "name: a, labels: {app: b, app.kubernetes.io/name: c, version: v1, app.kubernetes.io/version: v2}".to_owned(),
            ["a", "c", "v2"],
        ),
        (
            "name: a, labels: {app: b, service.istio.io/canonical-name: d, service.istio.io/canonical-revision: v3}".to_owned(),
            ["a", "d", "v3"],
        ),
    ];
    for (meta, expected) in table {
        let workload = only(&raw(&meta, "", "podIP: 10.0.0.1"));
        let names = [&*workload.workload_name, &*workload.canonical_service, &*workload.canonical_revision];
        assert_eq!(names, expected, "{meta}");
    }
}
