//! The strict edge of HTTP/1: between a client's stream and hyper's connection, and nothing that can be read in two
//! ways gets past it.
//!
//! hyper parses what passes, and is friendly: it drops a `Content-Length` beside `Transfer-Encoding`, takes equal
//! `Content-Length`s for one, ends lines at a bare LF. Each of those is how a request is smuggled past one program into
//! another. Here they are refused, and so is what is larger than [`Limits`]. Promises: bytes that pass are exactly the
//! client's; a head passes whole or not at all; hyper reads the requests and bodies that the edge has seen, and no
//! others; a refusal is answered by the service, after the responses to the requests before it. Never answers itself,
//! and never reads the value of a header that does not frame the message. Tested in `tests/` beside it, against hyper
//! too, and fuzzed (`cargo xtask fuzz http1_edge`).

mod chunked;
mod edge;
mod field;
mod gate;
mod head;
mod linger;
mod refusal;
mod writing;

#[cfg(test)]
mod tests;

pub use self::{
    edge::Edge,
    gate::{Gate, Turn},
    refusal::Refusal,
};

/// How large a request's head may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// From the first byte of the request line to the last of the empty line. Trailers of a body are bounded by it too.
    pub head_bytes: usize,
    /// Header lines of a head, and of a body's trailers.
    pub headers: usize,
    /// The target on the request line.
    pub target_bytes: usize,
}

impl Default for Limits {
    /// Envoy's 60 KiB and 100 headers; 8 KiB of target, as most servers have it.
    fn default() -> Self {
        Self { head_bytes: 60 << 10, headers: 100, target_bytes: 8 << 10 }
    }
}

impl Limits {
    /// No larger than what hyper and the `http` crate can hold: what passes here is refused nowhere behind.
    fn bearable(self) -> Self {
        /// `http::Uri`: 2^16 - 2.
        const TARGET: usize = (1 << 16) - 2;
        /// `http::HeaderMap` holds 2^15 entries, less some for how they are spread.
        const HEADERS: usize = 1 << 14;
        Self { target_bytes: self.target_bytes.min(TARGET), headers: self.headers.min(HEADERS), ..self }
    }
}
