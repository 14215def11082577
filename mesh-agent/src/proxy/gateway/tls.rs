//! TLS that ends at a gateway: what it shows, whom it asks for a certificate, and what is known of a client after the handshake.
//!
//! Promises that a server whose certificate, key or authorities cannot be used serves nobody, and that of clients it is told only
//! what was verified. What a server shows is the same for as long as its configuration is: a replaced certificate comes with
//! another, and handshakes under way finish with theirs. Tested below, and in the lab (`tests/tests/gateway/tls.rs`).

use std::{fmt::Write as _, io, net::SocketAddr, sync::Arc};

use aws_lc_rs::digest::{SHA256, digest};
use http::HeaderValue;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error as TlsError, ServerConfig,
    SignatureScheme, SupportedProtocolVersion,
    client::danger::HandshakeSignatureValid,
    crypto::{CryptoProvider, aws_lc_rs::default_provider},
    server::{
        NoServerSessionStorage, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::SingleCertAndKey,
    version::{TLS12, TLS13},
};
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use x509_parser::{
    objects::{oid_registry, oid2abbrev},
    prelude::{FromDer as _, GeneralName, X509Certificate},
    x509::X509Name,
};

use crate::{
    copy::Socket,
    detect::Prefixed,
    error::{Error, Kind, Result},
    identity::{Shown, SpiffeId, Usage, WorkloadIdentity, single_identity},
    state::snapshot::{ServerTls, ServerTlsMode, ServerTlsRead, ServerTlsTerms, TlsVersion},
    upstream::has_name,
};

/// ALPN of HTTP/2.
pub(super) const HTTP2: &[u8] = b"h2";
const HTTP1: &[u8] = b"http/1.1";

/// What is inside TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Inside {
    Requests,
    Bytes,
}

/// What TLS tells of a client.
#[derive(Debug, Clone)]
pub(super) struct Client {
    /// Who it is in the mesh (`ISTIO_MUTUAL`).
    pub identity: Option<SpiffeId>,
    /// What it proved that with.
    pub shown: Option<Arc<Shown>>,
    /// What apps are told of its certificate (`x-forwarded-client-cert`).
    pub certificate: Option<HeaderValue>,
    /// What its server asked of it.
    asked: Option<Arc<ServerTls>>,
}

impl Client {
    /// One that has proved nothing.
    pub const fn unknown() -> Self {
        Self { identity: None, shown: None, certificate: None, asked: None }
    }

    /// Whether it has proved all that a server asks for now: that may be more than when it came.
    pub fn satisfies(&self, tls: &ServerTls) -> bool {
        let now = &tls.terms;
        let asked = self.asked.as_ref().map(|asked| (asked.terms.mode, &asked.terms.names));
        now.mode == ServerTlsMode::Simple || asked == Some((now.mode, &now.names))
    }
}

/// A client's connection once its TLS ends here.
pub(super) type Secure = Box<TlsStream<Prefixed<Socket>>>;

/// The server's half of a handshake. A time limit is the caller's.
///
/// # Errors
/// [`Kind::Unauthenticated`] and [`Kind::Revoked`] where the client has not proved what it has to, [`Kind::TlsFailure`] for all else.
pub(super) async fn accept(
    client: Prefixed<Socket>,
    tls: &Arc<ServerTls>,
    identity: &WorkloadIdentity,
    inside: Inside,
    peer: SocketAddr,
) -> Result<(Secure, Client)> {
    let beginning = identity.begin();
    let config = config(tls, identity, inside)?;
    let accepted = TlsAcceptor::from(config).accept(client).await;
    let stream = accepted.map_err(|error| failed(&error, peer))?;
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let mut known = Client { asked: Some(Arc::clone(tls)), ..Client::unknown() };
    if let Some(leaf) = chain.first() {
        known.certificate = told(leaf);
        if tls.terms.mode == ServerTlsMode::IstioMutual {
            let refused = |why: &str| Error::new(Kind::Unauthenticated, format!("{peer} is refused: {why}"));
            let names = &tls.terms.names;
            if !names.is_empty() && !names.iter().any(|name| has_name(leaf, name)) {
                return Err(refused("its certificate has none of the names of subjectAltNames"));
            }
            known.identity = Some(single_identity(leaf).map_err(|why| refused(&why.to_string()))?);
            known.shown = Some(Arc::new(beginning.shown(chain, Usage::Client)));
        }
    }
    Ok((Box::new(stream), known))
}

