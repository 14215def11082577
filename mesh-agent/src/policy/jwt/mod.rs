//! Tokens in requests (JWT, RFC 7519), where a `RequestAuthentication` selects the pod that is asked.
//!
//! Promises: a request without a token passes, as nobody's; one with a token that is not to be believed does not; every
//! token at a place where one is looked for has to be good, so that an app which looks elsewhere is not shown another one
//! than was verified. What rules say comes from tokens never comes from the client itself. Holds no state: a token is good
//! or bad at the time it is asked about. Tested in `tests.rs`; in the lab by `request_authentication.rs`.

mod claims;
#[cfg(test)]
mod tests;
mod token;
mod verify;

use std::time::{SystemTime, UNIX_EPOCH};

use http::{HeaderName, HeaderValue, Request};

pub use self::claims::Claims;
use crate::{
    error::{Error, Kind, Result, TokenFailure},
    state::snapshot::{ClaimPath, Keys, Location, TokenRule, Tokens},
};

/// Most tokens that a request may have: each costs a signature to check.
const MOST_TOKENS: usize = 4;

/// Seconds of Unix time.
pub fn now() -> u64 {
    // Before 1970 every token is as good as it is then.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Verifies the tokens of a request to this port, takes out those that the app is not to see, and writes the headers that
/// are made of them. Returns what the token says; of several, that of the first rule. `now`: seconds of Unix time.
///
/// # Errors
/// [`Kind::Token`], and the request is as it was.
pub fn settle<B>(tokens: &Tokens, port: u16, request: &mut Request<B>, now: u64) -> Result<Option<Claims>> {
    if tokens.of(port).next().is_none() {
        return Ok(None);
    }
    let verified = authenticate(tokens, port, request, now)?;
    for rule in tokens.of(port) {
        for name in rule.payload_to.iter().chain(rule.claims_to.iter().map(|(name, _)| name)) {
            request.headers_mut().remove(name);
        }
    }
    let mut claims = None;
    for Verified { rule, location, claims: said, headers } in verified {
        if !rule.forward {
            let mut uri = std::mem::take(request.uri_mut());
            token::remove(location, request.headers_mut(), &mut uri);
            *request.uri_mut() = uri;
        }
        for (name, value) in headers {
            request.headers_mut().insert(name, value);
        }
        claims = claims.or(Some(said));
    }
    Ok(claims)
}

/// A token that is good.
struct Verified<'a> {
    rule: &'a TokenRule,
    location: &'a Location,
    claims: Claims,
    /// What is made of it for the app.
    headers: Vec<(HeaderName, HeaderValue)>,
}

/// Every token in the request, verified.
fn authenticate<'a, B>(
    tokens: &'a Tokens,
    port: u16,
    request: &Request<B>,
    now: u64,
) -> Result<Vec<Verified<'a>>> {
    let mut verified: Vec<Verified<'a>> = Vec::new();
    let mut seen: Vec<&Location> = Vec::new();
    let mut count = 0;
    for location in tokens.of(port).flat_map(|rule| &*rule.locations) {
        // Rules share places, and a token is good by one of those that do.
        if seen.contains(&location) {
            continue;
        }
        let found = token::at(location, request.headers(), request.uri());
        if found.is_empty() {
            continue;
        }
        seen.push(location);
        count += found.len();
        if count > MOST_TOKENS {
            return Err(refused(TokenFailure::TooMany, ""));
        }
        for text in found {
            let about = || tokens.of(port).filter(|rule| rule.locations.contains(location));
            let (rule, claims) =
                verify::verify(&text, about(), now).map_err(|why| refused(why, &missing(why, about())))?;
            let headers = headers(rule, &text, &claims);
            verified.push(Verified { rule, location, claims, headers });
        }
    }
    Ok(verified)
}

fn headers(rule: &TokenRule, text: &str, claims: &Claims) -> Vec<(HeaderName, HeaderValue)> {
    let payload = rule.payload_to.as_ref().and_then(|name| {
        // Base64url is what a header value may have.
        Some((name.clone(), HeaderValue::from_str(verify::payload(text)).ok()?))
    });
    let one = |(name, path): &(HeaderName, ClaimPath)| Some((name.clone(), claims.header(path)?));
    payload.into_iter().chain(rule.claims_to.iter().filter_map(one)).collect()
}

/// Where the keys should be that are not there.
fn missing<'a>(why: TokenFailure, mut about: impl Iterator<Item = &'a TokenRule>) -> String {
    let missing = about.find_map(|rule| match &rule.keys {
        Keys::Remote(remote) if why == TokenFailure::NoKeys && remote.get().is_none() => Some(&remote.uri),
        _ => None,
    });
    missing.map_or_else(String::new, |uri| format!(": the key set of {uri} has not been fetched yet"))
}

/// Envoy's detail of it, as it stands in access logs.
fn refused(why: TokenFailure, more: &str) -> Error {
    let detail = format!("jwt_authn_access_denied{{{}}}{more}", why.told().replace(' ', "_"));
    Error::new(Kind::Token(why), detail)
}
