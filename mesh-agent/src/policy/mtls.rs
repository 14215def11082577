//! Whether a connection is as well protected as the pod's `PeerAuthentication` asks for. Asked first, before any
//! authorization policy, of what has no identity. Tested in `tests.rs` and in the lab (`tests/tests/mtls_modes.rs`).

use super::Asked;
use crate::{
    error::{Error, Kind, Result},
    state::snapshot::MtlsMode,
};

/// Whoever has proved an identity has come by mutual TLS, or within the node, which is as good.
///
/// # Errors
/// [`Kind::Plaintext`].
pub(super) fn admits(asked: &Asked<'_>) -> Result<()> {
    if asked.source.is_some() {
        return Ok(());
    }
    let port = asked.destination.port();
    let mtls = asked.workload.authentication.of(port);
    match mtls.mode {
        MtlsMode::Permissive => Ok(()),
        MtlsMode::Strict => {
            let by = mtls.by.as_deref().unwrap_or_default();
            let text = format!("port {port} takes mutual TLS alone (STRICT, PeerAuthentication {by})");
            Err(Error::new(Kind::Plaintext, text))
        }
    }
}
