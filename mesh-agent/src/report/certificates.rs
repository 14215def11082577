//! Metrics of certificates: when they end, what is revoked, what is wrong with their files.

use std::{
    collections::HashSet,
    sync::{Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    metrics::{family::Family, gauge::Gauge},
    registry::Registry,
};

use crate::identity::SpiffeId;

/// When the certificate of an authority ends.
#[derive(Debug, Clone)]
pub struct AuthorityExpiry {
    /// `root` or `signing`.
    pub role: &'static str,
    /// Its subject.
    pub name: String,
    /// Its end.
    pub at: SystemTime,
}

type Labels<const N: usize> = [(&'static str, String); N];

/// A family whose series are those of now.
#[derive(Debug)]
struct Ends<const N: usize> {
    family: Family<Labels<N>, Gauge>,
    before: Mutex<HashSet<Labels<N>>>,
}

impl<const N: usize> Default for Ends<N> {
    fn default() -> Self {
        Self { family: Family::default(), before: Mutex::default() }
    }
}

impl<const N: usize> Ends<N> {
    fn set(&self, ends: impl Iterator<Item = (Labels<N>, SystemTime)>) {
        let mut before = self.before.lock().unwrap_or_else(PoisonError::into_inner);
        let mut now = HashSet::new();
        for (labels, at) in ends {
            let seconds = at.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs().cast_signed());
            self.family.get_or_create(&labels).set(seconds);
            now.insert(labels);
        }
        for gone in before.difference(&now) {
            self.family.remove(gone);
        }
        *before = now;
    }
}

/// The metrics.
#[derive(Debug, Default)]
pub(super) struct CertificateMetrics {
    workloads: Ends<1>,
    authorities: Ends<2>,
    revoked: Gauge,
    problems: Gauge,
}

impl CertificateMetrics {
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "mesh_certificates_expiry_seconds",
            "When the certificate of an identity expires, in seconds since 1970",
            self.workloads.family.clone(),
        );
        registry.register(
            "mesh_authority_certificates_expiry_seconds",
            "When the certificate of a root, or the one that signs, expires, in seconds since 1970",
            self.authorities.family.clone(),
        );
        let revoked = self.revoked.clone();
        registry.register("mesh_revoked_certificates", "Certificates listed as revoked", revoked);
        registry.register(
            "mesh_certificate_problems",
            "Problems with the files of roots, signing certificate and revocation lists now",
            self.problems.clone(),
        );
    }

    /// Replaces what is known of the expiry of workloads' certificates.
    pub fn set_workloads(&self, expiry: &[(SpiffeId, SystemTime)]) {
        self.workloads.set(expiry.iter().map(|(id, at)| ([("identity", id.to_string())], *at)));
    }

    /// Replaces what is known of authorities, of what they have revoked, and of what is wrong with their files.
    pub fn set_trust(&self, authorities: Vec<AuthorityExpiry>, revoked: usize, problems: usize) {
        let labels = |one: AuthorityExpiry| ([("role", one.role.to_owned()), ("name", one.name)], one.at);
        self.authorities.set(authorities.into_iter().map(labels));
        self.revoked.set(i64::try_from(revoked).unwrap_or(i64::MAX));
        self.problems.set(i64::try_from(problems).unwrap_or(i64::MAX));
    }
}
