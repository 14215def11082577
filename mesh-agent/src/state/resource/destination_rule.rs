//! Istio's `DestinationRule`, checked: subsets, and the parts of `trafficPolicy` this version honours.
//!
//! Fields that Istio has and this version does not honour are refused by name.
//! Tested by the table below.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde::Deserialize;

use super::{
    ObjectKey,
    authorization_policy::WireSelector,
    client_tls::{self, Tls},
    connection_pool::{self, Pool},
    duration::IstioDuration,
    export_to,
    field::{Checked, FieldError, item, under},
    http_tunnel,
    load_balancer::{self, Balancer, Choice},
    outlier_detection,
    virtual_service::check_host,
};
use crate::state::{
    defaults,
    snapshot::{Balancing, HttpTunnel, OutlierDetection, Percentage, ProxyProtocol, RetryBudget, Visibility},
};

/// A `DestinationRule`.
#[derive(Debug)]
pub struct DestinationRule {
    /// `metadata.namespace`.
    pub namespace: Arc<str>,
    /// `metadata.name`.
    pub name: Arc<str>,
    /// `metadata.creationTimestamp`; decides whose policy holds when two name the same host.
    pub created: Option<Time>,
    /// `spec.exportTo`.
    pub visible: Visibility,
    /// `spec.host`, as written.
    pub host: String,
    /// `spec.workloadSelector`: of its namespace, the clients with these labels alone; none of them: all. `None`: it is for
    /// whoever looks into its namespace.
    pub selector: Option<BTreeMap<String, String>>,
    /// Whether endpoints are chosen by their latency (annotation `mesh.io/load-balancer: PEAK_EWMA`).
    pub by_latency: bool,
    /// `spec.trafficPolicy`.
    pub policy: Option<TrafficPolicy>,
    /// `spec.subsets`.
    pub subsets: Vec<Subset>,
}

/// One entry of `spec.subsets`.
#[derive(Debug)]
pub struct Subset {
    /// `name`.
    pub name: String,
    /// `labels`: what pods must carry.
    pub labels: BTreeMap<String, String>,
    /// `trafficPolicy`.
    pub policy: Option<TrafficPolicy>,
}

/// `trafficPolicy`; what is `None` is inherited.
#[derive(Debug, Clone, Default)]
pub struct TrafficPolicy {
    /// What holds for all ports.
    pub blocks: Blocks,
    /// `portLevelSettings`: for these ports they hold whole, and what they leave out is by default.
    pub ports: BTreeMap<u16, Blocks>,
    /// `retryBudget`.
    pub retry_budget: Option<RetryBudget>,
    /// `proxyProtocol`.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// `tunnel`.
    pub tunnel: Option<Arc<HttpTunnel>>,
}

impl DestinationRule {
    /// Paths of the files that it names.
    pub fn files(&self) -> impl Iterator<Item = &Arc<str>> {
        let policies =
            self.policy.iter().chain(self.subsets.iter().filter_map(|subset| subset.policy.as_ref()));
        let blocks = policies.flat_map(|policy| policy.ports.values().chain([&policy.blocks]));
        let terms = blocks.filter_map(|blocks| blocks.tls.as_ref()?.terms());
        terms.flat_map(|terms| terms.files.named()).map(|(_, path)| path)
    }
}

/// What a port may have of its own.
#[derive(Debug, Clone, Default)]
pub struct Blocks {
    /// `loadBalancer`.
    pub balancer: Option<Balancer>,
    /// `connectionPool`.
    pub pool: Option<Pool>,
    /// `outlierDetection`.
    pub outlier: Option<OutlierDetection>,
    /// `tls`.
    pub tls: Option<Tls>,
}

impl DestinationRule {
    /// Whether it prefers clients' own zones anywhere (`zoneAwareLbSetting`).
    pub fn prefers_zones(&self) -> bool {
        let policies =
            self.policy.iter().chain(self.subsets.iter().filter_map(|subset| subset.policy.as_ref()));
        let mut blocks = policies.flat_map(|policy| policy.ports.values().chain([&policy.blocks]));
        blocks.any(|blocks| {
            let locality = blocks.balancer.as_ref().and_then(|balancer| balancer.locality.as_ref());
            locality.is_some_and(|setting| setting.zone_aware.is_some())
        })
    }
}

