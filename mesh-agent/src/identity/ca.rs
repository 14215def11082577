//! The certificate authority behind [`Authority`](super::Authority): what signs a leaf, and the leaf's own key.
//!
//! A leaf has one URI SAN, no common name, an ECDSA P-256 key that is made here and never leaves memory, and ends
//! no later than its root. Tested by the unit tests below and, in handshakes, by `tunnel/tests`.

use std::{fmt, path::Path, sync::Arc, time::Duration};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls::{RootCertStore, crypto::aws_lc_rs::sign::any_ecdsa_type, sign::SigningKey};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Serialize, Serializer};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::sync::watch;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroize;

use super::{
    SpiffeId,
    issue::Issued,
    remote::RemoteCa,
    state_dir::{self, CaError},
    workload_api::WorkloadApi,
};
use crate::error::{Error, Kind, Result};

/// How long a root made here is valid (Istio's self-signed root: ten years).
pub(super) const ROOT_LIFETIME: Duration = Duration::from_hours(24 * 3650);

/// How long a leaf is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeafPolicy {
    /// From `not_before` to `not_after`.
    pub lifetime: Duration,
    /// How far `not_before` lies in the past, for peers whose clock is behind ours.
    pub backdate: Duration,
}

impl Default for LeafPolicy {
    /// 24 hours (Istio's default workload TTL), backdated by 2 minutes (Istio's grace for clock skew).
    fn default() -> Self {
        Self { lifetime: Duration::from_hours(24), backdate: Duration::from_mins(2) }
    }
}

/// What may be known of a certificate: never its key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CertificateInfo {
    /// Whom it names.
    #[serde(serialize_with = "as_text")]
    pub identity: SpiffeId,
    /// Serial number, in hex.
    pub serial: String,
    /// Valid from.
    #[serde(serialize_with = "as_rfc3339")]
    pub not_before: OffsetDateTime,
    /// Valid until.
    #[serde(serialize_with = "as_rfc3339")]
    pub not_after: OffsetDateTime,
}

fn as_text<S: Serializer>(value: &SpiffeId, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

fn as_rfc3339<S: Serializer>(value: &OffsetDateTime, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.serialize_str(&value.format(&Rfc3339).map_err(serde::ser::Error::custom)?)
}

/// A certified key: what a workload proves itself with, and the roots it believes.
pub(super) struct Credential {
    /// Leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// Signs handshakes; cannot be read back.
    pub key: Arc<dyn SigningKey>,
    /// Whom to believe.
    pub roots: Arc<RootCertStore>,
    /// The leaf, for people and for the renewal.
    pub info: CertificateInfo,
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credential").field("info", &self.info).finish_non_exhaustive()
    }
}

/// How soon a certificate is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Urgency {
    /// Somebody waits for it.
    Now,
    /// Nobody does yet: the one before still holds, or it is fetched ahead.
    Later,
}

/// Who signs.
#[derive(Debug)]
pub(super) enum Ca {
    /// In this process, its key in the state directory (or in memory).
    Embedded(EmbeddedCa),
    /// Reached over the network, by Istio's certificate service.
    Remote(RemoteCa),
    /// A SPIFFE Workload API, which makes the keys too.
    Spiffe(WorkloadApi),
}

impl fmt::Display for Ca {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedded(_) => f.write_str("the embedded certificate authority"),
            Self::Remote(ca) => ca.fmt(f),
            Self::Spiffe(api) => api.fmt(f),
        }
    }
}

impl Ca {
    /// A new key for `id`, certified.
    ///
    /// # Errors
    /// [`Kind::TlsFailure`] when the authority cannot sign now; a later try may succeed.
    pub async fn certify(&self, id: &SpiffeId, policy: LeafPolicy, urgency: Urgency) -> Result<Credential> {
        match self {
            // Some 100 µs, and nothing to wait for.
            Self::Embedded(ca) => ca.certify(id, policy),
            Self::Remote(ca) => ca.certify(id, policy, urgency).await,
            Self::Spiffe(api) => api.certify(id).await,
        }
    }

