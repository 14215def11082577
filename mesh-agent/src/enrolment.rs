//! Which pods of this node the mesh carries: compares what the configuration wants with what is enrolled, and makes it so.
//!
//! Promises: one pod's failure touches no other; what failed is tried again, and shown until it succeeds; a pod whose
//! network namespace has gone, or whose address, identity or namespace has changed, is let go of at once. Pods are taken
//! over from the agent before, and handed over to the next (`enrolment/succession.rs`). Tested by the tables below and in
//! the lab.

mod announce;
mod cluster;
mod direct;
mod events;
mod failing;
mod in_force;
mod leaving;
mod namespaces;
mod succession;

use std::{
    collections::HashMap, net::IpAddr, os::unix::fs::MetadataExt, path::Path, sync::Arc, time::Duration,
};

use nix::sys::resource::{Resource, getrlimit};
use tokio::{
    sync::{Notify, watch},
    task::block_in_place,
};

pub use self::{
    announce::Announcer,
    events::Events,
    failing::Failing,
    in_force::{as_gateway, put_in_force, update_pod},
    namespaces::Namespaces,
    succession::{Prepared, Served},
};
use self::{cluster::InCluster, leaving::Leaving};
use crate::{
    admin::BlockReady,
    capture::{self, Capture, Listener, PodNet},
    drain::Drain,
    handover::{Asked, Door},
    identity::{Authority, WorkloadIdentity},
    proxy::{Mesh, inbound, outbound},
    state::snapshot::{SharedMap, Snapshot, Workload},
    upstream::{Pod, PodLimits, PodName},
};

/// How often failed enrolments are tried again and namespaces are looked after.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// What is said of a restricted pod that was given a way out which the guard cannot stand at.
const UNGUARDED: &str = "it may leave around its guard";

/// Keeps the enrolled pods of this node in step with the configuration.
#[derive(Debug)]
pub struct Enrolment {
    mesh: Arc<Mesh>,
    capture: Arc<Capture>,
    authority: Arc<Authority>,
    drain: Drain,
    failing: Failing,
    /// Device and inode of each enrolled pod's network namespace: a path may come to name another one.
    namespaces: HashMap<PodName, (u64, u64)>,
    leaving: Leaving,
    wanted: Wanted,
    /// In a cluster: where its pods are, and who is told which are in the mesh.
    cluster: Option<InCluster>,
    /// Told when pods have come or gone.
    pods_changed: Arc<Notify>,
    /// Grows with each look at what is wanted.
    rounds: watch::Sender<u64>,
}

/// How the following of the configuration came to its end.
#[derive(Debug)]
pub enum Ended {
    /// Every pod was let go of.
    Left,
    /// Every pod is another agent's, which waits to be told so. What is open here stays.
    HandedOver(Box<Enrolment>, Asked),
}

/// What has to be done.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    leave: Vec<PodName>,
    join: Vec<Arc<Workload>>,
    update: Vec<Arc<Workload>>,
}

fn plan(enrolled: &HashMap<PodName, Arc<Workload>>, wanted: &HashMap<PodName, Arc<Workload>>) -> Plan {
    let mut plan = Plan::default();
    for (name, now) in enrolled {
        match wanted.get(name) {
            Some(then) if same_place(now, then) => {
                if now != then {
                    plan.update.push(Arc::clone(then));
                }
            }
            other => {
                plan.leave.push(name.clone());
                plan.join.extend(other.cloned());
            }
        }
    }
    plan.join.extend(
        wanted.iter().filter(|(name, _)| !enrolled.contains_key(name)).map(|(_, pod)| Arc::clone(pod)),
    );
    plan
}

/// Whether sockets, keys and pools of the one still serve the other.
fn same_place(now: &Workload, then: &Workload) -> bool {
    now.ips == then.ips && now.netns == then.netns && now.identity == then.identity
}

fn wanted(snapshot: &Snapshot, node: &str) -> HashMap<PodName, Arc<Workload>> {
    snapshot
        .workloads
        .values()
        .filter(|pod| pod.enrolled && pod.node.as_deref() == Some(node))
        .map(|pod| (PodName::from(&**pod), Arc::clone(pod)))
        .collect()
}

/// The pods that were wanted last, for as long as the configuration says the same of pods.
#[derive(Debug, Default)]
struct Wanted {
    by: SharedMap<IpAddr, Arc<Workload>>,
    pods: HashMap<PodName, Arc<Workload>>,
}

