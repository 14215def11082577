//! Over gRPC (`envoyExtAuthzGrpc`): one call of `envoy.service.auth.v3.Authorization/Check`.
//!
//! The call is unary: one message each way, framed by five bytes ("Length-Prefixed-Message" of gRPC over HTTP/2), never
//! compressed, for none is asked for. Tested by the tables below.

use std::{
    collections::HashMap,
    net::SocketAddr,
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::{BufMut, Bytes, BytesMut};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version, header, request, uri,
};
use prost::Message as _;

use super::{
    Answer, Change, Changes, PARTIAL_BODY, Question, Shown, Subject, authority, is_framing,
    messages::{
        Address, AppendAction, AttributeContext, CheckRequest, CheckResponse, DeniedHttpResponse,
        HeaderValueOption, HttpRequest, HttpResponse, OkHttpResponse, Peer, PortSpecifier, Request as Asked,
        SocketAddress, Timestamp, TlsSession,
    },
    target,
};
use crate::{
    identity::SpiffeId,
    route,
    state::snapshot::{Provider, Workload},
};

const METHOD: &str = "/envoy.service.auth.v3.Authorization/Check";

/// Bytes before a message: whether it is compressed, and its length.
const PREFIX: usize = 5;

/// The call to the authorizer.
///
/// # Errors
/// Why it cannot be asked about this.
pub fn check(provider: &Provider, question: &Question<'_>) -> Result<Request<Bytes>, String> {
    let raw = provider.body.is_some_and(|body| body.raw);
    let body = framed(&CheckRequest { attributes: Some(attributes(question, raw)) })?;
    let uri = uri::Builder::new()
        .scheme("http")
        .authority(format!("{}:{}", provider.host, provider.port))
        .path_and_query(METHOD)
        .build()
        .map_err(|error| format!("its request cannot be written: {error}"))?;
    let mut request = Request::new(body);
    (*request.method_mut(), *request.uri_mut(), *request.version_mut()) =
        (Method::POST, uri, Version::HTTP_2);
    let headers = request.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(header::TE, HeaderValue::from_static("trailers"));
    // A header value of digits and a letter.
    if let Ok(timeout) = HeaderValue::try_from(format!("{}m", provider.timeout.as_millis().min(99_999_999))) {
        headers.insert("grpc-timeout", timeout);
    }
    Ok(request)
}

fn framed(message: &CheckRequest) -> Result<Bytes, String> {
    let length = message.encoded_len();
    let prefix = u32::try_from(length).map_err(|_| "the message is too long".to_owned())?;
    let mut out = BytesMut::with_capacity(PREFIX + length);
    out.put_u8(0);
    out.put_u32(prefix);
    message.encode(&mut out).map_err(|error| format!("the message cannot be written: {error}"))?;
    Ok(out.freeze())
}

fn attributes(question: &Question<'_>, raw: bool) -> AttributeContext {
    let asked = question.asked;
    let own = Some(&asked.workload.identity);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let time = Timestamp { seconds: now.as_secs().cast_signed(), nanos: now.subsec_nanos().cast_signed() };
    let (http, tls_session) = match &question.what {
        Subject::Request(head, shown) => (Some(http_request(head, shown, raw)), None),
        Subject::Connection(name) => (None, name.map(|name| TlsSession { sni: name.to_owned() })),
    };
    AttributeContext {
        source: Some(peer(asked.client, question.source, asked.source)),
        destination: Some(peer(asked.destination, Some(asked.workload), own)),
        request: Some(Asked { time: Some(time), http }),
        tls_session,
    }
}

fn peer(at: SocketAddr, workload: Option<&Workload>, identity: Option<&SpiffeId>) -> Peer {
    let socket_address = SocketAddress {
        address: at.ip().to_canonical().to_string(),
        port: Some(PortSpecifier::PortValue(at.port().into())),
    };
    let labels = workload.map(|pod| pod.labels.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect());
    Peer {
        address: Some(Address { socket_address: Some(socket_address) }),
        service: workload.map(|pod| pod.canonical_service.to_string()).unwrap_or_default(),
        labels: labels.unwrap_or_default(),
        principal: identity.map(ToString::to_string).unwrap_or_default(),
    }
}

fn http_request(head: &request::Parts, shown: &Shown, raw: bool) -> HttpRequest {
    let method = route::method(&head.method, &head.extensions).to_string();
    let (host, path) = (authority(&head.uri).to_owned(), target(&head.uri).to_owned());
    let mut headers = HashMap::<String, String>::with_capacity(head.headers.len() + 4);
    for name in head.headers.keys() {
        let lines = head.headers.get_all(name).iter().map(|value| String::from_utf8_lossy(value.as_bytes()));
        headers.insert(name.to_string(), lines.collect::<Vec<_>>().join(","));
    }
    for (name, value) in
        [(":method", &*method), (":path", &*path), (":authority", &*host), (":scheme", "http")]
    {
        headers.insert(name.to_owned(), value.to_owned());
    }
    if shown.body.is_some() {
        headers.insert(PARTIAL_BODY.to_string(), shown.partial.to_string());
    }
    let bytes = shown.body.as_deref().unwrap_or_default();
    HttpRequest {
        id: headers.get("x-request-id").cloned().unwrap_or_default(),
        method,
        headers,
        path,
        host,
        scheme: "http".to_owned(),
        size: shown.size.and_then(|size| i64::try_from(size).ok()).unwrap_or(-1),
        protocol: if head.version == Version::HTTP_2 { "HTTP/2" } else { "HTTP/1.1" }.to_owned(),
        body: if raw { String::new() } else { String::from_utf8_lossy(bytes).into_owned() },
        raw_body: if raw { bytes.to_vec() } else { Vec::new() },
    }
}

