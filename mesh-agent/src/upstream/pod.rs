//! An enrolled pod of this node: its network, its identity, and the connections that are its own.

use std::{
    collections::HashMap,
    fmt,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use http::{Request, Response};
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, watch},
    time::Instant,
};

use super::{
    Destination, Lease, Pool, Transitions, bring_in_form,
    carrier::Carriers,
    usage::{Usage, Usages},
};
use crate::{
    body::{Allowance, Body, Inform},
    capture::PodNet,
    drain::Drain,
    error::Result,
    identity::WorkloadIdentity,
    state::snapshot::{Cluster, Workload},
    tunnel::{self, MeshConnection},
};

/// An enrolled pod of this node.
#[derive(Debug)]
pub struct Pod {
    net: Arc<PodNet>,
    workload: ArcSwap<Workload>,
    /// Told when what it asks of those who come has changed.
    policies: watch::Sender<()>,
    identity: Arc<WorkloadIdentity>,
    /// mTLS connections to other nodes' pods.
    pub(super) tunnels: tunnel::Pool,
    /// Connections to what is not in the mesh.
    pub(super) plain: Arc<Pool>,
    /// Connections to this pod's own apps.
    pub(super) apps: Arc<Pool>,
    /// Connections that show whether it may talk to other pods of this node.
    pub(super) carriers: Carriers,
    /// What it has in use of clusters that are limited.
    usages: Usages,
    /// Ends when the pod is un-enrolled, or with the agent.
    pub drain: Drain,
    /// Places for connections with the agent.
    places: Arc<Semaphore>,
    /// Requests and tunnelled streams under way.
    requests: Arc<AtomicU64>,
    /// What the bodies of its requests may keep.
    allowance: Arc<Allowance>,
    pub(super) limits: PodLimits,
    pub(super) transitions: Arc<Transitions>,
}

/// What is open costs the agent so much memory each, about, in a unit of its own: an idle connection, and a request with
/// its buffers, on top of the connection that it came on.
const CONNECTION: u64 = 1;
const REQUEST: u64 = 2;

/// A request or stream under way, counted as its pod's until this is dropped.
#[derive(Debug)]
pub struct Held(Arc<AtomicU64>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a pod may take of the agent, and how often the way to its neighbours is looked at.
#[derive(Debug, Clone, Copy)]
pub struct PodLimits {
    /// Most connections open with the agent.
    pub connections: usize,
    /// How long a carrier connection stands before it is made anew.
    pub carrier_interval: Duration,
}

impl Pod {
    /// A pod whose listeners are open and whose identity is certified.
    pub fn new(
        net: Arc<PodNet>,
        identity: Arc<WorkloadIdentity>,
        drain: Drain,
        limits: PodLimits,
        transitions: Arc<Transitions>,
    ) -> Self {
        Self {
            workload: ArcSwap::new(Arc::clone(&net.workload)),
            policies: watch::Sender::new(()),
            net,
            identity,
            tunnels: tunnel::Pool::default(),
            plain: Arc::default(),
            apps: Arc::default(),
            carriers: Carriers::default(),
            usages: Usages::default(),
            drain,
            places: Arc::new(Semaphore::new(limits.connections)),
            requests: Arc::default(),
            allowance: Arc::default(),
            limits,
            transitions,
        }
    }

    /// How many connections it may have open with the agent.
    pub const fn most_connections(&self) -> usize {
        self.limits.connections
    }

    /// A place for one more connection, held until it has ended; `None` when all are taken.
    pub fn admit(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.places).try_acquire_owned().ok()
    }

    /// One more request or stream is under way.
    pub fn hold(&self) -> Held {
        self.requests.fetch_add(1, Ordering::Relaxed);
        Held(Arc::clone(&self.requests))
    }

    /// How much of the agent's memory its connections and requests take, in a unit in which pods can be compared.
    pub fn held(&self) -> u64 {
        let connections = self.limits.connections.saturating_sub(self.places.available_permits()) as u64;
        connections * CONNECTION + self.requests.load(Ordering::Relaxed) * REQUEST
    }

    /// What it has in use of this cluster; `None` where nothing of it is limited.
    pub fn usage(&self, cluster: &Cluster) -> Option<Arc<Usage>> {
        self.usages.of(&cluster.pool, &cluster.state)
    }

    /// What the bodies of its requests may keep for other tries.
    pub fn allowance(&self) -> &Arc<Allowance> {
        &self.allowance
    }

    /// Closes connections to apps and to what is not in the mesh that nobody uses now.
    pub fn close_idle(&self) {
        self.apps.close_idle();
        self.plain.close_idle();
    }

    /// Its network namespace.
    pub fn net(&self) -> &Arc<PodNet> {
        &self.net
    }

    /// Its signing handle.
    pub fn identity(&self) -> &WorkloadIdentity {
        &self.identity
    }

    /// The address it has in the network of a destination.
    pub(super) fn address_towards(&self, destination: IpAddr) -> IpAddr {
        let ips = &self.net.workload.ips;
        let same = ips.iter().find(|ip| ip.is_ipv4() == destination.is_ipv4());
        // A pod without an address of that family cannot connect; what stands here then is never used.
        same.or(ips.first()).copied().unwrap_or(destination)
    }

    /// The client of one of its connections as the other end may be shown it. A process in the pod can bind its socket
    /// to any address it gives to its loopback interface, and to 127.0.0.1: what others trust must not be shown.
    pub fn vouched_address(&self, client: SocketAddr) -> SocketAddr {
        if self.net.workload.ips.contains(&client.ip()) {
            return client;
        }
        SocketAddr::new(self.address_towards(client.ip()), client.port())
    }

    /// What the configuration says of it now.
    pub fn workload(&self) -> Arc<Workload> {
        self.workload.load_full()
    }

    /// Takes over what the configuration says of it now (labels may change while it runs). Changes that are made at once
    /// by several are all made: `change` may be called again.
    pub fn update(&self, change: impl Fn(&Workload) -> Workload) {
        let before = self.workload.rcu(|held| change(held));
        let now = self.workload.load();
        if before.authorization != now.authorization || before.authentication != now.authentication {
            self.policies.send_replace(());
        }
    }

    /// Has whatever is open at it asked again: somebody is not believed any more.
    pub fn ask_again(&self) {
        self.policies.send_replace(());
    }

    /// Told whenever what it asks of those who come has changed, from now on.
    pub fn policy_changes(&self) -> watch::Receiver<()> {
        self.policies.subscribe()
    }

    /// An HTTP request through a peer that only speaks HBONE: HTTP inside a CONNECT stream, one stream a request.
    pub(super) async fn send_over_tunnel(
        &self,
        connection: &MeshConnection,
        to: &Destination<'_>,
        mut request: Box<Request<Body>>,
        client: SocketAddr,
        inform: &Arc<dyn Inform>,
    ) -> Result<(Response<Body>, Lease)> {
        let mut stream = connection.open_tunnel(to.address, client).await?;
        super::introduce(&mut stream, to).await?;
        bring_in_form(&mut request, to.protocol);
        super::pool::send_on_new(stream, to.address, to.protocol, *request, inform).await
    }
}

