//! How often one caller may ask: a bucket of tokens for each.
//!
//! Promises that one caller's flood takes nothing from another, that memory is bounded, and that what is refused is said
//! in the log once a second for each caller at most, with a count. Tested below.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// Callers remembered. Above it those are forgotten whose bucket is full again, then all: a flood of names is no way around
/// the limit of any one for longer than it takes to fill a bucket.
const CALLERS: usize = 16 * 1024;
/// How often refusals of one caller are said.
const SAID_EVERY: Duration = Duration::from_secs(1);

/// The buckets.
#[derive(Debug)]
pub(super) struct RateLimit {
    per_second: f64,
    burst: f64,
    buckets: Mutex<HashMap<String, Bucket>>,
}

#[derive(Debug)]
struct Bucket {
    left: f64,
    /// When `left` was true.
    at: Instant,
    said: Option<Instant>,
    unsaid: u64,
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Taken,
    /// Over the limit. `say`: how many have been refused since that was said last, where it is time to say it again.
    Refused {
        say: Option<u64>,
    },
}

impl RateLimit {
    pub fn new(per_second: u32, burst: u32) -> Self {
        Self { per_second: per_second.into(), burst: burst.into(), buckets: Mutex::default() }
    }

    /// Counts a request of this caller.
    pub fn take(&self, caller: &str) -> Verdict {
        let now = Instant::now();
        // Whole after every change.
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if !buckets.contains_key(caller) {
            if buckets.len() >= CALLERS {
                buckets.retain(|_, bucket| self.filled(bucket, now) < self.burst);
            }
            if buckets.len() >= CALLERS {
                buckets.clear();
            }
            let bucket = Bucket { left: self.burst, at: now, said: None, unsaid: 0 };
            buckets.insert(caller.to_owned(), bucket);
        }
        let Some(bucket) = buckets.get_mut(caller) else { return Verdict::Taken };
        bucket.left = self.filled(bucket, now);
        bucket.at = now;
        if bucket.left >= 1.0 {
            bucket.left -= 1.0;
            return Verdict::Taken;
        }
        bucket.unsaid += 1;
        if bucket.said.is_some_and(|said| now.duration_since(said) < SAID_EVERY) {
            return Verdict::Refused { say: None };
        }
        bucket.said = Some(now);
        Verdict::Refused { say: Some(std::mem::take(&mut bucket.unsaid)) }
    }

    fn filled(&self, bucket: &Bucket, now: Instant) -> f64 {
        let since = now.duration_since(bucket.at).as_secs_f64();
        self.per_second.mul_add(since, bucket.left).min(self.burst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_burst_then_so_many_a_second_for_each_caller() {
        let limit = RateLimit::new(2, 3);
        for _ in 0..3 {
            assert_eq!(limit.take("a"), Verdict::Taken);
        }
        assert_eq!(limit.take("a"), Verdict::Refused { say: Some(1) });
        assert_eq!(limit.take("a"), Verdict::Refused { say: None });
        assert_eq!(limit.take("b"), Verdict::Taken, "another's flood");
        tokio::time::advance(Duration::from_millis(500)).await;
        assert_eq!(limit.take("a"), Verdict::Taken);
        assert_eq!(limit.take("a"), Verdict::Refused { say: None });
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!([limit.take("a"), limit.take("a")], [Verdict::Taken; 2]);
        assert_eq!(limit.take("a"), Verdict::Refused { say: Some(3) });
        tokio::time::advance(Duration::from_hours(1)).await;
        for _ in 0..3 {
            assert_eq!(limit.take("a"), Verdict::Taken);
        }
        assert_ne!(limit.take("a"), Verdict::Taken, "more than the burst was saved up");
    }

    #[tokio::test(start_paused = true)]
    async fn callers_are_forgotten_before_they_are_too_many() {
        let limit = RateLimit::new(1, 1);
        for caller in 0..=2 * CALLERS {
            limit.take(&caller.to_string());
        }
        let remembered = limit.buckets.lock().unwrap_or_else(PoisonError::into_inner).len();
        assert!(remembered <= CALLERS, "{remembered}");
    }
}
