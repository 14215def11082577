//! What `ServicePolicies` come to, and what is known by it now.

use std::{collections::BTreeMap, sync::atomic::Ordering::Relaxed};

use serde_json::{Value, json};

use super::{ms, string_match};
use crate::state::snapshot::{
    CheckedPort, Cluster, Concurrency, Endpoint, Guard, HealthCheck, HealthProbe, RateLimit, Snapshot,
};

/// Adds to a cluster what it has; most have nothing.
pub(super) fn add_to_cluster(value: &mut Value, cluster: &Cluster) {
    if !cluster.standby.fallbacks.is_empty() {
        let names: Vec<_> = cluster.standby.fallbacks.iter().map(|fallback| &*fallback.name).collect();
        value["fallbacks"] = json!(names);
    }
}

/// The same for an endpoint.
pub(super) fn add_to_endpoint(value: &mut Value, endpoint: &Endpoint) {
    if let Some(checked) = &endpoint.checked {
        let run = checked.run();
        value["health_check"] = json!({
            "healthy": !checked.is_unhealthy(),
            "known": run.due.is_some(),
            "failures": run.failures,
            "successes": run.successes,
        });
    }
}

/// Ports whose endpoints are checked, by host and port.
pub(super) fn health_checks(snapshot: &Snapshot) -> BTreeMap<String, Value> {
    let of = |port: &CheckedPort| {
        let by = port.cluster.standby.checks.as_ref().and_then(|usage| usage.last());
        let mut value = health_check(&port.check);
        value["used_by"] = json!(by.map(|(_, pod)| format!("{}/{}", pod.namespace, pod.name)));
        value
    };
    snapshot.checked.iter().map(|((host, port), one)| (format!("{host}:{port}"), of(one))).collect()
}

fn health_check(check: &HealthCheck) -> Value {
    let probe = match &check.probe {
        HealthProbe::Http { path, host, statuses } => json!({ "http": {
            "path": path.as_str(),
            "host": host.as_ref().map(http::uri::Authority::as_str),
            "statuses": statuses.iter().map(|range| format!("{}-{}", range.start(), range.end())).collect::<Vec<_>>(),
        }}),
        HealthProbe::Grpc { service } => json!({ "grpc": { "service": service } }),
        HealthProbe::Tcp => json!("tcp"),
    };
    json!({
        "probe": probe,
        "port": check.port,
        "interval_ms": ms(check.interval),
        "timeout_ms": ms(check.timeout),
        "jitter_percent": check.jitter_percent,
        "unhealthy_threshold": check.unhealthy_threshold,
        "healthy_threshold": check.healthy_threshold,
    })
}

/// What requests to pods are held to, by the address of the app.
pub(super) fn guards(snapshot: &Snapshot) -> BTreeMap<String, Value> {
    snapshot.guards.iter().map(|(app, one)| (app.to_string(), guard(one))).collect()
}

fn guard(guard: &Guard) -> Value {
    json!({
        "service": *guard.service,
        "rate_limits": guard.limits.iter().map(limit).collect::<Vec<_>>(),
        "adaptive_concurrency": guard.concurrency.as_ref().map(concurrency),
    })
}

fn limit(limit: &RateLimit) -> Value {
    let rule = &limit.rule;
    json!({
        "name": *rule.name,
        "requests": rule.requests,
        "per_ms": ms(rule.per),
        "burst": rule.burst,
        "shared_by": if rule.each_source { "IDENTITY" } else { "ALL" },
        "sources": limit.buckets.by_source.load().len(),
        "paths": rule.paths.iter().map(string_match).collect::<Vec<_>>(),
        "methods": rule.methods.iter().map(http::Method::as_str).collect::<Vec<_>>(),
    })
}

fn concurrency(concurrency: &Concurrency) -> Value {
    let Concurrency { rule, state } = concurrency;
    json!({
        "percentile": rule.percentile,
        "min_concurrency": rule.min,
        "max_concurrency": rule.max,
        "update_interval_ms": ms(rule.update_interval),
        "min_rtt_interval_ms": ms(rule.min_rtt_interval),
        "min_rtt_requests": rule.min_rtt_requests,
        "jitter_percent": rule.jitter_percent,
        "buffer_percent": rule.buffer_percent,
        "limit": state.limit.load(Relaxed),
        "under_way": state.under_way.load(Relaxed),
        "min_rtt_us": state.min_rtt.load(Relaxed) / 1_000,
        "measuring_min_rtt": state.measuring.load(Relaxed),
    })
}
