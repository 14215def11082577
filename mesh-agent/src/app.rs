//! The composition root: every part of a role is made here, handed what it needs, and ended here in order.
//!
//! Nothing else uses this file. Signals are heard from the first moment, so that a start can be broken off and leaves
//! nothing; listeners are bound before anything is promised; the agent is ready when its first configuration is in force
//! and its pods are enrolled. Tested by the lab, which runs the real thing.

mod certificates;
mod clean;
mod cni;
mod controller;
mod flows;
mod gateway;
mod listeners;
mod operators;
mod overload;
mod ready;
mod removal;
mod remove;
mod source;
mod succession;
mod taint;

use std::{
    io,
    num::NonZeroUsize,
    path::Path,
    sync::{Arc, Weak},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use arc_swap::ArcSwap;
use nix::sys::signal::{
    SigSet,
    Signal::{SIGHUP, SIGINT, SIGTERM},
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing_subscriber::{EnvFilter, layer::SubscriberExt as _, reload, util::SubscriberInitExt as _};

pub use self::{
    certificates::ca,
    clean::clean,
    controller::{controller, token},
    gateway::gateway,
    ready::ready,
    remove::remove_agents,
};
use self::{
    certificates::open_authority,
    flows::{flows_of, report_flows},
    listeners::Listeners,
    operators::{Particulars, serve_operators, state},
    removal::Removal,
    source::From,
    succession::{Before, Leaving},
};
use crate::{
    admin::{LogLevel, NETNS_DIR, Readiness, RunDir},
    capture::{self, Capture, CaptureConfig, Losses, Outcome},
    config::NodeConfig,
    drain::Drain,
    enrolment::{Announcer, Ended, Enrolment, Events, Namespaces, put_in_force},
    handover::{self, Door, Offered, Place},
    identity::Authority,
    overload::Overload,
    proxy::{Mesh, checks::check_endpoints, health::watch_endpoints},
    report::Reporter,
    source::{Cluster, Sandboxes, Source, key_sets},
    state::{
        compile::{Netns, Settings},
        snapshot::Snapshot,
    },
    upstream::LocalPods,
    workers::{self, Threads, Workers},
};

/// How often the certificates' metrics are brought up to date besides at every change of the configuration.
const CERTIFICATES_EVERY: Duration = Duration::from_secs(15);

/// How often the kernel's counters of what it had no room for are read.
const LOSSES_EVERY: Duration = Duration::from_secs(1);

/// How long the end of the process waits for the last lines of the access log.
const LAST_LINES: Duration = Duration::from_secs(1);

/// The role was called in a way in which it cannot start: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NotStarted(String);

/// `mesh-agent node`: runs until SIGTERM or SIGINT.
pub fn node(config: NodeConfig, log: &str) -> Result<()> {
    let log_level = start_log(log)?;
    let from = From::find(&config.source, Cluster::is_around(), "agent")?;
    if !nix::unistd::geteuid().is_root() {
        return Err(NotStarted("capturing traffic takes root".to_owned()).into());
    }
    Signals::hold().context("holding signals back")?;
    // What watches, enrols and reports; connections have threads of their own.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(run_node(config, &from, log_level))
}

fn start_workers(number: Option<NonZeroUsize>) -> Result<(Workers, Threads)> {
    let cores = || std::thread::available_parallelism().context("counting the cores");
    let number = number.map_or_else(cores, Ok)?;
    workers::start(number).context("starting the threads that carry connections")
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
    /// To be called before there is a second thread. A signal that comes between here and [`Self::register`] waits: the runtime
    /// takes note of one a moment before anybody can be told of it.
    fn hold() -> nix::Result<()> {
        Self::all().thread_block()
    }

    /// On the thread that called [`Self::hold`], which from here on is the one that signals interrupt.
    fn register() -> io::Result<Self> {
        let registered = Self {
            hangup: signal(SignalKind::hangup())?,
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        };
        Self::all().thread_unblock()?;
        Ok(registered)
    }

    fn all() -> SigSet {
        [SIGHUP, SIGTERM, SIGINT].into_iter().collect()
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

async fn run_node(config: NodeConfig, from: &From, log_level: LogLevel) -> Result<()> {
    let mut signals = Signals::register().context("listening for signals")?;
    // Not before: any runtime takes note of a signal, and tells it to whoever listens by then.
    let (workers, _threads) = start_workers(config.workers)?;
    let mut begun = tokio::select! {
        biased;
        () = signals.until_told_to_stop(|| {}) => return Ok(()),
        begun = begin(&config, from) => begun?,
    };
    let of_mesh = (&*config.state_dir, &*config.trust_domain);
    let authority = open_authority(of_mesh, &config.ca, &config.certificates)?;
    let reporter = Arc::new(Reporter::new(config.access_log.into()).context("starting the access log")?);
    let capture = Arc::new(load_capture(&config, begun.before.as_mut())?);
    let ended = match start_capture(&capture, &mut begun, &config.bpf_dir, &reporter) {
        Ok(()) => {
            let parts = Parts {
                begun,
                authority,
                reporter: Arc::clone(&reporter),
                capture: Arc::clone(&capture),
                workers,
            };
            serve_pods(parts, &config, log_level, &mut signals).await
        }
        Err(error) => Err(error),
    };
    remove(capture)?;
    reporter.flush(LAST_LINES);
    ended
}

/// What leaves nothing behind when it is broken off: it is dropped in this order, the run directory being the last.
struct Begun {
    source: Source,
    /// The cluster it is of, if it is of one, and where its pods are.
    cluster: Option<(Cluster, Namespaces)>,
    listeners: Listeners,
    before: Option<Before>,
    run_dir: RunDir,
}

/// The configuration first, then what is bound, or offered by an agent that runs.
async fn begin(config: &NodeConfig, from: &From) -> Result<Begun> {
    let settings = Settings {
        trust_domain: config.trust_domain.as_str().into(),
        root_namespace: config.root_namespace.as_str().into(),
        node: Some(config.node.as_str().into()),
        netns: Netns::Annotation,
        gateway: None,
    };
    let cluster = from.cluster().await?;
    let (netns_dir, sandboxes) = (config.run_dir().join(NETNS_DIR), Sandboxes::default());
    let source = from.follow(cluster.as_ref(), settings, (&netns_dir, &sandboxes)).await?;
    let cluster = cluster.map(|cluster| (cluster, Namespaces::new(netns_dir, sandboxes)));
    // Nobody is served yet, and text that was read and compiled leaves most of its memory behind.
    tokio::task::block_in_place(capture::give_back_free_memory);
    let run_dir = RunDir::create(config.run_dir())?;
    let called = tokio::task::block_in_place(|| handover::call(&run_dir.handover_socket(), place(config)))
        .with_context(|| format!("taking over at {}", run_dir.handover_socket().display()))?;
    let Some((succession, Offered { lock, own, made_run_dir, pods })) = called else {
        let listeners = Listeners::bind(config.into()).await?;
        return Ok(Begun { source, cluster, listeners, before: None, run_dir });
    };
    let listeners = Listeners::take_over(config.into(), own).await?;
    let before = Some(Before { succession, lock: Some(lock), made_run_dir, pods });
    Ok(Begun { source, cluster, listeners, before, run_dir })
}

fn place(config: &NodeConfig) -> Place {
    let bpf_dir = std::path::absolute(&config.bpf_dir).unwrap_or_else(|_| config.bpf_dir.clone());
    Place { node: config.node.clone(), bpf_dir }
}

fn load_capture(config: &NodeConfig, before: Option<&mut Before>) -> Result<Capture> {
    let capture = CaptureConfig {
        cgroup_root: config.cgroup_root.clone(),
        pods_cgroup: config.pods_cgroup.clone(),
        kubelet_cgroup: config.kubelet_cgroup.clone(),
        node: config.node.clone(),
        bpf_dir: config.bpf_dir.clone(),
        ebpf_log: config.ebpf_log,
        when_agent_is_down: config.when_agent_is_down,
        tables: config.tables,
    };
    match before.and_then(|before| before.lock.take()) {
        Some(lock) => Capture::take_over(&capture, lock),
        None => Capture::load(&capture),
    }
}

fn start_capture(
    capture: &Arc<Capture>,
    begun: &mut Begun,
    bpf_dir: &Path,
    reporter: &Arc<Reporter>,
) -> Result<()> {
    if begun.before.is_none() {
        begun.run_dir.note_bpf_dir(bpf_dir).context("--run-dir")?;
    }
    tokio::task::block_in_place(|| capture.prove())?;
    tokio::spawn(report_losses(Arc::downgrade(capture), capture.losses()?, Arc::clone(reporter)));
    Ok(())
}

/// What a node serves with, once all of it is there.
struct Parts {
    begun: Begun,
    authority: Arc<Authority>,
    reporter: Arc<Reporter>,
    capture: Arc<Capture>,
    workers: Workers,
}

/// Serves the pods of this node until a signal says to stop, then lets them go; or until a successor serves them, and
/// then what is open here until it has ended. Holds nothing of the kernel's when it returns.
async fn serve_pods(
    parts: Parts,
    config: &NodeConfig,
    log_level: LogLevel,
    signals: &mut Signals,
) -> Result<()> {
    let Parts { begun, authority, reporter, capture, workers } = parts;
    let Begun { source, cluster, mut run_dir, listeners, before } = begun;
    let (memory, overload) = overload::measure(&config.overload)?;
    let mesh = mesh(config, &source, &capture, (Arc::clone(&reporter), overload, workers));
    overload::watch(memory, &mesh, &config.overload).context("watching memory")?;
    let snapshots = put_in_force(Arc::clone(&mesh), source.snapshots.clone());
    let drain = Drain::default();
    let mut enrolment =
        Enrolment::new(Arc::clone(&mesh), Arc::clone(&capture), Arc::clone(&authority), drain.clone());
    let client = cluster.as_ref().map(|(cluster, _)| cluster.client());
    let removal = Removal::new(client.clone(), config.cni.daemon_set.clone());
    let sandboxes = cluster.as_ref().map(|(_, namespaces)| namespaces.told().clone()).unwrap_or_default();
    if let Some((cluster, namespaces)) = cluster {
        let announcer = Announcer::start(cluster.client(), Arc::clone(&mesh.node), snapshots.clone());
        let events = Events::start(cluster.client(), &mesh.node);
        enrolment = enrolment.in_cluster(namespaces, announcer, events);
    }
    let keep_file = listeners.admin.keep_file();
    if let Some(before) = before
        && !succession::succeed(before, &mut enrolment, &mut run_dir, &keep_file, signals).await?
    {
        return Ok(());
    }
    follow(&mesh, &authority, &snapshots);
    tokio::spawn(report_flows(capture.closed_flows()?, Arc::clone(&mesh)));
    drop(capture);
    let door = open_door(&listeners, &run_dir, config)?;
    let enrolling = cni::Enrolling {
        mesh: Arc::clone(&mesh),
        failing: enrolment.failing(),
        snapshots: snapshots.clone(),
        rounds: enrolment.rounds(),
        sandboxes,
    };
    let plugin = cni::Plugin::start(config, &run_dir, enrolling)?;
    let readiness = Readiness::default();
    let enrolling = readiness.block("the pods of this node");
    let lifted = client.zip(config.cni.startup_taint.clone());
    let lifted = lifted.map(|(client, key)| taint::lift(client, config.node.clone(), key, readiness.clone()));
    let _lifted = lifted.map(|lifted| AbortOnDropHandle::new(tokio::spawn(lifted)));
    reporter.show_endpoints(snapshots.clone(), config.endpoint_metrics);
    let (failing, shown) = (enrolment.failing(), Arc::clone(&mesh));
    let particulars = Particulars {
        pods: Arc::new(move || failing.view(&shown)),
        flows: flows_of(config.bpf_dir.clone(), Arc::clone(&mesh)),
        problems: Arc::new(Vec::new),
    };
    let state = state((&snapshots, &source.problems), &mesh, authority, particulars, (readiness, log_level));
    let stop = CancellationToken::new();
    let operators = serve_operators(listeners, state, &stop);
    let mut enrolled = tokio::spawn(enrolment.run(snapshots.clone(), enrolling, config.drain_deadline, door));
    tracing::info!(node = config.node, "agent started");
    let ended = tokio::select! {
        () = signals.until_told_to_stop(|| source.reread.reread()) => {
            if !removal.is_for_good().await {
                removal::finish(&mesh, config.drain_deadline).await;
                leave_all_to_the_next(&reporter);
            }
            drain.leave();
            enrolled.await
        }
        ended = &mut enrolled => ended,
    };
    let ended = ended.context("enrolment failed")?;
    if let Some(plugin) = plugin {
        plugin.end(matches!(ended, Ended::Left)).await;
    }
    let leaving = match ended {
        Ended::Left => None,
        Ended::HandedOver(enrolment, asked) => {
            keep_file.set(true);
            let leaving = Leaving { enrolment, asked, snapshots, mesh, drain, metrics: run_dir.let_go() };
            leaving.leave_metrics(false).await;
            Some(leaving)
        }
    };
    stop.cancel();
    // The admin socket goes with its listener.
    let _ = operators.await;
    if let Some(leaving) = leaving {
        leaving.until_nothing_is_open(config.handover_deadline, signals).await;
    }
    Ok(())
}

fn mesh(
    config: &NodeConfig,
    source: &Source,
    capture: &Capture,
    (reporter, overload, workers): (Arc<Reporter>, Arc<Overload>, Workers),
) -> Arc<Mesh> {
    Arc::new(Mesh {
        node: config.node.as_str().into(),
        snapshot: ArcSwap::new(Arc::clone(&source.snapshots.borrow())),
        pods: LocalPods::default(),
        reporter,
        limits: config.http,
        path_normalization: config.path_normalization,
        direct: config.direct,
        endpoints: capture.endpoints(),
        overload,
        carrier_interval: config.carrier_interval,
        workers,
    })
}

/// Starts what follows the configuration beside the enrolment: key sets, health checks, figures of endpoints.
fn follow(mesh: &Arc<Mesh>, authority: &Arc<Authority>, snapshots: &watch::Receiver<Arc<Snapshot>>) {
    let certified = Arc::clone(authority);
    let connect = move || {
        let certified = Arc::clone(&certified);
        async move { certified.call().await }
    };
    tokio::spawn(key_sets::run(connect, snapshots.clone()));
    tokio::spawn(check_endpoints(Arc::clone(mesh), snapshots.clone()));
    tokio::spawn(watch_endpoints(Arc::clone(&mesh.reporter), snapshots.clone()));
}

/// Ends the process as a crash would, with everything in the kernel as it is: the next agent of the node takes it over, and
/// until then the pods' own policy holds.
fn leave_all_to_the_next(reporter: &Reporter) -> ! {
    tracing::info!("agent stopped; what it has in the kernel waits for the next one of this node");
    reporter.flush(LAST_LINES);
    std::process::exit(0)
}

fn open_door(listeners: &Listeners, run_dir: &RunDir, config: &NodeConfig) -> Result<Door> {
    let path = run_dir.handover_socket();
    let own = listeners.share().context("sharing the agent's own listeners")?;
    Door::open(&path, place(config), own, run_dir.is_made())
        .with_context(|| format!("listening on {}", path.display()))
}

/// With a directory of manifests nothing else can take over later: unless a successor has, the agent takes everything
/// with it.
fn remove(capture: Arc<Capture>) -> Result<()> {
    let ours = capture.is_ours();
    Arc::into_inner(capture).ok_or_else(|| anyhow!("capture is still in use"))?.remove()?;
    if ours {
        tracing::info!("agent stopped; nothing of it is left in the kernel");
    } else {
        tracing::info!("agent stopped; what is in the kernel is another agent's");
    }
    Ok(())
}

/// What the kernel has no room for is seen in metrics and log. Ends with the process.
async fn report_losses(capture: Weak<Capture>, mut losses: Losses, reporter: Arc<Reporter>) {
    let mut tick = tokio::time::interval(LOSSES_EVERY);
    loop {
        tick.tick().await;
        let since = match losses.since() {
            Ok(since) => since,
            Err(error) => {
                return tracing::error!(error = format!("{error:#}"), "losses are not counted any more");
            }
        };
        // While two agents share the kernel's counters, one of them counts.
        let Some(capture) = capture.upgrade() else { return };
        if !capture.is_ours() {
            continue;
        }
        for (reason, count) in since {
            match reason.outcome {
                Outcome::Refused => reporter.refused_in_kernel(reason.word, count),
                Outcome::Lost => reporter.lost_in_kernel(reason.word, count),
                Outcome::Dropped => reporter.dropped_in_kernel(reason.word, count),
            }
        }
    }
}
