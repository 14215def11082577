//! All pods at once, from the agent before to this one, and from this one to the next.

use std::{collections::HashSet, path::Path, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use tokio::sync::watch;

use super::{Enrolment, LOOK_AGAIN, namespace_id, plan, wanted};
use crate::{
    capture::{Adopted, OfferedPod},
    handover::Asked,
    identity::WorkloadIdentity,
    report::Reporter,
    state::snapshot::Snapshot,
    upstream::PodName,
};

/// How long a succession waits for each certificate: the agent before serves meanwhile.
const CERTIFICATE: Duration = Duration::from_secs(15);

/// Pods of another agent that this one is ready to serve.
#[derive(Debug, Default)]
pub struct Prepared {
    pods: Vec<(Adopted, Arc<WorkloadIdentity>, (u64, u64))>,
    /// Cookies of all that were offered.
    offered: HashSet<u64>,
}

/// Pods of another agent that this one serves, while the kernel still runs the programs of that one.
#[derive(Debug)]
pub struct Served {
    adopted: Vec<Adopted>,
    offered: HashSet<u64>,
}

impl Enrolment {
    /// What it reports to.
    pub fn reporter(&self) -> &Arc<Reporter> {
        &self.mesh.reporter
    }

    /// Makes ready to serve what another agent offers, as far as the configuration in force still wants it. Changes
    /// nothing of what the other one serves.
    ///
    /// # Errors
    /// A sentence that names the pod: one that cannot be taken over keeps all of them where they are.
    pub async fn prepare(&mut self, offered: Vec<OfferedPod>) -> Result<Prepared> {
        let wanted = wanted(&self.mesh.snapshot(), &self.mesh.node);
        self.find_namespaces(&wanted);
        let mut prepared = Prepared::default();
        for workload in wanted.values() {
            self.authority.prefetch(&workload.identity);
        }
        for pod in offered {
            prepared.offered.insert(pod.cookie);
            let name = PodName { namespace: (*pod.namespace).into(), name: (*pod.name).into() };
            let Some(workload) = wanted.get(&name) else { continue };
            let Some(id) = workload.netns.as_deref().and_then(|path: &Path| namespace_id(path)) else {
                continue;
            };
            let identity = self.authority.identity_within(&workload.identity, CERTIFICATE).await;
            let identity = identity.with_context(|| format!("the certificate of pod {name}"))?;
            let adopted = tokio::task::block_in_place(|| self.capture.adopt(Arc::clone(workload), pod))?;
            prepared.pods.extend(adopted.map(|adopted| (adopted, identity, id)));
        }
        Ok(prepared)
    }

    /// Takes their connections from here on, beside the other agent.
    pub fn serve_all(&mut self, prepared: Prepared) -> Served {
        let mut adopted = Vec::with_capacity(prepared.pods.len());
        for (pod, identity, id) in prepared.pods {
            self.serve(Arc::clone(pod.net()), identity, id);
            adopted.push(pod);
        }
        Served { adopted, offered: prepared.offered }
    }

    /// The other agent has let go: everything it had is this one's.
    pub fn confirm(&self, served: Served) {
        let pods = served.adopted.len();
        let failed = tokio::task::block_in_place(|| self.capture.confirm(served.adopted, &served.offered));
        for error in failed {
            tracing::error!(
                error = format!("{error:#}"),
                "the kernel still runs a program of the agent before"
            );
        }
        tracing::info!(pods, "took over from the agent before");
    }

    /// Offers everything to a successor and lets go of it once that one serves. False: it did not come to that, and
    /// nothing has happened.
    pub(super) async fn hand_over(&mut self, asked: &mut Asked) -> bool {
        tracing::info!("a successor is being offered the pods");
        let (lock, pods) = match self.capture.offer() {
            Ok(offer) => offer,
            Err(error) => {
                tracing::warn!(%error, "cannot hand over; this agent goes on");
                return false;
            }
        };
        // Pods neither come nor go meanwhile; everything else of the configuration is in force at once.
        let served = tokio::select! {
            served = asked.offer(lock, pods) => served,
            () = self.drain.left() => return false,
        };
        if let Err(error) = served {
            tracing::warn!(%error, "the successor did not take over; this agent goes on");
            return false;
        }
        self.announce_no_more();
        self.capture.let_go().await;
        self.drain.leave();
        true
    }

    /// Follows the configuration for the connections that were open when another agent took over: those of pods that
    /// leave the mesh end with them. Never completes.
    pub async fn follow(mut self, mut snapshots: watch::Receiver<Arc<Snapshot>>) {
        loop {
            let snapshot = Arc::clone(&snapshots.borrow_and_update());
            let mut wanted = self.wanted.of(&snapshot, &self.mesh.node).clone();
            wanted.retain(|name, pod| self.namespace_stands(name, pod));
            let held = self.mesh.pods.all();
            let held = held.iter().map(|(name, pod)| (name.clone(), pod.workload())).collect();
            let plan = plan(&held, &wanted);
            for name in &plan.leave {
                self.let_go(name);
            }
            tokio::select! {
                changed = snapshots.changed() => if changed.is_err() { break },
                () = tokio::time::sleep(LOOK_AGAIN) => {}
            }
        }
        std::future::pending::<()>().await;
    }
}
