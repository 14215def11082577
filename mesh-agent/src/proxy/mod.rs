//! The story of a connection: [`outbound`] from a pod's app to an endpoint, [`inbound`] from a peer to a pod's app.
//!
//! Both read top to bottom; every step is a room: capture → identify → detect → route → policy → balance → lease →
//! tunnel → move → report. Never takes a lock on the path; holds one snapshot per connection or request. Tested in
//! the lab with real eBPF.

mod asked;
pub mod checks;
mod choose;
mod copied;
mod cut;
mod downstream;
mod errand;
mod exchange;
mod external;
pub mod gateway;
mod guards;
mod headers;
pub mod health;
mod http;
pub mod inbound;
mod inspected;
mod lasting;
mod mirror;
pub mod outbound;
mod parked;
mod permits;
mod resolve;
mod silence;
mod tries;
mod unsent;
mod upgrade;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use tokio::{sync::OwnedSemaphorePermit, time::Instant};

use crate::{
    balance,
    capture::{Acceptor, Captured, Endpoints, Listener, Refused},
    config::{HttpLimits, PathNormalization},
    drain::Drain,
    error::{Error, Kind},
    overload::Overload,
    report::{FlowFacts, Peer, Reporter, RequestProtocol, Security, Side},
    state::snapshot::{Cluster, Endpoint, Snapshot, Workload},
    upstream::{LocalPods, Pod, Via},
    workers::{Seat, Workers},
};

/// Pause until a listener that could not be watched is looked at again.
const AGAIN: Duration = Duration::from_secs(1);

/// What every connection of the agent shares.
#[derive(Debug)]
pub struct Mesh {
    /// Name of this node, as in `spec.nodeName`.
    pub node: Arc<str>,
    /// The configuration in force.
    pub snapshot: ArcSwap<Snapshot>,
    /// The enrolled pods of this node.
    pub pods: LocalPods,
    /// Metrics, access log, facts of flows.
    pub reporter: Arc<Reporter>,
    /// What apps may ask for over HTTP.
    pub limits: HttpLimits,
    /// What becomes of a path before policy is asked about it, where the mesh-wide settings do not say.
    pub path_normalization: PathNormalization,
    /// Whether apps of this node may speak without the agent at all.
    pub direct: bool,
    /// What the kernel chooses from, where it chooses.
    pub endpoints: Arc<Endpoints>,
    /// Whether new work is refused for want of memory.
    pub overload: Arc<Overload>,
    /// How long a carrier connection stands before it is made anew.
    pub carrier_interval: Duration,
    /// The threads that carry connections.
    pub workers: Workers,
}

impl Mesh {
    /// The configuration in force now.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// What becomes of a path before routes and policies are asked about it.
    fn path_form(&self) -> PathNormalization {
        self.snapshot.load().path_normalization.unwrap_or(self.path_normalization)
    }
}

/// A place for one more connection of the pod; without one it is refused and counted.
fn admit(mesh: &Mesh, pod: &Pod, side: Side, ends: Ends) -> Option<OwnedSemaphorePermit> {
    if let Err(error) = mesh.overload.admit(|| pod.held()) {
        mesh.reporter.refused(side, &pod.workload(), ends.client, Some(ends.original_dst), &error);
        return None;
    }
    let place = pod.admit();
    if place.is_none() {
        let text = format!("the pod has {} connections open already", pod.most_connections());
        let (dialled, error) = (Some(ends.original_dst), Error::new(Kind::Overflow, text));
        mesh.reporter.refused(side, &pod.workload(), ends.client, dialled, &error);
    }
    place
}

/// The next connection of the pod that the agent serves; what it does not serve is counted. `None`: the listener is
/// gone.
async fn next(mesh: &Mesh, pod: &Pod, acceptor: &Acceptor, side: Side) -> Option<Captured> {
    loop {
        match acceptor.next().await.ok()? {
            Ok(captured) => return Some(captured),
            Err(Refused { client, error }) => {
                mesh.reporter.refused(side, &pod.workload(), client, None, &error);
            }
        }
    }
}

/// The pod itself as one end of the traffic: its identity is the kernel's word, not the wire's.
fn vouched(workload: &Arc<Workload>) -> Peer {
    Peer { workload: Some(Arc::clone(workload)), identity: Some(workload.identity.clone()) }
}

/// Who serves what is for this cluster now: itself, or a fallback. A use by a pod is noted where its endpoints are checked.
fn serving<'c>(mesh: &Mesh, cluster: &'c Arc<Cluster>, by: impl Fn() -> Arc<Workload>) -> &'c Arc<Cluster> {
    let note = |cluster: &Cluster| {
        if let Some(usage) = &cluster.standby.checks {
            usage.note(Instant::now(), &by);
        }
    };
    note(cluster);
    let serving = balance::serving(cluster);
    if !Arc::ptr_eq(serving, cluster) {
        note(serving);
        mesh.reporter.fell_back(cluster, serving);
    }
    serving
}

/// `namespace/name`, for people.
fn pod_name(workload: &Workload) -> Arc<str> {
    format!("{}/{}", workload.namespace, workload.name).into()
}

/// What takes the connections of one of the pod's listeners; `None`: it is gone. Where the process has no room to watch it,
/// that is told, and tried again.
async fn acceptor(pod: &Pod, listener: Listener) -> Option<Acceptor> {
    loop {
        match pod.net().acceptor(listener) {
            Ok(acceptor) => return Some(acceptor),
            Err(_) if pod.net().has_left() => return None,
            Err(error) => {
                let pod = pod_name(&pod.workload());
                tracing::error!(%pod, ?listener, %error, "the pod's connections are not taken, trying again");
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

/// What a flow is known to lead to.
fn learn_end(facts: &mut FlowFacts, endpoint: &Endpoint, via: &Via, protocol: RequestProtocol) {
    let peer = endpoint.workload.as_deref();
    facts.endpoint = Some(endpoint.address);
    facts.peer_pod = peer.map(pod_name);
    facts.peer = peer.filter(|peer| peer.enrolled).map(|peer| peer.identity.clone());
    facts.mutual_tls = via.security() == Security::MutualTls;
    facts.protocol = Some(protocol);
}

/// Has a connection carried by one of the threads, as one of those that `drain` ends, and hands it its place there.
fn spawn<F>(mesh: &Mesh, drain: &Drain, connection: impl FnOnce(Option<Seat>) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let seat = mesh.workers.seat();
    match seat.as_ref().map(|seat| seat.runtime().clone()) {
        Some(runtime) => drain.spawn_on(connection(seat), &runtime),
        None => drain.spawn(connection(seat)),
    }
}

/// Whether what a future promises fits: the accept loops hold one of these per connection.
fn assert_small<F: Future>(connection: F, limit: usize) -> F {
    debug_assert!(
        size_of::<F>() <= limit,
        "a connection's future takes {} bytes, limit {limit}",
        size_of::<F>()
    );
    connection
}

impl From<&Captured> for Ends {
    fn from(captured: &Captured) -> Self {
        let Captured { client, original_dst, endpoint, .. } = *captured;
        Self { client, original_dst, endpoint }
    }
}

/// One captured connection's two ends, as the proxy speaks of them.
#[derive(Debug, Clone, Copy)]
struct Ends {
    /// Who opened the connection.
    client: SocketAddr,
    /// What it dialled.
    original_dst: SocketAddr,
    /// Number of the endpoint that the kernel has chosen for it, 0 for none.
    endpoint: u32,
}
