//! Where tokens are in a request, and how they are taken out of it.
//!
//! Promises that what is found at a place is all that is there: every line of a header, every parameter and cookie of
//! that name. Never decodes a token. Tested in `tests.rs` beside it.

use std::borrow::Cow;

use http::{
    HeaderMap, HeaderName, HeaderValue, Uri,
    header::{AUTHORIZATION, COOKIE},
    uri::{Parts, PathAndQuery},
};
use percent_encoding::percent_decode_str;

use crate::state::snapshot::Location;

const BEARER: &[u8] = b"bearer";

/// Every token at a place, in the order in which they stand there.
pub(super) fn at<'a>(location: &Location, headers: &'a HeaderMap, uri: &'a Uri) -> Vec<Cow<'a, str>> {
    match location {
        Location::Bearer => lines(headers, &AUTHORIZATION).filter_map(bearer).collect(),
        Location::Header(name, prefix) => {
            lines(headers, name).filter_map(|line| after(line, prefix)).collect()
        }
        Location::Param(name) => {
            let pairs = uri.query().unwrap_or_default().split('&');
            let values = pairs.filter_map(|pair| value_of(pair, name));
            values.map(|value| percent_decode_str(value).decode_utf8_lossy()).collect()
        }
        Location::Cookie(name) => {
            let pairs = lines(headers, &COOKIE).flat_map(|line| line.split(|byte| *byte == b';'));
            pairs.filter_map(|pair| cookie(pair, name)).map(String::from_utf8_lossy).collect()
        }
    }
}

fn lines<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a [u8]> {
    headers.get_all(name).iter().map(HeaderValue::as_bytes)
}

/// What follows the scheme, whatever that is: who says `Bearer` and shows nothing has a token that is none.
fn bearer(line: &[u8]) -> Option<Cow<'_, str>> {
    let line = line.trim_ascii();
    let (scheme, rest) = line.split_at_checked(BEARER.len())?;
    if !scheme.eq_ignore_ascii_case(BEARER) || rest.first().is_some_and(|byte| *byte != b' ') {
        return None;
    }
    Some(String::from_utf8_lossy(rest.trim_ascii()))
}

/// What follows the prefix, wherever that stands (Envoy), as far as a token may go on. Without a prefix, the whole.
fn after<'a>(line: &'a [u8], prefix: &str) -> Option<Cow<'a, str>> {
    if prefix.is_empty() {
        return Some(String::from_utf8_lossy(line.trim_ascii()));
    }
    let start = memchr::memmem::find(line, prefix.as_bytes())? + prefix.len();
    let rest = line[start..].trim_ascii_start();
    let end = rest.iter().position(|byte| !may_be_token(*byte)).unwrap_or(rest.len());
    Some(String::from_utf8_lossy(&rest[..end]))
}

/// Base64url, and the dots.
const fn may_be_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.')
}

fn value_of<'a>(pair: &'a str, wanted: &str) -> Option<&'a str> {
    let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
    percent_decode_str(name).eq(wanted.bytes()).then_some(value)
}

fn cookie<'a>(pair: &'a [u8], wanted: &str) -> Option<&'a [u8]> {
    let equals = pair.iter().position(|byte| *byte == b'=')?;
    let (name, value) = (pair[..equals].trim_ascii(), pair[equals + 1..].trim_ascii());
    let quoted = value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\""));
    (name == wanted.as_bytes()).then(|| quoted.unwrap_or(value))
}

/// Takes every token at a place out of the request.
pub(super) fn remove(location: &Location, headers: &mut HeaderMap, uri: &mut Uri) {
    match location {
        Location::Bearer => drop(headers.remove(AUTHORIZATION)),
        Location::Header(name, _) => drop(headers.remove(name)),
        Location::Param(name) => remove_param(uri, name),
        Location::Cookie(name) => remove_cookie(headers, name),
    }
}

fn remove_param(uri: &mut Uri, name: &str) {
    let Some(query) = uri.query() else { return };
    let left: Vec<&str> = query.split('&').filter(|pair| value_of(pair, name).is_none()).collect();
    let target = match &*left {
        [] => uri.path().to_owned(),
        left => format!("{}?{}", uri.path(), left.join("&")),
    };
    // What was a target is one with a parameter less.
    let Ok(target) = PathAndQuery::try_from(target) else { return };
    let mut parts: Parts = std::mem::take(uri).into_parts();
    parts.path_and_query = Some(target);
    *uri = Uri::from_parts(parts).unwrap_or_default();
}

fn remove_cookie(headers: &mut HeaderMap, name: &str) {
    let mut kept = Vec::new();
    for line in headers.get_all(COOKIE) {
        let pairs = line.as_bytes().split(|byte| *byte == b';');
        let left: Vec<&[u8]> =
            pairs.filter(|pair| cookie(pair, name).is_none()).map(<[u8]>::trim_ascii).collect();
        // Parts of a header value are one.
        kept.extend(HeaderValue::from_bytes(&left.join(&b"; "[..])).ok().filter(|line| !line.is_empty()));
    }
    headers.remove(COOKIE);
    for line in kept {
        headers.append(COOKIE, line);
    }
}
