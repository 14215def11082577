//! Leaves that the embedded authority signs for keys of others: what a controller hands out.
//!
//! Nothing of a request but its key and the identity that was granted gets into a certificate. Tested by the unit tests
//! of `ca.rs` and `controller/`.

use std::{net::IpAddr, sync::Arc};

use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType};
use rustls::sign::CertifiedKey;
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;

use super::{
    SpiffeId,
    ca::{CertificateInfo, EmbeddedCa, LeafPolicy, info, into_signing_key, leaf_params},
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
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
        let chain = self.sign(sans, &key, policy, &names.join(", "))?;
        let not_after = (OffsetDateTime::now_utc() - policy.backdate + policy.lifetime).min(self.not_after);
        let key = into_signing_key(key).map_err(failed)?;
        Ok(IssuedServer { key: Arc::new(CertifiedKey::new(chain, key)), not_after })
    }

    /// Whom those who have a certificate of this authority are to believe.
    pub fn bundle(&self) -> &[CertificateDer<'static>] {
        &self.bundle
    }

    fn sign(
        &self,
        names: Vec<SanType>,
        key: &impl PublicKeyData,
        policy: LeafPolicy,
        whom: &str,
    ) -> Result<Vec<CertificateDer<'static>>> {
        let now = OffsetDateTime::now_utc();
        if self.not_after <= now {
            let at = self.not_after;
            return Err(Error::new(
                Kind::TlsFailure,
                format!("cannot certify {whom}: the authority's certificate expired at {at}; replace it"),
            ));
        }
        let not_before = now - policy.backdate;
        let not_after = (not_before + policy.lifetime).min(self.not_after);
        let leaf = leaf_params(names, not_before, not_after)
            .signed_by(key, &self.issuer)
            .map_err(|error| Error::new(Kind::TlsFailure, format!("cannot certify {whom}: {error}")))?;
        let mut chain = vec![leaf.der().clone()];
        chain.extend_from_slice(&self.chain);
        Ok(chain)
    }
}
