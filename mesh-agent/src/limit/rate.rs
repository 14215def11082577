//! Rate limits: token buckets, by the generic cell rate algorithm (ITU-T I.371).
//!
//! A bucket is one number, the moment at which it is full again, and a request one atomic operation on it. Promises that in
//! any span of time no more than `burst` and what `requests` in `per` come to are let in, however many ask at once, and
//! whatever the rule was before; and that what is refused takes nothing, of any limit. Tested below.

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

/// A request that limits are asked about.
#[derive(Debug, Clone, Copy)]
pub struct Asking<'a> {
    /// Who has sent it, where that is proved.
    pub source: Option<&'a SpiffeId>,
    /// Its method.
    pub method: &'a Method,
    /// Its path, in the normal form.
    pub path: &'a str,
    /// Now.
    pub now: Instant,
}

/// A limit that has refused.
#[derive(Debug)]
pub struct Over<'a> {
    /// Which.
    pub limit: &'a RateLimit,
    /// What it has left.
    pub left: Quota,
    /// Time until the first token comes.
    pub wait: Duration,
}

/// Takes a token of each of the limits that are about a request, or of none; what is left of the one that has least.
///
/// All are looked at before one is taken from, so that what a later limit refuses takes nothing of an earlier one, not even for
/// a moment. Where others take the last token in between, what was taken is given back.
///
/// # Errors
/// The first that refuses.
pub fn take_all<'a>(limits: &'a [RateLimit], asking: &Asking<'_>) -> Result<Option<Quota>, Over<'a>> {
    let [limit, others @ ..] = limits else { return Ok(None) };
    if !is_about(&limit.rule, asking.method, asking.path) {
        return take_all(others, asking);
    }
    let over = |left, wait| Err(Over { limit, left, wait });
    with_bucket(limit, asking.source, |bucket| {
        let nanos = nanos(limit, asking.now);
        if let Verdict::Over(left, wait) = from(bucket, &limit.rule, nanos, Take::Nothing) {
            return over(left, wait);
        }
        let least = take_all(others, asking)?;
        match from(bucket, &limit.rule, nanos, Take::Token) {
            Verdict::Within(left) => match least {
                Some(least) if least.remaining < left.remaining => Ok(Some(least)),
                _ => Ok(Some(left)),
            },
            Verdict::Over(left, wait) => {
                give_back_all(others, asking);
                over(left, wait)
            }
        }
    })
}

fn give_back_all(limits: &[RateLimit], asking: &Asking<'_>) {
    for limit in limits.iter().filter(|limit| is_about(&limit.rule, asking.method, asking.path)) {
        let nanos = nanos(limit, asking.now);
        with_bucket(limit, asking.source, |bucket| give_back(bucket, &limit.rule, nanos));
    }
}

fn nanos(limit: &RateLimit, now: Instant) -> u64 {
    now.saturating_duration_since(limit.buckets.epoch).as_nanos() as u64
}

