//! Adaptive concurrency: how many requests may be under way at a pod's port, learnt from how long they take. Envoy's
//! gradient controller.
//!
//! Now and then so few requests are let in (`minConcurrency`) that none waits for another: how long those take is the least
//! latency. In between, each window of time compares the latencies that it has seen with it: where they are no longer (within
//! the buffer) the limit grows by its square root, where they are longer, it shrinks by as much as they are, to a half at
//! most. Promises that asking costs a few atomic operations, and that no task or timer runs for it: the first request after
//! the end of a window closes it. Tested below on a paused clock; in the lab by `tests/tests/adaptive_concurrency.rs`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::time::Instant;

use crate::state::snapshot::{ConcurrencyRule, ConcurrencyState};

/// Windows in a row with the limit at its least, after which the least latency is measured anew: it may have grown (Envoy).
const AT_LEAST: u32 = 5;

/// A window changes the limit to a half or to twice as much, at most (Envoy).
const GRADIENTS: (f64, f64) = (0.5, 2.0);

/// Latencies are counted in classes, so many to each doubling: a class is 3 % wide.
const CLASSES: u32 = 32;

/// Doublings, from 1 µs on: an hour has room.
const DOUBLINGS: u32 = 32;

/// A request that was let in; it counts as under way until this is dropped.
#[derive(Debug)]
pub struct Admitted {
    state: Arc<ConcurrencyState>,
    rule: ConcurrencyRule,
    begun: Instant,
    /// The measurement of the least latency in which it was let in.
    epoch: u32,
}

/// Lets one more request in.
///
/// # Errors
/// How many may be under way, where as many are.
pub fn admit(rule: &ConcurrencyRule, state: &Arc<ConcurrencyState>, now: Instant) -> Result<Admitted, u32> {
    turn(rule, state, nanos(state, now), fastrand::f64);
    let limit = state.limit.load(Relaxed);
    let place = |under_way: u32| (under_way < limit).then_some(under_way + 1);
    state.under_way.fetch_update(Relaxed, Relaxed, place).map_err(|_| limit)?;
    let epoch = state.epochs.load(Relaxed);
    Ok(Admitted { state: Arc::clone(state), rule: *rule, begun: now, epoch })
}

impl Admitted {
    /// Its response is whole: how long that took tells of the port. How many may be under way, where that has changed since
    /// it was last returned.
    pub fn finished(&self) -> Option<u32> {
        let (state, now) = (&*self.state, Instant::now());
        let measuring = state.measuring.load(Relaxed);
        // What was let in when more were allowed does not tell how long one takes that waits for none.
        if measuring && self.epoch != state.epochs.load(Relaxed) {
            return None;
        }
        let latency = now.saturating_duration_since(self.begun);
        if let Some(class) = window(state).get(class(latency)) {
            class.fetch_add(1, Relaxed);
            state.samples.fetch_add(1, Relaxed);
        }
        turn(&self.rule, state, nanos(state, now), fastrand::f64);
        let limit = state.limit.load(Relaxed);
        // Read first: as a rule it is the same.
        (state.told.load(Relaxed) != limit && state.told.swap(limit, Relaxed) != limit).then_some(limit)
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.state.under_way.fetch_sub(1, Relaxed);
    }
}

fn nanos(state: &ConcurrencyState, now: Instant) -> u64 {
    // 0 is kept for what is not known.
    now.saturating_duration_since(state.epoch).as_nanos() as u64 + 1
}

/// Does what is due: closes a window, begins or ends a measurement. Whoever comes while another is at it goes on.
fn turn(rule: &ConcurrencyRule, state: &ConcurrencyState, now: u64, random: impl Fn() -> f64) {
    let is_due = || {
        state.limit.load(Relaxed) == 0
            || if state.measuring.load(Relaxed) {
                state.samples.load(Relaxed) >= rule.min_rtt_requests
            } else {
                now >= state.next_measure.load(Relaxed) || now >= state.next_update.load(Relaxed)
            }
    };
    if !is_due() || state.updating.swap(true, std::sync::atomic::Ordering::Acquire) {
        return;
    }
    // Another may have done it in between.
    if is_due() {
        if state.limit.load(Relaxed) == 0 {
            state.deferred.store(rule.min, Relaxed);
            measure(rule, state);
        } else if state.measuring.load(Relaxed) {
            measured(rule, state, now, random());
        } else if now >= state.next_measure.load(Relaxed) {
            state.deferred.store(state.limit.load(Relaxed), Relaxed);
            measure(rule, state);
        } else {
            update(rule, state, now);
        }
    }
    state.updating.store(false, std::sync::atomic::Ordering::Release);
}

