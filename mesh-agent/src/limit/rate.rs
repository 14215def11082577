//! Rate limits: token buckets, by the generic cell rate algorithm (ITU-T I.371).
//!
//! A bucket is one number, the moment at which it is full again, and a request one atomic operation on it. Promises that in
//! any span of time no more than `burst` and what `requests` in `per` come to are let in, however many ask at once, and
//! whatever the rule was before; and that what is refused takes nothing. Tested below.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use http::{HeaderMap, HeaderValue, Method};
use tokio::time::Instant;

use crate::{
    identity::SpiffeId,
    route,
    state::snapshot::{Bucket, Buckets, RateLimit, RateRule},
};

/// Identities that have buckets of their own, of one limit at one port of a pod. Those beyond share one with
/// those that have proved none: who makes up identities gains nothing.
const MOST_SOURCES: usize = 10_000;

/// How far apart the moments may be that requests asked about at once have for now. Whoever has an earlier one must not
/// take what a later one has left for what another rule has.
const MOST_SKEW: Duration = Duration::from_secs(1);

/// What a bucket has left, as a response tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quota {
    /// Tokens of a full bucket.
    pub limit: u32,
    /// Tokens that are left.
    pub remaining: u32,
    /// Time until it is full again.
    pub reset: Duration,
}

/// What a limit says of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It has taken a token.
    Within(Quota),
    /// There was none. The first comes after this time.
    Over(Quota, Duration),
}

/// Whether a limit is about a request.
pub fn is_about(rule: &RateRule, method: &Method, path: &str) -> bool {
    (rule.methods.is_empty() || rule.methods.contains(method))
        && (rule.paths.is_empty() || rule.paths.iter().any(|one| route::matches(one, path.as_bytes())))
}

/// Takes a token for a request of this source.
pub fn take(limit: &RateLimit, source: Option<&SpiffeId>, now: Instant) -> Verdict {
    let nanos = now.saturating_duration_since(limit.buckets.epoch).as_nanos() as u64;
    match source.filter(|_| limit.rule.each_source) {
        None => from(&limit.buckets.shared, &limit.rule, nanos),
        Some(source) => {
            let known = limit.buckets.by_source.load();
            match known.get(source) {
                Some(bucket) => from(bucket, &limit.rule, nanos),
                None => match of_new(&limit.buckets, source) {
                    Some(bucket) => from(&bucket, &limit.rule, nanos),
                    None => from(&limit.buckets.shared, &limit.rule, nanos),
                },
            }
        }
    }
}

/// A bucket for who has none, the same for two who come at once; `None`: there are too many.
fn of_new(buckets: &Buckets, source: &SpiffeId) -> Option<Arc<Bucket>> {
    let new = Arc::new(Bucket::default());
    let with = |known: &Arc<HashMap<SpiffeId, Arc<Bucket>>>| {
        if known.contains_key(source) || known.len() >= MOST_SOURCES {
            return Arc::clone(known);
        }
        let mut more = HashMap::clone(known);
        more.insert(source.clone(), Arc::clone(&new));
        Arc::new(more)
    };
    buckets.by_source.rcu(with);
    buckets.by_source.load().get(source).cloned()
}

/// Takes a token out of a bucket at this moment.
fn from(bucket: &Bucket, rule: &RateRule, now: u64) -> Verdict {
    // Rounded up: never more than the rule says.
    let each = (rule.per.as_nanos() as u64).div_ceil(u64::from(rule.requests)).max(1);
    let depth = each.saturating_mul(u64::from(rule.burst));
    let quota = |owed: u64| Quota {
        limit: rule.burst,
        remaining: (depth.saturating_sub(owed) / each) as u32,
        reset: Duration::from_nanos(owed),
    };
    let mut full_at = bucket.0.load(Ordering::Relaxed);
    loop {
        let mut owed = full_at.saturating_sub(now);
        if owed > depth.saturating_add(MOST_SKEW.as_nanos() as u64) {
            // Left by a rule of before: for this one it is an empty bucket.
            owed = depth;
        }
        let after = owed + each;
        let (next, verdict) = if after <= depth {
            (now + after, Verdict::Within(quota(after)))
        } else {
            let wait = Duration::from_nanos(after - depth);
            (now + owed, Verdict::Over(quota(owed), wait))
        };
        if next == full_at {
            return verdict;
        }
        match bucket.0.compare_exchange_weak(full_at, next, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => return verdict,
            Err(seen) => full_at = seen,
        }
    }
}

