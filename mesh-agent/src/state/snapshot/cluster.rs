//! Clusters: where traffic goes in the end, and what is remembered of it from snapshot to snapshot.
//!
//! What changes per request lives behind the `Arc`s of [`EndpointState`] and [`ClusterState`]. Tested through
//! `compile/` and `balance/`.

use std::{
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, AtomicU64},
    },
    time::Duration,
};

use tokio::time::Instant;

use super::{
    Checked, ClusterId, ConnectionPool, ConsistentHash, Health, HttpTunnel, Latency, Locality, Origination,
    OutlierDetection, Protocol, Recent, Reported, RetryBudget, Scale, Spread, Use, Workload,
};

/// The endpoints of one (service, port, subset) and how to choose among them. A clone shares the state.
#[derive(Debug, Clone)]
pub struct Cluster {
    /// Istio's form: `outbound|9080|v2|reviews.default.svc.cluster.local`.
    pub name: Arc<str>,
    /// Host name of the service.
    pub host: Arc<str>,
    /// `metadata.name` of the service.
    pub service: Arc<str>,
    /// Namespace of the service.
    pub namespace: Arc<str>,
    /// Port of the service.
    pub port: u16,
    /// What the service port declares, if anything.
    pub protocol: Option<Protocol>,
    /// Of a headless service: who dials an endpoint of it has chosen that.
    pub headless: bool,
    /// Subset, if one.
    pub subset: Option<Arc<str>>,
    /// Namespace of the clients it is made for, where rules of their own hold for them; `None` is everybody else.
    pub view: Option<Arc<str>>,
    /// Ready endpoints, in the order of their addresses.
    pub endpoints: Vec<Arc<Endpoint>>,
    /// In which order of preference and in which shares they are chosen.
    pub spread: Arc<Spread>,
    /// How to choose.
    pub balancing: Balancing,
    /// Chooses instead, by what a request brings along (`loadBalancer.consistentHash`).
    pub hash: Option<ConsistentHash>,
    /// When an endpoint gets nothing for a while (`outlierDetection`).
    pub outlier: Option<OutlierDetection>,
    /// `connectionPool.tcp.connectTimeout`, 10 s by default.
    pub connect_timeout: Duration,
    /// The rest of `connectionPool`.
    pub pool: ConnectionPool,
    /// `tls`.
    pub tls: Origination,
    /// Whether a rule sets what only the agent can keep: its connections are never direct.
    pub limits_connections: bool,
    /// How many tries may be retries at a time.
    pub retry_budget: RetryBudget,
    /// `proxyProtocol`: how apps are told of the client.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// `tunnel`: where its endpoints lead on to, for what is not HTTP.
    pub tunnel: Option<Arc<HttpTunnel>>,
    /// What a `ServicePolicy` has for the case that endpoints fail.
    pub standby: Standby,
    /// Carried over from the snapshot before.
    pub state: Arc<ClusterState>,
}

/// What a `ServicePolicy` has for the case that endpoints fail.
#[derive(Debug, Clone, Default)]
pub struct Standby {
    /// The endpoints are checked, for as long as this says that they are used.
    pub checks: Option<Arc<Use>>,
    /// Who serves, the first that can, where no endpoint may be chosen. They have no fallbacks themselves: so there are no
    /// loops.
    pub fallbacks: Vec<Arc<Cluster>>,
}

/// What a cluster remembers between snapshots.
#[derive(Debug, Default)]
pub struct ClusterState {
    /// What tells it from others.
    pub id: ClusterId,
    /// Position of round robin.
    pub next: AtomicU64,
    /// How busy endpoints are by their own word, all together, where a rule asks for that.
    pub scale: OnceLock<Box<Scale>>,
    /// Requests under way from this agent, retries among them.
    pub active: AtomicU32,
    /// Those of them that are retries.
    pub retrying: AtomicU32,
    /// What was begun lately, where its budget is one of an interval.
    pub recent: OnceLock<Box<Recent>>,
    /// Copies of requests under way to it as a mirror.
    pub mirroring: AtomicU32,
    /// Endpoints that are ejected.
    pub ejected: AtomicU32,
    /// Endpoints that get nothing, ejected or found unhealthy.
    pub away: AtomicU32,
}

/// How apps are told of the client at the start of a connection: the version of the PROXY protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProxyProtocol {
    /// A line of text.
    V1,
    /// Binary.
    V2,
}

/// How endpoints are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Balancing {
    /// Two at random, the one with fewer requests in flight (Istio's default).
    #[default]
    LeastRequest,
    /// Two at random, the one that is likely to answer sooner (Linkerd's default; here by annotation).
    PeakEwma,
    /// One after the other.
    RoundRobin,
    /// At random.
    Random,
    /// None is chosen: the address is the one that the client has dialled.
    Passthrough,
}

/// One address behind a service port.
#[derive(Debug)]
pub struct Endpoint {
    /// Where the app listens.
    pub address: SocketAddr,
    /// Its pod, when it is one that owns its address.
    pub workload: Option<Arc<Workload>>,
    /// Where it is, as far as that is known.
    pub locality: Locality,
    /// Its share, among those of the others; at least 1.
    pub weight: u32,
    /// What is known by its checks, where it is checked.
    pub checked: Option<Arc<Checked>>,
    /// Carried over from the snapshot before.
    pub state: Arc<EndpointState>,
}

/// What an endpoint remembers between snapshots.
#[derive(Debug)]
pub struct EndpointState {
    /// Requests or connections in flight from this agent.
    pub in_flight: AtomicU32,
    /// How it did lately.
    pub health: Health,
    /// How long it takes to answer.
    pub latency: Latency,
    /// How busy it says it is, where a rule asks for that.
    pub reported: Reported,
    /// When it came.
    pub came: Instant,
}

impl Default for EndpointState {
    /// Of an endpoint that comes now.
    fn default() -> Self {
        Self {
            in_flight: AtomicU32::new(0),
            health: Health::default(),
            latency: Latency::default(),
            reported: Reported::default(),
            came: Instant::now(),
        }
    }
}

impl Cluster {
    /// What an endpoint's share is proportional to by its own word, where a rule asks for that (`backendUtilization`): requests a
    /// second for each whole of itself that it uses.
    pub fn reported_weight(&self, endpoint: &Endpoint, now: Instant) -> Option<f64> {
        endpoint.state.reported.weight(self.spread.utilization.as_ref()?, now)
    }
}

impl Endpoint {
    /// An address that is the only one there is, wherever it may be.
    pub fn alone(address: SocketAddr, workload: Option<Arc<Workload>>) -> Self {
        let (locality, state) = (Locality::default(), Arc::default());
        Self { address, workload, locality, weight: 1, checked: None, state }
    }
}
