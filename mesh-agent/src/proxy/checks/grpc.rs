//! gRPC's health protocol (`grpc.health.v1`): one call of `Check`. Tested below.

use bytes::{Buf as _, BufMut as _, BytesMut};
use http::{HeaderValue, Method, Request, StatusCode, header};
use prost::Message;

use super::Answer;
use crate::{balance::checks::Found, body::Body, upstream::retry};

/// The path of the call.
pub(super) const METHOD: &str = "/grpc.health.v1.Health/Check";

/// `HealthCheckResponse.SERVING`
const SERVING: i32 = 1;

/// Bytes before a message: whether it is compressed, and its length.
const PREFIX: usize = 5;

/// `HealthCheckRequest`
#[derive(Clone, PartialEq, Message)]
struct HealthCheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

/// `HealthCheckResponse`
#[derive(Clone, PartialEq, Message)]
struct HealthCheckResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// The call that asks about a service of the server.
pub(super) fn check(service: &str) -> Request<Body> {
    let message = HealthCheckRequest { service: service.to_owned() }.encode_to_vec();
    let mut framed = BytesMut::with_capacity(PREFIX + message.len());
    framed.put_u8(0);
    framed.put_u32(message.len() as u32);
    framed.put_slice(&message);
    let mut request = Request::new(Body::from(framed.freeze()));
    *request.method_mut() = Method::POST;
    let headers = request.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(header::TE, HeaderValue::from_static("trailers"));
    request
}

/// What the answer says.
pub(super) fn answer(status: StatusCode, answer: &Answer) -> Found {
    let code = retry::grpc_status(&answer.headers);
    if status != StatusCode::OK || code != Some(0) {
        let code = code.map_or_else(|| "none".to_owned(), |code| code.to_string());
        return Found::Unwell(format!("status {}, grpc-status {code}", status.as_u16()));
    }
    let mut body = answer.body.clone();
    if body.len() < PREFIX || body.get_u8() != 0 || body.get_u32() as usize != body.len() {
        return Found::Unwell("no message of grpc.health.v1".to_owned());
    }
    match HealthCheckResponse::decode(body) {
        Ok(HealthCheckResponse { status: SERVING }) => Found::Well,
        Ok(HealthCheckResponse { status }) => Found::Unwell(format!("serving status {status}")),
        Err(error) => Found::Unwell(format!("no message of grpc.health.v1: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http::HeaderMap;

    use super::*;

    fn found(code: &'static str, body: &'static [u8]) -> Found {
        let mut headers = HeaderMap::new();
        headers.insert("grpc-status", HeaderValue::from_static(code));
        answer(StatusCode::OK, &Answer { refused: false, headers, body: Bytes::from_static(body) })
    }

    #[test]
    fn only_serving_is_well() {
        assert_eq!(found("0", b"\0\0\0\0\x02\x08\x01"), Found::Well);
        let table: [(&str, &[u8]); 7] = [
            // NOT_SERVING, UNKNOWN
            ("0", b"\0\0\0\0\x02\x08\x02"),
            ("0", b"\0\0\0\0\0"),
            // NOT_FOUND
            ("5", b""),
            ("0", b""),
            ("0", b"\0\0\0\0\x03\x08\x01"),
            ("0", b"\x01\0\0\0\x02\x08\x01"),
            ("0", b"\0\0\0\0\x02\x0a\x09"),
        ];
        for (code, body) in table {
            assert!(matches!(found(code, body), Found::Unwell(_)), "{code} {body:?}");
        }
    }
}
