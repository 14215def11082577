//! What happened, for people and their tools: metrics, one access-log line per event, and the facts of flows.
//!
//! Promises never to fail and never to block the path. Never decides anything. Each part is tested in its own file;
//! the whole on the exact exposition text and on log lines in `metrics_tests.rs`.

mod access_log;
mod certificates;
mod connection;
mod endpoints;
mod facts;
mod flows;
mod health;
mod inherited;
mod labels;
mod limits;
mod metrics;
mod overflow;
mod policy;
#[cfg(test)]
pub(crate) mod samples;
mod seldom;

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use prometheus_client::metrics::counter::Counter;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

pub use self::{
    access_log::AccessLog,
    certificates::AuthorityExpiry,
    connection::{ConnectionGuard, TcpLabels},
    facts::{FlowGuard, FlowKey, KEPT, KnownFlow},
    flows::{Clock, Context, Direction, FindFacts, FlowView, Protection, Verdict, join, socket_addr},
    policy::{Asked, PolicyNote},
};
use self::{
    access_log::Log, facts::FactsTable, inherited::Inherited, labels::Flags, metrics::Metrics, seldom::Seldom,
};
use crate::{
    error::{Error, Kind},
    identity::SpiffeId,
    state::snapshot::{Cluster, Workload},
};

/// Closed flows a slow follower may lag behind before it loses some (it is told how many).
const FOLLOW_QUEUE: usize = 4096;

/// Who reports: the source or the destination side of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// `reporter="source"`
    Source,
    /// `reporter="destination"`
    Destination,
}

impl Side {
    /// The word in labels and logs.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// How the bytes travelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Security {
    /// `mutual_tls`
    MutualTls,
    /// `none`
    None,
}

impl Security {
    /// The word in labels and logs.
    pub const fn word(self) -> &'static str {
        match self {
            Self::MutualTls => "mutual_tls",
            Self::None => "none",
        }
    }
}

/// Application protocol in `request_protocol`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RequestProtocol {
    /// `http`
    Http,
    /// `grpc`
    Grpc,
    /// `tcp`
    Tcp,
}

impl RequestProtocol {
    /// The word in labels, logs and flows.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Grpc => "grpc",
            Self::Tcp => "tcp",
        }
    }
}

/// One end of the traffic; unknown parts are `unknown` in labels.
#[derive(Debug, Clone, Default)]
pub struct Peer {
    /// Its pod.
    pub workload: Option<Arc<Workload>>,
    /// The identity it proved (mTLS) or the kernel vouches for (own pod).
    pub identity: Option<SpiffeId>,
}

/// Why a request that failed was not tried again, though the route's conditions cover the failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GaveUp {
    /// It has had all its tries: `URX`.
    Tries,
    /// The cluster's budget of retries was used up: `UO`.
    Budget,
}

impl GaveUp {
    /// Envoy's response flag.
    pub const fn flag(self) -> &'static str {
        match self {
            Self::Tries => "URX",
            Self::Budget => "UO",
        }
    }
}

/// What an answered or refused request looked like.
#[derive(Debug)]
pub struct RequestOutcome<'a> {
    /// Source or destination.
    pub side: Side,
    /// The client's end.
    pub source: &'a Peer,
    /// The server's end.
    pub destination: &'a Peer,
    /// The service and subset, where one was addressed.
    pub cluster: Option<&'a Cluster>,
    /// `http` or `grpc`.
    pub protocol: RequestProtocol,
    /// How the bytes travelled.
    pub security: Security,
    /// Status sent to the client.
    pub status: u16,
    /// `grpc-status`, for gRPC.
    pub grpc_status: Option<u32>,
    /// What went wrong, if anything; gives the response flag.
    pub error: Option<&'a Error>,
    /// `DI` when a delay was injected.
    pub delay_injected: bool,
    /// Why a request whose failure its route retries was not tried again.
    pub gave_up: Option<GaveUp>,
    /// Method, for the log; empty, as the next two, where the request was not read.
    pub method: &'a str,
    /// Host, for the log.
    pub authority: &'a str,
    /// Path and query, for the log.
    pub path: &'a str,
    /// `x-request-id`.
    pub request_id: Option<&'a str>,
    /// Name of the route.
    pub route: &'a str,
    /// What metrics call the route (`statPrefix`, or the name it was given), if anything.
    pub stat_name: Option<&'a Arc<str>>,
    /// Address of the endpoint that answered.
    pub endpoint: Option<SocketAddr>,
    /// The app's address at the client's end.
    pub client: SocketAddr,
    /// What the client dialled.
    pub original_dst: SocketAddr,
    /// Tries made.
    pub tries: u32,
    /// Body bytes received from the client.
    pub request_bytes: u64,
    /// Body bytes sent to the client.
    pub response_bytes: u64,
    /// From the first byte of the request to the last of the response.
    pub duration: Duration,
}

