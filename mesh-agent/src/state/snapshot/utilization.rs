//! Shares by how busy endpoints say they are (`loadBalancer.backendUtilization`): what each has reported, and how that compares
//! with the others.
//!
//! Promises that learning and asking cost a few atomic operations and never a lock, but for one choice in each
//! `weightUpdatePeriod`, which looks at all endpoints. Reports are read in `balance/load_report.rs`. Tested below on a paused
//! clock; shares in `balance/distribution.rs`.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::time::Instant;

use super::Endpoint;

/// The most that an endpoint may get, in times of the average (gRPC's `weighted_round_robin`): one that reports to do next to
/// nothing is not sent everything.
const MOST: f64 = 10.0;

/// The least: one that gets nothing would have nothing to report either (gRPC).
const LEAST: f64 = 0.1;

/// `loadBalancer.backendUtilization`.
#[derive(Debug, Clone, PartialEq)]
pub struct UtilizationRule {
    /// `blackoutPeriod`: for how long an endpoint has to have reported before it is believed.
    pub blackout: Duration,
    /// `weightExpirationPeriod`: for how long its last report is believed.
    pub expiration: Duration,
    /// `weightUpdatePeriod`: how often endpoints are compared.
    pub update: Duration,
    /// `errorUtilizationPenalty`: how much busier an endpoint counts as for errors, times their share.
    pub penalty: f64,
    /// `metricNamesForComputingUtilization`, in this order; where an endpoint reports no `application_utilization`.
    pub metrics: Arc<[Metric]>,
}

/// One of the figures of a report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Metric {
    /// `cpu_utilization`.
    Cpu,
    /// `mem_utilization`.
    Memory,
    /// `application_utilization`.
    Application,
    /// `utilization.NAME`.
    Utilization(String),
    /// `named_metrics.NAME`.
    Named(String),
}

/// What one endpoint has reported: how many requests it does for so much of itself.
#[derive(Debug, Default)]
pub struct Reported(OnceLock<Box<Reports>>);

#[derive(Debug)]
struct Reports {
    made: Instant,
    /// The bits of an `f64`.
    weight: AtomicU64,
    /// Nanoseconds since `made`: the first report, and the last one.
    first: AtomicU64,
    last: AtomicU64,
}

impl Reports {
    fn new(now: Instant, weight: f64) -> Self {
        let weight = AtomicU64::new(weight.to_bits());
        Self { made: now, weight, first: AtomicU64::new(0), last: AtomicU64::new(0) }
    }
}

impl Reported {
    /// It has reported something that comes to this weight.
    pub fn report(&self, rule: &UtilizationRule, now: Instant, weight: f64) {
        let reports = self.0.get_or_init(|| Box::new(Reports::new(now, weight)));
        let nanos = nanos(reports.made, now);
        let last = reports.last.swap(nanos, Relaxed);
        if Duration::from_nanos(nanos.saturating_sub(last)) >= rule.expiration {
            reports.first.store(nanos, Relaxed);
        }
        reports.weight.store(weight.to_bits(), Relaxed);
    }

    /// What is believed of it now.
    pub fn weight(&self, rule: &UtilizationRule, now: Instant) -> Option<f64> {
        let reports = self.0.get()?;
        let since =
            |at: &AtomicU64| Duration::from_nanos(nanos(reports.made, now).saturating_sub(at.load(Relaxed)));
        let is_believed = since(&reports.last) < rule.expiration && since(&reports.first) >= rule.blackout;
        is_believed.then(|| f64::from_bits(reports.weight.load(Relaxed)))
    }
}

/// What the endpoints of a cluster come to together.
#[derive(Debug)]
pub struct Scale {
    made: Instant,
    /// Nanoseconds since `made`: when they are compared next.
    next: AtomicU64,
    /// The largest weight and the average one, as the bits of `f64`; 0 where nothing is known.
    most: AtomicU64,
    average: AtomicU64,
}

impl Default for Scale {
    fn default() -> Self {
        Self {
            made: Instant::now(),
            next: AtomicU64::new(0),
            most: AtomicU64::new(0),
            average: AtomicU64::new(0),
        }
    }
}

impl Scale {
    /// How much of its turns an endpoint of these, all that may be chosen, is to get, from 0 to 1: one that has reported nothing counts as average, and
    /// all are alike as long as fewer than two have (as in gRPC).
    pub fn factor<'e>(
        &self,
        rule: &UtilizationRule,
        now: Instant,
        endpoint: &Endpoint,
        all: impl Iterator<Item = &'e Endpoint>,
    ) -> f64 {
        self.bring_up_to_date(rule, now, all);
        let [most, average] = [&self.most, &self.average].map(|at| f64::from_bits(at.load(Relaxed)));
        if most <= 0.0 {
            return 1.0;
        }
        let weight = endpoint.state.reported.weight(rule, now).unwrap_or(average);
        weight.max(average * LEAST) / most
    }

    fn bring_up_to_date<'e>(
        &self,
        rule: &UtilizationRule,
        now: Instant,
        all: impl Iterator<Item = &'e Endpoint>,
    ) {
        let (now_nanos, due) = (nanos(self.made, now), self.next.load(Relaxed));
        let next = now_nanos.saturating_add(u64::try_from(rule.update.as_nanos()).unwrap_or(u64::MAX));
        // Whoever sees it first does it; the others go by what there is.
        if now_nanos < due || self.next.compare_exchange(due, next, Relaxed, Relaxed).is_err() {
            return;
        }
        let weights = all.filter_map(|endpoint| endpoint.state.reported.weight(rule, now));
        let (mut count, mut sum, mut most) = (0_u32, 0.0, 0.0_f64);
        for weight in weights {
            (count, sum, most) = (count + 1, sum + weight, most.max(weight));
        }
        let average = sum / f64::from(count.max(1));
        let (average, most) = if count < 2 { (0.0, 0.0) } else { (average, most.min(average * MOST)) };
        self.average.store(average.to_bits(), Relaxed);
        self.most.store(most.to_bits(), Relaxed);
    }
}

fn nanos(from: Instant, to: Instant) -> u64 {
    u64::try_from(to.saturating_duration_since(from).as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;
    use crate::state::defaults;

    #[tokio::test(start_paused = true)]
    async fn reports_are_believed_after_a_while_and_for_a_while() {
        let rule = UtilizationRule {
            blackout: Duration::from_secs(10),
            expiration: Duration::from_mins(3),
            ..defaults::backend_utilization()
        };
        let reported = Reported::default();
        assert_eq!(reported.weight(&rule, Instant::now()), None);
        reported.report(&rule, Instant::now(), 3.0);
        advance(Duration::from_secs(9)).await;
        reported.report(&rule, Instant::now(), 4.0);
        assert_eq!(reported.weight(&rule, Instant::now()), None, "in the blackout period");
        advance(Duration::from_secs(1)).await;
        assert_eq!(reported.weight(&rule, Instant::now()), Some(4.0));
        reported.report(&rule, Instant::now(), 5.0);
        advance(Duration::from_secs(179)).await;
        assert_eq!(reported.weight(&rule, Instant::now()), Some(5.0));
        advance(Duration::from_secs(1)).await;
        assert_eq!(reported.weight(&rule, Instant::now()), None, "it has expired");
        reported.report(&rule, Instant::now(), 6.0);
        advance(Duration::from_secs(9)).await;
        assert_eq!(reported.weight(&rule, Instant::now()), None, "the blackout period begins anew");
        advance(Duration::from_secs(1)).await;
        assert_eq!(reported.weight(&rule, Instant::now()), Some(6.0));
    }
}
