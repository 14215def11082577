//! What an authority elsewhere gave us, looked at before it is used: nothing of it is believed for having come.
//!
//! A leaf is taken only with our key, exactly the identity asked for, and a chain to the roots that holds now at either
//! end of a handshake. Tested by the unit tests below and in `remote.rs`.

use std::sync::Arc;

use rustls::{
    RootCertStore,
    client::verify_server_cert_signed_by_trust_anchor,
    crypto::aws_lc_rs::default_provider,
    server::{ParsedCertificate, WebPkiClientVerifier},
};
use rustls_pki_types::{CertificateDer, UnixTime, pem::PemObject};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{
    SpiffeId,
    ca::{CertificateInfo, info},
    trust::{Root, Roots},
    verify::{PeerRefusal, single_identity},
};

/// Why what an authority gave is not used.
#[derive(Debug, thiserror::Error)]
pub(super) enum AnswerError {
    #[error("it has no certificate")]
    Empty,
    #[error("it is no PEM: {0}")]
    Pem(rustls_pki_types::pem::Error),
    #[error("it holds what is no certificate: {0}")]
    NotACertificate(String),
    #[error("the certificate is for another key than the one it was asked for")]
    OtherKey,
    #[error("the certificate is for {actual}, asked was {asked}")]
    OtherIdentity { actual: SpiffeId, asked: SpiffeId },
    #[error(transparent)]
    Identity(#[from] PeerRefusal),
    #[error("it has no roots, and none were given")]
    NoRoots,
    #[error("its chain does not hold: {0}")]
    Chain(String),
}

/// A certificate that was found good.
#[derive(Debug)]
pub(super) struct Checked {
    /// Leaf first; no root.
    pub chain: Vec<CertificateDer<'static>>,
    pub roots: Roots,
    pub info: CertificateInfo,
}

/// The certificates of several PEM texts, in order.
pub(super) fn certificates<T: AsRef<[u8]>>(texts: &[T]) -> Result<Vec<CertificateDer<'static>>, AnswerError> {
    let mut certificates = Vec::new();
    for text in texts {
        for certificate in CertificateDer::pem_slice_iter(text.as_ref()) {
            certificates.push(certificate.map_err(AnswerError::Pem)?);
        }
    }
    Ok(certificates)
}

/// Takes the roots, which certify themselves, out of what was sent with a leaf.
pub(super) fn split_roots(
    sent: Vec<CertificateDer<'static>>,
) -> Result<(Vec<CertificateDer<'static>>, Vec<CertificateDer<'static>>), AnswerError> {
    let (mut chain, mut roots) = (Vec::new(), Vec::new());
    for certificate in sent {
        let parsed = parse(&certificate)?;
        let is_root = !chain.is_empty() && parsed.is_ca() && parsed.subject() == parsed.issuer();
        if is_root { roots.push(certificate) } else { chain.push(certificate) }
    }
    Ok((chain, roots))
}

/// The chain, if it is one for this identity and this key (its `SubjectPublicKeyInfo`) under these roots.
pub(super) fn check(
    chain: Vec<CertificateDer<'static>>,
    roots: &[CertificateDer<'static>],
    asked: &SpiffeId,
    key: &[u8],
) -> Result<Checked, AnswerError> {
    let (leaf, intermediates) = chain.split_first().ok_or(AnswerError::Empty)?;
    if parse(leaf)?.public_key().raw != key {
        return Err(AnswerError::OtherKey);
    }
    let actual = single_identity(leaf)?;
    if actual != *asked {
        return Err(AnswerError::OtherIdentity { actual, asked: asked.clone() });
    }
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone()).map_err(|error| AnswerError::NotACertificate(error.to_string()))?;
    }
    if store.is_empty() {
        return Err(AnswerError::NoRoots);
    }
    verify(leaf, intermediates, &Arc::new(store)).map_err(|error| AnswerError::Chain(error.to_string()))?;
    let roots = roots.iter().map(|root| Root::of(root.clone()));
    let roots = Roots::new(roots.collect::<Result<Vec<_>, _>>().map_err(AnswerError::NotACertificate)?);
    let info = info(asked, leaf).map_err(|error| AnswerError::NotACertificate(error.to_string()))?;
    Ok(Checked { chain, roots, info })
}

/// As peers will, whichever end they are at.
fn verify(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    roots: &Arc<RootCertStore>,
) -> Result<(), rustls::Error> {
    let (now, provider) = (UnixTime::now(), Arc::new(default_provider()));
    let algorithms = provider.signature_verification_algorithms.all;
    let parsed = ParsedCertificate::try_from(leaf)?;
    verify_server_cert_signed_by_trust_anchor(&parsed, roots, intermediates, now, algorithms)?;
    WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), provider)
        .build()
        .map_err(|error| rustls::Error::General(error.to_string()))?
        .verify_client_cert(leaf, intermediates, now)
        .map(|_| ())
}

fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, AnswerError> {
    X509Certificate::from_der(certificate)
        .map(|(_, parsed)| parsed)
        .map_err(|error| AnswerError::NotACertificate(error.to_string()))
}
