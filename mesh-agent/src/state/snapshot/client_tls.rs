//! `tls` of a cluster: how connections to endpoints outside the mesh are protected.
//!
//! Keys are here as they were read, and are never shown. Tested through `resource/client_tls.rs` (what is written),
//! `compile/tests/client_tls.rs` and `upstream/originate.rs` (what it comes to).

use std::{fmt, sync::Arc, sync::OnceLock};

use rustls::ClientConfig;

use super::ClusterId;

/// How connections to endpoints outside the mesh are protected. Those in the mesh are reached by mutual TLS whatever it
/// says.
#[derive(Debug, Clone, Default)]
pub enum Origination {
    /// Not at all (no `tls`, or `DISABLE`).
    #[default]
    Plaintext,
    /// By the mesh alone (`ISTIO_MUTUAL`): endpoints outside it are not connected to.
    MeshOnly,
    /// By TLS that the agent begins (`SIMPLE`, `MUTUAL`).
    Tls(Arc<ClientTls>),
    /// As something says that is not there; nothing is connected to, and this is why.
    Broken(Arc<str>),
}

/// The client's side of TLS.
pub struct ClientTls {
    /// What tells it from others: connections made under one are not used under another.
    pub id: ClusterId,
    /// What it comes from.
    pub terms: TlsTerms,
    /// What has been made of it, once for each protocol: bytes, HTTP/1.1, HTTP/2.
    pub made: [OnceLock<Result<Arc<ClientConfig>, String>>; 3],
}

impl ClientTls {
    /// One that has not been used yet.
    pub fn new(terms: TlsTerms) -> Self {
        Self { id: ClusterId::default(), terms, made: Default::default() }
    }
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientTls").field("terms", &self.terms).finish_non_exhaustive()
    }
}

/// Whom the client believes, and what it shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsTerms {
    /// The name that the server is asked for by (SNI), and has to prove where `names` is empty.
    pub server: Arc<str>,
    /// `subjectAltNames`: the server has to prove one of these.
    pub names: Vec<Arc<str>>,
    /// Certificates of authorities, in PEM; `None`: the system's.
    pub roots: Option<Arc<[u8]>>,
    /// Lists of what these authorities have revoked, in PEM; `None`: nothing is asked of any.
    pub revoked: Option<Arc<[u8]>>,
    /// `insecureSkipVerify`: whoever answers is believed.
    pub anybody: bool,
    /// Certificate and key that are shown, in PEM.
    pub shows: Option<ClientCertificate>,
}

/// A certificate and its key.
#[derive(Clone, PartialEq, Eq)]
pub struct ClientCertificate {
    /// The chain, in PEM.
    pub chain: Arc<[u8]>,
    /// The key, in PEM.
    pub key: Arc<[u8]>,
}

impl fmt::Debug for ClientCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientCertificate").finish_non_exhaustive()
    }
}
