//! The certificate with which the controller shows agents, and the API server, that it is theirs: issued by its own authority, kept in memory.
//!
//! Made anew in time by the next connection that comes. Tested in `tests/`.

use std::sync::{Arc, Mutex, PoisonError};

use rustls::{
    ServerConfig,
    crypto::aws_lc_rs::default_provider,
    server::NoServerSessionStorage,
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};
use time::OffsetDateTime;

use crate::{
    error::{Error, Kind, Result},
    identity::{EmbeddedCa, IssuedServer, LeafPolicy},
};

/// Made anew when this much of its life is left, a share of 1.
const LEFT: f64 = 0.3;

/// The certificate, and what it takes to make another.
#[derive(Debug)]
pub struct ServerCertificate {
    ca: Arc<EmbeddedCa>,
    names: Vec<String>,
    protocols: &'static [&'static str],
    policy: LeafPolicy,
    current: Mutex<Current>,
}

#[derive(Debug)]
struct Current {
    config: Arc<ServerConfig>,
    not_after: OffsetDateTime,
}

impl ServerCertificate {
    /// A certificate for these names, and which protocols are spoken (ALPN).
    ///
    /// # Errors
    /// When a name cannot be one, or the authority cannot sign.
    pub(crate) fn new(
        ca: Arc<EmbeddedCa>,
        names: Vec<String>,
        protocols: &'static [&'static str],
    ) -> Result<Self> {
        let policy = LeafPolicy::default();
        let current = Mutex::new(Current::issue(&ca, &names, protocols, policy)?);
        Ok(Self { ca, names, protocols, policy, current })
    }

    /// The TLS configuration for a connection that comes now.
    pub(super) fn config(&self) -> Arc<ServerConfig> {
        // The value is whole after every change.
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let left = current.not_after - OffsetDateTime::now_utc();
        if left < self.policy.lifetime.mul_f64(LEFT) {
            match Current::issue(&self.ca, &self.names, self.protocols, self.policy) {
                Ok(renewed) => *current = renewed,
                Err(error) => {
                    let until = current.not_after;
                    tracing::error!(%error, %until, "the server's certificate is not renewed");
                }
            }
        }
        Arc::clone(&current.config)
    }
}

impl Current {
    fn issue(ca: &EmbeddedCa, names: &[String], protocols: &[&str], policy: LeafPolicy) -> Result<Self> {
        let IssuedServer { key, not_after } = ca.issue_server(names, policy)?;
        let config = config(key, protocols)
            .map_err(|error| Error::new(Kind::TlsFailure, format!("the server's certificate: {error}")))?;
        Ok(Self { config: Arc::new(config), not_after })
    }
}

fn config(key: Arc<CertifiedKey>, protocols: &[&str]) -> std::result::Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
    Ok(config)
}
