//! `mesh-agent gateway`: its parts, put together and ended in order.
//!
//! Ready once the configuration knows its pod, the pod's certificate is there, and the ports of its `Gateway`s are bound; none of
//! that ends the process where it fails. Touches nothing in the kernel. Tested in the lab (`tests/tests/gateway/`).

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use arc_swap::ArcSwap;
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{
    LAST_LINES, Signals,
    certificates::open_authority,
    follow,
    listeners::Listeners,
    operators::{Particulars, serve_operators, state},
    overload,
    source::From,
    start_log, start_workers,
};
use crate::{
    admin::{BlockReady, LogLevel, NETNS_DIR, PodsView, Readiness, RunDir},
    capture::{self, Endpoints, PodNet},
    config::GatewayConfig,
    drain::Drain,
    enrolment::{as_gateway, connections_of_a_pod, put_in_force, update_pod},
    identity::{Authority, WorkloadIdentity},
    proxy::{
        Mesh,
        gateway::{Failing, Ports},
    },
    report::Reporter,
    source::{Cluster, Sandboxes, Source},
    state::{
        compile::{GatewayPod, Netns, Settings},
        snapshot::{Snapshot, Workload},
    },
    upstream::{LocalPods, Pod, PodLimits, PodName},
};

/// How long one question for the gateway's certificate may take, and the pause between two.
const CERTIFICATE_PATIENCE: Duration = Duration::from_secs(5);
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// `mesh-agent gateway`: runs until SIGTERM or SIGINT.
pub fn gateway(config: GatewayConfig, log: &str) -> Result<()> {
    let log_level = start_log(log)?;
    let from = From::find(&config.source, Cluster::is_around(), "gateway")?;
    Signals::hold().context("holding signals back")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(run(config, &from, log_level))
}

async fn run(config: GatewayConfig, from: &From, log_level: LogLevel) -> Result<()> {
    let mut signals = Signals::register().context("listening for signals")?;
    let (workers, _threads) = start_workers(config.workers)?;
    let (source, run_dir, listeners) = tokio::select! {
        biased;
        () = signals.until_told_to_stop(|| {}) => return Ok(()),
        begun = begin(&config, from) => begun?,
    };
    let of_mesh = (&*config.state_dir, &*config.trust_domain);
    let authority = open_authority(of_mesh, &config.ca, &config.certificates)?;
    let reporter = Arc::new(Reporter::new(config.access_log.into()).context("starting the access log")?);
    let (memory, overload) = overload::measure(&config.overload)?;
    let mesh = Arc::new(Mesh {
        // Its pod is on a node, whose other pods it reaches as those of any node: none is its own to serve.
        node: "".into(),
        snapshot: ArcSwap::new(Arc::clone(&source.snapshots.borrow())),
        pods: LocalPods::default(),
        reporter: Arc::clone(&reporter),
        limits: config.http,
        path_normalization: config.path_normalization,
        direct: false,
        endpoints: Arc::new(Endpoints::default()),
        overload,
        // No pod is carried to: all are others'.
        carrier_interval: Duration::from_mins(1),
        workers,
    });
    overload::watch(memory, &mesh, &config.overload).context("watching memory")?;
    let snapshots = put_in_force(Arc::clone(&mesh), source.snapshots.clone());
    follow(&mesh, &authority, &snapshots);
    reporter.show_endpoints(snapshots.clone(), config.endpoint_metrics);
    let (readiness, stop) = (Readiness::default(), Drain::default());
    let serving = Serving { config, mesh, authority, snapshots, readiness, stop };
    let ended = serving.until_told_to_stop(&source, listeners, log_level, &mut signals).await;
    drop(run_dir);
    reporter.flush(LAST_LINES);
    tracing::info!("gateway stopped");
    ended
}

/// The configuration first, then what is bound.
async fn begin(config: &GatewayConfig, from: &From) -> Result<(Source, RunDir, Listeners)> {
    let pod = GatewayPod { namespace: (&*config.pod.namespace).into(), name: (&*config.pod.name).into() };
    let settings = Settings {
        trust_domain: config.trust_domain.as_str().into(),
        root_namespace: config.root_namespace.as_str().into(),
        node: config.node.as_deref().map(Into::into),
        netns: Netns::Annotation,
        gateway: Some(pod),
    };
    let cluster = from.cluster().await?;
    let (netns_dir, sandboxes) = (config.run_dir().join(NETNS_DIR), Sandboxes::default());
    let source = from.follow(cluster.as_ref(), settings, (&netns_dir, &sandboxes)).await?;
    tokio::task::block_in_place(capture::give_back_free_memory);
    let run_dir = RunDir::create(config.run_dir())?;
    let listeners = Listeners::bind(config.into()).await?;
    Ok((source, run_dir, listeners))
}

/// What the gateway serves with.
struct Serving {
    config: GatewayConfig,
    mesh: Arc<Mesh>,
    authority: Arc<Authority>,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    readiness: Readiness,
    stop: Drain,
}

