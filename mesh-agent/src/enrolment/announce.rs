//! Says which pods of this node are in the mesh, for the agents of other nodes: the annotation `mesh.io/enrolled`.
//!
//! Promises that what is written comes to be what is so, whoever wrote what was there before, once it is known what is so;
//! that it is never written on another pod of the name; and that a pod which has gone is no failure. What the API server does
//! not take is tried again, later each time. Tested below, against an API server in this process.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    runtime::utils::Backoff as _,
};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::cluster::uid_of;
use crate::{
    source::{Retry, unless_changed},
    state::{
        compile::{ANNOUNCED, ENROLLED},
        snapshot::{Snapshot, Workload},
    },
    upstream::PodName,
};

/// Patches at once.
const AT_ONCE: usize = 8;

/// How long it is waited after the first failure, and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// Says it for as long as it lives.
#[derive(Debug)]
pub struct Announcer {
    enrolled: watch::Sender<Option<Arc<HashSet<PodName>>>>,
    _task: AbortOnDropHandle<()>,
}

impl Announcer {
    /// For the pods of this node. Says nothing before it is told which are in the mesh.
    pub fn start(client: Client, node: Arc<str>, snapshots: watch::Receiver<Arc<Snapshot>>) -> Self {
        let (enrolled, told) = watch::channel(None);
        let task = Task {
            client,
            node,
            snapshots,
            told,
            written: HashMap::new(),
            retry: Retry::new(RETRY.0, RETRY.1),
        };
        Self { enrolled, _task: AbortOnDropHandle::new(tokio::spawn(task.run())) }
    }

    /// These are in the mesh, and no others.
    pub fn are_enrolled(&self, pods: HashSet<PodName>) {
        self.enrolled.send_if_modified(|before| {
            let is_new = before.as_deref() != Some(&pods);
            if is_new {
                *before = Some(Arc::new(pods));
            }
            is_new
        });
    }
}

struct Task {
    client: Client,
    node: Arc<str>,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    told: watch::Receiver<Option<Arc<HashSet<PodName>>>>,
    /// What was written and has not come back yet.
    written: HashMap<PodName, bool>,
    retry: Retry,
}

impl Task {
    async fn run(mut self) {
        loop {
            let all_well = self.write().await;
            if all_well {
                self.retry.reset();
            }
            // It has no end.
            let retry = self.retry.next().unwrap_or(RETRY.1);
            tokio::select! {
                changed = self.snapshots.changed() => if changed.is_err() { return },
                changed = self.told.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(retry), if !all_well => {}
            }
        }
    }

    /// Writes what is not so. Whether that went well.
    async fn write(&mut self) -> bool {
        let Some(enrolled) = self.told.borrow_and_update().clone() else { return true };
        let snapshot = Arc::clone(&self.snapshots.borrow_and_update());
        let mut wrong: HashMap<PodName, (Arc<Workload>, bool)> = HashMap::new();
        let own = snapshot.workloads.values().filter(|pod| pod.node.as_ref() == Some(&self.node));
        for pod in own {
            let name = PodName::from(&**pod);
            let is_in = enrolled.contains(&name);
            if pod.announced == is_in {
                self.written.remove(&name);
            } else if self.written.get(&name) != Some(&is_in) {
                wrong.insert(name, (Arc::clone(pod), is_in));
            }
        }
        let client = &self.client;
        let write = |(name, (pod, is_in)): (PodName, (Arc<Workload>, bool))| async move {
            (annotate(client, &pod, is_in).await.map_err(|error| error.to_string()), name, is_in)
        };
        let written: Vec<_> = stream::iter(wrong).map(write).buffer_unordered(AT_ONCE).collect().await;
        let mut all_well = true;
        for (result, pod, is_in) in written {
            match result {
                Ok(()) => drop(self.written.insert(pod, is_in)),
                Err(error) => {
                    all_well = false;
                    tracing::warn!(
                        %pod,
                        error,
                        "cannot write {ENROLLED} on the pod, so that other nodes do not know that it {} the mesh",
                        if is_in { "is in" } else { "has left" }
                    );
                }
            }
        }
        all_well
    }
}

