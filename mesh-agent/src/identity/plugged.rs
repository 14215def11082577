//! An authority's certificate and key from elsewhere, in the layout of Istio's `cacerts`: `ca-cert.pem` and `ca-key.pem`,
//! an intermediate as a rule; `root-cert.pem`, the bundle that peers believe; `cert-chain.pem`, what leads from the one to the
//! other.
//!
//! Promises that nothing starts with files that do not fit: each is read, the key has to be the certificate's, and a leaf
//! made on trial has to chain to the bundle. Nothing is ever written. Tested by the unit tests beside this file.

#[cfg(test)]
mod tests;

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use rcgen::{Issuer, PublicKeyData as _};
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer as _, X509Certificate};
use zeroize::Zeroizing;

use super::{
    CaError, LeafPolicy, SpiffeId,
    answer::{self, check},
    bundle::{Bundle, Signer},
    ca::EmbeddedCa,
    key::SecretKey,
    spiffe::is_trust_domain,
    trust::{Root, Roots},
};

const CERTIFICATE: &str = "ca-cert.pem";
const KEY: &str = "ca-key.pem";
const ROOTS: &str = "root-cert.pem";
const CHAIN: &str = "cert-chain.pem";

/// A file of the directory, for errors about it.
struct Place<'a>(&'a Path);

impl Place<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn wrong(&self, name: &str, reason: impl Into<String>) -> CaError {
        CaError::Plugged { path: self.path(name), reason: reason.into() }
    }

    fn unread(&self, name: &str) -> impl FnOnce(io::Error) -> CaError {
        let path = self.path(name);
        move |source| CaError::Io { action: "read", path, source }
    }

    fn certificates(&self, name: &str) -> Result<Vec<CertificateDer<'static>>, CaError> {
        let text = fs::read(self.path(name)).map_err(self.unread(name))?;
        let certificates =
            answer::certificates(&[text]).map_err(|error| self.wrong(name, error.to_string()))?;
        if certificates.is_empty() {
            return Err(self.wrong(name, "holds no PEM certificate"));
        }
        Ok(certificates)
    }

    fn key(&self) -> Result<SecretKey, CaError> {
        let mut file = File::open(self.path(KEY)).map_err(self.unread(KEY))?;
        let mode = file.metadata().map_err(self.unread(KEY))?.mode() & 0o7777;
        // A group may have to: Kubernetes gives a Secret to the pod's.
        if mode & 0o007 != 0 {
            return Err(
                self.wrong(KEY, format!("may be read by everybody (mode {mode:04o}); chmod o-rwx it"))
            );
        }
        let mut pem = Zeroizing::new(Vec::new());
        file.read_to_end(&mut pem).map_err(self.unread(KEY))?;
        SecretKey::from_pem(&pem).map_err(|error| self.wrong(KEY, format!("is not a private key ({error})")))
    }

    /// An authority's certificate that holds now; when it ends.
    fn authority(&self, name: &str, certificate: &CertificateDer<'_>) -> Result<OffsetDateTime, CaError> {
        let (_, parsed) = X509Certificate::from_der(certificate)
            .map_err(|error| self.wrong(name, format!("holds what is no certificate ({error})")))?;
        let subject = parsed.subject();
        if !parsed.is_ca() {
            return Err(
                self.wrong(name, format!("holds {subject}, which may not certify (basicConstraints CA)"))
            );
        }
        let (from, until) = (parsed.validity().not_before, parsed.validity().not_after);
        let now = OffsetDateTime::now_utc();
        if until.to_datetime() <= now {
            return Err(self.wrong(name, format!("holds {subject}, which expired at {until}")));
        }
        if from.to_datetime() > now {
            let reason = format!("holds {subject}, which is not valid before {from} (is the clock right?)");
            return Err(self.wrong(name, reason));
        }
        Ok(until.to_datetime())
    }
}

fn is_self_signed(certificate: &CertificateDer<'_>) -> bool {
    X509Certificate::from_der(certificate).is_ok_and(|(_, parsed)| parsed.subject() == parsed.issuer())
}

impl EmbeddedCa {
    /// The authority of a directory in Istio's `cacerts` layout.
    ///
    /// # Errors
    /// When a file is missing or wrong, has expired, or they do not belong together.
    pub fn plugged_in(dir: &Path, trust_domain: &str) -> Result<Self, CaError> {
        if !is_trust_domain(trust_domain) {
            return Err(CaError::TrustDomain(trust_domain.to_owned()));
        }
        let place = Place(dir);
        let (mut certificates, key) = (place.certificates(CERTIFICATE)?, place.key()?);
        let certificate = certificates.swap_remove(0);
        let mut not_after = place.authority(CERTIFICATE, &certificate)?;
        if spki(&certificate) != Some(key.subject_public_key_info()) {
            return Err(place.wrong(CERTIFICATE, format!("is not the certificate of the key in {KEY}")));
        }
        let chain = chain(&place, &certificate)?;
        for intermediate in &chain {
            not_after = not_after.min(place.authority(CHAIN, intermediate)?);
        }
        let bundle = place.certificates(ROOTS)?;
        for root in &bundle {
            place.authority(ROOTS, root)?;
        }
        let roots = bundle.iter().map(|root| Root::of(root.clone()));
        let roots = roots.collect::<Result<Vec<_>, _>>().map_err(|reason| place.wrong(ROOTS, reason))?;
        let issuer = Issuer::from_ca_cert_der(&certificate, key)?;
        let signer = Signer { issuer, certificate, above: chain, not_after };
        let ca = Self::of(Bundle { signer, roots: Roots::new(roots) });
        ca.try_out(trust_domain).map_err(|reason| {
            let reason = format!("does not lead to {ROOTS} by way of {CHAIN}: {reason}");
            place.wrong(CERTIFICATE, reason)
        })?;
        Ok(ca)
    }

    /// Whether peers will believe what this authority certifies.
    fn try_out(&self, trust_domain: &str) -> Result<(), String> {
        let said = |error: &dyn std::fmt::Display| error.to_string();
        let key = SecretKey::generate().map_err(|error| said(&error))?;
        let id: SpiffeId = format!("spiffe://{trust_domain}/ns/mesh-system/sa/trial")
            .parse()
            .map_err(|error| said(&error))?;
        let issued = self.issue(&id, &key, LeafPolicy::default()).map_err(|error| error.detail)?;
        check(issued.chain, &self.bundle(), &id, &key.subject_public_key_info())
            .map(|_| ())
            .map_err(|error| said(&error))
    }
}

/// What is sent behind a leaf: the authority's own certificate and those between it and the roots. Roots are not sent.
fn chain(
    place: &Place<'_>,
    certificate: &CertificateDer<'static>,
) -> Result<Vec<CertificateDer<'static>>, CaError> {
    let given = match place.certificates(CHAIN) {
        Err(CaError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Vec::new(),
        other => other?,
    };
    let mut chain = vec![certificate.clone()];
    chain.extend(given.into_iter().filter(|one| one != certificate));
    chain.retain(|one| !is_self_signed(one));
    Ok(chain)
}

fn spki(certificate: &CertificateDer<'_>) -> Option<Vec<u8>> {
    X509Certificate::from_der(certificate).ok().map(|(_, parsed)| parsed.public_key().raw.to_vec())
}
