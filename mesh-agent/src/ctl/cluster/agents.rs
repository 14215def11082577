//! The agents of a cluster: which pod is the agent of which node.
//!
//! Two agents share a node while one takes over from the other: the one that is ready and newest answers. Never asks for
//! more pods than those of the mesh's namespace, and the one that is named. Tested in `tests.rs`.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use kube::{Api, Client, api::ListParams};

use super::{Asked, Failure, answered};

/// Selects the agents' pods, as the chart labels them.
const SELECTOR: &str = "app.kubernetes.io/name=mesh-agent";
/// The agent's container in them.
pub(super) const CONTAINER: &str = "agent";

/// The agent of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::ctl) struct Agent {
    /// Its node.
    pub node: String,
    /// Its pod.
    pub pod: String,
    /// Why nothing can be asked of it.
    pub trouble: Option<String>,
    /// Whether its pod is ready.
    pub ready: bool,
    /// The image of its container.
    pub image: String,
}

/// The agents, of one node or all, by their nodes' names.
pub(in crate::ctl) async fn agents(
    client: &Client,
    namespace: &str,
    node: Option<&str>,
) -> Result<BTreeMap<String, Agent>, Failure> {
    let mut wanted = ListParams::default().labels(SELECTOR);
    if let Some(node) = node {
        wanted = wanted.fields(&format!("spec.nodeName={node}"));
    }
    let asked = Asked { verb: "list", resource: "pods", namespace: Some(namespace) };
    let pods = answered(asked, Api::<Pod>::namespaced(client.clone(), namespace).list(&wanted)).await?;
    Ok(of_nodes(pods.items))
}

/// The agent of each node among these pods.
pub(super) fn of_nodes(pods: Vec<Pod>) -> BTreeMap<String, Agent> {
    let mut best: BTreeMap<String, (_, Agent)> = BTreeMap::new();
    for pod in pods {
        let Some(agent) = agent(&pod) else { continue };
        let rank = (agent.ready, agent.trouble.is_none(), pod.metadata.creation_timestamp);
        if best.get(&agent.node).is_none_or(|(other, _)| *other < rank) {
            best.insert(agent.node.clone(), (rank, agent));
        }
    }
    best.into_iter().map(|(node, (_, agent))| (node, agent)).collect()
}

/// What a pod says of the agent in it; none when it has no node yet, or leaves.
fn agent(pod: &Pod) -> Option<Agent> {
    if pod.metadata.deletion_timestamp.is_some() {
        return None;
    }
    let spec = pod.spec.as_ref()?;
    let status = pod.status.clone().unwrap_or_default();
    let conditions = status.conditions.as_deref().unwrap_or_default();
    Some(Agent {
        node: spec.node_name.clone()?,
        pod: pod.metadata.name.clone()?,
        ready: conditions.iter().any(|one| one.type_ == "Ready" && one.status == "True"),
        image: spec
            .containers
            .iter()
            .find(|one| one.name == CONTAINER)
            .and_then(|one| one.image.clone())
            .unwrap_or_default(),
        trouble: trouble(&status),
    })
}

/// Why nothing can be run in the agent's container.
fn trouble(status: &PodStatus) -> Option<String> {
    let containers = status.container_statuses.as_deref().unwrap_or_default();
    let state = containers.iter().find(|one| one.name == CONTAINER).and_then(|one| one.state.as_ref());
    let phase = || format!("its pod is {}", status.phase.as_deref().unwrap_or("Pending"));
    let Some(state) = state else { return Some(phase()) };
    if state.running.is_some() {
        return None;
    }
    let waiting = state.waiting.as_ref().and_then(|waiting| waiting.reason.clone());
    let ended = state.terminated.as_ref().map(|ended| format!("ended with {}", ended.exit_code));
    Some(waiting.or(ended).unwrap_or_else(phase))
}

/// The node that a pod is on.
pub(super) async fn node_of(client: &Client, namespace: &str, name: &str) -> Result<String, Failure> {
    let asked = Asked { verb: "get", resource: "pods", namespace: Some(namespace) };
    let pods = Api::<Pod>::namespaced(client.clone(), namespace);
    let Some(pod) = answered(asked, pods.get_opt(name)).await? else {
        return Err(Failure::Request(format!(
            "there is no pod {namespace}/{name}; `kubectl get pods --namespace {namespace}` shows those there are"
        )));
    };
    let on_host = pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or_default();
    let node = pod.spec.and_then(|spec| spec.node_name);
    let Some(node) = node else {
        return Err(Failure::Request(format!("pod {namespace}/{name} is on no node yet")));
    };
    if on_host {
        return Err(Failure::Request(format!(
            "pod {namespace}/{name} is on the host's network, and so never in the mesh; --node {node} asks the agent there"
        )));
    }
    Ok(node)
}

/// The one agent that is meant.
pub(super) fn one<'a>(
    agents: &'a BTreeMap<String, Agent>,
    node: Option<&str>,
    namespace: &str,
) -> Result<&'a Agent, Failure> {
    let agent = match (node, agents.len()) {
        (Some(node), _) => agents.get(node).ok_or_else(|| none(&format!("node {node}"), namespace))?,
        (None, 1) => agents.values().next().ok_or_else(|| none("any node", namespace))?,
        (None, 0) => return Err(none("any node", namespace)),
        (None, _) => {
            let nodes: Vec<_> = agents.keys().map(String::as_str).collect();
            return Err(Failure::Usage(format!(
                "say whose agent is to answer, with --pod NAMESPACE/NAME or --node; nodes with an agent: {}",
                nodes.join(", ")
            )));
        }
    };
    match &agent.trouble {
        None => Ok(agent),
        Some(trouble) => Err(Failure::Unreachable(format!(
            "the agent of node {} does not run ({trouble}): `kubectl describe pod --namespace {namespace} {}` says why",
            agent.node, agent.pod
        ))),
    }
}

fn none(place: &str, namespace: &str) -> Failure {
    Failure::Unreachable(format!(
        "there is no agent on {place} in namespace {namespace}: is that where the mesh is installed (--mesh-namespace), and \
         does the DaemonSet mesh-agent tolerate the taints of the node? `kubectl get pods --namespace {namespace} --selector \
         {SELECTOR} --output wide` shows where agents are"
    ))
}
