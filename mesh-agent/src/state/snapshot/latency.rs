//! How long an endpoint takes to answer: a moving average that goes up at once and comes down slowly (peak EWMA).
//!
//! Promises that learning costs a few atomic operations and never a lock; that an endpoint which has stopped answering
//! is known to be slow before it answers; and that old news loses its weight. Tested below on a paused clock, and by the
//! simulations in `balance/simulation.rs`.

use std::{
    sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use tokio::time::Instant;

/// After this time an observation has lost all but a third of its weight (Linkerd's and Finagle's decay).
pub const DECAY: Duration = Duration::from_secs(10);

/// What is assumed of an endpoint that has never answered, and has something to answer (Linkerd's default).
pub const UNKNOWN: Duration = Duration::from_millis(30);

/// What a failure counts as, at least: one that comes fast must not pass for a fast answer (the shortest penalty of Linkerd's
/// circuit breaker).
pub const FAILURE: Duration = Duration::from_secs(1);

/// What a failure counts as, at most, unless it took even longer. More than any service is worth waiting for, times what is in
/// flight at each of the others: one that fails at once has nothing in flight.
pub const MOST_FAILURE: Duration = Duration::from_hours(1);

/// What is known of an endpoint's latency.
#[derive(Debug)]
pub struct Latency {
    made: Instant,
    /// The average in seconds, as the bits of an `f64`; NaN before the first answer.
    average: AtomicU64,
    /// Nanoseconds since `made`: when the average was last changed.
    changed: AtomicU64,
    /// Requests or connections without an answer yet.
    waiting: AtomicU32,
    /// Nanoseconds since `made`: when it last answered, or was asked something after a time with nothing to answer.
    heard: AtomicU64,
}

impl Default for Latency {
    fn default() -> Self {
        Self {
            made: Instant::now(),
            average: AtomicU64::new(f64::NAN.to_bits()),
            changed: AtomicU64::new(0),
            waiting: AtomicU32::new(0),
            heard: AtomicU64::new(0),
        }
    }
}

impl Latency {
    /// Something was asked.
    pub fn asked(&self, now: Instant) {
        if self.waiting.load(Relaxed) == 0 {
            self.heard.store(self.nanos(now), Relaxed);
        }
        self.waiting.fetch_add(1, Relaxed);
    }

    /// It was answered after this time.
    pub fn answered(&self, now: Instant, took: Duration) {
        self.waiting.fetch_sub(1, Relaxed);
        self.heard.store(self.nanos(now), Relaxed);
        self.observe(now, took, false);
    }

    /// It has failed after this time, which is twice as bad as what was known of it: where all take long, a second would be
    /// an invitation. Of failures that were under way together one counts so.
    pub fn failed(&self, now: Instant, took: Duration) {
        self.waiting.fetch_sub(1, Relaxed);
        self.heard.store(self.nanos(now), Relaxed);
        let average = self.average(now).unwrap_or_default();
        let since = Duration::from_nanos(self.nanos(now).saturating_sub(self.changed.load(Relaxed)));
        let times = if since >= took { 2 } else { 1 };
        let penalty = average.saturating_mul(times).clamp(FAILURE, MOST_FAILURE);
        self.observe(now, took.max(penalty).max(average), false);
    }

    /// Nobody waits for the answer any more, which would have taken this time at least.
    pub fn given_up(&self, now: Instant, after: Duration) {
        self.waiting.fetch_sub(1, Relaxed);
        self.observe(now, after, true);
    }

    /// `at_least`: it makes the average no better.
    fn observe(&self, now: Instant, took: Duration, at_least: bool) {
        let took = took.as_secs_f64();
        if at_least && self.average(now).is_none_or(|average| took <= average.as_secs_f64()) {
            return;
        }
        let now = self.nanos(now);
        // Each change takes the time since the one before, however many there are at once.
        let since = now.saturating_sub(self.changed.swap(now, Relaxed));
        let kept = decay(Duration::from_nanos(since));
        let next = |bits| {
            let average = f64::from_bits(bits);
            // A NaN is neither more nor less.
            let next = if took < average { average * kept + took * (1.0 - kept) } else { took };
            Some(next.to_bits())
        };
        // Never an error: `next` always gives a value.
        let _ = self.average.fetch_update(Relaxed, Relaxed, next);
    }

    /// The average as it is now; `None` before the first answer.
    pub fn average(&self, now: Instant) -> Option<Duration> {
        let average = f64::from_bits(self.average.load(Relaxed));
        let since = self.nanos(now).saturating_sub(self.changed.load(Relaxed));
        Duration::try_from_secs_f64(average * decay(Duration::from_nanos(since))).ok()
    }

    /// How long it has had something to answer, and has not answered anything: the least that the oldest of it takes.
    fn silent(&self, now: Instant) -> Duration {
        if self.waiting.load(Relaxed) == 0 {
            return Duration::ZERO;
        }
        Duration::from_nanos(self.nanos(now).saturating_sub(self.heard.load(Relaxed)))
    }

    /// What one more request would cost: the time that it takes, once for each that is in flight. Nothing where it was never
    /// asked, so that it is.
    pub fn load(&self, now: Instant, in_flight: u32) -> f64 {
        let average = match self.average(now) {
            Some(average) => average,
            None if in_flight == 0 => return 0.0,
            None => UNKNOWN,
        };
        average.max(self.silent(now)).as_secs_f64() * (f64::from(in_flight) + 1.0)
    }

    fn nanos(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.made).as_nanos() as u64
    }
}

