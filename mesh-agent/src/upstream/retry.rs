//! Whether another try may help: `retries.retryOn` against what the last try came to.
//!
//! Pure. The conditions are Envoy's (`x-envoy-retry-on`, `x-envoy-retry-grpc-on`). Tested by the table below.

use std::time::Duration;

use http::{HeaderMap, Response};

use crate::{
    error::{Error, Kind},
    state::snapshot::{RetryOn, RetryPolicy},
};

/// Backoff never grows beyond this many times its base (Envoy: ten times).
const LARGEST_BACKOFF: u32 = 10;

/// Whether the conditions cover a failed try. `5xx`, `gateway-error` and `reset` cover every way not to get a response;
/// the others one of them.
pub fn covers_error(on: &RetryOn, error: &Error) -> bool {
    let any = on.server_error || on.gateway_error || on.reset;
    let named = match error.kind {
        Kind::ConnectFailure | Kind::TlsFailure => on.connect_failure,
        // The agent of the endpoint's node has not looked at it; another node may have room.
        Kind::RefusedStream | Kind::Overload | Kind::ConcurrencyLimit => on.refused_stream,
        Kind::UpstreamReset => false,
        // A try that ran into perTryTimeout is a 504 made by the mesh.
        Kind::Timeout => on.status_codes.contains(&504),
        _ => return false,
    };
    any || named || (on.reset_before_request && is_unsent(error.kind))
}

/// Whether a try failed before anything of the request was handed to an app.
pub const fn is_unsent(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::ConnectFailure
            | Kind::TlsFailure
            | Kind::RefusedStream
            | Kind::Overload
            | Kind::ConcurrencyLimit
    )
}

/// Whether the conditions cover a response to a request with these headers.
pub fn covers_response<B>(on: &RetryOn, response: &Response<B>, request: &HeaderMap) -> bool {
    let (status, headers) = (response.status(), response.headers());
    let code = status.as_u16();
    // Who says that it is asked too much is asked again only where the route says so, whatever else holds.
    if headers.contains_key("x-envoy-ratelimited") {
        return on.envoy_ratelimited;
    }
    (on.server_error && status.is_server_error())
        || (on.gateway_error && matches!(code, 502..=504))
        || (on.retriable_4xx && code == 409)
        || on.status_codes.contains(&code)
        || (on.retriable_headers && has_one_of(headers, request))
        || grpc_status(headers).is_some_and(|grpc| on.grpc.contains(&grpc))
}

/// Whether a response has a header that the request names as one to try again for.
fn has_one_of(response: &HeaderMap, request: &HeaderMap) -> bool {
    let named =
        request.get_all("x-envoy-retriable-header-names").iter().filter_map(|value| value.to_str().ok());
    named.flat_map(|names| names.split(',')).any(|name| response.contains_key(name.trim()))
}

/// `grpc-status` where it already stands in the headers (a response of trailers alone).
pub fn grpc_status(headers: &HeaderMap) -> Option<u32> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}

