//! The messages of `envoy.service.auth.v3` that the mesh writes and reads: the fields it uses, with their numbers.
//!
//! What is not here is skipped when it is read, as protobuf has it. Tested in `grpc.rs`.

use std::collections::HashMap;

use prost::{Enumeration, Message, Oneof};

/// `envoy.service.auth.v3.CheckRequest`
#[derive(Clone, PartialEq, Message)]
pub struct CheckRequest {
    /// What is asked about.
    #[prost(message, optional, tag = "1")]
    pub attributes: Option<AttributeContext>,
}

/// `envoy.service.auth.v3.AttributeContext`
#[derive(Clone, PartialEq, Message)]
pub struct AttributeContext {
    /// Who asks.
    #[prost(message, optional, tag = "1")]
    pub source: Option<Peer>,
    /// The pod that is asked.
    #[prost(message, optional, tag = "2")]
    pub destination: Option<Peer>,
    /// For what; of bytes that are no requests only its time is known.
    #[prost(message, optional, tag = "4")]
    pub request: Option<Request>,
    /// Of a connection whose bytes are TLS.
    #[prost(message, optional, tag = "12")]
    pub tls_session: Option<TlsSession>,
}

/// `AttributeContext.Peer`
#[derive(Clone, PartialEq, Message)]
pub struct Peer {
    /// Where it is.
    #[prost(message, optional, tag = "1")]
    pub address: Option<Address>,
    /// Its canonical service.
    #[prost(string, tag = "2")]
    pub service: String,
    /// Labels of its pod.
    #[prost(map = "string, string", tag = "3")]
    pub labels: HashMap<String, String>,
    /// Its SPIFFE id.
    #[prost(string, tag = "4")]
    pub principal: String,
}

/// `envoy.config.core.v3.Address`
#[derive(Clone, PartialEq, Message)]
pub struct Address {
    /// A socket's.
    #[prost(message, optional, tag = "1")]
    pub socket_address: Option<SocketAddress>,
}

/// `envoy.config.core.v3.SocketAddress`; its protocol is TCP, which is 0.
#[derive(Clone, PartialEq, Message)]
pub struct SocketAddress {
    /// The IP address.
    #[prost(string, tag = "2")]
    pub address: String,
    /// The port.
    #[prost(oneof = "PortSpecifier", tags = "3")]
    pub port: Option<PortSpecifier>,
}

/// `SocketAddress.port_specifier`
#[derive(Clone, PartialEq, Eq, Oneof)]
pub enum PortSpecifier {
    /// By its number.
    #[prost(uint32, tag = "3")]
    PortValue(u32),
}

/// `AttributeContext.Request`
#[derive(Clone, PartialEq, Message)]
pub struct Request {
    /// When it came.
    #[prost(message, optional, tag = "1")]
    pub time: Option<Timestamp>,
    /// What it says.
    #[prost(message, optional, tag = "2")]
    pub http: Option<HttpRequest>,
}

/// `google.protobuf.Timestamp`
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Timestamp {
    /// Seconds since 1970.
    #[prost(int64, tag = "1")]
    pub seconds: i64,
    /// And nanoseconds.
    #[prost(int32, tag = "2")]
    pub nanos: i32,
}

/// `AttributeContext.HttpRequest`
#[derive(Clone, PartialEq, Message)]
pub struct HttpRequest {
    /// `x-request-id`
    #[prost(string, tag = "1")]
    pub id: String,
    /// The method.
    #[prost(string, tag = "2")]
    pub method: String,
    /// Headers by lower-case name, those of HTTP/2 that begin with a colon too; several lines are joined by commas.
    #[prost(map = "string, string", tag = "3")]
    pub headers: HashMap<String, String>,
    /// Path and query.
    #[prost(string, tag = "4")]
    pub path: String,
    /// The authority.
    #[prost(string, tag = "5")]
    pub host: String,
    /// The scheme.
    #[prost(string, tag = "6")]
    pub scheme: String,
    /// Size of the body; -1 where that is not known.
    #[prost(int64, tag = "9")]
    pub size: i64,
    /// `HTTP/1.1` or `HTTP/2`.
    #[prost(string, tag = "10")]
    pub protocol: String,
    /// The body, or its beginning.
    #[prost(string, tag = "11")]
    pub body: String,
    /// The same, as `packAsBytes` asks for it.
    #[prost(bytes = "vec", tag = "12")]
    pub raw_body: Vec<u8>,
}