impl Serving {
    async fn until_told_to_stop(
        self,
        source: &Source,
        listeners: Listeners,
        log_level: LogLevel,
        signals: &mut Signals,
    ) -> Result<()> {
        // Before anybody can ask.
        let unready = self.readiness.block("the ports of its Gateways");
        let (failing, operators_stop) = (Arc::new(ArcSwap::from_pointee(None)), CancellationToken::new());
        let (shown, told, pod) = (Arc::clone(&failing), self.snapshots.clone(), self.config.pod.to_string());
        let (node, asked) = (self.config.node.clone(), self.snapshots.clone());
        let particulars = Particulars {
            pods: Arc::new(move || view(&told.borrow(), node.as_deref(), &pod)),
            flows: Arc::new(|| Ok(Vec::new())),
            problems: Arc::new(move || {
                let closed = (**shown.load()).as_ref().map(Failing::texts).unwrap_or_default();
                closed.into_iter().chain(captured(&asked.borrow())).collect()
            }),
        };
        let shown = (self.readiness.clone(), log_level);
        let of_configuration = (&self.snapshots, &source.problems);
        let state = state(of_configuration, &self.mesh, Arc::clone(&self.authority), particulars, shown);
        let operators = serve_operators(listeners, state, &operators_stop);
        let (readiness, stop) = (self.readiness.clone(), self.stop.clone());
        tracing::info!(pod = %self.config.pod, "gateway started");
        let mut serving = AbortOnDropHandle::new(tokio::spawn(self.serve(failing, unready)));
        tokio::select! {
            () = signals.until_told_to_stop(|| source.reread.reread()) => {}
            ended = &mut serving => return ended.context("serving failed"),
        }
        let _leaving = readiness.block("nothing: it is being stopped");
        stop.leave();
        serving.await.context("serving failed")?;
        operators_stop.cancel();
        // The admin socket goes with its listener.
        let _ = operators.await;
        Ok(())
    }

    /// Serves once its pod is known and certified, until it is told to stop, and what is open has ended.
    async fn serve(self, failing: Arc<ArcSwap<Option<Failing>>>, unready: BlockReady) {
        let stop = self.stop.clone();
        let pod = tokio::select! {
            biased;
            () = stop.left() => return,
            pod = self.pod() => pod,
        };
        let Self { config, mesh, snapshots, readiness, stop, .. } = self;
        mesh.pods.insert(PodName::from(&*pod.workload()), Arc::clone(&pod));
        // What it is may have changed while its certificate was waited for.
        update_pod(&mesh, &pod);
        let serving = Ports::new(mesh, pod, config.drain_deadline, config.own_ports());
        failing.store(Arc::new(Some(serving.failing())));
        serving.run(snapshots, (readiness, unready), stop).await;
    }

    /// The gateway's pod, once the configuration has it and its certificate is there.
    async fn pod(&self) -> Arc<Pod> {
        let workload = self.workload().await;
        let identity = self.identity(&workload).await;
        let limits = PodLimits {
            connections: connections_of_a_pod(self.mesh.limits.max_connections_per_pod as usize),
            carrier_interval: self.mesh.carrier_interval,
        };
        let net = PodNet::own(Arc::new(as_gateway(&workload)));
        let transitions = Arc::clone(self.mesh.pods.transitions());
        Arc::new(Pod::new(net, identity, Drain::default(), limits, transitions))
    }

    async fn workload(&self) -> Arc<Workload> {
        let pod = &self.config.pod;
        let _waits = self.readiness.block(format!("pod {pod} (--pod) in the configuration"));
        let mut snapshots = self.snapshots.clone();
        let known = |snapshot: &Arc<Snapshot>| snapshot.gateway.is_some();
        if !known(&snapshots.borrow()) {
            tracing::warn!(%pod, "the configuration has no such pod yet; waiting for it");
        }
        loop {
            let snapshot = Arc::clone(&snapshots.borrow_and_update());
            if let Some(gateway) = &snapshot.gateway {
                if let Some(problem) = captured(&snapshot) {
                    tracing::warn!("{problem}");
                }
                return Arc::clone(&gateway.workload);
            }
            if snapshots.changed().await.is_err() {
                // The sender is in the task that puts configurations in force, which ends with the process.
                std::future::pending::<()>().await;
            }
        }
    }

    async fn identity(&self, workload: &Workload) -> Arc<WorkloadIdentity> {
        let id = &workload.identity;
        let _waits = self.readiness.block(format!("the certificate of {id}"));
        loop {
            match self.authority.identity_within(id, CERTIFICATE_PATIENCE).await {
                Ok(identity) => return identity,
                Err(error) => tracing::warn!(%id, %error, "no certificate yet; it is asked for again"),
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }
}

/// What is said of a gateway whose pod is enrolled: an agent that captures what it dials refuses that.
fn captured(snapshot: &Snapshot) -> Option<String> {
    let pod = &snapshot.gateway.as_ref().filter(|gateway| gateway.workload.enrolled)?.workload;
    Some(format!(
        "Pod {}/{}: metadata.labels: the gateway's own pod is enrolled, so that its node's agent refuses what it sends into the \
         mesh; take it out with mesh.io/dataplane-mode: none",
        pod.namespace, pod.name
    ))
}

/// The gateway's pod, as `/pods` shows it: nothing is enrolled here.
fn view(snapshot: &Snapshot, node: Option<&str>, pod: &str) -> PodsView {
    let of_pod = snapshot.gateway.as_ref().and_then(|gateway| gateway.workload.node.as_deref());
    let node = node.or(of_pod).unwrap_or_default();
    let node = if node.is_empty() { format!("gateway {pod}") } else { format!("{node} (gateway {pod})") };
    PodsView { node, ..PodsView::default() }
}
