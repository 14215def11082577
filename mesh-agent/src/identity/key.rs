//! The private key of an authority: signs, is read from PEM and written as PEM, and is wiped where it lay.
//!
//! What holds a key's bytes here is overwritten when it is dropped: text, DER, and the copy that rcgen keeps. What aws-lc
//! makes of them (this key's own form, session keys, secrets of key exchanges) it overwrites itself when it frees
//! memory; rustls wipes the secrets that it derives. Never shown in `Debug`. Tested below.

use std::{fmt, sync::Arc};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData, SignatureAlgorithm, SigningKey};
use rustls::crypto::aws_lc_rs::sign::any_ecdsa_type;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};
use zeroize::{Zeroize, Zeroizing};

/// Columns of PEM text (RFC 7468, section 2).
const COLUMNS: usize = 64;

/// A private key that is wiped when it is dropped.
pub(super) struct SecretKey(KeyPair);

impl SecretKey {
    /// A new ECDSA P-256 key.
    pub(super) fn generate() -> Result<Self, rcgen::Error> {
        KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map(Self)
    }

    /// The first private key in PEM text.
    pub(super) fn from_pem(pem: &[u8]) -> Result<Self, String> {
        let mut der = PrivateKeyDer::from_pem_slice(pem).map_err(|error| error.to_string())?;
        let key = KeyPair::try_from(&der).map(Self).map_err(|error| error.to_string());
        der.zeroize();
        key
    }

    /// PKCS #8 in PEM.
    pub(super) fn to_pem(&self) -> Zeroizing<String> {
        let base64 = Zeroizing::new(STANDARD.encode(self.0.serialized_der()));
        // Made large enough at once: text that grows leaves its beginnings behind.
        let mut pem = Zeroizing::new(String::with_capacity(base64.len() * 2 + 2 * COLUMNS));
        pem.push_str("-----BEGIN PRIVATE KEY-----\n");
        let mut rest = base64.as_str();
        while !rest.is_empty() {
            let (line, after) = rest.split_at(rest.len().min(COLUMNS));
            pem.push_str(line);
            pem.push('\n');
            rest = after;
        }
        pem.push_str("-----END PRIVATE KEY-----\n");
        pem
    }

    /// The key as handshakes use it.
    ///
    /// # Errors
    /// When it is of a kind that no handshake knows.
    pub(super) fn for_handshakes(&self) -> Result<Arc<dyn rustls::sign::SigningKey>, rcgen::Error> {
        let pkcs8 = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.der()));
        any_ecdsa_type(&pkcs8).map_err(|_| rcgen::Error::CouldNotParseKeyPair)
    }

    /// PKCS #8 in DER.
    pub(super) fn der(&self) -> &[u8] {
        self.0.serialized_der()
    }
}

impl Drop for SecretKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey")
    }
}

impl PublicKeyData for SecretKey {
    fn der_bytes(&self) -> &[u8] {
        self.0.der_bytes()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        self.0.algorithm()
    }
}

impl SigningKey for SecretKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        self.0.sign(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_nothing_shows_it() -> Result<(), Box<dyn std::error::Error>> {
        let key = SecretKey::generate()?;
        let pem = key.to_pem();
        assert!(pem.lines().all(|line| line.len() <= COLUMNS), "{}", pem.lines().count());
        assert_eq!(SecretKey::from_pem(pem.as_bytes())?.der(), key.der());
        // As others read it.
        assert_eq!(KeyPair::from_pem(&pem)?.serialized_der(), key.der());
        assert_eq!(format!("{key:?}"), "SecretKey");
        assert!(SecretKey::from_pem(b"no key").is_err());
        let half = pem.get(..pem.len() / 2).unwrap_or_default();
        assert!(SecretKey::from_pem(half.as_bytes()).is_err());
        Ok(())
    }
}
