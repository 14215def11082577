//! Whether a token is to be believed: its form, its issuer, its time, its audiences, and its signature, in this order, as
//! Envoy looks at them.
//!
//! Promises that claims come only from tokens signed with a public key that a rule gives for their issuer, by an algorithm
//! that fits the key; `none` and secrets are no algorithms here. Never panics, whatever the token is. Tested in `tests.rs`
//! beside it and by the fuzz target `jwt`.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::Algorithm;
use serde_json::{Map, Value};

use super::claims::Claims;
use crate::{error::TokenFailure, state::snapshot::TokenRule};

/// How far the clocks of issuers may be off, seconds (Envoy).
pub(super) const CLOCK_SKEW: u64 = 60;

/// The algorithms of public keys (RFC 7518 section 3.1, RFC 8037) that there are keys for.
const ALGORITHMS: [(&str, Algorithm); 9] = [
    ("RS256", Algorithm::RS256),
    ("RS384", Algorithm::RS384),
    ("RS512", Algorithm::RS512),
    ("PS256", Algorithm::PS256),
    ("PS384", Algorithm::PS384),
    ("PS512", Algorithm::PS512),
    ("ES256", Algorithm::ES256),
    ("ES384", Algorithm::ES384),
    ("EdDSA", Algorithm::EdDSA),
];

/// A token that was read and not believed yet.
struct Token<'a> {
    /// What is signed.
    signed: &'a str,
    signature: &'a str,
    algorithm: Algorithm,
    key_id: Option<String>,
    payload: Map<String, Value>,
}

/// The claims of a token, and the rule that it is good by: the first of those that are about its issuer. `now`: seconds of
/// Unix time.
pub(super) fn verify<'r>(
    text: &str,
    rules: impl Iterator<Item = &'r TokenRule>,
    now: u64,
) -> Result<(&'r TokenRule, Claims), TokenFailure> {
    let token = Token::read(text)?;
    let issuer = optional_text(&token.payload, "iss", TokenFailure::IssuerType)?.unwrap_or_default();
    optional_text(&token.payload, "sub", TokenFailure::SubjectType)?;
    let mut failure = TokenFailure::Issuer;
    for rule in rules.filter(|rule| *rule.issuer == *issuer) {
        match token.holds(rule, now) {
            Ok(()) => return Ok((rule, Claims::new(token.payload, &rule.spaced))),
            Err(why) => failure = why,
        }
    }
    Err(failure)
}

/// The payload as it is in the token, which the signature covers.
pub(super) fn payload(text: &str) -> &str {
    text.split('.').nth(1).unwrap_or_default()
}

impl<'a> Token<'a> {
    fn read(text: &'a str) -> Result<Self, TokenFailure> {
        let (signed, signature) = text.rsplit_once('.').ok_or(TokenFailure::Form)?;
        let (header, payload) = signed.split_once('.').ok_or(TokenFailure::Form)?;
        if payload.contains('.') || header.is_empty() || payload.is_empty() {
            return Err(TokenFailure::Form);
        }
        let header = object(header, TokenFailure::HeaderBase64, TokenFailure::HeaderJson)?;
        let algorithm = header.get("alg").and_then(Value::as_str).ok_or(TokenFailure::NoAlgorithm)?;
        let algorithm = ALGORITHMS.iter().find(|(name, _)| *name == algorithm);
        let (_, algorithm) = algorithm.ok_or(TokenFailure::Algorithm)?;
        // What an issuer says must be understood is not (RFC 7515 section 4.1.11).
        if header.contains_key("crit") {
            return Err(TokenFailure::Algorithm);
        }
        let key_id = optional_text(&header, "kid", TokenFailure::KeyId)?.map(str::to_owned);
        let payload = object(payload, TokenFailure::PayloadBase64, TokenFailure::PayloadJson)?;
        if URL_SAFE_NO_PAD.decode(signature).is_err() {
            return Err(TokenFailure::SignatureBase64);
        }
        Ok(Self { signed, signature, algorithm: *algorithm, key_id, payload })
    }

    fn holds(&self, rule: &TokenRule, now: u64) -> Result<(), TokenFailure> {
        self.in_time(now)?;
        self.is_for(&rule.audiences)?;
        let keys = rule.keys.get().ok_or(TokenFailure::NoKeys)?;
        let mut failure = TokenFailure::NoMatchingKey;
        for key in keys.candidates(self.key_id.as_deref(), self.algorithm) {
            let signed = self.signed.as_bytes();
            if jsonwebtoken::crypto::verify(self.signature, signed, key, self.algorithm).unwrap_or(false) {
                return Ok(());
            }
            failure = TokenFailure::Signature;
        }
        Err(failure)
    }

    /// A token without `exp` is good for ever, as in Envoy.
    fn in_time(&self, now: u64) -> Result<(), TokenFailure> {
        let begins = seconds(&self.payload, "nbf", TokenFailure::NotBeforeType)?;
        if begins.is_some_and(|begins| begins > now.saturating_add(CLOCK_SKEW)) {
            return Err(TokenFailure::NotYetValid);
        }
        let ends = seconds(&self.payload, "exp", TokenFailure::ExpiryType)?;
        if ends.is_some_and(|ends| now > ends.saturating_add(CLOCK_SKEW)) {
            return Err(TokenFailure::Expired);
        }
        Ok(())
    }

    fn is_for(&self, wanted: &[Box<str>]) -> Result<(), TokenFailure> {
        let named: Vec<&str> = match self.payload.get("aud") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::String(one)) => vec![one],
            Some(Value::Array(several)) => {
                let texts = several.iter().map(Value::as_str).collect::<Option<_>>();
                texts.ok_or(TokenFailure::AudienceType)?
            }
            Some(_) => return Err(TokenFailure::AudienceType),
        };
        let is_wanted = |one: &&str| wanted.iter().any(|wanted| bare(one) == bare(wanted));
        if wanted.is_empty() || named.iter().any(is_wanted) { Ok(()) } else { Err(TokenFailure::Audience) }
    }
}

/// Audiences are the same with and without scheme and a slash at the end (Envoy).
fn bare(audience: &str) -> &str {
    let without = audience.strip_prefix("https://").or_else(|| audience.strip_prefix("http://"));
    let without = without.unwrap_or(audience);
    without.strip_suffix('/').unwrap_or(without)
}

fn object(
    part: &str,
    no_base64: TokenFailure,
    no_json: TokenFailure,
) -> Result<Map<String, Value>, TokenFailure> {
    let bytes = URL_SAFE_NO_PAD.decode(part).map_err(|_| no_base64)?;
    serde_json::from_slice(&bytes).map_err(|_| no_json)
}

fn optional_text<'v>(
    object: &'v Map<String, Value>,
    name: &str,
    no_text: TokenFailure,
) -> Result<Option<&'v str>, TokenFailure> {
    match object.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => value.as_str().map(Some).ok_or(no_text),
    }
}

/// A time (RFC 7519 section 2: seconds, with a fraction perhaps).
fn seconds(
    object: &Map<String, Value>,
    name: &str,
    no_time: TokenFailure,
) -> Result<Option<u64>, TokenFailure> {
    match object.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => {
            let fraction = || value.as_f64().filter(|seconds| *seconds >= 0.0).map(|seconds| seconds as u64);
            value.as_u64().or_else(fraction).map(Some).ok_or(no_time)
        }
    }
}