/// Begins to measure the least latency.
fn measure(rule: &ConcurrencyRule, state: &ConcurrencyState) {
    drain(state, rule.percentile);
    state.epochs.fetch_add(1, Relaxed);
    state.limit.store(rule.min, Relaxed);
    state.measuring.store(true, Relaxed);
}

/// The least latency is known: the limit is what it was before.
fn measured(rule: &ConcurrencyRule, state: &ConcurrencyState, now: u64, random: f64) {
    if let Some(latency) = drain(state, rule.percentile) {
        state.min_rtt.store(latency.as_nanos() as u64, Relaxed);
    }
    let before = state.deferred.load(Relaxed).clamp(rule.min, rule.max);
    state.limit.store(before, Relaxed);
    state.at_least.store(0, Relaxed);
    let jitter = f64::from(rule.jitter_percent) / 100.0 * random;
    let pause = rule.min_rtt_interval.mul_f64(1.0 + jitter).as_nanos() as u64;
    state.next_measure.store(now + pause, Relaxed);
    state.next_update.store(now + rule.update_interval.as_nanos() as u64, Relaxed);
    state.measuring.store(false, Relaxed);
}

/// A window is over: the limit follows what it has seen.
fn update(rule: &ConcurrencyRule, state: &ConcurrencyState, now: u64) {
    state.next_update.store(now + rule.update_interval.as_nanos() as u64, Relaxed);
    let Some(latency) = drain(state, rule.percentile) else { return };
    let least = Duration::from_nanos(state.min_rtt.load(Relaxed));
    let limit = next(rule, state.limit.load(Relaxed), least, latency);
    state.limit.store(limit, Relaxed);
    if limit > rule.min {
        state.at_least.store(0, Relaxed);
    } else if state.at_least.fetch_add(1, Relaxed) + 1 >= AT_LEAST {
        state.next_measure.store(now, Relaxed);
    }
}

/// The limit after one in whose window requests took so long.
fn next(rule: &ConcurrencyRule, limit: u32, least: Duration, latency: Duration) -> u32 {
    let expected = least.as_secs_f64() * (1.0 + f64::from(rule.buffer_percent) / 100.0);
    let gradient = (expected / latency.as_secs_f64().max(1e-9)).clamp(GRADIENTS.0, GRADIENTS.1);
    let limit = f64::from(limit) * gradient;
    ((limit + limit.sqrt()) as u32).clamp(rule.min, rule.max)
}

fn window(state: &ConcurrencyState) -> &[AtomicU32] {
    state.window.get_or_init(|| (0..CLASSES * DOUBLINGS).map(|_| AtomicU32::new(0)).collect())
}

/// The class of a latency: which doubling of a microsecond it is in, and where in that.
fn class(latency: Duration) -> usize {
    let micros = (latency.as_micros() as u64).max(1);
    let doubling = micros.ilog2();
    let within = if doubling >= CLASSES.ilog2() {
        (micros >> (doubling - CLASSES.ilog2())) as u32 - CLASSES
    } else {
        ((micros as u32) << (CLASSES.ilog2() - doubling)) - CLASSES
    };
    (doubling * CLASSES + within).min(CLASSES * DOUBLINGS - 1) as usize
}

/// The shortest latency of a class.
fn shortest(class: usize) -> Duration {
    let (doubling, within) = (class as u32 / CLASSES, class as u64 % u64::from(CLASSES));
    let nanos = 1_000 * (u64::from(CLASSES) + within);
    Duration::from_nanos((nanos << doubling) / u64::from(CLASSES))
}

