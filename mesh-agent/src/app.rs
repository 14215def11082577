//! The composition root: every part of a role is made here, handed what it needs, and ended here in order.
//!
//! Nothing else uses this file. Signals are heard from the first moment, so that a start can be broken off and leaves
//! nothing; listeners are bound before anything is promised; the agent is ready when its first configuration is in force
//! and its pods are enrolled. Tested by the lab, which runs the real thing.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use arc_swap::ArcSwap;
use mesh_common::flow::FlowRecord;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::{EnvFilter, layer::SubscriberExt as _, reload, util::SubscriberInitExt as _};

use crate::{
    admin::{self, CertificateView, LogLevel, Readiness, RunDir},
    capture::{self, Capture, CaptureConfig, Losses, Outcome, inspect},
    config::{BPF_DIR, CleanConfig, NodeConfig},
    drain::Drain,
    enrolment::Enrolment,
    identity::{Authority, CertificateInfo},
    proxy::Mesh,
    report::{Clock, Context as FlowContext, FlowView, Reporter, Side, join},
    source::{self, Source},
    state::snapshot::{Snapshot, Workload},
    upstream::LocalPods,
};

/// How often the certificates' metrics are brought up to date besides at every change of the configuration.
const CERTIFICATES_EVERY: Duration = Duration::from_secs(15);

/// How often the kernel's counters of what it had no room for are read.
const LOSSES_EVERY: Duration = Duration::from_secs(1);

/// Ended flows joined at once.
const CLOSED_AT_ONCE: usize = 1024;

/// How long the end of the process waits for the last lines of the access log.
const LAST_LINES: Duration = Duration::from_secs(1);

/// The role was called in a way in which it cannot start: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NotStarted(String);

