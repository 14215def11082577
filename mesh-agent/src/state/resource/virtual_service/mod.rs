//! Istio's `VirtualService`, checked: what compiles from here on cannot be malformed, only name things that do not
//! exist.
//!
//! Fields that Istio does not have are refused by name. Tested by the tables in `virtual_service/tests.rs` and by
//! `tests/routing_cases.rs`.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde::{Deserialize, de::IgnoredAny};

use super::{
    ObjectKey, export_to,
    field::{Checked, FieldError, item},
};
use crate::state::snapshot::{
    CorsPolicy, Fault, HeaderOps, Percentage, Redirect, RequestMatch, RetryOn, Rewrite, StreamMatch,
    Visibility,
};

mod action;
mod cors;
mod delegate;
mod fault;
mod mirror;
mod request_match;
mod retries;
mod rule;
mod stream;
#[cfg(test)]
mod tests;

/// Annotation that lets requests ask for faults by header.
const FAULT_BY_HEADER: &str = "mesh.io/fault-by-header";

/// A `VirtualService`.
#[derive(Debug)]
pub struct VirtualService {
    /// `metadata.namespace`.
    pub namespace: Arc<str>,
    /// `metadata.name`.
    pub name: Arc<str>,
    /// `metadata.creationTimestamp`; decides which one holds when two name the same host.
    pub created: Option<Time>,
    /// `spec.hosts`, as written; empty where it is there for others to delegate to.
    pub hosts: Vec<String>,
    /// Whether it holds for traffic inside the mesh: `spec.gateways` is absent or names `mesh`.
    pub mesh: bool,
    /// `spec.gateways`, each as `NAMESPACE/NAME`, or `mesh`.
    pub gateways: Vec<String>,
    /// `spec.exportTo`.
    pub visible: Visibility,
    /// Whether requests may ask for faults by header (annotation `mesh.io/fault-by-header`).
    pub fault_by_header: bool,
    /// `spec.http`.
    pub http: Vec<HttpRule>,
    /// `spec.tls`.
    pub tls: Vec<StreamRule>,
    /// `spec.tcp`.
    pub tcp: Vec<StreamRule>,
}

/// One entry of `spec.http`. What is `None` is taken from the rule that delegates, if one does.
#[derive(Debug, Clone)]
pub struct HttpRule {
    /// `name`.
    pub name: Option<String>,
    /// `match`.
    pub matches: Vec<RuleMatch>,
    /// `route`, `redirect`, `directResponse` or `delegate`.
    pub action: RuleAction,
    /// `fault`.
    pub fault: Option<Fault>,
    /// `headers`.
    pub headers: Option<HeaderOps>,
    /// `rewrite`.
    pub rewrite: Option<Rewrite>,
    /// `timeout`; zero is no limit.
    pub timeout: Option<Duration>,
    /// `retries`.
    pub retries: Option<Retries>,
    /// `mirror` or `mirrors`.
    pub mirrors: Option<Vec<RuleMirror>>,
    /// `corsPolicy`.
    pub cors: Option<CorsPolicy>,
}

/// One entry of `match`.
#[derive(Debug, Clone)]
pub struct RuleMatch {
    /// Whether it holds inside the mesh: `gateways` is absent or names `mesh`.
    pub mesh: bool,
    /// `gateways`, each as `NAMESPACE/NAME`, or `mesh`; none: wherever its rule holds.
    pub gateways: Vec<String>,
    /// Everything else.
    pub request: RequestMatch,
}

/// What a rule does.
#[derive(Debug, Clone)]
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
    /// `delegate`: the rules of another `VirtualService` say what happens.
    Delegate {
        /// Its namespace.
        namespace: Arc<str>,
        /// Its name.
        name: Arc<str>,
    },
}

/// `destination`.
#[derive(Debug, Clone)]
pub struct Target {
    /// `host`, as written.
    pub host: String,
    /// `port.number`.
    pub port: Option<u16>,
    /// `subset`.
    pub subset: Option<String>,
}

/// One entry of `route` that may be drawn.
#[derive(Debug, Clone)]
pub struct Destination {
    /// Its place in the list as written.
    pub index: usize,
    /// `destination`.
    pub target: Target,
    /// `weight`; 1 when it is the only one.
    pub weight: u32,
    /// `headers`.
    pub headers: HeaderOps,
}

/// `mirror`, or one entry of `mirrors`.
#[derive(Debug, Clone)]
pub struct RuleMirror {
    /// Where in the rule its destination stands, for problems.
    pub field: String,
    /// Who gets the copies.
    pub target: Target,
    /// The share of requests that is copied; above 0.
    pub percentage: Percentage,
}

/// `retries`; what is `None` takes the default.
#[derive(Debug, Clone)]
pub struct Retries {
    /// `attempts`; 0 switches retries off.
    pub attempts: u32,
    /// `perTryTimeout`.
    pub per_try_timeout: Option<Duration>,
    /// `retryOn`.
    pub on: Option<RetryOn>,
    /// `backoff`.
    pub backoff: Option<Duration>,
    /// `retryRemoteLocalities`.
    pub remote_localities: Option<bool>,
    /// `retryIgnorePreviousHosts`.
    pub ignore_previous_hosts: Option<bool>,
}

/// One entry of `spec.tls` or `spec.tcp`.
#[derive(Debug)]
pub struct StreamRule {
    /// `match`; never empty in `tls`.
    pub matches: Vec<StreamRuleMatch>,
    /// `route`: never empty; the weights are above 0.
    pub route: Vec<Destination>,
}

