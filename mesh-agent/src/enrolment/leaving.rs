//! How pods leave the mesh, so that nothing that is under way is lost.
//!
//! In two steps. First new connections pass by the agent, which goes on to serve what it has and whoever comes yet: what
//! was captured a moment before, and peers on other nodes who learn of it later. Then the kernel lets go, listeners are
//! closed, and what is still open may finish. A pod whose label is back before that has never been away. Tested in the
//! lab (`tests/tests/joining_and_leaving.rs`, `enrolment.rs`).

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::{task::block_in_place, time::Instant};

use super::{Enrolment, in_force, same_place};
use crate::{
    capture,
    state::snapshot::Workload,
    upstream::{Pod, PodName},
};

/// How long a pod that leaves is still served. Peers go on for a shorter time after they have learned of it
/// (`upstream/transitions.rs`).
const LINGER: Duration = Duration::from_secs(3);

/// The same where all pods are let go of because the agent stops. Peers do not stop to come then: it is for what was
/// captured a moment before.
const LINGER_OF_ALL: Duration = Duration::from_millis(250);

/// How long clients have to end connections that they use, before those that are idle are closed.
const LAST_REQUEST: Duration = Duration::from_secs(1);

/// How long the connections of a pod that leaves the mesh may go on after that.
const POD_DRAIN: Duration = Duration::from_secs(5);

/// Pods that are being left, and until when they linger.
#[derive(Debug, Default)]
pub(super) struct Leaving(HashMap<PodName, Instant>);

impl Leaving {
    /// Whether this one lingers.
    pub(super) fn has(&self, name: &PodName) -> bool {
        self.0.contains_key(name)
    }
}

impl Enrolment {
    /// The first step for a pod that is not wanted any more. One whose network namespace has gone has nothing to linger for.
    pub(super) fn leave(&mut self, name: &PodName) {
        let Some(pod) = self.mesh.pods.all().get(name).cloned() else { return };
        if !self.stands(name, &pod) {
            return self.let_go(name);
        }
        match block_in_place(|| self.capture.pass_by(pod.net())) {
            Ok(()) => {
                tracing::info!(pod = %name, "pod leaves the mesh");
                self.leaving.0.insert(name.clone(), Instant::now() + LINGER);
                self.pods_changed.notify_one();
            }
            Err(error) => {
                tracing::warn!(pod = %name, error = format!("{error:#}"), "pod leaves the mesh at once");
                self.let_go(name);
            }
        }
    }

    /// The second step for those whose time has come.
    pub(super) fn let_go_of_those_due(&mut self) {
        let now = Instant::now();
        let (pods, leaving) = (self.mesh.pods.all(), &self.leaving.0);
        let due = leaving.iter().filter(|(name, until)| {
            **until <= now || !pods.get(*name).is_some_and(|pod| self.stands(name, pod))
        });
        let due: Vec<_> = due.map(|(name, _)| name.clone()).collect();
        for name in &due {
            self.let_go(name);
        }
        if !due.is_empty() {
            capture::give_back_soon();
        }
    }

    /// The second step: the kernel lets go first, so that new connections pass untouched; open ones may finish.
    pub(super) fn let_go(&mut self, name: &PodName) {
        self.leaving.0.remove(name);
        let Some(pod) = self.mesh.pods.all().get(name).cloned() else { return };
        if let Err(error) = block_in_place(|| self.capture.un_enrol(pod.net())) {
            tracing::warn!(pod = %name, error = format!("{error:#}"), "something of the mesh may be left in the pod");
        }
        self.mesh.pods.remove(name);
        self.namespaces.remove(name);
        self.pods_changed.notify_one();
        tracing::info!(pod = %name, "pod has left the mesh");
        tokio::spawn(async move {
            pod.drain.leave();
            let _ = tokio::time::timeout(LAST_REQUEST, pod.drain.finished()).await;
            pod.drain.finish(POD_DRAIN).await
        });
    }

    /// Whether a pod that is to join was only about to leave, and is served as before. Makes room otherwise: whoever lingers
    /// in its place is let go of.
    pub(super) fn is_back(&mut self, workload: &Arc<Workload>, namespace: Option<(u64, u64)>) -> bool {
        let name = PodName::from(&**workload);
        let in_place = self.leaving.0.keys().filter(|one| self.namespaces.get(*one).copied() == namespace);
        let in_place: Vec<_> = in_place.cloned().collect();
        if self.leaving.has(&name)
            && in_place.contains(&name)
            && let Some(pod) = self.mesh.pods.all().get(&name)
            && same_place(&pod.workload(), workload)
            && self.capture_again(pod, workload)
        {
            self.leaving.0.remove(&name);
            tracing::info!(pod = %name, "pod stays in the mesh");
            return true;
        }
        let lingers = self.leaving.has(&name).then_some(name);
        for one in in_place.into_iter().chain(lingers) {
            self.let_go(&one);
        }
        false
    }

    fn capture_again(&self, pod: &Pod, workload: &Arc<Workload>) -> bool {
        if let Err(error) = block_in_place(|| self.capture.update(pod.net(), workload)) {
            tracing::warn!(pod = %workload.name, error = format!("{error:#}"), "pod is enrolled anew");
            return false;
        }
        pod.update(|held| Workload { capture: workload.capture.clone(), ..held.clone() });
        in_force::update_pod(&self.mesh, pod);
        self.pods_changed.notify_one();
        true
    }

    fn stands(&self, name: &PodName, pod: &Pod) -> bool {
        let now = pod.net().workload.netns.as_deref().and_then(super::namespace_id);
        now.is_some() && now == self.namespaces.get(name).copied()
    }

    /// Both steps for all pods, since the agent stops.
    pub(super) async fn leave_all(&mut self, deadline: Duration) {
        self.announce_none();
        let pods = self.mesh.pods.all();
        let nets: Vec<_> = pods.values().map(|pod| Arc::clone(pod.net())).collect();
        for (name, pod) in pods.iter().filter(|(name, _)| !self.leaving.has(name)) {
            if let Err(error) = block_in_place(|| self.capture.pass_by(pod.net())) {
                tracing::warn!(pod = %name, error = format!("{error:#}"), "pod leaves the mesh at once");
            }
        }
        tokio::time::sleep(LINGER_OF_ALL).await;
        if let Err(error) = block_in_place(|| self.capture.un_enrol_all(&nets)) {
            tracing::warn!(error = format!("{error:#}"), "something of the mesh may be left in a pod");
        }
        self.drain.start();
        let all = async {
            for pod in pods.values() {
                pod.drain.finish(deadline).await;
            }
        };
        if tokio::time::timeout(deadline, all).await.is_err() {
            tracing::warn!(?deadline, "connections were still open when the drain deadline passed");
        }
        for name in pods.keys() {
            self.mesh.pods.remove(name);
        }
    }
}
