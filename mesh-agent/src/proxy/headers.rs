//! The headers that apps and dashboards know from Istio, added on the way.
//!
//! `x-request-id` and `x-forwarded-proto` where the request has none, `x-envoy-attempt-count` with each try,
//! `x-envoy-expected-rq-timeout-ms` with those that have a limit (and `grpc-timeout`, lowered to it),
//! `x-envoy-upstream-service-time` on the response. `x-forwarded-for` is
//! left as it is: the app sees the real client, and only gateways add to it. Tested below.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::time::Instant;

/// Number of the try, from 1 on.
pub(super) const ATTEMPT_COUNT: HeaderName = HeaderName::from_static("x-envoy-attempt-count");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const SERVICE_TIME: HeaderName = HeaderName::from_static("x-envoy-upstream-service-time");
const EXPECTED_TIMEOUT: HeaderName = HeaderName::from_static("x-envoy-expected-rq-timeout-ms");
const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// What eight digits can say.
const MOST_GRPC_TIMEOUT: u64 = 99_999_999;

/// Makes sure that a request has an id, which is returned, and says how it came.
pub(super) fn identify(headers: &mut HeaderMap) -> HeaderValue {
    headers.entry(FORWARDED_PROTO).or_insert(HeaderValue::from_static("http"));
    headers.entry(REQUEST_ID).or_insert_with(new_id).clone()
}

/// The id that a request has.
pub(super) fn request_id(headers: &HeaderMap) -> Option<HeaderValue> {
    headers.get(REQUEST_ID).cloned()
}

/// A random UUID (RFC 9562, version 4).
fn new_id() -> HeaderValue {
    let random = fastrand::u128(..);
    let version = (random & !(0xf << 76) & !(0x3 << 62)) | (0x4 << 76) | (0x2 << 62);
    let mut text = [b'-'; 36];
    let digits = text.iter_mut().enumerate().filter(|(at, _)| !matches!(at, 8 | 13 | 18 | 23));
    for ((_, digit), nibble) in digits.zip((0..32).rev()) {
        *digit = b"0123456789abcdef"[(version >> (4 * nibble)) as usize & 0xf];
    }
    // Hexadecimal digits and dashes are what a header value may have.
    let mut id = HeaderValue::from_bytes(&text).unwrap_or(HeaderValue::from_static(""));
    // No two are the same: to remember it for the next request of a connection is work in vain (RFC 7541 section 6.2.3).
    id.set_sensitive(true);
    id
}

/// A number as the value of a header; those that nearly all requests have cost nothing.
pub(super) fn number(number: u64) -> HeaderValue {
    static DIGITS: [HeaderValue; 10] = {
        let of = HeaderValue::from_static;
        [of("0"), of("1"), of("2"), of("3"), of("4"), of("5"), of("6"), of("7"), of("8"), of("9")]
    };
    DIGITS.get(number as usize).cloned().unwrap_or_else(|| HeaderValue::from(number))
}

/// How long the endpoint took, in milliseconds.
pub(super) fn served_in(headers: &mut HeaderMap, took: Duration) {
    headers.insert(SERVICE_TIME, number(took.as_millis() as u64));
}

/// Tells the endpoint by when it is expected to answer, as Envoy does: a gRPC server may give up then too.
/// `grpc`: by gRPC's own header too.
pub(super) fn expected(headers: &mut HeaderMap, by: Instant, grpc: bool) {
    let left = by.saturating_duration_since(Instant::now()).as_millis() as u64;
    headers.insert(EXPECTED_TIMEOUT, HeaderValue::from(left));
    if grpc && left <= MOST_GRPC_TIMEOUT {
        // Digits and a letter are what a header value may have.
        if let Ok(value) = HeaderValue::try_from(format!("{left}m")) {
            headers.insert(GRPC_TIMEOUT, value);
        }
    }
}

/// Longest realm that is told, bytes (Envoy).
const LONGEST_REALM: usize = 256;

/// `www-authenticate` for who has shown a token that is not believed (RFC 6750 section 3), as Envoy writes it: the realm is
/// what was asked for, here without the query, in which the token may have been.
pub(super) fn challenge(authority: &str, target: &str) -> String {
    let path = target.split('?').next().unwrap_or_default();
    let realm = ["http://", authority, path].concat();
    let plain = |c: &char| c.is_ascii_graphic() && !['"', '\\'].contains(c);
    let realm: String = realm.chars().filter(plain).take(LONGEST_REALM).collect();
    format!("Bearer realm=\"{realm}\", error=\"invalid_token\"")
}

/// `grpc-timeout`: up to eight digits and a unit.
pub(super) fn grpc_timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(GRPC_TIMEOUT)?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn ids_are_made_once_and_kept() {
        let mut headers = HeaderMap::new();
        let id = identify(&mut headers);
        let text = id.to_str().unwrap();
        let lengths: Vec<_> = text.split('-').map(str::len).collect();
        assert_eq!(lengths, [8, 4, 4, 4, 12], "{text}");
        assert!(text[14..].starts_with('4') && "89ab".contains(&text[19..20]), "{text}");
        assert_eq!(identify(&mut headers), id);
        assert_ne!(new_id(), id);
        assert_eq!(headers[FORWARDED_PROTO], "http");
    }

    #[test]
    fn the_realm_is_what_was_asked_for_and_no_token() {
        let told = |authority, target| challenge(authority, target);
        let plain = told("app:80", "/a/b?access_token=secret");
        assert_eq!(plain, "Bearer realm=\"http://app:80/a/b\", error=\"invalid_token\"");
        let odd = told("app", "/\"x\\y\u{e9}");
        assert_eq!(odd, "Bearer realm=\"http://app/xy\", error=\"invalid_token\"");
        let long = told("app", &"/".repeat(1000));
        assert!(HeaderValue::from_str(&long).is_ok() && long.len() < 300, "{long}");
    }

    #[test]
    fn deadlines_of_grpc() {
        let table = [
            ("1H", Some(3_600_000)),
            ("2M", Some(120_000)),
            ("3S", Some(3_000)),
            ("99999999m", Some(99_999_999)),
            ("4000u", Some(4)),
            ("5000000n", Some(5)),
            ("123456789m", None),
            ("S", None),
            ("", None),
            ("-1S", None),
            ("1s", None),
            ("1 S", None),
        ];
        for (text, millis) in table {
            let headers = HeaderMap::from_iter([(GRPC_TIMEOUT, HeaderValue::from_static(text))]);
            assert_eq!(grpc_timeout(&headers), millis.map(Duration::from_millis), "{text}");
        }
    }
}
