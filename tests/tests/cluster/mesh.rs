//! The mesh as its users install it: by its chart, on a cluster whose apps run already and on those that come; Bookinfo routed by
//! Istio's objects, mutual TLS between the nodes, probes of the kubelet green; and nothing of it left when it is taken away.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use lab::cluster::{Cluster, Namespace};

use crate::{
    bookinfo::versions,
    installed::{Mesh, SYSTEM, enrolled, meshed},
    load,
};

/// All answers of one version of three by chance: (1/3)^20, some 3 in 10^10.
const REQUESTS: usize = 20;

#[test]
fn bookinfo_is_routed_between_nodes_over_mutual_tls_and_nothing_is_left() -> Result<()> {
    let Some(cluster) = Cluster::alone()? else { return Ok(()) };
    let mesh = Mesh::install(&cluster)?;
    let namespace = meshed(&cluster, "shop")?;
    let routed = (|| {
        namespace.apply_file("deploy/samples/bookinfo/bookinfo.yaml")?;
        namespace.apply_file("deploy/samples/bookinfo/destination-rules.yaml")?;
        namespace.apply_file("deploy/samples/bookinfo/virtual-service-jason.yaml")?;
        let nodes = cluster.nodes()?;
        for node in &nodes {
            namespace.client(&format!("client-{node}"), node)?;
        }
        // Also says that the kubelet's probes pass.
        namespace.deployed()?;
        let pods = namespace.get(&["pods"])?;
        let all = pods["items"].as_array().map_or(0, Vec::len);
        let is_in = enrolled(&namespace)?;
        ensure!(is_in.len() == all, "{is_in:?} of {all} pods are in the mesh");
        for node in &nodes {
            let client = format!("client-{node}");
            let jason = versions(&namespace, &client, "jason", REQUESTS)?;
            ensure!(jason == BTreeSet::from(["v2".to_owned()]), "{client} as jason: {jason:?}");
            let others = versions(&namespace, &client, "somebody", REQUESTS)?;
            ensure!(others == BTreeSet::from(["v3".to_owned()]), "{client} as somebody: {others:?}");
        }
        // Requests have come to the pods of either node as mutual TLS.
        for agent in mesh.agents()? {
            let log = cluster.kubectl(["logs", "--namespace", SYSTEM, &agent])?;
            ensure!(log.contains("mutual_tls"), "{agent} has taken no request over mutual TLS:\n{log}");
        }
        Ok(())
    })();
    routed.with_context(|| mesh.said())?;

    Cluster::helm(&["uninstall", "mesh", "--namespace", SYSTEM, "--wait", "--timeout", "240s"])?;
    // The pods go on without it, and nothing says that they are in a mesh.
    nothing_is_left(&cluster, &namespace)?;
    for node in cluster.nodes()? {
        let seen = versions(&namespace, &format!("client-{node}"), "jason", REQUESTS)?;
        ensure!(seen.len() > 1, "a route of the mesh still holds: {seen:?}");
    }
    Ok(())
}

#[test]
fn agents_are_replaced_and_rolled_back_under_load_and_no_request_fails() -> Result<()> {
    let Some(cluster) = Cluster::alone()? else { return Ok(()) };
    let mesh = Mesh::install(&cluster)?;
    let namespace = meshed(&cluster, "replaced")?;
    let replaced = (|| {
        let nodes = load::begin(&cluster, &namespace)?;
        let before = mesh.agents()?;
        mesh.replace_agents()?;
        let between = mesh.agents()?;
        mesh.roll_back()?;
        for node in &nodes {
            let answers = load::end(&namespace, node)?;
            let failed = answers.iter().filter(|(_, status)| status != "200").count();
            ensure!(failed == 0 && answers.len() > 100, "{failed} of {} of {node} failed", answers.len());
        }
        let now = mesh.agents()?;
        for (was, is) in [(&before, &between), (&between, &now)] {
            let new = is.iter().filter(|agent| !was.contains(agent)).count();
            ensure!(nodes.len() <= new, "{was:?} then {is:?}");
        }
        Ok(())
    })();
    replaced.with_context(|| mesh.said())
}

/// Neither on the pods of the namespace nor on any node.
fn nothing_is_left(cluster: &Cluster, namespace: &Namespace) -> Result<()> {
    let left = enrolled(namespace)?;
    ensure!(left.is_empty(), "{left:?} still say that they are in the mesh");
    for node in cluster.nodes()? {
        let left = "ls /run/mesh; ls -d /sys/fs/bpf/mesh /opt/cni/bin/mesh-cni 2>/dev/null; grep -l mesh-cni /etc/cni/net.d/*; true";
        let left = cluster.on_node(&node, left)?;
        ensure!(left.trim().is_empty(), "on {node}: {left}");
    }
    Ok(())
}

#[test]
fn the_agents_alone_are_taken_away_under_load_and_nobody_is_cut_off() -> Result<()> {
    let Some(cluster) = Cluster::alone()? else { return Ok(()) };
    let mesh = Mesh::install(&cluster)?;
    let namespace = meshed(&cluster, "left-alone")?;
    let gone = (|| {
        let nodes = load::begin(&cluster, &namespace)?;
        cluster.kubectl([
            "delete",
            "daemonset",
            "mesh-agent",
            "--namespace",
            SYSTEM,
            "--cascade=foreground",
        ])?;
        nothing_is_left(&cluster, &namespace)?;
        for node in &nodes {
            let answers = load::end(&namespace, node)?;
            let failed = answers.iter().filter(|(_, status)| status != "200").count();
            ensure!(failed == 0 && answers.len() > 100, "{failed} of {} of {node} failed", answers.len());
        }
        Ok(())
    })();
    gone.with_context(|| mesh.said())
}