    /// Whether it answers without being waited for.
    pub fn is_at_hand(&self) -> bool {
        matches!(self, Self::Embedded(_))
    }

    /// Why it was not heard when it was asked last, if it was not: nobody should wait for it again.
    pub fn trouble(&self) -> Option<Arc<String>> {
        match self {
            Self::Embedded(_) => None,
            Self::Remote(ca) => ca.trouble(),
            Self::Spiffe(api) => api.trouble(),
        }
    }

    /// Tells when it has something new without being asked, where it does.
    pub fn changes(&self) -> Option<watch::Receiver<u64>> {
        match self {
            Self::Embedded(_) | Self::Remote(_) => None,
            Self::Spiffe(api) => Some(api.changes()),
        }
    }
}

/// What is said when an authority elsewhere gives no certificate.
pub(super) fn no_certificate(id: &SpiffeId, ca: &dyn fmt::Display, reason: &dyn fmt::Display) -> String {
    format!("no certificate for {id} from {ca}: {reason}")
}

/// An authority's certificate and its key in this process.
pub(crate) struct EmbeddedCa {
    pub(super) issuer: Issuer<'static, KeyPair>,
    roots: Arc<RootCertStore>,
    /// What is sent behind a leaf: the authority's own certificate, where that is no root, and those between.
    pub(super) chain: Vec<CertificateDer<'static>>,
    /// The roots as certificates, for those who have none yet.
    pub(super) bundle: Vec<CertificateDer<'static>>,
    pub(super) not_after: OffsetDateTime,
}

impl fmt::Debug for EmbeddedCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedCa").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

impl EmbeddedCa {
    /// The authority of a state directory, made there if there is none yet.
    pub fn open(state_dir: &Path, trust_domain: &str) -> std::result::Result<Self, CaError> {
        let (root, key) = state_dir::load_or_create(state_dir, trust_domain)?;
        Ok(Self::new(&root, key)?)
    }

    /// An authority that ends with this process.
    pub fn in_memory(trust_domain: &str) -> std::result::Result<Self, CaError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let root = self_signed(trust_domain, &key, OffsetDateTime::now_utc())?;
        Ok(Self::new(root.der(), key)?)
    }

    fn new(root: &CertificateDer<'static>, key: KeyPair) -> std::result::Result<Self, rcgen::Error> {
        let (_, parsed) =
            X509Certificate::from_der(root).map_err(|_| rcgen::Error::CouldNotParseCertificate)?;
        let not_after = parsed.validity().not_after.to_datetime();
        Self::of(root, key, Vec::new(), vec![root.clone()], not_after)
    }

    /// The authority of this certificate; `not_after` is when it, or what it hangs on, ends.
    pub(super) fn of(
        certificate: &CertificateDer<'static>,
        key: KeyPair,
        chain: Vec<CertificateDer<'static>>,
        bundle: Vec<CertificateDer<'static>>,
        not_after: OffsetDateTime,
    ) -> std::result::Result<Self, rcgen::Error> {
        let mut roots = RootCertStore::empty();
        for root in &bundle {
            roots.add(root.clone()).map_err(|_| rcgen::Error::CouldNotParseCertificate)?;
        }
        let issuer = Issuer::from_ca_cert_der(certificate, key)?;
        Ok(Self { issuer, roots: Arc::new(roots), chain, bundle, not_after })
    }

    fn certify(&self, id: &SpiffeId, policy: LeafPolicy) -> Result<Credential> {
        let failed = |error| Error::new(Kind::TlsFailure, format!("cannot certify {id}: {error}"));
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
        let Issued { chain, info } = self.issue(id, &key, policy)?;
        let key = into_signing_key(key).map_err(failed)?;
        Ok(Credential { info, key, roots: Arc::clone(&self.roots), chain })
    }
}

