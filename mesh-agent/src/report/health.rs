//! Endpoints that get nothing for a while, and when they come back; and who serves in their place.

use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use super::Reporter;
use crate::state::snapshot::{Cluster, Endpoint, Snapshot};

/// Series of ejected endpoints.
#[derive(Debug, Default)]
pub(super) struct HealthMetrics {
    ejections: Family<[(&'static str, String); 2], Counter>,
    ejected: Family<[(&'static str, String); 1], Gauge<u64, AtomicU64>>,
    checks: Family<[(&'static str, String); 2], Counter>,
    unhealthy: Family<[(&'static str, String); 1], Gauge<u64, AtomicU64>>,
    fallbacks: Family<[(&'static str, String); 2], Counter>,
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
        registry.register(
            "mesh_health_checks",
            "Active health checks made, by cluster and result",
            self.checks.clone(),
        );
        registry.register(
            "mesh_endpoints_unhealthy",
            "Endpoints that active health checks find unhealthy now, by cluster",
            self.unhealthy.clone(),
        );
        registry.register(
            "mesh_fallbacks",
            "Tries and connections that another cluster served, as none of its own endpoints could, by cluster and that other",
            self.fallbacks.clone(),
        );
    }

    fn count(&self, cluster: &Cluster) {
        let ejected = cluster.endpoints.iter().filter(|endpoint| endpoint.state.health.is_ejected()).count();
        self.ejected.get_or_create(&[("cluster", cluster.name.to_string())]).set(ejected as u64);
    }
}

impl Reporter {
    /// An endpoint was asked whether it is well: `mesh_health_checks_total`.
    pub fn health_check(&self, cluster: &Cluster, result: &'static str) {
        let labels = [("cluster", cluster.name.to_string()), ("result", result.to_owned())];
        self.metrics.health.checks.get_or_create(&labels).inc();
    }

    /// What is known by the checks of all endpoints: `mesh_endpoints_unhealthy`.
    pub fn checked(&self, snapshot: &Snapshot) {
        let unhealthy = &self.metrics.health.unhealthy;
        unhealthy.clear();
        for port in snapshot.checked.values() {
            let count = port.endpoints().filter(|(_, checked)| checked.is_unhealthy()).count();
            unhealthy.get_or_create(&[("cluster", port.cluster.name.to_string())]).set(count as u64);
        }
    }

    /// What was for one cluster, another serves: `mesh_fallbacks_total`.
    pub fn fell_back(&self, from: &Cluster, to: &Cluster) {
        let labels = [("cluster", from.name.to_string()), ("to", to.name.to_string())];
        self.metrics.health.fallbacks.get_or_create(&labels).inc();
    }

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
