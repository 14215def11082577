//! What an authority signs with, and what is to be believed: a signing pair, the certificates above it, a bundle of roots.
//!
//! Promises: what is assembled belongs together (a leaf signed by the pair is believed by the bundle: one is tried), is
//! in its time and of this trust domain; else nothing comes of it, and the file and the reason are named. In Istio's words
//! the parts are `ca-key.pem`, `ca-cert.pem`, `cert-chain.pem` and `root-cert.pem`. `ca-cert.pem` may hold more
//! certificates than one: the key decides which of them signs, so that a new pair comes into force with one file.
//! Tested below and in `state_dir.rs`.

use std::fmt;

use rcgen::{Issuer, PublicKeyData, SanType};
use rustls::crypto::aws_lc_rs::default_provider;
use rustls_pki_types::{CertificateDer, UnixTime, pem::PemObject};
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::{
    SpiffeId,
    ca::LeafPolicy,
    key::SecretKey,
    trust::{CLOCK_SKEW, Chain, Root, Roots, Trust, Usage},
};

pub(crate) const KEY: &str = "ca-key.pem";
pub(crate) const CERTIFICATE: &str = "ca-cert.pem";
pub(crate) const CHAIN: &str = "cert-chain.pem";
pub(crate) const ROOTS: &str = "root-cert.pem";

/// Most certificates between a leaf and its root.
const LONGEST_CHAIN: usize = 8;

/// A file that cannot be used, and why.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Unusable {
    pub file: &'static str,
    pub reason: String,
}

fn unusable(file: &'static str, reason: impl Into<String>) -> Unusable {
    Unusable { file, reason: reason.into() }
}

/// The parts as they are read.
pub(super) struct Parts {
    pub key: SecretKey,
    /// Of which one is the key's.
    pub certificates: Vec<CertificateDer<'static>>,
    /// Those above it, in any order; may be more than are needed.
    pub chain: Vec<CertificateDer<'static>>,
    /// The roots; without them the signing certificate is the only one.
    pub roots: Option<Vec<CertificateDer<'static>>>,
}

/// A key that signs leaves, with its certificate.
pub(super) struct Signer {
    pub issuer: Issuer<'static, SecretKey>,
    pub certificate: CertificateDer<'static>,
    /// What a leaf is shown with: the certificates between it and its root.
    pub above: Vec<CertificateDer<'static>>,
    /// When the first of them ends; no leaf lasts longer.
    pub not_after: OffsetDateTime,
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signer").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

/// What signs, and what is believed.
#[derive(Debug)]
pub(super) struct Bundle {
    pub signer: Signer,
    pub roots: Roots,
}

impl Bundle {
    /// Puts the parts together.
    pub(super) fn of(parts: Parts, trust_domain: &str) -> Result<Self, Unusable> {
        let Parts { key, certificates, chain, roots } = parts;
        let of_key = |certificate: &CertificateDer<'_>| {
            let key = key.subject_public_key_info();
            X509Certificate::from_der(certificate).is_ok_and(|(_, parsed)| parsed.public_key().raw == key)
        };
        if let Some(bad) = certificates.iter().find_map(|one| X509Certificate::from_der(one).err()) {
            return Err(unusable(CERTIFICATE, format!("is not an X.509 certificate ({bad})")));
        }
        let Some(certificate) = certificates.iter().find(|certificate| of_key(certificate)).cloned() else {
            return Err(unusable(CERTIFICATE, format!("is not the certificate of the key in {KEY}")));
        };
        check(&certificate, trust_domain).map_err(|reason| unusable(CERTIFICATE, reason))?;
        let above = path(&certificate, &chain);
        let is_root = above.is_empty();
        let roots = match roots {
            Some(roots) => roots,
            None if is_root => vec![certificate.clone()],
            None => {
                let reason = format!("is no root, and {ROOTS} beside it is missing");
                return Err(unusable(CERTIFICATE, reason));
            }
        };
        let roots = roots.into_iter().map(|root| believed(root, trust_domain));
        let roots = Roots::new(roots.collect::<Result<Vec<_>, _>>().map_err(|why| unusable(ROOTS, why))?);
        let not_after = above.iter().chain([&certificate]).filter_map(ends).min();
        let issuer = Issuer::from_ca_cert_der(&certificate, key)
            .map_err(|error| unusable(CERTIFICATE, format!("cannot sign: {error}")))?;
        let not_after = not_after.unwrap_or(OffsetDateTime::UNIX_EPOCH);
        let bundle = Self { signer: Signer { issuer, certificate, above, not_after }, roots };
        bundle.prove()?;
        Ok(bundle)
    }

