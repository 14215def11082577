//! The composition root: every part of a role is made here, handed what it needs, and ended here in order.
//!
//! Nothing else uses this file. Listeners are bound before anything is promised; the agent is ready when its first
//! configuration is in force and its pods are enrolled. Tested by the lab, which runs the real thing.

use std::{collections::HashMap, io, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, anyhow};
use arc_swap::ArcSwap;
use mesh_common::flow::FlowRecord;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::{EnvFilter, layer::SubscriberExt as _, reload, util::SubscriberInitExt as _};

use crate::{
    admin::{self, CertificateView, LogLevel, Readiness},
    capture::{self, Capture, CaptureConfig, inspect},
    config::{CleanConfig, NodeConfig},
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
    capture::clean(&config.bpf_dir)?;
    match &config.run_dir {
        Some(dir) => match std::fs::remove_dir_all(dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("removing {}", dir.display()))
            }
            _ => Ok(()),
        },
        None => Ok(()),
    }
}

fn start_log(filter: &str) -> Result<LogLevel> {
    let filter: EnvFilter = filter.parse().map_err(|error| NotStarted(format!("--log {filter}: {error}")))?;
    let (filter, handle) = reload::Layer::new(filter);
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_ansi(false);
    tracing_subscriber::registry().with(filter).with(lines).init();
    Ok(LogLevel::of(handle))
}

/// What was bound before anything else: an address that is taken stops the start.
struct Listeners {
    admin: admin::Listener,
    metrics: admin::Listener,
    readiness: admin::Listener,
}

async fn run_node(config: NodeConfig, dir: &Path, log_level: LogLevel) -> Result<()> {
    let listeners = Listeners {
        admin: admin::Listener::bind_admin(&config.admin()).await?,
        metrics: admin::Listener::bind(config.metrics).await?,
        readiness: admin::Listener::bind(config.readiness).await?,
    };
    let readiness = Readiness::default();
    let enrolling = readiness.block("the pods of this node");
    let reporter = Arc::new(Reporter::new(config.access_log.into()).context("starting the access log")?);
    let Source { snapshots, problems, reread, counts: _ } =
        source::directory(dir.to_path_buf(), config.trust_domain.as_str().into()).await?;
    let authority = Authority::open(&config.state_dir, &config.trust_domain)
        .with_context(|| format!("--state-dir {}", config.state_dir.display()))?;
    let authority = Arc::new(authority);
    let capture = Capture::load(&CaptureConfig {
        cgroup_root: config.cgroup_root.clone(),
        bpf_dir: config.bpf_dir.clone(),
        ebpf_log: config.ebpf_log,
    })?;
    let started = start_capture(&capture);
    let capture = Arc::new(capture);
    let ended = match started {
        Ok(closed) => {
            let mesh = Arc::new(Mesh {
                node: config.node.as_str().into(),
                snapshot: ArcSwap::new(Arc::clone(&snapshots.borrow())),
                pods: LocalPods::default(),
                reporter: Arc::clone(&reporter),
            });
            tokio::spawn(report_closed_flows(closed, Arc::clone(&mesh)));
            tokio::spawn(keep_gauges(
                snapshots.clone(),
                problems.clone(),
                Arc::clone(&authority),
                Arc::clone(&reporter),
            ));
            let stop = CancellationToken::new();
            let shown = Arc::clone(&mesh);
            let state = admin::State {
                version: env!("CARGO_PKG_VERSION"),
                readiness: readiness.clone(),
                snapshot: snapshots.clone(),
                problems: Arc::new(move || problems.borrow().iter().map(ToString::to_string).collect()),
                flows: flows_of(config.bpf_dir.clone(), shown),
                reporter: Arc::clone(&reporter),
                certificates: certificates_of(Arc::clone(&authority)),
                log_level,
            };
            serve_operators(listeners, state, &stop);
            let drain = Drain::default();
            let enrolment = Enrolment::new(mesh, Arc::clone(&capture), authority, drain.clone());
            let enrolled = tokio::spawn(enrolment.run(snapshots, enrolling, config.drain_deadline));
            tracing::info!(node = config.node, config = %dir.display(), "agent started");
            let signalled = until_told_to_stop(&reread).await;
            drain.start();
            enrolled.await.context("enrolment failed")?;
            stop.cancel();
            signalled
        }
        Err(error) => Err(error),
    };
    remove(capture)?;
    reporter.flush(LAST_LINES);
    tracing::info!("agent stopped; nothing of it is left in the kernel");
    ended
}

fn start_capture(capture: &Capture) -> Result<mpsc::Receiver<FlowRecord>> {
    tokio::task::block_in_place(|| capture.prove())?;
    capture.closed_flows()
}

/// With a directory of manifests nothing else can take over: the agent takes everything with it.
fn remove(capture: Arc<Capture>) -> Result<()> {
    Arc::into_inner(capture).ok_or_else(|| anyhow!("capture is still in use"))?.remove()
}

fn serve_operators(listeners: Listeners, state: admin::State, stop: &CancellationToken) {
    tokio::spawn(admin::serve_metrics(listeners.metrics, Arc::clone(&state.reporter), stop.clone()));
    tokio::spawn(admin::serve_readiness(listeners.readiness, state.readiness.clone(), stop.clone()));
    tokio::spawn(admin::serve_admin(listeners.admin, state, stop.clone()));
}

/// SIGHUP reads the configuration again; SIGTERM and SIGINT end the agent.
async fn until_told_to_stop(reread: &source::Reread) -> Result<()> {
    let mut hangup = signal(SignalKind::hangup())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    loop {
        tokio::select! {
            Some(()) = hangup.recv() => reread.reread(),
            Some(()) = terminate.recv() => return Ok(()),
            Some(()) = interrupt.recv() => return Ok(()),
        }
    }
}

fn flows_of(bpf_dir: std::path::PathBuf, mesh: Arc<Mesh>) -> admin::Read<Result<Vec<FlowView>>> {
    Arc::new(move || {
        let records = inspect::read_flows(&bpf_dir)?;
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