/// The key as handshakes use it; the other copy is wiped.
pub(super) fn into_signing_key(mut key: KeyPair) -> std::result::Result<Arc<dyn SigningKey>, rcgen::Error> {
    let signing_key = any_ecdsa_type(&PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialized_der())));
    key.zeroize();
    signing_key.map_err(|_| rcgen::Error::CouldNotParseKeyPair)
}

/// A leaf for these names, whose key signs handshakes at either end.
pub(super) fn leaf_params(
    names: Vec<SanType>,
    not_before: OffsetDateTime,
    not_after: OffsetDateTime,
) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = names;
    params.not_before = not_before;
    params.not_after = not_after;
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    params
}

/// A root for this key: Istio's shape (organisation = trust domain), plus the URI SAN that SPIFFE asks for.
pub(super) fn self_signed(
    trust_domain: &str,
    key: &KeyPair,
    now: OffsetDateTime,
) -> std::result::Result<rcgen::Certificate, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, trust_domain);
    params.subject_alt_names = vec![SanType::URI(format!("spiffe://{trust_domain}").try_into()?)];
    params.not_before = now - LeafPolicy::default().backdate;
    params.not_after = now + ROOT_LIFETIME;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.self_signed(key)
}

pub(super) fn info(
    id: &SpiffeId,
    leaf: &CertificateDer<'_>,
) -> std::result::Result<CertificateInfo, rcgen::Error> {
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|_| rcgen::Error::CouldNotParseCertificate)?;
    Ok(CertificateInfo {
        identity: id.clone(),
        serial: format!("{:x}", parsed.serial),
        not_before: parsed.validity().not_before.to_datetime(),
        not_after: parsed.validity().not_after.to_datetime(),
    })
}

#[cfg(test)]
mod tests {
    use x509_parser::prelude::GeneralName;

    use super::*;

    type TestResult = std::result::Result<(), Box<dyn std::error::Error>>;

    #[test]
    fn a_leaf_has_one_uri_san_and_no_name() -> TestResult {
        let ca = EmbeddedCa::in_memory("cluster.local")?;
        let id: SpiffeId = "spiffe://cluster.local/ns/default/sa/reviews".parse()?;
        let policy = LeafPolicy::default();
        let credential = ca.certify(&id, policy)?;
        let (_, leaf) = X509Certificate::from_der(&credential.chain[0])?;
        assert_eq!(leaf.subject().iter().count(), 0);
        assert!(!leaf.is_ca());
        let names = &leaf.subject_alternative_name()?.ok_or("no SAN")?.value.general_names;
        assert!(matches!(names[..], [GeneralName::URI(uri)] if uri == id.to_string()), "{names:?}");
        assert_eq!(credential.info.not_after - credential.info.not_before, policy.lifetime);
        assert!(credential.info.not_before <= OffsetDateTime::now_utc() - policy.backdate);
        Ok(())
    }

    #[test]
    fn a_leaf_ends_no_later_than_its_root() -> TestResult {
        let ca = EmbeddedCa::in_memory("cluster.local")?;
        let id: SpiffeId = "spiffe://cluster.local/ns/default/sa/reviews".parse()?;
        let policy = LeafPolicy { lifetime: ROOT_LIFETIME * 2, ..LeafPolicy::default() };
        assert_eq!(ca.certify(&id, policy)?.info.not_after, ca.not_after);
        Ok(())
    }

    #[test]
    fn no_key_in_debug_and_times_as_text() -> TestResult {
        let ca = EmbeddedCa::in_memory("cluster.local")?;
        let id: SpiffeId = "spiffe://cluster.local/ns/default/sa/reviews".parse()?;
        let credential = ca.certify(&id, LeafPolicy::default())?;
        let text = format!("{ca:?} {credential:?}").to_lowercase();
        assert!(!text.contains("key"), "{text}");
        let json = serde_json::to_value(&credential.info)?;
        assert_eq!(json["identity"], id.to_string());
        assert!(json["not_after"].as_str().is_some_and(|at| at.ends_with('Z')), "{json}");
        Ok(())
    }
}
