//! `corsPolicy`: which origins a browser may read a response for, as Envoy's filter tells it.
//!
//! Promises that an origin which is not allowed never gets a header of the mesh's. Never takes the app's own CORS
//! headers away from such a response: they are the app's to give. Tested by the tables below.

use http::{
    HeaderMap, HeaderValue, Method, StatusCode,
    header::{
        ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
        ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE,
        ACCESS_CONTROL_REQUEST_METHOD, ORIGIN,
    },
    request::Parts,
};

use super::matching::matches;
use crate::state::snapshot::{CorsPolicy, UnmatchedPreflights};

/// The mesh's answer to a preflight; `None` when the request is none, or is the app's to answer.
pub fn preflight(policy: &CorsPolicy, request: &Parts) -> Option<(StatusCode, HeaderMap)> {
    let origin = request.headers.get(ORIGIN).filter(|origin| !origin.is_empty())?;
    let asked = request.headers.get(ACCESS_CONTROL_REQUEST_METHOD).is_some_and(|method| !method.is_empty());
    if request.method != Method::OPTIONS || !asked {
        return None;
    }
    let mut headers = HeaderMap::new();
    if !allowed(policy, origin) {
        return match policy.unmatched_preflights {
            UnmatchedPreflights::Forward => None,
            UnmatchedPreflights::Ignore => Some((StatusCode::OK, headers)),
        };
    }
    allow(policy, origin, &mut headers);
    let given = [
        (ACCESS_CONTROL_ALLOW_METHODS, &policy.allow_methods),
        (ACCESS_CONTROL_ALLOW_HEADERS, &policy.allow_headers),
        (ACCESS_CONTROL_MAX_AGE, &policy.max_age),
    ];
    for (name, value) in given {
        if let Some(value) = value {
            headers.insert(name, value.clone());
        }
    }
    Some((StatusCode::OK, headers))
}

/// Tells the browser in a response that the request's origin may read it.
pub fn apply(policy: &CorsPolicy, origin: &HeaderValue, headers: &mut HeaderMap) {
    if origin.is_empty() || !allowed(policy, origin) {
        return;
    }
    allow(policy, origin, headers);
    if let Some(expose) = &policy.expose_headers {
        headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, expose.clone());
    }
}

fn allow(policy: &CorsPolicy, origin: &HeaderValue, headers: &mut HeaderMap) {
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
    if policy.allow_credentials {
        headers.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
    }
}

/// A match that takes `*` takes any origin.
fn allowed(policy: &CorsPolicy, origin: &HeaderValue) -> bool {
    policy.allow_origins.iter().any(|m| matches(m, b"*") || matches(m, origin.as_bytes()))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use http::Request;
    use regex::Regex;

    use super::*;
    use crate::state::snapshot::StringMatch;

    fn policy() -> CorsPolicy {
        CorsPolicy {
            allow_origins: vec![
                StringMatch::Exact("https://a.example".to_owned()),
                StringMatch::Prefix("https://b.".to_owned()),
                StringMatch::Regex(Regex::new("^(?:https://[cd]\\.example)$").unwrap()),
            ],
            allow_methods: Some(HeaderValue::from_static("GET,POST")),
            allow_headers: Some(HeaderValue::from_static("x-a,x-b")),
            expose_headers: Some(HeaderValue::from_static("x-c")),
            max_age: Some(HeaderValue::from_static("86400")),
            allow_credentials: true,
            unmatched_preflights: UnmatchedPreflights::Forward,
        }
    }

    fn request(method: &str, headers: &[(&str, &str)]) -> Parts {
        let builder = Request::builder().method(method).uri("/");
        let builder = headers.iter().fold(builder, |builder, (name, value)| builder.header(*name, *value));
        builder.body(()).unwrap().into_parts().0
    }

    /// Headers as sorted `name: value` lines.
    fn lines(headers: &HeaderMap) -> Vec<String> {
        let mut lines: Vec<_> =
            headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
        lines.sort();
        lines
    }

    #[test]
    fn preflights_of_allowed_origins_are_answered() {
        let asks = ("access-control-request-method", "POST");
        for origin in ["https://a.example", "https://b.anything", "https://c.example"] {
            let (status, headers) =
                preflight(&policy(), &request("OPTIONS", &[("origin", origin), asks])).unwrap();
            assert_eq!(status, StatusCode::OK);
            let expected = [
                "access-control-allow-credentials: true".to_owned(),
                "access-control-allow-headers: x-a,x-b".to_owned(),
                "access-control-allow-methods: GET,POST".to_owned(),
                format!("access-control-allow-origin: {origin}"),
                "access-control-max-age: 86400".to_owned(),
            ];
            assert_eq!(lines(&headers), expected);
        }
        let few = CorsPolicy {
            allow_methods: None,
            allow_headers: None,
            max_age: None,
            allow_credentials: false,
            ..policy()
        };
        let (_, headers) =
            preflight(&few, &request("OPTIONS", &[("origin", "https://a.example"), asks])).unwrap();
        assert_eq!(lines(&headers), ["access-control-allow-origin: https://a.example"]);
    }

    #[test]
    fn what_is_no_preflight_goes_to_the_app() {
        let origin = ("origin", "https://a.example");
        let asks = ("access-control-request-method", "POST");
        let table: [(&str, &[(&str, &str)]); 5] = [
            ("GET", &[origin, asks]),
            ("OPTIONS", &[origin]),
            ("OPTIONS", &[origin, ("access-control-request-method", "")]),
            ("OPTIONS", &[asks]),
            ("OPTIONS", &[("origin", ""), asks]),
        ];
        let ignore = CorsPolicy { unmatched_preflights: UnmatchedPreflights::Ignore, ..policy() };
        for (method, headers) in table {
            assert!(preflight(&ignore, &request(method, headers)).is_none(), "{method} {headers:?}");
        }
    }

    #[test]
    fn preflights_of_other_origins_are_forwarded_or_ignored() {
        let other = request(
            "OPTIONS",
            &[("origin", "https://a.example.evil"), ("access-control-request-method", "GET")],
        );
        assert!(preflight(&policy(), &other).is_none());
        let ignore = CorsPolicy { unmatched_preflights: UnmatchedPreflights::Ignore, ..policy() };
        let (status, headers) = preflight(&ignore, &other).unwrap();
        assert!(status == StatusCode::OK && headers.is_empty());
    }

    #[test]
    fn responses_say_who_may_read_them() {
        let mut headers = HeaderMap::new();
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("https://apps.own"));
        let mut other = headers.clone();
        apply(&policy(), &HeaderValue::from_static("https://a.example"), &mut headers);
        let expected = [
            "access-control-allow-credentials: true",
            "access-control-allow-origin: https://a.example",
            "access-control-expose-headers: x-c",
        ];
        assert_eq!(lines(&headers), expected);
        apply(&policy(), &HeaderValue::from_static("https://e.example"), &mut other);
        assert_eq!(lines(&other), ["access-control-allow-origin: https://apps.own"]);
    }

    #[test]
    fn a_star_allows_every_origin_by_its_name() {
        let star = CorsPolicy {
            allow_origins: vec![StringMatch::Exact("*".to_owned())],
            allow_credentials: false,
            expose_headers: None,
            ..policy()
        };
        let mut headers = HeaderMap::new();
        apply(&star, &HeaderValue::from_static("null"), &mut headers);
        assert_eq!(lines(&headers), ["access-control-allow-origin: null"]);
    }
}
