//! What a pod's port takes: rate limits and adaptive concurrency, and what is remembered for them from snapshot to snapshot.
//! What they let in is `limit/`'s to say.

use std::{
    collections::HashMap,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::time::Instant;

use super::StringMatch;
use crate::identity::SpiffeId;

/// What requests to one port of one pod are held to.
#[derive(Debug)]
pub struct Guard {
    /// Host name of the service whose policy it is.
    pub service: Arc<str>,
    /// In the order in which they are asked.
    pub limits: Vec<RateLimit>,
    /// How many requests may be under way.
    pub concurrency: Option<Concurrency>,
}

/// One of `rateLimits`.
#[derive(Debug)]
pub struct RateLimit {
    /// What it says.
    pub rule: Arc<RateRule>,
    /// Carried over from the snapshot before.
    pub buckets: Arc<Buckets>,
}

/// What a rate limit says.
#[derive(Debug, Clone)]
pub struct RateRule {
    /// `name`, as metrics and logs call it.
    pub name: Arc<str>,
    /// `requests` in each `per`.
    pub requests: u32,
    /// `per`.
    pub per: Duration,
    /// `burst`: so many at once after a while without any.
    pub burst: u32,
    /// Whether each source has them for itself, else all share them.
    pub each_source: bool,
    /// `paths` that it is about; none: all.
    pub paths: Vec<StringMatch>,
    /// `methods` that it is about; none: all.
    pub methods: Vec<http::Method>,
}

/// The buckets of one rate limit at one port of a pod.
#[derive(Debug)]
pub struct Buckets {
    /// What the times in buckets count from.
    pub epoch: Instant,
    /// Of all who share, and of those that have proved no identity.
    pub shared: Bucket,
    /// By identity; swapped as a whole when a new one comes, so that reading takes no lock.
    pub by_source: ArcSwap<HashMap<SpiffeId, Arc<Bucket>>>,
}

impl Default for Buckets {
    fn default() -> Self {
        Self { epoch: Instant::now(), shared: Bucket::default(), by_source: ArcSwap::default() }
    }
}

/// When the bucket is full again, in nanoseconds since the epoch: the "theoretical arrival time" of the generic cell rate
/// algorithm (ITU-T I.371), which is all that a token bucket has to remember.
#[derive(Debug, Default)]
pub struct Bucket(pub AtomicU64);

/// `adaptiveConcurrency` with what is remembered for it.
#[derive(Debug)]
pub struct Concurrency {
    /// What it says.
    pub rule: ConcurrencyRule,
    /// Carried over from the snapshot before.
    pub state: Arc<ConcurrencyState>,
}

/// `adaptiveConcurrency` of a `ServicePolicy`, defaults filled in: Envoy's gradient controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConcurrencyRule {
    /// `percentile` of the latencies of a window that stands for it (`sample_aggregate_percentile`).
    pub percentile: u32,
    /// `maxConcurrency` (`max_concurrency_limit`).
    pub max: u32,
    /// `minConcurrency`, which holds while the least latency is measured (`min_concurrency`).
    pub min: u32,
    /// `updateInterval` (`concurrency_update_interval`).
    pub update_interval: Duration,
    /// `minRTT.interval` from one measurement of the least latency to the next (`min_rtt_calc_params.interval`).
    pub min_rtt_interval: Duration,
    /// `minRTT.requests` of one measurement (`request_count`).
    pub min_rtt_requests: u32,
    /// `minRTT.jitter`: the interval is up to so many percent longer (`jitter`).
    pub jitter_percent: u32,
    /// `minRTT.buffer`: so many percent above the least latency are no sign of a queue (`buffer`).
    pub buffer_percent: u32,
}

/// What is remembered of the latencies of one port of a pod.
#[derive(Debug)]
pub struct ConcurrencyState {
    /// What the times count from.
    pub epoch: Instant,
    /// Requests under way.
    pub under_way: AtomicU32,
    /// How many may be; 0: before the first request.
    pub limit: AtomicU32,
    /// The limit that metrics have been told last.
    pub told: AtomicU32,
    /// What the limit was before the least latency began to be measured.
    pub deferred: AtomicU32,
    /// Windows in a row in which the limit was at its least.
    pub at_least: AtomicU32,
    /// The least latency, in nanoseconds; 0: not known.
    pub min_rtt: AtomicU64,
    /// Whether it is being measured.
    pub measuring: AtomicBool,
    /// Counts measurements: a sample of a request that began before this one is none of it.
    pub epochs: AtomicU32,
    /// When it is measured again, in nanoseconds.
    pub next_measure: AtomicU64,
    /// When the limit is looked at again, in nanoseconds.
    pub next_update: AtomicU64,
    /// Whether somebody is at it.
    pub updating: AtomicBool,
    /// Latencies of the window; made when there are any.
    pub window: OnceLock<Box<[AtomicU32]>>,
    /// Latencies in the window.
    pub samples: AtomicU32,
}

impl Default for ConcurrencyState {
    fn default() -> Self {
        Self {
            epoch: Instant::now(),
            under_way: AtomicU32::new(0),
            limit: AtomicU32::new(0),
            told: AtomicU32::new(0),
            deferred: AtomicU32::new(0),
            at_least: AtomicU32::new(0),
            min_rtt: AtomicU64::new(0),
            measuring: AtomicBool::new(false),
            epochs: AtomicU32::new(0),
            next_measure: AtomicU64::new(0),
            next_update: AtomicU64::new(0),
            updating: AtomicBool::new(false),
            window: OnceLock::new(),
            samples: AtomicU32::new(0),
        }
    }
}
