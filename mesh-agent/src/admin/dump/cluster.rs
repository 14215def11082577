//! Clusters in the dump: their endpoints, how one is chosen, and what is asked of connections to it. Tested in `tests.rs`.

use std::sync::atomic::Ordering::Relaxed;

use serde_json::{Value, json};

use super::{ms, percent, policies};
use crate::state::snapshot::{
    ByClient, Cluster, ConnectionPool, ConsistentHash, Group, HashKey, Idle, Level, Locality, Origination,
    OutlierDetection, UtilizationRule, Warmup, Zones,
};

pub(super) fn cluster(c: &Cluster) -> Value {
    let endpoints = c.endpoints.iter().map(|e| {
        let mut value = json!({
            "address": e.address,
            "locality": e.locality.to_string(),
            "weight": e.weight,
            "workload": e.workload.as_ref().map(|w| format!("{}/{}", w.namespace, w.name)),
            "in_flight": e.state.in_flight.load(Relaxed),
            "ejected": c.outlier.is_some() && e.state.health.is_ejected(),
            "ejections": e.state.health.ejections.load(Relaxed),
        });
        policies::add_to_endpoint(&mut value, e);
        value
    });
    let mut value = json!({
        "name": *c.name,
        "balancing": c.hash.as_ref().map_or_else(|| json!(format!("{:?}", c.balancing)), hash),
        "levels": c.spread.levels.iter().map(|one| level(c, one)).collect::<Vec<_>>(),
        "levels_by_client": c.spread.by_client.as_ref().map(|by_client| levels_by_client(c, by_client)),
        "warmup": c.spread.warmup.map(warmup),
        "backend_utilization": c.spread.utilization.as_deref().map(utilization),
        "outlier_detection": c.outlier.as_ref().map(outlier),
        "view": c.view.as_deref(),
        "connect_timeout_ms": ms(c.connect_timeout),
        "tls": originates(&c.tls),
        "connection_pool": (c.pool != ConnectionPool::UNLIMITED).then(|| pool(&c.pool)),
        "retry_budget": {
            "percent": percent(c.retry_budget.percent),
            "min": c.retry_budget.min_concurrency,
            "interval_ms": c.retry_budget.interval.map(ms),
        },
        "tunnel": c.tunnel.as_ref().map(ToString::to_string),
        "proxy_protocol": c.proxy_protocol.map(|version| format!("{version:?}")),
        "endpoints": endpoints.collect::<Vec<_>>(),
    });
    if let Some(found) = &c.spread.zones {
        value["zones"] = zones(c, found);
    }
    policies::add_to_cluster(&mut value, c);
    value
}

/// Towards endpoints outside the mesh. Never what is shown or believed: it may be secret.
fn originates(tls: &Origination) -> Value {
    match tls {
        Origination::Plaintext => json!("plaintext"),
        Origination::MeshOnly => json!("mesh_only"),
        Origination::Broken(why) => json!({ "broken": **why }),
        Origination::Tls(tls) => json!({
            "server": *tls.terms.server,
            "names": tls.terms.names.iter().map(|name| &**name).collect::<Vec<_>>(),
            "roots": if tls.terms.anybody { "anybody" } else if tls.terms.roots.is_some() { "named" } else { "system" },
            "asks_what_is_revoked": tls.terms.revoked.is_some(),
            "shows_certificate": tls.terms.shows.is_some(),
        }),
    }
}

fn pool(pool: &ConnectionPool) -> Value {
    json!({
        "max_connections": pool.connections,
        "keepalive": pool.keepalive.map(|keepalive| json!({
            "time_ms": keepalive.time.map(ms), "interval_ms": keepalive.interval.map(ms), "probes": keepalive.probes,
        })),
        "max_duration_ms": pool.max_duration.map(ms),
        "tcp_idle_ms": pool.stream_idle.map(ms),
        "max_pending": pool.pending,
        "max_requests": pool.requests,
        "max_requests_per_connection": pool.requests_per_connection,
        "max_retries": pool.retries,
        "http_idle_ms": match pool.idle {
            Idle::Default => Value::Null,
            Idle::After(idle) => json!(ms(idle)),
            Idle::Never => json!("never"),
        },
        "max_streams": pool.streams,
        "h2_upgrade": pool.upgrade,
        "use_client_protocol": pool.client_protocol,
        "http2_keep_alive": pool.pings.map(|pings| json!({
            "interval_ms": ms(pings.interval), "timeout_ms": ms(pings.timeout),
        })),
    })
}

/// The groups of a level: their shares, and the addresses in them.
fn level(c: &Cluster, level: &Level) -> Value {
    let group = |group: &Group| {
        let places = (0..group.len(c.endpoints.len())).filter_map(|place| group.index(place));
        let endpoints: Vec<_> = places.filter_map(|index| Some(c.endpoints.get(index)?.address)).collect();
        json!({ "share": group.share, "endpoints": endpoints })
    };
    level.groups.iter().map(group).collect()
}

/// The zones of the first level, the clients' own first.
fn zones(c: &Cluster, zones: &Zones) -> Value {
    let addresses = |group: &Group| {
        let places = (0..group.len(c.endpoints.len())).filter_map(|place| group.index(place));
        places.filter_map(|index| Some(c.endpoints.get(index)?.address)).collect::<Vec<_>>()
    };
    let one = |(zone, group): &(Locality, Group)| json!({ "zone": zone.to_string(), "endpoints": addresses(group) });
    zones.iter().map(one).collect()
}

/// For those client pods that have asked, by their labels.
fn levels_by_client(c: &Cluster, by_client: &ByClient) -> Value {
    let levels = |levels: &[Level]| levels.iter().map(|one| level(c, one)).collect::<Vec<_>>();
    let layouts = by_client.layouts();
    layouts.into_iter().map(|(labels, layout)| (labels, json!(levels(&layout.levels)))).collect()
}

fn utilization(rule: &UtilizationRule) -> Value {
    json!({
        "blackout_ms": ms(rule.blackout),
        "expiration_ms": ms(rule.expiration),
        "update_ms": ms(rule.update),
        "error_penalty": rule.penalty,
        "metrics": rule.metrics.iter().map(|metric| format!("{metric:?}")).collect::<Vec<_>>(),
    })
}

fn warmup(warmup: Warmup) -> Value {
    json!({
        "duration_ms": ms(warmup.duration),
        "minimum_percent": warmup.minimum_percent,
        "aggression": warmup.aggression,
    })
}

fn hash(hash: &ConsistentHash) -> Value {
    let by = match &*hash.key {
        HashKey::Header(name) => json!({ "header": name.as_str() }),
        HashKey::Cookie(cookie) => json!({ "cookie": *cookie.name, "ttl_ms": cookie.ttl.map(ms) }),
        HashKey::SourceIp => json!("source_ip"),
        HashKey::Query(name) => json!({ "query": **name }),
    };
    let (table, places) = hash.table();
    json!({ "hash": by, "table": table, "places": places })
}

fn outlier(rule: &OutlierDetection) -> Value {
    json!({
        "consecutive_5xx": rule.server_errors,
        "consecutive_gateway_errors": rule.gateway_errors,
        "consecutive_local_origin_failures": rule.local_failures,
        "interval_ms": ms(rule.interval),
        "base_ejection_time_ms": ms(rule.base_ejection_time),
        "max_ejection_percent": rule.max_ejection_percent,
        "min_health_percent": rule.min_health_percent,
        "http_error_codes": rule.errors.map(|errors| errors.iter().collect::<Vec<_>>()),
    })
}
