//! The compiled, immutable picture of the mesh that the path reads: one `Arc` held for a connection or a
//! request, never a lock. Built by `compile` only.
//!
//! What changes per request (in-flight counts, round-robin position, latency) lives behind the `Arc`s of
//! [`EndpointState`] and [`ClusterState`], which are carried over from the previous snapshot.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64},
    },
    time::Duration,
};

use http::{HeaderName, HeaderValue, StatusCode, uri::Authority};
use regex::Regex;

use crate::identity::SpiffeId;

/// Everything the path needs to know, at one revision of the configuration.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Grows by one with each compiled change; 0 is the empty snapshot before the first load.
    pub revision: u64,
    /// Pods by each of their addresses. Pods of the host network are not in here: their address is not theirs
    /// alone.
    pub workloads: HashMap<IpAddr, Arc<Workload>>,
    /// Services by fully qualified host name, for example `reviews.default.svc.cluster.local`.
    pub services: HashMap<Arc<str>, Arc<Service>>,
    /// Services by each of their cluster addresses.
    pub vips: HashMap<IpAddr, Arc<Service>>,
    /// The service that an app's address belongs to, for what the destination reports; the first by host name where
    /// several share an endpoint.
    pub inbound: HashMap<SocketAddr, Arc<Cluster>>,
}

impl Snapshot {
    /// The service whose cluster address this is.
    pub fn service_at(&self, ip: IpAddr) -> Option<&Arc<Service>> {
        self.vips.get(&ip)
    }

    /// The pod that alone owns this address.
    pub fn workload_at(&self, ip: IpAddr) -> Option<&Arc<Workload>> {
        self.workloads.get(&ip)
    }
}

/// A pod as the mesh sees it.
#[derive(Debug, PartialEq, Eq)]
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
    /// Whether traffic to it travels as mTLS to port 15008 and its own traffic is captured.
    pub enrolled: bool,
    /// Where its network namespace is, in directory mode (annotation `mesh.io/netns`).
    pub netns: Option<PathBuf>,
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
    /// Its ports.
    pub ports: Vec<ServicePort>,
}

