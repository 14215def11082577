//! What the agent shows of itself over HTTP: to the operator (`/config_dump`, `/endpoints`, `/pods`, `/flows`,
//! `/certs`, `/logging`, `/overload`, `/version`, `/healthz`), to Prometheus (`/metrics`) and to the kubelet (`/healthz/ready`).
//!
//! Promises that the operator's endpoints are reachable by this machine's administrator alone (a 0600 unix socket, or
//! loopback when asked for). Never changes anything but the log level. Binding is in `listen.rs`, the directory of the
//! socket in `run_dir.rs`, serving in `serve.rs`, answers in `answer.rs`. Tested in `tests.rs` over real sockets.

mod answer;
mod dump;
mod endpoints;
mod health;
mod listen;
mod run_dir;
mod serve;
#[cfg(test)]
pub(crate) mod tests;

use std::{convert::Infallible, fmt, sync::Arc};

use http::{Request, Response};
use hyper::body::Incoming;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::{EnvFilter, reload};

pub use self::{
    endpoints::EndpointView,
    health::{BlockReady, Readiness},
    listen::{Address, AddressError, HANDOVER_SOCKET, KeepFile, Listener, SOCKET_NAME, Socket},
    run_dir::{
        CNI_INSTALLED, CNI_NAMESPACES, CNI_SOCKET, NETNS_DIR, RunDir, clean_run_dir, is_answered,
        noted_bpf_dir, run_dir_files,
    },
    serve::Reply,
};
use crate::{
    report::{FlowView, Reporter},
    state::snapshot::Snapshot,
};

/// What reads something of another room when asked.
pub type Read<T> = Arc<dyn Fn() -> T + Send + Sync>;

/// What the operator's endpoints show; handed in by whoever composes the agent.
#[derive(Clone)]
pub struct State {
    /// Version of the agent.
    pub version: &'static str,
    /// What the agent waits for.
    pub readiness: Readiness,
    /// The configuration in force.
    pub snapshot: watch::Receiver<Arc<Snapshot>>,
    /// Problems in the configuration: file, object and field, and what is wrong.
    pub problems: Read<Vec<String>>,
    /// All flows of this node now. Called on a thread where it may block.
    pub flows: Read<anyhow::Result<Vec<FlowView>>>,
    /// The pods of this node, enrolled and failing.
    pub pods: Read<PodsView>,
    /// Memory in use, and who is refused new work for want of it.
    pub overload: Read<OverloadView>,
    /// For those who follow flows.
    pub reporter: Arc<Reporter>,
    /// Certificates in use.
    pub certificates: Read<Vec<CertificateView>>,
    /// The log level.
    pub log_level: LogLevel,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State")
            .field("version", &self.version)
            .field("readiness", &self.readiness)
            .finish_non_exhaustive()
    }
}

/// One certificate in use, as `/certs` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateView {
    /// What it is for: `root`, `signing`, or `workload`.
    #[serde(default = "CertificateView::workload")]
    pub role: String,
    /// The SPIFFE identity it proves, or the subject of an authority.
    pub identity: String,
    /// Serial number, hexadecimal.
    pub serial: String,
    /// Valid from, RFC 3339 in UTC.
    pub not_before: String,
    /// Valid until, RFC 3339 in UTC.
    pub not_after: String,
    /// Seconds until it expires; negative once it has.
    pub expires_in_seconds: i64,
}

impl CertificateView {
    /// The role of a pod's certificate.
    pub const WORKLOAD: &str = "workload";

    fn workload() -> String {
        Self::WORKLOAD.to_owned()
    }
}

/// `/pods`: the pods of this node that the configuration enrols.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodsView {
    /// Name of the node.
    pub node: String,
    /// Pods whose traffic is captured now, `namespace/name`, in order.
    pub enrolled: Vec<String>,
    /// Pods that cannot be enrolled now; each is tried again.
    pub failing: Vec<FailingPod>,
}

