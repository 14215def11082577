//! The handle of one workload's identity: proves it in handshakes, never shows its key.
//!
//! TLS 1.3 only, AES-GCM only, X25519 with ML-KEM-768 where the peer has it, no SNI, no resumption: each handshake verifies
//! both certificates. The certificate is replaced behind the handle when it is renewed, and never used once expired. Private
//! keys and session keys are wiped from memory when they go (`key.rs` says by whom). Tested by `tunnel/tests`.

use std::{
    fmt,
    net::IpAddr,
    sync::{Arc, LazyLock},
};

use arc_swap::ArcSwap;
use rustls::{
    ClientConfig, ServerConfig,
    client::Resumption,
    crypto::{
        CryptoProvider,
        aws_lc_rs::{
            cipher_suite::{TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384},
            default_provider,
            kx_group::{SECP256R1, SECP384R1, X25519, X25519MLKEM768},
        },
    },
    server::NoServerSessionStorage,
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};
use rustls_pki_types::ServerName;
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::{
    SpiffeId,
    ca::{CertificateInfo, Credential},
    shown::{Beginning, Shown},
    trust::{Trust, Usage},
    verify::{VerifyClient, VerifyServer},
};
use crate::error::{Error, Kind, Result};

/// The cryptography of the mesh: that of ztunnel, so that either end may be one.
static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    let cipher_suites = vec![TLS13_AES_256_GCM_SHA384, TLS13_AES_128_GCM_SHA256];
    // What is recorded today is not to be read once there are quantum computers. The share of X25519 that the first one
    // holds is offered by itself too, so that a peer that does not know the first answers without a further round trip.
    let kx_groups = vec![X25519MLKEM768, X25519, SECP256R1, SECP384R1];
    Arc::new(CryptoProvider { cipher_suites, kx_groups, ..default_provider() })
});

/// ALPN of HBONE: CONNECT streams only (ztunnel's wire).
pub(crate) const ALPN_H2: &[u8] = b"h2";
/// ALPN of our own wire: HBONE, and HTTP requests as plain streams.
pub(crate) const ALPN_MESH_H2: &[u8] = b"mesh-h2";

/// One certificate, and the TLS configurations built from it.
#[derive(Debug)]
pub(super) struct Current {
    info: CertificateInfo,
    /// What others are shown, judged as they will judge it.
    shown: Arc<Shown>,
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    trust: Arc<Trust>,
}

impl Current {
    pub(super) fn new(credential: Credential, trust_domain: &Arc<str>, trust: &Arc<Trust>) -> Result<Self> {
        let Credential { chain, key, roots, info } = credential;
        if let Some(roots) = roots {
            trust.believe(roots);
        }
        let shown = Arc::new(beginning(trust).shown(&chain, Usage::Client));
        let certified = Arc::new(CertifiedKey::new(chain, key));
        let build = || -> std::result::Result<_, rustls::Error> {
            let verifier = VerifyClient::new(Arc::clone(trust), &PROVIDER, Arc::clone(trust_domain));
            let server = server_config(verifier, &certified)?;
            let client = client_config(VerifyServer::new(Arc::clone(trust), &PROVIDER, &[]), &certified)?;
            Ok((server, client))
        };
        let (server, client) = build().map_err(|error| {
            Error::new(
                Kind::TlsFailure,
                format!("cannot use the new certificate of {}: {error}", info.identity),
            )
        })?;
        let (server, client, trust) = (Arc::new(server), Arc::new(client), Arc::clone(trust));
        Ok(Self { info, shown, server, client, trust })
    }

    pub(super) fn info(&self) -> &CertificateInfo {
        &self.info
    }

    pub(super) fn shown(&self) -> Arc<Shown> {
        Arc::clone(&self.shown)
    }

    /// The client's configuration; the base has neither ALPN nor anybody it would believe.
    fn client(&self, expected: &[SpiffeId], alpn: &[&[u8]]) -> Arc<ClientConfig> {
        let mut config = ClientConfig::clone(&self.client);
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        let verifier = VerifyServer::new(Arc::clone(&self.trust), &PROVIDER, expected);
        config.dangerous().set_certificate_verifier(Arc::new(verifier));
        Arc::new(config)
    }
}

fn beginning(trust: &Arc<Trust>) -> Beginning {
    Beginning::new(trust, PROVIDER.signature_verification_algorithms)
}

