//! HTTP proxies that lead on to another place (`trafficPolicy.tunnel`).

use std::fmt;

use http::{Method, uri::Authority};

/// Bytes for a cluster go through its endpoints to somewhere else, as an HTTP request to each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpTunnel {
    /// `protocol`.
    pub ask: Ask,
    /// `targetHost` and `targetPort`: where to.
    pub target: Authority,
}

/// How the proxy is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// CONNECT (RFC 9110 §9.3.6), Istio's default.
    Connect,
    /// POST, whose body and whose answer's body are the bytes.
    Post,
}

impl Ask {
    /// The method of the request.
    pub fn method(self) -> Method {
        match self {
            Self::Connect => Method::CONNECT,
            Self::Post => Method::POST,
        }
    }
}

impl fmt::Display for HttpTunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.ask.method(), self.target)
    }
}