/// `mesh-agent node`: runs until SIGTERM or SIGINT.
pub fn node(config: NodeConfig, log: &str) -> Result<()> {
    let log_level = start_log(log)?;
    let Some(dir) = config.config.clone() else {
        let text = "nothing to configure the agent from: looked for --config DIR and MESH_CONFIG";
        return Err(NotStarted(text.to_owned()).into());
    };
    if !nix::unistd::geteuid().is_root() {
        return Err(NotStarted("capturing traffic takes root".to_owned()).into());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(run_node(config, &dir, log_level))
}

/// `mesh-agent clean`.
pub fn clean(config: &CleanConfig) -> Result<()> {
    let run_dir = config.run_dir();
    let noted = || admin::noted_bpf_dir(&run_dir);
    let bpf_dir = config.bpf_dir.clone().or_else(noted).unwrap_or_else(|| PathBuf::from(BPF_DIR));
    capture::clean(&bpf_dir)?;
    admin::clean_run_dir(&run_dir).with_context(|| format!("removing {}", run_dir.display()))
}

fn start_log(filter: &str) -> Result<LogLevel> {
    let filter: EnvFilter = filter.parse().map_err(|error| NotStarted(format!("--log {filter}: {error}")))?;
    let (filter, handle) = reload::Layer::new(filter);
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_ansi(false);
    tracing_subscriber::registry().with(filter).with(lines).init();
    Ok(LogLevel::of(handle))
}

/// What ends the agent, and what has it read its configuration again. Registered before there is anything to end.
struct Signals {
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn register() -> io::Result<Self> {
        Ok(Self {
            hangup: signal(SignalKind::hangup())?,
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// SIGHUP reads the configuration again; SIGTERM and SIGINT end the agent.
    async fn until_told_to_stop(&mut self, reread: impl Fn()) {
        loop {
            tokio::select! {
                Some(()) = self.hangup.recv() => reread(),
                Some(()) = self.terminate.recv() => return,
                Some(()) = self.interrupt.recv() => return,
            }
        }
    }
}

/// What was bound before the kernel was touched: an address that is taken stops the start.
struct Listeners {
    admin: admin::Listener,
    metrics: admin::Listener,
    readiness: admin::Listener,
}

impl Listeners {
    async fn bind(config: &NodeConfig) -> Result<Self> {
        Ok(Self {
            admin: admin::Listener::bind_admin(&config.admin()).await?,
            metrics: admin::Listener::bind(config.metrics).await?,
            readiness: admin::Listener::bind(config.readiness).await?,
        })
    }
}

async fn run_node(config: NodeConfig, dir: &Path, log_level: LogLevel) -> Result<()> {
    let mut signals = Signals::register().context("listening for signals")?;
    let (source, mut run_dir, listeners) = tokio::select! {
        biased;
        () = signals.until_told_to_stop(|| {}) => return Ok(()),
        begun = begin(&config, dir) => begun?,
    };
    let authority = Authority::open(&config.state_dir, &config.trust_domain)
        .with_context(|| format!("--state-dir {}", config.state_dir.display()))?;
    let reporter = Arc::new(Reporter::new(config.access_log.into()).context("starting the access log")?);
    let capture = Capture::load(&CaptureConfig {
        cgroup_root: config.cgroup_root.clone(),
        pods_cgroup: config.pods_cgroup.clone(),
        bpf_dir: config.bpf_dir.clone(),
        ebpf_log: config.ebpf_log,
        when_agent_is_down: config.when_agent_is_down,
        tables: config.tables,
    })?;
    let noted = run_dir.note_bpf_dir(&config.bpf_dir).context("--run-dir");
    let started = noted.and_then(|()| start_capture(&capture, &reporter));
    let capture = Arc::new(capture);
    let ended = match started {
        Ok(closed) => {
            let parts = Parts {
                source,
                listeners,
                authority: Arc::new(authority),
                reporter: Arc::clone(&reporter),
                capture: Arc::clone(&capture),
                closed,
            };
            serve_pods(parts, &config, log_level, &mut signals).await
        }
        Err(error) => Err(error),
    };
    remove(capture)?;
    reporter.flush(LAST_LINES);
    tracing::info!("agent stopped; nothing of it is left in the kernel");
    ended
}

/// Everything that leaves nothing behind when it is broken off: the configuration first, then what is bound.
async fn begin(config: &NodeConfig, dir: &Path) -> Result<(Source, RunDir, Listeners)> {
    let source = source::directory(dir.to_path_buf(), config.trust_domain.as_str().into()).await?;
    let run_dir = RunDir::create(config.run_dir())?;
    let listeners = Listeners::bind(config).await?;
    Ok((source, run_dir, listeners))
}

fn start_capture(capture: &Capture, reporter: &Arc<Reporter>) -> Result<mpsc::Receiver<FlowRecord>> {
    tokio::task::block_in_place(|| capture.prove())?;
    tokio::spawn(report_losses(capture.losses()?, Arc::clone(reporter)));
    capture.closed_flows()
}

/// What a node serves with, once all of it is there.
struct Parts {
    source: Source,
    listeners: Listeners,
    authority: Arc<Authority>,
    reporter: Arc<Reporter>,
    capture: Arc<Capture>,
    closed: mpsc::Receiver<FlowRecord>,
}

/// Serves the pods of this node until a signal says to stop, then lets them go. Holds nothing of the kernel's when it
/// returns.
async fn serve_pods(
    parts: Parts,
    config: &NodeConfig,
    log_level: LogLevel,
    signals: &mut Signals,
) -> Result<()> {
    let Parts { source, listeners, authority, reporter, capture, closed } = parts;
    let Source { snapshots, problems, reread, counts: _ } = source;
    let readiness = Readiness::default();
    let enrolling = readiness.block("the pods of this node");
    let mesh = Arc::new(Mesh {
        node: config.node.as_str().into(),
        snapshot: ArcSwap::new(Arc::clone(&snapshots.borrow())),
        pods: LocalPods::default(),
        reporter: Arc::clone(&reporter),
        limits: config.http,
        carrier_interval: config.carrier_interval,
    });
    tokio::spawn(report_closed_flows(closed, Arc::clone(&mesh)));
    tokio::spawn(keep_gauges(
        snapshots.clone(),
        problems.clone(),
        Arc::clone(&authority),
        Arc::clone(&reporter),
    ));
    let drain = Drain::default();
    let enrolment = Enrolment::new(Arc::clone(&mesh), capture, Arc::clone(&authority), drain.clone());
    let (failing, shown) = (enrolment.failing(), Arc::clone(&mesh));
    let state = admin::State {
        version: env!("CARGO_PKG_VERSION"),
        readiness,
        snapshot: snapshots.clone(),
        problems: Arc::new(move || problems.borrow().iter().map(ToString::to_string).collect()),
        pods: Arc::new(move || failing.view(&shown)),
        flows: flows_of(config.bpf_dir.clone(), mesh),
        reporter,
        certificates: certificates_of(authority),
        log_level,
    };
    let stop = CancellationToken::new();
    let operators = serve_operators(listeners, state, &stop);
    let enrolled = tokio::spawn(enrolment.run(snapshots, enrolling, config.drain_deadline));
    tracing::info!(node = config.node, "agent started");
    signals.until_told_to_stop(|| reread.reread()).await;
    drain.start();
    let left = enrolled.await.context("enrolment failed");
    stop.cancel();
    // The admin socket goes with its listener.
    let _ = operators.await;
    left
}

/// With a directory of manifests nothing else can take over: the agent takes everything with it.
fn remove(capture: Arc<Capture>) -> Result<()> {
    Arc::into_inner(capture).ok_or_else(|| anyhow!("capture is still in use"))?.remove()
}

/// Serves until `stop`; what is returned ends when the operator's endpoint is gone.
fn serve_operators(listeners: Listeners, state: admin::State, stop: &CancellationToken) -> JoinHandle<()> {
    tokio::spawn(admin::serve_metrics(listeners.metrics, Arc::clone(&state.reporter), stop.clone()));
    tokio::spawn(admin::serve_readiness(listeners.readiness, state.readiness.clone(), stop.clone()));
    tokio::spawn(admin::serve_admin(listeners.admin, state, stop.clone()))
}

fn flows_of(bpf_dir: PathBuf, mesh: Arc<Mesh>) -> admin::Read<Result<Vec<FlowView>>> {
    Arc::new(move || {
        let mut records = inspect::read_flows(&bpf_dir)?;
        capture::bring_up_to_date(&mut records, mesh.pods.all().values().map(|pod| &**pod.net()));
        Ok(views(&records, &mesh))
    })
}

fn views(records: &[FlowRecord], mesh: &Mesh) -> Vec<FlowView> {
    let snapshot = mesh.snapshot();
    let pods: HashMap<u64, Arc<Workload>> =
        mesh.pods.all().values().filter_map(|pod| Some((pod.net().cookie()?, pod.workload()))).collect();
    let context = FlowContext {
        snapshot: &snapshot,
        pod_of: &|cookie| pods.get(&cookie).cloned(),
        facts: &|pod: &Workload, side: Side, client: SocketAddr| mesh.reporter.facts(pod, side, client),
        clock: Clock::now(),
    };
    records.iter().map(|record| join(record, &context)).collect()
}

async fn report_closed_flows(mut closed: mpsc::Receiver<FlowRecord>, mesh: Arc<Mesh>) {
    let mut records = Vec::new();
    while closed.recv_many(&mut records, CLOSED_AT_ONCE).await > 0 {
        for flow in views(&records, &mesh) {
            mesh.reporter.flow_closed(flow);
        }
        records.clear();
    }
}

/// What the kernel has no room for is seen in metrics and log. Ends with the process.
async fn report_losses(mut losses: Losses, reporter: Arc<Reporter>) {
    let mut tick = tokio::time::interval(LOSSES_EVERY);
    loop {
        tick.tick().await;
        let since = match losses.since() {
            Ok(since) => since,
            Err(error) => {
                return tracing::error!(error = format!("{error:#}"), "losses are not counted any more");
            }
        };
        for (reason, count) in since {
            match reason.outcome {
                Outcome::Refused => reporter.refused_in_kernel(reason.word, count),
                Outcome::Lost => reporter.lost_in_kernel(reason.word, count),
            }
        }
    }
}

fn certificates_of(authority: Arc<Authority>) -> admin::Read<Vec<CertificateView>> {
    Arc::new(move || authority.certificates().into_iter().map(certificate_view).collect())
}

fn certificate_view(certificate: CertificateInfo) -> CertificateView {
    let written = |at: OffsetDateTime| at.format(&Rfc3339).unwrap_or_else(|_| at.to_string());
    CertificateView {
        identity: certificate.identity.to_string(),
        serial: certificate.serial,
        not_before: written(certificate.not_before),
        not_after: written(certificate.not_after),
        expires_in_seconds: (certificate.not_after - OffsetDateTime::now_utc()).whole_seconds(),
    }
}

/// Gauges that follow the configuration and the certificates.
async fn keep_gauges(
    mut snapshots: watch::Receiver<Arc<Snapshot>>,
    problems: watch::Receiver<Arc<[crate::state::Problem]>>,
    authority: Arc<Authority>,
    reporter: Arc<Reporter>,
) {
    loop {
        let revision = snapshots.borrow_and_update().revision;
        reporter.set_config(revision, problems.borrow().len());
        let expiry: Vec<_> = authority
            .certificates()
            .into_iter()
            .map(|certificate| (certificate.identity, certificate.not_after.into()))
            .collect();
        reporter.set_certificates(&expiry);
        tokio::select! {
            changed = snapshots.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(CERTIFICATES_EVERY) => {}
        }
    }
}
