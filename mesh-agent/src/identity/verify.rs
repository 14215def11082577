//! Who a peer is, from the certificate it showed: the chain first, then the identity in its URI SAN.
//!
//! No host name is ever compared, and nothing is believed that does not chain to the mesh's roots ([`Trust`]) or that is
//! revoked, at either end. Tested by the handshakes in `tunnel/tests`, and below for the names alone.

use std::{fmt, sync::Arc};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::{
    SpiffeId,
    trust::{Chain, Trust, Usage, for_rustls},
};

/// Why a peer whose certificate is in order is still not let in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PeerRefusal {
    /// None or several URI names, or one that is no SPIFFE identity of our shape.
    #[error("its certificate has no single SPIFFE identity: {0}")]
    NoIdentity(String),
    /// From another trust domain.
    #[error("it is {peer}, of another trust domain than ours ({ours})")]
    ForeignTrustDomain {
        /// Whom it proved to be.
        peer: SpiffeId,
        /// Our trust domain.
        ours: Arc<str>,
    },
    /// Not whom we meant to reach.
    #[error("it is {}, expected was {}", join(.actual), join(.expected))]
    NotExpected {
        /// What its certificate says.
        actual: Vec<String>,
        /// Whom we would have accepted.
        expected: Vec<SpiffeId>,
    },
}

fn join(items: &[impl ToString]) -> String {
    match items {
        [] => "nobody".to_owned(),
        items => items.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or "),
    }
}

impl From<PeerRefusal> for rustls::Error {
    fn from(refusal: PeerRefusal) -> Self {
        CertificateError::Other(OtherError(Arc::new(refusal))).into()
    }
}

/// The URI names of a certificate.
fn uris(certificate: &CertificateDer<'_>) -> Result<Vec<String>, PeerRefusal> {
    let unreadable = |error: &dyn fmt::Display| PeerRefusal::NoIdentity(error.to_string());
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|error| unreadable(&error))?;
    let san = parsed.subject_alternative_name().map_err(|error| unreadable(&error))?;
    let names = san.map(|extension| extension.value.general_names.as_slice()).unwrap_or_default();
    Ok(names
        .iter()
        .filter_map(|name| if let GeneralName::URI(uri) = name { Some((*uri).to_owned()) } else { None })
        .collect())
}

/// The one identity of a certificate whose chain is already verified.
pub(crate) fn single_identity(certificate: &CertificateDer<'_>) -> Result<SpiffeId, PeerRefusal> {
    match uris(certificate)?.as_slice() {
        [uri] => uri.parse().map_err(|error| PeerRefusal::NoIdentity(format!("{error}"))),
        several => Err(PeerRefusal::NoIdentity(format!("{} URI names", several.len()))),
    }
}

/// The same of any certificate, for tests of what can be in one. Proves nothing: nobody has verified its chain.
pub fn certified_identity(certificate: &CertificateDer<'_>) -> Option<SpiffeId> {
    single_identity(certificate).ok()
}

/// The expected identity that a certificate, whose chain is already verified, has among its URI names.
pub(crate) fn expected_identity(
    certificate: &CertificateDer<'_>,
    expected: &[SpiffeId],
) -> Result<SpiffeId, PeerRefusal> {
    let actual = uris(certificate)?;
    let found = actual.iter().filter_map(|uri| uri.parse::<SpiffeId>().ok()).find(|id| expected.contains(id));
    found.ok_or(PeerRefusal::NotExpected { actual, expected: expected.to_vec() })
}

/// TLS 1.2 is never offered.
fn no_tls12() -> rustls::Error {
    rustls::PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig.into()
}

/// The server's side: a client certificate is mandatory, its chain and its trust domain are verified.
pub(super) struct VerifyClient {
    trust: Arc<Trust>,
    algorithms: WebPkiSupportedAlgorithms,
    trust_domain: Arc<str>,
}

impl VerifyClient {
    pub(super) fn new(trust: Arc<Trust>, provider: &CryptoProvider, trust_domain: Arc<str>) -> Self {
        Self { trust, algorithms: provider.signature_verification_algorithms, trust_domain }
    }
}

impl fmt::Debug for VerifyClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VerifyClient").field("trust_domain", &self.trust_domain).finish_non_exhaustive()
    }
}

impl ClientCertVerifier for VerifyClient {
    /// None: a workload has one certificate to show, and roots change while a handshake is under way.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let chain = Chain { leaf, intermediates, usage: Usage::Client, algorithms: &self.algorithms };
        self.trust.verify(chain, now).map_err(for_rustls)?;
        let peer = single_identity(leaf)?;
        if peer.trust_domain != self.trust_domain {
            return Err(PeerRefusal::ForeignTrustDomain { peer, ours: Arc::clone(&self.trust_domain) }.into());
        }
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// The client's side: the chain is verified and one of the expected identities must be in the certificate, before
/// our own certificate is shown.
pub(super) struct VerifyServer {
    trust: Arc<Trust>,
    algorithms: WebPkiSupportedAlgorithms,
    expected: Vec<SpiffeId>,
}

impl VerifyServer {
    pub(super) fn new(trust: Arc<Trust>, provider: &CryptoProvider, expected: &[SpiffeId]) -> Self {
        let algorithms = provider.signature_verification_algorithms;
        Self { trust, algorithms, expected: expected.to_vec() }
    }
}

impl fmt::Debug for VerifyServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VerifyServer").field("expected", &self.expected).finish_non_exhaustive()
    }
}

impl ServerCertVerifier for VerifyServer {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let chain = Chain { leaf, intermediates, usage: Usage::Server, algorithms: &self.algorithms };
        self.trust.verify(chain, now).map_err(for_rustls)?;
        expected_identity(leaf, &self.expected)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, SanType};

    use super::*;

    type TestResult = Result<(), Box<dyn std::error::Error>>;

    const ONE: &str = "spiffe://cluster.local/ns/a/sa/one";
    const TWO: &str = "spiffe://cluster.local/ns/a/sa/two";

    fn named(uris: &[&str]) -> Result<CertificateDer<'static>, rcgen::Error> {
        let mut params = CertificateParams::new(vec!["dns.example".to_owned()])?;
        for uri in uris {
            params.subject_alt_names.push(SanType::URI((*uri).try_into()?));
        }
        Ok(params.self_signed(&KeyPair::generate()?)?.der().clone())
    }

    #[test]
    fn a_client_has_exactly_one_identity() -> TestResult {
        assert_eq!(single_identity(&named(&[ONE])?)?, ONE.parse()?);
        for uris in [&[][..], &[ONE, TWO], &["https://example.com/"], &["spiffe://cluster.local/one"]] {
            let refusal = single_identity(&named(uris)?);
            assert!(matches!(refusal, Err(PeerRefusal::NoIdentity(_))), "{refusal:?}");
        }
        assert!(single_identity(&CertificateDer::from_slice(b"garbage")).is_err());
        Ok(())
    }

    #[test]
    fn a_server_has_an_expected_identity() -> TestResult {
        let certificate = named(&[ONE, TWO])?;
        assert_eq!(expected_identity(&certificate, &[TWO.parse()?])?, TWO.parse()?);
        let refusal = expected_identity(&certificate, &["spiffe://cluster.local/ns/a/sa/three".parse()?]);
        let Err(refusal) = refusal else { return Err("accepted".into()) };
        assert!(refusal.to_string().contains(&format!("it is {ONE} or {TWO}, expected was")), "{refusal}");
        assert!(expected_identity(&certificate, &[]).is_err(), "nobody expected, somebody accepted");
        Ok(())
    }
}