/// `AttributeContext.TLSSession`
#[derive(Clone, PartialEq, Eq, Message)]
pub struct TlsSession {
    /// The server name in the client's `ClientHello`.
    #[prost(string, tag = "1")]
    pub sni: String,
}

/// `envoy.service.auth.v3.CheckResponse`
#[derive(Clone, PartialEq, Message)]
pub struct CheckResponse {
    /// `google.rpc.Status`: a code of 0 is a yes.
    #[prost(message, optional, tag = "1")]
    pub status: Option<Status>,
    /// What goes with a no or a yes.
    #[prost(oneof = "HttpResponse", tags = "2, 3")]
    pub http_response: Option<HttpResponse>,
}

/// `google.rpc.Status`
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Status {
    /// A gRPC status.
    #[prost(int32, tag = "1")]
    pub code: i32,
    /// What it says.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// `CheckResponse.http_response`
#[derive(Clone, PartialEq, Oneof)]
pub enum HttpResponse {
    /// With a no.
    #[prost(message, tag = "2")]
    Denied(DeniedHttpResponse),
    /// With a yes.
    #[prost(message, tag = "3")]
    Ok(OkHttpResponse),
}

/// `envoy.service.auth.v3.DeniedHttpResponse`
#[derive(Clone, PartialEq, Message)]
pub struct DeniedHttpResponse {
    /// Status of the answer; 403 where it is not there.
    #[prost(message, optional, tag = "1")]
    pub status: Option<HttpStatus>,
    /// Headers of the answer.
    #[prost(message, repeated, tag = "2")]
    pub headers: Vec<HeaderValueOption>,
    /// Its body.
    #[prost(string, tag = "3")]
    pub body: String,
}

/// `envoy.type.v3.HttpStatus`
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct HttpStatus {
    /// The number.
    #[prost(int32, tag = "1")]
    pub code: i32,
}

/// `envoy.service.auth.v3.OkHttpResponse`
#[derive(Clone, PartialEq, Message)]
pub struct OkHttpResponse {
    /// Headers of the request.
    #[prost(message, repeated, tag = "2")]
    pub headers: Vec<HeaderValueOption>,
    /// Headers that the request has no more.
    #[prost(string, repeated, tag = "5")]
    pub headers_to_remove: Vec<String>,
    /// Headers of the response.
    #[prost(message, repeated, tag = "6")]
    pub response_headers_to_add: Vec<HeaderValueOption>,
    /// Parts of the query to be set; read only to be refused.
    #[prost(message, repeated, tag = "7")]
    pub query_parameters_to_set: Vec<Unread>,
    /// Parts of the query to be taken out; read only to be refused.
    #[prost(string, repeated, tag = "8")]
    pub query_parameters_to_remove: Vec<String>,
}

/// A message whose content is of no interest.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Unread {}

/// `envoy.config.core.v3.HeaderValueOption`
#[derive(Clone, PartialEq, Message)]
pub struct HeaderValueOption {
    /// Name and value.
    #[prost(message, optional, tag = "1")]
    pub header: Option<HeaderValue>,
    /// Whether it goes beside a header that is there (`google.protobuf.BoolValue`).
    #[prost(message, optional, tag = "2")]
    pub append: Option<BoolValue>,
    /// The same, in more ways.
    #[prost(enumeration = "AppendAction", tag = "3")]
    pub append_action: i32,
}

/// `HeaderValueOption.HeaderAppendAction`
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Enumeration)]
#[repr(i32)]
pub enum AppendAction {
    /// Where nothing is said; authorizers mean that it takes the place of what is there.
    AppendIfExistsOrAdd = 0,
    /// Only where there is none.
    AddIfAbsent = 1,
    /// In the place of what is there.
    OverwriteIfExistsOrAdd = 2,
    /// Only where there is one.
    OverwriteIfExists = 3,
}

/// `envoy.config.core.v3.HeaderValue`
#[derive(Clone, PartialEq, Eq, Message)]
pub struct HeaderValue {
    /// The name.
    #[prost(string, tag = "1")]
    pub key: String,
    /// The value, if it is a text.
    #[prost(string, tag = "2")]
    pub value: String,
    /// The value, if not.
    #[prost(bytes = "vec", tag = "3")]
    pub raw_value: Vec<u8>,
}

/// `google.protobuf.BoolValue`
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct BoolValue {
    /// The value.
    #[prost(bool, tag = "1")]
    pub value: bool,
}