/// Namespace and name of a pod.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodName {
    /// `metadata.namespace`
    pub namespace: Arc<str>,
    /// `metadata.name`
    pub name: Arc<str>,
}

impl fmt::Display for PodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl From<&Workload> for PodName {
    fn from(workload: &Workload) -> Self {
        Self { namespace: Arc::clone(&workload.namespace), name: Arc::clone(&workload.name) }
    }
}

/// The enrolled pods of this node by name, swapped as a whole when one comes or goes: reading takes no lock.
#[derive(Debug, Default)]
pub struct LocalPods {
    by_name: ArcSwap<HashMap<PodName, Arc<Pod>>>,
    /// Held by whoever changes the map, so that no change is lost.
    changing: Mutex<()>,
    /// Told after every change.
    changed: Notify,
    transitions: Arc<Transitions>,
}

impl LocalPods {
    /// The enrolled pod, if this node holds it.
    pub fn get(&self, workload: &Workload) -> Option<Arc<Pod>> {
        self.by_name.load().get(&PodName::from(workload)).cloned()
    }

    /// All of them.
    pub fn all(&self) -> Arc<HashMap<PodName, Arc<Pod>>> {
        self.by_name.load_full()
    }

    /// As [`LocalPods::get`]; one that joins the mesh just now is waited for, up to `limit`.
    pub async fn get_or_wait(&self, workload: &Workload, limit: Duration) -> Option<Arc<Pod>> {
        if let Some(pod) = self.get(workload) {
            return Some(pod);
        }
        let until = self.transitions.joining_until(workload)?.min(Instant::now() + limit);
        let arrived = async {
            loop {
                let changed = self.changed.notified();
                if let Some(pod) = self.get(workload) {
                    return pod;
                }
                changed.await;
            }
        };
        tokio::time::timeout_at(until, arrived).await.ok()
    }

    /// Which pods of any node have joined or left just now.
    pub const fn transitions(&self) -> &Arc<Transitions> {
        &self.transitions
    }

    /// Adds or replaces one.
    pub fn insert(&self, name: PodName, pod: Arc<Pod>) {
        self.change(|pods| drop(pods.insert(name, pod)));
    }

    /// Takes one away.
    pub fn remove(&self, name: &PodName) {
        self.change(|pods| drop(pods.remove(name)));
    }

    fn change(&self, change: impl FnOnce(&mut HashMap<PodName, Arc<Pod>>)) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut pods = HashMap::clone(&self.by_name.load());
        change(&mut pods);
        self.by_name.store(Arc::new(pods));
        self.changed.notify_waiters();
    }
}