fn server_config(
    verifier: VerifyClient,
    certified: &Arc<CertifiedKey>,
) -> std::result::Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(Arc::clone(&PROVIDER))
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(certified))));
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    // Rustls takes the first of ours that the client offers too.
    config.alpn_protocols = vec![ALPN_MESH_H2.to_vec(), ALPN_H2.to_vec()];
    Ok(config)
}

fn client_config(
    verifier: VerifyServer,
    certified: &Arc<CertifiedKey>,
) -> std::result::Result<ClientConfig, rustls::Error> {
    let mut config = ClientConfig::builder_with_provider(Arc::clone(&PROVIDER))
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(certified))));
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// The handle of one workload's identity: can prove it in handshakes, never shows its key.
pub struct WorkloadIdentity {
    /// Whom it proves.
    pub id: SpiffeId,
    trust_domain: Arc<str>,
    trust: Arc<Trust>,
    current: ArcSwap<Current>,
    /// Counts the certificates this handle has had.
    generation: watch::Sender<u64>,
    /// Ends with the handle.
    _renewal: AbortOnDropHandle<()>,
}

impl WorkloadIdentity {
    pub(super) fn new(
        id: SpiffeId,
        trust_domain: Arc<str>,
        current: Current,
        renewal: AbortOnDropHandle<()>,
    ) -> Self {
        let (trust, current) = (Arc::clone(&current.trust), ArcSwap::from_pointee(current));
        Self { id, trust_domain, trust, current, generation: watch::Sender::new(1), _renewal: renewal }
    }

    /// Uses this certificate from now on; handshakes under way finish with the one before.
    pub(super) fn replace(&self, credential: Credential) -> Result<()> {
        self.current.store(Arc::new(Current::new(credential, &self.trust_domain, &self.trust)?));
        self.generation.send_modify(|generation| *generation += 1);
        Ok(())
    }

    /// A handshake is about to begin: tells later whether what the other end shows still stands.
    pub(crate) fn begin(&self) -> Beginning {
        beginning(&self.trust)
    }

    /// The certificate in use, as others judge it.
    pub(super) fn shown(&self) -> Arc<Shown> {
        self.current.load().shown()
    }

    /// The certificate in use.
    pub fn certificate(&self) -> CertificateInfo {
        self.current.load().info.clone()
    }

    /// Tells of renewals: the value grows by one with each new certificate.
    pub fn renewals(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    /// Whether the certificate in use is past its end.
    pub fn is_expired(&self) -> bool {
        self.current.load().info.not_after <= OffsetDateTime::now_utc()
    }

    /// The TLS configuration of the accepting end: a client certificate of our trust domain is mandatory, and one
    /// of `mesh-h2` (preferred) and `h2`.
    ///
    /// # Errors
    /// [`Kind::TlsFailure`] when the certificate has expired because every renewal failed.
    pub fn server_config(&self) -> Result<Arc<ServerConfig>> {
        Ok(Arc::clone(&self.valid()?.server))
    }

    /// The TLS configuration of the dialling end: the peer must prove one of the `expected` identities.
    ///
    /// # Errors
    /// [`Kind::TlsFailure`] when the certificate has expired because every renewal failed.
    pub fn client_config(&self, expected: &[SpiffeId], alpn: &[&[u8]]) -> Result<Arc<ClientConfig>> {
        Ok(self.valid()?.client(expected, alpn))
    }

    fn valid(&self) -> Result<Arc<Current>> {
        let current = self.current.load_full();
        if current.info.not_after <= OffsetDateTime::now_utc() {
            let (id, at) = (&self.id, current.info.not_after);
            return Err(Error::new(
                Kind::TlsFailure,
                format!(
                    "the certificate of {id} expired at {at} and no renewal has succeeded since; see the log for why"
                ),
            ));
        }
        Ok(current)
    }
}

impl fmt::Debug for WorkloadIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let certificate = &self.current.load().info;
        f.debug_struct("WorkloadIdentity").field("certificate", certificate).finish_non_exhaustive()
    }
}

/// The name a rustls client wants for its peer. An address, so that no SNI is sent; no verifier reads it.
pub(crate) fn server_name(peer: IpAddr) -> ServerName<'static> {
    ServerName::IpAddress(peer.into())
}
