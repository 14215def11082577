//! Whether an agent that is told to stop, with no successor beside it, goes for good or makes room for another.
//!
//! With a directory of manifests nothing comes after it. In a cluster its DaemonSet says: where that is there, the next agent of
//! the node finds everything as it was left, and until then the pods' own policy holds
//! (`mesh.io/when-agent-is-down`). Whoever cannot be asked has not said that it goes: what is left behind by mistake
//! `mesh-agent clean` removes, what is removed by mistake lets pods talk in the clear. Tested below.

use std::time::Duration;

use futures_util::future::join_all;
use k8s_openapi::api::apps::v1::DaemonSet;
use kube::{Api, Client};
use tokio::time::timeout;

use crate::{config::DaemonSetName, proxy::Mesh};

/// How long the API server may take to answer: what waits for the end of this process waits longer.
const ANSWER: Duration = Duration::from_secs(5);

/// Who can say it.
#[derive(Clone)]
pub(super) struct Removal {
    /// `None`: nobody comes after this agent.
    asked: Option<(Client, DaemonSetName)>,
}

impl Removal {
    pub fn new(client: Option<Client>, daemon_set: Option<DaemonSetName>) -> Self {
        Self { asked: client.zip(daemon_set) }
    }

    /// Whether it goes for good.
    pub async fn is_for_good(&self) -> bool {
        let Some((client, name)) = &self.asked else { return true };
        let sets: Api<DaemonSet> = Api::namespaced(client.clone(), &name.namespace);
        match timeout(ANSWER, sets.get_opt(&name.name)).await {
            Ok(Ok(set)) => set.is_none_or(|set| set.metadata.deletion_timestamp.is_some()),
            Ok(Err(error)) => {
                tracing::warn!(
                    "DaemonSet {name} cannot be looked at ({error}); the next agent finds all as it is"
                );
                false
            }
            Err(_) => {
                tracing::warn!(
                    "nobody says whether DaemonSet {name} is being deleted; the next agent finds all as it is"
                );
                false
            }
        }
    }
}

/// Lets what is open in every pod end, for so long at most.
pub(super) async fn finish(mesh: &Mesh, deadline: Duration) {
    let pods = mesh.pods.all();
    join_all(pods.values().map(|pod| pod.drain.finish(deadline))).await;
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::source::kubernetes::tests::fake::Fake;

    fn name() -> DaemonSetName {
        "mesh-system/mesh-agent".parse().unwrap()
    }

    #[tokio::test]
    async fn an_agent_goes_for_good_with_its_daemon_set_alone() {
        assert!(Removal::new(None, Some(name())).is_for_good().await, "nobody comes after it");
        let fake = Fake::start().await;
        let removal = Removal::new(Some(fake.cluster().client()), Some(name()));
        let set = |deleted: Option<&str>| {
            json!({"metadata": {"name": "mesh-agent", "namespace": "mesh-system", "deletionTimestamp": deleted},
                   "spec": {"selector": {}, "template": {}}})
        };
        fake.put("apps", "daemonsets", set(None));
        assert!(!removal.is_for_good().await);
        fake.put("apps", "daemonsets", set(Some("2026-01-01T00:00:00Z")));
        assert!(removal.is_for_good().await);
        fake.delete("apps", "daemonsets", "mesh-system", "mesh-agent");
        assert!(removal.is_for_good().await);
        fake.stop().await;
        assert!(!removal.is_for_good().await, "nobody has said so");
    }
}
