//! What operators are shown of a role that carries traffic, and where.

use std::sync::Arc;

use anyhow::Result;
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use super::{
    certificates::{certificates_of, keep_gauges},
    listeners::Listeners,
    overload,
};
use crate::{
    admin::{self, LogLevel, PodsView, Readiness},
    identity::Authority,
    proxy::Mesh,
    report::FlowView,
    state::{Problem, snapshot::Snapshot},
};

/// What operators see of one role and not of the other.
pub(super) struct Particulars {
    pub pods: admin::Read<PodsView>,
    pub flows: admin::Read<Result<Vec<FlowView>>>,
    /// Besides those of the configuration and of certificates.
    pub problems: admin::Read<Vec<String>>,
}

/// What operators see, and the tasks that keep its figures.
pub(super) fn state(
    (snapshots, problems): (&watch::Receiver<Arc<Snapshot>>, &watch::Receiver<Arc<[Problem]>>),
    mesh: &Arc<Mesh>,
    authority: Arc<Authority>,
    particulars: Particulars,
    (readiness, log_level): (Readiness, LogLevel),
) -> admin::State {
    tokio::spawn(keep_gauges(
        snapshots.clone(),
        problems.clone(),
        Arc::clone(&authority),
        Arc::clone(&mesh.reporter),
    ));
    let (Particulars { pods, flows, problems: others }, problems) = (particulars, problems.clone());
    let (overloaded, certified) = (Arc::clone(mesh), Arc::clone(&authority));
    admin::State {
        version: env!("CARGO_PKG_VERSION"),
        readiness,
        snapshot: snapshots.clone(),
        problems: Arc::new(move || {
            let problems: Vec<_> = problems.borrow().iter().map(ToString::to_string).collect();
            [problems, certified.problems(), others()].concat()
        }),
        pods,
        overload: Arc::new(move || overload::view(&overloaded)),
        flows,
        reporter: Arc::clone(&mesh.reporter),
        certificates: certificates_of(authority),
        log_level,
    }
}

/// Serves until `stop`; what is returned ends when the operator's endpoint is gone.
pub(super) fn serve_operators(
    listeners: Listeners,
    state: admin::State,
    stop: &CancellationToken,
) -> JoinHandle<()> {
    tokio::spawn(admin::serve_metrics(listeners.metrics, Arc::clone(&state.reporter), stop.clone()));
    for listener in [Some(listeners.readiness), listeners.own_readiness].into_iter().flatten() {
        tokio::spawn(admin::serve_readiness(listener, state.readiness.clone(), stop.clone()));
    }
    tokio::spawn(admin::serve_admin(listeners.admin, state, stop.clone()))
}
