//! Where an agent takes the place of another, and where it leaves its own.

use std::{os::fd::OwnedFd, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use tokio::{
    io::AsyncReadExt as _,
    net::UnixStream,
    sync::watch,
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};

use super::Signals;
use crate::{
    admin::{KeepFile, RunDir},
    capture::OfferedPod,
    drain::Drain,
    enrolment::{Enrolment, Prepared},
    handover::{Asked, Succession},
    proxy::Mesh,
    report::{FlowGuard, Reporter},
    state::snapshot::Snapshot,
};

/// How often an agent that leaves says what it has counted.
const METRICS_EVERY: Duration = Duration::from_secs(1);

/// How long connections have to end once the time for leaving is over.
const LAST_CALL: Duration = Duration::from_secs(5);

/// An agent that serves, and offers this one its place.
pub(super) struct Before {
    pub succession: Succession,
    pub lock: Option<OwnedFd>,
    pub made_run_dir: bool,
    pub pods: Vec<OfferedPod>,
}

/// Takes the place of the agent before. False: told to stop while it was being prepared, and nothing has happened.
pub(super) async fn succeed(
    before: Before,
    enrolment: &mut Enrolment,
    run_dir: &mut RunDir,
    admin_file: &KeepFile,
    signals: &mut Signals,
) -> Result<bool> {
    let prepared = tokio::select! {
        biased;
        () = signals.until_told_to_stop(|| {}) => return Ok(false),
        prepared = enrolment.prepare(before.pods) => prepared?,
    };
    take_over(before.succession, enrolment, prepared)?;
    run_dir.take_over(before.made_run_dir);
    admin_file.set(false);
    enrolment.reporter().inherit_from(run_dir.metrics());
    Ok(true)
}

/// Serves what is prepared, and has the other agent let go of it. From here on everything is this agent's.
fn take_over(succession: Succession, enrolment: &mut Enrolment, prepared: Prepared) -> Result<()> {
    let served = enrolment.serve_all(prepared);
    let told = tokio::task::block_in_place(|| succession.serving());
    let (known, until) = told.context("taking over, when all was ready")?;
    let kept: Vec<FlowGuard> = known.iter().map(|flow| enrolment.reporter().adopt_flow(flow)).collect();
    until.set_nonblocking(true)?;
    let mut until = UnixStream::from_std(until)?;
    tokio::spawn(async move {
        // Nothing more is said: it ends with the other agent.
        let _ = until.read(&mut [0]).await;
        drop(kept);
    });
    enrolment.confirm(served);
    Ok(())
}

/// An agent whose place another has taken, and what is still open in it.
pub(super) struct Leaving {
    pub enrolment: Box<Enrolment>,
    pub asked: Asked,
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
    pub mesh: Arc<Mesh>,
    pub drain: Drain,
    /// Where it leaves its metrics.
    pub metrics: PathBuf,
}

impl Leaving {
    /// Lets the successor begin, and waits for every connection to end; for `deadline` at most, or until it is told twice
    /// to stop.
    pub async fn until_nothing_is_open(self, deadline: Duration, signals: &mut Signals) {
        if let Err(error) = self.asked.done(self.mesh.reporter.known_flows()).await {
            tracing::error!(%error, "the successor is gone; nothing of it or of this agent takes connections now");
        }
        tracing::info!(
            ?deadline,
            "another agent has taken over; this one stays until its connections have ended"
        );
        let Self { enrolment, asked: _asked, snapshots, mesh, drain, metrics } = self;
        let pods = mesh.pods.all();
        let open = async {
            for pod in pods.values() {
                pod.drain.finished().await;
            }
        };
        let following = enrolment.follow(snapshots);
        let mut tick = interval(METRICS_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        tokio::pin!(open, following);
        let (end, mut told) = (Instant::now() + deadline, false);
        loop {
            tokio::select! {
                () = &mut open => break,
                () = &mut following => {}
                () = sleep_until(end) => {
                    tracing::warn!(?deadline, "connections were still open when the time for leaving was over");
                    break;
                }
                () = signals.until_told_to_stop(|| {}) => {
                    if told {
                        tracing::warn!("told twice to stop: connections that are open are closed");
                        break;
                    }
                    told = true;
                    tracing::info!("stopping when the last connection has ended; told once more, at once");
                }
                _ = tick.tick() => leave_metrics(&mesh.reporter, &metrics, false).await,
            }
        }
        drain.start();
        for pod in pods.values() {
            pod.drain.finish(LAST_CALL).await;
        }
        leave_metrics(&mesh.reporter, &metrics, true).await;
    }

    /// Says what was counted here.
    pub async fn leave_metrics(&self, last: bool) {
        leave_metrics(&self.mesh.reporter, &self.metrics, last).await;
    }
}

async fn leave_metrics(reporter: &Arc<Reporter>, dir: &std::path::Path, last: bool) {
    let (reporter, dir) = (Arc::clone(reporter), dir.to_owned());
    let left = tokio::task::spawn_blocking(move || reporter.leave_metrics(&dir, last)).await;
    if let Ok(Err(error)) = left {
        // With the run directory the successor has gone too, and nobody asks any more.
        tracing::debug!(%error, "metrics are not handed on");
    }
}