fn config(tls: &ServerTls, identity: &WorkloadIdentity, inside: Inside) -> Result<Arc<ServerConfig>> {
    let config = if tls.terms.mode == ServerTlsMode::IstioMutual {
        let mut config = ServerConfig::clone(&*identity.server_config()?);
        config.alpn_protocols = alpn();
        Arc::new(config)
    } else {
        let made = tls.made.get_or_init(|| make(tls).map(Arc::new));
        let broken = |why: &String| Error::new(Kind::TlsFailure, format!("its server serves nobody: {why}"));
        Arc::clone(made.as_ref().map_err(broken)?)
    };
    if inside == Inside::Requests {
        return Ok(config);
    }
    let mut config = ServerConfig::clone(&config);
    config.alpn_protocols.clear();
    Ok(Arc::new(config))
}

fn alpn() -> Vec<Vec<u8>> {
    vec![HTTP2.to_vec(), HTTP1.to_vec()]
}

fn make(tls: &ServerTls) -> std::result::Result<ServerConfig, String> {
    let read = tls.read.as_ref().map_err(ToString::to_string)?;
    let certified = read.certified.clone().ok_or("it has no certificate")?;
    let provider = Arc::new(provider(&tls.terms));
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&versions(&tls.terms))
        .map_err(|error| error.to_string())?;
    let asks = tls.terms.mode != ServerTlsMode::Simple;
    let builder = if asks {
        builder.with_client_cert_verifier(verifier(&tls.terms, read, provider)?)
    } else {
        builder.with_no_client_auth()
    };
    let mut config = builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
    config.alpn_protocols = alpn();
    if asks {
        // Each handshake verifies anew: what was believed once may have been revoked.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
    }
    Ok(config)
}

fn provider(terms: &ServerTlsTerms) -> CryptoProvider {
    let provider = default_provider();
    if terms.ciphers.is_empty() {
        return provider;
    }
    CryptoProvider { cipher_suites: terms.ciphers.clone(), ..provider }
}

fn versions(terms: &ServerTlsTerms) -> Vec<&'static SupportedProtocolVersion> {
    let all = [(TlsVersion::V1_2, &TLS12), (TlsVersion::V1_3, &TLS13)];
    let taken = |version| terms.least <= version && version <= terms.most;
    all.into_iter().filter(|(version, _)| taken(*version)).map(|(_, version)| version).collect()
}

fn verifier(
    terms: &ServerTlsTerms,
    read: &ServerTlsRead,
    provider: Arc<CryptoProvider>,
) -> std::result::Result<Arc<dyn ClientCertVerifier>, String> {
    let roots = read.roots.clone().ok_or("it has no authority whose clients are believed")?;
    let mut builder = WebPkiClientVerifier::builder_with_provider(roots, provider)
        .with_crls(read.revoked.iter().cloned())
        .enforce_revocation_expiration();
    if terms.mode == ServerTlsMode::OptionalMutual {
        builder = builder.allow_unauthenticated();
    }
    let chain = builder.build().map_err(|error| error.to_string())?;
    if terms.names.is_empty() {
        return Ok(chain);
    }
    Ok(Arc::new(Named { chain, names: terms.names.clone() }))
}

/// Believes of those whose chain is in order the ones with one of these names (`subjectAltNames`).
#[derive(Debug)]
struct Named {
    chain: Arc<dyn ClientCertVerifier>,
    names: Vec<Arc<str>>,
}

