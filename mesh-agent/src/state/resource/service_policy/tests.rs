#![expect(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use serde_json::{Value, json};

use super::*;
use crate::state::snapshot::HealthProbe;

fn read(spec: &Value) -> Checked<ServicePolicy> {
    check(&ObjectKey::new("ServicePolicy", "default", "web"), None, spec)
}

#[test]
fn a_policy_is_read_with_its_defaults() {
    let policy = read(&json!({
        "service": "web",
        "port": 80,
        "healthCheck": { "http": { "path": "/healthz", "expectedStatuses": ["200-299", 401] } },
        "rateLimits": [{ "requests": 10, "per": "1s" }, { "name": "writes", "requests": 1, "per": "1m", "burst": 5,
            "sharedBy": "IDENTITY", "paths": [{ "prefix": "/api" }], "methods": ["POST"] }],
        "adaptiveConcurrency": {},
        "fallbacks": [{ "subset": "v1", "to": [{ "subset": "v2" }, { "host": "old", "port": 81 }] }],
    }))
    .unwrap();
    assert_eq!((policy.service.as_str(), policy.port), ("web", Some(80)));
    let check = policy.health_check.unwrap();
    let probe = HealthProbe::Http {
        path: "/healthz".parse().unwrap(),
        host: None,
        statuses: vec![200..=299, 401..=401],
    };
    let expected = HealthCheck {
        probe,
        port: None,
        interval: Duration::from_secs(10),
        timeout: Duration::from_secs(1),
        jitter_percent: 10,
        unhealthy_threshold: 3,
        healthy_threshold: 1,
    };
    assert_eq!(*check, expected);
    let [first, second] = &*policy.rate_limits else { panic!("{:?}", policy.rate_limits) };
    assert_eq!((&*first.name, first.burst, first.each_source), ("0", 10, false));
    assert_eq!((&*second.name, second.requests, second.burst, second.each_source), ("writes", 1, 5, true));
    assert_eq!((second.paths.len(), second.methods.len(), second.per), (1, 1, Duration::from_mins(1)));
    let rule = policy.concurrency.unwrap();
    assert_eq!((rule.percentile, rule.max, rule.min, rule.min_rtt_requests), (50, 1000, 3, 50));
    assert_eq!((rule.jitter_percent, rule.buffer_percent), (15, 25));
    let [fallback] = &*policy.fallbacks else { panic!("{:?}", policy.fallbacks) };
    assert_eq!((fallback.subset.as_deref(), fallback.to.len()), (Some("v1"), 2));
}

#[test]
fn what_is_wrong_is_named() {
    let with = |section: &str, value: Value| {
        let mut spec = json!({ "service": "web" });
        spec[section] = value;
        spec
    };
    let limit = |value: Value| with("rateLimits", json!([value]));
    let check = |value: Value| with("healthCheck", value);
    let table = [
        (json!({}), "service"),
        (json!({ "service": "web" }), ""),
        (json!({ "service": "a/b", "adaptiveConcurrency": {} }), "service"),
        (json!({ "service": "web", "port": 0, "adaptiveConcurrency": {} }), "port"),
        (json!({ "service": "web", "hosts": [] }), "hosts"),
        (check(json!({})), "healthCheck"),
        (check(json!({ "tcp": {}, "http": {} })), "healthCheck"),
        (check(json!({ "http": { "path": "healthz" } })), "healthCheck.http.path"),
        (check(json!({ "http": { "host": "a b" } })), "healthCheck.http.host"),
        (
            check(json!({ "http": { "expectedStatuses": [200, "299-200"] } })),
            "healthCheck.http.expectedStatuses[1]",
        ),
        (check(json!({ "http": { "expectedStatuses": [42] } })), "healthCheck.http.expectedStatuses[0]"),
        (check(json!({ "tcp": {}, "interval": "1ms" })), "healthCheck.interval"),
        (check(json!({ "tcp": {}, "timeout": "0s" })), "healthCheck.timeout"),
        (check(json!({ "tcp": {}, "jitter": 101 })), "healthCheck.jitter"),
        (check(json!({ "tcp": {}, "healthyThreshold": 0 })), "healthCheck.healthyThreshold"),
        (check(json!({ "tcp": {}, "unhealthyThreshold": 0 })), "healthCheck.unhealthyThreshold"),
        (check(json!({ "tcp": {}, "port": 0 })), "healthCheck.port"),
        (limit(json!({ "per": "1s" })), "rateLimits[0].requests"),
        (limit(json!({ "requests": 0, "per": "1s" })), "rateLimits[0].requests"),
        (limit(json!({ "requests": 1 })), "rateLimits[0].per"),
        (limit(json!({ "requests": 1, "per": "48h" })), "rateLimits[0].per"),
        (limit(json!({ "requests": 1, "per": "1s", "burst": 0 })), "rateLimits[0].burst"),
        (limit(json!({ "requests": 1, "per": "1s", "burst": 4_000_000 })), "rateLimits[0].burst"),
        (limit(json!({ "requests": 1, "per": "1s", "paths": [{}] })), "rateLimits[0].paths[0]"),
        (limit(json!({ "requests": 1, "per": "1s", "methods": ["A B"] })), "rateLimits[0].methods[0]"),
        (limit(json!({ "requests": 1, "per": "1s", "sharedBy": "POD" })), "rateLimits[0].sharedBy"),
        (
            with(
                "rateLimits",
                json!([{ "name": "1", "requests": 1, "per": "1s" }, { "requests": 1, "per": "1s" }]),
            ),
            "rateLimits[1].name",
        ),
        (with("adaptiveConcurrency", json!({ "percentile": 101 })), "adaptiveConcurrency.percentile"),
        (
            with("adaptiveConcurrency", json!({ "minConcurrency": 2000 })),
            "adaptiveConcurrency.minConcurrency",
        ),
        (
            with("adaptiveConcurrency", json!({ "minRTT": { "jitter": 101 } })),
            "adaptiveConcurrency.minRTT.jitter",
        ),
        (with("fallbacks", json!([{ "to": [] }])), "fallbacks[0].to"),
        (
            with("fallbacks", json!([{ "subset": "a", "to": [{ "subset": "a" }] }])),
            "fallbacks[0].to[0].subset",
        ),
        (with("fallbacks", json!([{ "to": [{ "host": "*" }] }])), "fallbacks[0].to[0].host"),
        (
            with("fallbacks", json!([{ "to": [{ "subset": "a" }] }, { "to": [{ "subset": "b" }] }])),
            "fallbacks[1].subset",
        ),
    ];
    for (spec, field) in table {
        assert_eq!(read(&spec).unwrap_err().field, field, "{spec}");
    }
}
