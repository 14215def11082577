//! Who may talk to whom.
//!
//! The only place that makes a [`Permit`], and without a permit there is no lease and no hand-over to an app. The mesh's
//! ports are never a destination; what else is refused, the destination's pod says, at its node, for each connection and
//! each request: first whether it takes plaintext (`mtls.rs`), then whether the tokens of a request are to be believed
//! (`jwt/`), then the authorization policies that select it
//! (`authorization.rs`). Tested below and in `tests/`; in the lab by `authorization.rs` and `mtls_modes.rs`.

mod authorization;
mod matching;
mod mtls;
mod path;
#[cfg(test)]
mod tests;

pub mod direct;
pub mod external;
pub mod jwt;
pub mod probes;

use std::net::SocketAddr;

use mesh_common::maps::port;

pub use self::{
    authorization::{
        Asked, Head, Open, Ruling, authorizer, connection, opaque, read_for_tokens_alone, request, stands,
    },
    path::{Malformed, normalise},
};
use crate::{
    error::{Error, Kind, Result},
    state::snapshot::Workload,
};

/// The ports that an enrolled pod's own listeners have: outbound capture, inbound capture, mesh mTLS.
pub const MESH_PORTS: [u16; 3] = port::ALL;

/// Proof that policy was asked and said yes.
#[derive(Debug)]
#[must_use]
pub struct Permit {
    _private: (),
}

/// Whether a pod may open a connection or send a request to this endpoint of another node, or outside the mesh;
/// `workload` is the endpoint's pod.
pub fn outbound(workload: Option<&Workload>, endpoint: SocketAddr) -> Result<Permit> {
    refuse_mesh_ports(workload.is_some_and(|w| w.enrolled), endpoint)
}

/// Whether anything at all may be handed to the pod's app.
fn inbound(asked: &Asked<'_>) -> Result<Permit> {
    mtls::admits(asked)?;
    refuse_mesh_ports(true, asked.destination)
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
