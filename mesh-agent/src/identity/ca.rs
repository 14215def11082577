//! The certificate authority behind [`Authority`](super::Authority): what signs a leaf, and the leaf's own key.
//!
//! A leaf has one URI SAN, no common name, an ECDSA P-256 key that is made here, never leaves memory and is wiped there
//! (`key.rs`), and ends no later than what it is signed with. Tested by the unit tests below and, in handshakes, by
//! `tunnel/tests`.

use std::{fmt, path::Path, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyUsagePurpose, PublicKeyData, SanType,
};
use rustls::sign::SigningKey;
use rustls_pki_types::CertificateDer;
use serde::{Serialize, Serializer};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::sync::watch;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{
    SpiffeId,
    bundle::{Bundle, Signer},
    issue::Issued,
    key::SecretKey,
    remote::RemoteCa,
    rotate::pem,
    state_dir::{self, CaError},
    trust::{CLOCK_SKEW, Root, Roots},
    workload_api::WorkloadApi,
};
use crate::error::{Error, Kind, Result};

/// How long a root made here is valid (Istio's self-signed root: ten years).
pub(super) const ROOT_LIFETIME: Duration = Duration::from_hours(24 * 3650);

/// How long a leaf is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeafPolicy {
    /// From now to `not_after`.
    pub lifetime: Duration,
    /// How far `not_before` lies in the past, for peers whose clock is behind ours.
    pub backdate: Duration,
}

impl Default for LeafPolicy {
    /// 24 hours (Istio's default workload TTL), backdated by what two clocks may be apart (Istio: 2 minutes).
    fn default() -> Self {
        Self { lifetime: Duration::from_hours(24), backdate: CLOCK_SKEW }
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

/// A certified key: what a workload proves itself with.
pub(super) struct Credential {
    /// Leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// Signs handshakes; cannot be read back.
    pub key: Arc<dyn SigningKey>,
    /// Whom to believe from now on, where the authority says so with each certificate.
    pub roots: Option<Roots>,
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
    Remote(Box<RemoteCa>),
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

/// A signing pair in this process, and the roots that those are to believe who have a certificate of it.
pub(crate) struct EmbeddedCa {
    signer: ArcSwap<Signer>,
    roots: watch::Sender<Roots>,
}

impl fmt::Debug for EmbeddedCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedCa").field("signer", &self.signer.load()).finish_non_exhaustive()
    }
}

impl EmbeddedCa {
    /// The authority of a state directory, made there if there is none yet.
    pub fn open(state_dir: &Path, trust_domain: &str) -> std::result::Result<Self, CaError> {
        Ok(Self::of(state_dir::load_or_create(state_dir, trust_domain)?))
    }

    /// An authority that ends with this process.
    pub fn in_memory(trust_domain: &str) -> std::result::Result<Self, CaError> {
        let key = SecretKey::generate()?;
        let root = self_signed(trust_domain, &key, OffsetDateTime::now_utc())?.der().clone();
        let parsed = Root::of(root.clone()).map_err(|_| rcgen::Error::CouldNotParseCertificate)?;
        let not_after = parsed.not_after;
        let issuer = rcgen::Issuer::from_ca_cert_der(&root, key)?;
        let signer = Signer { issuer, certificate: root, above: Vec::new(), not_after };
        Ok(Self::of(Bundle { signer, roots: Roots::new([parsed]) }))
    }

    /// The authority of what has been put together.
    pub(super) fn of(bundle: Bundle) -> Self {
        let Bundle { signer, roots } = bundle;
        Self { signer: ArcSwap::from_pointee(signer), roots: watch::Sender::new(roots) }
    }

    /// The roots to believe.
    pub(super) fn roots(&self) -> Roots {
        Roots::new(self.roots.borrow().all.iter().cloned())
    }

    /// What signs now.
    pub(super) fn signer(&self) -> Arc<Signer> {
        self.signer.load_full()
    }

    /// Signs with this from now on.
    pub(super) fn sign_with(&self, signer: Signer) {
        self.signer.store(Arc::new(signer));
    }

    /// Signs with what has been put together, and has its roots believed, from now on. Whether that is a change.
    pub(super) fn take(&self, bundle: Bundle) -> bool {
        let Bundle { signer, roots } = bundle;
        let now = self.signer.load();
        let signs = now.certificate == signer.certificate && now.above == signer.above;
        let same = signs && self.roots.borrow().all == roots.all;
        if !same {
            self.sign_with(signer);
            self.roots.send_replace(roots);
        }
        !same
    }

    /// Whom those who have a certificate of this authority are to believe.
    pub fn bundle(&self) -> Vec<CertificateDer<'static>> {
        self.roots.borrow().all.iter().map(|root| root.der.clone()).collect()
    }

    /// The same as PEM, once they are others than these.
    pub async fn other_roots_than(&self, known: &str) -> String {
        let mut roots = self.roots.subscribe();
        loop {
            let now = pem(&self.bundle());
            if now != known {
                return now;
            }
            // What would tell lives as long as this.
            let _ = roots.changed().await;
        }
    }

    /// Tells when other roots are to be believed, or another certificate signs.
    #[cfg(test)]
    pub(super) fn changes(&self) -> watch::Receiver<Roots> {
        self.roots.subscribe()
    }

    fn certify(&self, id: &SpiffeId, policy: LeafPolicy) -> Result<Credential> {
        let failed = |error| Error::new(Kind::TlsFailure, format!("cannot certify {id}: {error}"));
        let key = SecretKey::generate().map_err(failed)?;
        let Issued { chain, info } = self.issue(id, &key, policy)?;
        Ok(Credential { info, key: key.for_handshakes().map_err(failed)?, roots: None, chain })
    }
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

/// Eight bytes of the SHA-256 of a public key, in hex.
fn fingerprint(key: &SecretKey) -> String {
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &key.subject_public_key_info());
    let first: [u8; 8] = std::array::from_fn(|at| hash.as_ref().get(at).copied().unwrap_or_default());
    format!("{:016x}", u64::from_be_bytes(first))
}

/// A root for this key: Istio's shape (organisation = trust domain) with a name of its own, plus the URI SAN that SPIFFE asks for.
pub(super) fn self_signed(
    trust_domain: &str,
    key: &SecretKey,
    now: OffsetDateTime,
) -> std::result::Result<rcgen::Certificate, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, trust_domain);
    // Two roots of one mesh have two names: what a list revokes, it revokes by its issuer's.
    params.distinguished_name.push(DnType::CommonName, format!("mesh root {}", fingerprint(key)));
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
        assert_eq!(credential.info.not_after - credential.info.not_before, policy.lifetime + policy.backdate);
        assert!(credential.info.not_before <= OffsetDateTime::now_utc() - policy.backdate);
        Ok(())
    }

    #[test]
    fn a_leaf_ends_no_later_than_its_root() -> TestResult {
        let ca = EmbeddedCa::in_memory("cluster.local")?;
        let id: SpiffeId = "spiffe://cluster.local/ns/default/sa/reviews".parse()?;
        let policy = LeafPolicy { lifetime: ROOT_LIFETIME * 2, ..LeafPolicy::default() };
        assert_eq!(ca.certify(&id, policy)?.info.not_after, ca.signer().not_after);
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
