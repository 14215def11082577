//! What became of requests for certificates: one line in the log for each, under the target `audit`.
//!
//! Tokens and keys are never in it. Tested in `tests/` and `tests/certificate_authority.rs`.

use std::net::SocketAddr;

use tonic::Code;

use crate::identity::CertificateInfo;

/// What is known of a request, as far as it came.
#[derive(Debug, Clone)]
pub(super) struct Request {
    pub peer: SocketAddr,
    /// Who asked; `-` while that is not shown.
    pub caller: String,
    /// For whom.
    pub identity: String,
}

impl Request {
    /// Nothing is known but where it came from.
    pub fn from(peer: SocketAddr) -> Self {
        Self { peer, caller: "-".to_owned(), identity: "-".to_owned() }
    }

    pub fn issued(&self, certificate: &CertificateInfo, key: &str) {
        let Self { peer, caller, identity } = self;
        tracing::info!(
            target: "audit",
            event = "certificate",
            outcome = "issued",
            caller,
            identity,
            serial = certificate.serial,
            not_after = %certificate.not_after,
            key,
            %peer,
        );
    }

    /// `count`: of how many alike this line tells.
    pub fn refused(&self, code: Code, reason: &str, count: u64) {
        let Self { peer, caller, identity } = self;
        tracing::warn!(
            target: "audit",
            event = "certificate",
            outcome = "refused",
            caller,
            identity,
            code = ?code,
            reason,
            count,
            %peer,
        );
    }
}
