//! The mesh on the cluster, by its chart, for as long as a test needs it.

use std::{collections::BTreeSet, path::PathBuf};

use anyhow::{Context as _, Result};
use lab::cluster::{Cluster, Namespace};
use serde_json::Value;

/// Its namespace.
pub const SYSTEM: &str = "mesh-system";
fn chart() -> Result<String> {
    let tests = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let root = tests.parent().context("the workspace")?;
    Ok(root.join("deploy/chart").display().to_string())
}

/// The chart in its namespace; removed when the test is done, failed or not.
pub struct Mesh<'c>(&'c Cluster);

impl<'c> Mesh<'c> {
    /// Installs it, and waits until it is ready.
    pub fn install(cluster: &'c Cluster) -> Result<Self> {
        Self::install_with(cluster, &[])
    }

    /// The same, with more values (`name=value`).
    pub fn install_with(cluster: &'c Cluster, more: &[&str]) -> Result<Self> {
        let image = Cluster::mesh_image()?;
        let (repository, tag) = image.split_once(':').context("an image has a tag")?;
        let chart = chart()?;
        let values = [
            format!("image.repository={repository}"),
            format!("image.tag={tag}"),
            "image.pullPolicy=Never".to_owned(),
            // Nodes are containers themselves here: what they see as the root of the hierarchy is not the machine's. It is where
            // the machine has it.
            format!("node.cgroupRoot=/host{}", lab::cgroup::root()?.display()),
            "node.resources.limits.memory=1Gi".to_owned(),
            // Nobody hands out addresses of balancers here.
            "gateway.service.type=ClusterIP".to_owned(),
        ];
        let mut arguments = vec!["install", "mesh", &chart, "--namespace", SYSTEM, "--create-namespace"];
        for value in values.iter().map(String::as_str).chain(more.iter().copied()) {
            arguments.extend(["--set", value]);
        }
        let mesh = Self(cluster);
        Cluster::helm(&arguments)?;
        mesh.ready()?;
        Ok(mesh)
    }

    /// Changes what every agent is started with, so that each is replaced.
    pub fn replace_agents(&self) -> Result<()> {
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

    /// Goes back to what every agent was started with before.
    pub fn roll_back(&self) -> Result<()> {
        Cluster::helm(&["rollback", "mesh", "--namespace", SYSTEM])?;
        self.ready()
    }

    /// Waits until the controller and every node's agent are ready.
    pub fn ready(&self) -> Result<()> {
        for what in ["deployment/mesh-controller", "daemonset/mesh-agent"] {
            let rolled = self.0.kubectl(["rollout", "status", what, "--namespace", SYSTEM, "--timeout=180s"]);
            rolled.with_context(|| self.said())?;
        }
        Ok(())
    }

    /// What its pods say, for a failure.
    pub fn said(&self) -> String {
        let logs = |label: &str| {
            let label = format!("app.kubernetes.io/name={label}");
            self.0.kubectl(["logs", "--namespace", SYSTEM, "--selector", &label, "--tail=40", "--prefix"])
        };
        let pods = self.0.kubectl(["get", "pods", "-A", "-o", "wide"]);
        let events = self.0.kubectl(["get", "events", "-A", "--sort-by=.lastTimestamp"]);
        let all = [pods, events, logs("mesh-controller"), logs("mesh-agent"), logs("mesh-gateway")];
        all.map(|said| said.unwrap_or_else(|error| format!("{error:#}"))).join("\n")
    }

    /// The agent's pod on a node.
    pub fn agent_on(&self, node: &str) -> Result<Value> {
        let (selector, field) = (
            "--selector=app.kubernetes.io/name=mesh-agent",
            format!("--field-selector=spec.nodeName={node}"),
        );
        let pods = self.0.get(&["pods", "--namespace", SYSTEM, selector, &field])?;
        pods["items"].get(0).cloned().with_context(|| format!("no agent on {node}"))
    }

    /// The names of its agents' pods.
    pub fn agents(&self) -> Result<Vec<String>> {
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
pub fn enrolled(namespace: &Namespace) -> Result<BTreeSet<String>> {
    let pods = namespace.get(&["pods"])?;
    let items = pods["items"].as_array().context("a list of pods")?.iter();
    let is_in = |pod: &&Value| pod["metadata"]["annotations"]["mesh.io/enrolled"] == "true";
    Ok(items.filter(is_in).filter_map(|pod| pod["metadata"]["name"].as_str()).map(str::to_owned).collect())
}

/// A namespace whose pods are in the mesh.
pub fn meshed(cluster: &Cluster, name: &str) -> Result<Namespace> {
    let namespace = cluster.namespace(name)?;
    cluster.kubectl(["label", "namespace", name, "mesh.io/dataplane-mode=node"])?;
    Ok(namespace)
}
