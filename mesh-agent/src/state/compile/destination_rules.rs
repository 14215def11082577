//! Which `DestinationRule` holds for a service.
//!
//! Istio looks in the client's namespace, then in the service's, then in the root namespace, and takes the most
//! specific host of the first that has any; of the other namespaces only what is exported to the client. A rule with a
//! `workloadSelector` is there for the pods of its own namespace alone that it selects, and for them it comes before those
//! without. Tested in `tests.rs` and `tests/workload_selector.rs` beside it and by `tests/routing_cases.rs`.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use super::{Problems, Settings, client_tls, clients::Client, hosts::Hosts, resolve, services::Definitions};
use crate::state::{
    defaults,
    resource::{
        ObjectKey, Objects, Resource,
        client_tls::Tls,
        connection_pool,
        destination_rule::{Blocks, DestinationRule, Subset, TrafficPolicy},
        load_balancer::{Balancer, Choice},
        of_kind,
    },
    snapshot::{
        Balancing, ConnectionPool, HttpTunnel, Origination, OutlierDetection, ProxyProtocol, RetryBudget,
        Visibility,
    },
};

/// All rules of one host in one namespace that a client sees, as one.
#[derive(Default)]
pub(super) struct Merged<'a> {
    subsets: Vec<&'a Subset>,
    policy: Option<&'a TrafficPolicy>,
    /// Where all of them are.
    namespace: &'a str,
    by_latency: bool,
}

/// A policy with every default filled in.
#[derive(Debug, Clone)]
pub(super) struct Policy {
    /// How to choose an endpoint.
    pub choice: Choice,
    /// What else `loadBalancer` says.
    pub balancer: Balancer,
    /// How long dialling may take.
    pub connect_timeout: Duration,
    /// The rest of `connectionPool`; without `maxRetries` where there is a `retryBudget`.
    pub pool: ConnectionPool,
    /// When an endpoint gets nothing for a while.
    pub outlier: Option<OutlierDetection>,
    /// `tls`, as it is written.
    pub tls: Option<Tls>,
    /// Whether anything is asked for that the agent has to watch over connections for.
    pub limits_connections: bool,
    /// How many tries may be retries.
    pub retry_budget: RetryBudget,
    /// How apps are told of the client.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// Where endpoints lead on to.
    pub tunnel: Option<Arc<HttpTunnel>>,
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
        self.namespace = &rule.namespace;
        self.by_latency |= rule.by_latency;
    }
}

/// The policy of one port of a service or subset. A subset's blocks replace the service's one by one, and the settings of
/// a port replace all of those at their level (Istio's `MergeTrafficPolicy`). `by_latency`: what the service asks for, where no
/// rule says how to choose.
pub(super) fn policy(
    merged: Option<&Merged<'_>>,
    subset: Option<&Subset>,
    port: u16,
    by_latency: bool,
) -> Policy {
    let layers = [merged.and_then(|merged| merged.policy), subset.and_then(|subset| subset.policy.as_ref())];
    let mut blocks = Blocks::default();
    let (mut retry_budget, mut proxy_protocol, mut tunnel) = (None, None, None);
    for layer in layers.into_iter().flatten() {
        blocks = match layer.ports.get(&port) {
            Some(of_port) => of_port.clone(),
            None => Blocks {
                balancer: layer.blocks.balancer.clone().or(blocks.balancer),
                pool: layer.blocks.pool.or(blocks.pool),
                outlier: layer.blocks.outlier.or(blocks.outlier),
                tls: layer.blocks.tls.clone().or(blocks.tls),
            },
        };
        retry_budget = layer.retry_budget.or(retry_budget);
        proxy_protocol = layer.proxy_protocol.or(proxy_protocol);
        tunnel = layer.tunnel.clone().or(tunnel);
    }
    let balancer = blocks.balancer.unwrap_or_default();
    let choice = match (balancer.choice.clone(), merged.is_some_and(|merged| merged.by_latency)) {
        (None, rule) if rule || by_latency => Choice::Simple(Balancing::PeakEwma),
        (Some(Choice::Simple(Balancing::LeastRequest)), true) => Choice::Simple(Balancing::PeakEwma),
        (said, _) => said.unwrap_or(Choice::Simple(Balancing::default())),
    };
    let limits_connections = blocks.pool.is_some();
    let connection_pool::Pool { connect_timeout, limits: mut pool } = blocks.pool.unwrap_or_default();
    if retry_budget.is_some() {
        // Envoy's precedence.
        pool.retries = None;
    }
    Policy {
        limits_connections: limits_connections
            || blocks.tls.is_some()
            || proxy_protocol.is_some()
            || tunnel.is_some()
            || blocks.outlier.is_some()
            || balancer.warmup.is_some()
            || balancer.utilization.is_some()
            || !matches!(
                choice,
                Choice::Simple(Balancing::LeastRequest | Balancing::Random | Balancing::RoundRobin)
            ),
        choice,
        balancer,
        connect_timeout: connect_timeout.unwrap_or(defaults::CONNECT_TIMEOUT),
        pool,
        outlier: blocks.outlier,
        tls: blocks.tls,
        retry_budget: retry_budget.unwrap_or(defaults::RETRY_BUDGET),
        proxy_protocol,
        tunnel,
    }
}

/// All rules.
pub(super) struct DestinationRules<'a> {
    /// By namespace and host, oldest first.
    by_namespace: BTreeMap<&'a str, Hosts<Vec<&'a DestinationRule>>>,
    /// For whom the rules of a host may come to something else than for everybody.
    special: Hosts<BTreeSet<Special<'a>>>,
    /// The root namespace.
    root: &'a str,
    /// Where Secrets are looked up.
    objects: &'a Objects,
}

