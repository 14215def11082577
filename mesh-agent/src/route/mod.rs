//! What becomes of a request: which route takes it, which backend is drawn, what is rewritten.
//!
//! Pure and infallible: whatever could be invalid was refused when the configuration was read. Matching borrows; it
//! allocates nothing. Tested by the tables in `tests.rs`.

pub mod cors;
mod fault;
mod matching;
mod redirect;
mod rewrite;
mod stream;
#[cfg(test)]
mod tests;

pub use fault::{Injection, injection};
pub use matching::{find, matches, query_parameter};
pub use redirect::location;
pub use rewrite::{apply_request, apply_response, rewrite};
pub use stream::{StreamFacts, find_stream, needs_sni};

use http::{Extensions, Method, header::HOST, request::Parts};

use crate::state::snapshot::{Percentage, WeightedBackend};

/// Draws one backend by weight. The slice is never empty, and its weights are above 0.
///
/// # Panics
/// When the slice is empty, which the compiled snapshot rules out.
pub fn draw(backends: &[WeightedBackend]) -> &WeightedBackend {
    let total: u64 = backends.iter().map(|backend| u64::from(backend.weight)).sum();
    let mut ticket = if total == 0 { 0 } else { fastrand::u64(..total) };
    for backend in backends {
        match ticket.checked_sub(u64::from(backend.weight)) {
            Some(rest) => ticket = rest,
            None => return backend,
        }
    }
    // Reached only when all weights are 0, which the configuration refuses.
    &backends[0]
}

/// Whether this share hits now.
pub fn hits(share: Percentage) -> bool {
    share.0 > 0 && fastrand::u32(..Percentage::WHOLE.0) < share.0
}

/// The method that a request is judged by.
///
/// A CONNECT that asks for a protocol (RFC 8441) is a GET with `Upgrade` in another spelling, and which of the two the app
/// gets is its version's choice: it is a GET for routes and for policies, as in Envoy.
pub fn method<'a>(written: &'a Method, extensions: &Extensions) -> &'a Method {
    let asks = || extensions.get::<h2::ext::Protocol>().is_some();
    if written == Method::CONNECT && asks() { &Method::GET } else { written }
}

/// Host and port the client asked for: the URI's authority (HTTP/2, absolute form), else the Host header.
fn authority(request: &Parts) -> &[u8] {
    match request.uri.authority() {
        Some(authority) => authority.as_str().as_bytes(),
        None => request.headers.get(HOST).map_or(b"", |host| host.as_bytes()),
    }
}
