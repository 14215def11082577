//! TLS that the agent begins towards endpoints outside the mesh, as the `tls` of their rule says.
//!
//! Promises: where a rule asks for TLS nothing is sent in the clear, whatever fails; the server proves the name that it is
//! asked for by, or one of `subjectAltNames`, unless the rule says that anybody is believed; and where there are lists of what
//! is revoked, nobody is believed of whom they do not say that he is not. Tested below, and in the lab
//! (`tests/tests/tls_origination.rs`).

use std::{io, sync::Arc};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_name,
    },
    crypto::{CryptoProvider, aws_lc_rs::default_provider, verify_tls13_signature},
    server::ParsedCertificate,
};
use rustls_pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _,
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use webpki::{
    CertRevocationList, EndEntityCert, ExpirationPolicy, KeyUsage, OwnedCertRevocationList,
    RevocationOptionsBuilder,
};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use crate::{
    copy::Socket,
    error::{Error, Kind, Result},
    identity::for_rustls,
    state::snapshot::{ClientTls, Protocol, TlsTerms},
};

/// The handshake on a connection that was made for this protocol.
pub(super) async fn handshake(
    tls: &ClientTls,
    protocol: Protocol,
    stream: TcpStream,
) -> Result<TlsStream<Socket>> {
    let server = &tls.terms.server;
    let failed = |why: String| Error::new(Kind::TlsFailure, format!("TLS with {server}: {why}"));
    let (at, alpn) = match protocol {
        Protocol::Opaque => (0, None),
        Protocol::Http1 => (1, Some(&b"http/1.1"[..])),
        Protocol::Http2 => (2, Some(&b"h2"[..])),
    };
    // Once for all connections: to read the system's roots takes long.
    let made = tls.made[at].get_or_init(|| config(&tls.terms, alpn).map(Arc::new));
    let config = made.as_ref().map_err(|why| failed(why.clone()))?;
    let name = ServerName::try_from(server.to_string()).map_err(|error| failed(error.to_string()))?;
    let connector = TlsConnector::from(Arc::clone(config));
    let stream =
        connector.connect(name, Socket::new(stream)).await.map_err(|error| failed(reason(&error)))?;
    // A server that knows no ALPN speaks HTTP/1.1.
    if protocol == Protocol::Http2 && stream.get_ref().1.alpn_protocol() != alpn {
        return Err(failed("it does not speak HTTP/2 (ALPN)".to_owned()));
    }
    Ok(stream)
}

/// Why a handshake has failed: of what the lists say in their own words.
fn reason(error: &io::Error) -> String {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>());
    let Some(rustls::Error::InvalidCertificate(why)) = cause else { return error.to_string() };
    match why {
        CertificateError::Revoked => {
            "its certificate, or one above it, is revoked (caCrl, ca.crl)".to_owned()
        }
        CertificateError::UnknownRevocationStatus => {
            "of an authority of its certificate there is no list of what it has revoked (caCrl, ca.crl)"
                .to_owned()
        }
        CertificateError::ExpiredRevocationList | CertificateError::ExpiredRevocationListContext { .. } => {
            format!("the list of what its authority has revoked is out of date (caCrl, ca.crl): {error}")
        }
        _ => error.to_string(),
    }
}

fn config(terms: &TlsTerms, alpn: Option<&[u8]>) -> std::result::Result<ClientConfig, String> {
    let provider = Arc::new(default_provider());
    let revoked = terms.revoked.as_deref().map(lists).transpose()?.unwrap_or_default();
    let verifier =
        Verifier { roots: roots(terms)?, revoked, terms: terms.clone(), provider: Arc::clone(&provider) };
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match &terms.shows {
        None => config.with_no_client_auth(),
        Some(shows) => {
            let chain =
                certificates(&shows.chain).map_err(|why| format!("the client's certificate: {why}"))?;
            let key = PrivateKeyDer::from_pem_slice(&shows.key);
            let key = key.map_err(|error| format!("the client's key: {error}"))?;
            config.with_client_auth_cert(chain, key).map_err(|error| error.to_string())?
        }
    };
    config.alpn_protocols = alpn.map(<[u8]>::to_vec).into_iter().collect();
    Ok(config)
}

