//! How long it is waited after failures.
//!
//! Promises that each wait is longer than the one before, up to the most; and that watches of one source do not wait on once one
//! of them is answered again, nor try again sooner than the least. Tested below, and with an API server that refuses in
//! `tests/resuming.rs`.

use std::{sync::Arc, time::Duration};

use kube::runtime::utils::Backoff;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout_at},
};

/// How long it is waited before the next try.
#[derive(Debug, Clone)]
pub struct Retry {
    least: Duration,
    most: Duration,
    next: Duration,
}

impl Retry {
    /// From the first failure on, up to the most.
    pub const fn new(least: Duration, most: Duration) -> Self {
        Self { least, most, next: least }
    }
}

impl Default for Retry {
    /// As client-go has it: 0.8 to 30 seconds.
    fn default() -> Self {
        Self::new(Duration::from_millis(800), Duration::from_secs(30))
    }
}

impl Iterator for Retry {
    type Item = Duration;

    /// Between one and two times what it is: a thousand agents do not come back at the same moment.
    fn next(&mut self) -> Option<Duration> {
        let now = self.next;
        self.next = (now * 2).min(self.most);
        Some(now.mul_f64(1.0 + fastrand::f64()))
    }
}

impl Backoff for Retry {
    fn reset(&mut self) {
        self.next = self.least;
    }
}

/// The waits of a watch. Clones know of each other: once one is answered again, the others need not wait.
#[derive(Debug, Clone)]
pub(super) struct Waits {
    retry: Retry,
    /// There was no answer since this one waited.
    failing: bool,
    /// Changes when one of them is answered again.
    back: Arc<watch::Sender<()>>,
    seen: watch::Receiver<()>,
}

impl From<Retry> for Waits {
    fn from(retry: Retry) -> Self {
        let (back, seen) = watch::channel(());
        Self { retry, failing: false, back: Arc::new(back), seen }
    }
}

impl Waits {
    /// Until the next try is due: never sooner than the least, or two that are answered in turn would not let each other rest.
    pub async fn wait(&mut self) {
        self.failing = true;
        let (now, least) = (Instant::now(), self.retry.least);
        let time = self.retry.next().unwrap_or(self.retry.most);
        sleep_until(now + least.min(time)).await;
        // Either is what it waits for; the sender is here.
        let _ = timeout_at(now + time, self.seen.changed()).await;
    }

    /// There was an answer.
    pub fn answered(&mut self) {
        if std::mem::take(&mut self.failing) {
            self.retry.reset();
            self.back.send_replace(());
            self.seen.mark_unchanged();
        }
    }

    /// The same pace, for something else.
    pub fn pace(&self) -> Retry {
        Retry { next: self.retry.least, ..self.retry }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_wait_is_longer_than_the_one_before_up_to_the_most() {
        let (least, most) = (Duration::from_millis(100), Duration::from_secs(1));
        let mut retry = Retry::new(least, most);
        for base in [100, 200, 400, 800, 1000, 1000].map(Duration::from_millis) {
            let wait = retry.next().unwrap_or_default();
            assert!(wait >= base && wait <= base * 2, "{wait:?} for {base:?}");
        }
        retry.reset();
        assert!(retry.next().is_some_and(|wait| wait <= least * 2));
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_on_once_another_is_answered() {
        let (least, hour) = (Duration::from_secs(1), Duration::from_hours(1));
        let long = Retry { next: hour, ..Retry::new(least, hour) };
        let mut one = Waits::from(long.clone());
        let (mut waiting, mut late) = (one.clone(), one.clone());
        let began = Instant::now();
        // An answer of who had not failed is no news.
        one.answered();
        one.failing = true;
        tokio::join!(waiting.wait(), async {
            tokio::time::sleep(least * 2).await;
            one.answered();
        });
        assert_eq!(began.elapsed(), least * 2);
        // Who was asking at that moment hears of it too, and each hears of it once.
        late.wait().await;
        assert_eq!(began.elapsed(), least * 3);
        assert_eq!(one.retry.next, least);
        for waits in [one, waiting, late] {
            let mut waits = Waits { retry: long.clone(), ..waits };
            let began = Instant::now();
            waits.wait().await;
            assert!(began.elapsed() >= hour);
        }
    }
}
