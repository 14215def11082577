//! What an address that an app has dialled stands for.
//!
//! Promises: a service's address with a port that it does not have is refused, and never passed on. Tested in the lab
//! (`tests/tests/addresses.rs`).

use std::sync::Arc;

use super::Ends;
use crate::{
    error::{Error, Kind, Result},
    route,
    state::snapshot::{self, Cluster, Snapshot, StreamRoute, Workload},
};

/// Where a connection goes, by the address that the app dialled.
#[derive(Debug)]
pub(super) enum Resolved {
    /// A port of a service, or of a headless one whose endpoint was dialled.
    Service(ServicePort),
    /// One pod, dialled by its own address, of no headless service.
    Pod(Arc<Workload>),
    /// Nothing the mesh knows: passed on untouched (Istio's `ALLOW_ANY`).
    Unknown,
}

/// A port of a service, as this pod sees it.
#[derive(Debug, Clone)]
pub(super) struct ServicePort {
    /// The whole service.
    pub cluster: Arc<Cluster>,
    /// Routes of connections that are not read as HTTP.
    pub streams: Arc<[Arc<StreamRoute>]>,
    /// Whether a VirtualService routes its requests, so that nothing may pass it by.
    pub routed: bool,
}

/// A known service address with an unknown port is refused; it is never passed on.
pub(super) fn resolve(snapshot: &Snapshot, client: &Workload, ends: Ends) -> Result<Resolved> {
    let (ip, port) = (ends.original_dst.ip(), ends.original_dst.port());
    if let Some(service) = snapshot.service_at(ip, &client.namespace) {
        let Some(port) = service.port_for(client.view(), port) else {
            let text = format!("service {} has no port {port}", service.host);
            return Err(Error::new(Kind::NoHealthyUpstream, text));
        };
        return Ok(Resolved::Service(seen(port)));
    }
    if let Some((service, port)) = snapshot.headless_at(ends.original_dst, &client.namespace)
        && let Some(port) = service.port_for(client.view(), port)
    {
        return Ok(Resolved::Service(seen(port)));
    }
    Ok(snapshot.workload_at(ip).map_or(Resolved::Unknown, |pod| Resolved::Pod(Arc::clone(pod))))
}

fn seen(port: &snapshot::ServicePort) -> ServicePort {
    let (cluster, streams) = (Arc::clone(&port.cluster), Arc::clone(&port.streams));
    let routed = port.routes.iter().any(|route| route.origin.starts_with("VirtualService"));
    ServicePort { cluster, streams, routed }
}

/// The routes that may hold for a client that says nothing.
pub(super) fn silent(port: &ServicePort) -> Arc<[Arc<StreamRoute>]> {
    if !route::needs_sni(&port.streams) {
        return Arc::clone(&port.streams);
    }
    let asks = |route: &&Arc<StreamRoute>| !route::needs_sni(std::slice::from_ref(*route));
    port.streams.iter().filter(asks).cloned().collect()
}
