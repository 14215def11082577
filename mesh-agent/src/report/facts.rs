//! What the agent knows of captured connections and the kernel does not, kept for the join with flow records.
//!
//! Promises bounded memory: [`LIMIT`] connections per pod and side, and [`KEPT`] after a connection ends. A
//! connection takes two short locks when it begins and ends; a request only the lock of its own entry. Never fails:
//! a pod above its limit has flows without facts. Tested below with a paused clock.

use std::{
    collections::{HashMap, VecDeque, hash_map},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{FlowFacts, RequestProtocol, Side};
use crate::{identity::SpiffeId, state::snapshot::Workload};

/// How long facts outlive their connection: a closed flow's record is readable for 30 s, and its reader may be late.
pub const KEPT: Duration = Duration::from_mins(1);

/// Connections remembered per pod and side, open ones included; as many as a pod has flow records.
const LIMIT: usize = 32_768;

/// Which connection of a pod, by the ends that the app's own socket shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FlowKey {
    /// The app dialled: from where, and what. (One port may dial many.)
    Outbound(SocketAddr, SocketAddr),
    /// The app was dialled from here.
    Inbound(SocketAddr),
}

impl FlowKey {
    /// Whose side of the traffic the connection is on.
    pub const fn side(self) -> Side {
        match self {
            Self::Outbound(..) => Side::Source,
            Self::Inbound(_) => Side::Destination,
        }
    }

    fn canonical(self) -> Self {
        match self {
            Self::Outbound(client, dialled) => Self::Outbound(canonical(client), canonical(dialled)),
            Self::Inbound(client) => Self::Inbound(canonical(client)),
        }
    }
}

/// The facts of all captured connections.
#[derive(Debug, Default)]
pub(super) struct FactsTable {
    pods: RwLock<HashMap<PodSide, Arc<PodFacts>>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct PodSide {
    namespace: Arc<str>,
    name: Arc<str>,
    side: Side,
}

#[derive(Debug, Default)]
struct PodFacts(Mutex<Connections>);

#[derive(Debug, Default)]
struct Connections {
    /// The latest connection of each key.
    by_key: HashMap<FlowKey, Arc<Entry>>,
    /// Ended connections, oldest first.
    ended: VecDeque<(Instant, FlowKey, Arc<Entry>)>,
}

/// One connection.
#[derive(Debug, Default)]
struct Entry(Mutex<FlowFacts>);

/// The facts of a connection, as one process tells them to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownFlow {
    namespace: String,
    name: String,
    key: FlowKey,
    service: Option<String>,
    endpoint: Option<SocketAddr>,
    peer_pod: Option<String>,
    /// Trust domain, namespace and service account.
    peer: Option<[String; 3]>,
    route: Option<String>,
    protocol: Option<RequestProtocol>,
    mutual_tls: bool,
}

impl KnownFlow {
    fn new(pod: &PodSide, key: FlowKey, facts: &FlowFacts) -> Self {
        let text = |name: &Option<Arc<str>>| name.as_deref().map(str::to_owned);
        let parts = |id: &SpiffeId| {
            [&id.trust_domain, &id.namespace, &id.service_account].map(|part| part.as_ref().to_owned())
        };
        Self {
            namespace: pod.namespace.as_ref().to_owned(),
            name: pod.name.as_ref().to_owned(),
            key,
            service: text(&facts.service),
            endpoint: facts.endpoint,
            peer_pod: text(&facts.peer_pod),
            peer: facts.peer.as_ref().map(parts),
            route: text(&facts.route),
            protocol: facts.protocol,
            mutual_tls: facts.mutual_tls,
        }
    }

    /// The response flag is left out: it is of a request that is over.
    fn facts(&self) -> FlowFacts {
        let text = |name: &Option<String>| name.as_deref().map(Arc::from);
        let peer = self.peer.as_ref().map(|[trust_domain, namespace, service_account]| SpiffeId {
            trust_domain: trust_domain.as_str().into(),
            namespace: namespace.as_str().into(),
            service_account: service_account.as_str().into(),
        });
        FlowFacts {
            service: text(&self.service),
            endpoint: self.endpoint,
            peer_pod: text(&self.peer_pod),
            peer,
            route: text(&self.route),
            protocol: self.protocol,
            flag: None,
            mutual_tls: self.mutual_tls,
        }
    }
}

/// Facts are plain data, whole after every change: a panic elsewhere does not make them wrong.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The facts of one captured connection, kept until some time after the flow ends.
#[derive(Debug)]
pub struct FlowGuard {
    pod: Arc<PodFacts>,
    key: FlowKey,
    entry: Arc<Entry>,
}