/// The bucket that a source takes from.
fn with_bucket<T>(limit: &RateLimit, source: Option<&SpiffeId>, then: impl FnOnce(&Bucket) -> T) -> T {
    let Some(source) = source.filter(|_| limit.rule.each_source) else { return then(&limit.buckets.shared) };
    let known = limit.buckets.by_source.load();
    if let Some(bucket) = known.get(source) {
        return then(bucket);
    }
    match of_new(&limit.buckets, source) {
        Some(bucket) => then(&bucket),
        None => then(&limit.buckets.shared),
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

/// What is taken out of a bucket that has a token.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Take {
    Nothing,
    Token,
}

/// What a token is of a full bucket's time, nanoseconds. Rounded up: never more than the rule says.
fn of_token(rule: &RateRule) -> u64 {
    (rule.per.as_nanos() as u64).div_ceil(u64::from(rule.requests)).max(1)
}

/// Looks into a bucket at this moment, and takes what is to be taken.
fn from(bucket: &Bucket, rule: &RateRule, now: u64, take: Take) -> Verdict {
    let each = of_token(rule);
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
        let (next, verdict) = match take {
            Take::Token if after <= depth => (now + after, Verdict::Within(quota(after))),
            Take::Nothing if after <= depth => (full_at, Verdict::Within(quota(owed))),
            _ => (now + owed, Verdict::Over(quota(owed), Duration::from_nanos(after - depth))),
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

/// Gives a token back that was taken at this moment. Where less is owed than that, the rule has changed meanwhile and has
/// forgiven it.
fn give_back(bucket: &Bucket, rule: &RateRule, now: u64) {
    let each = of_token(rule);
    let given = |full_at: u64| (full_at.saturating_sub(now) >= each).then(|| full_at - each);
    let _ = bucket.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, given);
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

    /// Takes a token for a request of this source, of this limit alone.
    fn take(limit: &RateLimit, source: Option<&SpiffeId>, now: Instant) -> Verdict {
        with_bucket(limit, source, |bucket| from(bucket, &limit.rule, nanos(limit, now), Take::Token))
    }

    fn left(limit: &RateLimit, source: Option<&SpiffeId>, now: Instant) -> u32 {
        let look = |bucket: &Bucket| from(bucket, &limit.rule, nanos(limit, now), Take::Nothing);
        match with_bucket(limit, source, look) {
            Verdict::Within(quota) | Verdict::Over(quota, _) => quota.remaining,
        }
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

    fn asking(source: Option<&SpiffeId>, now: Instant) -> Asking<'_> {
        Asking { source, method: &Method::GET, path: "/", now }
    }

    #[test]
    fn what_one_limit_refuses_takes_nothing_of_the_others() {
        let mut limits = [(9, false), (2, true), (5, false)]
            .map(|(burst, each_source)| limit(1, Duration::from_hours(1), burst, each_source));
        let now = Instant::now() + Duration::from_secs(1);
        let (a, b) = (id("a"), id("b"));
        let quota = take_all(&limits, &asking(Some(&a), now)).unwrap().unwrap();
        assert_eq!((quota.limit, quota.remaining), (2, 1), "of the one that has least left");
        assert!(take_all(&limits, &asking(Some(&a), now)).is_ok());
        for _ in 0..50 {
            let over = take_all(&limits, &asking(Some(&a), now)).unwrap_err();
            assert!(std::ptr::eq(over.limit, &raw const limits[1]));
            assert_eq!((over.left.remaining, over.wait), (0, Duration::from_hours(1)));
        }
        assert_eq!([0, 1, 2].map(|at: usize| left(&limits[at], Some(&a), now)), [7, 0, 3]);
        // The last refuses: neither of those before has given anything.
        let used = |at| (0..at).filter(|_| take_all(&limits, &asking(None, now)).is_ok()).count();
        assert_eq!((used(2), left(&limits[2], None, now)), (2, 1));
        assert!(take_all(&limits, &asking(Some(&b), now)).is_ok());
        assert!(std::ptr::eq(
            take_all(&limits, &asking(Some(&b), now)).unwrap_err().limit,
            &raw const limits[2]
        ));
        assert_eq!([0, 1, 2].map(|at: usize| left(&limits[at], Some(&b), now)), [4, 1, 0]);
        // Whom it is not about it takes nothing from.
        limits[2].rule = Arc::new(RateRule { methods: vec![Method::PUT], ..(*limits[2].rule).clone() });
        assert!(take_all(&limits, &asking(Some(&b), now)).is_ok());
        assert!(take_all(&limits[2..], &asking(Some(&b), now)).unwrap().is_none());
    }

    #[test]
    fn what_is_given_back_is_what_was_taken() {
        let limit = limit(1, Duration::from_secs(1), 3, false);
        let begin = limit.buckets.epoch + Duration::from_secs(9);
        let give = |at: Instant| give_back(&limit.buckets.shared, &limit.rule, nanos(&limit, at));
        give(begin);
        assert_eq!(left(&limit, None, begin), 3, "a full bucket has no room");
        assert_eq!(let_in(&limit, None, begin, 2), 2);
        give(begin);
        assert_eq!(left(&limit, None, begin), 2);
        assert_eq!(let_in(&limit, None, begin, 9), 2);
    }

    #[test]
    fn all_or_nothing_is_exact_however_many_ask_at_once() {
        const THREADS: usize = 8;
        let [first, contested] = [(50_000, false), (500, false)]
            .map(|(burst, each_source)| limit(1, Duration::from_hours(1), burst, each_source));
        // Whoever takes of the last one and comes too late for the middle one has something to give back.
        let last = limit(1, Duration::from_hours(1), 60_000, false);
        let limits = [first, contested, last];
        let (begin, now) = (Barrier::new(THREADS), Instant::now() + Duration::from_secs(1));
        let allowed = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    begin.wait();
                    for _ in 0..2_000 {
                        let let_in = take_all(&limits, &asking(None, now)).is_ok();
                        allowed.fetch_add(u32::from(let_in), Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(allowed.into_inner(), 500);
        assert_eq!([0, 1, 2].map(|at: usize| left(&limits[at], None, now)), [49_500, 0, 59_500]);
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