/// Writes the annotation, or takes it away.
async fn annotate(client: &Client, pod: &Workload, is_in: bool) -> kube::Result<()> {
    let value = if is_in { ANNOUNCED.into() } else { Value::Null };
    // With a UID the API server refuses it for another pod of the name.
    let uid = uid_of(pod);
    let patch = json!({"metadata": {"uid": uid, "annotations": {ENROLLED: value}}});
    let api: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace);
    unless_changed(api.patch_metadata(&pod.name, &PatchParams::default(), &Patch::Merge(patch)).await)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::{super::tests::pod, *};
    use crate::source::kubernetes::tests::fake::Fake;

    const HERE: &str = "a";

    fn written(fake: &Fake, name: &str) -> Value {
        fake.get("pods", "default", name).unwrap()["metadata"]["annotations"][ENROLLED].clone()
    }

    /// A node with the pods `one` and `two`, and what it is told.
    struct Node {
        fake: Fake,
        announcer: Announcer,
        snapshots: watch::Sender<Arc<Snapshot>>,
    }

    impl Node {
        async fn new() -> Self {
            let fake = Fake::start().await;
            for name in ["one", "two"] {
                let metadata = json!({"name": name, "namespace": "default", "uid": format!("uid-of-{name}")});
                fake.put("", "pods", json!({ "metadata": metadata }));
            }
            let (snapshots, seen) = watch::channel(snapshot(&[("one", false), ("two", false)]));
            let announcer = Announcer::start(fake.cluster().client(), HERE.into(), seen);
            Self { fake, announcer, snapshots }
        }

        fn tell(&self, names: &[&str]) {
            self.announcer.are_enrolled(names.iter().map(|name| name_of(name)).collect());
        }
    }

    fn name_of(name: &str) -> PodName {
        pod(name, 1, "v1").0
    }

    /// Pods of the node by name, and whether their annotation is there.
    fn snapshot(pods: &[(&str, bool)]) -> Arc<Snapshot> {
        let one = |(i, (name, announced)): (usize, &(&str, bool))| {
            let workload = pod(name, u8::try_from(i).unwrap() + 1, "v1").1;
            let netns = Some(format!("/run/pods/uid-of-{name}").into());
            let workload = Workload { netns, announced: *announced, ..Workload::clone(&workload) };
            (workload.ips[0], Arc::new(workload))
        };
        let workloads = pods.iter().enumerate().map(one).collect();
        Arc::new(Snapshot { workloads, ..Snapshot::default() })
    }

    #[tokio::test]
    async fn what_joins_is_announced_and_what_leaves_no_more() {
        let node = Node::new().await;
        node.tell(&["one"]);
        node.fake.until(|fake| written(fake, "one") == ANNOUNCED).await;
        assert!(written(&node.fake, "two").is_null());
        node.snapshots.send_replace(snapshot(&[("one", true), ("two", false)]));
        node.tell(&["two"]);
        node.fake.until(|fake| written(fake, "one").is_null() && written(fake, "two") == ANNOUNCED).await;
    }

    #[tokio::test]
    async fn what_others_wrote_is_put_right_once_it_is_known_what_is_so() {
        let node = Node::new().await;
        node.fake.put(
            "",
            "pods",
            json!({"metadata": {
                "name": "two", "namespace": "default", "uid": "uid-of-two", "annotations": {ENROLLED: "true"},
            }}),
        );
        node.snapshots.send_replace(snapshot(&[("one", false), ("two", true)]));
        tokio::task::yield_now().await;
        assert_eq!(node.fake.asked("PATCH"), [""; 0], "nobody has said which are in the mesh");
        node.tell(&[]);
        node.fake.until(|fake| written(fake, "two").is_null()).await;
        assert_eq!(node.fake.asked("PATCH").len(), 1, "{:?}", node.fake.asked("PATCH"));
    }

    #[tokio::test]
    async fn another_pod_of_the_name_is_left_alone_and_one_that_has_gone_is_no_failure() {
        let node = Node::new().await;
        node.fake.delete("", "pods", "default", "one");
        node.fake.delete("", "pods", "default", "two");
        node.fake.put(
            "",
            "pods",
            json!({"metadata": {"name": "two", "namespace": "default", "uid": "another"}}),
        );
        node.tell(&["one", "two"]);
        node.fake.until_asked("PATCH", 2).await;
        assert!(written(&node.fake, "two").is_null());
    }

    #[tokio::test]
    async fn what_the_api_server_refuses_is_tried_again() {
        let node = Node::new().await;
        node.fake.forbid("pods", true);
        node.tell(&["one"]);
        node.fake.until_asked("PATCH", 2).await;
        node.fake.forbid("pods", false);
        node.fake.until(|fake| written(fake, "one") == ANNOUNCED).await;
    }
}
