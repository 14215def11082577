//! What of the mesh is installed: its kinds, its controller, its agents, its roots.
//!
//! Judges objects as the API server has them. Tested below, and in `tests.rs`.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::{
    api::apps::v1::{DaemonSet, Deployment},
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};

use super::Check;
use crate::ctl::cluster::Agent;

/// A kind that agents read: its name, that of its definition, and its versions that are understood.
pub(super) fn kind(name: &str, versions: &[&str], found: Option<&CustomResourceDefinition>) -> Check {
    let about = format!("kind {name}");
    let Some(definition) = found else {
        return Check::warning(
            &about,
            "is not defined: there are none, and nobody can write one",
            "`kubectl apply --server-side -f deploy/chart/crds`, or install Istio's definitions",
        );
    };
    let served = definition.spec.versions.iter().filter(|version| version.served);
    let served: Vec<&str> = served.map(|version| version.name.as_str()).collect();
    match versions.iter().find(|version| served.contains(version)) {
        Some(version) => Check::ok(&about, format!("read as {version}")),
        None => Check::failure(
            &about,
            format!("is served as {} alone, of which none is understood: agents see none", served.join(", ")),
            format!("serve {}", versions.join(" or ")),
        ),
    }
}

/// The controller, which certifies pods.
pub(super) fn controller(found: Option<&Deployment>, namespace: &str) -> Check {
    let about = "controller";
    let Some(deployment) = found else {
        return Check::failure(
            about,
            format!("there is no Deployment mesh-controller in namespace {namespace}"),
            "is the mesh installed elsewhere (--mesh-namespace)? Else install it: docs/kubernetes.md",
        );
    };
    let wanted = deployment.spec.replicas.unwrap_or(1);
    let ready = deployment.status.as_ref().and_then(|status| status.ready_replicas).unwrap_or_default();
    let found = format!("{ready} of {wanted} replicas are ready");
    let remedy = format!(
        "`kubectl describe pods --namespace {namespace} --selector app.kubernetes.io/name=mesh-controller` says why"
    );
    match ready {
        0 => Check::failure(
            about,
            format!("{found}: certificates are not renewed, and new pods have none"),
            remedy,
        ),
        ready if ready < wanted => Check::warning(about, found, remedy),
        _ => Check::ok(about, found),
    }
}

/// The agents: one on every node, ready, and all of one version.
pub(super) fn agents(
    found: Option<&DaemonSet>,
    agents: &BTreeMap<String, Agent>,
    nodes: Option<&BTreeSet<String>>,
    namespace: &str,
) -> Vec<Check> {
    let about = "agents";
    let Some(set) = found else {
        return vec![Check::failure(
            about,
            format!("there is no DaemonSet mesh-agent in namespace {namespace}"),
            "is the mesh installed elsewhere (--mesh-namespace)? Else install it: docs/kubernetes.md",
        )];
    };
    let wanted = set.status.as_ref().map_or(0, |status| status.desired_number_scheduled);
    let unready: Vec<String> = agents
        .values()
        .filter(|agent| !agent.ready)
        .map(|agent| format!("{} ({})", agent.node, agent.trouble.as_deref().unwrap_or("not ready")))
        .collect();
    let ready = agents.len() - unready.len();
    let mut checks = vec![if unready.is_empty() && i32::try_from(ready).is_ok_and(|ready| ready >= wanted) {
        Check::ok(about, format!("ready on all {ready} nodes they are for"))
    } else {
        let missing =
            if unready.is_empty() { String::new() } else { format!(", not on {}", unready.join(", ")) };
        Check::failure(
            about,
            format!("{ready} of {wanted} are ready{missing}: pods of the mesh there are cut off, or wait"),
            format!(
                "`kubectl describe pods --namespace {namespace} --selector app.kubernetes.io/name=mesh-agent` says why"
            ),
        )
    }];
    checks.extend(nodes.map(|nodes| everywhere(nodes, agents)));
    checks.push(versions(agents));
    checks
}

fn everywhere(nodes: &BTreeSet<String>, agents: &BTreeMap<String, Agent>) -> Check {
    let about = "agents: nodes";
    let without: Vec<&str> =
        nodes.iter().filter(|node| !agents.contains_key(*node)).map(String::as_str).collect();
    if without.is_empty() {
        return Check::ok(about, format!("each of {} nodes has one", nodes.len()));
    }
    Check::warning(
        about,
        format!("none on {}: pods there cannot be in the mesh", without.join(", ")),
        "nothing, if that is wanted; else see `node.tolerations` and `node.nodeSelector` of the chart",
    )
}

