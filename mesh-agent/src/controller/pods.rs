//! Which identities run on which node, as the controller's own configuration has it.
//!
//! Tested in `tests/`.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::sync::watch;

use crate::{
    identity::SpiffeId,
    state::snapshot::{SharedMap, Snapshot, Starting, Workload},
};

/// How long a request waits for the configuration to know of its pod: an agent may have read of it a moment earlier.
const CATCH_UP: Duration = Duration::from_secs(1);

/// The pods of the mesh.
#[derive(Debug)]
pub(super) struct Pods {
    snapshots: watch::Receiver<Arc<Snapshot>>,
    index: ArcSwap<Index>,
}

/// The same for one state of the configuration, ready to be asked.
#[derive(Debug, Default)]
struct Index {
    /// What it is made of.
    workloads: SharedMap<IpAddr, Arc<Workload>>,
    starting: SharedMap<(Arc<str>, Arc<str>), Arc<Starting>>,
    by_node: HashMap<Arc<str>, HashSet<SpiffeId>>,
}

impl Index {
    fn of(snapshot: &Snapshot) -> Self {
        let mut by_node: HashMap<_, HashSet<_>> = HashMap::new();
        for pod in snapshot.workloads.values().filter(|pod| pod.enrolled) {
            if let Some(node) = &pod.node {
                by_node.entry(Arc::clone(node)).or_default().insert(pod.identity.clone());
            }
        }
        for Starting { node, identity } in snapshot.starting.values().map(|pod| &**pod) {
            by_node.entry(Arc::clone(node)).or_default().insert(identity.clone());
        }
        Self { workloads: snapshot.workloads.clone(), starting: snapshot.starting.clone(), by_node }
    }
}

impl Pods {
    pub fn new(snapshots: watch::Receiver<Arc<Snapshot>>) -> Self {
        let index = ArcSwap::from_pointee(Index::of(&snapshots.borrow()));
        Self { snapshots, index }
    }

    /// Whether an enrolled pod of this identity runs on this node.
    pub async fn runs(&self, id: &SpiffeId, node: &str) -> bool {
        let mut snapshots = self.snapshots.clone();
        let known = snapshots.wait_for(|snapshot| self.runs_in(snapshot, id, node));
        matches!(tokio::time::timeout(CATCH_UP, known).await, Ok(Ok(_)))
    }

    fn runs_in(&self, snapshot: &Snapshot, id: &SpiffeId, node: &str) -> bool {
        let mut index = self.index.load();
        if !index.workloads.is_same(&snapshot.workloads) || !index.starting.is_same(&snapshot.starting) {
            self.index.store(Arc::new(Index::of(snapshot)));
            index = self.index.load();
        }
        index.by_node.get(node).is_some_and(|ids| ids.contains(id))
    }
}
