//! `ServicePolicy` (`mesh.io/v1alpha1`), the mesh's own: what Istio has no API for and platform teams ask of a Service:
//! health checks of its endpoints, rate limits and adaptive concurrency at its pods, and who serves when its endpoints do
//! not.
//!
//! Promises that what is accepted says what it means: unknown fields, numbers out of range and sections without content are
//! refused by name. Tested in `tests.rs` beside it.

mod health_check;
mod limits;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde::Deserialize;

use super::{
    ObjectKey, dns_name,
    field::{Checked, FieldError, deserialize, item, under},
};
use crate::state::snapshot::{ConcurrencyRule, HealthCheck, RateRule};

/// A `ServicePolicy`.
#[derive(Debug)]
pub struct ServicePolicy {
    /// `metadata.namespace`, which is the Service's.
    pub namespace: Arc<str>,
    /// `metadata.name`.
    pub name: Arc<str>,
    /// `metadata.creationTimestamp`; of several policies for one port the oldest holds, section by section.
    pub created: Option<Time>,
    /// `service`: name of a Service of the same namespace.
    pub service: String,
    /// `port` of the Service; `None`: all ports for which no other policy has the section.
    pub port: Option<u16>,
    /// `healthCheck`.
    pub health_check: Option<Arc<HealthCheck>>,
    /// `rateLimits`.
    pub rate_limits: Vec<Arc<RateRule>>,
    /// `adaptiveConcurrency`.
    pub concurrency: Option<ConcurrencyRule>,
    /// `fallbacks`.
    pub fallbacks: Vec<Fallback>,
}

/// One of `fallbacks`.
#[derive(Debug)]
pub struct Fallback {
    /// `subset` that it is for; `None`: all that no other names, and the service as a whole.
    pub subset: Option<String>,
    /// `to`: the first that can serves.
    pub to: Vec<FallbackTo>,
}

/// One of `fallbacks[].to`.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FallbackTo {
    /// A host as in Istio's destinations; `None`: the same service.
    pub host: Option<String>,
    /// A subset of it; `None`: all of its endpoints.
    pub subset: Option<String>,
    /// A port of it; `None`: its only one, else the one that was dialled.
    pub port: Option<u16>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Wire {
    /// The Service of its namespace that it is for.
    service: Option<String>,
    /// A port of it; all by default.
    port: Option<u16>,
    /// How its endpoints are asked whether they are well.
    health_check: Option<health_check::Wire>,
    /// How many requests each of its pods takes.
    rate_limits: Option<Vec<limits::WireLimit>>,
    /// How many requests at a time each of its pods takes, found by how long they take.
    adaptive_concurrency: Option<limits::WireConcurrency>,
    /// Who serves where none of its endpoints may be chosen.
    fallbacks: Option<Vec<WireFallback>>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireFallback {
    /// The subset that it is for; none: the whole Service.
    subset: Option<String>,
    #[serde(default)]
    to: Vec<FallbackTo>,
}

/// What its `spec` may be, for its resource definition.
#[cfg(test)]
pub(super) fn schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
    generator.subschema_for::<Wire>()
}

/// Checks the `spec` of a `ServicePolicy`.
pub(super) fn check(
    key: &ObjectKey,
    created: Option<Time>,
    spec: &serde_json::Value,
) -> Checked<ServicePolicy> {
    let wire: Wire = deserialize(spec)?;
    let service = wire.service.ok_or_else(|| FieldError::new("service", "is required"))?;
    dns_name(&service).map_err(under("service"))?;
    if wire.port == Some(0) {
        return Err(FieldError::new("port", "is no port: 1 to 65535"));
    }
    let policy = ServicePolicy {
        namespace: Arc::clone(&key.namespace),
        name: Arc::clone(&key.name),
        created,
        service,
        port: wire.port,
        health_check: wire
            .health_check
            .map(|check| check.check().map_err(under("healthCheck")))
            .transpose()?
            .map(Arc::new),
        rate_limits: limits::rate_limits(wire.rate_limits.unwrap_or_default())?,
        concurrency: wire
            .adaptive_concurrency
            .map(|rule| rule.check().map_err(under("adaptiveConcurrency")))
            .transpose()?,
        fallbacks: fallbacks(wire.fallbacks.unwrap_or_default())?,
    };
    if policy.health_check.is_none()
        && policy.rate_limits.is_empty()
        && policy.concurrency.is_none()
        && policy.fallbacks.is_empty()
    {
        let text = "has none of healthCheck, rateLimits, adaptiveConcurrency and fallbacks: it says nothing";
        return Err(FieldError::new("", text));
    }
    Ok(policy)
}

fn fallbacks(written: Vec<WireFallback>) -> Checked<Vec<Fallback>> {
    let mut checked: Vec<Fallback> = Vec::with_capacity(written.len());
    for (i, WireFallback { subset, to }) in written.into_iter().enumerate() {
        let at = |error: FieldError| item("fallbacks", i)(error);
        if to.is_empty() {
            return Err(at(FieldError::new("to", "names nobody who could serve")));
        }
        if checked.iter().any(|other| other.subset == subset) {
            return Err(at(FieldError::new("subset", "there is one for the same already")));
        }
        for (j, one) in to.iter().enumerate() {
            let within = |error: FieldError| at(item("to", j)(error));
            if one.port == Some(0) {
                return Err(within(FieldError::new("port", "is no port: 1 to 65535")));
            }
            if one.host.as_deref().is_some_and(|host| host.is_empty() || host.contains('*')) {
                return Err(within(FieldError::new("host", "must be the name of one service")));
            }
            if one.host.is_none() && one.subset == subset && one.port.is_none() {
                return Err(within(FieldError::new("subset", "is the one that it would stand in for")));
            }
        }
        checked.push(Fallback { subset, to });
    }
    Ok(checked)
}
