//! When and how a request is tried again, and how many may be at a time.
//!
//! Tested through `resource/` (what is written) and `upstream/retry.rs` (what it comes to).

use std::{
    array,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::time::Instant;

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

/// `retryBudget`: of the requests to a cluster, how many may be retries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryBudget {
    /// `percent` of the requests.
    pub percent: Percentage,
    /// `minRetryConcurrency`: so many are allowed at a time whatever the share comes to.
    pub min_concurrency: u32,
    /// `budgetInterval`: the share is one of the requests begun within it; `None`: of those under way.
    pub interval: Option<Duration>,
}

impl RetryBudget {
    /// How many retries may be under way while this many requests are.
    pub fn limit(&self, active: u32) -> u32 {
        self.share(active).max(self.min_concurrency)
    }

    fn share(&self, requests: u32) -> u32 {
        let share = u64::from(requests) * u64::from(self.percent.0) / u64::from(Percentage::WHOLE.0);
        u32::try_from(share).unwrap_or(u32::MAX)
    }
}

/// What was begun lately at a cluster that has a `budgetInterval`. Takes no lock.
#[derive(Debug)]
pub struct Recent {
    since: Instant,
    first_tries: Window,
    retries: Window,
}

impl Default for Recent {
    fn default() -> Self {
        Self { since: Instant::now(), first_tries: Window::default(), retries: Window::default() }
    }
}

impl Recent {
    /// Counts the first try of a request.
    pub fn first_try(&self, interval: Duration) {
        self.first_tries.count(self.now(interval));
    }

    /// Whether there may be another retry, which is counted then. `under_way`: as many are, this one among them.
    pub fn retry(&self, budget: &RetryBudget, interval: Duration, under_way: u32) -> bool {
        let now = self.now(interval);
        let allowed = under_way <= budget.min_concurrency
            || self.retries.sum(now) < budget.share(self.first_tries.sum(now));
        if allowed {
            self.retries.count(now);
        }
        allowed
    }

    /// Parts of an interval since the beginning.
    fn now(&self, interval: Duration) -> u32 {
        let parts = self.since.elapsed().as_nanos() * u128::from(PARTS) / interval.as_nanos().max(1);
        // It may come round: what was counted then has been overwritten long since.
        parts as u32
    }
}

/// Parts that an interval is counted in, so that what is older leaves little by little (Envoy: ten).
const PARTS: u32 = 10;

/// How many there were in each of the last parts of an interval: the number of the part in the upper half, the count in the
/// lower.
#[derive(Debug)]
struct Window([AtomicU64; PARTS as usize]);

impl Default for Window {
    fn default() -> Self {
        Self(array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl Window {
    fn count(&self, now: u32) {
        let slot = &self.0[(now % PARTS) as usize];
        // Never fails: it always wants to change something.
        let _ = slot.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |held| {
            let (part, count) = ((held >> 32) as u32, held as u32);
            let count = if part == now { count.saturating_add(1) } else { 1 };
            Some(u64::from(now) << 32 | u64::from(count))
        });
    }

    fn sum(&self, now: u32) -> u32 {
        let of = |slot: &AtomicU64| {
            let held = slot.load(Ordering::Relaxed);
            let recent = now.wrapping_sub((held >> 32) as u32) < PARTS;
            if recent { held as u32 } else { 0 }
        };
        self.0.iter().map(of).fold(0, u32::saturating_add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_a_share_and_never_less_than_its_minimum() {
        let budget = RetryBudget { percent: Percentage(200_000), min_concurrency: 3, interval: None };
        for (active, limit) in [(0, 3), (15, 3), (20, 4), (100, 20), (u32::MAX, u32::MAX / 5)] {
            assert_eq!(budget.limit(active), limit, "{active}");
        }
        let none = RetryBudget { percent: Percentage(0), min_concurrency: 0, interval: None };
        assert_eq!(none.limit(1_000), 0);
    }

    const INTERVAL: Duration = Duration::from_secs(10);

    fn fifth(min_concurrency: u32) -> RetryBudget {
        RetryBudget { percent: Percentage(200_000), min_concurrency, interval: Some(INTERVAL) }
    }

    /// How many retries there may be, one after the other.
    fn retries(recent: &Recent, budget: &RetryBudget) -> u32 {
        // More than its minimum are under way.
        (0..1_000).take_while(|_| recent.retry(budget, INTERVAL, budget.min_concurrency + 1)).count() as u32
    }

    #[tokio::test(start_paused = true)]
    async fn with_an_interval_the_share_is_one_of_what_was_begun_in_it() {
        let (recent, budget) = (Recent::default(), fifth(0));
        assert_eq!(retries(&recent, &budget), 0, "of nothing");
        // A hundred a second, each over at once: for ten seconds.
        for _ in 0..10 {
            (0..100).for_each(|_| recent.first_try(INTERVAL));
            tokio::time::advance(Duration::from_millis(999)).await;
        }
        assert_eq!(retries(&recent, &budget), 200);
        assert_eq!(retries(&recent, &budget), 0, "they stay used");
        // What is older than the interval leaves: first tries, and retries too.
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!(retries(&recent, &budget), 0);
        tokio::time::advance(INTERVAL).await;
        assert_eq!(retries(&recent, &budget), 0, "of nothing again");
        (0..50).for_each(|_| recent.first_try(INTERVAL));
        assert_eq!(retries(&recent, &budget), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn the_minimum_is_one_of_retries_at_a_time() {
        let (recent, budget) = (Recent::default(), fifth(3));
        for under_way in [1, 2, 3, 3, 3] {
            assert!(recent.retry(&budget, INTERVAL, under_way), "{under_way}");
        }
        assert!(!recent.retry(&budget, INTERVAL, 4));
        // Five were; and what a share allows is more than that with the thirtieth request.
        (0..29).for_each(|_| recent.first_try(INTERVAL));
        assert!(!recent.retry(&budget, INTERVAL, 4));
        recent.first_try(INTERVAL);
        assert!(recent.retry(&budget, INTERVAL, 4) && !recent.retry(&budget, INTERVAL, 4));
    }

    #[test]
    fn threads_lose_none_of_what_they_count() {
        let window = Window::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..10_000).for_each(|_| window.count(7)));
            }
        });
        assert_eq!((window.sum(7), window.sum(16), window.sum(17), window.sum(6)), (40_000, 40_000, 0, 0));
    }
}
