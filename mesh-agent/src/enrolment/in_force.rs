//! Puts each configuration in force at once: for the path, and for what the enrolled pods are and ask of those who come.
//!
//! Promises that whoever is told of a configuration finds it in force, however long the enrolling of a pod takes. What
//! the kernel has of a pod (its annotations) stays with `enrolment.rs`, which asks the kernel first. Tested in the lab
//! (`tests/tests/configuration.rs`).

use std::sync::Arc;

use tokio::sync::watch;

use super::same_place;
use crate::{
    capture,
    proxy::Mesh,
    state::snapshot::{Authentication, Snapshot, Workload},
    upstream::Pod,
};

/// Of fewer services what a snapshot leaves behind is not worth looking for.
const MANY: usize = 1_000;

/// Follows `source` for as long as the receiver is held, which is told of each configuration once it is in force.
pub fn put_in_force(
    mesh: Arc<Mesh>,
    mut source: watch::Receiver<Arc<Snapshot>>,
) -> watch::Receiver<Arc<Snapshot>> {
    let (told, in_force) = watch::channel(mesh.snapshot());
    tokio::spawn(async move {
        loop {
            let before = mesh.snapshot();
            let snapshot = with_gateway(Arc::clone(&source.borrow_and_update()), &before);
            // First: whoever finds a pod joined finds that it may still be waited for.
            mesh.pods.transitions().note(&before, &snapshot);
            mesh.snapshot.store(Arc::clone(&snapshot));
            // A gateway's own pod need not be among those that have an address of their own.
            let own = |of: &Snapshot| of.gateway.as_ref().map(|gateway| Arc::as_ptr(&gateway.workload));
            if !snapshot.workloads.is_same(&before.workloads) || own(&snapshot) != own(&before) {
                mesh.pods.all().values().for_each(|pod| update_pod(&mesh, pod));
            }
            if snapshot.services.len() > MANY && !snapshot.services.shares_with(&before.services) {
                // All of it was compiled anew, and the old one goes as a whole.
                capture::give_back_soon();
            }
            drop(before);
            told.send_replace(snapshot);
            tokio::select! {
                changed = source.changed() => if changed.is_err() { return },
                () = told.closed() => return,
            }
        }
    });
    in_force
}

/// What a gateway serves, it serves also while the configuration does not know its pod.
fn with_gateway(snapshot: Arc<Snapshot>, before: &Snapshot) -> Arc<Snapshot> {
    match (&snapshot.gateway, &before.gateway) {
        (None, Some(kept)) => {
            Arc::new(Snapshot { gateway: Some(Arc::clone(kept)), ..Snapshot::clone(&snapshot) })
        }
        _ => snapshot,
    }
}

/// Has a pod be what the configuration says, for one that has come while that changed too.
pub fn update_pod(mesh: &Mesh, pod: &Pod) {
    let (snapshot, held) = (mesh.snapshot(), pod.workload());
    if pod.net().is_own() {
        if let Some(gateway) = &snapshot.gateway {
            pod.update(|_| as_gateway(&gateway.workload));
        }
        return;
    }
    let now = held.ips.first().and_then(|ip| snapshot.workload_at(*ip));
    let same = |now: &&Arc<Workload>| now.namespace == held.namespace && now.name == held.name;
    if let Some(now) = now.filter(same) {
        update(pod, now);
    }
}

/// The pod of a gateway as its own process takes it. Who may come to a gateway in the clear its `Gateway`s say, and no
/// `PeerAuthentication`.
pub fn as_gateway(workload: &Workload) -> Workload {
    let tokens = Arc::clone(&workload.authentication.tokens);
    Workload { authentication: Authentication { tokens, ..Authentication::default() }, ..workload.clone() }
}

/// One that was moved, or is somebody else now, is about to be let go of as what it was.
fn update(pod: &Pod, now: &Arc<Workload>) {
    if same_place(&pod.workload(), now) {
        pod.update(|held| Workload { capture: held.capture.clone(), ..Workload::clone(now) });
    }
}