impl FlowGuard {
    /// Updates the facts.
    pub fn learn(&self, change: impl FnOnce(&mut FlowFacts)) {
        change(&mut lock(&self.entry.0));
    }
}

impl Drop for FlowGuard {
    fn drop(&mut self) {
        let mut connections = lock(&self.pod.0);
        connections.forget_old(Instant::now());
        connections.ended.push_back((Instant::now(), self.key, self.entry.clone()));
    }
}

impl Connections {
    fn forget_old(&mut self, now: Instant) {
        while self.ended.front().is_some_and(|(at, ..)| now.duration_since(*at) >= KEPT) {
            self.forget_oldest();
        }
    }

    /// Forgets the connection that ended first. Whether there was one.
    fn forget_oldest(&mut self) -> bool {
        let Some((_, key, entry)) = self.ended.pop_front() else { return false };
        // It may have been used again since.
        if let hash_map::Entry::Occupied(slot) = self.by_key.entry(key)
            && Arc::ptr_eq(slot.get(), &entry)
        {
            slot.remove();
        }
        true
    }

    /// Makes room for one more. Whether there is.
    fn make_room(&mut self) -> bool {
        // Connections that ended and whose key was used again count too: they are memory.
        while self.by_key.len().max(self.ended.len()) >= LIMIT {
            if !self.forget_oldest() {
                return false;
            }
        }
        true
    }
}

impl FactsTable {
    /// Registers a connection, as the latest of this key.
    pub fn begin(&self, pod: &Workload, key: FlowKey) -> FlowGuard {
        let (namespace, name) = (pod.namespace.clone(), pod.name.clone());
        self.register(PodSide { namespace, name, side: key.side() }, key.canonical())
    }

    fn register(&self, pod: PodSide, key: FlowKey) -> FlowGuard {
        let pod = self.pod(pod);
        let entry = Arc::new(Entry::default());
        let mut connections = lock(&pod.0);
        connections.forget_old(Instant::now());
        if connections.make_room() {
            connections.by_key.insert(key, entry.clone());
        }
        drop(connections);
        FlowGuard { pod, key, entry }
    }

    fn pod(&self, key: PodSide) -> Arc<PodFacts> {
        if let Some(pod) = self.pods.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return pod.clone();
        }
        let mut pods = self.pods.write().unwrap_or_else(PoisonError::into_inner);
        // A pod is new rarely enough to look after those that are gone.
        let now = Instant::now();
        pods.retain(|_, pod| {
            let mut connections = lock(&pod.0);
            connections.forget_old(now);
            !connections.by_key.is_empty() || Arc::strong_count(pod) > 1
        });
        pods.entry(key).or_default().clone()
    }

    /// The facts of all connections that are open, for another process.
    pub fn known(&self) -> Vec<KnownFlow> {
        let pods = self.pods.read().unwrap_or_else(PoisonError::into_inner);
        let mut known = Vec::new();
        for (pod, connections) in pods.iter() {
            let connections = lock(&connections.0);
            for (key, entry) in &connections.by_key {
                // An ended one is held by the queue as well; its flow may still be reported.
                known.push(KnownFlow::new(pod, *key, &lock(&entry.0)));
            }
        }
        known
    }

    /// Registers a connection that another process holds.
    pub fn adopt(&self, known: &KnownFlow) -> FlowGuard {
        let side = known.key.side();
        let pod = PodSide { namespace: (*known.namespace).into(), name: (*known.name).into(), side };
        let guard = self.register(pod, known.key);
        guard.learn(|facts| *facts = known.facts());
        guard
    }

    /// The facts of the latest connection of this key.
    pub fn find(&self, namespace: &Arc<str>, name: &Arc<str>, key: FlowKey) -> Option<FlowFacts> {
        let pod = PodSide { namespace: namespace.clone(), name: name.clone(), side: key.side() };
        let pod = self.pods.read().unwrap_or_else(PoisonError::into_inner).get(&pod)?.clone();
        let mut connections = lock(&pod.0);
        connections.forget_old(Instant::now());
        let entry = connections.by_key.get(&key.canonical())?.clone();
        drop(connections);
        Some(lock(&entry.0).clone())
    }
}

