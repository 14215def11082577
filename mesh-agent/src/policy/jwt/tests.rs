//! Which tokens are believed, where they are looked for, and what becomes of the request.
#![expect(clippy::unwrap_used, reason = "tests")]

mod properties;
mod requests;
mod rules;
mod signer;

use std::sync::LazyLock;

use aws_lc_rs::hmac;
use http::Request;
use serde_json::{Value, json};

use self::signer::{OTHER, SIGNER, base64};
use super::*;
use crate::{
    source::read_text,
    state::{
        compile::{Settings, compile},
        snapshot::{KeySet, Snapshot},
    },
};

const NOW: u64 = 1_800_000_000;

/// A pod with these entries of `jwtRules` (without keys, which are those of [`SIGNER`]) and these further objects.
fn compiled(rules: &[Value], more: &str) -> Snapshot {
    let rules: Vec<Value> = rules
        .iter()
        .map(|rule| {
            let mut rule = rule.clone();
            if rule.get("jwksUri").is_none() {
                rule["jwks"] = SIGNER.jwks().into();
            }
            rule
        })
        .collect();
    let authentication = json!({
        "apiVersion": "security.istio.io/v1",
        "kind": "RequestAuthentication",
        "metadata": {"name": "tokens", "namespace": "app"},
        "spec": {"jwtRules": rules},
    });
    let pod = "{apiVersion: v1, kind: Pod, metadata: {name: pod, namespace: app, labels: {app: pod}}, \
               status: {podIP: 10.0.0.9}}";
    let text = format!("{pod}\n---\n{authentication}\n---\n{more}\n");
    let (objects, refused) = read_text(&text);
    assert_eq!(refused, [], "{text}");
    compile(&objects, None, &Settings::default()).0
}

fn tokens(snapshot: &Snapshot) -> &Tokens {
    &snapshot.workload_at("10.0.0.9".parse().unwrap()).unwrap().authentication.tokens
}

fn claims() -> Value {
    json!({"iss": "https://issuer", "sub": "alice", "aud": "app", "exp": NOW + 600, "nbf": NOW - 600})
}

fn with(field: &str, value: Value) -> Value {
    let mut claims = claims();
    claims[field] = value;
    claims
}

/// A good token with this payload.
fn token(payload: &Value) -> String {
    SIGNER.token(&json!({"alg": "EdDSA", "kid": "ed"}), payload)
}

fn bearer(token: &str) -> Request<()> {
    Request::get("/").header("authorization", format!("Bearer {token}")).body(()).unwrap()
}

/// Why a request with this token is refused by a rule about the issuer, for the audience `app`.
fn failure(token: &str) -> Option<TokenFailure> {
    static RULES: LazyLock<Snapshot> =
        LazyLock::new(|| compiled(&[json!({"issuer": "https://issuer", "audiences": ["app"]})], ""));
    let mut request = bearer(token);
    let settled = settle(tokens(&RULES), 80, &mut request, NOW);
    if settled.is_err() {
        assert_eq!(request.headers()["authorization"], format!("Bearer {token}"), "it is as it was");
    }
    why(settled)
}

fn why(settled: Result<Option<Claims>>) -> Option<TokenFailure> {
    match settled {
        Ok(claims) => {
            assert!(claims.is_some(), "passed without claims");
            None
        }
        Err(Error { kind: Kind::Token(failure), detail, .. }) => {
            let told = failure.told().replace(' ', "_");
            assert!(detail.starts_with(&format!("jwt_authn_access_denied{{{told}}}")), "{detail}");
            Some(failure)
        }
        Err(other) => unreachable!("{other}"),
    }
}

