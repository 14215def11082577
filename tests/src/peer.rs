//! A peer of the mesh's port 15008 made by hand: TLS 1.3 with whatever certificate a test gives it, or with none.
//!
//! Promises: the peer believes any server, so that the only one to refuse is the agent; certificates are signed with the
//! key of the lab's own root, or of a root that nobody knows. Never a part of the agent: what it proves is that the agent
//! judges well. Tested by the tests that use it.

use std::{
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use anyhow::Result;
use rcgen::{CertificateParams, DistinguishedName, IsCa, Issuer, KeyPair, SanType};
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime},
    version::TLS13,
};
use time::{Duration, OffsetDateTime};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{Pod, pki::Authority};

/// A key and its certificate.
#[derive(Debug)]
pub struct Certificate {
    /// Serial number, in hex.
    pub serial: String,
    chain: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

/// When a certificate is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validity {
    /// From an hour ago for another hour.
    Now,
    /// From two hours ago until an hour ago.
    Expired,
}

impl Validity {
    fn times(self) -> (OffsetDateTime, OffsetDateTime) {
        let (now, hour) = (OffsetDateTime::now_utc(), Duration::hours(1));
        match self {
            Self::Now => (now - hour, now + hour),
            Self::Expired => (now - hour - hour, now - hour),
        }
    }
}

impl Certificate {
    /// For `identity` (a SPIFFE URI), signed with the root that the agents of a state directory share.
    pub fn of_lab(state_dir: &Path, identity: &str, validity: Validity) -> Result<Self> {
        Self::signed(&Authority::of_state_dir(state_dir)?.issuer()?, identity, validity)
    }

    /// For `identity`, valid now, signed with a root that looks like the lab's and is another.
    pub fn of_another_root(identity: &str) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
        let root = Issuer::new(params, KeyPair::generate()?);
        Self::signed(&root, identity, Validity::Now)
    }

    fn signed(root: &Issuer<'_, KeyPair>, identity: &str, validity: Validity) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.try_into()?)];
        (params.not_before, params.not_after) = validity.times();
        let serial: u64 = next_serial();
        params.serial_number = Some(serial.into());
        let (serial, key) = (format!("{serial:x}"), KeyPair::generate()?);
        let chain = params.signed_by(&key, root)?.der().clone();
        Ok(Self { serial, chain, key: PrivatePkcs8KeyDer::from(key.serialize_der()).into() })
    }
}

/// A number that no other certificate of this test has.
fn next_serial() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0x5e1f_0000);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A TCP connection from a pod's network namespace.
pub fn dial(from: &Pod, to: SocketAddr) -> Result<TcpStream> {
    let stream = from.netns().inside(|| Ok(std::net::TcpStream::connect(to)?))?;
    stream.set_nonblocking(true)?;
    Ok(TcpStream::from_std(stream)?)
}

/// The client's half of a handshake for `mesh-h2`. In TLS 1.3 it succeeds before the server has judged the client: a
/// refusal shows when something is read.
pub async fn handshake(stream: TcpStream, certificate: Option<&Certificate>) -> Result<TlsStream<TcpStream>> {
    handshake_for(stream, certificate, b"mesh-h2").await
}

/// The same for HBONE, as a ztunnel speaks it.
pub async fn hbone_handshake(stream: TcpStream, certificate: &Certificate) -> Result<TlsStream<TcpStream>> {
    handshake_for(stream, Some(certificate), b"h2").await
}

async fn handshake_for(
    stream: TcpStream,
    certificate: Option<&Certificate>,
    alpn: &[u8],
) -> Result<TlsStream<TcpStream>> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Credulous(provider)));
    let mut config = match certificate {
        None => config.with_no_client_auth(),
        Some(Certificate { chain, key, .. }) => {
            config.with_client_auth_cert(vec![chain.clone()], key.clone_key())?
        }
    };
    config.alpn_protocols = vec![alpn.to_vec()];
    let server = ServerName::from(stream.peer_addr()?.ip());
    Ok(TlsConnector::from(Arc::new(config)).connect(server, stream).await?)
}

/// Believes any server whose key has signed the handshake.
#[derive(Debug)]
pub struct Credulous(pub Arc<CryptoProvider>);

impl ServerCertVerifier for Credulous {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not offered".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
