//! Keys that tokens are signed with: a JSON Web Key Set (RFC 7517), read into what signatures are checked with.
//!
//! Promises that a key fits only the algorithms of its own type, and that no secret (`oct`) is ever a key: who may check a
//! token with it could make one. Never does I/O. Tested by the table below; what keys are used for, in `policy/jwt`.

use std::{fmt, sync::Arc, time::Duration};

use arc_swap::ArcSwapOption;
use base64::{
    Engine as _,
    alphabet::URL_SAFE,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::Deserialize;
use serde_json::Value;

/// Most keys of a set that are read: a token without `kid` is held against each of them.
const MOST_KEYS: usize = 64;

/// Size of an RSA modulus, bytes: 2048 to 8192 bits (RFC 7518 section 3.3 asks for 2048 or more).
const RSA_MODULUS: std::ops::RangeInclusive<usize> = 256..=1024;

/// Some issuers pad, which RFC 7515 does not.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &URL_SAFE,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// A set of keys.
#[derive(Clone)]
pub struct KeySet {
    keys: Box<[Key]>,
    /// As it was written, by which sets are compared.
    text: Box<str>,
}

/// One public key.
#[derive(Clone)]
struct Key {
    id: Option<Box<str>>,
    algorithms: &'static [Algorithm],
    /// The only one it says it is for.
    only: Option<Algorithm>,
    public: DecodingKey,
}

#[derive(Deserialize)]
struct Wire {
    keys: Vec<Value>,
}

#[derive(Deserialize)]
struct WireKey {
    kty: String,
    kid: Option<String>,
    alg: Option<String>,
    #[serde(rename = "use")]
    usage: Option<String>,
    key_ops: Option<Vec<String>>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

impl KeySet {
    /// Reads a set. Keys for something else than checking signatures, and of types that are not known, are passed over
    /// (RFC 7517 section 5).
    ///
    /// # Errors
    /// What is wrong with it, in words; among this that no key is left.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wire: Wire =
            serde_json::from_str(text).map_err(|error| format!("is not a JSON Web Key Set: {error}"))?;
        if wire.keys.len() > MOST_KEYS {
            return Err(format!("has {} keys, more than {MOST_KEYS}", wire.keys.len()));
        }
        let (mut keys, mut passed_over) = (Vec::new(), Vec::new());
        for (i, key) in wire.keys.into_iter().enumerate() {
            match serde_json::from_value(key).map_err(|error| error.to_string()).and_then(WireKey::read) {
                Ok(key) => keys.push(key),
                Err(why) => passed_over.push(format!("keys[{i}] {why}")),
            }
        }
        if keys.is_empty() {
            let why = if passed_over.is_empty() { "it is empty".to_owned() } else { passed_over.join("; ") };
            return Err(format!("has no key that a token can be checked with: {why}"));
        }
        Ok(Self { keys: keys.into(), text: text.into() })
    }

    /// The keys that a token with this `kid` and `alg` may be signed with.
    pub fn candidates(&self, id: Option<&str>, algorithm: Algorithm) -> impl Iterator<Item = &DecodingKey> {
        let named = move |key: &&Key| match (id, key.id.as_deref()) {
            (Some(wanted), Some(id)) => wanted == id,
            _ => true,
        };
        let fits = move |key: &&Key| {
            key.algorithms.contains(&algorithm) && key.only.is_none_or(|only| only == algorithm)
        };
        self.keys.iter().filter(named).filter(fits).map(|key| &key.public)
    }

    /// How many keys it has.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Never: a set without keys is not read.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// As it was written.
    pub fn text(&self) -> &str {
        &self.text
    }
}

impl PartialEq for KeySet {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for KeySet {}

impl fmt::Debug for KeySet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.keys.iter().map(|key| &key.id)).finish()
    }
}

impl WireKey {
    fn read(self) -> Result<Key, String> {
        if self.usage.as_deref().is_some_and(|usage| usage != "sig") {
            return Err("is not for signatures (use)".to_owned());
        }
        if self.key_ops.as_ref().is_some_and(|ops| !ops.iter().any(|op| op == "verify")) {
            return Err("is not for checking signatures (key_ops)".to_owned());
        }
        let (algorithms, public) = self.material()?;
        let only = match &self.alg {
            None => None,
            Some(name) => match name.parse().ok().filter(|named| algorithms.contains(named)) {
                Some(algorithm) => Some(algorithm),
                None => return Err(format!("is for {name:?}, which does not fit its type")),
            },
        };
        let id = self.kid.filter(|id| !id.is_empty()).map(String::into_boxed_str);
        Ok(Key { id, algorithms, only, public })
    }