/// One entry of `match` in `tls` or `tcp`.
#[derive(Debug)]
pub struct StreamRuleMatch {
    /// Whether it holds inside the mesh: `gateways` is absent or names `mesh`.
    pub mesh: bool,
    /// As in [`RuleMatch`].
    pub gateways: Vec<String>,
    /// Everything else.
    pub stream: StreamMatch,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Wire {
    /// Names that clients dial: Services by short or full name, or any DNS name, `*.` in front included. None: others delegate to it.
    hosts: Option<Vec<String>>,
    /// Where it holds; `mesh`, which is the default, is between the pods of the mesh.
    gateways: Option<Vec<String>>,
    /// Namespaces that see it: `.` its own, `*` all, which is the default.
    export_to: Option<Vec<String>>,
    /// Rules for HTTP requests; the first that matches decides.
    http: Option<Vec<rule::Wire>>,
    /// Rules for TLS that is passed through, by the name it asks for.
    tls: Option<Vec<stream::WireTls>>,
    /// Rules for connections of any other kind.
    tcp: Option<Vec<stream::WireTcp>>,
}

/// What its `spec` may be, for its resource definition.
#[cfg(test)]
pub(super) fn schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
    generator.subschema_for::<Wire>()
}

/// Checks the `spec` of a `VirtualService`.
pub(super) fn check(
    key: &ObjectKey,
    created: Option<Time>,
    annotations: &BTreeMap<String, String>,
    spec: &serde_json::Value,
) -> Checked<VirtualService> {
    let wire: Wire = super::field::deserialize(spec)?;
    let visible = export_to::check(&key.namespace, wire.export_to.as_deref())?;
    let mesh = for_mesh(wire.gateways.as_deref());
    let hosts = check_hosts(wire.hosts.unwrap_or_default(), mesh)?;
    let (rules, tls, tcp) =
        (wire.http.unwrap_or_default(), wire.tls.unwrap_or_default(), wire.tcp.unwrap_or_default());
    if hosts.is_empty() {
        check_delegate(wire.gateways.as_deref(), &tls, &tcp)?;
    }
    if rules.is_empty() && tls.is_empty() && tcp.is_empty() {
        return Err(FieldError::new("http", "http, tcp or tls must be provided in virtual service"));
    }
    let within = rule::Within { namespace: &key.namespace, delegate: hosts.is_empty() };
    let http = each("http", rules, |rule| rule.check(within))?;
    let tls = each("tls", tls, |rule| rule.check(&key.namespace, &hosts))?;
    let tcp = each("tcp", tcp, |rule| rule.check(&key.namespace))?;
    let gateways = gateway_names(wire.gateways.unwrap_or_default(), &key.namespace);
    let (namespace, name) = (Arc::clone(&key.namespace), Arc::clone(&key.name));
    let fault_by_header = annotations.get(FAULT_BY_HEADER).is_some_and(|value| value == "true");
    Ok(VirtualService {
        namespace,
        name,
        created,
        hosts,
        mesh,
        gateways,
        visible,
        fault_by_header,
        http,
        tls,
        tcp,
    })
}

/// Checks the entries of a list one by one.
fn each<W, T>(list: &str, entries: Vec<W>, check: impl Fn(W) -> Checked<T>) -> Checked<Vec<T>> {
    entries.into_iter().enumerate().map(|(i, entry)| check(entry).map_err(item(list, i))).collect()
}

/// What has no hosts is there for others to delegate to, and says of HTTP requests alone what happens to them.
fn check_delegate(
    gateways: Option<&[String]>,
    tls: &[stream::WireTls],
    tcp: &[stream::WireTcp],
) -> Checked<()> {
    let given = [
        ("gateways", gateways.is_some_and(|gateways| !gateways.is_empty()), "gateways"),
        ("tls", !tls.is_empty(), "tls route"),
        ("tcp", !tcp.is_empty(), "tcp route"),
    ];
    match given.iter().find(|(_, given, _)| *given) {
        None => Ok(()),
        Some((field, _, what)) => {
            let message = format!(
                "delegate virtual service must have no {what} specified (it is a delegate as it has no hosts)"
            );
            Err(FieldError::new(*field, message))
        }
    }
}

/// Whether a list of gateways holds for traffic inside the mesh.
fn for_mesh(gateways: Option<&[String]>) -> bool {
    gateways.is_none_or(|gateways| gateways.is_empty() || gateways.iter().any(|gateway| gateway == "mesh"))
}

/// Gateways as an object of this namespace names them, each as `NAMESPACE/NAME`, or `mesh`. Istio's older form is
/// `NAME.NAMESPACE`, whatever follows.
fn gateway_names(written: Vec<String>, own: &str) -> Vec<String> {
    let full = |name: String| match (name.split_once('/'), name.split_once('.')) {
        _ if name == "mesh" => name,
        (Some((".", name)), _) => format!("{own}/{name}"),
        (Some(_), _) => name,
        (None, Some((name, rest))) => format!("{}/{name}", rest.split('.').next().unwrap_or(rest)),
        (None, None) => format!("{own}/{name}"),
    };
    written.into_iter().map(full).collect()
}

fn check_hosts(hosts: Vec<String>, mesh: bool) -> Checked<Vec<String>> {
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