/// What the agent knows of a captured connection and the kernel does not; joined with the flow's record.
#[derive(Debug, Clone, Default)]
pub struct FlowFacts {
    /// Host name of the service.
    pub service: Option<Arc<str>>,
    /// Last endpoint.
    pub endpoint: Option<SocketAddr>,
    /// Pod of the other end, `namespace/name`.
    pub peer_pod: Option<Arc<str>>,
    /// Identity of the other end.
    pub peer: Option<SpiffeId>,
    /// Last route.
    pub route: Option<Arc<str>>,
    /// `http`, `grpc` or `tcp`.
    pub protocol: Option<RequestProtocol>,
    /// Last response flag.
    pub flag: Option<&'static str>,
    /// Whether the bytes travel as mTLS.
    pub mutual_tls: bool,
}

/// Metrics, access log and the facts of flows. One per agent, shared; never fails, never blocks.
#[derive(Debug)]
pub struct Reporter {
    metrics: Metrics,
    log: Log,
    facts: FactsTable,
    inherited: Inherited,
    closed: broadcast::Sender<Arc<FlowView>>,
    /// Lines of connections and of requests that were refused for want of memory: there may be very many.
    shed: [Seldom; 2],
}

impl Default for Reporter {
    /// Without an access log.
    fn default() -> Self {
        Self::with(|_| Log::off())
    }
}

/// Keys of the client's end in the log.
const SOURCE: [&str; 4] = ["src.addr", "src.workload", "src.namespace", "src.identity"];
/// Keys of the server's end in the log; the address is what the client dialled.
const DESTINATION: [&str; 4] = ["dst.addr", "dst.workload", "dst.namespace", "dst.identity"];

impl Reporter {
    fn with(log: impl FnOnce(Counter) -> Log) -> Self {
        let metrics = Metrics::new();
        let log = log(metrics.log_dropped.clone());
        let (facts, inherited) = (FactsTable::default(), Inherited::default());
        let (closed, shed) = (broadcast::Sender::new(FOLLOW_QUEUE), Default::default());
        Self { metrics, log, facts, inherited, closed, shed }
    }

    /// With an access log on standard output. An `Err` when its thread cannot be started.
    pub fn new(access_log: AccessLog) -> io::Result<Self> {
        Self::with_log_to(access_log, Box::new(io::stdout()))
    }

    /// With an access log written to `out`. An `Err` when its thread cannot be started.
    pub fn with_log_to(access_log: AccessLog, out: Box<dyn io::Write + Send>) -> io::Result<Self> {
        let mut failed = Ok(());
        let reporter = Self::with(|dropped| {
            Log::start(access_log, out, dropped).unwrap_or_else(|error| {
                failed = Err(error);
                Log::off()
            })
        });
        failed.map(|()| reporter)
    }