impl Blocks {
    /// Whether nothing, or the least request, is asked for.
    pub(super) fn may_be_by_latency(&self) -> bool {
        let choice = self.balancer.as_ref().and_then(|balancer| balancer.choice.as_ref());
        choice.is_none_or(|choice| *choice == Choice::Simple(Balancing::LeastRequest))
    }
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Wire {
    /// The Service it is for, by short or full name; `*.` in front for many.
    host: String,
    /// How its endpoints are spoken to.
    traffic_policy: Option<WirePolicy>,
    /// Parts of its endpoints, which routes name.
    subsets: Option<Vec<WireSubset>>,
    /// Namespaces that see it: `.` its own, `*` all, which is the default.
    export_to: Option<Vec<String>>,
    /// It is for clients with these labels alone, of its namespace.
    workload_selector: Option<WireSelector>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireSubset {
    name: String,
    /// Labels of the endpoints that belong to it.
    labels: Option<BTreeMap<String, String>>,
    traffic_policy: Option<WirePolicy>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WirePolicy {
    /// How an endpoint is chosen.
    load_balancer: Option<load_balancer::Wire>,
    /// Limits and times of connections and requests.
    connection_pool: Option<connection_pool::Wire>,
    /// When an endpoint that fails gets nothing for a while.
    outlier_detection: Option<outlier_detection::Wire>,
    /// Whether the client's agent speaks TLS to what is outside of the mesh.
    tls: Option<client_tls::Wire>,
    /// What holds for single ports of it, in place of the rest.
    #[serde(default)]
    port_level_settings: Vec<WirePort>,
    /// Bytes go through its endpoints, HTTP proxies, to another place.
    tunnel: Option<http_tunnel::Wire>,
    /// Tells the endpoint of the client first of all (PROXY protocol).
    proxy_protocol: Option<WireProxyProtocol>,
    /// How many retries may be under way beside the first tries.
    retry_budget: Option<WireBudget>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
struct WireProxyProtocol {
    #[serde(default)]
    version: WireVersion,
}

/// The first is Istio's default.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
enum WireVersion {
    #[default]
    V1,
    V2,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WirePort {
    port: WirePortNumber,
    load_balancer: Option<load_balancer::Wire>,
    connection_pool: Option<connection_pool::Wire>,
    outlier_detection: Option<outlier_detection::Wire>,
    tls: Option<client_tls::Wire>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
struct WirePortNumber {
    number: u16,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireBudget {
    percent: Option<f64>,
    min_retry_concurrency: Option<u32>,
    budget_interval: Option<IstioDuration>,
}

/// What its `spec` may be, for its resource definition.
#[cfg(test)]
pub(super) fn schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
    generator.subschema_for::<Wire>()
}

/// Checks the `spec` of a `DestinationRule`.
pub(super) fn check(
    key: &ObjectKey,
    created: Option<Time>,
    spec: &serde_json::Value,
) -> Checked<DestinationRule> {
    let wire: Wire = super::field::deserialize(spec)?;
    let visible = export_to::check(&key.namespace, wire.export_to.as_deref())?;
    check_host(&wire.host).map_err(under("host"))?;
    let selector = wire.workload_selector.map(WireSelector::check).transpose();
    let selector = selector.map_err(under("workloadSelector"))?;
    let policy = wire.traffic_policy.map(WirePolicy::check).transpose().map_err(under("trafficPolicy"))?;
    let mut subsets: Vec<Subset> = Vec::new();
    for (i, subset) in wire.subsets.unwrap_or_default().into_iter().enumerate() {
        subsets.push(subset.check(&subsets).map_err(item("subsets", i))?);
    }
    let (namespace, name) = (Arc::clone(&key.namespace), Arc::clone(&key.name));
    // The annotation is no part of the spec.
    let by_latency = false;
    let host = wire.host;
    Ok(DestinationRule { namespace, name, created, visible, host, selector, by_latency, policy, subsets })
}

impl WireSubset {
    fn check(self, before: &[Subset]) -> Checked<Subset> {
        if self.name.is_empty() || self.name.contains('|') {
            return Err(FieldError::new("name", "subset name is required, and may not contain |"));
        }
        if before.iter().any(|subset| subset.name == self.name) {
            return Err(FieldError::new("name", format!("duplicate subset {:?}", self.name)));
        }
        let policy =
            self.traffic_policy.map(WirePolicy::check).transpose().map_err(under("trafficPolicy"))?;
        Ok(Subset { name: self.name, labels: self.labels.unwrap_or_default(), policy })
    }
}

impl WirePolicy {
    fn check(self) -> Checked<TrafficPolicy> {
        let blocks = blocks(self.load_balancer, self.connection_pool, self.outlier_detection, self.tls)?;
        let mut ports = BTreeMap::new();
        for (i, port) in self.port_level_settings.into_iter().enumerate() {
            let (number, blocks) = port.check().map_err(item("portLevelSettings", i))?;
            if ports.insert(number, blocks).is_some() {
                let error = FieldError::new("port.number", format!("duplicate port {number}"));
                return Err(item("portLevelSettings", i)(error));
            }
        }
        let retry_budget =
            self.retry_budget.map(WireBudget::check).transpose().map_err(under("retryBudget"))?;
        let proxy_protocol = self.proxy_protocol.map(|written| match written.version {
            WireVersion::V1 => ProxyProtocol::V1,
            WireVersion::V2 => ProxyProtocol::V2,
        });
        let tunnel = self.tunnel.map(http_tunnel::Wire::check).transpose().map_err(under("tunnel"))?;
        let tunnel = tunnel.map(Arc::new);
        Ok(TrafficPolicy { blocks, ports, retry_budget, proxy_protocol, tunnel })
    }
}

fn blocks(
    balancer: Option<load_balancer::Wire>,
    pool: Option<connection_pool::Wire>,
    outlier: Option<outlier_detection::Wire>,
    tls: Option<client_tls::Wire>,
) -> Checked<Blocks> {
    Ok(Blocks {
        balancer: balancer.map(load_balancer::Wire::check).transpose().map_err(under("loadBalancer"))?,
        pool: pool.map(connection_pool::Wire::check).transpose().map_err(under("connectionPool"))?,
        outlier: outlier
            .map(outlier_detection::Wire::check)
            .transpose()
            .map_err(under("outlierDetection"))?,
        tls: tls.map(client_tls::Wire::check).transpose().map_err(under("tls"))?,
    })
}

impl WirePort {
    fn check(self) -> Checked<(u16, Blocks)> {
        if self.port.number == 0 {
            return Err(FieldError::new("port.number", "port must be in range 1..65535"));
        }
        Ok((
            self.port.number,
            blocks(self.load_balancer, self.connection_pool, self.outlier_detection, self.tls)?,
        ))
    }
}

impl WireBudget {
    fn check(self) -> Checked<RetryBudget> {
        let percent = match self.percent {
            None => defaults::RETRY_BUDGET.percent,
            Some(percent) if (0.0..=100.0).contains(&percent) => {
                Percentage((percent * f64::from(Percentage::PERCENT)).round() as u32)
            }
            Some(percent) => {
                let message = format!("percent {percent} is not in range 0..100");
                return Err(FieldError::new("percent", message));
            }
        };
        let min_concurrency = self.min_retry_concurrency.unwrap_or(defaults::MIN_RETRY_CONCURRENCY);
        // 0 is Istio's default: nothing but what is under way counts.
        let interval = self.budget_interval.filter(|interval| !interval.0.is_zero());
        let interval =
            interval.map(|interval| interval.at_least_a_millisecond("budgetInterval")).transpose()?;
        Ok(RetryBudget { percent, min_concurrency, interval })
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    fn read(spec: &serde_json::Value) -> Checked<DestinationRule> {
        check(&ObjectKey::new("DestinationRule", "default", "reviews"), None, spec)
    }

    #[test]
    fn bad_rules_name_their_field() {
        let policy = |policy| json!({"host": "a", "trafficPolicy": policy});
        let table = [
            (json!({}), "", "missing field `host`"),
            (json!({"host": "a b"}), "host", "not a domain name"),
            (json!({"host": "a", "subset": []}), "subset", "unknown field"),
            (json!({"host": "a", "exportTo": ["*", "."]}), "exportTo", "both public"),
            (
                policy(json!({"proxyProtocol": {"version": "V3"}})),
                "trafficPolicy.proxyProtocol.version",
                "unknown variant",
            ),
            (policy(json!({"tunnel": {}})), "trafficPolicy.tunnel", "missing field `targetHost`"),
            (
                json!({"host": "a", "workloadSelector": {"matchLabels": {"app": "a*"}}}),
                "workloadSelector.matchLabels.app",
                "wildcards",
            ),
            (
                json!({"host": "a", "workloadSelector": {"labels": {"app": "a"}}}),
                "workloadSelector.labels",
                "unknown field",
            ),
            (json!({"host": "a", "subsets": [{"labels": {}}]}), "subsets[0]", "missing field `name`"),
            (
                json!({"host": "a", "subsets": [{"name": "v1"}, {"name": "v1"}]}),
                "subsets[1].name",
                "duplicate",
            ),
            (
                json!({"host": "a", "subsets": [
                    {"name": "v1", "trafficPolicy": {"outlierDetection": {"maxEjectionPercent": 101}}}
                ]}),
                "subsets[0].trafficPolicy.outlierDetection.maxEjectionPercent",
                "0..100",
            ),
            (
                json!({"host": "a", "trafficPolicy": {"tls": {"mode": "MUTUAL"}}}),
                "trafficPolicy.tls.credentialName",
                "required",
            ),
            (
                policy(json!({"loadBalancer": {"consistentHash": {}}})),
                "trafficPolicy.loadBalancer.consistentHash",
                "exactly one of",
            ),
            (
                policy(json!({"portLevelSettings": [{}]})),
                "trafficPolicy.portLevelSettings[0]",
                "missing field `port`",
            ),
            (
                policy(json!({"portLevelSettings": [{"port": {"number": 0}}]})),
                "trafficPolicy.portLevelSettings[0].port.number",
                "range",
            ),
            (
                policy(json!({"portLevelSettings": [{"port": {"number": 1}}, {"port": {"number": 1}}]})),
                "trafficPolicy.portLevelSettings[1].port.number",
                "duplicate",
            ),
            (
                policy(
                    json!({"portLevelSettings": [{"port": {"number": 1}, "loadBalancer": {"simple": "BEST"}}]}),
                ),
                "trafficPolicy.portLevelSettings[0].loadBalancer.simple",
                "unknown variant",
            ),
            (
                json!({"host": "a", "trafficPolicy": {"retryBudget": {"percent": 101}}}),
                "trafficPolicy.retryBudget.percent",
                "0..100",
            ),
            (
                json!({"host": "a", "trafficPolicy": {"retryBudget": {"budgetInterval": 10}}}),
                "trafficPolicy.retryBudget.budgetInterval",
                "expected a string",
            ),
            (
                json!({"host": "a", "trafficPolicy": {"retryBudget": {"budgetInterval": "10us"}}}),
                "trafficPolicy.retryBudget.budgetInterval",
                "greater than 1ms",
            ),
            (
                json!({"host": "a", "trafficPolicy": {"retryBudget": {"minRetryConcurrency": -1}}}),
                "trafficPolicy.retryBudget.minRetryConcurrency",
                "invalid value",
            ),
            (
                policy(json!({"connectionPool": {"tcp": {"connectTimeout": "10"}}})),
                "trafficPolicy.connectionPool.tcp.connectTimeout",
                "not a duration",
            ),
        ];
        for (spec, field, message) in table {
            let error = read(&spec).unwrap_err();
            assert_eq!(error.field, field, "{spec}");
            assert!(error.message.contains(message), "{spec}: {}", error.message);
        }
    }

    #[test]
    fn versions_of_the_proxy_protocol_are_read() {
        let table = [
            (json!({}), Some(ProxyProtocol::V1)),
            (json!({"version": "V1"}), Some(ProxyProtocol::V1)),
            (json!({"version": "V2"}), Some(ProxyProtocol::V2)),
            (json!(null), None),
        ];
        for (written, expected) in table {
            let rule = read(&json!({"host": "a", "trafficPolicy": {"proxyProtocol": written}})).unwrap();
            assert_eq!(rule.policy.unwrap().proxy_protocol, expected, "{written}");
        }
    }

    #[test]
    fn retry_budgets_are_read() {
        let budget = |percent, min_concurrency| RetryBudget {
            percent: Percentage(percent),
            min_concurrency,
            interval: None,
        };
        let within =
            |millis| RetryBudget { interval: Some(Duration::from_millis(millis)), ..budget(200_000, 3) };
        let table = [
            (json!({}), budget(200_000, 3)),
            (json!({"percent": 12.5}), budget(125_000, 3)),
            (json!({"percent": 0, "minRetryConcurrency": 0}), budget(0, 0)),
            (json!({"minRetryConcurrency": 10}), budget(200_000, 10)),
            (json!({"budgetInterval": "0s"}), budget(200_000, 3)),
            (json!({"budgetInterval": "10s"}), within(10_000)),
            (json!({"budgetInterval": "1ms"}), within(1)),
        ];
        for (written, expected) in table {
            let rule = read(&json!({"host": "a", "trafficPolicy": {"retryBudget": written}})).unwrap();
            assert_eq!(rule.policy.unwrap().retry_budget, Some(expected), "{written}");
        }
    }
}