/// What is left after this time.
fn decay(elapsed: Duration) -> f64 {
    (-elapsed.as_secs_f64() / DECAY.as_secs_f64()).exp()
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn answer(latency: &Latency, took: Duration) {
        latency.asked(Instant::now());
        latency.answered(Instant::now(), took);
    }

    fn near(latency: &Latency, expected: f64) {
        let average = latency.average(Instant::now()).map_or(f64::NAN, |average| average.as_secs_f64());
        assert!((average - expected).abs() < expected * 1e-6, "{average}, not {expected}");
    }

    #[tokio::test(start_paused = true)]
    async fn it_goes_up_at_once_and_comes_down_slowly() {
        let latency = Latency::default();
        assert_eq!(latency.average(Instant::now()), None);
        answer(&latency, ms(10));
        near(&latency, 0.010);
        answer(&latency, ms(500));
        near(&latency, 0.500);
        // A better answer in the same moment is no reason to forget.
        answer(&latency, ms(10));
        near(&latency, 0.500);
        advance(DECAY).await;
        answer(&latency, ms(10));
        near(&latency, 0.5 * (-1.0_f64).exp() + 0.01 * (1.0 - (-1.0_f64).exp()));
    }

    #[tokio::test(start_paused = true)]
    async fn old_news_loses_its_weight() {
        let latency = Latency::default();
        answer(&latency, ms(100));
        for _ in 0..3 {
            advance(DECAY).await;
        }
        near(&latency, 0.1 * (-3.0_f64).exp());
    }

    #[tokio::test(start_paused = true)]
    async fn many_answers_at_a_time_weigh_as_much_as_one() {
        let (one, many) = (Latency::default(), Latency::default());
        for latency in [&one, &many] {
            answer(latency, ms(100));
        }
        for _ in 0..1_000 {
            advance(ms(1)).await;
            answer(&many, ms(10));
        }
        answer(&one, ms(10));
        let average = |latency: &Latency| latency.average(Instant::now()).unwrap_or_default().as_secs_f64();
        assert!((average(&one) - average(&many)).abs() < 1e-6, "{} {}", average(&one), average(&many));
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_latency() {
        let latency = Latency::default();
        answer(&latency, ms(10));
        assert!((latency.load(Instant::now(), 0) - 0.010).abs() < 1e-9);
        latency.asked(Instant::now());
        advance(ms(2_000)).await;
        assert!((latency.load(Instant::now(), 1) - 4.0).abs() < 1e-9, "two seconds, for two");
        // An answer to another one shows that it lives; what came of the first is known once it is given up.
        latency.asked(Instant::now());
        latency.answered(Instant::now(), ms(10));
        assert!(latency.load(Instant::now(), 1) < 0.03);
        latency.given_up(Instant::now(), ms(2_000));
        near(&latency, 2.0);
        latency.asked(Instant::now());
        latency.given_up(Instant::now(), ms(1));
        near(&latency, 2.0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_is_never_better_than_what_was_known() {
        let fail = |latency: &Latency, took| {
            latency.asked(Instant::now());
            latency.failed(Instant::now(), took);
        };
        let latency = Latency::default();
        fail(&latency, ms(1));
        near(&latency, 1.0);
        answer(&latency, ms(5_000));
        advance(ms(1)).await;
        fail(&latency, ms(1));
        near(&latency, 2.0 * 5.0 * (-0.0001_f64).exp());
        // Others that were under way at the same time.
        for _ in 0..100 {
            fail(&latency, ms(1));
        }
        near(&latency, 2.0 * 5.0 * (-0.0001_f64).exp());
        for _ in 0..10 {
            advance(ms(1)).await;
            fail(&latency, ms(1));
        }
        near(&latency, 3_600.0);
        fail(&latency, ms(7_200_000));
        near(&latency, 7_200.0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_was_never_asked_is_asked_once() {
        let latency = Latency::default();
        assert!(latency.load(Instant::now(), 0) == 0.0);
        latency.asked(Instant::now());
        assert!((latency.load(Instant::now(), 1) - 0.060).abs() < 1e-9);
    }
}
