//! The one error of the path: what went wrong ([`Kind`]), on which side, and whether another try may help.
//!
//! Status, gRPC code and response flag come from the one table in [`Kind::row`]: a refusal without a kind does
//! not compile, so every refusal is counted. Tested by the unit tests below.

mod limit;
mod token;

use std::{fmt, sync::Arc};

use bytes::Bytes;
use http::StatusCode;

pub use self::{limit::Limit, token::TokenFailure};

/// Why a connection or request did not get its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The bytes are not the protocol they should be.
    BadRequest,
    /// No route matches.
    NoRoute,
    /// The route names a service, port or subset that does not exist, or the service has no ready endpoint.
    NoHealthyUpstream,
    /// Dialling the endpoint failed.
    ConnectFailure,
    /// The endpoint closed or reset before a whole response came.
    UpstreamReset,
    /// The endpoint refused the stream untouched (h2 `REFUSED_STREAM`, GOAWAY).
    RefusedStream,
    /// The route's or the try's timeout ran out.
    Timeout,
    /// The TLS handshake with the peer failed.
    TlsFailure,
    /// The peer proved another identity than the one expected.
    IdentityMismatch,
    /// The peer showed no identity, or mTLS was due and missing.
    Unauthenticated,
    /// The peer's certificate is revoked, or its root is not believed any more.
    Revoked,
    /// Policy says no.
    Denied,
    /// An external authorizer says no.
    ExternalDenied,
    /// An external authorizer gives no answer.
    ExternalError,
    /// Plaintext, where mutual TLS alone is taken.
    Plaintext,
    /// A token in the request is not to be believed.
    Token(TokenFailure),
    /// The injected fault of a route.
    FaultAbort(FaultStatus),
    /// A destination the mesh never proxies to (its own ports).
    IllegalDestination,
    /// The client went away.
    DownstreamReset,
    /// A budget is used up.
    Overflow,
    /// The destination's `connectionPool` allows no more.
    Full(Limit),
    /// A connection has been open as long as `connectionPool.tcp.maxConnectionDuration` allows.
    TooOld,
    /// The head of a request did not come in time.
    HeadTimeout,
    /// The head of a request is larger than is taken.
    HeadTooLarge,
    /// The target of a request is longer than is taken.
    TargetTooLong,
    /// Nothing moved on the exchange for too long.
    StreamIdle,
    /// The endpoint does not switch to the protocol that was asked for.
    NoUpgrade,
    /// The agent has too little memory for anything new.
    Overload,
    /// More requests than a rate limit of the pod's port lets in.
    RateLimited,
    /// As many requests are under way at the pod's port as its adaptive concurrency lets in.
    ConcurrencyLimit,
}

/// The status an injected abort answers with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FaultStatus {
    /// HTTP status.
    Http(StatusCode),
    /// gRPC status number.
    Grpc(u32),
}

/// Whose side a failure is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// The client's.
    Downstream,
    /// The endpoint's.
    Upstream,
    /// Ours.
    Mesh,
}

/// One row of the table: side, HTTP status, gRPC status, response flag, word for metrics and logs.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// Whose side it is on.
    pub side: Side,
    /// HTTP status of the answer.
    pub http: StatusCode,
    /// gRPC status of the answer (`grpc-status`).
    pub grpc: u32,
    /// Envoy's response flag, where one fits; `-` where none does.
    pub flag: &'static str,
    /// The word in metric labels and logs.
    pub word: &'static str,
}

/// The gRPC status that stands for an HTTP status (gRPC's "HTTP to gRPC Status Code Mapping").
pub const fn grpc_of(status: StatusCode) -> u32 {
    match status.as_u16() {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502..=504 => 14,
        _ => 2,
    }
}

