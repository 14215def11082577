//! The compiled, immutable picture of the mesh that the path reads: one `Arc` held for a connection or a
//! request, never a lock. Built by `compile` only.
//!
//! What changes per request (in-flight counts, round-robin position, latency) lives behind the `Arc`s of
//! [`EndpointState`] and [`ClusterState`], which are carried over from the previous snapshot. Tested through
//! `compile/`.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
};

use crate::identity::SpiffeId;

mod authentication;
mod authorization;
mod by_client;
mod capture;
mod client_tls;
mod cluster;
mod connection_pool;
mod external;
mod gateway;
mod guard;
mod hash;
mod health_check;
mod http;
mod http_tunnel;
mod key_set;
mod latency;
mod locality;
mod mesh;
mod outlier;
mod probes;
mod request_authentication;
mod retry;
mod shared_map;
mod spread;
mod stream;
mod utilization;
mod weights;
mod zones;

pub use self::authentication::{Authentication, Mtls, MtlsMode};
pub use self::authorization::{
    Action, Applied, Authorization, Clause, Listed, PathMatch, Policy, Rule, ServiceAccount, TemplatePart,
    TextMatch,
};
pub use self::by_client::{ByClient, Layout, Traits, Wanted, rank};
pub use self::capture::{CapturePolicy, Exclusions, PortRange, WhenAgentIsDown};
pub use self::client_tls::{ClientCertificate, ClientTls, Origination, TlsTerms};
pub use self::cluster::{Balancing, Cluster, ClusterState, Endpoint, EndpointState, ProxyProtocol, Standby};
pub use self::connection_pool::{ClusterId, ConnectionPool, Idle, Pings, TcpKeepalive};
pub use self::external::{BodyInCheck, CheckProtocol, HttpCheck, Provider};
pub use self::gateway::{
    ByHost, Gateway, GatewayPort, Served, ServerTls, ServerTlsMode, ServerTlsRead, ServerTlsTerms, TlsAction,
    TlsServer, TlsServers, TlsVersion, VirtualHost, VirtualHosts,
};
pub use self::guard::{
    Bucket, Buckets, Concurrency, ConcurrencyRule, ConcurrencyState, Guard, RateLimit, RateRule,
};
pub use self::hash::{ConsistentHash, HashCookie, HashKey, HashTable, Placed, hash_of};
pub use self::health_check::{Checked, CheckedPort, HealthCheck, HealthProbe, Run, Use};
pub use self::http::{
    Abort, Backend, BothHeaderOps, CorsPolicy, Fault, HeaderMatch, HeaderOp, HeaderOps, HttpRoute, Mirror,
    PathRewrite, Percentage, Redirect, RedirectPort, RequestMatch, Rewrite, RouteAction, StringMatch,
    UnmatchedPreflights, WeightedBackend,
};
pub use self::http_tunnel::{Ask, HttpTunnel};
pub use self::key_set::{KeySet, Keys, RemoteKeys};
pub use self::latency::Latency;
pub use self::locality::Locality;
pub use self::mesh::PathNormalization;
pub use self::outlier::{Health, OutlierDetection, Statuses};
pub use self::probes::{ProbePort, ProbeRequest};
pub use self::request_authentication::{AppliedTokens, ClaimPath, Location, TokenRule, Tokens};
pub use self::retry::{Recent, RetryBudget, RetryOn, RetryPolicy};
pub use self::shared_map::{Changed, SharedMap};
pub use self::spread::{Group, Level, MOST_LEVELS, Spread, Warmup};
pub use self::stream::{SniHost, StreamMatch, StreamRoute, Subnet};
pub use self::utilization::{Metric, Reported, Scale, UtilizationRule};
pub use self::weights::Weights;
pub use self::zones::{Origin, ZoneRule, Zones};