/// Tells a client what is left (`draft-polli-ratelimit-headers-03`, as Envoy has it).
pub fn tell(quota: &Quota, headers: &mut HeaderMap) {
    headers.insert("x-ratelimit-limit", quota.limit.into());
    headers.insert("x-ratelimit-remaining", quota.remaining.into());
    headers.insert("x-ratelimit-reset", HeaderValue::from(seconds(quota.reset)));
}

/// Whole seconds: who comes then comes not too early.
pub fn seconds(time: Duration) -> u64 {
    time.as_secs() + u64::from(time.subsec_nanos() > 0)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::sync::{
        Barrier,
        atomic::{AtomicU32, AtomicU64},
    };

    use super::*;
    use crate::state::snapshot::StringMatch;

    fn limit(requests: u32, per: Duration, burst: u32, each_source: bool) -> RateLimit {
        let rule = RateRule {
            name: "r".into(),
            requests,
            per,
            burst,
            each_source,
            paths: Vec::new(),
            methods: Vec::new(),
        };
        RateLimit { rule: Arc::new(rule), buckets: Arc::default() }
    }

    fn id(account: &str) -> SpiffeId {
        crate::report::samples::identity(account)
    }

    /// How many of so many requests are let in at this moment.
    fn let_in(limit: &RateLimit, source: Option<&SpiffeId>, at: Instant, of: u32) -> u32 {
        (0..of).filter(|_| matches!(take(limit, source, at), Verdict::Within(_))).count() as u32
    }

    #[test]
    fn a_bucket_is_full_at_first_and_fills_again_steadily() {
        let limit = limit(10, Duration::from_secs(1), 5, false);
        let begin = limit.buckets.epoch + Duration::from_secs(100);
        let at = |ms| begin + Duration::from_millis(ms);
        assert_eq!(let_in(&limit, None, at(0), 20), 5);
        assert_eq!(let_in(&limit, None, at(99), 20), 0);
        assert_eq!(let_in(&limit, None, at(100), 20), 1);
        assert_eq!(let_in(&limit, None, at(399), 20), 2);
        assert_eq!(let_in(&limit, None, at(400), 20), 1);
        // It never holds more than the burst.
        assert_eq!(let_in(&limit, None, at(60_000), 20), 5);
    }

    #[test]
    fn what_is_left_is_told() {
        let limit = limit(2, Duration::from_secs(4), 2, false);
        let begin = limit.buckets.epoch + Duration::from_secs(1);
        let quota = |remaining, reset| Quota { limit: 2, remaining, reset: Duration::from_millis(reset) };
        assert_eq!(take(&limit, None, begin), Verdict::Within(quota(1, 2_000)));
        assert_eq!(take(&limit, None, begin), Verdict::Within(quota(0, 4_000)));
        assert_eq!(take(&limit, None, begin), Verdict::Over(quota(0, 4_000), Duration::from_secs(2)));
        let later = begin + Duration::from_millis(500);
        assert_eq!(take(&limit, None, later), Verdict::Over(quota(0, 3_500), Duration::from_millis(1_500)));
        assert_eq!((seconds(Duration::from_millis(1_500)), seconds(Duration::from_secs(2))), (2, 2));
        let mut headers = HeaderMap::new();
        tell(&quota(0, 3_500), &mut headers);
        let told: Vec<_> =
            headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        assert_eq!(
            told,
            [("x-ratelimit-limit", "2"), ("x-ratelimit-remaining", "0"), ("x-ratelimit-reset", "4")]
        );
    }

    #[test]
    fn each_identity_has_its_own_where_the_rule_says_so() {
        let now = Instant::now() + Duration::from_secs(1);
        let each = limit(3, Duration::from_mins(1), 3, true);
        let all = limit(3, Duration::from_mins(1), 3, false);
        let (a, b) = (id("a"), id("b"));
        assert_eq!([Some(&a), Some(&b), None].map(|source| let_in(&each, source, now, 9)), [3, 3, 3]);
        assert_eq!([Some(&a), Some(&b), None].map(|source| let_in(&all, source, now, 9)), [3, 0, 0]);
    }

    #[test]
    fn those_beyond_the_last_source_share_and_get_no_more_than_one() {
        let each = limit(1, Duration::from_mins(1), 1, true);
        let now = Instant::now() + Duration::from_secs(1);
        let full: HashMap<_, _> =
            (0..MOST_SOURCES).map(|n| (id(&format!("s{n}")), Arc::new(Bucket::default()))).collect();
        each.buckets.by_source.store(Arc::new(full));
        let made_up = (0..50).filter(|n| let_in(&each, Some(&id(&format!("new{n}"))), now, 1) == 1).count();
        assert_eq!(made_up, 1);
        assert_eq!(each.buckets.by_source.load().len(), MOST_SOURCES);
    }

    #[test]
    fn a_rule_that_changes_takes_over_what_is_owed_and_no_more() {
        let before = limit(1, Duration::from_hours(1), 100, false);
        let now = before.buckets.epoch + Duration::from_secs(1);
        assert_eq!(let_in(&before, None, now, 200), 100);
        let rule = RateRule { requests: 10, per: Duration::from_secs(1), burst: 5, ..(*before.rule).clone() };
        let after = RateLimit { rule: Arc::new(rule), buckets: Arc::clone(&before.buckets) };
        assert_eq!(let_in(&after, None, now, 9), 0, "the bucket was empty and stays so");
        // Who comes with an earlier moment gives nothing away.
        assert_eq!(let_in(&after, None, now - Duration::from_millis(300), 9), 0);
        assert_eq!(let_in(&after, None, now + Duration::from_millis(100), 9), 1, "but fills as it says now");
    }

    #[test]
    fn it_is_exact_however_many_ask_at_once() {
        const THREADS: u32 = 8;
        let limit = limit(1, Duration::from_hours(1), 1_000, true);
        let (source, begin) = (id("a"), Barrier::new(THREADS as usize));
        let (allowed, refused) = (AtomicU32::new(0), AtomicU32::new(0));
        // Time goes on meanwhile, by less than a token takes.
        let (epoch, clock) = (limit.buckets.epoch, AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    begin.wait();
                    for _ in 0..1_000 {
                        let now = epoch + Duration::from_nanos(clock.fetch_add(7, Ordering::Relaxed));
                        let counter = match take(&limit, Some(&source), now) {
                            Verdict::Within(_) => &allowed,
                            Verdict::Over(..) => &refused,
                        };
                        counter.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!((allowed.into_inner(), refused.into_inner()), (1_000, THREADS * 1_000 - 1_000));
    }

    #[test]
    fn a_limit_is_about_its_methods_and_paths() {
        let all = limit(1, Duration::from_secs(1), 1, false).rule;
        let some = RateRule {
            paths: vec![StringMatch::Prefix("/api".into()), StringMatch::Exact("/x".into())],
            methods: vec![Method::POST, Method::PUT],
            ..(*all).clone()
        };
        assert!(is_about(&all, &Method::GET, "/"));
        let about = |method, path| is_about(&some, &method, path);
        assert!(about(Method::POST, "/api/1") && about(Method::PUT, "/x"));
        assert!(!about(Method::GET, "/api/1") && !about(Method::POST, "/x/y"));
    }
}
