//! What may be told only so often: lines of which there may be more than anybody wants to read.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// Time between two of them.
const EVERY: Duration = Duration::from_millis(100);

/// Says no to all that comes too soon after what it has said yes to.
#[derive(Debug)]
pub(super) struct Seldom {
    start: Instant,
    /// Milliseconds after the start.
    next: AtomicU64,
}

impl Default for Seldom {
    fn default() -> Self {
        Self { start: Instant::now(), next: AtomicU64::new(0) }
    }
}

impl Seldom {
    /// Whether it may be told now; of those who ask at the same time one may.
    pub fn may(&self) -> bool {
        self.may_at(self.start.elapsed())
    }

    fn may_at(&self, since: Duration) -> bool {
        let (now, next) = (since.as_millis() as u64, self.next.load(Relaxed));
        let then = now + EVERY.as_millis() as u64;
        now >= next && self.next.compare_exchange(next, then, Relaxed, Relaxed).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_may_and_then_one_in_each_time() {
        let seldom = Seldom::default();
        let may = |millis| seldom.may_at(Duration::from_millis(millis));
        assert!(may(0) && !may(0) && !may(99));
        assert!(may(100) && !may(150));
        assert!(may(5000) && !may(5099) && may(5100));
    }
}
