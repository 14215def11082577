//! Which connections a workload takes: Istio's `PeerAuthentication`, compiled to what is compared; and beside it whose
//! tokens it believes (`request_authentication.rs`).
//!
//! Compared in `policy/`; made in `compile/authentication.rs`, where it is tested.

use std::sync::Arc;

use super::Tokens;

/// Whether plaintext is taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum MtlsMode {
    /// Mutual TLS and plaintext. `DISABLE` too: what comes by the mesh is mutual TLS whatever the server asks for (as in
    /// Istio's ambient mode).
    #[default]
    Permissive,
    /// Mutual TLS alone.
    Strict,
}

impl MtlsMode {
    /// The word in configuration and logs.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Permissive => "PERMISSIVE",
            Self::Strict => "STRICT",
        }
    }
}

/// A mode, and who has set it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mtls {
    /// The mode.
    pub mode: MtlsMode,
    /// `NAMESPACE/NAME` of the `PeerAuthentication`; `None`: nobody, and it is the default.
    pub by: Option<Arc<str>>,
}

/// What holds for a workload.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Authentication {
    /// For all ports that are not in `ports`.
    pub mtls: Mtls,
    /// For single ports of the pod, sorted.
    pub ports: Box<[(u16, Mtls)]>,
    /// What it believes of the tokens in requests.
    pub tokens: Arc<Tokens>,
}

impl Authentication {
    /// What holds for a port.
    pub fn of(&self, port: u16) -> &Mtls {
        let own = self.ports.binary_search_by_key(&port, |(port, _)| *port);
        own.ok().and_then(|place| self.ports.get(place)).map_or(&self.mtls, |(_, mtls)| mtls)
    }
}