/// How long to wait before try number `next` (the second try is 2): exponential from the base, with full jitter.
pub fn backoff(policy: &RetryPolicy, next: u32) -> Duration {
    let factor = 1u32.checked_shl(next.saturating_sub(1)).unwrap_or(LARGEST_BACKOFF) - 1;
    policy.backoff.saturating_mul(factor.clamp(1, LARGEST_BACKOFF)).mul_f64(fastrand::f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(on: &RetryOn, code: u16) -> bool {
        let response = Response::builder().status(code).body(());
        response.is_ok_and(|response| covers_response(on, &response, &HeaderMap::new()))
    }

    fn with_header(on: &RetryOn, name: &str, request: &HeaderMap) -> bool {
        let response = Response::builder().header(name, "14").body(());
        response.is_ok_and(|response| covers_response(on, &response, request))
    }

    #[test]
    fn conditions_cover_what_envoy_documents() {
        let five = RetryOn { server_error: true, ..RetryOn::default() };
        let gateway = RetryOn { gateway_error: true, ..RetryOn::default() };
        let numbers = RetryOn { status_codes: vec![418], ..RetryOn::default() };
        assert!(status(&five, 500) && status(&five, 503) && !status(&five, 404));
        assert!(!status(&gateway, 500) && status(&gateway, 502) && status(&gateway, 504));
        assert!(status(&numbers, 418) && !status(&numbers, 503));
        assert!(covers_error(&five, &Error::new(Kind::UpstreamReset, "")));
        assert!(!covers_error(&five, &Error::new(Kind::IdentityMismatch, "")));
    }

    #[test]
    fn each_condition_covers_its_failures_and_no_others() {
        use Kind::{ConnectFailure, Denied, Overload, RefusedStream, Timeout, TlsFailure, UpstreamReset};
        let none = RetryOn::default;
        let all = [ConnectFailure, TlsFailure, RefusedStream, Overload, UpstreamReset, Timeout, Denied];
        let any: &[Kind] = &[ConnectFailure, TlsFailure, RefusedStream, Overload, UpstreamReset, Timeout];
        let unsent: &[Kind] = &[ConnectFailure, TlsFailure, RefusedStream, Overload];
        let table = [
            ("5xx", RetryOn { server_error: true, ..none() }, any),
            ("gateway-error", RetryOn { gateway_error: true, ..none() }, any),
            ("reset", RetryOn { reset: true, ..none() }, any),
            ("reset-before-request", RetryOn { reset_before_request: true, ..none() }, unsent),
            ("connect-failure", RetryOn { connect_failure: true, ..none() }, &[ConnectFailure, TlsFailure]),
            ("refused-stream", RetryOn { refused_stream: true, ..none() }, &[RefusedStream, Overload]),
            ("504", RetryOn { status_codes: vec![504], ..none() }, &[Timeout]),
            ("retriable-4xx", RetryOn { retriable_4xx: true, ..none() }, &[]),
        ];
        for (name, on, covered) in table {
            for kind in all {
                let covers = covers_error(&on, &Error::new(kind, ""));
                assert_eq!(covers, covered.contains(&kind), "{name} and {kind:?}");
            }
        }
        let retriable = RetryOn { retriable_4xx: true, ..none() };
        assert!(status(&retriable, 409) && !status(&retriable, 404));
    }

    #[test]
    fn who_is_asked_too_much_is_left_alone() {
        let limited = |on: &RetryOn| {
            let response = Response::builder().status(503).header("x-envoy-ratelimited", "true").body(());
            response.is_ok_and(|response| covers_response(on, &response, &HeaderMap::new()))
        };
        assert!(!limited(&RetryOn { server_error: true, status_codes: vec![503], ..RetryOn::default() }));
        assert!(limited(&RetryOn { envoy_ratelimited: true, ..RetryOn::default() }));
    }

    #[test]
    fn grpc_statuses_are_covered_by_number() {
        let unavailable = RetryOn { grpc: vec![14], ..RetryOn::default() };
        assert!(with_header(&unavailable, "grpc-status", &HeaderMap::new()));
        assert!(!status(&unavailable, 200));
    }

    #[test]
    fn headers_of_the_response_are_covered_where_they_are_named() {
        let limited = RetryOn { envoy_ratelimited: true, ..RetryOn::default() };
        assert!(with_header(&limited, "x-envoy-ratelimited", &HeaderMap::new()));
        assert!(!with_header(&RetryOn::default(), "x-envoy-ratelimited", &HeaderMap::new()));
        let named = RetryOn { retriable_headers: true, ..RetryOn::default() };
        let names = http::HeaderValue::from_static("x-one, X-Two");
        let request =
            HeaderMap::from_iter([(http::HeaderName::from_static("x-envoy-retriable-header-names"), names)]);
        assert!(with_header(&named, "x-two", &request) && !with_header(&named, "x-three", &request));
        assert!(!with_header(&named, "x-two", &HeaderMap::new()));
    }

    #[test]
    fn backoff_stays_within_ten_times_its_base() {
        let policy = RetryPolicy {
            attempts: 40,
            per_try_timeout: None,
            on: RetryOn::default(),
            backoff: Duration::from_millis(25),
            remote_localities: false,
            ignore_previous_hosts: true,
        };
        for next in 2..40 {
            assert!(backoff(&policy, next) <= Duration::from_millis(250));
        }
        assert!(backoff(&policy, 2) <= Duration::from_millis(25));
    }
}
