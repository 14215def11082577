//! An issuer of tokens, for `RequestAuthentication`.
//!
//! Promises: two issuers never have the same key, and their keys have the same name, so that nothing but the signature
//! tells their tokens apart.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use rcgen::{PKCS_ED25519, PublicKeyData as _, SigningKey as _};
use serde_json::{Value, json};

/// Somebody who signs tokens.
#[derive(Debug)]
pub struct Issuer {
    key: rcgen::KeyPair,
}

impl Issuer {
    /// With a key of its own.
    pub fn new() -> Result<Self> {
        Ok(Self { key: rcgen::KeyPair::generate_for(&PKCS_ED25519)? })
    }

    /// Its public key, as a JSON Web Key Set.
    pub fn jwks(&self) -> String {
        let x = URL_SAFE_NO_PAD.encode(self.key.der_bytes());
        json!({ "keys": [{ "kty": "OKP", "crv": "Ed25519", "kid": "key", "x": x }] }).to_string()
    }

    /// A token that says this of its `sub`, is of the issuer `https://issuer`, for the audience `app`, and good for an
    /// hour; `changes` are made to it.
    pub fn token(&self, subject: &str, changes: &Value) -> Result<String> {
        let mut claims =
            json!({ "iss": "https://issuer", "sub": subject, "aud": "app", "exp": Self::in_seconds(3600)? });
        for (name, value) in changes.as_object().into_iter().flatten() {
            claims[name] = value.clone();
        }
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", part(&json!({ "alg": "EdDSA", "kid": "key" })), part(&claims));
        let signature = URL_SAFE_NO_PAD.encode(self.key.sign(signed.as_bytes())?);
        Ok(format!("{signed}.{signature}"))
    }

    /// Unix time, so many seconds from now.
    pub fn in_seconds(seconds: i64) -> Result<i64> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        Ok(i64::try_from(now)? + seconds)
    }
}
