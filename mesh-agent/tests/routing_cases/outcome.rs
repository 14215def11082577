//! What came out, in the words in which cases expect it.

use std::collections::BTreeMap;

use http::HeaderMap;
use mesh_agent::{
    route::Injection,
    state::snapshot::{Abort, Backend, Cluster, Percentage, RetryPolicy, WeightedBackend},
};

/// `service[.namespace][/subset]:port`.
pub fn cluster(cluster: &Cluster) -> String {
    let namespace =
        if &*cluster.namespace == "default" { String::new() } else { format!(".{}", cluster.namespace) };
    let subset = cluster.subset.as_ref().map(|subset| format!("/{subset}")).unwrap_or_default();
    format!("{}{namespace}{subset}:{}", cluster.service, cluster.port)
}

/// A cluster, or what is missing.
pub fn backend(backend: &Backend) -> String {
    match backend {
        Backend::Cluster(found) => cluster(found),
        Backend::Missing(sentence) => format!("missing: {sentence}"),
    }
}

/// Clusters with their weights.
pub fn weighted(backends: &[WeightedBackend]) -> BTreeMap<String, u32> {
    backends.iter().map(|weighted| (backend(&weighted.backend), weighted.weight)).collect()
}

/// A share in percent.
pub fn percent(share: Percentage) -> f64 {
    f64::from(share.0) / f64::from(Percentage::PERCENT)
}

/// `2s@100%`, or `none`.
pub fn delay(injection: &Injection) -> String {
    injection
        .delay
        .map_or_else(|| "none".to_owned(), |(share, delay)| format!("{delay:?}@{}%", percent(share)))
}

/// `503@50%`, or `none`.
pub fn abort(injection: &Injection) -> String {
    let Some((share, abort)) = injection.abort else { return "none".to_owned() };
    let with = match abort {
        Abort::Http(status) => status.as_u16().to_string(),
        Abort::Grpc(status) => format!("grpc {status}"),
    };
    format!("{with}@{}%", percent(share))
}

/// Attempts, then conditions and what else differs from the usual.
pub fn retries(policy: &RetryPolicy) -> String {
    let on = &policy.on;
    let words = [
        (on.server_error, "5xx"),
        (on.gateway_error, "gateway-error"),
        (on.reset, "reset"),
        (on.connect_failure, "connect-failure"),
        (on.refused_stream, "refused-stream"),
        (on.retriable_4xx, "retriable-4xx"),
        (on.retriable_headers, "retriable-headers"),
        (on.envoy_ratelimited, "envoy-ratelimited"),
        (on.reset_before_request, "reset-before-request"),
    ];
    let words = words.iter().filter(|(set, _)| *set).map(|(_, word)| (*word).to_owned());
    let codes = on.status_codes.iter().map(ToString::to_string);
    let grpc = on.grpc.iter().map(|status| format!("grpc-{status}"));
    let on: Vec<String> = words.chain(codes).chain(grpc).collect();
    let extra = [
        policy.per_try_timeout.map(|limit| format!(" try={limit:?}")),
        (policy.backoff.as_millis() != 25).then(|| format!(" backoff={:?}", policy.backoff)),
        policy.remote_localities.then(|| " remote".to_owned()),
        (!policy.ignore_previous_hosts).then(|| " same-host".to_owned()),
    ];
    let extra: String = extra.into_iter().flatten().collect();
    format!("{} {}{extra}", policy.attempts, on.join(","))
}

/// All values of a header.
pub fn values(headers: &HeaderMap, name: &str) -> Vec<String> {
    headers.get_all(name).iter().map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()).collect()
}
