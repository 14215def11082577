//! What enrolment does besides where pods are a cluster's: finds their network namespaces, and says which are in the mesh,
//! and why others are not.
//!
//! Never says that of a pod which is about to leave: peers go on for a moment after they have learned of it.

use std::{collections::HashMap, sync::Arc};

use tokio::{sync::watch, task::block_in_place};

use super::{Announcer, Enrolment, Events, Namespaces};
use crate::{source::ByUid, state::snapshot::Workload, upstream::PodName};

/// What is there in a cluster.
#[derive(Debug)]
pub(super) struct InCluster {
    namespaces: Namespaces,
    told: watch::Receiver<ByUid>,
    /// None once another agent says it.
    announcer: Option<Announcer>,
    /// The same.
    pub events: Option<Events>,
}

/// `metadata.uid` of a pod, where it is known: the name of the link to its network namespace.
pub(super) fn uid_of(pod: &Workload) -> Option<&str> {
    pod.netns.as_deref()?.file_name()?.to_str()
}

impl Enrolment {
    /// The same where pods are a cluster's.
    #[must_use]
    pub fn in_cluster(mut self, namespaces: Namespaces, announcer: Announcer, events: Events) -> Self {
        let told = namespaces.told().watch();
        self.cluster = Some(InCluster { namespaces, told, announcer: Some(announcer), events: Some(events) });
        self
    }

    /// Has the paths of pods' namespaces lead there: of those that are wanted, and of those that are still served.
    pub(super) fn find_namespaces(&mut self, wanted: &HashMap<PodName, Arc<Workload>>) {
        let Some(cluster) = &mut self.cluster else { return };
        let served = self.mesh.pods.all();
        let served = served.values().filter_map(|pod| pod.workload().netns.clone());
        let paths = wanted.values().filter_map(|pod| pod.netns.clone()).chain(served);
        block_in_place(|| cluster.namespaces.look(paths));
    }

    /// Says which pods are in the mesh now.
    pub(super) fn announce(&self) {
        let announcer = self.cluster.as_ref().and_then(|cluster| cluster.announcer.as_ref());
        let Some(announcer) = announcer else { return };
        let pods = self.mesh.pods.all();
        announcer.are_enrolled(pods.keys().filter(|name| !self.leaving.has(name)).cloned().collect());
    }

    /// Says that none is.
    pub(super) fn announce_none(&self) {
        if let Some(announcer) = self.cluster.as_ref().and_then(|cluster| cluster.announcer.as_ref()) {
            announcer.are_enrolled(std::collections::HashSet::new());
        }
    }

    /// Another agent says it from here on.
    pub(super) fn announce_no_more(&mut self) {
        if let Some(cluster) = &mut self.cluster {
            cluster.announcer = None;
            cluster.events = None;
        }
    }
}

/// Waits until something is told of the sandboxes of pods; for ever where there is no cluster.
pub(super) async fn told(cluster: Option<&mut InCluster>) {
    let is_told = match cluster {
        Some(cluster) => cluster.told.changed().await.is_ok(),
        None => false,
    };
    if !is_told {
        std::future::pending::<()>().await;
    }
}