#[test]
fn algorithms_of_public_keys_are_taken_and_no_others() {
    let good = claims();
    let key = |algorithm: &str| match algorithm {
        "ES256" => "p256",
        "ES384" => "p384",
        "EdDSA" => "ed",
        _ => "rsa",
    };
    for algorithm in ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA"] {
        let named = json!({"alg": algorithm, "kid": key(algorithm), "typ": "JWT"});
        let unnamed = json!({"alg": algorithm});
        assert_eq!(failure(&SIGNER.token(&named, &good)), None, "{algorithm}");
        assert_eq!(failure(&SIGNER.token(&unnamed, &good)), None, "{algorithm} without kid");
        let theirs = failure(&OTHER.token(&named, &good));
        assert_eq!(theirs, Some(TokenFailure::Signature), "{algorithm} of somebody else");
        // Another key's name, and a name that no key has.
        let other = if key(algorithm) == "ed" { "rsa" } else { "ed" };
        for kid in [other, "", "none"] {
            let token = SIGNER.token(&json!({"alg": algorithm, "kid": kid}), &good);
            assert_eq!(failure(&token), Some(TokenFailure::NoMatchingKey), "{algorithm} {kid:?}");
        }
        // Signed in another way than it says.
        let otherwise = if algorithm == "EdDSA" { "RS256" } else { "EdDSA" };
        let token = SIGNER.token_signed_as(otherwise, &named, &good);
        assert_eq!(failure(&token), Some(TokenFailure::Signature), "{algorithm} is {otherwise}");
        let unsigned = SIGNER.token_signed_as("", &named, &good);
        assert_eq!(failure(&unsigned), Some(TokenFailure::Signature), "{algorithm} unsigned");
    }
    for algorithm in
        ["none", "None", "NONE", "nOnE", "", "HS256", "HS384", "HS512", "ES512", "rs256", "RS256 ", "EDDSA"]
    {
        let token = SIGNER.token(&json!({ "alg": algorithm }), &good);
        assert_eq!(failure(&token), Some(TokenFailure::Algorithm), "{algorithm:?}");
    }
}

/// The public key is known to everybody: it is no secret to sign with.
#[test]
fn a_public_key_is_no_secret() {
    let header = json!({"alg": "HS256", "kid": "rsa"});
    let signed = format!("{}.{}", base64(header.to_string()), base64(claims().to_string()));
    for secret in [SIGNER.rsa_modulus(), SIGNER.jwks().into_bytes()] {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &secret);
        let signature = base64(hmac::sign(&key, signed.as_bytes()));
        assert_eq!(failure(&format!("{signed}.{signature}")), Some(TokenFailure::Algorithm));
    }
}

#[test]
fn what_has_not_the_form_of_a_token_is_none() {
    use TokenFailure as F;
    let good = token(&claims());
    let parts: Vec<&str> = good.split('.').collect();
    let [header, payload, signature] = parts[..] else { unreachable!() };
    let of = |header: &str, payload: &str| format!("{header}.{payload}.{signature}");
    let written = |header: Value| of(&base64(header.to_string()), payload);
    let table = [
        (good.clone(), None),
        (String::new(), Some(F::Form)),
        ("token".to_owned(), Some(F::Form)),
        (".".to_owned(), Some(F::Form)),
        ("..".to_owned(), Some(F::Form)),
        (format!("{header}.{payload}"), Some(F::Form)),
        (format!("{good}."), Some(F::Form)),
        (format!("{good}.x"), Some(F::Form)),
        (format!(".{payload}.{signature}"), Some(F::Form)),
        (format!("{header}..{signature}"), Some(F::Form)),
        (of("!!", payload), Some(F::HeaderBase64)),
        (of("a", payload), Some(F::HeaderBase64)),
        (of(&format!("{header}=="), payload), Some(F::HeaderBase64)),
        (of(&base64("{"), payload), Some(F::HeaderJson)),
        (of(&base64("[]"), payload), Some(F::HeaderJson)),
        (of(&base64([0xff, 0xfe]), payload), Some(F::HeaderJson)),
        (of(&base64("[".repeat(5000)), payload), Some(F::HeaderJson)),
        (written(json!({})), Some(F::NoAlgorithm)),
        (written(json!({"alg": null})), Some(F::NoAlgorithm)),
        (written(json!({"alg": ["EdDSA"]})), Some(F::NoAlgorithm)),
        (written(json!({"alg": "EdDSA", "kid": 3})), Some(F::KeyId)),
        (written(json!({"alg": "EdDSA", "crit": ["exp"]})), Some(F::Algorithm)),
        (of(header, "!!"), Some(F::PayloadBase64)),
        (of(header, "ab cd"), Some(F::PayloadBase64)),
        (of(header, &base64("null")), Some(F::PayloadJson)),
        (of(header, &base64("{\"iss\":")), Some(F::PayloadJson)),
        (of(header, &base64(format!("{{\"a\":{}", "[".repeat(9000)))), Some(F::PayloadJson)),
        (format!("{header}.{payload}.!"), Some(F::SignatureBase64)),
        (format!("{good}="), Some(F::SignatureBase64)),
        (format!("{header}.{payload}."), Some(F::Signature)),
        (of(header, &base64(with("sub", json!("root")).to_string())), Some(F::Signature)),
        (written(json!({"alg": "EdDSA", "kid": "ed", "typ": "JWT"})), Some(F::Signature)),
        (good[..good.len() - 2].to_owned(), Some(F::Signature)),
        (good.replace('.', ". "), Some(F::PayloadBase64)),
    ];
    for (text, expected) in table {
        assert_eq!(failure(&text), expected, "{text:?}");
    }
}

