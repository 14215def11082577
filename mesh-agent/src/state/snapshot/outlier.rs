//! Outlier detection: what a rule asks for, and what is known of an endpoint's health. When an endpoint is ejected and
//! comes back is `balance/outlier.rs`'s.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

/// Istio's `outlierDetection`, defaults filled in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutlierDetection {
    /// `consecutive5xxErrors`; zero is off.
    pub server_errors: u32,
    /// `consecutiveGatewayErrors` (502, 503, 504); zero is off.
    pub gateway_errors: u32,
    /// `consecutiveLocalOriginFailures`, where `splitExternalLocalOriginErrors` has what was never answered counted apart;
    /// `None` where it counts as a 503.
    pub local_failures: Option<u32>,
    /// `interval`: how often it is looked whether an endpoint may come back.
    pub interval: Duration,
    /// `baseEjectionTime`, which an endpoint is away for, times how often it was lately.
    pub base_ejection_time: Duration,
    /// `maxEjectionPercent` of all endpoints may be away at a time.
    pub max_ejection_percent: u32,
    /// `minHealthPercent`: with fewer left, all are used, healthy or not. Zero: never.
    pub min_health_percent: u32,
    /// `outlierDetectionHttpErrorCodes`: the statuses that are errors, in the place of all from 500 on.
    pub errors: Option<Statuses>,
}

/// A set of HTTP statuses, from 100 to 599.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Statuses([u64; 8]);

impl Statuses {
    /// The smallest and the largest.
    pub const RANGE: std::ops::RangeInclusive<u16> = 100..=599;

    /// Whether it has this one.
    pub fn contains(&self, status: u16) -> bool {
        Self::place(status).is_some_and(|(word, bit)| self.0[word] & bit != 0)
    }

    /// All of them, in order.
    pub fn iter(self) -> impl Iterator<Item = u16> {
        Self::RANGE.filter(move |status| self.contains(*status))
    }

    fn place(status: u16) -> Option<(usize, u64)> {
        let at = Self::RANGE.contains(&status).then(|| status - Self::RANGE.start())?;
        Some((usize::from(at / 64), 1 << (at % 64)))
    }
}

impl FromIterator<u16> for Statuses {
    /// Those of [`Self::RANGE`]; others are in no set.
    fn from_iter<I: IntoIterator<Item = u16>>(statuses: I) -> Self {
        let mut set = Self::default();
        for (word, bit) in statuses.into_iter().filter_map(Self::place) {
            set.0[word] |= bit;
        }
        set
    }
}

/// What is remembered of one endpoint of a cluster.
#[derive(Debug, Default)]
pub struct Health {
    /// Whether it is to get nothing.
    ejected: AtomicBool,
    /// Errors in a row, each kind by itself.
    pub server_errors: AtomicU32,
    /// Of them those of gateways.
    pub gateway_errors: AtomicU32,
    /// Failures in a row to have any answer, where they are counted apart.
    pub local_failures: AtomicU32,
    /// How often it was ejected, less one for each interval that it was well since.
    pub ejections: AtomicU32,
    since: Mutex<Option<Instant>>,
}

impl Health {
    /// Whether it is to get nothing.
    pub fn is_ejected(&self) -> bool {
        self.ejected.load(Ordering::Relaxed)
    }

    /// Since when, while it is ejected.
    pub fn ejected_since(&self) -> Option<Instant> {
        *self.since.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on it is to get nothing. False: it is so already.
    pub fn eject(&self, now: Instant) -> bool {
        let mut since = self.since.lock().unwrap_or_else(PoisonError::into_inner);
        if since.is_some() {
            return false;
        }
        *since = Some(now);
        self.ejections.fetch_add(1, Ordering::Relaxed);
        self.ejected.store(true, Ordering::Relaxed);
        true
    }

    /// It may be chosen again, with nothing held against it but how often it was away.
    pub fn give_back(&self) {
        *self.since.lock().unwrap_or_else(PoisonError::into_inner) = None;
        for errors in [&self.server_errors, &self.gateway_errors, &self.local_failures] {
            errors.store(0, Ordering::Relaxed);
        }
        self.ejected.store(false, Ordering::Relaxed);
    }
}