impl Wanted {
    fn of(&mut self, snapshot: &Snapshot, node: &str) -> &HashMap<PodName, Arc<Workload>> {
        if !self.by.is_same(&snapshot.workloads) {
            self.pods = wanted(snapshot, node);
            self.by = snapshot.workloads.clone();
        }
        &self.pods
    }
}

/// No pod takes more than half of the agent's file descriptors, at two for each connection: others need some too.
pub fn connections_of_a_pod(most: usize) -> usize {
    let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(now, _)| now);
    let share = usize::try_from(descriptors / 4).unwrap_or(usize::MAX);
    if share == 0 { most } else { most.min(share) }
}

/// Which namespace a path leads to: its device and inode.
pub(crate) fn namespace_id(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

impl Enrolment {
    /// Nothing enrolled yet.
    pub fn new(mesh: Arc<Mesh>, capture: Arc<Capture>, authority: Arc<Authority>, drain: Drain) -> Self {
        let (failing, namespaces, pods_changed) = (Failing::default(), HashMap::new(), Arc::default());
        let (leaving, wanted, cluster) = (Leaving::default(), Wanted::default(), None);
        let rounds = watch::Sender::default();
        Self {
            mesh,
            capture,
            authority,
            drain,
            failing,
            namespaces,
            leaving,
            wanted,
            cluster,
            pods_changed,
            rounds,
        }
    }

    /// Told after each round of coming and going.
    pub fn rounds(&self) -> watch::Receiver<u64> {
        self.rounds.subscribe()
    }

    /// What fails, for as long as this runs.
    pub fn failing(&self) -> Failing {
        self.failing.clone()
    }

    /// Follows the configuration, ready once its first round is done, until the agent drains; then lets every pod go,
    /// within `deadline`. A successor that calls at the door ends it too.
    pub async fn run(
        self,
        snapshots: watch::Receiver<Arc<Snapshot>>,
        first_round: BlockReady,
        deadline: Duration,
        door: Door,
    ) -> Ended {
        let (mesh, capture) = (Arc::clone(&self.mesh), Arc::clone(&self.capture));
        let direct = direct::keep(mesh, capture, snapshots.clone(), Arc::clone(&self.pods_changed));
        let direct = tokio::spawn(direct);
        let ended = self.follow_until(snapshots, first_round, deadline, door).await;
        direct.abort();
        // It holds the capture until it has ended.
        let _ = direct.await;
        ended
    }

    async fn follow_until(
        mut self,
        mut snapshots: watch::Receiver<Arc<Snapshot>>,
        first_round: BlockReady,
        deadline: Duration,
        mut door: Door,
    ) -> Ended {
        let mut first_round = Some(first_round);
        loop {
            let snapshot = Arc::clone(&snapshots.borrow_and_update());
            let newer = || snapshots.has_changed().unwrap_or(false);
            let done = self.reconcile(&snapshot, newer).await;
            self.rounds.send_modify(|rounds| *rounds += 1);
            if !done {
                continue;
            }
            self.capture.follow_kubelet();
            // A pod that could not be enrolled again stays refused as it was.
            if self.failing.reasons().is_empty() && !self.drain.is_leaving() {
                self.capture.forget_crashed();
            }
            drop(first_round.take());
            tokio::select! {
                changed = snapshots.changed() => if changed.is_err() { break },
                () = tokio::time::sleep(LOOK_AGAIN) => {}
                () = cluster::told(self.cluster.as_mut()) => {}
                mut asked = door.asked() => if self.hand_over(&mut asked).await {
                    door.leave_file();
                    return Ended::HandedOver(Box::new(self), asked);
                },
                () = self.drain.left() => break,
            }
        }
        door.close().await;
        self.leave_all(deadline).await;
        Ended::Left
    }

    /// `newer`: whether there is something newer already. False: it was left half done for that.
    async fn reconcile(&mut self, snapshot: &Snapshot, newer: impl Fn() -> bool) -> bool {
        let mut wanted = self.wanted.of(snapshot, &self.mesh.node).clone();
        self.failing.keep_only(&wanted);
        self.find_namespaces(&wanted);
        wanted.retain(|name, pod| self.namespace_stands(name, pod));
        self.let_go_of_those_due();
        let pods = self.mesh.pods.all();
        let enrolled = pods.iter().filter(|(name, _)| !self.leaving.has(name));
        let enrolled = enrolled.map(|(name, pod)| (name.clone(), pod.workload())).collect();
        let plan = plan(&enrolled, &wanted);
        for name in &plan.leave {
            // Somebody else by now, who waits to be enrolled.
            if wanted.contains_key(name) { self.let_go(name) } else { self.leave(name) }
        }
        if !plan.leave.is_empty() {
            capture::give_back_soon();
        }
        for workload in plan.update {
            self.update(&workload);
        }
        for workload in &plan.join {
            self.authority.prefetch(&workload.identity);
        }
        let joins = !plan.join.is_empty();
        for workload in plan.join {
            // A node full of pods takes a while: an agent that is told to stop does not go on with it.
            if self.drain.is_leaving() {
                break;
            }
            self.try_join(workload).await;
            // Nor does a change of policy wait for the last of them.
            if newer() {
                return false;
            }
        }
        if joins {
            // Loading a pod's programs takes many times what is kept of it.
            capture::give_back_soon();
        }
        self.look_for_new_ways_out();
        self.look_for_lost_listeners();
        let failing = self.failing.reasons().len();
        let pods = self.mesh.pods.all();
        let enrolled = pods.keys().filter(|name| !self.leaving.has(name)).count();
        self.mesh.reporter.set_pods(enrolled, failing);
        self.announce();
        self.tell_refusals();
        true
    }

    /// False when the pod's namespace is not there, or is no longer the one that was enrolled.
    fn namespace_stands(&self, name: &PodName, pod: &Workload) -> bool {
        let Some(path) = &pod.netns else { return false };
        match (namespace_id(path), self.namespaces.get(name)) {
            (Some(now), Some(then)) => now == *then,
            (Some(_), None) => true,
            (None, _) => {
                self.fails(name, &format!("its network namespace {} is not there", path.display()));
                false
            }
        }
    }

    /// The kernel first: what it refuses is tried again, as long as the pod still has what it had. Everything else of the
    /// pod is in force already.
    fn update(&self, workload: &Arc<Workload>) {
        let Some(pod) = self.mesh.pods.get(workload) else { return };
        let name = PodName::from(&**workload);
        match self.capture.update(pod.net(), workload) {
            Ok(()) => {
                self.failing.forget(&name);
                pod.update(|held| Workload { capture: workload.capture.clone(), ..held.clone() });
            }
            Err(error) => self.fails(&name, &format!("its annotations are not in force: {error:#}")),
        }
    }

    async fn try_join(&mut self, workload: Arc<Workload>) {
        let name = PodName::from(&*workload);
        match self.join(&workload).await {
            Ok(()) => {
                self.failing.forget(&name);
                tracing::info!(pod = %name, identity = %workload.identity, "pod enrolled");
            }
            Err(reason) => self.fails(&name, &reason),
        }
    }

    async fn join(&mut self, workload: &Arc<Workload>) -> Result<(), String> {
        let id =
            workload.netns.as_deref().and_then(namespace_id).ok_or("its network namespace is not there")?;
        if self.is_back(workload, Some(id)) {
            return Ok(());
        }
        // The certificate first: a pod is captured only when it can be served.
        let identity =
            self.authority.identity(&workload.identity).await.map_err(|error| error.to_string())?;
        let net = block_in_place(|| self.capture.enrol(Arc::clone(workload)));
        let net = net.map_err(|error| format!("{error:#}"))?;
        self.serve(net, identity, id);
        Ok(())
    }

    /// Takes the pod's connections from here on. `id`: its network namespace.
    fn serve(&mut self, net: Arc<PodNet>, identity: Arc<WorkloadIdentity>, id: (u64, u64)) {
        let name = PodName::from(&*net.workload);
        let limits = PodLimits {
            connections: connections_of_a_pod(self.mesh.limits.max_connections_per_pod as usize),
            carrier_interval: self.mesh.carrier_interval,
        };
        let transitions = Arc::clone(self.mesh.pods.transitions());
        let pod = Arc::new(Pod::new(net, identity, self.drain.child(), limits, transitions));
        self.mesh.pods.insert(name.clone(), Arc::clone(&pod));
        update_pod(&self.mesh, &pod);
        self.namespaces.insert(name, id);
        self.pods_changed.notify_one();
        let workers = &self.mesh.workers;
        workers.spawn(outbound::serve(Arc::clone(&self.mesh), Arc::clone(&pod)));
        for listener in [Listener::Inbound, Listener::Mesh] {
            workers.spawn(inbound::serve(Arc::clone(&self.mesh), Arc::clone(&pod), listener));
        }
    }

    /// Interfaces that a restricted pod was given after it was enrolled are guarded too. Where that is not possible it stays
    /// captured, and the operator is told which it is.
    fn look_for_new_ways_out(&self) {
        for (name, pod) in self.mesh.pods.all().iter() {
            let workload = pod.workload();
            if !workload.capture.restrict_egress || !pod.net().was_rewired() {
                continue;
            }
            match self.capture.guard_again(pod.net(), &workload) {
                Ok(()) => self.failing.forget_where(name, |reason| reason.starts_with(UNGUARDED)),
                Err(error) => {
                    pod.net().look_again();
                    self.fails(name, &format!("{UNGUARDED}: {error:#}"));
                }
            }
        }
    }

    /// A pod that closes a listener of the agent's harms itself: it stays captured, and what was to come to the agent is
    /// refused. Letting it go would be a way out of the mesh.
    fn look_for_lost_listeners(&self) {
        for (name, _) in self.mesh.pods.all().iter().filter(|(_, pod)| pod.net().has_lost_a_listener()) {
            self.fails(
                name,
                "a listener of the agent was closed from inside the pod: its connections are refused until it is \
                 enrolled anew (take its label off and put it on again)",
            );
        }
    }

    fn fails(&self, name: &PodName, reason: &str) {
        if self.failing.note(name, reason) {
            tracing::warn!(pod = %name, reason, "pod cannot be enrolled; it will be tried again");
        }
    }
}

#[cfg(test)]
pub(super) mod tests {

    use super::*;
    use crate::{
        identity::SpiffeId,
        state::snapshot::{Authentication, CapturePolicy},
    };

    pub fn pod(name: &str, ip: u8, version: &str) -> (PodName, Arc<Workload>) {
        let text = Arc::<str>::from;
        let workload = Workload {
            namespace: text("default"),
            name: text(name),
            ips: vec![[10, 0, 0, ip].into()],
            node: Some(text("a")),
            identity: SpiffeId {
                trust_domain: text("cluster.local"),
                namespace: text("default"),
                service_account: text(name),
            },
            labels: [(text("version"), text(version))].into(),
            view: None,
            enrolled: true,
            netns: Some("/run/netns/x".into()),
            announced: false,
            capture: CapturePolicy::default(),
            authorization: Arc::default(),
            authentication: Authentication::default(),
            workload_name: text(name),
            canonical_service: text(name),
            canonical_revision: text(version),
        };
        (PodName::from(&workload), Arc::new(workload))
    }

    #[test]
    fn a_plan_touches_only_what_changed() {
        let [a, b, c] = [pod("a", 1, "v1"), pod("b", 2, "v1"), pod("c", 3, "v1")];
        let enrolled = HashMap::from([a.clone(), b.clone()]);
        assert_eq!(plan(&enrolled, &enrolled), Plan::default());

        let relabelled = pod("a", 1, "v2");
        let step = plan(&enrolled, &HashMap::from([relabelled.clone(), c.clone()]));
        assert_eq!(step.leave, [b.0]);
        assert_eq!(step.update, [relabelled.1]);
        assert_eq!(step.join, [c.1]);

        let moved = pod("a", 9, "v1");
        let step = plan(&HashMap::from([a.clone()]), &HashMap::from([moved.clone()]));
        assert_eq!((step.leave, step.join), (vec![a.0], vec![moved.1]));
    }

    #[test]
    fn only_enrolled_pods_of_this_node_are_wanted() {
        let (name, here) = pod("a", 1, "v1");
        let snapshot = Snapshot { workloads: [(here.ips[0], here)].into(), ..Snapshot::default() };
        assert_eq!(wanted(&snapshot, "a").keys().collect::<Vec<_>>(), [&name]);
        assert!(wanted(&snapshot, "b").is_empty());
        let mut kept = Wanted::default();
        assert_eq!(kept.of(&snapshot, "a").len(), 1);
        assert_eq!(kept.of(&Snapshot::default(), "a").len(), 0);
    }
}