impl ClientCertVerifier for Named {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.chain.client_auth_mandatory()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> std::result::Result<ClientCertVerified, TlsError> {
        let verified = self.chain.verify_client_cert(leaf, intermediates, now)?;
        if self.names.iter().any(|name| has_name(leaf, name)) {
            return Ok(verified);
        }
        Err(CertificateError::NotValidForName.into())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, TlsError> {
        self.chain.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, TlsError> {
        self.chain.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

fn failed(error: &io::Error, peer: SocketAddr) -> Error {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<TlsError>());
    let refused = |kind, why: &str| Error::new(kind, format!("{peer} is refused: {why}"));
    match cause {
        Some(TlsError::NoCertificatesPresented) => {
            refused(Kind::Unauthenticated, "it has shown no client certificate")
        }
        Some(TlsError::InvalidCertificate(CertificateError::Revoked)) => {
            refused(Kind::Revoked, "its certificate, or one above it, is revoked")
        }
        Some(TlsError::InvalidCertificate(CertificateError::NotValidForName)) => {
            refused(Kind::Unauthenticated, "its certificate has none of the names of subjectAltNames")
        }
        Some(TlsError::InvalidCertificate(why)) => {
            refused(Kind::Unauthenticated, &format!("its certificate is not acceptable: {why}"))
        }
        Some(TlsError::InvalidMessage(_)) => refused(Kind::TlsFailure, "what it has sent is no TLS"),
        Some(other) => Error::new(Kind::TlsFailure, format!("the TLS handshake with {peer} failed: {other}")),
        None => Error::new(Kind::TlsFailure, format!("the TLS handshake with {peer} failed: {error}")),
    }
}

/// What apps are told of a certificate that was verified: `Hash`, `Subject` and each `URI`, as Envoy writes them.
fn told(leaf: &CertificateDer<'_>) -> Option<HeaderValue> {
    let mut text = "Hash=".to_owned();
    for byte in digest(&SHA256, leaf).as_ref() {
        // A string takes all that is written.
        let _ = write!(text, "{byte:02x}");
    }
    let hash = text.len();
    if let Ok((_, certificate)) = X509Certificate::from_der(leaf) {
        let _ = write!(text, ";Subject=\"{}\"", subject(certificate.subject()));
        let names = certificate.subject_alternative_name().ok().flatten();
        for name in names.iter().flat_map(|names| &names.value.general_names) {
            // What would be read as something else is left out.
            if let GeneralName::URI(uri) = name
                && !uri.contains([',', ';', '"', '='])
            {
                let _ = write!(text, ";URI={uri}");
            }
        }
    }
    // What no header may have is not told.
    HeaderValue::from_str(&text).or_else(|_| HeaderValue::from_str(&text[..hash])).ok()
}

/// A name as RFC 2253 writes it: the last part first.
fn subject(name: &X509Name<'_>) -> String {
    let mut parts: Vec<String> = name
        .iter_attributes()
        .map(|part| {
            let key = oid2abbrev(part.attr_type(), oid_registry())
                .map_or_else(|_| part.attr_type().to_id_string(), str::to_owned);
            format!("{key}={}", escaped(part.as_str().unwrap_or_default()))
        })
        .collect();
    parts.reverse();
    parts.join(",")
}

fn escaped(value: &str) -> String {
    let mut escaped = String::with_capacity(value.len());
    for c in value.chars() {
        if [',', '+', '"', '\\', '<', '>', ';'].contains(&c) {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    escaped
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SanType};

    use super::*;

    fn certificate(name: &str, uris: &[&str]) -> CertificateDer<'static> {
        let mut params = CertificateParams::new(vec!["a.example".to_owned()]).unwrap();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "Shop, Inc.");
        params.distinguished_name.push(DnType::CommonName, name);
        for uri in uris {
            params.subject_alt_names.push(SanType::URI((*uri).try_into().unwrap()));
        }
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    #[test]
    fn versions_and_suites_are_those_that_are_written() {
        let terms = |least, most, ciphers| ServerTlsTerms {
            mode: ServerTlsMode::Simple,
            chain: None,
            key: None,
            roots: None,
            revoked: None,
            names: Vec::new(),
            least,
            most,
            ciphers,
        };
        let spoken = |terms: &ServerTlsTerms| {
            versions(terms).iter().map(|version| version.version).collect::<Vec<_>>()
        };
        let (v2, v3) = (rustls::ProtocolVersion::TLSv1_2, rustls::ProtocolVersion::TLSv1_3);
        for (least, most, expected) in [
            (TlsVersion::V1_2, TlsVersion::V1_3, vec![v2, v3]),
            (TlsVersion::V1_2, TlsVersion::V1_2, vec![v2]),
            (TlsVersion::V1_3, TlsVersion::V1_3, vec![v3]),
        ] {
            assert_eq!(spoken(&terms(least, most, Vec::new())), expected);
        }
        let all = default_provider().cipher_suites;
        let suites = |ciphers| provider(&terms(TlsVersion::V1_2, TlsVersion::V1_3, ciphers)).cipher_suites;
        assert_eq!(suites(Vec::new()), all);
        assert_eq!(suites(vec![all[1], all[0]]), [all[1], all[0]]);
    }

    #[test]
    fn a_certificate_is_told_by_hash_subject_and_names() {
        let uri = "spiffe://cluster.local/ns/a/sa/b";
        let shown = told(&certificate("say \"hi\"", &[uri, "urn:a;By=b"])).unwrap();
        let shown = shown.to_str().unwrap();
        let (hash, rest) = shown.split_once(';').unwrap();
        assert!(hash.strip_prefix("Hash=").is_some_and(|hash| hash.len() == 64), "{shown}");
        assert_eq!(rest, format!("Subject=\"CN=say \\\"hi\\\",O=Shop\\, Inc.\";URI={uri}"));
        let broken = told(&certificate("a\nb", &[])).unwrap();
        assert!(broken.to_str().unwrap().starts_with("Hash=") && broken.len() == 69, "{broken:?}");
    }
}
