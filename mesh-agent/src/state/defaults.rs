//! Every default of the configuration, with its unit and where it comes from.
//!
//! Promises that nothing else in `state/` invents a number. Tested through the compiled snapshots in
//! `compile/tests.rs`.

use std::{ops::RangeInclusive, sync::Arc, time::Duration};

use http::StatusCode;

use super::snapshot::{
    ConcurrencyRule, OutlierDetection, Percentage, RetryBudget, RetryOn, RetryPolicy, UtilizationRule,
};

/// DNS suffix of service host names: `NAME.NAMESPACE.svc.cluster.local` (Kubernetes' default cluster domain).
pub const CLUSTER_DOMAIN: &str = "cluster.local";

/// Trust domain of identities (Istio).
pub const TRUST_DOMAIN: &str = "cluster.local";

/// Namespace of an object that names none (Kubernetes).
pub const NAMESPACE: &str = "default";

/// Service account of a pod that names none (Kubernetes).
pub const SERVICE_ACCOUNT: &str = "default";

/// Namespace whose `DestinationRules` and policies hold for the whole mesh (Istio's `rootNamespace`).
pub const ROOT_NAMESPACE: &str = "istio-system";

/// Tries after the first where a route has no `retries` (Istio).
pub const RETRY_ATTEMPTS: u32 = 2;

/// Base of the backoff between tries (Envoy's `retry_back_off.base_interval`).
pub const RETRY_BACKOFF: Duration = Duration::from_millis(25);

/// gRPC statuses of the default `retryOn`: cancelled (1) and unavailable (14) (Istio).
pub const RETRY_GRPC: [u32; 2] = [1, 14];

/// `connectionPool.tcp.connectTimeout` (Istio).
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// `redirect.redirectCode` (Istio).
pub const REDIRECT_STATUS: StatusCode = StatusCode::MOVED_PERMANENTLY;

/// `fault.*.percentage`: a fault without one hits no request (Istio's documentation, Envoy's default).
pub const FAULT_PERCENTAGE: Percentage = Percentage(0);

/// `mirrorPercentage` and `mirrors[].percentage`: a mirror without one gets a copy of every request (Istio).
pub const MIRROR_PERCENTAGE: Percentage = Percentage::WHOLE;

/// Longest delay that a request may ask for by header, so that nobody parks requests for good.
pub const HEADER_DELAY: Duration = Duration::from_hours(1);

/// Where no rule has a `retryBudget`: one request in five, and at least ten at a time (Linkerd: ten a second), so that a
/// service with few clients can always have a failing replica hidden.
pub const RETRY_BUDGET: RetryBudget =
    RetryBudget { percent: Percentage(20 * Percentage::PERCENT), min_concurrency: 10, interval: None };

/// `retryBudget.minRetryConcurrency` where a rule has a budget without it (Istio).
pub const MIN_RETRY_CONCURRENCY: u32 = 3;

/// Longest regular expression (Istio), in characters.
pub const REGEX_LENGTH: usize = 1024;

/// Shortest duration where one is asked for (Istio).
pub const DURATION: Duration = Duration::from_millis(1);

/// Largest body of a `directResponse` (Istio), in bytes.
pub const DIRECT_RESPONSE_BODY: usize = 1024 * 1024;

/// `timeout` of an external authorizer that says none (Istio).
pub const CHECK_TIMEOUT: Duration = Duration::from_mins(10);

/// `statusOnError` of an external authorizer that says none (Istio).
pub const CHECK_STATUS: StatusCode = StatusCode::FORBIDDEN;

/// Largest `includeRequestBodyInCheck.maxRequestBytes`, in bytes: with its headers a request has to fit into a message of
/// gRPC, which servers take up to 4 MiB of by default.
pub const MOST_CHECKED_BODY: usize = 2 * 1024 * 1024;

/// Ports whose service declares no protocol, and which are known to carry protocols where the server speaks first
/// or that are not HTTP: SMTP, submission, `MySQL`, Galera, `PostgreSQL`, Redis, Elasticsearch
/// transport, memcached (Linkerd's list of opaque ports).
pub const OPAQUE_PORTS: [u16; 8] = [25, 587, 3306, 4444, 5432, 6379, 9300, 11211];

/// The default of `retryOn` (Istio): `connect-failure,refused-stream,unavailable,cancelled`.
pub fn retry_on() -> RetryOn {
    RetryOn { connect_failure: true, refused_stream: true, grpc: RETRY_GRPC.to_vec(), ..RetryOn::default() }
}