fn versions(agents: &BTreeMap<String, Agent>) -> Check {
    let about = "agents: versions";
    let images: BTreeSet<&str> = agents.values().map(|agent| agent.image.as_str()).collect();
    match images.len() {
        0 | 1 => Check::ok(about, format!("all run {}", images.first().unwrap_or(&"nothing"))),
        _ => Check::warning(
            about,
            format!("they differ: {}", images.into_iter().collect::<Vec<_>>().join(", ")),
            "nothing while an upgrade goes on; else `kubectl rollout status daemonset/mesh-agent` says what keeps it",
        ),
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Result;
    use serde_json::json;

    use super::{
        super::Verdict::{self, Failure, Warning},
        *,
    };

    fn agent(node: &str, ready: bool, image: &str) -> (String, Agent) {
        let trouble = None;
        let agent = Agent {
            node: node.to_owned(),
            pod: format!("agent-{node}"),
            trouble,
            ready,
            image: image.to_owned(),
        };
        (node.to_owned(), agent)
    }

    #[test]
    fn agents_are_on_every_node_ready_and_alike() -> Result<()> {
        let set: DaemonSet = serde_json::from_value(json!({"metadata": {}, "status": {
            "desiredNumberScheduled": 2, "currentNumberScheduled": 2, "numberMisscheduled": 0, "numberReady": 2}}))?;
        let nodes = BTreeSet::from(["a".to_owned(), "b".to_owned()]);
        let verdicts = |found: &[(String, Agent)]| {
            let found = found.iter().cloned().collect();
            let checks = agents(Some(&set), &found, Some(&nodes), "mesh-system");
            checks.iter().map(|check| check.verdict).collect::<Vec<_>>()
        };
        assert_eq!(verdicts(&[agent("a", true, "i:1"), agent("b", true, "i:1")]), [Verdict::Ok; 3]);
        assert_eq!(
            verdicts(&[agent("a", true, "i:1"), agent("b", false, "i:1")]),
            [Failure, Verdict::Ok, Verdict::Ok]
        );
        assert_eq!(verdicts(&[agent("a", true, "i:1")]), [Failure, Warning, Verdict::Ok]);
        assert_eq!(
            verdicts(&[agent("a", true, "i:1"), agent("b", true, "i:2")]),
            [Verdict::Ok, Verdict::Ok, Warning]
        );
        let none = agents(None, &BTreeMap::new(), None, "mesh-system");
        assert_eq!(none.iter().map(|check| check.verdict).collect::<Vec<_>>(), [Failure]);
        Ok(())
    }

    #[test]
    fn a_controller_that_is_not_whole_is_told() -> Result<()> {
        let with = |ready: i32| {
            serde_json::from_value(json!({
                "metadata": {}, "spec": {"replicas": 2, "selector": {}, "template": {}}, "status": {"readyReplicas": ready}}))
        };
        for (ready, verdict) in [(2, Verdict::Ok), (1, Verdict::Warning), (0, Verdict::Failure)] {
            assert_eq!(controller(Some(&with(ready)?), "mesh-system").verdict, verdict);
        }
        assert_eq!(controller(None, "mesh-system").verdict, Verdict::Failure);
        Ok(())
    }

    #[test]
    fn a_kind_is_read_in_a_version_that_is_served() -> Result<()> {
        let with = |version: &str| {
            serde_json::from_value::<CustomResourceDefinition>(json!({"metadata": {}, "spec": {
                "group": "g", "names": {"kind": "K", "plural": "ks"}, "scope": "Namespaced",
                "versions": [{"name": version, "served": true, "storage": true}]}}))
        };
        let verdict = |found: Option<&CustomResourceDefinition>| kind("K", &["v1", "v1beta1"], found).verdict;
        assert_eq!(verdict(Some(&with("v1beta1")?)), Verdict::Ok);
        assert_eq!(verdict(Some(&with("v2")?)), Verdict::Failure);
        assert_eq!(verdict(None), Verdict::Warning);
        Ok(())
    }
}
