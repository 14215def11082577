//! How long a connection is kept: since its last request, since it was made, and for how many requests.
//!
//! Pure. Tested through `pool.rs` and `slot.rs`.

use std::time::Duration;

use tokio::time::Instant;

use crate::state::snapshot::{ConnectionPool, Idle};

/// How long a connection may wait for its next request (shorter than the 60 s after which many servers close;
/// Envoy waits an hour and meets their resets).
const IDLE: Duration = Duration::from_secs(50);

/// How often it is looked for connections that are kept no longer, at least.
pub(super) const LOOK: Duration = Duration::from_secs(25);

/// The time between two looks, at least.
const AT_LEAST: Duration = Duration::from_millis(10);

/// Until when a connection is kept.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms {
    idle: Option<Duration>,
    lasts: Option<Duration>,
    requests: u32,
}

impl Terms {
    /// As a rule says.
    pub fn of(pool: &ConnectionPool) -> Self {
        let idle = match pool.idle {
            Idle::Default => Some(IDLE),
            Idle::After(idle) => Some(idle),
            Idle::Never => None,
        };
        Self { idle, lasts: pool.max_duration, requests: pool.requests_per_connection.unwrap_or(u32::MAX) }
    }

    /// Whether it takes no more requests, having had so many.
    pub fn is_spent(self, served: u32, made: Instant, now: Instant) -> bool {
        served >= self.requests || self.lasts.is_some_and(|lasts| made + lasts <= now)
    }

    /// When it is closed, unused since then; `None`: never.
    pub fn until(self, unused_since: Instant, made: Instant) -> Option<Instant> {
        let idle = self.idle.map(|idle| unused_since + idle);
        let old = self.lasts.map(|lasts| made + lasts);
        match (idle, old) {
            (Some(idle), Some(old)) => Some(idle.min(old)),
            (one, other) => one.or(other),
        }
    }

    /// The first that one used now may have to be closed, where that is before somebody looks anyway.
    pub fn sooner(self) -> Option<Instant> {
        let idle = self.idle.filter(|idle| *idle < LOOK);
        let soonest = [idle, self.lasts].into_iter().flatten().min()?;
        Some(Instant::now() + soonest.max(AT_LEAST))
    }
}