/// Everything the path needs to know, at one revision of the configuration.
/// A copy shares all of it.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// Grows by one with each compiled change; 0 is the empty snapshot before the first load.
    pub revision: u64,
    /// Pods by each of their addresses. Pods of the host network are not in here: their address is not theirs
    /// alone.
    pub workloads: SharedMap<IpAddr, Arc<Workload>>,
    /// For who certifies the agents of a cluster: pods that have a node and no address yet, by namespace and name.
    pub starting: SharedMap<(Arc<str>, Arc<str>), Arc<Starting>>,
    /// Services by fully qualified host name, for example `reviews.default.svc.cluster.local`.
    pub services: SharedMap<Arc<str>, Arc<Service>>,
    /// Services by each of their cluster addresses.
    pub vips: SharedMap<IpAddr, Arc<Service>>,
    /// The service that an app's address belongs to, for what the destination reports; the first by host name where
    /// several share an endpoint.
    pub inbound: SharedMap<SocketAddr, Arc<Cluster>>,
    /// Host names of headless services by the addresses of their endpoints, which clients dial themselves; the first where
    /// several share one.
    pub headless: SharedMap<SocketAddr, Arc<str>>,
    /// What requests to a pod's port are held to, where a `ServicePolicy` says so.
    pub guards: SharedMap<SocketAddr, Arc<Guard>>,
    /// Ports of services whose endpoints are checked, by host name and port.
    pub checked: SharedMap<(Arc<str>, u16), Arc<CheckedPort>>,
    /// Where the pods of each workload are, by its namespace and name, where a rule wants to know (`zoneAwareLbSetting`).
    pub origins: SharedMap<(Arc<str>, Arc<str>), Arc<Origin>>,
    /// `pathNormalization` of the mesh-wide settings; `None`: what the agent's flag says.
    pub path_normalization: Option<PathNormalization>,
    /// Namespaces whose label enrols their pods, and of which pods may opt out.
    pub enrolling: Arc<BTreeSet<Arc<str>>>,
    /// Key sets that are fetched, by their URI.
    pub key_sets: HashMap<Arc<str>, Arc<RemoteKeys>>,
    /// For a gateway's own process: what its pod serves; `None` for others, and while its pod is not known.
    pub gateway: Option<Arc<Gateway>>,
}

impl Snapshot {
    /// Every cluster that something leads to; those that several lead to, several times.
    pub fn clusters(&self) -> impl Iterator<Item = &Arc<Cluster>> {
        let of_gateway = self.gateway.iter().flat_map(|gateway| gateway.clusters());
        self.services.values().flat_map(|service| service.clusters()).chain(of_gateway)
    }

    /// The service whose cluster address this is, as far as a client of this namespace may know of it.
    pub fn service_at(&self, ip: IpAddr, namespace: &str) -> Option<&Arc<Service>> {
        self.vips.get(&ip).filter(|service| service.visible.to(namespace))
    }

    /// The headless service that has this endpoint, and which of its ports leads there, as far as a client of this namespace may
    /// know of it.
    pub fn headless_at(&self, at: SocketAddr, namespace: &str) -> Option<(&Arc<Service>, u16)> {
        let service = self.services.get(self.headless.get(&at)?)?;
        let has = |port: &&ServicePort| {
            port.cluster.endpoints.binary_search_by_key(&at, |endpoint| endpoint.address).is_ok()
        };
        let port = service.ports.iter().find(has)?.port;
        service.visible.to(namespace).then_some((service, port))
    }

    /// The pod that alone owns this address.
    pub fn workload_at(&self, ip: IpAddr) -> Option<&Arc<Workload>> {
        self.workloads.get(&ip)
    }
}

/// A pod that is to be in the mesh, and waits for that to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Starting {
    /// `spec.nodeName`.
    pub node: Arc<str>,
    /// The identity its service account gives it.
    pub identity: SpiffeId,
}

/// A pod as the mesh sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// Namespace of the pod.
    pub namespace: Arc<str>,
    /// Name of the pod.
    pub name: Arc<str>,
    /// `status.podIPs`, canonical (never v4-mapped).
    pub ips: Vec<IpAddr>,
    /// `spec.nodeName`.
    pub node: Option<Arc<str>>,
    /// The identity its service account gives it.
    pub identity: SpiffeId,
    /// Labels of the pod.
    pub labels: BTreeMap<Arc<str>, Arc<str>>,
    /// Where rules of its namespace are for pods with its labels (`workloadSelector`): the name of what it sees, which begins
    /// with its namespace and a slash.
    pub view: Option<Arc<str>>,
    /// Whether traffic to it travels as mTLS to port 15008 and its own traffic is captured.
    pub enrolled: bool,
    /// Where its network namespace is, if it is of this node: what the annotation `mesh.io/netns` says or, in a cluster, where
    /// the agent keeps it.
    pub netns: Option<PathBuf>,
    /// Whether the agent of its node has said, in the annotation `mesh.io/enrolled`, that it is in the mesh.
    pub announced: bool,
    /// What its annotations ask of its capture.
    pub capture: CapturePolicy,
    /// The authorization policies that select it.
    pub authorization: Arc<Authorization>,
    /// Whether it takes plaintext.
    pub authentication: Authentication,
    /// Metric label `*_workload`: the controller's name (owner reference, Deployment rather than `ReplicaSet`), else
    /// the pod's name.
    pub workload_name: Arc<str>,
    /// Metric label `*_canonical_service`: `service.istio.io/canonical-name`, else `app.kubernetes.io/name`, else
    /// `app`, else the workload name.
    pub canonical_service: Arc<str>,
    /// Metric label `*_canonical_revision`: `service.istio.io/canonical-revision`, else
    /// `app.kubernetes.io/version`, else `version`, else `latest`.
    pub canonical_revision: Arc<str>,
}

impl Workload {
    /// By what name it sees services: see [`Service::ports_for`].
    pub fn view(&self) -> &str {
        self.view.as_deref().unwrap_or(&self.namespace)
    }
}

