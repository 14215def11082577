//! Active health checks: what a `ServicePolicy` asks for, and what is known by them. When an endpoint goes and comes back is
//! `balance/checks.rs`'s; how it is asked, `proxy/checks.rs`'s.

use std::{
    net::SocketAddr,
    ops::RangeInclusive,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwapOption;
use http::uri::{Authority, PathAndQuery};
use tokio::{sync::Notify, time::Instant};

use super::{Cluster, Endpoint, Workload};

/// `healthCheck` of a `ServicePolicy`, defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthCheck {
    /// How an endpoint is asked.
    pub probe: HealthProbe,
    /// `port` of the pod that is asked; `None`: that of the endpoint.
    pub port: Option<u16>,
    /// `interval` between the end of a check and the next.
    pub interval: Duration,
    /// `timeout`: who has not answered by then has failed.
    pub timeout: Duration,
    /// `jitter`: the interval is so many percent shorter or longer, at random.
    pub jitter_percent: u32,
    /// `unhealthyThreshold`: failures in a row that make an endpoint unhealthy.
    pub unhealthy_threshold: u32,
    /// `healthyThreshold`: successes in a row that make it healthy again.
    pub healthy_threshold: u32,
}

/// How an endpoint is asked whether it is well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HealthProbe {
    /// `http`: a GET that is answered with one of these statuses.
    Http {
        /// Path and query.
        path: PathAndQuery,
        /// The Host header; `None`: the service's name.
        host: Option<Authority>,
        /// Statuses of the healthy.
        statuses: Vec<RangeInclusive<u16>>,
    },
    /// `grpc`: `grpc.health.v1.Health/Check` of this service that says `SERVING`.
    Grpc {
        /// Empty: the server as a whole.
        service: String,
    },
    /// `tcp`: a connection that comes about.
    Tcp,
}

/// What is known of an address by its checks, shared by all clusters that have it.
#[derive(Debug, Default)]
pub struct Checked {
    unhealthy: AtomicBool,
    run: Mutex<Run>,
}

/// How the checks went lately. Its checker alone looks at it.
#[derive(Debug, Default)]
pub struct Run {
    /// Failures in a row.
    pub failures: u32,
    /// Successes in a row.
    pub successes: u32,
    /// When the next is due; `None`: at once, and what it finds holds at once.
    pub due: Option<Instant>,
}

impl Checked {
    /// Whether it is to get nothing.
    pub fn is_unhealthy(&self) -> bool {
        self.unhealthy.load(Ordering::Relaxed)
    }

    /// Says whether it is to get nothing. Whether it was said otherwise before.
    pub fn set_unhealthy(&self, unhealthy: bool) -> bool {
        self.unhealthy.swap(unhealthy, Ordering::Relaxed) != unhealthy
    }

    /// How its checks went lately.
    pub fn run(&self) -> MutexGuard<'_, Run> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether pods of this node use a service's port, and one that has lately: whose identity its checks have.
#[derive(Debug)]
pub struct Use {
    epoch: Instant,
    /// Milliseconds since `epoch`, and one; 0: never.
    at: AtomicU64,
    by: ArcSwapOption<Workload>,
    begun: Notify,
}

impl Default for Use {
    fn default() -> Self {
        Self {
            epoch: Instant::now(),
            at: AtomicU64::new(0),
            by: ArcSwapOption::empty(),
            begun: Notify::new(),
        }
    }
}

impl Use {
    /// How often a use is noted, at most; each time the pod of that moment is kept, so that checks take turns among those
    /// that use the service.
    const NOTED_EVERY: Duration = Duration::from_secs(1);

    /// A pod uses it. Between two notes this reads one number that nobody writes.
    pub fn note(&self, now: Instant, by: impl FnOnce() -> Arc<Workload>) {
        let now = now.saturating_duration_since(self.epoch).as_millis() as u64 + 1;
        let at = self.at.load(Ordering::Relaxed);
        if at != 0 && now < at + Self::NOTED_EVERY.as_millis() as u64 {
            return;
        }
        if self.at.compare_exchange(at, now, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            self.by.store(Some(by()));
            self.begun.notify_one();
        }
    }

    /// When it was used last, and by whom.
    pub fn last(&self) -> Option<(Instant, Arc<Workload>)> {
        let at = self.at.load(Ordering::Relaxed).checked_sub(1)?;
        Some((self.epoch + Duration::from_millis(at), self.by.load_full()?))
    }

    /// Waits for a use that is noted from now on.
    pub async fn noted(&self) {
        self.begun.notified().await;
    }
}

/// A service's port whose endpoints are checked.
#[derive(Debug)]
pub struct CheckedPort {
    /// The whole service's cluster, as everybody sees it.
    pub cluster: Arc<Cluster>,
    /// How.
    pub check: Arc<HealthCheck>,
}

impl CheckedPort {
    /// The endpoints, with what is known of each.
    pub fn endpoints(&self) -> impl Iterator<Item = (&Arc<Endpoint>, &Arc<Checked>)> {
        self.cluster.endpoints.iter().filter_map(|endpoint| Some((endpoint, endpoint.checked.as_ref()?)))
    }

    /// Whether the same is to be done as for another: the same check of the same pods.
    pub fn is_same(&self, other: &Self) -> bool {
        let (one, two) = (&self.cluster, &other.cluster);
        let same = |a: &Endpoint, b: &Endpoint| {
            let workload = match (&a.workload, &b.workload) {
                (Some(a), Some(b)) => Arc::ptr_eq(a, b),
                (a, b) => a.is_none() && b.is_none(),
            };
            let checked = match (&a.checked, &b.checked) {
                (Some(a), Some(b)) => Arc::ptr_eq(a, b),
                (a, b) => a.is_none() && b.is_none(),
            };
            a.address == b.address && workload && checked
        };
        self.check == other.check
            && one.protocol == two.protocol
            && one.connect_timeout == two.connect_timeout
            && one.endpoints.len() == two.endpoints.len()
            && one.endpoints.iter().zip(&two.endpoints).all(|(a, b)| same(a, b))
    }

    /// Where an endpoint is asked.
    pub fn target(&self, endpoint: &Endpoint) -> SocketAddr {
        let port = self.check.port.unwrap_or(endpoint.address.port());
        SocketAddr::new(endpoint.address.ip(), port)
    }
}