    /// A request was answered: metrics and one access-log line, of those refused for want of memory ten a second.
    pub fn request(&self, outcome: &RequestOutcome<'_>) {
        self.metrics.request(outcome);
        if outcome.error.is_some_and(|error| error.kind == Kind::Overload) && !self.shed[1].may() {
            return;
        }
        self.log.line(|line| {
            line.text("event", Some("request"));
            line.text("reporter", Some(outcome.side.word()));
            line.end(SOURCE, Some(outcome.client), outcome.source);
            line.end(DESTINATION, Some(outcome.original_dst), outcome.destination);
            line.text("dst.service", outcome.cluster.map(|cluster| &*cluster.host));
            line.text("cluster", outcome.cluster.map(|cluster| &*cluster.name));
            line.display("endpoint", outcome.endpoint);
            line.text("protocol", Some(outcome.protocol.word()));
            line.known("method", outcome.method);
            line.known("authority", outcome.authority);
            line.known("path", outcome.path);
            line.text("request_id", outcome.request_id);
            line.known("route", outcome.route);
            line.number("status", Some(outcome.status.into()));
            line.number("grpc_status", outcome.grpc_status.map(u64::from));
            line.display("flags", Some(Flags::of(outcome)));
            line.number("tries", Some(outcome.tries.into()));
            line.number("bytes_received", Some(outcome.request_bytes));
            line.number("bytes_sent", Some(outcome.response_bytes));
            line.milliseconds("duration_ms", outcome.duration);
            line.text("security", Some(outcome.security.word()));
            line.text("error", outcome.error.map(|error| error.detail.as_str()));
        });
    }

    /// A request to this cluster was not tried again because its budget of retries was used up:
    /// `mesh_retries_over_budget_total`.
    pub fn retry_over_budget(&self, cluster: &Cluster) {
        self.metrics.retry_over_budget(cluster);
    }

    /// A copy of a request was sent to a mirror, or given up: `mesh_mirrored_requests_total`.
    pub fn mirrored(&self, cluster: &str, outcome: &'static str) {
        self.metrics.mirrored(cluster, outcome);
    }

    /// An opaque connection begins; the guard counts its end.
    pub fn connection(self: &Arc<Self>, labels: TcpLabels) -> ConnectionGuard {
        ConnectionGuard::begin(self, labels)
    }

    /// A client's connection was closed because it made no request for too long: `mesh_idle_closed_total`.
    pub fn idle_closed(&self, pod: &Workload) {
        self.metrics.idle_closed(pod);
    }

    /// A connection was refused before it became a request or an opaque connection (`mesh_refused_total` by kind
    /// and side, one log line with the peer and what it `dialled`; ten a second of those for want of memory).
    pub fn refused(
        &self,
        side: Side,
        pod: &Workload,
        client: SocketAddr,
        dialled: Option<SocketAddr>,
        error: &Error,
    ) {
        self.metrics.refused(side, pod, error.kind.row().word);
        if error.kind == Kind::Overload && !self.shed[0].may() {
            return;
        }
        self.log.line(|line| {
            line.text("event", Some("refused"));
            line.text("reporter", Some(side.word()));
            line.display("src.addr", Some(client));
            line.display("dst.addr", dialled);
            line.text("pod", Some(&pod.name));
            line.text("pod_namespace", Some(&pod.namespace));
            line.text("kind", Some(error.kind.row().word));
            line.text("flags", Some(error.kind.row().flag));
            line.text("error", Some(&error.detail));
        });
    }

    /// A captured connection of this pod begins.
    pub fn flow(self: &Arc<Self>, pod: &Arc<Workload>, key: FlowKey) -> FlowGuard {
        self.facts.begin(pod, key)
    }

    /// What is known of a connection, until [`KEPT`] after its end: the latest of this key.
    pub fn facts(&self, pod: &Workload, key: FlowKey) -> Option<FlowFacts> {
        self.facts.find(&pod.namespace, &pod.name, key)
    }

    /// A flow ended: counted, and handed to those who follow.
    pub fn flow_closed(&self, flow: FlowView) {
        let transport = match &*flow.transport {
            "tcp" => "tcp",
            "udp" => "udp",
            _ => "other",
        };
        self.metrics.flows_closed.get_or_create(&[("transport", transport)]).inc();
        if self.closed.receiver_count() > 0 {
            // An `Err` says that the last follower has just left.
            let _ = self.closed.send(Arc::new(flow));
        }
    }

    /// Every flow that ends from now on.
    pub fn follow(&self) -> broadcast::Receiver<Arc<FlowView>> {
        self.closed.subscribe()
    }