/// A Service with its routes.
#[derive(Debug)]
pub struct Service {
    /// Fully qualified host name.
    pub host: Arc<str>,
    /// `metadata.name`.
    pub name: Arc<str>,
    /// `metadata.namespace`.
    pub namespace: Arc<str>,
    /// `spec.clusterIPs`; empty when headless.
    pub vips: Vec<IpAddr>,
    /// `spec.clusterIP: None`: clients dial its endpoints themselves.
    pub headless: bool,
    /// Who may know of it.
    pub visible: Visibility,
    /// Its ports, as clients of all namespaces see them that `views` does not name.
    pub ports: Vec<ServicePort>,
    /// Its ports for clients of those namespaces for which other rules hold, or for those of their pods that rules select.
    pub views: HashMap<Arc<str>, Vec<ServicePort>>,
}

impl Service {
    /// Its ports, as a client sees them by the name of its namespace or its own ([`Workload::view`]).
    pub fn ports_for(&self, view: &str) -> &[ServicePort] {
        let of_namespace = || self.views.get(view.split_once('/')?.0);
        self.views.get(view).or_else(of_namespace).unwrap_or(&self.ports)
    }

    /// The port with this number, as a client sees it.
    pub fn port_for(&self, view: &str, port: u16) -> Option<&ServicePort> {
        self.ports_for(view).iter().find(|p| p.port == port)
    }

    /// Every cluster that it leads to, whoever looks; those that are led to in several ways, several times.
    pub fn clusters(&self) -> impl Iterator<Item = &Arc<Cluster>> {
        self.ports.iter().chain(self.views.values().flatten()).flat_map(ServicePort::clusters)
    }
}

/// `exportTo`: clients of which namespaces an object is there for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Visibility {
    /// `*`: all.
    #[default]
    Everywhere,
    /// These only, sorted; `.` is the object's own, and none at all is `~`.
    Namespaces(Vec<Arc<str>>),
}

impl Visibility {
    /// Whether it is there for clients of this namespace.
    pub fn to(&self, namespace: &str) -> bool {
        match self {
            Self::Everywhere => true,
            Self::Namespaces(named) => named.iter().any(|one| &**one == namespace),
        }
    }

    /// The namespaces it names one by one.
    pub fn named(&self) -> &[Arc<str>] {
        match self {
            Self::Everywhere => &[],
            Self::Namespaces(named) => named,
        }
    }
}

/// One port of a Service.
#[derive(Debug)]
pub struct ServicePort {
    /// The number clients dial.
    pub port: u16,
    /// What the Service declares (`appProtocol`, else the port name's prefix), if anything.
    pub protocol: Option<Protocol>,
    /// HTTP routes in order, first match wins; never empty: the last is the default route unless a
    /// `VirtualService` took its place.
    pub routes: Arc<[Arc<HttpRoute>]>,
    /// Routes of connections whose bytes are not read as HTTP, first match wins: those of `tls[]`, then those of
    /// `tcp[]`. What none of them takes goes to `cluster`.
    pub streams: Arc<[Arc<StreamRoute>]>,
    /// Where opaque connections go: the whole service, all subsets.
    pub cluster: Arc<Cluster>,
}

impl ServicePort {
    /// Every cluster that the port leads to.
    fn clusters(&self) -> impl Iterator<Item = &Arc<Cluster>> {
        with_fallbacks(&self.cluster).chain(led_to(&self.routes, &self.streams))
    }
}

/// Every cluster that routes lead to.
fn led_to<'s>(
    routes: &'s [Arc<HttpRoute>],
    streams: &'s [Arc<StreamRoute>],
) -> impl Iterator<Item = &'s Arc<Cluster>> {
    let http = routes.iter().flat_map(|route| {
        let backends = match &route.action {
            RouteAction::Forward(backends) => backends.as_slice(),
            RouteAction::Redirect(_) | RouteAction::Direct { .. } => &[],
        };
        let mirrors = route.mirrors.iter().map(|mirror| &mirror.backend);
        backends.iter().map(|backend| &backend.backend).chain(mirrors)
    });
    let streams = streams.iter().flat_map(|route| &route.backends).map(|backend| &backend.backend);
    let named = http.chain(streams).filter_map(|backend| match backend {
        Backend::Cluster(cluster) => Some(cluster),
        Backend::Missing(_) => None,
    });
    named.flat_map(with_fallbacks)
}

fn with_fallbacks(cluster: &Arc<Cluster>) -> impl Iterator<Item = &Arc<Cluster>> {
    std::iter::once(cluster).chain(&cluster.standby.fallbacks)
}

/// An application protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// HTTP/1.0 or 1.1.
    Http1,
    /// HTTP/2 with prior knowledge, gRPC among it.
    Http2,
    /// Bytes.
    Opaque,
}
