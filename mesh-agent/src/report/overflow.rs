//! What was refused because the `connectionPool` of its destination allows no more.

use prometheus_client::{
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

use super::Reporter;
use crate::{error::Limit, state::snapshot::Cluster};

/// Series of what was refused.
#[derive(Debug, Default)]
pub(super) struct OverflowMetrics {
    refused: Family<[(&'static str, String); 2], Counter>,
}

impl OverflowMetrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "mesh_upstream_overflow",
            "Requests and connections refused because the connectionPool of their cluster allows no more, by its limit",
            self.refused.clone(),
        );
    }
}

impl Reporter {
    /// A request or connection to this cluster was refused: `mesh_upstream_overflow_total`.
    pub fn overflowed(&self, cluster: &Cluster, limit: Limit) {
        let labels = [("cluster", cluster.name.to_string()), ("limit", limit.word().to_owned())];
        self.metrics.overflow.refused.get_or_create(&labels).inc();
    }
}