    /// The configuration in force: `mesh_config_revision`, `mesh_config_problems`.
    pub fn set_config(&self, revision: u64, problems: usize) {
        self.metrics.config_revision.set(revision);
        self.metrics.config_problems.set(problems.cast_signed() as i64);
    }

    /// Pods of this node whose traffic is captured, and those that cannot be enrolled: `mesh_enrolled_pods`,
    /// `mesh_enrolment_failures`.
    pub fn set_pods(&self, enrolled: usize, failing: usize) {
        self.metrics.enrolled_pods.set(enrolled.cast_signed() as i64);
        self.metrics.enrolment_failures.set(failing.cast_signed() as i64);
    }

    /// Memory in use, what will come on top, its limit, and the level of shedding: `mesh_memory_bytes`,
    /// `mesh_memory_promised_bytes`, `mesh_memory_limit_bytes`, `mesh_overload_level`.
    pub fn set_memory(&self, used: u64, promised: u64, limit: u64, level: u8) {
        self.metrics.memory.set(used);
        self.metrics.memory_promised.set(promised);
        self.metrics.memory_limit.set(limit);
        self.metrics.overload_level.set(level.into());
    }

    /// Connections that the kernel has refused for want of room since the last call: `mesh_kernel_refusals_total`.
    pub fn refused_in_kernel(&self, reason: &'static str, count: u64) {
        self.metrics.kernel_refusals.get_or_create(&[("reason", reason)]).inc_by(count);
    }

    /// Flows that the kernel has lost for want of room since the last call: `mesh_kernel_lost_total`.
    pub fn lost_in_kernel(&self, reason: &'static str, count: u64) {
        self.metrics.kernel_lost.get_or_create(&[("reason", reason)]).inc_by(count);
    }

    /// Packets that the kernel has dropped because they went around the agent, since the last call:
    /// `mesh_kernel_dropped_packets_total`.
    pub fn dropped_in_kernel(&self, reason: &'static str, count: u64) {
        self.metrics.kernel_dropped.get_or_create(&[("reason", reason)]).inc_by(count);
    }

    /// All certificates in use and when each expires: `mesh_certificates_expiry_seconds`, in seconds since 1970.
    pub fn set_certificates(&self, expiry: &[(SpiffeId, SystemTime)]) {
        self.metrics.certificates.set_workloads(expiry);
    }

    /// The roots and the certificate that signs, how many certificates are listed as revoked, and how many problems there
    /// are with the files of all these.
    pub fn set_trust(&self, authorities: Vec<AuthorityExpiry>, revoked: usize, problems: usize) {
        self.metrics.certificates.set_trust(authorities, revoked, problems);
    }

    /// What is known of all connections, for a process that takes over.
    pub fn known_flows(&self) -> Vec<KnownFlow> {
        self.facts.known()
    }

    /// What another process knows of a connection it keeps, until the guard is dropped.
    pub fn adopt_flow(&self, known: &KnownFlow) -> FlowGuard {
        self.facts.adopt(known)
    }

    /// All metrics as `OpenMetrics` text, the body of `/metrics`, with what agents before this one have counted and
    /// still count. May read files.
    pub fn exposition(&self) -> String {
        self.inherited.add_all(self.metrics.exposition())
    }

    /// From here on agents before this one leave their metrics in this directory.
    pub fn inherit_from(&self, dir: PathBuf) {
        self.inherited.set_dir(dir);
    }

    /// Leaves its metrics, and those it has inherited for good, to the agent that has taken over. `last`: there will be
    /// no others. Writes a file.
    ///
    /// # Errors
    /// Those of the file; the agent that has taken over may be gone too.
    pub fn leave_metrics(&self, dir: &Path, last: bool) -> io::Result<()> {
        if !last {
            std::fs::create_dir_all(dir)?;
        }
        self.inherited.leave(dir, self.metrics.exposition(), last)
    }

    /// Waits until the access log is written, at most `limit`; for the end of the process and for tests. Whether it
    /// was. Blocks its thread.
    pub fn flush(&self, limit: Duration) -> bool {
        self.log.flush(limit)
    }
}

/// The word of a kind in metrics.
pub fn word(kind: Kind) -> &'static str {
    kind.row().word
}