    /// Signs a leaf and judges it as a peer would.
    fn prove(&self) -> Result<(), Unusable> {
        let roots = Roots::new(self.roots.all.iter().cloned());
        self.signer.try_under(roots).map_err(|reason| {
            let reason = format!(
                "does not lead to a root in {ROOTS} ({reason}): nobody would believe what it signs; add its root first, \
                 and what is between them to {CHAIN}"
            );
            unusable(CERTIFICATE, reason)
        })
    }
}

impl Signer {
    /// Whether what it signs is believed by somebody who believes this root.
    pub(super) fn leads_to(&self, root: &Root) -> bool {
        self.try_under(Roots::new([root.clone()])).is_ok()
    }

    fn try_under(&self, roots: Roots) -> Result<(), String> {
        let id = SpiffeId {
            trust_domain: "mesh".into(),
            namespace: "mesh".into(),
            service_account: "probe".into(),
        };
        let said = |error: rcgen::Error| error.to_string();
        let name = SanType::URI(id.to_string().try_into().map_err(said)?);
        let key = SecretKey::generate().map_err(said)?;
        let tried = self.sign(vec![name], &key, LeafPolicy::default()).map_err(said)?;
        let algorithms = default_provider().signature_verification_algorithms;
        let Some((leaf, intermediates)) = tried.split_first() else { return Ok(()) };
        let chain = Chain { leaf, intermediates, usage: Usage::Server, algorithms: &algorithms };
        Trust::new(roots).verify(chain, UnixTime::now()).map_err(|error| error.to_string())
    }
}

/// The certificates in PEM text.
pub(super) fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match read {
        Ok(read) if read.is_empty() => Err("is not a PEM certificate (it holds none)".to_owned()),
        Ok(read) => Ok(read),
        Err(error) => Err(format!("is not a PEM certificate ({error})")),
    }
}

/// What a leaf signed with `certificate` is shown with; nothing below a root.
fn path(
    certificate: &CertificateDer<'static>,
    chain: &[CertificateDer<'static>],
) -> Vec<CertificateDer<'static>> {
    let mut path = Vec::new();
    let mut next = Some(certificate);
    while let Some(one) = next.filter(|one| !is_self_issued(one) && !path.contains(*one)) {
        path.push(one.clone());
        if path.len() == LONGEST_CHAIN {
            break;
        }
        next = chain.iter().find(|above| issued(above, one));
    }
    path
}

/// Whether a certificate names itself as its issuer.
fn is_self_issued(certificate: &CertificateDer<'_>) -> bool {
    issued(certificate, certificate)
}

/// Whether `below` names `above` as its issuer.
fn issued(above: &CertificateDer<'_>, below: &CertificateDer<'_>) -> bool {
    let (above, below) = (X509Certificate::from_der(above), X509Certificate::from_der(below));
    matches!((above, below), (Ok((_, above)), Ok((_, below))) if above.subject().as_raw() == below.issuer().as_raw())
}

fn ends(certificate: &CertificateDer<'_>) -> Option<OffsetDateTime> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    Some(parsed.validity().not_after.to_datetime())
}

fn check(certificate: &CertificateDer<'_>, trust_domain: &str) -> Result<(), String> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|error| error.to_string())?;
    if !parsed.is_ca() {
        return Err("is not the certificate of an authority (basicConstraints CA)".to_owned());
    }
    let (validity, now) = (parsed.validity(), OffsetDateTime::now_utc());
    if validity.not_after.to_datetime() <= now {
        return Err(format!("expired at {}", validity.not_after));
    }
    if validity.not_before.to_datetime() > now + CLOCK_SKEW {
        return Err(format!("is not valid before {} (is the clock right?)", validity.not_before));
    }
    check_trust_domain(&parsed, trust_domain)
}

/// A root that has expired may stay in the bundle: it counts for nothing.
fn believed(root: CertificateDer<'static>, trust_domain: &str) -> Result<Root, String> {
    let root = Root::of(root).map_err(|reason| format!("holds a certificate that is no root: {reason}"))?;
    let (_, parsed) = X509Certificate::from_der(&root.der).map_err(|error| error.to_string())?;
    check_trust_domain(&parsed, trust_domain)?;
    Ok(root)
}

/// A root that says which trust domain it is for must say ours; one that does not say is the operator's choice.
fn check_trust_domain(root: &X509Certificate<'_>, trust_domain: &str) -> Result<(), String> {
    let names = root
        .subject_alternative_name()
        .map_err(|error| format!("has an unreadable subjectAltName ({error})"))?
        .map(|extension| extension.value.general_names.as_slice())
        .unwrap_or_default();
    for name in names {
        if let GeneralName::URI(uri) = name
            && let Some(theirs) = uri.strip_prefix("spiffe://")
            && theirs != trust_domain
        {
            return Err(format!(
                "is the root of trust domain {theirs:?}, the agent runs with {trust_domain:?}"
            ));
        }
    }
    Ok(())
}
