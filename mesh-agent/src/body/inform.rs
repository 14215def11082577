//! Interim responses on their way back to the client.

use http::{HeaderMap, StatusCode};

/// Whoever can hand a 1xx response to the client before the final one (RFC 9110 §15.2).
pub trait Inform: Send + Sync {
    /// Hands it on as soon as its place in the stream of responses is there; one that comes too late is dropped.
    fn inform(&self, status: StatusCode, headers: &HeaderMap);
}

/// For a request whose interim responses nobody waits for: a mirror's, a question to an authorizer.
pub struct Nobody;

impl Inform for Nobody {
    fn inform(&self, _status: StatusCode, _headers: &HeaderMap) {}
}
