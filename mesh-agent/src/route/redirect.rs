//! The `Location` of a redirect.
//!
//! Promises an absolute URL; `:80` and `:443` are left out where they are the scheme's own. Tested in `tests.rs`
//! beside it.

use http::request::Parts;

use super::{
    authority,
    rewrite::{join, replaced},
};
use crate::state::snapshot::{Redirect, RedirectPort, RequestMatch};

/// The `Location` of a redirect. The query is kept unless `uri` brings its own.
///
/// The match counts where `uri` replaces the matched prefix alone.
pub fn location(redirect: &Redirect, request: &Parts, matched: Option<&RequestMatch>, port: u16) -> String {
    let old_scheme = scheme(request);
    let new_scheme = redirect.scheme.as_deref().unwrap_or(old_scheme);
    let asked =
        redirect.authority.as_deref().map_or_else(|| String::from_utf8_lossy(authority(request)), Into::into);
    let (host, given) = split_port(&asked);
    let given: Option<u16> = match redirect.port {
        Some(RedirectPort::Number(number)) => Some(number),
        Some(RedirectPort::RequestPort) => Some(port),
        Some(RedirectPort::ProtocolDefault) => None,
        // The port the client dialled belongs to the scheme it dialled.
        None if redirect.authority.is_none() => {
            given.filter(|given| Some(*given) != default_port(old_scheme))
        }
        None => given,
    };
    let port = match given {
        Some(port) if Some(port) != default_port(new_scheme) => format!(":{port}"),
        _ => String::new(),
    };
    let path = match &redirect.uri {
        Some(uri) if redirect.prefix => {
            join(&replaced(request.uri.path(), uri, matched), request.uri.query())
        }
        Some(uri) => join(uri, request.uri.query()),
        None => request.uri.path_and_query().cloned(),
    };
    let path = path.as_ref().map_or("/", |path| path.as_str());
    format!("{new_scheme}://{host}{port}{path}")
}

/// The request's scheme: its own, else what a gateway says that it came by, else plain HTTP (Envoy's order).
pub(super) fn scheme(request: &Parts) -> &str {
    let told = || request.headers.get("x-forwarded-proto").and_then(|proto| proto.to_str().ok());
    let told = || told().filter(|proto| matches!(*proto, "http" | "https"));
    request.uri.scheme_str().or_else(told).unwrap_or("http")
}

fn default_port(scheme: &str) -> Option<u16> {
    match scheme {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    }
}

/// Host and port of an authority; an IPv6 address keeps its brackets.
fn split_port(authority: &str) -> (&str, Option<u16>) {
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, port.parse().ok()),
        _ => (authority, None),
    }
}
