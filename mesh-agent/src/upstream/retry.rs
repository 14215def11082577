//! Whether another try may help: `retries.retryOn` against what the last try came to.
//!
//! Pure. The conditions are Envoy's (`x-envoy-retry-on`, `x-envoy-retry-grpc-on`). Tested by the table below.

use std::time::Duration;

use http::{HeaderMap, StatusCode};

use crate::{
    error::{Error, Kind},
    state::snapshot::{RetryOn, RetryPolicy},
};

/// Backoff never grows beyond this many times its base (Envoy: ten times).
const LARGEST_BACKOFF: u32 = 10;

/// Whether the conditions cover a failed try.
pub fn covers_error(on: &RetryOn, error: &Error) -> bool {
    match error.kind {
        Kind::ConnectFailure | Kind::TlsFailure => on.connect_failure || on.server_error || on.gateway_error,
        Kind::RefusedStream => on.refused_stream || on.server_error,
        Kind::UpstreamReset => on.reset || on.server_error,
        // A try that ran into perTryTimeout is a 504 made by the mesh.
        Kind::Timeout => on.server_error || on.gateway_error || on.reset || on.status_codes.contains(&504),
        _ => false,
    }
}

/// Whether the conditions cover a response.
pub fn covers_response(on: &RetryOn, status: StatusCode, headers: &HeaderMap) -> bool {
    let code = status.as_u16();
    (on.server_error && status.is_server_error())
        || (on.gateway_error && matches!(code, 502..=504))
        || (on.retriable_4xx && code == 409)
        || on.status_codes.contains(&code)
        || grpc_status(headers).is_some_and(|grpc| on.grpc.contains(&grpc))
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
        StatusCode::from_u16(code).is_ok_and(|status| covers_response(on, status, &HeaderMap::new()))
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
        let connect = RetryOn { connect_failure: true, ..RetryOn::default() };
        assert!(covers_error(&connect, &Error::new(Kind::ConnectFailure, "")));
        assert!(!covers_error(&connect, &Error::new(Kind::UpstreamReset, "")));
    }

    #[test]
    fn grpc_statuses_are_covered_by_number() {
        let unavailable = RetryOn { grpc: vec![14], ..RetryOn::default() };
        let headers = HeaderMap::from_iter([(
            http::HeaderName::from_static("grpc-status"),
            http::HeaderValue::from_static("14"),
        )]);
        assert!(covers_response(&unavailable, StatusCode::OK, &headers));
        assert!(!covers_response(&unavailable, StatusCode::OK, &HeaderMap::new()));
    }

    #[test]
    fn backoff_stays_within_ten_times_its_base() {
        let policy = RetryPolicy {
            attempts: 40,
            per_try_timeout: None,
            on: RetryOn::default(),
            backoff: Duration::from_millis(25),
        };
        for next in 2..40 {
            assert!(backoff(&policy, next) <= Duration::from_millis(250));
        }
        assert!(backoff(&policy, 2) <= Duration::from_millis(25));
    }
}
