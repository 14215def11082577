//! Which endpoint: the balancer's choice, or what the client has dialled where nothing is balanced
//! (`loadBalancer.simple: PASSTHROUGH`), or where it has dialled an endpoint of a headless service.
//!
//! Never passes plaintext to a service whose endpoints are in the mesh: whoever answers at the service's own address is not
//! known, so that is refused. Tested in the lab (`tests/tests/balancing.rs`).

use std::{net::SocketAddr, sync::Arc};

use super::Mesh;
use crate::{
    balance::{self, Chosen, Wish},
    error::{Error, Kind, Result},
    state::snapshot::{Balancing, Cluster, Endpoint},
    upstream::Pod,
};

/// An endpoint of the cluster, for this client pod. `dialled`: by the client, where there is one.
pub(super) fn endpoint(
    mesh: &Mesh,
    pod: &Pod,
    cluster: &Cluster,
    wish: &Wish<'_>,
    dialled: Option<SocketAddr>,
) -> Result<Chosen> {
    // Who comes to a gateway has dialled the gateway.
    let dialled = dialled.filter(|_| !pod.net().is_own());
    if let (Balancing::Passthrough, Some(dialled)) = (cluster.balancing, dialled) {
        return passed(mesh, cluster, dialled);
    }
    if let Some(dialled) = dialled.filter(|_| cluster.headless)
        && let Some(chosen) = balance::chosen(cluster, dialled)
    {
        return Ok(chosen);
    }
    let spread = &cluster.spread;
    let own = (spread.by_client.is_some() || spread.zones.is_some()).then(|| pod.workload());
    let origin = own.as_ref().filter(|_| spread.asks_for_origin()).and_then(|own| {
        let key = (Arc::clone(&own.namespace), Arc::clone(&own.workload_name));
        mesh.snapshot().origins.get(&key).cloned()
    });
    let labels = own.as_ref().map(|own| &own.labels);
    let wish = Wish { labels, origin: origin.as_deref(), ..*wish };
    balance::choose(cluster, &wish).ok_or_else(|| none(cluster, "has no healthy endpoint"))
}

fn passed(mesh: &Mesh, cluster: &Cluster, dialled: SocketAddr) -> Result<Chosen> {
    if let Some(chosen) = balance::chosen(cluster, dialled) {
        return Ok(chosen);
    }
    let snapshot = mesh.snapshot();
    let service = snapshot.vips.get(&dialled.ip());
    let port = service.and_then(|service| service.ports.iter().find(|port| port.port == dialled.port()));
    let behind = port.into_iter().flat_map(|port| &port.cluster.endpoints).chain(&cluster.endpoints);
    let mut pods = behind.filter_map(|endpoint| endpoint.workload.as_ref());
    if service.is_some() && pods.any(|pod| pod.enrolled) {
        let text = format!("is not balanced (PASSTHROUGH), and who answers at {dialled} is not known");
        return Err(none(cluster, &text));
    }
    let workload = snapshot.workload_at(dialled.ip()).cloned();
    Ok(Chosen::alone(&Arc::new(Endpoint::alone(dialled, workload))))
}

fn none(cluster: &Cluster, what: &str) -> Error {
    Error::new(Kind::NoHealthyUpstream, format!("{} {what}", cluster.name))
}
