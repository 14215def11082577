//! Which `ServicePolicy` holds for a service's port, and what it comes to at the service's pods.
//!
//! A policy for the port comes before one for all ports, the older before the younger, section by section. Promises that a
//! rate limit keeps its buckets and a concurrency limit what it has learnt, however the configuration changes, for as long as
//! the pod and the limit are there. Tested in `tests/service_policies.rs` beside it.

use std::{collections::HashMap, sync::Arc};

use super::{
    Entries, Problems,
    services::{Definitions, host_name},
};
use crate::state::{
    resource::{
        ObjectKey, Objects, Resource, of_kind,
        service_policy::{Fallback, FallbackTo, ServicePolicy},
    },
    snapshot::{
        CheckedPort, Concurrency, ConcurrencyRule, Guard, HealthCheck, Protocol, RateLimit, ServicePort,
        Snapshot,
    },
};

/// All policies, by the host name of their service.
pub(super) struct ServicePolicies<'a>(HashMap<String, Vec<&'a ServicePolicy>>);

/// The policies of one port of a service, the first of which with a section holds for it.
#[derive(Clone, Copy)]
pub(super) struct PortPolicies<'p, 'a> {
    all: &'p [&'a ServicePolicy],
    port: u16,
}

impl<'a> ServicePolicies<'a> {
    /// Looks through all policies.
    pub fn index(objects: &'a Objects, services: &Definitions<'_>, problems: &mut Problems<'_>) -> Self {
        let mut policies: Vec<&ServicePolicy> = of_kind(objects, "ServicePolicy")
            .filter_map(|(_, object)| match &object.resource {
                Resource::ServicePolicy(policy) => Some(&**policy),
                _ => None,
            })
            .collect();
        policies.sort_by_key(|policy| (policy.created.is_none(), &policy.created, &policy.name));
        let mut by_host: HashMap<String, Vec<&ServicePolicy>> = HashMap::new();
        for policy in policies {
            let host = host_name(&policy.service, &policy.namespace);
            report(policy, &host, services, problems);
            by_host.entry(host).or_default().push(policy);
        }
        Self(by_host)
    }

    /// Those of one port.
    pub fn of(&self, host: &str, port: u16) -> PortPolicies<'_, 'a> {
        PortPolicies { all: self.0.get(host).map_or(&[], Vec::as_slice), port }
    }
}

impl<'p, 'a: 'p> PortPolicies<'p, 'a> {
    fn first<T>(self, section: impl Fn(&'a ServicePolicy) -> Option<T>) -> Option<T> {
        let port = self.port;
        let with = |port: Option<u16>| self.all.iter().filter(move |policy| policy.port == port);
        with(Some(port)).chain(with(None)).find_map(|policy| section(policy))
    }

    /// How its endpoints are checked.
    pub fn health_check(self) -> Option<&'a Arc<HealthCheck>> {
        self.first(|policy| policy.health_check.as_ref())
    }

    /// Who serves where nobody of a subset does, and whose policy says so.
    pub fn fallbacks(self, subset: Option<&str>) -> Option<(&'a ServicePolicy, usize, &'a [FallbackTo])> {
        let of = |policy: &'a ServicePolicy, wanted: Option<&str>| {
            let is_wanted = |fallback: &Fallback| fallback.subset.as_deref() == wanted;
            let place = policy.fallbacks.iter().position(is_wanted)?;
            Some((policy, place, &*policy.fallbacks.get(place)?.to))
        };
        self.first(|policy| {
            if policy.fallbacks.is_empty() {
                None
            } else {
                Some(of(policy, subset).or_else(|| of(policy, None)))
            }
        })
        .flatten()
    }

    fn concurrency(self) -> Option<ConcurrencyRule> {
        self.first(|policy| policy.concurrency)
    }

    fn rate_limits(self) -> Option<&'a ServicePolicy> {
        self.first(|policy| Some(policy).filter(|policy| !policy.rate_limits.is_empty()))
    }
}

/// Says of a policy that holds for nothing why that is so.
fn report(policy: &ServicePolicy, host: &str, services: &Definitions<'_>, problems: &mut Problems<'_>) {
    let key = key_of(policy);
    let Some(service) = services.get(host) else {
        let message = format!("no Service has the host {host}, so the policy holds for nothing");
        return problems.not_found(&key, "spec.service", "Service", message);
    };
    if let Some(port) = policy.port.filter(|port| service.port(*port).is_none()) {
        let message = format!("{} has no TCP port {port}, so the policy holds for nothing", service.key);
        problems.not_found(&key, "spec.port", "Service", message);
    }
    let ports = || service.ports.iter().filter(|port| policy.port.is_none_or(|wanted| wanted == port.port));
    if ports().next().is_none() || ports().any(|port| port.protocol != Some(Protocol::Opaque)) {
        return;
    }
    let sections = [
        ("rateLimits", !policy.rate_limits.is_empty()),
        ("adaptiveConcurrency", policy.concurrency.is_some()),
    ];
    for (section, _) in sections.iter().filter(|(_, given)| *given) {
        let message =
            "holds for nothing: it is about requests, and the Service declares that bytes are carried";
        problems.add(&key, &format!("spec.{section}"), message);
    }
}

/// The key of a policy.
pub(super) fn key_of(policy: &ServicePolicy) -> ObjectKey {
    ObjectKey::new("ServicePolicy", &policy.namespace, &policy.name)
}

/// Enters what holds for a port of a service: what is asked of its pods, and how they are checked.
pub(super) fn enter(
    entries: &mut Entries,
    previous: Option<&Snapshot>,
    policies: PortPolicies<'_, '_>,
    port: &ServicePort,
) {
    let cluster = &port.cluster;
    if let Some(check) = policies.health_check() {
        let checked = CheckedPort { cluster: Arc::clone(cluster), check: Arc::clone(check) };
        entries.checked.insert((Arc::clone(&cluster.host), port.port), Arc::new(checked));
    }
    let (limits, concurrency) = (policies.rate_limits(), policies.concurrency());
    if (limits.is_none() && concurrency.is_none()) || port.protocol == Some(Protocol::Opaque) {
        return;
    }
    for endpoint in &cluster.endpoints {
        if endpoint.workload.as_ref().is_some_and(|workload| workload.enrolled) {
            let before = previous.and_then(|previous| previous.guards.get(&endpoint.address));
            let made = || Arc::new(guard(&cluster.host, limits, concurrency, before));
            entries.guards.entry(endpoint.address).or_insert_with(made);
        }
    }
}

fn guard(
    service: &Arc<str>,
    limits: Option<&ServicePolicy>,
    concurrency: Option<ConcurrencyRule>,
    before: Option<&Arc<Guard>>,
) -> Guard {
    let limits = limits.into_iter().flat_map(|policy| &policy.rate_limits).map(|rule| {
        let mut known = before.into_iter().flat_map(|before| &before.limits);
        let known = known.find(|limit| limit.rule.name == rule.name);
        let buckets = known.map(|limit| Arc::clone(&limit.buckets)).unwrap_or_default();
        RateLimit { rule: Arc::clone(rule), buckets }
    });
    let concurrency = concurrency.map(|rule| {
        let known = before.and_then(|before| before.concurrency.as_ref());
        Concurrency { rule, state: known.map(|known| Arc::clone(&known.state)).unwrap_or_default() }
    });
    Guard { service: Arc::clone(service), limits: limits.collect(), concurrency }
}
