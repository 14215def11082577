//! Who is asked by policies with the action CUSTOM: Istio's `extensionProviders`, checked and resolved.
//!
//! Compiled in `state/compile/mesh_config.rs`; asked by `policy/external` and `proxy/external.rs`.

use std::{sync::Arc, time::Duration};

use http::{HeaderName, HeaderValue, StatusCode};

use super::TextMatch;

/// An external authorizer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provider {
    /// `name`
    pub name: Arc<str>,
    /// What it speaks.
    pub protocol: CheckProtocol,
    /// Fully qualified host name of its service.
    pub host: Arc<str>,
    /// `port` of the service.
    pub port: u16,
    /// `timeout`: how long an answer may take.
    pub timeout: Duration,
    /// `failOpen`: whether what it gives no answer to is let in.
    pub fail_open: bool,
    /// `statusOnError`: what the client is told where it gives no answer.
    pub status_on_error: StatusCode,
    /// `includeRequestBodyInCheck`
    pub body: Option<BodyInCheck>,
}

impl Provider {
    /// Whether a yes of the one is a yes of the other: the same authorizer, asked in another way perhaps.
    pub fn is_same_authorizer(&self, other: &Self) -> bool {
        (&self.name, &self.host, self.port) == (&other.name, &other.host, other.port)
    }

    /// Whether it can be asked about what is no request.
    pub const fn knows_connections(&self) -> bool {
        matches!(self.protocol, CheckProtocol::Grpc)
    }
}

/// What an authorizer speaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CheckProtocol {
    /// `envoyExtAuthzGrpc`: `envoy.service.auth.v3.Authorization/Check`.
    Grpc,
    /// `envoyExtAuthzHttp`: a request like the one in question, whose response with status 200 is a yes.
    Http(Box<HttpCheck>),
}

/// How an authorizer is asked over HTTP. Names of headers are in small letters.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HttpCheck {
    /// `pathPrefix`, before the path of the request.
    pub path_prefix: Box<str>,
    /// `includeRequestHeadersInCheck`
    pub request_headers: Box<[TextMatch]>,
    /// `includeAdditionalHeadersInCheck`
    pub added_headers: Box<[(HeaderName, HeaderValue)]>,
    /// `headersToUpstreamOnAllow`: of the authorizer's response, in the place of the request's.
    pub upstream_on_allow: Box<[TextMatch]>,
    /// `headersToDownstreamOnAllow`
    pub downstream_on_allow: Box<[TextMatch]>,
    /// `headersToDownstreamOnDeny`; none: all.
    pub downstream_on_deny: Box<[TextMatch]>,
}

/// How much of a request's body is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BodyInCheck {
    /// `maxRequestBytes`
    pub most: usize,
    /// `allowPartialMessage`: of a longer body its beginning is shown; else the request is refused with 413.
    pub partial: bool,
    /// `packAsBytes`: as `raw_body` rather than `body` of the gRPC message.
    pub raw: bool,
}