/// Empties the window. The latency that so many percent of it do not exceed; `None`: there was none.
fn drain(state: &ConcurrencyState, percentile: u32) -> Option<Duration> {
    let window = state.window.get()?;
    state.samples.store(0, Relaxed);
    let counts: Vec<u64> = window.iter().map(|class| class.swap(0, Relaxed).into()).collect();
    let all: u64 = counts.iter().sum();
    let rank = (all * u64::from(percentile)).div_ceil(100).max(1);
    let mut below = 0;
    let place = counts.iter().position(|count| {
        below += count;
        below >= rank
    });
    place.filter(|_| all > 0).map(shortest)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use tokio::{task::JoinSet, time::sleep};

    use super::*;
    use crate::state::defaults;

    fn rule() -> ConcurrencyRule {
        ConcurrencyRule {
            min_rtt_requests: 20,
            min_rtt_interval: Duration::from_secs(10),
            jitter_percent: 0,
            max: 200,
            ..defaults::ADAPTIVE_CONCURRENCY
        }
    }

    #[test]
    fn classes_are_in_order_and_three_percent_wide() {
        let mut last = 0;
        for micros in [1, 2, 3, 31, 32, 33, 100, 999, 10_000, 123_456, 3_600_000_000] {
            let (latency, place) = (Duration::from_micros(micros), class(Duration::from_micros(micros)));
            assert!(place >= last, "{micros}");
            let (low, high) = (shortest(place), shortest(place + 1));
            assert!(low <= latency && latency < high, "{micros} is not in {low:?}..{high:?}");
            assert!(high.as_secs_f64() / low.as_secs_f64() < 1.04, "{micros}");
            last = place;
        }
        assert_eq!(class(Duration::ZERO), 0);
        assert_eq!(class(Duration::from_hours(10_000)), (CLASSES * DOUBLINGS - 1) as usize);
    }

    #[test]
    fn the_limit_follows_the_gradient() {
        let ms = Duration::from_millis;
        let next = |limit, least, latency| next(&rule(), limit, ms(least), ms(latency));
        // No longer than the least and its buffer of a quarter: it grows by a quarter of slack, and its root.
        assert_eq!(next(100, 10, 10), 136);
        assert_eq!(next(100, 100, 125), 110);
        assert_eq!(next(100, 100, 250), 57, "half as fast: half as many, and the root");
        assert_eq!(next(100, 10, 10_000), 57, "a half at most");
        assert_eq!(next(64, 10, 1), 139, "twice as many at most");
        assert_eq!(next(190, 10, 1), 200);
        assert_eq!(next(3, 10, 10_000), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn the_percentile_is_what_so_many_do_not_exceed() {
        let state = Arc::new(ConcurrencyState::default());
        let fill = || {
            for ms in 1..=100 {
                window(&state)[class(Duration::from_millis(ms))].fetch_add(1, Relaxed);
            }
        };
        for (percentile, ms) in [(50, 50.0), (90, 90.0), (100, 100.0), (0, 1.0)] {
            fill();
            let found = drain(&state, percentile).unwrap().as_secs_f64() * 1_000.0;
            assert!((found / ms - 1.0).abs() < 0.04, "{percentile}: {found}");
        }
        assert_eq!(drain(&state, 50), None, "the window is empty");
    }

    /// A server of so many workers, each of whom a request takes for so long; what finds none waits.
    struct Server {
        workers: tokio::sync::Semaphore,
        takes: Duration,
    }

    /// Clients that ask it all the time, each anew after its answer or a pause; until this moment. How many were refused.
    async fn load(
        state: &Arc<ConcurrencyState>,
        rule: ConcurrencyRule,
        server: &Arc<Server>,
        clients: u32,
        lasts: Duration,
    ) -> u32 {
        let end = Instant::now() + lasts;
        let refused = Arc::new(AtomicU32::new(0));
        let mut all = JoinSet::new();
        for _ in 0..clients {
            let (state, server, refused) = (Arc::clone(state), Arc::clone(server), Arc::clone(&refused));
            all.spawn(async move {
                while Instant::now() < end {
                    let Ok(admitted) = admit(&rule, &state, Instant::now()) else {
                        refused.fetch_add(1, Relaxed);
                        sleep(Duration::from_millis(5)).await;
                        continue;
                    };
                    let worker = server.workers.acquire().await.unwrap();
                    sleep(server.takes).await;
                    drop(worker);
                    admitted.finished();
                }
            });
        }
        while all.join_next().await.is_some() {}
        refused.load(Relaxed)
    }

    fn server(workers: usize) -> Arc<Server> {
        Arc::new(Server { workers: tokio::sync::Semaphore::new(workers), takes: Duration::from_millis(20) })
    }

    #[tokio::test(start_paused = true)]
    async fn it_measures_first_and_then_lets_in_what_the_server_can_do() {
        let (state, rule, server) = (Arc::new(ConcurrencyState::default()), rule(), server(30));
        let first = admit(&rule, &state, Instant::now()).unwrap();
        assert_eq!((state.limit.load(Relaxed), state.measuring.load(Relaxed)), (3, true));
        drop(first);
        assert_eq!(state.samples.load(Relaxed), 0, "what is broken off tells nothing");
        let refused = load(&state, rule, &server, 100, Duration::from_secs(8)).await;
        let least = Duration::from_nanos(state.min_rtt.load(Relaxed));
        assert!(least > Duration::from_millis(19) && least < Duration::from_millis(21), "{least:?}");
        let limit = state.limit.load(Relaxed);
        assert!((25..60).contains(&limit), "30 workers, and a limit of {limit}");
        assert!(refused > 1_000, "{refused}: a hundred clients are more than that");
        assert_eq!(state.under_way.load(Relaxed), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn it_grows_for_a_server_that_keeps_up_and_to_no_more_than_allowed() {
        let (state, rule, server) = (Arc::new(ConcurrencyState::default()), rule(), server(10_000));
        load(&state, rule, &server, 300, Duration::from_secs(8)).await;
        assert_eq!((state.limit.load(Relaxed), state.told.load(Relaxed)), (rule.max, rule.max));
    }

    #[tokio::test(start_paused = true)]
    async fn the_least_latency_is_measured_anew_and_the_limit_kept() {
        let (state, rule, server) = (Arc::new(ConcurrencyState::default()), rule(), server(10_000));
        load(&state, rule, &server, 50, Duration::from_secs(5)).await;
        let (epochs, limit) = (state.epochs.load(Relaxed), state.limit.load(Relaxed));
        assert_eq!(epochs, 1);
        // Ten seconds after the first.
        sleep(Duration::from_secs(6)).await;
        let probe = admit(&rule, &state, Instant::now()).unwrap();
        assert_eq!((state.epochs.load(Relaxed), state.limit.load(Relaxed)), (2, rule.min));
        drop(probe);
        load(&state, rule, &server, 50, Duration::from_secs(1)).await;
        assert!(!state.measuring.load(Relaxed) && state.limit.load(Relaxed) >= limit);
        let due = state.next_measure.load(Relaxed);
        assert!(due > nanos(&state, Instant::now() + Duration::from_secs(8)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_limit_that_stays_at_its_least_has_the_latency_measured_anew() {
        let (state, rule, quick) = (Arc::new(ConcurrencyState::default()), rule(), server(10_000));
        load(&state, rule, &quick, 10, Duration::from_secs(2)).await;
        // From now on each takes ten times as long: that is no queue, but the limit cannot know.
        let slow = Arc::new(Server {
            workers: tokio::sync::Semaphore::new(10_000),
            takes: Duration::from_millis(200),
        });
        load(&state, rule, &slow, 10, Duration::from_secs(6)).await;
        assert!(state.epochs.load(Relaxed) >= 2);
        let least = Duration::from_nanos(state.min_rtt.load(Relaxed));
        assert!(least > Duration::from_millis(190), "{least:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_let_in_before_a_measurement_is_none_of_it() {
        let (state, rule) = (Arc::new(ConcurrencyState::default()), rule());
        let before = admit(&rule, &state, Instant::now()).unwrap();
        state.epochs.fetch_add(1, Relaxed);
        sleep(Duration::from_secs(1)).await;
        before.finished();
        assert_eq!(state.samples.load(Relaxed), 0);
    }

    #[test]
    fn no_more_are_let_in_than_may_be_however_many_ask_at_once() {
        let state = Arc::new(ConcurrencyState::default());
        let rule = ConcurrencyRule { min: 7, ..rule() };
        let admitted: Vec<_> = std::thread::scope(|scope| {
            let ask =
                || (0..100).filter_map(|_| admit(&rule, &state, Instant::now()).ok()).collect::<Vec<_>>();
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(ask)).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!((admitted.len(), state.under_way.load(Relaxed)), (7, 7));
        drop(admitted);
        assert_eq!(state.under_way.load(Relaxed), 0);
    }
}
