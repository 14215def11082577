//! When and how a request is tried again, and how many may be at a time.
//!
//! Tested through `resource/` (what is written) and `upstream/retry.rs` (what it comes to).

use std::time::Duration;

use super::Percentage;

/// `retries`, with Istio's default where the route says nothing.
#[derive(Debug, Clone)]
pub struct RetryPolicy {
    /// Tries after the first; 0 switches retries off.
    pub attempts: u32,
    /// `perTryTimeout`; `None` leaves a try the whole timeout.
    pub per_try_timeout: Option<Duration>,
    /// `retryOn`.
    pub on: RetryOn,
    /// Base of the exponential backoff between tries (Envoy: 25 ms, at most ten times that, full jitter).
    pub backoff: Duration,
    /// `retryRemoteLocalities`: a retry may go to another locality than the try before.
    pub remote_localities: bool,
    /// `retryIgnorePreviousHosts`: a retry goes to an endpoint not tried yet, as long as there is one.
    pub ignore_previous_hosts: bool,
}

/// Conditions of `retryOn`, the names of Envoy's `x-envoy-retry-on` and `x-envoy-retry-grpc-on`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is one condition of retryOn, freely combined")]
pub struct RetryOn {
    /// `5xx`: any 5xx, or no response at all.
    pub server_error: bool,
    /// `gateway-error`: 502, 503, 504.
    pub gateway_error: bool,
    /// `reset`: no response at all (disconnect, reset, read timeout).
    pub reset: bool,
    /// `connect-failure`.
    pub connect_failure: bool,
    /// `refused-stream`.
    pub refused_stream: bool,
    /// `retriable-4xx`: 409.
    pub retriable_4xx: bool,
    /// `retriable-headers`: the response has a header that the request names in `x-envoy-retriable-header-names`.
    pub retriable_headers: bool,
    /// `envoy-ratelimited`: the response has the header `x-envoy-ratelimited`.
    pub envoy_ratelimited: bool,
    /// `reset-before-request`: the try broke off before anything of the request was sent.
    pub reset_before_request: bool,
    /// Numbers in `retryOn`.
    pub status_codes: Vec<u16>,
    /// gRPC statuses (`cancelled`, `deadline-exceeded`, `internal`, `resource-exhausted`, `unavailable`) by number.
    pub grpc: Vec<u32>,
}

impl RetryOn {
    /// Adds a condition by its name: whether there is one of that name.
    pub fn add(&mut self, word: &str) -> bool {
        match word {
            "5xx" => self.server_error = true,
            "gateway-error" => self.gateway_error = true,
            "reset" => self.reset = true,
            "connect-failure" => self.connect_failure = true,
            "refused-stream" => self.refused_stream = true,
            "retriable-4xx" => self.retriable_4xx = true,
            "retriable-headers" => self.retriable_headers = true,
            "envoy-ratelimited" => self.envoy_ratelimited = true,
            "reset-before-request" => self.reset_before_request = true,
            // One means the numbers beside it, which count without it too; the other never happens, as nothing here
            // speaks HTTP/3.
            "retriable-status-codes" | "http3-post-connect-failure" => {}
            "cancelled" => self.grpc.push(1),
            "deadline-exceeded" => self.grpc.push(4),
            "resource-exhausted" => self.grpc.push(8),
            "internal" => self.grpc.push(13),
            "unavailable" => self.grpc.push(14),
            word => match word.parse::<u16>() {
                Ok(status @ 100..=599) => self.status_codes.push(status),
                _ => return false,
            },
        }
        true
    }
}

/// `retryBudget`: of the requests under way to a cluster, how many may be retries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryBudget {
    /// `percent` of the requests under way.
    pub percent: Percentage,
    /// `minRetryConcurrency`: so many are allowed whatever the share comes to.
    pub min_concurrency: u32,
}

impl RetryBudget {
    /// How many retries may be under way while this many requests are.
    pub fn limit(&self, active: u32) -> u32 {
        let share = u64::from(active) * u64::from(self.percent.0) / u64::from(Percentage::WHOLE.0);
        u32::try_from(share).unwrap_or(u32::MAX).max(self.min_concurrency)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_a_share_and_never_less_than_its_minimum() {
        let budget = RetryBudget { percent: Percentage(200_000), min_concurrency: 3 };
        for (active, limit) in [(0, 3), (15, 3), (20, 4), (100, 20), (u32::MAX, u32::MAX / 5)] {
            assert_eq!(budget.limit(active), limit, "{active}");
        }
        let none = RetryBudget { percent: Percentage(0), min_concurrency: 0 };
        assert_eq!(none.limit(1_000), 0);
    }
}