#[test]
fn issuer_time_and_audience_decide() {
    use TokenFailure as F;
    let table = [
        ("iss", json!("https://issuer/"), Some(F::Issuer)),
        ("iss", json!("HTTPS://issuer"), Some(F::Issuer)),
        ("iss", json!(""), Some(F::Issuer)),
        ("iss", Value::Null, Some(F::Issuer)),
        ("iss", json!(["https://issuer"]), Some(F::IssuerType)),
        ("sub", Value::Null, None),
        ("sub", json!(7), Some(F::SubjectType)),
        ("exp", Value::Null, None),
        ("exp", json!(NOW), None),
        ("exp", json!(NOW - 60), None),
        ("exp", json!(NOW - 61), Some(F::Expired)),
        ("exp", json!(0), Some(F::Expired)),
        ("exp", json!(0.5), Some(F::Expired)),
        ("exp", json!(NOW as f64 + 0.5), None),
        ("exp", json!(u64::MAX), None),
        ("exp", json!(1e300), None),
        ("exp", json!(-1), Some(F::ExpiryType)),
        ("exp", json!((NOW + 600).to_string()), Some(F::ExpiryType)),
        ("exp", json!([NOW + 600]), Some(F::ExpiryType)),
        ("nbf", Value::Null, None),
        ("nbf", json!(NOW + 60), None),
        ("nbf", json!(NOW + 61), Some(F::NotYetValid)),
        ("nbf", json!(u64::MAX), Some(F::NotYetValid)),
        ("nbf", json!("now"), Some(F::NotBeforeType)),
        ("nbf", json!(-1), Some(F::NotBeforeType)),
        ("aud", json!("app"), None),
        ("aud", json!(["other", "app"]), None),
        ("aud", json!("https://app"), None),
        ("aud", json!("http://app/"), None),
        ("aud", json!("other"), Some(F::Audience)),
        ("aud", json!("app/x"), Some(F::Audience)),
        ("aud", json!("APP"), Some(F::Audience)),
        ("aud", json!([]), Some(F::Audience)),
        ("aud", Value::Null, Some(F::Audience)),
        ("aud", json!(["app", 3]), Some(F::AudienceType)),
        ("aud", json!({"app": true}), Some(F::AudienceType)),
    ];
    for (field, value, expected) in table {
        assert_eq!(failure(&token(&with(field, value.clone()))), expected, "{field} {value}");
    }
}
