//! What rate limits and adaptive concurrency refuse, and how many requests the latter lets in.

use std::{net::SocketAddr, sync::atomic::AtomicU64};

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use super::Reporter;

/// Their series.
#[derive(Debug, Default)]
pub(super) struct LimitMetrics {
    rate_limited: Family<[(&'static str, String); 2], Counter>,
    concurrency_refused: Family<[(&'static str, String); 1], Counter>,
    concurrency_limit: Family<[(&'static str, String); 2], Gauge<u64, AtomicU64>>,
}

impl LimitMetrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "mesh_rate_limited_requests",
            "Requests refused by rate limits, by service and limit",
            self.rate_limited.clone(),
        );
        registry.register(
            "mesh_concurrency_refused_requests",
            "Requests refused by adaptive concurrency, by service",
            self.concurrency_refused.clone(),
        );
        registry.register(
            "mesh_concurrency_limit",
            "Requests that adaptive concurrency lets in at a time, by service and address of the app",
            self.concurrency_limit.clone(),
        );
    }
}

impl Reporter {
    /// A request was refused by this limit: `mesh_rate_limited_requests_total`.
    pub fn rate_limited(&self, service: &str, limit: &str) {
        let labels = [("service", service.to_owned()), ("limit", limit.to_owned())];
        self.metrics.limits.rate_limited.get_or_create(&labels).inc();
    }

    /// A request was refused because too many are under way: `mesh_concurrency_refused_requests_total`.
    pub fn concurrency_refused(&self, service: &str) {
        self.metrics.limits.concurrency_refused.get_or_create(&[("service", service.to_owned())]).inc();
    }

    /// So many may be under way from now on: `mesh_concurrency_limit`.
    pub fn concurrency_limit(&self, service: &str, app: SocketAddr, limit: u32) {
        let labels = [("service", service.to_owned()), ("app", app.to_string())];
        self.metrics.limits.concurrency_limit.get_or_create(&labels).set(limit.into());
    }
}
