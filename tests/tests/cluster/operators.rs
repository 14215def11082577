//! What operators are told: what is wrong with objects, before they are taken and in their status; what the agents know, from outside
//! of the nodes; and nodes that take pods once their agent is ready.

use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use lab::{
    binary,
    cluster::{Cluster, Namespace},
};
use serde_json::Value;

use crate::{
    installed::{Mesh, SYSTEM, meshed},
    load,
};

const TAINT: &str = "mesh.io/agent-not-ready";

fn virtual_service(subset: &str, timeout: &str) -> String {
    format!(
        "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{ name: server }}
spec:
  hosts: [server]
  http: [{{ timeout: {timeout}, route: [{{ destination: {{ host: server{subset} }} }}] }}]
"
    )
}

const RULE: &str = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: server }
spec: { host: server, subsets: [{ name: v9, labels: { app: server } }] }
";

/// What `meshctl` says, run beside the cluster with the administrator's rights.
fn meshctl(arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(binary("meshctl", "MESHCTL_BIN", "mesh-agent")?);
    let output = command.args(arguments).output().context("starting meshctl")?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("{command:?}: {}\n{said}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(said)
}

/// Before it is taken, and in the status of what is taken.
fn objects(namespace: &Namespace) -> Result<()> {
    let wrong = virtual_service("", "soon");
    // The webhook is asked once the leader has told the API server whom to believe.
    let mut refusal = String::new();
    for _ in 0..100 {
        match namespace.apply(&wrong) {
            Ok(()) => namespace.kubectl(&["delete", "virtualservice", "server"]).map(drop)?,
            Err(error) => {
                refusal = format!("{error:#}");
                break;
            }
        }
    }
    ensure!(
        refusal.contains("spec.http[0].timeout") && refusal.contains("is not a duration"),
        "it was taken, or refused for something else: {refusal}"
    );
    namespace.apply(&virtual_service(", subset: v9", "2s"))?;
    let wait = |condition: &str| {
        let condition = format!("--for=condition={condition}");
        namespace.kubectl(&["wait", "virtualservice/server", &condition, "--timeout=120s"])
    };
    wait("Accepted")?;
    wait("ResolvedRefs=false")?;
    namespace.apply(RULE)?;
    wait("ResolvedRefs")?;
    namespace.kubectl(&["delete", "virtualservice/server", "destinationrule/server"]).map(drop)
}

/// From outside of the nodes.
fn looking_into_it(cluster: &Cluster, namespace: &Namespace) -> Result<()> {
    let nodes = cluster.nodes()?;
    let status = meshctl(&["status"])?;
    ensure!(nodes.iter().all(|node| status.contains(node.as_str())), "{status}");
    for node in &nodes {
        // Each answers for the pods of its own node alone.
        let pod = format!("{}/{node}", namespace.name());
        let flows = meshctl(&["flows", "--pod", &pod, "-o", "json"])?;
        let flows: Value = serde_json::from_str(&flows).with_context(|| format!("{node}: {flows}"))?;
        let flows = flows.as_array().context("a list of flows")?;
        ensure!(
            flows.iter().any(|flow| flow.to_string().contains("server.operated.svc.cluster.local")),
            "{node}: {flows:?}"
        );
    }
    let unknown = meshctl(&["flows", "--pod", "operated/nobody"]).map_err(|error| format!("{error:#}"));
    ensure!(unknown.as_ref().is_err_and(|said| said.contains("nobody")), "{unknown:?}");
    let checked = meshctl(&["check", "-o", "json"])?;
    ensure!(!checked.contains("\"failure\""), "{checked}");
    Ok(())
}

#[test]
fn operators_are_told_what_is_wrong_and_what_goes_on() -> Result<()> {
    let Some(cluster) = Cluster::alone()? else { return Ok(()) };
    let nodes = cluster.nodes()?;
    let node = nodes.last().context("a node")?;
    cluster.kubectl(["taint", "node", node, &format!("{TAINT}=:NoSchedule"), "--overwrite"])?;
    let mesh = Mesh::install_with(&cluster, &["node.startupTaint=true"])?;
    let told = (|| {
        let mut tainted = true;
        for _ in 0..300 {
            tainted = cluster.get(&["node", node])?["spec"]["taints"].to_string().contains(TAINT);
            if !tainted {
                break;
            }
        }
        ensure!(!tainted, "the agent of {node} is ready, and has left its taint");
        agents_write_nothing_else(&cluster, node)?;
        let namespace = meshed(&cluster, "operated")?;
        load::begin(&cluster, &namespace)?;
        objects(&namespace)?;
        looking_into_it(&cluster, &namespace)
    })();
    let removed = cluster.kubectl(["taint", "node", node, &format!("{TAINT}-")]);
    ensure!(told.is_err() || removed.is_err(), "the taint was still there");
    told.with_context(|| mesh.said())
}

/// Agents may take their own taint away, and nothing else of a node's.
fn agents_write_nothing_else(cluster: &Cluster, node: &str) -> Result<()> {
    let agent = format!("system:serviceaccount:{SYSTEM}:mesh-agent");
    for written in [
        "metadata: { name: NODE, labels: { a: b } }",
        "metadata: { name: NODE }\nspec: { unschedulable: true }",
    ] {
        let manifest = format!("apiVersion: v1\nkind: Node\n{}\n", written.replace("NODE", node));
        let said = cluster.apply_as(&agent, &manifest).map_err(|error| format!("{error:#}"));
        ensure!(
            said.as_ref().is_err_and(|said| said.contains("agents change nothing of a node")),
            "{said:?}"
        );
    }
    Ok(())
}