    fn material(&self) -> Result<(&'static [Algorithm], DecodingKey), String> {
        use Algorithm::{ES256, ES384, EdDSA, PS256, PS384, PS512, RS256, RS384, RS512};
        let part = |name: &str, text: &Option<String>| {
            let text = text.as_deref().ok_or_else(|| format!("has no {name}"))?;
            BASE64.decode(text).map_err(|error| format!("has a bad {name}: {error}"))
        };
        let sized = |name: &str, text: &Option<String>, size: usize| {
            let bytes = part(name, text)?;
            let fits = bytes.len() == size;
            fits.then_some(bytes).ok_or_else(|| format!("has a {name} that is not {size} bytes long"))
        };
        let point = |size| -> Result<DecodingKey, String> {
            let mut bytes = vec![4];
            bytes.extend(sized("x", &self.x, size)?);
            bytes.extend(sized("y", &self.y, size)?);
            Ok(DecodingKey::from_ec_der(&bytes))
        };
        match (&*self.kty, self.crv.as_deref()) {
            ("RSA", _) => {
                let (n, e) = (part("n", &self.n)?, part("e", &self.e)?);
                // Leading zeros are no part of a number.
                let n = &n[n.iter().take_while(|byte| **byte == 0).count()..];
                if !RSA_MODULUS.contains(&n.len()) {
                    return Err(format!("is an RSA key of {} bits, not of 2048 to 8192", n.len() * 8));
                }
                let key = DecodingKey::from_rsa_raw_components(n, &e);
                Ok((&[RS256, RS384, RS512, PS256, PS384, PS512], key))
            }
            ("EC", Some("P-256")) => Ok((&[ES256], point(32)?)),
            ("EC", Some("P-384")) => Ok((&[ES384], point(48)?)),
            ("OKP", Some("Ed25519")) => Ok((&[EdDSA], DecodingKey::from_ed_der(&sized("x", &self.x, 32)?))),
            ("oct", _) => Err("is a secret, which is never a key here".to_owned()),
            (kind, curve) => {
                Err(format!("is of a type that is not known: {kind} {}", curve.unwrap_or_default()))
            }
        }
    }
}

/// A key set that is somewhere else, as it was last fetched: the cell outlives snapshots, as what endpoints learn does.
#[derive(Debug)]
pub struct RemoteKeys {
    /// Where it is.
    pub uri: Arc<str>,
    /// How long fetching it may take.
    pub timeout: Duration,
    current: ArcSwapOption<KeySet>,
}

impl RemoteKeys {
    /// A set of which nothing is known yet.
    pub fn new(uri: &str, timeout: Duration) -> Self {
        Self { uri: uri.into(), timeout, current: ArcSwapOption::empty() }
    }

    /// The set as it was last fetched; `None` before that.
    pub fn get(&self) -> Option<Arc<KeySet>> {
        self.current.load_full()
    }

    /// What was fetched.
    pub fn set(&self, keys: Arc<KeySet>) {
        self.current.store(Some(keys));
    }
}

/// Where the keys of a rule come from.
#[derive(Debug, Clone)]
pub enum Keys {
    /// Written beside it (`jwks`).
    Inline(Arc<KeySet>),
    /// `jwksUri`.
    Remote(Arc<RemoteKeys>),
}

impl Keys {
    /// The keys, if they are there.
    pub fn get(&self) -> Option<Arc<KeySet>> {
        match self {
            Self::Inline(keys) => Some(Arc::clone(keys)),
            Self::Remote(remote) => remote.get(),
        }
    }
}

impl PartialEq for Keys {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Inline(one), Self::Inline(other)) => one == other,
            // What is in the cell now is nothing of the configuration.
            (Self::Remote(one), Self::Remote(other)) => Arc::ptr_eq(one, other),
            _ => false,
        }
    }
}

