//! Who may talk to whom.
//!
//! The only place that makes a [`Permit`], and without a permit there is no lease and no hand-over to an app. This
//! version has one rule of its own: the mesh's ports are never a destination. Tested below.

use std::net::SocketAddr;

use crate::{
    error::{Error, Kind, Result},
    state::snapshot::Workload,
};

/// The ports that an enrolled pod's own listeners have: outbound capture, inbound capture, mesh mTLS.
pub const MESH_PORTS: [u16; 3] = [15001, 15006, 15008];

/// Proof that policy was asked and said yes.
#[derive(Debug)]
#[must_use]
pub struct Permit {
    _private: (),
}

/// Whether a pod may open a connection or send a request to this endpoint; `workload` is the endpoint's pod.
pub fn outbound(workload: Option<&Workload>, endpoint: SocketAddr) -> Result<Permit> {
    refuse_mesh_ports(workload.is_some_and(|w| w.enrolled), endpoint)
}

/// Whether a connection or request may be handed to the pod's app.
pub fn inbound(destination: SocketAddr) -> Result<Permit> {
    refuse_mesh_ports(true, destination)
}

fn refuse_mesh_ports(enrolled: bool, destination: SocketAddr) -> Result<Permit> {
    if enrolled && MESH_PORTS.contains(&destination.port()) {
        return Err(Error::new(
            Kind::IllegalDestination,
            format!("{destination} is a port of the mesh itself; nothing is proxied to it"),
        ));
    }
    Ok(Permit { _private: () })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_meshs_own_ports_are_refused_at_enrolled_pods_only() {
        for port in MESH_PORTS {
            let at = SocketAddr::from(([10, 0, 0, 1], port));
            assert_eq!(inbound(at).map_err(|e| e.kind).err(), Some(Kind::IllegalDestination));
            assert!(outbound(None, at).is_ok());
        }
        assert!(inbound(SocketAddr::from(([10, 0, 0, 1], 9080))).is_ok());
    }
}
