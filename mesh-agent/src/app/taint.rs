//! Takes the taint from this node with which it was registered, once this agent is ready: until then nothing is scheduled that
//! does not tolerate it.
//!
//! Promises that other taints stay as they are, and that a node which is registered anew is looked after too. Never adds one:
//! who registers nodes (`kubelet --register-with-taints`, a pool of a cloud) says that they wait. What the API server does not
//! take is tried again, later each time. Tested below, against an API server in this process.

use std::{pin::pin, time::Duration};

use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::{Node, Taint};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    runtime::{WatchStreamExt as _, utils::Backoff as _, watcher::watch_object},
};
use serde_json::json;

use crate::{
    admin::Readiness,
    source::{Retry, unless_changed},
};

/// How long it is waited after the first failure, and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// Looks after the taint of this key on the node, for as long as it is polled.
pub(super) async fn lift(client: Client, node: String, key: String, readiness: Readiness) {
    readiness.until_ready().await;
    let nodes: Api<Node> = Api::all(client);
    let mut seen = pin!(watch_object(nodes.clone(), &node).default_backoff());
    let mut retry = Retry::new(RETRY.0, RETRY.1);
    let (mut last, mut failed) = (None, false);
    loop {
        // It has no end.
        let wait = if failed { retry.next().unwrap_or(RETRY.1) } else { Duration::MAX };
        tokio::select! {
            news = seen.next() => match news {
                None => return,
                Some(Err(_)) => continue,
                Some(Ok(node)) => last = node,
            },
            () = tokio::time::sleep(wait), if failed => {}
        }
        failed = false;
        let Some(rest) = last.as_ref().and_then(|node| without(node, &key)) else { continue };
        match write(&nodes, &node, last.as_ref(), &rest).await {
            Ok(()) => {
                tracing::info!(
                    node,
                    taint = key,
                    "the node takes pods: the agent is ready, and its taint is gone"
                );
                last = None;
                retry.reset();
            }
            Err(error) => {
                tracing::warn!(node, taint = key, %error, "the taint cannot be taken from the node, which takes no pods");
                failed = true;
            }
        }
    }
}

/// The other taints of a node; none where it does not have this one.
fn without(node: &Node, key: &str) -> Option<Vec<Taint>> {
    let taints = node.spec.as_ref()?.taints.as_deref()?;
    let rest: Vec<Taint> = taints.iter().filter(|taint| taint.key != key).cloned().collect();
    (rest.len() < taints.len()).then_some(rest)
}

/// Writes them. Somebody else may have changed the node meanwhile: then there is news of it, and this is no failure.
async fn write(nodes: &Api<Node>, name: &str, seen: Option<&Node>, rest: &[Taint]) -> kube::Result<()> {
    let version = seen.and_then(|node| node.metadata.resource_version.as_deref());
    let patch = json!({"metadata": {"resourceVersion": version}, "spec": {"taints": rest}});
    unless_changed(nodes.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::Value;
    use tokio_util::task::AbortOnDropHandle;

    use super::*;
    use crate::source::kubernetes::tests::fake::Fake;

    const KEY: &str = "mesh.io/agent-not-ready";

    fn tainted(keys: &[&str]) -> Value {
        let taints: Vec<_> = keys.iter().map(|key| json!({"key": key, "effect": "NoSchedule"})).collect();
        json!({"kind": "Node", "metadata": {"name": "a"}, "spec": {"taints": taints, "podCIDR": "10.244.0.0/24"}})
    }

    fn start(fake: &Fake, readiness: &Readiness) -> AbortOnDropHandle<()> {
        let client = fake.cluster().client();
        let lifted = lift(client, "a".to_owned(), KEY.to_owned(), readiness.clone());
        AbortOnDropHandle::new(tokio::spawn(lifted))
    }

    fn keys(fake: &Fake) -> Vec<String> {
        let node = fake.get("nodes", "", "a").unwrap();
        let taints = node["spec"]["taints"].as_array().unwrap().iter();
        taints.map(|taint| taint["key"].as_str().unwrap().to_owned()).collect()
    }

    #[tokio::test]
    async fn the_taint_goes_when_the_agent_is_ready_and_no_other_does() {
        let fake = Fake::start().await;
        fake.put("", "nodes", tainted(&["other", KEY]));
        let readiness = Readiness::default();
        let block = readiness.block("the pods of this node");
        let _task = start(&fake, &readiness);
        // It has had as many turns by then as asking would take.
        let nodes: Api<Node> = Api::all(fake.cluster().client());
        for _ in 0..8 {
            nodes.get("a").await.unwrap();
        }
        assert!(fake.asked("fieldSelector").is_empty() && keys(&fake) == ["other", KEY]);
        drop(block);
        fake.until(|fake| keys(fake) == ["other"]).await;
        assert_eq!(fake.get("nodes", "", "a").unwrap()["spec"]["podCIDR"], "10.244.0.0/24");
        // A node that is registered anew.
        fake.put("", "nodes", tainted(&[KEY]));
        fake.until(|fake| keys(fake).is_empty()).await;
    }

    #[tokio::test]
    async fn what_was_refused_is_tried_again() {
        let fake = Fake::start().await;
        fake.put("", "nodes", tainted(&[KEY]));
        fake.forbid_writing(true);
        let _task = start(&fake, &Readiness::default());
        fake.until_asked("PATCH", 1).await;
        assert_eq!(keys(&fake), [KEY]);
        fake.forbid_writing(false);
        fake.until(|fake| keys(fake).is_empty()).await;
    }

    #[tokio::test]
    async fn a_node_without_it_is_left_alone() {
        let fake = Fake::start().await;
        fake.put("", "nodes", tainted(&["other"]));
        let _task = start(&fake, &Readiness::default());
        fake.until_asked("watch=true", 1).await;
        // What comes after it has been seen.
        fake.put("", "nodes", tainted(&["other", KEY]));
        fake.until(|fake| keys(fake) == ["other"]).await;
        assert_eq!(fake.asked("PATCH").len(), 1);
    }
}
