//! Who is who: identities, the authority that certifies them, and the handle with which one workload proves its own.
//!
//! Keys are made in this process and stay in its memory, all but the embedded authority's own, which lives 0600 in
//! the state directory. A room of the path gets one [`WorkloadIdentity`], never the [`Authority`]. Tested beside
//! each file, and in handshakes by `tunnel/tests`.

mod answer;
mod authority;
mod bundle;
mod ca;
mod crl;
mod early;
mod follow;
mod issue;
mod istio;
mod key;
#[cfg(test)]
pub(crate) mod pki;
mod plugged;
mod remote;
mod renewal;
mod rotate;
mod shown;
mod slot;
mod spiffe;
mod state_dir;
mod trust;
mod turns;
mod verify;
mod workload;
mod workload_api;

pub use authority::{Authority, AuthorityInfo};
pub(crate) use bundle::{CERTIFICATE, CHAIN, KEY, ROOTS};
pub(crate) use ca::EmbeddedCa;
pub use ca::{CertificateInfo, LeafPolicy};
pub(crate) use issue::{Issued, IssuedServer};
pub(crate) use istio::{CREATE_CERTIFICATE, CertificateRequest, CertificateResponse};
pub use remote::RemoteCaConfig;
pub use rotate::{RotationError, drop_roots, prepare, rotation, switch};
pub(crate) use shown::Shown;
pub use spiffe::{SpiffeId, SpiffeIdError};
pub use state_dir::CaError;
pub(crate) use state_dir::{prepare_dir, publish, write_over};
pub use trust::Trust;
pub(crate) use trust::{Usage, Withdrawn, for_rustls};
pub use verify::certified_identity;
pub(crate) use verify::{PeerRefusal, expected_identity, single_identity};
pub use workload::WorkloadIdentity;
pub(crate) use workload::{ALPN_H2, ALPN_MESH_H2, server_name};
