//! Over HTTP (`envoyExtAuthzHttp`): a request with the method, host and path of the one in question. A response with
//! status 200 is a yes, one with 5xx no answer, and any other a no, which goes to the client.
//!
//! Tested by the tables below.

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, Response, StatusCode, header, uri};

use super::{Answer, Change, Changes, PARTIAL_BODY, Question, Subject, authority, is_framing, target};
use crate::{
    route,
    state::snapshot::{HttpCheck, TextMatch},
};

/// Names the headers that the request is to lose (Envoy).
const TO_REMOVE: HeaderName = HeaderName::from_static("x-envoy-auth-headers-to-remove");

/// Of a refusal these go to the client whatever is listed (Envoy), beside what frames it.
const ALWAYS_TOLD: [HeaderName; 2] = [header::WWW_AUTHENTICATE, header::LOCATION];

/// The request to the authorizer.
///
/// # Errors
/// Why it cannot be asked about this.
pub fn check(terms: &HttpCheck, question: &Question<'_>) -> Result<Request<Bytes>, String> {
    let Subject::Request(head, shown) = &question.what else {
        return Err("it is asked over HTTP, and this is no request".to_owned());
    };
    let method = route::method(&head.method, &head.extensions);
    if *method == http::Method::CONNECT {
        return Err("over HTTP nobody can be asked about a CONNECT".to_owned());
    }
    let path = format!("{}{}", terms.path_prefix, target(&head.uri));
    let uri = uri::Builder::new().scheme("http").authority(authority(&head.uri)).path_and_query(path);
    let uri = uri.build().map_err(|error| format!("its request cannot be written: {error}"))?;
    let body = shown.body.clone().unwrap_or_default();
    let mut request = Request::new(body);
    (*request.method_mut(), *request.uri_mut()) = (method.clone(), uri);
    let headers = request.headers_mut();
    for (name, value) in &head.headers {
        let wanted = *name == header::AUTHORIZATION || listed(&terms.request_headers, name);
        if wanted && !is_framing(name) {
            headers.append(name, value.clone());
        }
    }
    if shown.body.is_some() {
        let partial = if shown.partial { "true" } else { "false" };
        headers.insert(PARTIAL_BODY, HeaderValue::from_static(partial));
    }
    for (name, value) in &terms.added_headers {
        headers.insert(name, value.clone());
    }
    let length = request.body().len();
    request.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    Ok(request)
}

/// What its response means.
///
/// # Errors
/// Why it is no answer.
pub fn answer(terms: &HttpCheck, response: Response<Bytes>) -> Result<Answer, String> {
    let (head, body) = response.into_parts();
    if head.status.is_server_error() {
        return Err(format!("it answered {}", head.status));
    }
    if head.status == StatusCode::OK {
        let removed = head.headers.get_all(TO_REMOVE).iter().filter_map(|value| value.to_str().ok());
        let removed =
            removed.flat_map(|names| names.split(',')).map(str::trim).filter(|name| !name.is_empty());
        let removed = removed.filter_map(|name| name.parse().ok()).filter(|name| !is_framing(name));
        let mut request: Vec<Change> = removed.map(Change::Remove).collect();
        request.extend(taken(&head.headers, &terms.upstream_on_allow));
        let response = taken(&head.headers, &terms.downstream_on_allow);
        return Ok(Answer::Allowed(Changes { request, response }));
    }
    let mut refusal = Response::new(body);
    *refusal.status_mut() = head.status;
    let terms = &terms.downstream_on_deny;
    for (name, value) in &head.headers {
        let wanted = terms.is_empty() || ALWAYS_TOLD.contains(name) || listed(terms, name);
        if wanted && !is_framing(name) {
            refusal.headers_mut().append(name, value.clone());
        }
    }
    Ok(Answer::Denied(refusal))
}

/// The headers that are listed, in the place of those that are there.
fn taken(headers: &http::HeaderMap, list: &[TextMatch]) -> Vec<Change> {
    let names = headers.keys().filter(|name| listed(list, name) && !is_framing(name));
    let lines = names.flat_map(|name| {
        let values = headers.get_all(name).iter().enumerate();
        values.map(|(i, value)| {
            let make = if i == 0 { Change::Set } else { Change::Append };
            make(name.clone(), value.clone())
        })
    });
    lines.collect()
}

fn listed(list: &[TextMatch], name: &HeaderName) -> bool {
    list.iter().any(|text| match text {
        TextMatch::Exact(exact) => **exact == *name.as_str(),
        TextMatch::Prefix(prefix) => name.as_str().starts_with(&**prefix),
        TextMatch::Suffix(suffix) => name.as_str().ends_with(&**suffix),
        TextMatch::Present => true,
    })
}

#[cfg(test)]
#[path = "tests/http.rs"]
mod tests;