/// The HTTP status that a gRPC status means (`google.rpc.Code`).
pub const fn http_of(grpc: u32) -> StatusCode {
    match grpc {
        0 => StatusCode::OK,
        3 | 9 | 11 => StatusCode::BAD_REQUEST,
        4 => StatusCode::GATEWAY_TIMEOUT,
        5 => StatusCode::NOT_FOUND,
        1 | 6 | 10 => StatusCode::CONFLICT,
        7 => StatusCode::FORBIDDEN,
        8 => StatusCode::TOO_MANY_REQUESTS,
        12 => StatusCode::NOT_IMPLEMENTED,
        14 => StatusCode::SERVICE_UNAVAILABLE,
        16 => StatusCode::UNAUTHORIZED,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

impl Kind {
    /// What a client is told in a body or `grpc-message`: nothing of endpoints or policies, which are the operator's to
    /// know.
    pub const fn told(self) -> &'static str {
        match self {
            // Envoy's words.
            Self::Denied => "RBAC: access denied",
            Self::ExternalDenied | Self::ExternalError => "",
            Self::Token(failure) => failure.told(),
            kind => kind.row().word,
        }
    }

    /// Everything the outside sees of this kind.
    pub const fn row(self) -> Row {
        use Side::{Downstream, Mesh, Upstream};
        let (side, http, grpc, flag, word) = match self {
            Self::BadRequest => (Downstream, StatusCode::BAD_REQUEST, 13, "DPE", "bad_request"),
            Self::NoRoute => (Mesh, StatusCode::NOT_FOUND, 12, "NR", "no_route"),
            Self::NoHealthyUpstream => {
                (Mesh, StatusCode::SERVICE_UNAVAILABLE, 14, "UH", "no_healthy_upstream")
            }
            Self::ConnectFailure => (Upstream, StatusCode::SERVICE_UNAVAILABLE, 14, "UF", "connect_failure"),
            Self::UpstreamReset => (Upstream, StatusCode::BAD_GATEWAY, 14, "UC", "upstream_reset"),
            Self::RefusedStream => (Upstream, StatusCode::SERVICE_UNAVAILABLE, 14, "UR", "refused_stream"),
            Self::Timeout => (Upstream, StatusCode::GATEWAY_TIMEOUT, 4, "UT", "timeout"),
            Self::TlsFailure => (Upstream, StatusCode::BAD_GATEWAY, 14, "TLS_FAILURE", "tls_failure"),
            Self::IdentityMismatch => {
                (Upstream, StatusCode::BAD_GATEWAY, 14, "IDENTITY_ERROR", "identity_mismatch")
            }
            Self::Unauthenticated => (Downstream, StatusCode::UNAUTHORIZED, 16, "UAEX", "unauthenticated"),
            // ztunnel's flag.
            Self::Revoked => (Downstream, StatusCode::UNAUTHORIZED, 16, "CERT_REVOKED", "revoked"),
            Self::Denied => (Downstream, StatusCode::FORBIDDEN, 7, "DENY", "denied"),
            Self::ExternalDenied => (Downstream, StatusCode::FORBIDDEN, 7, "UAEX", "external_denied"),
            Self::ExternalError => (Mesh, StatusCode::FORBIDDEN, 7, "UAEX", "external_error"),
            // Envoy's, where none of a port's filter chains takes the connection.
            Self::Plaintext => (Downstream, StatusCode::FORBIDDEN, 7, "NR", "plaintext"),
            // Envoy's, of its filter for tokens: 403 where the token is good and meant for somebody else.
            Self::Token(TokenFailure::Audience) => {
                (Downstream, StatusCode::FORBIDDEN, 7, "UAEX", "invalid_token")
            }
            Self::Token(_) => (Downstream, StatusCode::UNAUTHORIZED, 16, "UAEX", "invalid_token"),
            Self::FaultAbort(FaultStatus::Http(status)) => {
                (Mesh, status, grpc_of(status), "FI", "fault_abort")
            }
            Self::FaultAbort(FaultStatus::Grpc(code)) => (Mesh, StatusCode::OK, code, "FI", "fault_abort"),
            Self::IllegalDestination => (Downstream, StatusCode::FORBIDDEN, 7, "DENY", "illegal_destination"),
            Self::DownstreamReset => (Downstream, StatusCode::BAD_REQUEST, 1, "DC", "downstream_reset"),
            Self::Overflow => (Mesh, StatusCode::SERVICE_UNAVAILABLE, 8, "UO", "overflow"),
            // As Envoy's circuit breakers: `overflow`, and UNAVAILABLE for gRPC.
            Self::Full(_) => (Mesh, StatusCode::SERVICE_UNAVAILABLE, 14, "UO", "overflow"),
            // Envoy's flag for it.
            Self::TooOld => (Mesh, StatusCode::SERVICE_UNAVAILABLE, 14, "DT", "max_duration"),
            Self::HeadTimeout => (Downstream, StatusCode::REQUEST_TIMEOUT, 4, "SI", "head_timeout"),
            Self::HeadTooLarge => {
                (Downstream, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, 8, "DPE", "head_too_large")
            }
            Self::TargetTooLong => (Downstream, StatusCode::URI_TOO_LONG, 8, "DPE", "target_too_long"),
            Self::StreamIdle => (Mesh, StatusCode::GATEWAY_TIMEOUT, 4, "SI", "stream_idle"),
            // Envoy's flag for what its overload manager ends.
            Self::Overload => (Mesh, StatusCode::SERVICE_UNAVAILABLE, 14, "OM", "overload"),
            // Envoy's local rate limit.
            Self::RateLimited => (Mesh, StatusCode::TOO_MANY_REQUESTS, 14, "RL", "rate_limited"),
            Self::ConcurrencyLimit => (Mesh, StatusCode::SERVICE_UNAVAILABLE, 14, "UO", "concurrency_limit"),
            Self::NoUpgrade => (Upstream, StatusCode::BAD_GATEWAY, 12, "UPE", "no_upgrade"),
        };
        Row { side, http, grpc, flag, word }
    }
}

/// An error of the path: a kind and a sentence for the operator (what failed, where, what to do).
#[derive(Debug, Clone)]
pub struct Error {
    /// What went wrong.
    pub kind: Kind,
    /// The sentence.
    pub detail: String,
    /// The code with which an HTTP/2 peer reset its stream, where that is what went wrong.
    pub reset: Option<h2::Reason>,
    /// What the client is told instead of what the table says: the answer of an external authorizer.
    pub answer: Option<Arc<http::Response<Bytes>>>,
}

impl Error {
    /// An error of this kind with a sentence for the operator.
    pub fn new(kind: Kind, detail: impl Into<String>) -> Self {
        Self { kind, detail: detail.into(), reset: None, answer: None }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind.row().word, self.detail)
    }
}

impl std::error::Error for Error {}

/// What steps of the path return.
pub type Result<T> = std::result::Result<T, Error>;