impl Eq for Keys {}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ed25519() -> Value {
        json!({"kty": "OKP", "crv": "Ed25519", "kid": "ed", "x": BASE64.encode([7; 32])})
    }

    fn with(mut key: Value, field: &str, value: Value) -> Value {
        key[field] = value;
        key
    }

    #[test]
    fn what_is_no_key_for_signatures_is_passed_over_and_named() {
        let rsa = |bytes: usize| json!({"kty": "RSA", "n": BASE64.encode(vec![0xff; bytes]), "e": "AQAB"});
        let ec = |crv: &str, size: usize| {
            let part = BASE64.encode(vec![1; size]);
            json!({"kty": "EC", "crv": crv, "x": part, "y": part})
        };
        for (key, expected) in [
            (ed25519(), ""),
            (with(ed25519(), "use", json!("sig")), ""),
            (with(ed25519(), "use", json!("enc")), "is not for signatures"),
            (with(ed25519(), "key_ops", json!(["verify"])), ""),
            (with(ed25519(), "key_ops", json!(["encrypt"])), "is not for checking signatures"),
            (with(ed25519(), "alg", json!("EdDSA")), ""),
            (with(ed25519(), "alg", json!("RS256")), "is for \"RS256\""),
            (with(ed25519(), "alg", json!("none")), "is for \"none\""),
            (with(ed25519(), "x", json!("AAAA")), "x that is not 32 bytes long"),
            (with(ed25519(), "x", json!("!")), "bad x"),
            (with(ed25519(), "x", Value::Null), "has no x"),
            (with(ed25519(), "crv", json!("X25519")), "not known: OKP X25519"),
            (with(ed25519(), "kid", json!(3)), "invalid type"),
            (rsa(256), ""),
            (rsa(128), "1024 bits"),
            (rsa(1025), "8200 bits"),
            (ec("P-256", 32), ""),
            (ec("P-384", 48), ""),
            (ec("P-256", 48), "x that is not 32 bytes long"),
            (ec("P-521", 66), "not known: EC P-521"),
            (json!({"kty": "oct", "k": "AAAA"}), "is a secret"),
            (json!({}), "missing field `kty`"),
            (json!(3), "invalid type"),
        ] {
            let alone = KeySet::parse(&json!({ "keys": [key] }).to_string());
            match &alone {
                Ok(set) => assert!(expected.is_empty() && set.len() == 1, "{key} is taken"),
                Err(why) => assert!(!expected.is_empty() && why.contains(expected), "{key}: {why}"),
            }
            // Beside a good one it does no harm.
            let beside = KeySet::parse(&json!({ "keys": [key, ed25519()] }).to_string());
            assert!(beside.is_ok(), "{key}");
        }
        for (text, expected) in [
            ("", "is not a JSON Web Key Set"),
            ("[]", "is not a JSON Web Key Set"),
            ("{}", "missing field `keys`"),
            (r#"{"keys": []}"#, "it is empty"),
        ] {
            assert!(KeySet::parse(text).is_err_and(|why| why.contains(expected)), "{text}");
        }
        let many = json!({ "keys": vec![ed25519(); MOST_KEYS + 1] });
        assert!(KeySet::parse(&many.to_string()).is_err_and(|why| why.contains("65 keys")));
    }

    #[test]
    fn keys_are_found_by_name_and_type() {
        let rsa = json!({"kty": "RSA", "n": BASE64.encode([0xff; 256]), "e": "AQAB"});
        let pss = with(with(rsa.clone(), "alg", json!("PS256")), "kid", json!("pss"));
        let text = json!({ "keys": [ed25519(), rsa, pss] }).to_string();
        let Ok(set) = KeySet::parse(&text) else { panic!("{text}") };
        for (id, algorithm, count) in [
            (None, Algorithm::EdDSA, 1),
            (Some("ed"), Algorithm::EdDSA, 1),
            (Some("other"), Algorithm::EdDSA, 0),
            // The name of one key and the type of another.
            (Some("ed"), Algorithm::RS256, 1),
            (None, Algorithm::RS256, 1),
            (None, Algorithm::PS256, 2),
            (Some("pss"), Algorithm::PS256, 2),
            (Some("pss"), Algorithm::RS256, 1),
            (None, Algorithm::ES256, 0),
            (None, Algorithm::HS256, 0),
        ] {
            assert_eq!(set.candidates(id, algorithm).count(), count, "{id:?} {algorithm:?}");
        }
    }
}
