//! Which route takes a request: list order, first match wins.
//!
//! Inside one match everything must hold, between matches any may. Tested in `tests.rs` beside it.

use std::sync::Arc;

use http::{HeaderName, HeaderValue, Uri, request::Parts};

use super::authority;
use crate::state::snapshot::{HeaderMatch, HttpRoute, RequestMatch, StringMatch, Workload};

/// The first route that matches, and which of its matches did (None: it matches everything).
pub fn find<'a>(
    routes: &'a [Arc<HttpRoute>],
    request: &Parts,
    port: u16,
    source: &Workload,
) -> Option<(&'a Arc<HttpRoute>, Option<&'a RequestMatch>)> {
    routes.iter().find_map(|route| {
        if route.matches.is_empty() {
            return Some((route, None));
        }
        let matched = route.matches.iter().find(|m| holds(m, request, port, source))?;
        Some((route, Some(matched)))
    })
}

pub(super) fn holds(m: &RequestMatch, request: &Parts, port: u16, source: &Workload) -> bool {
    m.port.is_none_or(|asked| asked == port)
        && m.source_namespace.as_deref().is_none_or(|asked| asked == &*source.namespace)
        && has_labels(source, &m.source_labels)
        && m.uri.as_ref().is_none_or(|uri| uri_matches(uri, m.ignore_uri_case, request.uri.path()))
        && m.method.as_ref().is_none_or(|asked| {
            matches(asked, super::method(&request.method, &request.extensions).as_str().as_bytes())
        })
        && m.authority.as_ref().is_none_or(|asked| matches(asked, authority(request)))
        && m.scheme.as_ref().is_none_or(|scheme| matches(scheme, super::redirect::scheme(request).as_bytes()))
        && m.headers.iter().all(|(name, value)| header_matches(request, name, value))
        && m.without_headers.iter().all(|(name, value)| header_misses(request, name, value))
        && m.query_params.iter().all(|(name, value)| query_matches(request, name, value))
}

/// Whether a client has all of these labels.
pub(super) fn has_labels(source: &Workload, labels: &[(String, String)]) -> bool {
    labels.iter().all(|(name, value)| source.labels.get(name.as_str()).is_some_and(|has| **has == *value))
}

/// Whether a value is what a match asks for; what is no text matches no regular expression.
pub fn matches(m: &StringMatch, value: &[u8]) -> bool {
    match m {
        StringMatch::Exact(exact) => value == exact.as_bytes(),
        StringMatch::Prefix(prefix) => value.starts_with(prefix.as_bytes()),
        StringMatch::Regex(regex) => str::from_utf8(value).is_ok_and(|text| regex.is_match(text)),
    }
}

/// The case is ignored in exact and prefix matches only.
fn uri_matches(m: &StringMatch, ignore_case: bool, path: &str) -> bool {
    match m {
        StringMatch::Exact(exact) if ignore_case => path.eq_ignore_ascii_case(exact),
        StringMatch::Prefix(prefix) if ignore_case => {
            let start = path.as_bytes().get(..prefix.len());
            start.is_some_and(|start| start.eq_ignore_ascii_case(prefix.as_bytes()))
        }
        m => matches(m, path.as_bytes()),
    }
}

fn header_matches(request: &Parts, name: &HeaderName, value: &HeaderMatch) -> bool {
    match value {
        HeaderMatch::Present => request.headers.contains_key(name),
        HeaderMatch::Value(value) => {
            let mut given = request.headers.get_all(name).iter().map(HeaderValue::as_bytes);
            match (given.next(), given.next()) {
                (None, _) => false,
                (Some(only), None) => matches(value, only),
                // Several are one, as a list (RFC 9110 section 5.3; Envoy joins them without a space).
                (Some(first), Some(second)) => {
                    let all: Vec<&[u8]> = [first, second].into_iter().chain(given).collect();
                    matches(value, &all.join(&b','))
                }
            }
        }
    }
}

/// An absent header counts as an empty one.
fn header_misses(request: &Parts, name: &HeaderName, value: &HeaderMatch) -> bool {
    match value {
        HeaderMatch::Value(value) if !request.headers.contains_key(name) => !matches(value, b""),
        value => !header_matches(request, name, value),
    }
}

fn query_matches(request: &Parts, name: &str, value: &StringMatch) -> bool {
    query_parameter(&request.uri, name).is_some_and(|given| matches(value, given.as_bytes()))
}

/// The first parameter of this name, as it stands in the query (not decoded, as in Envoy); empty where it has no value.
pub fn query_parameter<'a>(uri: &'a Uri, name: &str) -> Option<&'a str> {
    uri.query()?.split('&').find_map(|param| {
        let (given, value) = param.split_once('=').unwrap_or((param, ""));
        (given == name).then_some(value)
    })
}