fn roots(terms: &TlsTerms) -> std::result::Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    match &terms.roots {
        _ if terms.anybody => {}
        Some(pem) => {
            for certificate in certificates(pem).map_err(|why| format!("the roots: {why}"))? {
                roots.add(certificate).map_err(|error| format!("the roots: {error}"))?;
            }
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                return Err(
                    "the system has no roots; name some by credentialName or caCertificates".to_owned()
                );
            }
        }
    }
    Ok(roots)
}

fn certificates(pem: &[u8]) -> std::result::Result<Vec<CertificateDer<'static>>, String> {
    let read = CertificateDer::pem_slice_iter(pem).collect::<std::result::Result<Vec<_>, _>>();
    let certificates = read.map_err(|error| error.to_string())?;
    if certificates.is_empty() { Err("there is no certificate".to_owned()) } else { Ok(certificates) }
}

/// The lists of what is revoked. One that says nothing of anybody would be taken for one that does.
fn lists(pem: &[u8]) -> std::result::Result<Vec<CertRevocationList<'static>>, String> {
    let mut lists = Vec::new();
    for der in CertificateRevocationListDer::pem_slice_iter(pem) {
        let list = der.map_err(|error| error.to_string());
        let list =
            list.and_then(|der| OwnedCertRevocationList::from_der(&der).map_err(|error| error.to_string()));
        lists.push(list.map_err(|why| format!("the lists of what is revoked: {why}"))?.into());
    }
    if lists.is_empty() {
        return Err("the lists of what is revoked: there is no list (`X509 CRL`)".to_owned());
    }
    Ok(lists)
}

/// Whom a rule believes.
#[derive(Debug)]
struct Verifier {
    roots: RootCertStore,
    /// Lists of what is revoked; none: nobody is asked.
    revoked: Vec<CertRevocationList<'static>>,
    terms: TlsTerms,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    /// Whether an authority stands behind a certificate, and has not revoked it. As in Envoy, where there are lists every
    /// authority up to the root has to have one, that is not out of date.
    fn chain(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> std::result::Result<(), rustls::Error> {
        let leaf = EndEntityCert::try_from(leaf).map_err(for_rustls)?;
        let lists: Vec<&CertRevocationList<'_>> = self.revoked.iter().collect();
        // Fails without lists alone.
        let asked = RevocationOptionsBuilder::new(&lists).ok();
        let asked = asked.map(|asked| asked.with_expiration_policy(ExpirationPolicy::Enforce).build());
        let algorithms = self.provider.signature_verification_algorithms.all;
        let (roots, usage) = (&self.roots.roots, KeyUsage::server_auth());
        let verified = leaf.verify_for_usage(algorithms, roots, intermediates, now, usage, asked, None);
        verified.map(drop).map_err(|error| match error {
            webpki::Error::UnknownRevocationStatus => CertificateError::UnknownRevocationStatus.into(),
            error => for_rustls(error),
        })
    }
}

/// Whether a certificate has this name: of a host (exact, or by the certificate's own wildcard), an address, or a URI.
pub fn has_name(leaf: &CertificateDer<'_>, name: &str) -> bool {
    if let (Ok(parsed), Ok(name)) = (ParsedCertificate::try_from(leaf), ServerName::try_from(name))
        && verify_server_name(&parsed, &name).is_ok()
    {
        return true;
    }
    let Ok((_, certificate)) = X509Certificate::from_der(leaf) else { return false };
    let Ok(Some(names)) = certificate.subject_alternative_name() else { return false };
    names.value.general_names.iter().any(|one| matches!(one, GeneralName::URI(uri) if *uri == name))
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        if self.terms.anybody {
            return Ok(ServerCertVerified::assertion());
        }
        let parsed = ParsedCertificate::try_from(leaf)?;
        self.chain(leaf, intermediates, now)?;
        if self.terms.names.is_empty() {
            verify_server_name(&parsed, server)?;
        } else if !self.terms.names.iter().any(|name| has_name(leaf, name)) {
            return Err(CertificateError::NotValidForName.into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests;