/// A pod that cannot be enrolled.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FailingPod {
    /// `namespace/name`.
    pub pod: String,
    /// What stands in the way.
    pub reason: String,
}

/// `/overload`: memory in use, and who is refused new work for want of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OverloadView {
    /// `none`, `high` (pods that hold most are refused new work) or `critical` (all are).
    pub level: String,
    /// Bytes in use; 0 where there is no limit.
    pub memory_bytes: u64,
    /// Bytes that will be used on top by what is under way.
    pub memory_promised_bytes: u64,
    /// Bytes that may be used, if there is a limit.
    pub memory_limit_bytes: Option<u64>,
    /// Pods of this node that are refused new work now, `namespace/name`, in order.
    pub shed: Vec<String>,
}

/// `/version`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionView {
    /// `mesh-agent`.
    pub component: String,
    /// Its version.
    pub version: String,
}

/// `/healthz`, and the body of `/healthz/ready`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthView {
    /// Whether the agent serves.
    pub ready: bool,
    /// What it waits for until it does.
    pub waiting_for: Vec<String>,
}

/// One line of `/flows?follow=true`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FlowEvent {
    /// A flow: first all there are, then each that ends.
    Flow(Box<FlowView>),
    /// All there were have been told.
    Listed,
    /// So many ended flows were not told: the reader was too slow.
    Lost(u64),
}

type Set = Arc<dyn Fn(&str) -> Result<(), String> + Send + Sync>;

/// Shows and sets what is logged, in the syntax of `RUST_LOG`.
#[derive(Clone)]
pub struct LogLevel {
    show: Read<String>,
    set: Set,
}

impl fmt::Debug for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LogLevel").field(&(self.show)()).finish()
    }
}

impl LogLevel {
    /// From functions that show and set it; `set` says in a sentence what is wrong with its argument.
    pub fn new(
        show: impl Fn() -> String + Send + Sync + 'static,
        set: impl Fn(&str) -> Result<(), String> + Send + Sync + 'static,
    ) -> Self {
        Self { show: Arc::new(show), set: Arc::new(set) }
    }

    /// From the handle of the filter that the agent logs through.
    pub fn of<S: 'static>(filter: reload::Handle<EnvFilter, S>) -> Self {
        let shown = filter.clone();
        Self::new(
            move || shown.with_current(ToString::to_string).unwrap_or_else(|error| error.to_string()),
            move |level| {
                let parsed = EnvFilter::builder().parse(level).map_err(|error| error.to_string())?;
                filter.reload(parsed).map_err(|error| error.to_string())
            },
        )
    }
}

/// Serves the operator's endpoints until `stop`.
pub async fn serve_admin(listener: Listener, state: State, stop: CancellationToken) {
    let tcp = listener.is_tcp();
    let follow = stop.clone();
    let answer = move |request: Request<Incoming>| {
        let (state, follow) = (state.clone(), follow.clone());
        async move { Ok::<Response<Reply>, Infallible>(answer::admin(&request, tcp, &state, &follow).await) }
    };
    serve::serve(listener, answer, stop).await;
}

/// Serves `/metrics` until `stop`.
pub async fn serve_metrics(listener: Listener, reporter: Arc<Reporter>, stop: CancellationToken) {
    let answer = move |request: Request<Incoming>| {
        let reporter = reporter.clone();
        async move { Ok::<Response<Reply>, Infallible>(answer::metrics(&request, reporter).await) }
    };
    serve::serve(listener, answer, stop).await;
}

/// Serves `/healthz/ready` until `stop`: 200 when ready, else 503 with the reasons.
pub async fn serve_readiness(listener: Listener, readiness: Readiness, stop: CancellationToken) {
    let answer = move |request: Request<Incoming>| {
        let readiness = readiness.clone();
        async move { Ok::<Response<Reply>, Infallible>(answer::ready(&request, &readiness)) }
    };
    serve::serve(listener, answer, stop).await;
}
