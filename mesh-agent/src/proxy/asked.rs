//! What a request asks for itself, by the headers that Envoy's router reads: how long it may take, and when it is tried
//! again.
//!
//! They hold after the route's header operations, so that a `VirtualService` can set them too, and go no further: the app
//! does not see them. What says nothing sensible is passed over, as in Envoy. Retries stay within the cluster's budget,
//! whatever is asked. Tested below, and in the lab (`tests/tests/http/asked.rs`).

use std::{borrow::Cow, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::state::snapshot::RetryPolicy;

const TIMEOUT: HeaderName = HeaderName::from_static("x-envoy-upstream-rq-timeout-ms");
const PER_TRY_TIMEOUT: HeaderName = HeaderName::from_static("x-envoy-upstream-rq-per-try-timeout-ms");
const MAX_RETRIES: HeaderName = HeaderName::from_static("x-envoy-max-retries");
const RETRY_ON: HeaderName = HeaderName::from_static("x-envoy-retry-on");
const RETRY_GRPC_ON: HeaderName = HeaderName::from_static("x-envoy-retry-grpc-on");
const STATUS_CODES: HeaderName = HeaderName::from_static("x-envoy-retriable-status-codes");

/// What they all begin with.
const FAMILY: &str = "x-envoy-";

/// More retries than this are not to be had by asking: the budget they come from is that of all who call the service.
const MOST_RETRIES: u32 = 10;

/// What holds for one request: what it asks for, else what its route says.
pub(super) struct Terms<'a> {
    /// For the whole request; `None` is unlimited.
    pub timeout: Option<Duration>,
    pub retries: Cow<'a, RetryPolicy>,
}

/// Reads the headers and takes them away. `timeout` and `retries`: the route's.
pub(super) fn terms<'a>(
    headers: &mut HeaderMap,
    timeout: Option<Duration>,
    retries: &'a RetryPolicy,
) -> Terms<'a> {
    let mut terms = Terms { timeout, retries: Cow::Borrowed(retries) };
    // Most requests have none: one look at the names tells.
    if !headers.keys().any(|name| name.as_str().starts_with(FAMILY)) {
        return terms;
    }
    if let Some(millis) = number(headers.remove(TIMEOUT)) {
        terms.timeout = (millis > 0).then(|| Duration::from_millis(millis));
    }
    if let Some(millis) = number(headers.remove(PER_TRY_TIMEOUT)) {
        terms.retries.to_mut().per_try_timeout = (millis > 0).then(|| Duration::from_millis(millis));
    }
    let mut asked = false;
    for name in [RETRY_ON, RETRY_GRPC_ON, STATUS_CODES] {
        let Some(value) = headers.remove(&name) else { continue };
        let words = value.to_str().unwrap_or_default().split(',').map(str::trim);
        for word in words.filter(|word| !word.is_empty()) {
            asked |= terms.retries.to_mut().on.add(word);
        }
    }
    let most = number(headers.remove(MAX_RETRIES)).map(|most| u32::try_from(most).unwrap_or(u32::MAX));
    // Who asks for retries without saying how many gets one.
    match most {
        Some(most) => terms.retries.to_mut().attempts = most.min(MOST_RETRIES.max(retries.attempts)),
        None if asked && terms.retries.attempts == 0 => terms.retries.to_mut().attempts = 1,
        None => {}
    }
    terms
}

fn number(value: Option<HeaderValue>) -> Option<u64> {
    value?.to_str().ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{defaults, snapshot::RetryOn};

    fn retries(attempts: u32) -> RetryPolicy {
        RetryPolicy { attempts, on: RetryOn::default(), ..defaults::retry_policy() }
    }

    /// Timeout and time of a try in milliseconds, retries, and what they are for.
    type Expected = (Option<u64>, Option<u64>, u32, RetryOn);

    #[test]
    fn what_is_asked_for_holds_and_goes_no_further() {
        let (second, none) = (Some(Duration::from_secs(1)), retries(0));
        let on = RetryOn::default;
        let gateway = RetryOn { gateway_error: true, status_codes: vec![418, 429], ..on() };
        let table: [(&[(&'static str, &'static str)], Expected); 10] = [
            (&[("x-envoy-other", "7")], (Some(1_000), None, 0, on())),
            (&[("x-envoy-upstream-rq-timeout-ms", "250")], (Some(250), None, 0, on())),
            (&[("x-envoy-upstream-rq-timeout-ms", "0")], (None, None, 0, on())),
            (&[("x-envoy-upstream-rq-timeout-ms", "-1")], (Some(1_000), None, 0, on())),
            (&[("x-envoy-upstream-rq-per-try-timeout-ms", "9")], (Some(1_000), Some(9), 0, on())),
            (&[("x-envoy-max-retries", "4")], (Some(1_000), None, 4, on())),
            (&[("x-envoy-max-retries", "4294967295")], (Some(1_000), None, 10, on())),
            (
                &[
                    ("x-envoy-retry-on", "gateway-error, nonsense"),
                    ("x-envoy-retriable-status-codes", "418,429"),
                ],
                (Some(1_000), None, 1, gateway),
            ),
            (&[("x-envoy-retry-on", "nonsense")], (Some(1_000), None, 0, on())),
            (
                &[("x-envoy-retry-grpc-on", "unavailable"), ("x-envoy-max-retries", "3")],
                (Some(1_000), None, 3, RetryOn { grpc: vec![14], ..on() }),
            ),
        ];
        for (pairs, expected) in table {
            let mut headers: HeaderMap = pairs
                .iter()
                .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
                .collect();
            let terms = terms(&mut headers, second, &none);
            let millis = |time: Option<Duration>| time.map(|time| time.as_millis() as u64);
            let Terms { timeout, retries } = terms;
            let got =
                (millis(timeout), millis(retries.per_try_timeout), retries.attempts, retries.on.clone());
            assert_eq!(got, expected, "{pairs:?}");
            assert!(headers.keys().all(|name| name == "x-envoy-other"), "{headers:?}");
        }
    }

    #[test]
    fn a_route_without_such_headers_is_borrowed_and_its_conditions_stay() {
        let mut written = retries(2);
        written.on.reset = true;
        let mut headers = HeaderMap::new();
        assert!(matches!(terms(&mut headers, None, &written).retries, Cow::Borrowed(_)));
        headers.insert(RETRY_ON, HeaderValue::from_static("5xx"));
        let retries = terms(&mut headers, None, &written).retries;
        assert!(retries.on.reset && retries.on.server_error && retries.attempts == 2);
    }
}
