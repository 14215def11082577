//! Clusters: where traffic goes in the end, and what is remembered of it from snapshot to snapshot.
//!
//! What changes per request lives behind the `Arc`s of [`EndpointState`] and [`ClusterState`]. Tested through
//! `compile/` and `balance/`.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64},
    },
    time::Duration,
};

use super::{ConsistentHash, Health, OutlierDetection, Protocol, RetryBudget, Workload};

/// The endpoints of one (service, port, subset) and how to choose among them.
#[derive(Debug)]
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
    /// Subset, if one.
    pub subset: Option<Arc<str>>,
    /// Namespace of the clients it is made for, where rules of their own hold for them; `None` is everybody else.
    pub view: Option<Arc<str>>,
    /// Ready endpoints.
    pub endpoints: Vec<Arc<Endpoint>>,
    /// How to choose.
    pub balancing: Balancing,
    /// Chooses instead, by what a request brings along (`loadBalancer.consistentHash`).
    pub hash: Option<ConsistentHash>,
    /// When an endpoint gets nothing for a while (`outlierDetection`).
    pub outlier: Option<OutlierDetection>,
    /// `connectionPool.tcp.connectTimeout`, 10 s by default.
    pub connect_timeout: Duration,
    /// Whether a rule sets what only the agent can keep: its connections are never direct.
    pub limits_connections: bool,
    /// How many tries may be retries at a time.
    pub retry_budget: RetryBudget,
    /// Carried over from the snapshot before.
    pub state: Arc<ClusterState>,
}

/// What a cluster remembers between snapshots.
#[derive(Debug, Default)]
pub struct ClusterState {
    /// Position of round robin.
    pub next: AtomicU64,
    /// Requests under way from this agent, retries among them.
    pub active: AtomicU32,
    /// Those of them that are retries.
    pub retrying: AtomicU32,
    /// Copies of requests under way to it as a mirror.
    pub mirroring: AtomicU32,
    /// Endpoints that are ejected.
    pub ejected: AtomicU32,
}

/// How endpoints are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Balancing {
    /// Two at random, the one with fewer requests in flight (Istio's default).
    #[default]
    LeastRequest,
    /// One after the other.
    RoundRobin,
    /// At random.
    Random,
}

/// One address behind a service port.
#[derive(Debug)]
pub struct Endpoint {
    /// Where the app listens.
    pub address: SocketAddr,
    /// Its pod, when it is one that owns its address.
    pub workload: Option<Arc<Workload>>,
    /// Carried over from the snapshot before.
    pub state: Arc<EndpointState>,
}

/// What an endpoint remembers between snapshots.
#[derive(Debug, Default)]
pub struct EndpointState {
    /// Requests or connections in flight from this agent.
    pub in_flight: AtomicU32,
    /// How it did lately.
    pub health: Health,
}
