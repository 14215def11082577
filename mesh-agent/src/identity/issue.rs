//! Leaves that the embedded authority signs for keys of others: what a controller hands out.
//!
//! Nothing of a request but its key and the identity that was granted gets into a certificate. Tested by the unit tests
//! of `ca.rs` and `controller/`.

use std::{net::IpAddr, sync::Arc};

use rcgen::{PublicKeyData, SanType};
use rustls::sign::CertifiedKey;
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;

use super::{
    SpiffeId,
    bundle::Signer,
    ca::{CertificateInfo, EmbeddedCa, LeafPolicy, info, leaf_params},
    key::SecretKey,
};
use crate::error::{Error, Kind, Result};

/// A certificate for somebody else's key.
#[derive(Debug)]
pub(crate) struct Issued {
    /// Leaf first, then what it chains by; no root.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf.
    pub info: CertificateInfo,
}

/// A certificate with which a server of ours shows its names.
#[derive(Debug)]
pub(crate) struct IssuedServer {
    /// Leaf first, and its key.
    pub key: Arc<CertifiedKey>,
    /// Valid until.
    pub not_after: OffsetDateTime,
}

impl EmbeddedCa {
    /// A certificate for this identity and this key.
    ///
    /// # Errors
    /// [`Kind::TlsFailure`] when the authority's own certificate has expired, or the key cannot be certified.
    pub fn issue(&self, id: &SpiffeId, key: &impl PublicKeyData, policy: LeafPolicy) -> Result<Issued> {
        let failed =
            |error: rcgen::Error| Error::new(Kind::TlsFailure, format!("cannot certify {id}: {error}"));
        let uri = id.to_string().try_into().map_err(failed)?;
        let chain = self.sign(vec![SanType::URI(uri)], key, policy, &id.to_string())?;
        let info = info(id, &chain[0]).map_err(failed)?;
        Ok(Issued { chain, info })
    }

    /// A new key with a certificate for these names and addresses.
    ///
    /// # Errors
    /// As for [`Self::issue`], and when a name cannot be one.
    pub fn issue_server(&self, names: &[String], policy: LeafPolicy) -> Result<IssuedServer> {
        let failed = |error: rcgen::Error| {
            Error::new(Kind::TlsFailure, format!("cannot certify the server {}: {error}", names.join(", ")))
        };
        let san = |name: &String| match name.parse::<IpAddr>() {
            Ok(address) => Ok(SanType::IpAddress(address)),
            Err(_) => Ok(SanType::DnsName(name.clone().try_into()?)),
        };
        let sans = names.iter().map(san).collect::<std::result::Result<_, _>>().map_err(failed)?;
        let key = SecretKey::generate().map_err(failed)?;
        let chain = self.sign(sans, &key, policy, &names.join(", "))?;
        let not_after = (OffsetDateTime::now_utc() + policy.lifetime).min(self.signer().not_after);
        let key = key.for_handshakes().map_err(failed)?;
        Ok(IssuedServer { key: Arc::new(CertifiedKey::new(chain, key)), not_after })
    }

    fn sign(
        &self,
        names: Vec<SanType>,
        key: &impl PublicKeyData,
        policy: LeafPolicy,
        whom: &str,
    ) -> Result<Vec<CertificateDer<'static>>> {
        let signer = self.signer();
        if signer.not_after <= OffsetDateTime::now_utc() {
            let at = signer.not_after;
            return Err(Error::new(
                Kind::TlsFailure,
                format!(
                    "cannot certify {whom}: the signing certificate, or one above it, expired at {at}; replace it in the \
                     state directory"
                ),
            ));
        }
        signer
            .sign(names, key, policy)
            .map_err(|error| Error::new(Kind::TlsFailure, format!("cannot certify {whom}: {error}")))
    }
}

impl Signer {
    /// A certificate for these names and this key, and what leads from it to the root.
    pub(super) fn sign(
        &self,
        names: Vec<SanType>,
        key: &impl PublicKeyData,
        policy: LeafPolicy,
    ) -> std::result::Result<Vec<CertificateDer<'static>>, rcgen::Error> {
        let now = OffsetDateTime::now_utc();
        let not_after = (now + policy.lifetime).min(self.not_after);
        let leaf = leaf_params(names, now - policy.backdate, not_after).signed_by(key, &self.issuer)?;
        let mut chain = vec![leaf.der().clone()];
        chain.extend_from_slice(&self.above);
        Ok(chain)
    }
}