impl Service {
    /// The port with this number.
    pub fn port(&self, port: u16) -> Option<&ServicePort> {
        self.ports.iter().find(|p| p.port == port)
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
    /// Where opaque connections go: the whole service, all subsets.
    pub cluster: Arc<Cluster>,
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

/// One `http[]` entry of a `VirtualService`, or the default route of a service.
#[derive(Debug)]
pub struct HttpRoute {
    /// `name`, for logs and metrics.
    pub name: Arc<str>,
    /// The object that wrote it, for example `VirtualService default/reviews`; the Service for a default route.
    pub origin: Arc<str>,
    /// Alternatives (OR); empty matches everything.
    pub matches: Vec<RequestMatch>,
    /// What happens to a request that matches.
    pub action: RouteAction,
    /// `fault`.
    pub fault: Fault,
    /// `headers` of the route.
    pub headers: HeaderOps,
    /// `rewrite`.
    pub rewrite: Rewrite,
    /// `timeout`: the whole request with all tries; `None` is unlimited (Istio's default).
    pub timeout: Option<Duration>,
    /// `retries`.
    pub retries: RetryPolicy,
}

/// One `match[]` entry: all that is set must hold (AND).
#[derive(Debug, Clone, Default)]
pub struct RequestMatch {
    /// `uri`, against the path without the query.
    pub uri: Option<StringMatch>,
    /// `ignoreUriCase`.
    pub ignore_uri_case: bool,
    /// `scheme`.
    pub scheme: Option<StringMatch>,
    /// `method`.
    pub method: Option<StringMatch>,
    /// `authority`, against the Host header or `:authority`.
    pub authority: Option<StringMatch>,
    /// `headers`.
    pub headers: Vec<(HeaderName, HeaderMatch)>,
    /// `withoutHeaders`: none may match.
    pub without_headers: Vec<(HeaderName, HeaderMatch)>,
    /// `queryParams`.
    pub query_params: Vec<(String, StringMatch)>,
    /// `port`.
    pub port: Option<u16>,
    /// `sourceLabels`.
    pub source_labels: Vec<(String, String)>,
    /// `sourceNamespace`.
    pub source_namespace: Option<String>,
}

/// Istio's `StringMatch`.
#[derive(Debug, Clone)]
pub enum StringMatch {
    /// The whole string.
    Exact(String),
    /// A plain string prefix.
    Prefix(String),
    /// RE2, must match the whole string: compiled as `^(?:…)$`.
    Regex(Regex),
}

/// A match on one header.
#[derive(Debug, Clone)]
pub enum HeaderMatch {
    /// The header is there (`{}` or regex `*`).
    Present,
    /// Some value matches.
    Value(StringMatch),
}

/// What a route does with a request.
#[derive(Debug)]
pub enum RouteAction {
    /// Sends it to one of these, by weight; never empty, the sum of weights is above 0.
    Forward(Vec<WeightedBackend>),
    /// Answers with a redirect.
    Redirect(Redirect),
    /// Answers itself.
    Direct {
        /// Status of the answer.
        status: StatusCode,
        /// Body of the answer.
        body: bytes::Bytes,
    },
}

/// One destination of a route.
#[derive(Debug)]
pub struct WeightedBackend {
    /// Its share; of the sum of all weights of the route.
    pub weight: u32,
    /// `headers` of the destination, applied after the route's.
    pub headers: HeaderOps,
    /// Where to.
    pub backend: Backend,
}

/// A destination, resolved.
#[derive(Debug)]
pub enum Backend {
    /// Endpoints of a service or subset.
    Cluster(Arc<Cluster>),
    /// It names something that does not exist (unknown host, port or subset): 503, with this sentence in the log.
    Missing(Arc<str>),
}

/// `fault`: none by default.
#[derive(Debug, Clone, Default)]
pub struct Fault {
    /// `delay`.
    pub delay: Option<(Percentage, Duration)>,
    /// `abort`.
    pub abort: Option<(Percentage, Abort)>,
}

/// How an injected abort answers.
#[derive(Debug, Clone, Copy)]
pub enum Abort {
    /// `httpStatus`.
    Http(StatusCode),
    /// `grpcStatus`, as its number.
    Grpc(u32),
}

/// A share of requests in 1/10000 (Istio's resolution for faults).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Percentage(pub u32);

/// `headers`: set before add, then remove.
#[derive(Debug, Clone, Default)]
pub struct HeaderOps {
    /// For the request.
    pub request: HeaderOp,
    /// For the response.
    pub response: HeaderOp,
}

/// Changes to one set of headers.
#[derive(Debug, Clone, Default)]
pub struct HeaderOp {
    /// Replaces all values.
    pub set: Vec<(HeaderName, HeaderValue)>,
    /// Adds a value.
    pub add: Vec<(HeaderName, HeaderValue)>,
    /// Removes all values.
    pub remove: Vec<HeaderName>,
    /// `set`/`add` of `host` or `:authority`.
    pub authority: Option<Authority>,
}

/// `rewrite`: what is `None` stays.
#[derive(Debug, Clone, Default)]
pub struct Rewrite {
    /// New path.
    pub path: Option<PathRewrite>,
    /// New Host / `:authority`; wins over header operations.
    pub authority: Option<Authority>,
}

/// How `rewrite.uri` and `rewrite.uriRegexRewrite` change the path. The query stays.
#[derive(Debug, Clone)]
pub enum PathRewrite {
    /// `uri`: replaces the matched prefix when the match was a prefix, else the whole path.
    Uri(String),
    /// `uriRegexRewrite`: every match is replaced, `\1` as in RE2 already turned into `$1` form.
    Regex(Regex, String),
}

/// `redirect`.
#[derive(Debug, Clone)]
pub struct Redirect {
    /// `uri`: the whole new path; with `prefix` true (`prefixRewrite`…) only the matched prefix.
    pub uri: Option<String>,
    /// `authority`.
    pub authority: Option<String>,
    /// `port` or `derivePort`.
    pub port: Option<RedirectPort>,
    /// `scheme`.
    pub scheme: Option<String>,
    /// `redirectCode`, 301 by default.
    pub status: StatusCode,
}

/// Port of a redirect's Location.
#[derive(Debug, Clone, Copy)]
pub enum RedirectPort {
    /// `port`.
    Number(u16),
    /// `derivePort: FROM_PROTOCOL_DEFAULT`.
    ProtocolDefault,
    /// `derivePort: FROM_REQUEST_PORT`.
    RequestPort,
}

/// `retries`, with Istio's default where the route says nothing.
#[derive(Debug, Clone)]
pub struct RetryPolicy {
    /// Tries after the first; 0 switches retries off.
    pub attempts: u32,
    /// `perTryTimeout`; `None` leaves a try the whole timeout.
    pub per_try_timeout: Option<Duration>,
    /// `retryOn`.
    pub on: RetryOn,
    /// Base of the exponential backoff between tries (Envoy: 25 ms, at most ten times that, full jitter).
    pub backoff: Duration,
}

/// Conditions of `retryOn`, the names of Envoy's `x-envoy-retry-on` and `x-envoy-retry-grpc-on`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is one condition of retryOn, freely combined")]
pub struct RetryOn {
    /// `5xx`: any 5xx, or no response at all.
    pub server_error: bool,
    /// `gateway-error`: 502, 503, 504.
    pub gateway_error: bool,
    /// `reset`: no response at all (disconnect, reset, read timeout).
    pub reset: bool,
    /// `connect-failure`.
    pub connect_failure: bool,
    /// `refused-stream`.
    pub refused_stream: bool,
    /// `retriable-4xx`: 409.
    pub retriable_4xx: bool,
    /// Numbers in `retryOn`.
    pub status_codes: Vec<u16>,
    /// gRPC statuses (`cancelled`, `deadline-exceeded`, `internal`, `resource-exhausted`, `unavailable`) by number.
    pub grpc: Vec<u32>,
}

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
    /// Ready endpoints.
    pub endpoints: Vec<Arc<Endpoint>>,
    /// How to choose.
    pub balancing: Balancing,
    /// `connectionPool.tcp.connectTimeout`, 10 s by default.
    pub connect_timeout: Duration,
    /// Carried over from the snapshot before.
    pub state: Arc<ClusterState>,
}

/// What a cluster remembers between snapshots.
#[derive(Debug, Default)]
pub struct ClusterState {
    /// Position of round robin.
    pub next: AtomicU64,
}

/// How endpoints are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
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
}
