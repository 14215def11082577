//! Who is who: identities, the authority that certifies them, and the handle with which one workload proves its own.
//!
//! Keys are made in this process and stay in its memory, all but the embedded authority's own, which lives 0600 in
//! the state directory. A room of the path gets one [`WorkloadIdentity`], never the [`Authority`]. Tested beside
//! each file, and in handshakes by `tunnel/tests`.

mod answer;
mod authority;
mod ca;
mod issue;
mod istio;
mod plugged;
mod remote;
mod slot;
mod spiffe;
mod state_dir;
mod turns;
mod verify;
mod workload;
mod workload_api;

pub use authority::Authority;
pub(crate) use ca::EmbeddedCa;
pub use ca::{CertificateInfo, LeafPolicy};
pub(crate) use issue::{Issued, IssuedServer};
pub(crate) use istio::{CREATE_CERTIFICATE, CertificateRequest, CertificateResponse};
pub use remote::RemoteCaConfig;
pub use spiffe::{SpiffeId, SpiffeIdError};
pub use state_dir::CaError;
pub(crate) use state_dir::{prepare, publish, replace};
pub use verify::certified_identity;
pub(crate) use verify::{PeerRefusal, expected_identity, single_identity};
pub use workload::WorkloadIdentity;
pub(crate) use workload::{ALPN_H2, ALPN_MESH_H2, server_name};
