//! The ports of a gateway, as its configuration says: bound when they come, closed when they go.
//!
//! Promises: one that cannot be bound is told, tried again, and nobody else's trouble; what is open on one that goes is asked to
//! end, and has the drain deadline for that; while the configuration does not know the gateway's pod, everything stays as it is.
//! The gateway is ready once all its first ports are bound. Tested in the lab (`tests/tests/gateway/ports.rs`).

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{sync::watch, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{AGAIN, Port, same_kind, serve, spawn};
use crate::{
    admin::{BlockReady, Readiness},
    capture::OpenPort,
    drain::Drain,
    proxy::Mesh,
    state::snapshot::{Gateway, GatewayPort, Snapshot},
    upstream::Pod,
};

/// Keeps the ports in step with the configuration.
#[derive(Debug)]
pub struct Ports {
    mesh: Arc<Mesh>,
    pod: Arc<Pod>,
    /// How long what is open on a port has to end.
    deadline: Duration,
    /// Ports on which the process itself is asked about, which no configuration may take.
    own: Vec<u16>,
    open: BTreeMap<u16, Open>,
    failing: Failing,
    /// Ports that are being closed.
    closing: TaskTracker,
}

#[derive(Debug)]
struct Open {
    port: Arc<Port>,
    listener: OpenPort,
    serves: Arc<GatewayPort>,
}

/// Why ports are not open. Cheap to clone; all clones are one.
#[derive(Debug, Clone, Default)]
pub struct Failing(Arc<Mutex<BTreeMap<u16, String>>>);

impl Failing {
    /// A sentence for each.
    pub fn texts(&self) -> Vec<String> {
        self.all().values().cloned().collect()
    }

    /// The map is whole after every change, so a panic elsewhere does not make it wrong.
    fn all(&self) -> MutexGuard<'_, BTreeMap<u16, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a failure. Whether it is news.
    fn note(&self, port: u16, text: &str) -> bool {
        self.all().insert(port, text.to_owned()).is_none_or(|before| before != text)
    }
}

impl Ports {
    /// None open yet. `own`: ports of the process itself.
    pub fn new(mesh: Arc<Mesh>, pod: Arc<Pod>, deadline: Duration, own: Vec<u16>) -> Self {
        let (open, failing, closing) = (BTreeMap::new(), Failing::default(), TaskTracker::new());
        Self { mesh, pod, deadline, own, open, failing, closing }
    }

    /// Which are not open, for as long as this runs.
    pub fn failing(&self) -> Failing {
        self.failing.clone()
    }

    /// Follows the configuration until `stop` says to leave; then closes all, and waits until what is open has ended, or had its
    /// time. `first`: what keeps the gateway unready until its first ports are bound.
    pub async fn run(
        mut self,
        mut snapshots: watch::Receiver<Arc<Snapshot>>,
        (readiness, first): (Readiness, BlockReady),
        stop: Drain,
    ) {
        let mut waits = vec![first];
        loop {
            let snapshot = Arc::clone(&snapshots.borrow_and_update());
            if let Some(gateway) = &snapshot.gateway {
                self.follow(gateway);
                if !waits.is_empty() {
                    waits = self.waits(&readiness);
                }
            }
            drop(snapshot);
            let failing = !self.failing.all().is_empty();
            tokio::select! {
                changed = snapshots.changed() => if changed.is_err() { break },
                () = tokio::time::sleep(AGAIN), if failing => {}
                () = stop.left() => break,
            }
        }
        for (_, open) in std::mem::take(&mut self.open) {
            self.close(open.port);
        }
        self.closing.close();
        self.closing.wait().await;
    }

    /// What never comes is not waited for.
    fn waits(&self, readiness: &Readiness) -> Vec<BlockReady> {
        let failing = self.failing.all();
        let may_come = failing.iter().filter(|(number, _)| !self.own.contains(number));
        may_come.map(|(_, text)| readiness.block(text.clone())).collect()
    }

    fn follow(&mut self, gateway: &Gateway) {
        let wanted = |number: u16| gateway.port(number);
        self.failing.all().retain(|number, _| wanted(*number).is_some());
        let gone: Vec<u16> = self.open.keys().copied().filter(|number| wanted(*number).is_none()).collect();
        for number in gone {
            if let Some(Open { port, listener, .. }) = self.open.remove(&number) {
                drop(listener);
                tracing::info!(port = number, "port closed");
                self.close(port);
            }
        }
        for serves in &gateway.ports {
            match self.open.get_mut(&serves.number) {
                Some(open) if same_kind(&open.serves, serves) => open.serves = Arc::clone(serves),
                Some(_) => self.serve_otherwise(serves),
                None if self.own.contains(&serves.number) => {
                    self.fails(serves, "it is the gateway's own (--metrics, --readiness, --admin)");
                }
                None => self.bind(serves),
            }
        }
    }

    fn bind(&mut self, serves: &Arc<GatewayPort>) {
        match OpenPort::bind(serves.number) {
            Ok(listener) => {
                self.failing.all().remove(&serves.number);
                tracing::info!(port = serves.number, "port open");
                self.serve(listener, serves);
            }
            Err(error) => self.fails(serves, &format!("{error}; it is tried again")),
        }
    }

    /// What is open is of another kind from now on: it ends, and who comes finds the port open all the while.
    fn serve_otherwise(&mut self, serves: &Arc<GatewayPort>) {
        let Some(Open { port, listener, .. }) = self.open.remove(&serves.number) else { return };
        port.handed_on.store(true, Ordering::Relaxed);
        self.close(port);
        self.serve(listener, serves);
    }

    fn serve(&mut self, listener: OpenPort, serves: &Arc<GatewayPort>) {
        let shared = match listener.share() {
            Ok(shared) => shared,
            Err(error) => return self.fails(serves, &format!("{error}; it is tried again")),
        };
        let port = Arc::new(Port {
            mesh: Arc::clone(&self.mesh),
            pod: Arc::clone(&self.pod),
            number: serves.number,
            drain: Drain::default(),
            cut: CancellationToken::new(),
            handed_on: AtomicBool::new(false),
        });
        spawn(&port.mesh, &port.drain, |_| serve(Arc::clone(&port), shared));
        self.open.insert(serves.number, Open { port, listener, serves: Arc::clone(serves) });
    }

    fn fails(&self, serves: &GatewayPort, why: &str) {
        let origins = match serves.origins()[..] {
            [] => String::new(),
            ref origins => format!(" ({})", origins.join(", ")),
        };
        let text = format!("port {}{origins} is not open: {why}", serves.number);
        if self.failing.note(serves.number, &text) {
            tracing::error!("{text}");
        }
    }

    /// Takes nothing new, and ends what is open.
    fn close(&self, port: Arc<Port>) {
        port.drain.leave();
        self.closing.spawn(end(port, self.deadline));
    }
}

/// Clients are asked to go at a moment at which they lose nothing; in the second half of the time, what is idle is closed; then
/// the rest.
async fn end(port: Arc<Port>, deadline: Duration) {
    let asked = deadline / 2;
    if timeout(asked, port.drain.finished()).await.is_err()
        && !port.drain.finish(deadline.saturating_sub(asked)).await
    {
        tracing::warn!(port = port.number, "what is still open on the port is cut");
    }
    port.cut.cancel();
}
