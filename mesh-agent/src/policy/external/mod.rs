//! External authorization: what an authorizer is asked, and what its answer means.
//!
//! Pure: messages in, messages out; who sends them is `proxy/external.rs`. Promises that an answer which cannot be read is
//! no answer, never a yes; that what an authorizer may change of a message is its headers, and none of those by which the
//! message is framed or routed. As Envoy's `ext_authz` filter has it, over gRPC (`grpc.rs`) and HTTP (`http.rs`).
//! Tested here and there, and in the lab (`tests/tests/external_authorization.rs`).

pub mod grpc;
pub mod http;
pub mod messages;
#[cfg(test)]
mod tests;

use ::http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Uri, header, request};
use bytes::Bytes;

use super::Asked;
use crate::state::snapshot::{BodyInCheck, CheckProtocol, Provider, Workload};

/// Says in a check whether the body that is shown is only its beginning (Envoy).
pub(super) const PARTIAL_BODY: HeaderName = HeaderName::from_static("x-envoy-auth-partial-body");

/// Headers by which a message is framed, sent and routed: an authorizer's own, never the message's in question.
const FRAMING: [HeaderName; 12] = [
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::HOST,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    HeaderName::from_static("keep-alive"),
    // Between agents.
    HeaderName::from_static("mesh-app-protocol"),
    HeaderName::from_static("mesh-failure"),
    HeaderName::from_static("mesh-introduces"),
    HeaderName::from_static("mesh-port"),
];

/// What an authorizer is asked about.
#[derive(Debug)]
pub struct Question<'a> {
    /// Who asks, of which pod.
    pub asked: &'a Asked<'a>,
    /// The pod at the client's address, as far as it is known.
    pub source: Option<&'a Workload>,
    /// For what.
    pub what: Subject<'a>,
}

/// What is to be permitted.
#[derive(Debug)]
pub enum Subject<'a> {
    /// A request.
    Request(&'a request::Parts, Shown),
    /// A connection whose bytes are no requests, and its server name.
    Connection(Option<&'a str>),
}

/// What is shown of a body.
#[derive(Debug, Clone, Default)]
pub struct Shown {
    /// The body or its beginning; `None` where bodies are not shown.
    pub body: Option<Bytes>,
    /// Whether there is more of it.
    pub partial: bool,
    /// Size of the whole, where that is known.
    pub size: Option<u64>,
}

/// What an authorizer says.
#[derive(Debug)]
pub enum Answer {
    /// Yes, with these changes.
    Allowed(Changes),
    /// No, with this answer for the client.
    Denied(Response<Bytes>),
}

/// What becomes of the headers of a message that is let in.
#[derive(Debug, Default)]
pub struct Changes {
    /// Of the request.
    pub request: Vec<Change>,
    /// Of the response to it.
    pub response: Vec<Change>,
}

/// One change of a message's headers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// In the place of what is there.
    Set(HeaderName, HeaderValue),
    /// Another line of it.
    Append(HeaderName, HeaderValue),
    /// Another line, only where there is one.
    AppendToExisting(HeaderName, HeaderValue),
    /// Only where there is none.
    AddIfAbsent(HeaderName, HeaderValue),
    /// Only where there is one.
    OverwriteExisting(HeaderName, HeaderValue),
    /// No more.
    Remove(HeaderName),
}

impl Change {
    fn apply(&self, headers: &mut HeaderMap) {
        match self {
            Self::AppendToExisting(name, _) | Self::OverwriteExisting(name, _)
                if !headers.contains_key(name) => {}
            Self::AddIfAbsent(name, _) if headers.contains_key(name) => {}
            Self::Append(name, value) | Self::AppendToExisting(name, value) => {
                headers.append(name, value.clone());
            }
            Self::Set(name, value)
            | Self::AddIfAbsent(name, value)
            | Self::OverwriteExisting(name, value) => {
                headers.insert(name, value.clone());
            }
            Self::Remove(name) => {
                headers.remove(name);
            }
        }
    }
}

/// Makes the changes, one after the other.
pub fn change(headers: &mut HeaderMap, changes: &[Change]) {
    for change in changes {
        change.apply(headers);
    }
}

/// Whether a header may be taken over from an authorizer.
fn is_framing(name: &HeaderName) -> bool {
    FRAMING.contains(name)
}

/// The request to send to an authorizer.
///
/// # Errors
/// Why it cannot be asked about this.
pub fn check(provider: &Provider, question: &Question<'_>) -> Result<Request<Bytes>, String> {
    match &provider.protocol {
        CheckProtocol::Grpc => grpc::check(provider, question),
        CheckProtocol::Http(terms) => http::check(terms, question),
    }
}

/// What an authorizer's response means; `trailers` are those that came after its body.
///
/// # Errors
/// Why it is no answer.
pub fn answer(
    provider: &Provider,
    response: Response<Bytes>,
    trailers: Option<&HeaderMap>,
) -> Result<Answer, String> {
    match &provider.protocol {
        CheckProtocol::Grpc => grpc::answer(&response, trailers),
        CheckProtocol::Http(terms) => http::answer(terms, response),
    }
}

/// What the client is told where there is no answer.
pub fn no_answer(provider: &Provider) -> Response<Bytes> {
    with_status(provider.status_on_error)
}

/// What the client is told whose request has a longer body than may be shown.
pub fn too_long() -> Response<Bytes> {
    with_status(StatusCode::PAYLOAD_TOO_LARGE)
}

fn with_status(status: StatusCode) -> Response<Bytes> {
    let mut response = Response::new(Bytes::new());
    *response.status_mut() = status;
    response
}

/// Whether a body that is declared so long may be shown.
pub const fn is_too_long(how: BodyInCheck, declared: Option<u64>) -> bool {
    matches!(declared, Some(size) if size > how.most as u64 && !how.partial)
}

/// Path and query.
fn target(uri: &Uri) -> &str {
    uri.path_and_query().map_or("/", |target| target.as_str())
}

/// The authority, which a normalised request has in its URI.
fn authority(uri: &Uri) -> &str {
    uri.authority().map_or("", |authority| authority.as_str())
}
