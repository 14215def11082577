//! Which tokens show who calls.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use time::OffsetDateTime;

use super::TestResult;
use crate::{
    config::ServiceAccountName,
    controller::{TokenError, TokenFor, TokenKey, Tokens},
};

const HOUR: Duration = Duration::from_hours(1);

fn account() -> ServiceAccountName {
    ServiceAccountName { namespace: "mesh-system".into(), name: "mesh-agent".into() }
}

/// A token of node `a`, made this long ago; `change` makes it another.
fn token(
    dir: &Path,
    ago: Duration,
    change: impl FnOnce(&mut TokenFor<'_>),
) -> Result<String, Box<dyn std::error::Error>> {
    let account = account();
    let mut whom = TokenFor {
        trust_domain: "cluster.local",
        audience: "istio-ca",
        account: &account,
        node: "a",
        duration: HOUR,
    };
    change(&mut whom);
    Ok(TokenKey::open(dir)?.issue(&whom, OffsetDateTime::now_utc() - ago)?)
}

fn open(dir: &Path) -> Result<Tokens, Box<dyn std::error::Error>> {
    Ok(Tokens::open(dir, "cluster.local", "istio-ca")?)
}

#[test]
fn a_token_shows_account_and_node() -> TestResult {
    let dir = tempfile::tempdir()?;
    let caller = open(dir.path())?.caller(&token(dir.path(), Duration::ZERO, |_| {})?)?;
    assert_eq!(caller.to_string(), "mesh-system/mesh-agent on node a");
    assert_eq!(
        caller.own_identity("cluster.local")?.to_string(),
        "spiffe://cluster.local/ns/mesh-system/sa/mesh-agent"
    );
    Ok(())
}

#[test]
fn what_is_wrong_with_a_token_is_said() -> TestResult {
    let (dir, other) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let (tokens, now) = (open(dir.path())?, Duration::ZERO);
    let why = |token: &str| tokens.caller(token).err();
    let foreign = token(other.path(), now, |_| {})?;
    assert_eq!(why(&foreign), Some(TokenError::Signature));
    let expired = token(dir.path(), HOUR + Duration::from_secs(1), |_| {})?;
    assert_eq!(why(&expired), Some(TokenError::Expired));
    let audience = token(dir.path(), now, |whom| whom.audience = "vault")?;
    assert_eq!(why(&audience), Some(TokenError::Audience("istio-ca".into())));
    let mesh = token(dir.path(), now, |whom| whom.trust_domain = "other.example")?;
    assert_eq!(why(&mesh), Some(TokenError::Issuer("spiffe://cluster.local".into())));
    let account = account();
    let whom = TokenFor {
        trust_domain: "cluster.local",
        audience: "istio-ca",
        account: &account,
        node: "a",
        duration: HOUR,
    };
    let from_the_future =
        TokenKey::open(dir.path())?.issue(&whom, OffsetDateTime::now_utc() + Duration::from_mins(15))?;
    assert_eq!(why(&from_the_future), Some(TokenError::NotYet));
    for malformed in ["", "a.b.c", "x", &"x".repeat(20_000)] {
        assert!(matches!(why(malformed), Some(TokenError::Malformed(_))), "{malformed:.20}");
    }
    Ok(())
}

#[test]
fn claims_and_algorithm_are_the_signed_ones() -> TestResult {
    let dir = tempfile::tempdir()?;
    let tokens = open(dir.path())?;
    let good = token(dir.path(), Duration::ZERO, |_| {})?;
    let [header, claims, signature] = good.split('.').collect::<Vec<_>>()[..] else {
        return Err("not three parts".into());
    };
    let text = String::from_utf8(URL_SAFE_NO_PAD.decode(claims)?)?;
    let forged = URL_SAFE_NO_PAD.encode(text.replace("\"a\"", "\"b\""));
    assert_ne!(forged, claims, "no node in {text}");
    assert_eq!(tokens.caller(&format!("{header}.{forged}.{signature}")).err(), Some(TokenError::Signature));
    // The public key taken for a shared secret, and no signature at all.
    for algorithm in ["HS256", "none"] {
        let header = URL_SAFE_NO_PAD.encode(format!("{{\"alg\":\"{algorithm}\",\"typ\":\"JWT\"}}"));
        for signature in ["", signature] {
            assert!(tokens.caller(&format!("{header}.{claims}.{signature}")).is_err(), "{algorithm}");
        }
    }
    tokens.caller(&good)?;
    Ok(())
}

#[test]
fn a_token_is_void_once_a_newer_one_was_used() -> TestResult {
    let dir = tempfile::tempdir()?;
    let old = token(dir.path(), Duration::from_mins(1), |_| {})?;
    let new = token(dir.path(), Duration::ZERO, |_| {})?;
    let other_node = token(dir.path(), Duration::from_mins(2), |whom| whom.node = "b")?;
    let tokens = open(dir.path())?;
    tokens.caller(&old)?;
    tokens.caller(&old)?;
    tokens.caller(&new)?;
    let replaced = TokenError::Replaced("mesh-system/mesh-agent on node a".into());
    assert_eq!(tokens.caller(&old).err(), Some(replaced.clone()));
    tokens.caller(&other_node)?;
    drop(tokens);
    // Nor after a restart.
    let tokens = open(dir.path())?;
    assert_eq!(tokens.caller(&old).err(), Some(replaced));
    tokens.caller(&new)?;
    let mode = fs::metadata(dir.path().join("tokens.json"))?.permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    Ok(())
}

#[test]
fn a_key_that_others_may_read_is_refused() -> TestResult {
    let dir = tempfile::tempdir()?;
    TokenKey::open(dir.path())?;
    let path = dir.path().join("token-key.pem");
    assert_eq!(fs::metadata(&path)?.permissions().mode() & 0o777, 0o600);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644))?;
    let Err(error) = TokenKey::open(dir.path()) else { return Err("it was used".into()) };
    assert!(error.to_string().contains("may be read by others (mode 0644"), "{error}");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    fs::write(&path, "no key")?;
    let Err(error) = TokenKey::open(dir.path()) else { return Err("it was used".into()) };
    assert!(error.to_string().contains("is not an ECDSA P-256 key"), "{error}");
    Ok(())
}
