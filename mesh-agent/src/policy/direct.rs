//! Whether a connection within the node may run from app to app, without the agent.
//!
//! Only where the agent would do nothing but copy bytes that may cross the node in the clear. Everything that decides it
//! is asked here and nowhere else; what is not known to be allowed takes the agent. Pure. Tested in
//! `enrolment/direct_tests.rs` and in the lab (`tests/tests/direct/permission.rs`).

use std::{fmt, net::SocketAddr};

use super::MESH_PORTS;
use crate::state::snapshot::{MtlsMode, Protocol, ServicePort, Workload};

/// Why a connection takes the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Because {
    /// The port is not declared to carry bytes.
    NotDeclared,
    /// A `VirtualService` routes its connections (`tls[]`, `tcp[]`).
    Routed,
    /// A `DestinationRule` or `ServicePolicy` sets what only the agent keeps (`connectionPool`, `healthCheck`, `fallbacks`).
    Limited,
    /// One of the pods says so (`mesh.io/direct: disabled`).
    Asked,
    /// An `AuthorizationPolicy` selects the server's pod, and is asked by the agent; or tokens are looked for.
    Judged,
    /// A `PeerAuthentication` asks for mutual TLS at the server's port, and these bytes cross the node in the clear.
    Strict,
    /// The mesh's own port is nobody's app.
    MeshPort,
}

impl fmt::Display for Because {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotDeclared => "the port is not declared to carry bytes",
            Self::Routed => "a VirtualService routes its connections",
            Self::Limited => "a DestinationRule or ServicePolicy asks for what only the agent can do",
            Self::Asked => "a pod has mesh.io/direct: disabled",
            Self::Judged => "an AuthorizationPolicy selects the server's pod",
            Self::Strict => "a PeerAuthentication asks for mutual TLS at the server's port",
            Self::MeshPort => "the port is the mesh's own",
        })
    }
}

/// What the configuration of a service's port has to say.
///
/// # Errors
/// Why its connections take the agent, wherever they go.
pub fn port(port: &ServicePort) -> Result<(), Because> {
    if port.protocol != Some(Protocol::Opaque) {
        return Err(Because::NotDeclared);
    }
    if !port.streams.is_empty() {
        return Err(Because::Routed);
    }
    if port.cluster.limits_connections {
        return Err(Because::Limited);
    }
    Ok(())
}

/// What the two pods have to say, both enrolled on one node; the app listens at `app`.
///
/// # Errors
/// Why connections between these two take the agent.
pub fn pods(client: &Workload, server: &Workload, app: SocketAddr) -> Result<(), Because> {
    let read = server.authentication.tokens.reads(app.port());
    if read || !server.authorization.is_empty() {
        return Err(Because::Judged);
    }
    if server.authentication.of(app.port()).mode == MtlsMode::Strict {
        return Err(Because::Strict);
    }
    if client.capture.no_direct || server.capture.no_direct {
        return Err(Because::Asked);
    }
    if MESH_PORTS.contains(&app.port()) {
        return Err(Because::MeshPort);
    }
    Ok(())
}
