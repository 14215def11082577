//! The wire between nodes: mTLS to a pod's port 15008, HTTP/2 on top, verified at both ends.
//!
//! ALPN decides what a connection carries: `h2` is HBONE as ztunnel speaks it (CONNECT streams of bytes),
//! `mesh-h2` is ours and carries HTTP requests as they are too. A byte stream here ends as TCP ends: each
//! direction by itself, and an abort at one end is an abort at the other, never a quiet end of file. Tested in
//! `tunnel/tests`, with real handshakes over loopback.

mod client;
mod failure;
mod introduction;
mod native;
mod pool;
mod serve;
mod server;
mod settings;
#[cfg(test)]
mod tests;

pub use client::{MeshConnection, connect, connect_tunnels};
pub use introduction::Introduction;
pub use native::{
    MESH_APP_PROTOCOL, MESH_PORT, OfClient, Refusal, may_be_of_connection, note_refusal, refusal,
    strip_mesh_headers, tell_failure,
};
pub use pool::{Pool, PoolKey};
pub use serve::{MeshStream, Tunnel, serve};
pub use server::{Accepted, accept};
pub(crate) use server::{not_believed, withdrawn};
pub use settings::MESH_TLS_PORT;

use crate::identity::{ALPN_H2, ALPN_MESH_H2};

/// What a mesh connection may carry, by ALPN.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Wire {
    /// `h2`: HBONE CONNECT streams only.
    Hbone,
    /// `mesh-h2`: HBONE and native HTTP requests.
    MeshH2,
}

impl Wire {
    fn from_alpn(alpn: Option<&[u8]>) -> Option<Self> {
        match alpn {
            Some(ALPN_H2) => Some(Self::Hbone),
            Some(ALPN_MESH_H2) => Some(Self::MeshH2),
            _ => None,
        }
    }
}
