//! Which `DestinationRule` holds for a service.
//!
//! Istio looks in the client's namespace, then in the service's, then in the root namespace. A snapshot is the same
//! for all clients of a node, so the first step is left out: a rule that only it would find is a problem, not
//! silence. Tested in `tests.rs` beside it.

use std::{collections::BTreeMap, time::Duration};

use super::{Problems, covers, resolve, services::Definitions};
use crate::state::{
    defaults,
    resource::{
        ObjectKey, Objects, Resource,
        destination_rule::{DestinationRule, Subset, TrafficPolicy},
    },
    snapshot::Balancing,
};

/// All rules of one host in one namespace, as one.
#[derive(Default)]
pub(super) struct Merged<'a> {
    subsets: Vec<&'a Subset>,
    policy: Option<&'a TrafficPolicy>,
}

/// A policy with every default filled in.
#[derive(Debug, Clone, Copy)]
pub(super) struct Policy {
    /// How to choose an endpoint.
    pub balancing: Balancing,
    /// How long dialling may take.
    pub connect_timeout: Duration,
}

impl<'a> Merged<'a> {
    /// The subset of this name.
    pub fn subset(&self, name: &str) -> Option<&'a Subset> {
        self.subsets.iter().copied().find(|subset| subset.name == name)
    }

    fn add(&mut self, rule: &'a DestinationRule) {
        for subset in &rule.subsets {
            if self.subset(&subset.name).is_none() {
                self.subsets.push(subset);
            }
        }
        self.policy = self.policy.or(rule.policy.as_ref());
    }
}

/// The policy of a service or subset: a subset's blocks replace the service's one by one.
pub(super) fn policy(merged: Option<&Merged<'_>>, subset: Option<&Subset>) -> Policy {
    let layers = [subset.and_then(|subset| subset.policy.as_ref()), merged.and_then(|merged| merged.policy)];
    let mut layers = layers.into_iter().flatten();
    let pool = layers.clone().find_map(|policy| policy.pool);
    Policy {
        balancing: layers.find_map(|policy| policy.balancing).unwrap_or_default(),
        connect_timeout: pool.and_then(|pool| pool.connect_timeout).unwrap_or(defaults::CONNECT_TIMEOUT),
    }
}

/// All rules by namespace and host.
pub(super) struct DestinationRules<'a>(BTreeMap<&'a str, BTreeMap<String, Merged<'a>>>);

impl<'a> DestinationRules<'a> {
    /// Looks through all rules, oldest first.
    pub fn index(objects: &'a Objects, services: &Definitions<'_>, problems: &mut Problems<'_>) -> Self {
        let mut rules: Vec<&DestinationRule> = objects
            .values()
            .filter_map(|object| match &object.resource {
                Resource::DestinationRule(rule) => Some(&**rule),
                _ => None,
            })
            .collect();
        rules.sort_by_key(|rule| (rule.created.is_none(), &rule.created, &rule.name, &rule.namespace));
        let mut index: BTreeMap<&str, BTreeMap<String, Merged<'_>>> = BTreeMap::new();
        for rule in rules {
            let host = resolve(&rule.host, &rule.namespace);
            report(rule, &host, services, problems);
            index.entry(&rule.namespace).or_default().entry(host).or_default().add(rule);
        }
        Self(index)
    }

    /// The rule for a service: Istio's three steps, the client's namespace where one is known.
    pub fn find(&self, client: Option<&str>, host: &str, namespace: &str) -> Option<&Merged<'a>> {
        let client = client.filter(|client| *client != defaults::ROOT_NAMESPACE);
        let steps = [client, Some(namespace), Some(defaults::ROOT_NAMESPACE)];
        steps.into_iter().flatten().find_map(|step| most_specific(self.0.get(step)?, host))
    }
}

/// The host itself, else the longest wildcard that covers it.
fn most_specific<'m, 'a>(rules: &'m BTreeMap<String, Merged<'a>>, host: &str) -> Option<&'m Merged<'a>> {
    rules.get(host).or_else(|| {
        let wildcards = rules.iter().filter(|(pattern, _)| covers(pattern, host));
        wildcards.max_by_key(|(pattern, _)| pattern.len()).map(|(_, merged)| merged)
    })
}

/// Says of a rule that holds for nothing why that is so.
fn report(rule: &DestinationRule, host: &str, services: &Definitions<'_>, problems: &mut Problems<'_>) {
    let key = ObjectKey::new("DestinationRule", &rule.namespace, &rule.name);
    let mut covered = services.covered_by(host).peekable();
    if covered.peek().is_none() {
        problems.add(
            &key,
            "spec.host",
            format!("no Service has the host {host}, so the rule holds for nothing"),
        );
        return;
    }
    let root = &*rule.namespace == defaults::ROOT_NAMESPACE;
    if !root && covered.all(|service| service.key.namespace != rule.namespace) {
        let message = format!(
            "{host} is a Service of another namespace; a rule in the clients' namespace is not supported yet, so it \
             holds for nothing: put it in the Service's namespace or in {}",
            defaults::ROOT_NAMESPACE
        );
        problems.add(&key, "spec.host", message);
    }
}