/// What its response means.
///
/// # Errors
/// Why it is no answer.
pub fn answer(response: &Response<Bytes>, trailers: Option<&HeaderMap>) -> Result<Answer, String> {
    if response.status() != StatusCode::OK {
        return Err(format!("it answered {}, which no call of gRPC does", response.status()));
    }
    let of_call = |headers: &HeaderMap| headers.get("grpc-status").cloned();
    let status = trailers.and_then(of_call).or_else(|| of_call(response.headers()));
    match status.as_ref().map(HeaderValue::as_bytes) {
        Some(b"0") => {}
        Some(other) => return Err(format!("the call failed with gRPC status {}", other.escape_ascii())),
        None => return Err("the call broke off before its gRPC status".to_owned()),
    }
    let message = unframed(response.body())?;
    let read =
        CheckResponse::decode(message).map_err(|error| format!("its answer cannot be read: {error}"))?;
    let code = read.status.as_ref().map_or(0, |status| status.code);
    match (code, read.http_response) {
        (0, None) => Ok(Answer::Allowed(Changes::default())),
        (0, Some(HttpResponse::Ok(ok))) => allowed(ok).map(Answer::Allowed),
        (0, Some(HttpResponse::Denied(_))) => Err("its answer is a yes with a refusal in it".to_owned()),
        (_, Some(HttpResponse::Denied(denied))) => refusal(denied).map(Answer::Denied),
        (_, None | Some(HttpResponse::Ok(_))) => refusal(DeniedHttpResponse::default()).map(Answer::Denied),
    }
}

/// The one message of a response.
fn unframed(body: &[u8]) -> Result<&[u8], String> {
    let (prefix, message) = body.split_first_chunk::<PREFIX>().ok_or("its answer has no message")?;
    let [compressed, length @ ..] = *prefix;
    if compressed != 0 {
        return Err("its answer is compressed, which nobody asked for".to_owned());
    }
    if u32::from_be_bytes(length) as usize != message.len() {
        return Err("its answer is not one whole message".to_owned());
    }
    Ok(message)
}

fn allowed(ok: OkHttpResponse) -> Result<Changes, String> {
    if !ok.query_parameters_to_set.is_empty() || !ok.query_parameters_to_remove.is_empty() {
        return Err("its answer changes the query, which is not supported".to_owned());
    }
    let mut changes = Changes::default();
    for written in ok.headers {
        changes.request.extend(change(written, Change::AppendToExisting)?);
    }
    for name in ok.headers_to_remove {
        let name = header_name(&name)?;
        changes.request.extend(Some(Change::Remove(name)).filter(is_allowed));
    }
    for written in ok.response_headers_to_add {
        changes.response.extend(change(written, Change::Append)?);
    }
    Ok(changes)
}

/// What is written of one header; `None` where that is not the authorizer's to say.
fn change(
    written: HeaderValueOption,
    append: fn(HeaderName, HeaderValue) -> Change,
) -> Result<Option<Change>, String> {
    let Some(header) = written.header else { return Ok(None) };
    let name = header_name(&header.key)?;
    let value = if header.raw_value.is_empty() { header.value.into_bytes() } else { header.raw_value };
    let value = HeaderValue::try_from(value)
        .map_err(|_| format!("its answer has a value of {name} that no header can have"))?;
    let make = match (written.append, AppendAction::try_from(written.append_action)) {
        (Some(appended), _) if appended.value => append,
        (None, Ok(AppendAction::AddIfAbsent)) => Change::AddIfAbsent,
        (None, Ok(AppendAction::OverwriteIfExists)) => Change::OverwriteExisting,
        // An authorizer that says nothing means that its header holds.
        _ => Change::Set,
    };
    Ok(Some(make(name, value)).filter(is_allowed))
}

fn is_allowed(change: &Change) -> bool {
    let (Change::Set(name, _)
    | Change::Append(name, _)
    | Change::AppendToExisting(name, _)
    | Change::AddIfAbsent(name, _)
    | Change::OverwriteExisting(name, _)
    | Change::Remove(name)) = change;
    !is_framing(name)
}

fn header_name(name: &str) -> Result<HeaderName, String> {
    name.parse().map_err(|_| format!("its answer changes {name:?}, which is no header of its to change"))
}

fn refusal(denied: DeniedHttpResponse) -> Result<Response<Bytes>, String> {
    let code = denied.status.map_or(0, |status| status.code);
    let status = match code {
        0 => StatusCode::FORBIDDEN,
        code => u16::try_from(code)
            .ok()
            .and_then(|code| StatusCode::from_u16(code).ok())
            .filter(|status| !status.is_informational())
            .ok_or_else(|| format!("its answer has the status {code}, which HTTP has not"))?,
    };
    let mut response = Response::new(Bytes::from(denied.body));
    *response.status_mut() = status;
    for written in denied.headers {
        if let Some(change) = change(written, Change::Append)? {
            change.apply(response.headers_mut());
        }
    }
    Ok(response)
}

#[cfg(test)]
#[path = "tests/grpc.rs"]
mod tests;
