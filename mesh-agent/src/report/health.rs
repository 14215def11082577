//! Endpoints that get nothing for a while, and when they come back.

use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use super::Reporter;
use crate::state::snapshot::{Cluster, Endpoint};

/// Series of ejected endpoints.
#[derive(Debug, Default)]
pub(super) struct HealthMetrics {
    ejections: Family<[(&'static str, String); 2], Counter>,
    ejected: Family<[(&'static str, String); 1], Gauge<u64, AtomicU64>>,
}

impl HealthMetrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "mesh_endpoint_ejections",
            "Endpoints ejected by outlier detection, by cluster and reason",
            self.ejections.clone(),
        );
        registry.register(
            "mesh_endpoints_ejected",
            "Endpoints ejected now, by cluster",
            self.ejected.clone(),
        );
    }

    fn count(&self, cluster: &Cluster) {
        let ejected = cluster.endpoints.iter().filter(|endpoint| endpoint.state.health.is_ejected()).count();
        self.ejected.get_or_create(&[("cluster", cluster.name.to_string())]).set(ejected as u64);
    }
}

impl Reporter {
    /// An endpoint gets nothing for a while: `mesh_endpoint_ejections_total`, `mesh_endpoints_ejected`, and a log line.
    pub fn ejected(&self, cluster: &Cluster, endpoint: &Endpoint, reason: &'static str) {
        let labels = [("cluster", cluster.name.to_string()), ("reason", reason.to_owned())];
        self.metrics.health.ejections.get_or_create(&labels).inc();
        self.metrics.health.count(cluster);
        let times = endpoint.state.health.ejections.load(Ordering::Relaxed);
        tracing::info!(cluster = %cluster.name, endpoint = %endpoint.address, reason, times, "endpoint ejected");
    }

    /// An endpoint may be chosen again: `mesh_endpoints_ejected`, and a log line.
    pub fn given_back(&self, cluster: &Cluster, endpoint: &Endpoint) {
        self.metrics.health.count(cluster);
        tracing::info!(cluster = %cluster.name, endpoint = %endpoint.address, "endpoint is back");
    }
}
