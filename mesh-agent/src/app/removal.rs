//! Whether an agent that is told to stop, with no successor beside it, goes for good or makes room for another.
//!
//! With a directory of manifests nothing comes after it. In a cluster its DaemonSet says: where that is there, the next agent of
//! the node finds everything as it was left, and until then the pods' own policy holds
//! (`mesh.io/when-agent-is-down`). Whoever cannot be asked has not said that it goes: what is left behind by mistake
//! `mesh-agent clean` removes, what is removed by mistake lets pods talk in the clear. Tested below.

use std::{pin::pin, time::Duration};

use futures_util::{StreamExt as _, future::join_all};
use k8s_openapi::api::apps::v1::DaemonSet;
use kube::{
    Api, Client,
    runtime::{WatchStreamExt as _, watcher::watch_object},
};
use tokio::{sync::watch, time::timeout};
use tokio_util::task::AbortOnDropHandle;

use crate::{config::DaemonSetName, proxy::Mesh};

/// How long the API server may take to answer: what waits for the end of this process waits longer.
const ANSWER: Duration = Duration::from_secs(5);

/// Who can say it.
#[derive(Debug)]
pub(super) struct Removal(Option<Followed>);

/// A DaemonSet, followed from the start: what is uninstalled loses the right to ask together with it.
#[derive(Debug)]
struct Followed {
    sets: Api<DaemonSet>,
    name: DaemonSetName,
    /// Whether it is being deleted, or gone, as far as was told.
    deleted: watch::Receiver<bool>,
    _task: AbortOnDropHandle<()>,
}

impl Removal {
    /// Without a client or a name nobody comes after this agent.
    pub fn new(client: Option<Client>, daemon_set: Option<DaemonSetName>) -> Self {
        Self(client.zip(daemon_set).map(|(client, name)| {
            let sets: Api<DaemonSet> = Api::namespaced(client, &name.namespace);
            let (told, deleted) = watch::channel(false);
            let task = tokio::spawn(follow(sets.clone(), name.name.clone(), told));
            Followed { sets, name, deleted, _task: AbortOnDropHandle::new(task) }
        }))
    }

    /// Whether it goes for good.
    pub async fn is_for_good(&self) -> bool {
        let Some(Followed { sets, name, deleted, .. }) = &self.0 else { return true };
        if *deleted.borrow() {
            return true;
        }
        match timeout(ANSWER, sets.get_opt(&name.name)).await {
            Ok(Ok(set)) => is_deleted(set.as_ref()),
            Ok(Err(error)) => {
                tracing::warn!(
                    "DaemonSet {name} cannot be looked at ({error}); the next agent finds all as it is"
                );
                false
            }
            Err(_) => {
                tracing::warn!(
                    "nobody says whether DaemonSet {name} is deleted; the next agent finds all as it is"
                );
                false
            }
        }
    }
}

fn is_deleted(set: Option<&DaemonSet>) -> bool {
    set.is_none_or(|set| set.metadata.deletion_timestamp.is_some())
}

async fn follow(sets: Api<DaemonSet>, name: String, told: watch::Sender<bool>) {
    let mut seen = pin!(watch_object(sets, &name).default_backoff());
    while let Some(news) = seen.next().await {
        if let Ok(set) = news {
            told.send_replace(is_deleted(set.as_ref()));
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
            json!({"kind": "DaemonSet", "metadata": {"name": "mesh-agent", "namespace": "mesh-system", "deletionTimestamp": deleted},
                   "spec": {"selector": {}, "template": {}}})
        };
        fake.put("apps", "daemonsets", set(None));
        assert!(!removal.is_for_good().await);
        fake.put("apps", "daemonsets", set(Some("2026-01-01T00:00:00Z")));
        assert!(removal.is_for_good().await);
        fake.delete("apps", "daemonsets", "mesh-system", "mesh-agent");
        assert!(removal.is_for_good().await);
        fake.stop().await;
        assert!(
            !Removal::new(Some(fake.cluster().client()), Some(name())).is_for_good().await,
            "nobody has said so"
        );
    }

    #[tokio::test]
    async fn what_was_told_holds_when_nobody_may_ask_any_more() {
        let fake = Fake::start().await;
        let set = json!({"kind": "DaemonSet", "metadata": {"name": "mesh-agent", "namespace": "mesh-system"},
                         "spec": {"selector": {}, "template": {}}});
        fake.put("apps", "daemonsets", set);
        let removal = Removal::new(Some(fake.cluster().client()), Some(name()));
        let mut deleted = removal.0.as_ref().unwrap().deleted.clone();
        deleted.changed().await.unwrap();
        fake.delete("apps", "daemonsets", "mesh-system", "mesh-agent");
        deleted.wait_for(|deleted| *deleted).await.unwrap();
        fake.forbid("daemonsets", true);
        assert!(removal.is_for_good().await);
    }
}
