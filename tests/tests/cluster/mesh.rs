//! The mesh as its users install it: by its chart, on a cluster whose apps run already and on those that come; Bookinfo routed by
//! Istio's objects, mutual TLS between the nodes, probes of the kubelet green; and nothing of it left when it is taken away.

use std::{collections::BTreeSet, path::PathBuf};

use anyhow::{Context as _, Result, ensure};
use lab::cluster::{Cluster, Namespace};

use crate::{bookinfo::versions, load};

const SYSTEM: &str = "mesh-system";
/// All answers of one version of three by chance: (1/3)^20, some 3 in 10^10.
const REQUESTS: usize = 20;

fn chart() -> Result<String> {
    let tests = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let root = tests.parent().context("the workspace")?;
    Ok(root.join("deploy/chart").display().to_string())
}

/// The chart in its namespace; removed when the test is done, failed or not.
struct Mesh<'c>(&'c Cluster);

impl<'c> Mesh<'c> {
    fn install(cluster: &'c Cluster) -> Result<Self> {
        let image = Cluster::mesh_image()?;
        let (repository, tag) = image.split_once(':').context("an image has a tag")?;
        let chart = chart()?;
        let values = [
            format!("image.repository={repository}"),
            format!("image.tag={tag}"),
            "image.pullPolicy=Never".to_owned(),
            // Nodes are containers themselves here: what they see as the root of the hierarchy is not the machine's.
            "node.cgroupRoot=/host/sys/fs/cgroup/unified".to_owned(),
            "node.resources.limits.memory=1Gi".to_owned(),
        ];
        let mut arguments = vec!["install", "mesh", &chart, "--namespace", SYSTEM, "--create-namespace"];
        for value in &values {
            arguments.extend(["--set", value]);
        }
        let mesh = Self(cluster);
        Cluster::helm(&arguments)?;
        mesh.ready()?;
        Ok(mesh)
    }

    /// Changes what every agent is started with, so that each is replaced.
    fn replace_agents(&self) -> Result<()> {
        let set = "node.extraEnv[0].name=REPLACED,node.extraEnv[0].value=once";
        Cluster::helm(&[
            "upgrade",
            "mesh",
            &chart()?,
            "--namespace",
            SYSTEM,
            "--reuse-values",
            "--set",
            set,
        ])?;
        self.ready()
    }

    /// Waits until the controller and every node's agent are ready.
    fn ready(&self) -> Result<()> {
        for what in ["deployment/mesh-controller", "daemonset/mesh-agent"] {
            let rolled = self.0.kubectl(["rollout", "status", what, "--namespace", SYSTEM, "--timeout=180s"]);
            rolled.with_context(|| self.said())?;
        }
        Ok(())
    }

    /// What its pods say, for a failure.
    fn said(&self) -> String {
        let logs = |label: &str| {
            let label = format!("app.kubernetes.io/name={label}");
            self.0.kubectl(["logs", "--namespace", SYSTEM, "--selector", &label, "--tail=40", "--prefix"])
        };
        let pods = self.0.kubectl(["get", "pods", "-A", "-o", "wide"]);
        let events = self.0.kubectl(["get", "events", "-A", "--sort-by=.lastTimestamp"]);
        let all = [pods, events, logs("mesh-controller"), logs("mesh-agent")];
        all.map(|said| said.unwrap_or_else(|error| format!("{error:#}"))).join("\n")
    }

    fn agents(&self) -> Result<Vec<String>> {
        let selector = "--selector=app.kubernetes.io/name=mesh-agent";
        let pods = self.0.get(&["pods", "--namespace", SYSTEM, selector])?;
        let names = pods["items"].as_array().context("a list of pods")?.iter();
        Ok(names.filter_map(|pod| pod["metadata"]["name"].as_str()).map(str::to_owned).collect())
    }
}

impl Drop for Mesh<'_> {
    fn drop(&mut self) {
        let _ = Cluster::helm(&[
            "uninstall",
            "mesh",
            "--namespace",
            SYSTEM,
            "--wait",
            "--timeout",
            "120s",
            "--ignore-not-found",
        ]);
        let _ = self.0.kubectl(["delete", "namespace", SYSTEM, "--ignore-not-found"]);
    }
}

/// The pods of a namespace that their agents have said to be in the mesh.
fn enrolled(namespace: &Namespace) -> Result<BTreeSet<String>> {
    let pods = namespace.get(&["pods"])?;
    let items = pods["items"].as_array().context("a list of pods")?.iter();
    let is_in = |pod: &&serde_json::Value| pod["metadata"]["annotations"]["mesh.io/enrolled"] == "true";
    Ok(items.filter(is_in).filter_map(|pod| pod["metadata"]["name"].as_str()).map(str::to_owned).collect())
}

#[test]
fn bookinfo_is_routed_between_nodes_over_mutual_tls_and_nothing_is_left() -> Result<()> {
    let Some(cluster) = Cluster::alone()? else { return Ok(()) };
    let mesh = Mesh::install(&cluster)?;
    let namespace = cluster.namespace("shop")?;
    cluster.kubectl(["label", "namespace", "shop", "mesh.io/dataplane-mode=node"])?;
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

    Cluster::helm(&["uninstall", "mesh", "--namespace", SYSTEM, "--wait", "--timeout", "120s"])?;
    // The pods go on without it, and nothing says that they are in a mesh.
    let left = enrolled(&namespace)?;
    ensure!(left.is_empty(), "{left:?} still say that they are in the mesh");
    for node in cluster.nodes()? {
        let left = "ls /run/mesh; ls -d /sys/fs/bpf/mesh /opt/cni/bin/mesh-cni 2>/dev/null; grep -l mesh-cni /etc/cni/net.d/*; true";
        let left = cluster.on_node(&node, left)?;
        ensure!(left.trim().is_empty(), "on {node}: {left}");
    }
    for node in cluster.nodes()? {
        let seen = versions(&namespace, &format!("client-{node}"), "jason", REQUESTS)?;
        ensure!(seen.len() > 1, "a route of the mesh still holds: {seen:?}");
    }
    Ok(())
}

#[test]
fn agents_are_replaced_under_load_and_no_request_fails() -> Result<()> {
    let Some(cluster) = Cluster::alone()? else { return Ok(()) };
    let mesh = Mesh::install(&cluster)?;
    let namespace = cluster.namespace("replaced")?;
    cluster.kubectl(["label", "namespace", "replaced", "mesh.io/dataplane-mode=node"])?;
    let replaced = (|| {
        let nodes = load::begin(&cluster, &namespace)?;
        let before = mesh.agents()?;
        mesh.replace_agents()?;
        for node in &nodes {
            let answers = load::end(&namespace, node)?;
            let failed = answers.iter().filter(|(_, status)| status != "200").count();
            ensure!(failed == 0 && answers.len() > 100, "{failed} of {} of {node} failed", answers.len());
        }
        let now = mesh.agents()?;
        ensure!(
            nodes.len() <= now.iter().filter(|agent| !before.contains(agent)).count(),
            "{before:?} then {now:?}"
        );
        Ok(())
    })();
    replaced.with_context(|| mesh.said())
}