/// A client's namespace for which a rule is special.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Special<'a> {
    /// The rule's namespace.
    owner: &'a str,
    /// The client's.
    client: &'a str,
    /// Whether it is special because the client is in the rule's own namespace, else because `exportTo` names it.
    own: bool,
}

impl<'a> DestinationRules<'a> {
    /// Looks through all rules, oldest first.
    pub fn index(
        objects: &'a Objects,
        settings: &'a Settings,
        services: &Definitions<'_>,
        problems: &mut Problems<'_>,
    ) -> Self {
        let mut rules: Vec<&DestinationRule> = of_kind(objects, "DestinationRule")
            .filter_map(|(_, object)| match &object.resource {
                Resource::DestinationRule(rule) => Some(&**rule),
                _ => None,
            })
            .collect();
        rules.sort_by_key(|rule| (rule.created.is_none(), &rule.created, &rule.name, &rule.namespace));
        let root = &*settings.root_namespace;
        let mut index = Self { by_namespace: BTreeMap::new(), special: Hosts::default(), root, objects };
        for rule in rules {
            let host = resolve(&rule.host, &rule.namespace);
            report(rule, &host, services, problems);
            client_tls::report(rule, &host, objects, services, problems);
            if rule.selector.is_none() {
                let named = rule.visible.named().iter().map(|client| (&**client, false));
                let own = (&*rule.namespace, true);
                index.special.entry(host.clone()).extend(named.chain([own]).map(|(client, own)| Special {
                    owner: &rule.namespace,
                    client,
                    own,
                }));
            }
            index.by_namespace.entry(&rule.namespace).or_default().entry(host).push(rule);
        }
        index
    }

    /// How connections of a service outside the mesh are protected by the `tls` of what was merged.
    pub fn originate(
        &self,
        merged: Option<&Merged<'_>>,
        host: &Arc<str>,
        tls: Option<&Tls>,
        before: Option<&Origination>,
    ) -> Origination {
        let namespace = merged.map_or("", |merged| merged.namespace);
        client_tls::originate(self.objects, namespace, host, tls, before)
    }

    /// The namespaces of clients that may see other rules of this host than everybody does. Those who see the same
    /// may be among them, never the other way round.
    pub fn special(&self, host: &str, namespace: &str) -> BTreeSet<&'a str> {
        let root = self.root;
        // Everybody looks into two namespaces, where `exportTo` decides; a client into its own besides, where it does
        // not.
        let counts = |special: &Special<'_>| {
            let by_everybody = special.owner == namespace || special.owner == root;
            by_everybody != special.own
        };
        let all = self.special.covering(host).flatten();
        all.filter(|special| counts(special)).map(|special| special.client).collect()
    }

    /// Whether a rule about this host selects these clients.
    pub fn select(&self, client: Client<'_>, host: &str) -> bool {
        let covering = self.by_namespace.get(client.namespace).map(|hosts| hosts.covering(host));
        let mut selectors =
            covering.into_iter().flatten().flatten().filter_map(|rule| rule.selector.as_ref());
        selectors.any(|selector| client.is_selected(selector))
    }

    /// The rule for a service: Istio's three steps. Without a client, what everybody sees.
    pub fn find(&self, client: Option<Client<'_>>, host: &str, namespace: &str) -> Option<Merged<'a>> {
        let root = self.root;
        let is_for = |rule: &DestinationRule| match (&rule.selector, client) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(selector), Some(client)) => {
                *rule.namespace == *client.namespace && client.is_selected(selector)
            }
        };
        let own = client.and_then(|Client { namespace: client, .. }| {
            // In the root namespace are rules for everybody, which must not come before those of the services.
            self.first(client, host, |rule| is_for(rule) && (client != root || is_private(rule)), |_| true)
        });
        let sees = |rule: &DestinationRule| match client {
            Some(client) => rule.visible.to(client.namespace),
            None => rule.visible == Visibility::Everywhere,
        };
        let counts = |rule: &DestinationRule| is_for(rule) && !is_private(rule);
        own.or_else(|| self.first(namespace, host, counts, sees))
            .or_else(|| self.first(root, host, counts, sees))
    }

    /// Of the rules of one namespace that count, those of the most specific host, as far as they are seen.
    fn first(
        &self,
        namespace: &str,
        host: &str,
        counts: impl Fn(&DestinationRule) -> bool,
        sees: impl Fn(&DestinationRule) -> bool,
    ) -> Option<Merged<'a>> {
        let mut covering = self.by_namespace.get(namespace)?.covering(host);
        let rules = covering.find(|rules| rules.iter().any(|rule| counts(rule)))?;
        let counting = || rules.iter().copied().filter(|rule| counts(rule) && sees(rule));
        // One that selects the client comes before all that are for whoever looks, and is one with those that select the same.
        let selector = counting().find_map(|rule| rule.selector.as_ref());
        let mut merged: Option<Merged<'a>> = None;
        for rule in counting().filter(|rule| rule.selector.as_ref() == selector) {
            merged.get_or_insert_default().add(rule);
        }
        merged
    }
}

/// Whether a rule is there for its own namespace alone.
fn is_private(rule: &DestinationRule) -> bool {
    matches!(&rule.visible, Visibility::Namespaces(named) if **named == [rule.namespace.clone()])
}

/// Says of a rule that holds for nothing why that is so.
fn report(rule: &DestinationRule, host: &str, services: &Definitions<'_>, problems: &mut Problems<'_>) {
    if services.covered_by(host).next().is_none() {
        let key = ObjectKey::new("DestinationRule", &rule.namespace, &rule.name);
        let message = format!("no Service has the host {host}, so the rule holds for nothing");
        problems.not_found(&key, "spec.host", "Service", message);
    }
}
