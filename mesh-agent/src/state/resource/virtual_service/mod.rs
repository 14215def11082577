//! Istio's `VirtualService`, checked: what compiles from here on cannot be malformed, only name things that do not
//! exist.
//!
//! Fields that Istio has and this version does not honour are refused by name. Tested by the tables in
//! `virtual_service/tests.rs`.

use std::{sync::Arc, time::Duration};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde::{Deserialize, de::IgnoredAny};

use super::{
    ObjectKey,
    destination_rule::check_export_to,
    field::{Checked, FieldError, NotYet, item},
};
use crate::state::snapshot::{Fault, HeaderOps, Redirect, RequestMatch, RetryOn, Rewrite};

mod action;
mod fault;
mod request_match;
mod retries;
mod rule;
#[cfg(test)]
mod tests;

/// A `VirtualService`.
#[derive(Debug)]
pub struct VirtualService {
    /// `metadata.namespace`.
    pub namespace: Arc<str>,
    /// `metadata.name`.
    pub name: Arc<str>,
    /// `metadata.creationTimestamp`; decides which one holds when two name the same host.
    pub created: Option<Time>,
    /// `spec.hosts`, as written; never empty.
    pub hosts: Vec<String>,
    /// Whether it holds for traffic inside the mesh: `spec.gateways` is absent or names `mesh`.
    pub mesh: bool,
    /// `spec.http`, never empty.
    pub http: Vec<HttpRule>,
}

/// One entry of `spec.http`.
#[derive(Debug)]
pub struct HttpRule {
    /// `name`.
    pub name: Option<String>,
    /// `match`.
    pub matches: Vec<RuleMatch>,
    /// `route`, `redirect` or `directResponse`.
    pub action: RuleAction,
    /// `fault`.
    pub fault: Fault,
    /// `headers`.
    pub headers: HeaderOps,
    /// `rewrite`.
    pub rewrite: Rewrite,
    /// `timeout`; `None` when absent or `0s`, which both mean no limit.
    pub timeout: Option<Duration>,
    /// `retries`.
    pub retries: Option<Retries>,
}

/// One entry of `match`.
#[derive(Debug)]
pub struct RuleMatch {
    /// Whether it holds inside the mesh: `gateways` is absent or names `mesh`.
    pub mesh: bool,
    /// Everything else.
    pub request: RequestMatch,
}

/// What a rule does.
#[derive(Debug)]
pub enum RuleAction {
    /// `route`: never empty; the weights are above 0.
    Forward(Vec<Destination>),
    /// `redirect`.
    Redirect(Redirect),
    /// `directResponse`.
    Direct {
        /// `status`.
        status: http::StatusCode,
        /// `body`.
        body: bytes::Bytes,
    },
}

/// One entry of `route` that may be drawn.
#[derive(Debug)]
pub struct Destination {
    /// Its place in the list as written.
    pub index: usize,
    /// `destination.host`, as written.
    pub host: String,
    /// `destination.port.number`.
    pub port: Option<u16>,
    /// `destination.subset`.
    pub subset: Option<String>,
    /// `weight`; 1 when it is the only one.
    pub weight: u32,
    /// `headers`.
    pub headers: HeaderOps,
}

/// `retries`; what is `None` takes the default.
#[derive(Debug)]
pub struct Retries {
    /// `attempts`; 0 switches retries off.
    pub attempts: u32,
    /// `perTryTimeout`.
    pub per_try_timeout: Option<Duration>,
    /// `retryOn`.
    pub on: Option<RetryOn>,
    /// `backoff`.
    pub backoff: Option<Duration>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Wire {
    hosts: Option<Vec<String>>,
    gateways: Option<Vec<String>>,
    export_to: Option<Vec<String>>,
    http: Option<Vec<rule::Wire>>,
    #[serde(rename = "tls")]
    _tls: Option<NotYet>,
    #[serde(rename = "tcp")]
    _tcp: Option<NotYet>,
}

/// Checks the `spec` of a `VirtualService`.
pub(super) fn check(
    key: &ObjectKey,
    created: Option<Time>,
    spec: &serde_json::Value,
) -> Checked<VirtualService> {
    let wire: Wire = super::field::deserialize(spec)?;
    check_export_to(wire.export_to.as_deref())?;
    let mesh = for_mesh(wire.gateways.as_deref());
    let hosts = check_hosts(wire.hosts.unwrap_or_default(), mesh)?;
    let rules = wire.http.unwrap_or_default();
    if rules.is_empty() {
        return Err(FieldError::new("http", "http must be provided in virtual service"));
    }
    let mut http = Vec::with_capacity(rules.len());
    for (i, rule) in rules.into_iter().enumerate() {
        http.push(rule.check().map_err(item("http", i))?);
    }
    let (namespace, name) = (Arc::clone(&key.namespace), Arc::clone(&key.name));
    Ok(VirtualService { namespace, name, created, hosts, mesh, http })
}

/// Whether a list of gateways holds for traffic inside the mesh.
fn for_mesh(gateways: Option<&[String]>) -> bool {
    gateways.is_none_or(|gateways| gateways.is_empty() || gateways.iter().any(|gateway| gateway == "mesh"))
}

fn check_hosts(hosts: Vec<String>, mesh: bool) -> Checked<Vec<String>> {
    if hosts.is_empty() {
        let message = "virtual service must have at least one host; delegates are not supported yet";
        return Err(FieldError::new("hosts", message));
    }
    for (i, host) in hosts.iter().enumerate() {
        if host == "*" && mesh {
            let message = "wildcard host * is not allowed for virtual services bound to the mesh gateway";
            return Err(item("hosts", i)(FieldError::new("", message)));
        }
        check_host(host).map_err(item("hosts", i))?;
        if hosts[..i].contains(host) {
            let message = format!("duplicate hosts in virtual service: {host}");
            return Err(item("hosts", i)(FieldError::new("", message)));
        }
    }
    Ok(hosts)
}

/// A domain name, an address, or `*` in front of the rest of a domain name.
pub(super) fn check_host(host: &str) -> Checked<()> {
    let rest = host.strip_prefix("*.").or_else(|| (host == "*").then_some("any")).unwrap_or(host);
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let is_name = rest.len() <= 253 && rest.split('.').all(label);
    if is_name || host.parse::<std::net::IpAddr>().is_ok() {
        return Ok(());
    }
    Err(FieldError::new("", format!("{host:?} is not a domain name; a wildcard may only be its first label")))
}

/// The whole object, as it stands in a manifest.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Envelope {
    #[serde(rename = "apiVersion")]
    _api_version: IgnoredAny,
    #[serde(rename = "kind")]
    _kind: IgnoredAny,
    /// Standard metadata.
    pub(super) metadata: k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta,
    /// Checked apart.
    #[serde(default)]
    pub(super) spec: serde_json::Value,
    /// Written by controllers, never by people.
    #[serde(rename = "status", default)]
    _status: IgnoredAny,
}