/// Retries of a route that says nothing about them (Istio).
pub fn retry_policy() -> RetryPolicy {
    RetryPolicy {
        attempts: RETRY_ATTEMPTS,
        per_try_timeout: None,
        on: retry_on(),
        backoff: RETRY_BACKOFF,
        remote_localities: false,
        ignore_previous_hosts: true,
    }
}

/// `consistentHash.ringHash.minimumRingSize` (Istio).
pub const RING_SIZE: u32 = 1024;

/// Largest ring (Envoy's `maximum_ring_size`).
pub const LARGEST_RING: u32 = 8 << 20;

/// `consistentHash.maglev.tableSize` (Envoy).
pub const MAGLEV_SIZE: u32 = 65_537;

/// Largest table of Maglev (Envoy).
pub const LARGEST_MAGLEV: u32 = 5_000_011;

/// `loadBalancer.backendUtilization`, where a rule leaves something out (Envoy's `client_side_weighted_round_robin`, gRPC's A58).
pub fn backend_utilization() -> UtilizationRule {
    UtilizationRule {
        blackout: Duration::from_secs(10),
        expiration: Duration::from_mins(3),
        update: Duration::from_secs(1),
        penalty: 1.0,
        metrics: Arc::default(),
    }
}

/// The least `weightUpdatePeriod` (Envoy): less counts as this.
pub const LEAST_WEIGHT_UPDATE: Duration = Duration::from_millis(100);

/// `outlierDetection`, where a rule has one that leaves something out (Istio, Envoy).
pub const OUTLIER_DETECTION: OutlierDetection = OutlierDetection {
    server_errors: 5,
    gateway_errors: 0,
    local_failures: None,
    interval: Duration::from_secs(10),
    base_ejection_time: Duration::from_secs(30),
    max_ejection_percent: 10,
    min_health_percent: 0,
    errors: None,
};

/// `outlierDetection.consecutiveLocalOriginFailures`, where they are counted apart (Envoy).
pub const LOCAL_ORIGIN_FAILURES: u32 = 5;

/// `loadBalancer.warmup.minimumPercent` (Istio).
pub const WARMUP_MINIMUM_PERCENT: f64 = 10.0;

/// `loadBalancer.warmup.aggression` (Istio, Envoy).
pub const WARMUP_AGGRESSION: f64 = 1.0;

/// Largest weight of an endpoint: with 10,000 of them the tables stay exact.
pub const LARGEST_WEIGHT: u32 = 10_000;
/// `healthCheck.interval` (Kubernetes' `periodSeconds`).
pub const HEALTH_CHECK_INTERVAL: Duration = Duration::from_secs(10);

/// Shortest `healthCheck.interval`: each agent whose pods use a service checks each of its endpoints so often.
pub const SHORTEST_HEALTH_CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// `healthCheck.timeout` (Kubernetes' `timeoutSeconds`).
pub const HEALTH_CHECK_TIMEOUT: Duration = Duration::from_secs(1);

/// `healthCheck.jitter`, percent of the interval: agents that start together do not go on checking together.
pub const HEALTH_CHECK_JITTER: u32 = 10;

/// `healthCheck.unhealthyThreshold` (Kubernetes' `failureThreshold`).
pub const UNHEALTHY_THRESHOLD: u32 = 3;

/// `healthCheck.healthyThreshold` (Kubernetes' `successThreshold`).
pub const HEALTHY_THRESHOLD: u32 = 1;

/// `healthCheck.http.expectedStatuses` (Kubernetes).
pub const HEALTHY_STATUSES: RangeInclusive<u16> = 200..=399;

/// Longest `rateLimits[].per`.
pub const LONGEST_RATE: Duration = Duration::from_hours(24);

/// Largest `rateLimits[].burst`, in times of its `requests`: with [`LONGEST_RATE`] what a bucket remembers stays far below
/// what 64 bits of nanoseconds hold.
pub const LARGEST_BURST: u64 = 1_000;

/// `adaptiveConcurrency`, where a policy leaves something out (Envoy's; Envoy asks for the two intervals, and these are
/// those of its documentation).
pub const ADAPTIVE_CONCURRENCY: ConcurrencyRule = ConcurrencyRule {
    percentile: 50,
    max: 1_000,
    min: 3,
    update_interval: Duration::from_millis(100),
    min_rtt_interval: Duration::from_mins(1),
    min_rtt_requests: 50,
    jitter_percent: 15,
    buffer_percent: 25,
};

/// `zoneAwareLbSetting.minClusterSize`: Envoy's `min_cluster_size`.
pub const ZONE_AWARE_CLUSTER_SIZE: u32 = 6;
