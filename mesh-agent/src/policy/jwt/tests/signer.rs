//! An issuer of tokens: a key of each type, and tokens signed with them.

use std::sync::LazyLock;

use aws_lc_rs::{
    rand::SystemRandom,
    rsa::KeySize,
    signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair,
        KeyPair as _, RSA_PKCS1_SHA256, RSA_PKCS1_SHA384, RSA_PKCS1_SHA512, RSA_PSS_SHA256, RSA_PSS_SHA384,
        RSA_PSS_SHA512, RsaEncoding, RsaKeyPair,
    },
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Value, json};

/// Whom the rules believe.
pub static SIGNER: LazyLock<Signer> = LazyLock::new(Signer::new);

/// Somebody else, whose keys have the same names.
pub static OTHER: LazyLock<Signer> = LazyLock::new(Signer::new);

pub struct Signer {
    rsa: RsaKeyPair,
    p256: EcdsaKeyPair,
    p384: EcdsaKeyPair,
    ed: Ed25519KeyPair,
}

pub fn base64(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

impl Signer {
    fn new() -> Self {
        Self {
            rsa: RsaKeyPair::generate(KeySize::Rsa2048).unwrap(),
            p256: EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap(),
            p384: EcdsaKeyPair::generate(&ECDSA_P384_SHA384_FIXED_SIGNING).unwrap(),
            ed: Ed25519KeyPair::generate().unwrap(),
        }
    }

    /// Its public keys, named after their types.
    pub fn jwks(&self) -> String {
        let n = self.rsa.public_key().modulus().big_endian_without_leading_zero();
        let e = self.rsa.public_key().exponent().big_endian_without_leading_zero();
        let rsa = json!({"kty": "RSA", "kid": "rsa", "n": base64(n), "e": base64(e)});
        let point = |name: &str, curve: &str, pair: &EcdsaKeyPair| {
            let point = &pair.public_key().as_ref()[1..];
            let (x, y) = point.split_at(point.len() / 2);
            json!({"kty": "EC", "kid": name, "crv": curve, "x": base64(x), "y": base64(y)})
        };
        let ed =
            json!({"kty": "OKP", "kid": "ed", "crv": "Ed25519", "x": base64(self.ed.public_key().as_ref())});
        let keys = [rsa, point("p256", "P-256", &self.p256), point("p384", "P-384", &self.p384), ed];
        json!({ "keys": keys }).to_string()
    }

    /// Bytes that an algorithm of secrets might be tricked into taking for one.
    pub fn rsa_modulus(&self) -> Vec<u8> {
        self.rsa.public_key().modulus().big_endian_without_leading_zero().to_vec()
    }

    /// The signature that the algorithm of this name makes; of no other it has one.
    pub fn signature(&self, algorithm: &str, message: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        let rsa = |encoding: &'static dyn RsaEncoding| {
            let mut signature = vec![0; self.rsa.public_modulus_len()];
            self.rsa.sign(encoding, &random, message, &mut signature).unwrap();
            signature
        };
        match algorithm {
            "RS256" => rsa(&RSA_PKCS1_SHA256),
            "RS384" => rsa(&RSA_PKCS1_SHA384),
            "RS512" => rsa(&RSA_PKCS1_SHA512),
            "PS256" => rsa(&RSA_PSS_SHA256),
            "PS384" => rsa(&RSA_PSS_SHA384),
            "PS512" => rsa(&RSA_PSS_SHA512),
            "ES256" => self.p256.sign(&random, message).unwrap().as_ref().to_vec(),
            "ES384" => self.p384.sign(&random, message).unwrap().as_ref().to_vec(),
            "EdDSA" => self.ed.sign(message).as_ref().to_vec(),
            _ => Vec::new(),
        }
    }

    /// A token with this header and payload, signed as the header says.
    pub fn token(&self, header: &Value, payload: &Value) -> String {
        self.token_signed_as(header["alg"].as_str().unwrap_or_default(), header, payload)
    }

    /// The same, signed in another way.
    pub fn token_signed_as(&self, algorithm: &str, header: &Value, payload: &Value) -> String {
        let signed = format!("{}.{}", base64(header.to_string()), base64(payload.to_string()));
        let signature = self.signature(algorithm, signed.as_bytes());
        format!("{signed}.{}", base64(signature))
    }
}
