//! Changes to a request or response on its way: path, authority, headers.
//!
//! Promises that the query survives every rewrite of the path, and that a path stays one. Tested in `tests.rs`
//! beside it.

use std::borrow::Cow;

use http::{
    HeaderMap, HeaderName, HeaderValue, Uri,
    header::HOST,
    request::Parts,
    uri::{Authority, PathAndQuery},
};

use crate::state::snapshot::{HeaderOp, PathRewrite, RequestMatch, Rewrite, StringMatch};

/// What the path was before it was rewritten: Envoy tells the app, and logs of Istio's show it.
const ORIGINAL_PATH: HeaderName = HeaderName::from_static("x-envoy-original-path");

/// Applies `rewrite` (path, authority) to the request.
///
/// A match that says nothing of the path counts as the prefix `/`, as in Istio: `uri: /v2/` turns `/a` into `/v2/a`.
pub fn rewrite(request: &mut Parts, rewrite: &Rewrite, matched: Option<&RequestMatch>) {
    if let Some(change) = &rewrite.path {
        let path = request.uri.path();
        let changed = match change {
            PathRewrite::Uri(new) => Cow::Owned(replaced(path, new, matched)),
            PathRewrite::Regex(regex, replacement) => regex.replace_all(path, replacement.as_str()),
        };
        if let Some(path_and_query) = join(&changed, request.uri.query()) {
            let before = request.uri.path_and_query().map_or("/", PathAndQuery::as_str);
            if let Ok(before) = HeaderValue::from_str(before) {
                request.headers.insert(ORIGINAL_PATH, before);
            }
            set_path(&mut request.uri, path_and_query);
        }
    }
    if let Some(authority) = &rewrite.authority {
        set_authority(request, authority);
    }
}

/// Applies set, add, remove to a request's headers (and authority).
pub fn apply_request(request: &mut Parts, op: &HeaderOp) {
    if let Some(authority) = &op.authority {
        set_authority(request, authority);
    }
    apply(&mut request.headers, op);
}

/// Applies set, add, remove to a response's headers.
pub fn apply_response(headers: &mut HeaderMap, op: &HeaderOp) {
    apply(headers, op);
}

fn apply(headers: &mut HeaderMap, op: &HeaderOp) {
    for (name, value) in &op.set {
        headers.insert(name, value.clone());
    }
    for (name, value) in &op.add {
        headers.append(name, value.clone());
    }
    for name in &op.remove {
        headers.remove(name);
    }
}

/// The path with the matched prefix replaced, or wholly new where the match was no prefix.
pub(super) fn replaced(path: &str, new: &str, matched: Option<&RequestMatch>) -> String {
    let kept = match matched.and_then(|m| m.uri.as_ref()) {
        // The prefix matched, so that many bytes are there; with its case ignored they are ASCII.
        Some(StringMatch::Prefix(prefix)) => path.get(prefix.len()..).unwrap_or_default(),
        Some(StringMatch::Exact(_) | StringMatch::Regex(_)) => "",
        None => path.strip_prefix('/').unwrap_or(path),
    };
    format!("{new}{kept}")
}

/// Path and query as one; `None` when they are no path of a URI.
pub(super) fn join(path: &str, query: Option<&str>) -> Option<PathAndQuery> {
    let slash = if path.starts_with('/') || path == "*" { "" } else { "/" };
    let joined = match query {
        // A rewrite that brings a query of its own keeps it.
        Some(query) if !path.contains('?') => format!("{slash}{path}?{query}"),
        _ => format!("{slash}{path}"),
    };
    PathAndQuery::try_from(joined).ok()
}

fn set_path(uri: &mut Uri, path_and_query: PathAndQuery) {
    let mut parts = std::mem::take(uri).into_parts();
    parts.path_and_query = Some(path_and_query);
    // An authority-form URI (CONNECT) gains a path and then needs a scheme.
    if parts.authority.is_some() && parts.scheme.is_none() {
        parts.scheme = Some(http::uri::Scheme::HTTP);
    }
    *uri = Uri::from_parts(parts).unwrap_or_default();
}

/// Sets host and port wherever the request names them; a Host header where it names them nowhere.
fn set_authority(request: &mut Parts, authority: &Authority) {
    let in_uri = request.uri.authority().is_some();
    if in_uri {
        let mut parts = std::mem::take(&mut request.uri).into_parts();
        parts.authority = Some(authority.clone());
        request.uri = Uri::from_parts(parts).unwrap_or_default();
    }
    if !in_uri || request.headers.contains_key(HOST) {
        // An authority is made of characters that a header value may have.
        if let Ok(value) = HeaderValue::from_str(authority.as_str()) {
            request.headers.insert(HOST, value);
        }
    }
}
