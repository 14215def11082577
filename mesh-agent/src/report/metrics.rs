//! The registry: Istio's standard metrics and those of the mesh itself, as `OpenMetrics` text.
//!
//! Promises names, labels and buckets that existing dashboards know, and that a request costs one look-up by a
//! small key, not a hash over two dozen strings. Never takes a lock that all threads share on the path of a
//! request whose labels this thread has seen before. Series stay until the agent ends. Tested below on the exact
//! text.

use std::{
    cell::RefCell,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use foldhash::HashMap;
use prometheus_client::{
    encoding::text,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use super::{
    Peer, RequestOutcome, RequestProtocol, Security, Side,
    certificates::CertificateMetrics,
    endpoints::EndpointMetrics,
    health::HealthMetrics,
    labels::{Flags, RefusedLabels, RequestLabels, TrafficLabels},
    limits::LimitMetrics,
    overflow::OverflowMetrics,
};
use crate::{
    identity::SpiffeId,
    state::snapshot::{Cluster, Workload},
};

/// Istio's buckets, in milliseconds for durations and bytes for sizes.
const BUCKETS: [f64; 19] = [
    0.5,
    1.0,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1_000.0,
    2_500.0,
    5_000.0,
    10_000.0,
    30_000.0,
    60_000.0,
    300_000.0,
    600_000.0,
    1_800_000.0,
    3_600_000.0,
];

/// Label sets one thread remembers. Beyond it the thread forgets all and asks the registry again; an entry keeps
/// its workloads alive (some 2 KiB), so this also bounds what gone pods hold.
const REMEMBERED: usize = 4096;

type RouteLabels = [(&'static str, String); 3];
type ClusterLabels = [(&'static str, String); 1];
type MirrorLabels = [(&'static str, String); 2];
type Histograms = Family<RequestLabels, Histogram, fn() -> Histogram>;
type TcpCounter = Family<TrafficLabels, Counter>;

/// Every metric of the agent.
#[derive(Debug)]
pub(super) struct Metrics {
    /// Tells the thread-local memories of several registries in one process apart.
    id: u64,
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    duration: Histograms,
    request_bytes: Histograms,
    response_bytes: Histograms,
    pub tcp_opened: TcpCounter,
    pub tcp_closed: TcpCounter,
    pub tcp_failed: TcpCounter,
    pub tcp_sent: TcpCounter,
    pub tcp_received: TcpCounter,
    refused: Family<RefusedLabels, Counter>,
    idle_closed: Family<[(&'static str, String); 2], Counter>,
    routes: Family<RouteLabels, Counter>,
    over_budget: Family<ClusterLabels, Counter>,
    pub overflow: OverflowMetrics,
    mirrored: Family<MirrorLabels, Counter>,
    policy_dry_run: Family<[(&'static str, String); 3], Counter>,
    pub external_authorization: Family<[(&'static str, String); 2], Counter>,
    pub config_problems: Gauge,
    pub config_revision: Gauge<u64, AtomicU64>,
    pub enrolled_pods: Gauge,
    pub enrolment_failures: Gauge,
    pub memory: Gauge<u64, AtomicU64>,
    pub memory_promised: Gauge<u64, AtomicU64>,
    pub memory_limit: Gauge<u64, AtomicU64>,
    pub overload_level: Gauge<u64, AtomicU64>,
    pub flows_closed: Family<[(&'static str, &'static str); 1], Counter>,
    pub log_dropped: Counter,
    pub kernel_refusals: Family<[(&'static str, &'static str); 1], Counter>,
    pub kernel_lost: Family<[(&'static str, &'static str); 1], Counter>,
    pub kernel_dropped: Family<[(&'static str, &'static str); 1], Counter>,
    pub certificates: CertificateMetrics,
    pub health: HealthMetrics,
    pub endpoints: EndpointMetrics,
    pub limits: LimitMetrics,
}

/// The series of one label set of requests.
#[derive(Debug, Clone)]
struct RequestSeries {
    count: Counter,
    duration: Histogram,
    request_bytes: Histogram,
    response_bytes: Histogram,
}

fn histogram() -> Histogram {
    Histogram::new(BUCKETS)
}

fn histograms() -> Histograms {
    Family::new_with_constructor(histogram as fn() -> Histogram)
}

impl Metrics {
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let mut metrics = Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            registry: Registry::default(),
            requests: Family::default(),
            duration: histograms(),
            request_bytes: histograms(),
            response_bytes: histograms(),
            tcp_opened: Family::default(),
            tcp_closed: Family::default(),
            tcp_failed: Family::default(),
            tcp_sent: Family::default(),
            tcp_received: Family::default(),
            refused: Family::default(),
            idle_closed: Family::default(),
            routes: Family::default(),
            over_budget: Family::default(),
            overflow: OverflowMetrics::default(),
            mirrored: Family::default(),
            policy_dry_run: Family::default(),
            health: HealthMetrics::default(),
            endpoints: EndpointMetrics::default(),
            limits: LimitMetrics::default(),
            external_authorization: Family::default(),
            config_problems: Gauge::default(),
            config_revision: Gauge::default(),
            enrolled_pods: Gauge::default(),
            enrolment_failures: Gauge::default(),
            memory: Gauge::default(),
            memory_promised: Gauge::default(),
            memory_limit: Gauge::default(),
            overload_level: Gauge::default(),
            flows_closed: Family::default(),
            log_dropped: Counter::default(),
            kernel_refusals: Family::default(),
            kernel_lost: Family::default(),
            kernel_dropped: Family::default(),
            certificates: CertificateMetrics::default(),
        };
        metrics.register_traffic();
        metrics.register_own();
        metrics
    }

    /// Istio's standard metrics. The library appends `_total` to the names of counters.
    fn register_traffic(&mut self) {
        let r = &mut self.registry;
        r.register("istio_requests", "HTTP and gRPC requests", self.requests.clone());
        r.register("istio_request_duration_milliseconds", "Duration of requests", self.duration.clone());
        r.register("istio_request_bytes", "Body bytes of requests", self.request_bytes.clone());
        r.register("istio_response_bytes", "Body bytes of responses", self.response_bytes.clone());
        r.register("istio_tcp_connections_opened", "Opaque connections opened", self.tcp_opened.clone());
        r.register("istio_tcp_connections_closed", "Opaque connections closed", self.tcp_closed.clone());
        r.register(
            "istio_tcp_connections_failed",
            "Opaque connections that were never established",
            self.tcp_failed.clone(),
        );
        r.register(
            "istio_tcp_sent_bytes",
            "Bytes sent to the client of opaque connections",
            self.tcp_sent.clone(),
        );
        r.register(
            "istio_tcp_received_bytes",
            "Bytes received from the client of opaque connections",
            self.tcp_received.clone(),
        );
        let build = Family::<[(&str, &str); 2], Gauge>::default();
        build.get_or_create(&[("component", "mesh-agent"), ("tag", env!("CARGO_PKG_VERSION"))]).set(1);
        r.register("istio_build", "Component and version", build);
    }

    fn register_own(&mut self) {
        let r = &mut self.registry;
        r.register(
            "mesh_refused",
            "Connections refused before anything was known of them",
            self.refused.clone(),
        );
        r.register(
            "mesh_idle_closed",
            "Connections of clients closed because they made no request for too long",
            self.idle_closed.clone(),
        );
        r.register(
            "mesh_route_requests",
            "Requests by the name of their route (statPrefix, or the name it was given)",
            self.routes.clone(),
        );
        r.register(
            "mesh_retries_over_budget",
            "Requests not tried again because the cluster's budget of retries was used up",
            self.over_budget.clone(),
        );
        r.register(
            "mesh_mirrored_requests",
            "Copies of requests sent to mirrors, by what became of them",
            self.mirrored.clone(),
        );
        self.registry.register(
            "mesh_policy_dry_run",
            "Connections and requests that a policy which is not enforced has something to say about",
            self.policy_dry_run.clone(),
        );
        self.health.register(&mut self.registry);
        self.overflow.register(&mut self.registry);
        self.endpoints.register(&mut self.registry);
        self.limits.register(&mut self.registry);
        self.registry.register(
            "mesh_external_authorization",
            "Questions to external authorizers, by what came of them",
            self.external_authorization.clone(),
        );
        self.register_state();
    }

    fn register_state(&mut self) {
        let r = &mut self.registry;
        r.register("mesh_config_problems", "Problems in the configuration now", self.config_problems.clone());
        r.register(
            "mesh_config_revision",
            "Revision of the configuration in force",
            self.config_revision.clone(),
        );
        r.register(
            "mesh_enrolled_pods",
            "Pods of this node whose traffic is captured",
            self.enrolled_pods.clone(),
        );
        r.register(
            "mesh_enrolment_failures",
            "Pods of this node that cannot be enrolled now",
            self.enrolment_failures.clone(),
        );
        r.register("mesh_memory_bytes", "Memory in use, where there is a limit", self.memory.clone());
        let promised = self.memory_promised.clone();
        r.register("mesh_memory_promised_bytes", "Memory that what is under way will come to use", promised);
        r.register("mesh_memory_limit_bytes", "Memory that may be used, 0: any", self.memory_limit.clone());
        r.register(
            "mesh_overload_level",
            "Whether new work is refused for want of memory: 0 no, 1 of pods that hold most, 2 all",
            self.overload_level.clone(),
        );
        r.register("mesh_flows_closed", "Flows that ended, by transport", self.flows_closed.clone());
        r.register(
            "mesh_access_log_dropped",
            "Access-log lines nobody could write in time",
            self.log_dropped.clone(),
        );
        r.register(
            "mesh_kernel_refusals",
            "Connections refused in the kernel because a table was full",
            self.kernel_refusals.clone(),
        );
        r.register(
            "mesh_kernel_lost",
            "Flows not recorded or not reported by the kernel because a table was full",
            self.kernel_lost.clone(),
        );
        r.register(
            "mesh_kernel_dropped_packets",
            "Packets that the kernel dropped because they went around the agent",
            self.kernel_dropped.clone(),
        );
        self.certificates.register(r);
    }

    /// The whole registry as `OpenMetrics` text.
    pub fn exposition(&self) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail, and no metric here fails to encode; half a text would be worse than none.
        match text::encode(&mut out, &self.registry) {
            Ok(()) => out,
            Err(error) => format!("# metrics could not be written: {error}\n# EOF\n"),
        }
    }

    /// Counts one request that was not tried again.
    pub fn retry_over_budget(&self, cluster: &Cluster) {
        self.over_budget.get_or_create(&[("cluster", cluster.name.to_string())]).inc();
    }

    /// Counts one copy of a request.
    pub fn mirrored(&self, cluster: &str, outcome: &'static str) {
        let labels = [("cluster", cluster.to_owned()), ("outcome", outcome.to_owned())];
        self.mirrored.get_or_create(&labels).inc();
    }

    fn count_route(&self, outcome: &RequestOutcome<'_>) {
        let (Some(name), Side::Source) = (outcome.stat_name, outcome.side) else { return };
        let host = outcome.cluster.map(|cluster| cluster.host.to_string()).unwrap_or_default();
        let code = outcome.status.to_string();
        let labels = [("route", name.to_string()), ("destination_service", host), ("response_code", code)];
        self.routes.get_or_create(&labels).inc();
    }

    /// Counts one request.
    pub fn request(&self, outcome: &RequestOutcome<'_>) {
        self.count_route(outcome);
        let key = Key::new(self.id, outcome);
        let counted = SEEN.try_with(|seen| {
            let mut seen = seen.borrow_mut();
            if let Some(entry) = seen.get(&key) {
                return entry.series.observe(outcome);
            }
            if seen.len() >= REMEMBERED {
                seen.clear();
            }
            let series = self.series(outcome);
            series.observe(outcome);
            seen.insert(key, Seen { series, _keep: Keep::new(outcome) });
        });
        // A request that is dropped with its thread finds no memory any more.
        if counted.is_err() {
            self.series(outcome).observe(outcome);
        }
    }

    fn series(&self, outcome: &RequestOutcome<'_>) -> RequestSeries {
        let labels = RequestLabels {
            traffic: TrafficLabels::new(
                outcome.side,
                (outcome.source, outcome.destination),
                outcome.cluster,
                outcome.protocol,
                outcome.security,
            )
            .with_flags(Flags::of(outcome)),
            status: outcome.status,
            grpc: outcome.grpc_status,
        };
        RequestSeries {
            count: self.requests.get_or_create_owned(&labels),
            duration: self.duration.get_or_create_owned(&labels),
            request_bytes: self.request_bytes.get_or_create_owned(&labels),
            response_bytes: self.response_bytes.get_or_create_owned(&labels),
        }
    }

    /// Counts what a policy that is not enforced has to say.
    pub fn noted(&self, action: &'static str, result: &'static str, policy: String) {
        let labels = [("action", action.to_owned()), ("result", result.to_owned()), ("policy", policy)];
        self.policy_dry_run.get_or_create(&labels).inc();
    }

    /// Counts one refused connection.
    pub fn refused(&self, side: Side, pod: &Workload, kind: &'static str) {
        let labels = RefusedLabels { side, kind, pod: pod.name.clone(), namespace: pod.namespace.clone() };
        self.refused.get_or_create(&labels).inc();
    }

    /// Counts one connection closed for want of requests.
    pub fn idle_closed(&self, pod: &Workload) {
        let labels = [("pod", pod.name.to_string()), ("namespace", pod.namespace.to_string())];
        self.idle_closed.get_or_create(&labels).inc();
    }
}

impl RequestSeries {
    fn observe(&self, outcome: &RequestOutcome<'_>) {
        self.count.inc();
        self.duration.observe(outcome.duration.as_secs_f64() * 1000.0);
        self.request_bytes.observe(outcome.request_bytes as f64);
        self.response_bytes.observe(outcome.response_bytes as f64);
    }
}

thread_local! {
    static SEEN: RefCell<HashMap<Key, Seen>> = RefCell::default();
}

#[derive(Debug)]
struct Seen {
    series: RequestSeries,
    _keep: Keep,
}

/// Keeps alive what a [`Key`] tells apart by address, so that no other object can come to have that address.
#[derive(Debug)]
struct Keep {
    _workloads: [Option<Arc<Workload>>; 2],
    _names: Option<[Arc<str>; 3]>,
}

impl Keep {
    fn new(outcome: &RequestOutcome<'_>) -> Self {
        Self {
            _workloads: [outcome.source.workload.clone(), outcome.destination.workload.clone()],
            _names: outcome.cluster.map(|c| [c.host.clone(), c.service.clone(), c.namespace.clone()]),
        }
    }
}

/// Tells label sets of requests apart without reading the strings: workloads and the names of a service by
/// address. Two keys may stand for one label set, never the reverse.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Key {
    registry: u64,
    source: End,
    destination: End,
    service: Option<[usize; 3]>,
    side: Side,
    protocol: RequestProtocol,
    security: Security,
    status: u16,
    grpc: Option<u32>,
    flags: Flags,
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct End {
    workload: Option<usize>,
    principal: Principal,
}

/// By value only where it is not what the workload says: a peer's identity is new memory with each connection.
#[derive(Debug, PartialEq, Eq, Hash)]
enum Principal {
    Unknown,
    OfWorkload,
    Other(SpiffeId),
}

impl Key {
    fn new(registry: u64, outcome: &RequestOutcome<'_>) -> Self {
        Self {
            registry,
            source: End::new(outcome.source),
            destination: End::new(outcome.destination),
            service: outcome.cluster.map(|c| [&c.host, &c.service, &c.namespace].map(address)),
            side: outcome.side,
            protocol: outcome.protocol,
            security: outcome.security,
            status: outcome.status,
            grpc: outcome.grpc_status,
            flags: Flags::of(outcome),
        }
    }
}

fn address<T: ?Sized>(arc: &Arc<T>) -> usize {
    Arc::as_ptr(arc).cast::<()>().addr()
}

impl End {
    fn new(peer: &Peer) -> Self {
        let principal = match (&peer.identity, &peer.workload) {
            (None, _) => Principal::Unknown,
            (Some(id), Some(workload)) if *id == workload.identity => Principal::OfWorkload,
            (Some(id), _) => Principal::Other(id.clone()),
        };
        Self { workload: peer.workload.as_ref().map(address), principal }
    }
}

#[cfg(test)]
#[path = "metrics_tests.rs"]
mod tests;