/// One form per address: IPv4 never v4-mapped.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use super::{super::samples, *};

    fn client(port: u16) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, 1], port))
    }

    const DIALLED: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 80);

    fn from(client: SocketAddr) -> FlowKey {
        FlowKey::Outbound(client, DIALLED)
    }

    fn route(table: &FactsTable, pod: &Workload, client: SocketAddr) -> Option<String> {
        let facts = table.find(&pod.namespace, &pod.name, from(client))?;
        Some(facts.route.map_or_else(String::new, |r| r.to_string()))
    }

    #[tokio::test(start_paused = true)]
    async fn facts_outlive_their_connection_for_a_while() {
        let (table, pod) = (FactsTable::default(), samples::workload("productpage", 1));
        let guard = table.begin(&pod, from(client(1)));
        guard.learn(|facts| facts.route = Some("a".into()));
        tokio::time::advance(KEPT * 2).await;
        assert_eq!(route(&table, &pod, client(1)).as_deref(), Some("a"));
        assert!(table.find(&pod.namespace, &pod.name, FlowKey::Inbound(client(1))).is_none());
        drop(guard);
        tokio::time::advance(KEPT / 2).await;
        assert!(route(&table, &pod, client(1)).is_some());
        tokio::time::advance(KEPT / 2 + Duration::from_millis(2)).await;
        assert!(route(&table, &pod, client(1)).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn the_latest_connection_of_an_address_wins_and_stays() {
        let (table, pod) = (FactsTable::default(), samples::workload("productpage", 1));
        let mapped = SocketAddr::new("::ffff:10.0.0.1".parse().unwrap_or(client(1).ip()), 1);
        drop(table.begin(&pod, from(mapped)));
        tokio::time::advance(KEPT / 2).await;
        let second = table.begin(&pod, from(client(1)));
        second.learn(|facts| facts.route = Some("second".into()));
        tokio::time::advance(KEPT).await;
        assert_eq!(route(&table, &pod, client(1)).as_deref(), Some("second"));
    }

    #[tokio::test(start_paused = true)]
    async fn one_port_that_dials_two_destinations_has_two_connections() {
        let (table, pod) = (FactsTable::default(), samples::workload("productpage", 1));
        let keys = [1, 2].map(|port| FlowKey::Outbound(client(9), SocketAddr::from(([10, 96, 0, 1], port))));
        let guards = keys.map(|key| table.begin(&pod, key));
        for (guard, name) in guards.iter().zip(["one", "two"]) {
            guard.learn(|facts| facts.route = Some(name.into()));
        }
        let routes = keys.map(|key| table.find(&pod.namespace, &pod.name, key).and_then(|facts| facts.route));
        assert_eq!(
            routes.map(|route| route.as_deref().map(str::to_owned)),
            [Some("one".to_owned()), Some("two".to_owned())]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn what_one_process_knows_another_finds() -> serde_json::Result<()> {
        let (here, there, pod) =
            (FactsTable::default(), FactsTable::default(), samples::workload("productpage", 1));
        let guard = here.begin(&pod, from(client(1)));
        guard.learn(|facts| {
            (facts.route, facts.protocol) = (Some("a".into()), Some(RequestProtocol::Grpc));
            facts.peer = Some(pod.identity.clone());
        });
        let told = serde_json::to_string(&here.known())?;
        let held: Vec<_> =
            serde_json::from_str::<Vec<KnownFlow>>(&told)?.iter().map(|flow| there.adopt(flow)).collect();
        let found = there.find(&pod.namespace, &pod.name, from(client(1))).unwrap_or_default();
        assert_eq!((found.route.as_deref(), found.protocol), (Some("a"), Some(RequestProtocol::Grpc)));
        assert_eq!(found.peer.as_ref(), Some(&pod.identity));
        drop(held);
        tokio::time::advance(KEPT * 2).await;
        assert!(route(&there, &pod, client(1)).is_none(), "kept for ever");
        Ok(())
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_has_a_limit_and_gone_pods_are_forgotten() {
        let (table, pod) = (FactsTable::default(), samples::workload("productpage", 1));
        let open: Vec<_> = (0..LIMIT)
            .map(|n| table.begin(&pod, from(SocketAddr::from(([10, 0, 1, (n >> 16) as u8], n as u16)))))
            .collect();
        let above = table.begin(&pod, from(client(7)));
        above.learn(|facts| facts.route = Some("lost".into()));
        assert!(route(&table, &pod, client(7)).is_none());
        drop((open, above));
        let again = table.begin(&pod, from(client(8)));
        assert!(route(&table, &pod, client(8)).is_some());
        drop(again);
        tokio::time::advance(KEPT * 2).await;
        let other = samples::workload("reviews", 2);
        drop(table.begin(&other, from(client(9))));
        assert_eq!(table.pods.read().unwrap_or_else(PoisonError::into_inner).len(), 1);
    }
}
