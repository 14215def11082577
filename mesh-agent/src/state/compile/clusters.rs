//! Clusters: the endpoints of one (service, port, subset), made once however many routes lead there, and once more
//! for clients of each namespace that have rules of their own.
//!
//! Promises that a cluster which was there before keeps its state; how its endpoints keep theirs is `recipe.rs`'s to say.
//! Tested in `tests.rs` beside it.

use std::{collections::HashMap, net::SocketAddr, sync::Arc};

use super::{
    clients::Client,
    destination_rules::{self, DestinationRules, Merged, Policy},
    locality::Localities,
    mesh_config::MeshSettings,
    recipe::{LaidOut, Recipe},
    resolve,
    service_policies::{ServicePolicies, key_of},
    services::{Definition, Definitions, PortDefinition},
    views::Views,
};
use crate::state::{
    resource::{ObjectKey, destination_rule::Subset, service_policy::FallbackTo},
    snapshot::{Checked, Cluster, Snapshot, Standby, Use, Visibility},
};

/// Host name and port of a service.
type PortKey = (Arc<str>, u16);

/// A cluster's name, and the namespace of its clients where it is theirs alone.
pub(super) type Key = (Arc<str>, Option<Arc<str>>);

/// What is named and not there: its kind, and a sentence.
type NotFound = (&'static str, String);

/// Makes clusters and remembers them by name and view.
pub(super) struct Clusters<'a, 'p> {
    definitions: &'p Definitions<'a>,
    rules: &'p DestinationRules<'a>,
    policies: &'p ServicePolicies<'a>,
    views: &'p Views<'p>,
    place: (&'p Localities<'a>, &'p MeshSettings),
    before: HashMap<Key, Arc<Cluster>>,
    made: HashMap<Key, Arc<Cluster>>,
    /// The same clusters as they serve for others: without fallbacks.
    plain: HashMap<Key, Arc<Cluster>>,
    /// What is known of ports that are checked, and of their addresses; of those of the snapshot before too.
    checks: HashMap<PortKey, Arc<Use>>,
    checked: HashMap<(PortKey, SocketAddr), Arc<Checked>>,
    /// What the clusters are made by that a rule is about.
    pub recipes: HashMap<Key, Recipe>,
    /// Fallbacks that lead nowhere.
    pub unresolved: Vec<(ObjectKey, String, NotFound)>,
}

impl<'a, 'p> Clusters<'a, 'p> {
    /// Nothing made yet; what is made keeps the state it had in `previous`.
    pub fn new(
        definitions: &'p Definitions<'a>,
        rules: &'p DestinationRules<'a>,
        policies: &'p ServicePolicies<'a>,
        views: &'p Views<'p>,
        place: (&'p Localities<'a>, &'p MeshSettings),
        previous: Option<&Snapshot>,
    ) -> Self {
        let before = previous.map(by_key).unwrap_or_default();
        let ports = || previous.into_iter().flat_map(|previous| previous.checked.iter());
        let uses =
            ports().filter_map(|(key, port)| Some((key.clone(), port.cluster.standby.checks.clone()?)));
        let known = ports().flat_map(|(key, port)| {
            port.endpoints().map(|(endpoint, known)| ((key.clone(), endpoint.address), Arc::clone(known)))
        });
        Self {
            checks: uses.collect(),
            checked: known.collect(),
            definitions,
            rules,
            policies,
            views,
            place,
            before,
            made: HashMap::new(),
            plain: HashMap::new(),
            recipes: HashMap::new(),
            unresolved: Vec::new(),
        }
    }

    /// The service of this host name.
    pub fn definition(&self, host: &str) -> Option<&'p Definition<'a>> {
        self.definitions.get(host)
    }

    /// All endpoints of a port, for clients of one namespace or for everybody else.
    pub fn whole(
        &mut self,
        service: &Definition<'a>,
        port: &PortDefinition<'a>,
        client: Option<Client<'_>>,
    ) -> Arc<Cluster> {
        let client = client.and_then(|client| self.views.of_endpoints(&service.host, client));
        let merged = self.rules.find(client, &service.host, &service.key.namespace);
        self.with_fallbacks(service, port, client, merged.as_ref(), None)
    }

    /// The endpoints of a port that are in a subset; `None` when no rule defines the subset.
    pub fn subset(
        &mut self,
        service: &Definition<'a>,
        port: &PortDefinition<'a>,
        subset: &str,
        client: Option<Client<'_>>,
    ) -> Option<Arc<Cluster>> {
        let client = client.and_then(|client| self.views.of_endpoints(&service.host, client));
        let merged = self.rules.find(client, &service.host, &service.key.namespace)?;
        let subset = merged.subset(subset)?;
        Some(self.with_fallbacks(service, port, client, Some(&merged), Some(subset)))
    }

    fn make(
        &mut self,
        service: &Definition<'a>,
        port: &PortDefinition<'a>,
        client: Option<Client<'_>>,
        merged: Option<&Merged<'a>>,
        subset: Option<&Subset>,
    ) -> Arc<Cluster> {
        let subset_name = subset.map_or("", |subset| &subset.name);
        let name: Arc<str> = format!("outbound|{}|{subset_name}|{}", port.port, service.host).into();
        let view: Option<Arc<str>> = client.map(|client| client.name.into());
        let key = (Arc::clone(&name), view.clone());
        if let Some(made) = self.plain.get(&key) {
            return Arc::clone(made);
        }
        let policy = destination_rules::policy(merged, subset, port.port, service.by_latency);
        let port_key = || (Arc::clone(&service.host), port.port);
        let checks = self.policies.of(&service.host, port.port).health_check().is_some();
        let checks = checks.then(|| Arc::clone(self.checks.entry(port_key()).or_default()));
        let before = self.before.get(&key);
        let tls = self.rules.originate(
            merged,
            &service.host,
            policy.tls.as_ref(),
            before.map(|before| &before.tls),
        );
        let is_plain = merged.is_none() && service.nearby.is_none() && !service.by_latency;
        let labels = subset.map(|subset| subset.labels.clone());
        let recipe = Recipe { labels, policy, nearby: service.nearby };
        let checked = &mut self.checked;
        let known = |address| Arc::clone(checked.entry((port_key(), address)).or_default());
        let known = checks.is_some().then_some(known);
        let LaidOut { endpoints, spread, balancing, hash, limits_connections } =
            recipe.lay_out(&port.candidates, before, self.place, known);
        let Policy { connect_timeout, pool, outlier, retry_budget, proxy_protocol, tunnel, .. } =
            &recipe.policy;
        let cluster = Arc::new(Cluster {
            name,
            host: Arc::clone(&service.host),
            service: Arc::clone(&service.key.name),
            namespace: Arc::clone(&service.key.namespace),
            port: port.port,
            protocol: port.protocol,
            headless: service.headless,
            subset: subset.map(|subset| subset.name.as_str().into()),
            view,
            endpoints,
            spread,
            balancing,
            hash,
            outlier: *outlier,
            connect_timeout: *connect_timeout,
            pool: *pool,
            tls,
            limits_connections,
            retry_budget: *retry_budget,
            proxy_protocol: *proxy_protocol,
            tunnel: tunnel.clone(),
            standby: Standby { checks, fallbacks: Vec::new() },
            state: before.map(|before| Arc::clone(&before.state)).unwrap_or_default(),
        });
        if !is_plain {
            self.recipes.insert(key.clone(), recipe);
        }
        self.plain.insert(key, Arc::clone(&cluster));
        cluster
    }

    /// The same, with those that serve where nobody in it does.
    fn with_fallbacks(
        &mut self,
        service: &Definition<'a>,
        port: &PortDefinition<'a>,
        client: Option<Client<'_>>,
        merged: Option<&Merged<'a>>,
        subset: Option<&Subset>,
    ) -> Arc<Cluster> {
        let plain = self.make(service, port, client, merged, subset);
        let policies = self.policies.of(&service.host, port.port);
        let named = policies.fallbacks(subset.map(|subset| &*subset.name));
        let Some((policy, place, to)) = named else { return plain };
        let key = (Arc::clone(&plain.name), plain.view.clone());
        if let Some(made) = self.made.get(&key) {
            return Arc::clone(made);
        }
        let mut fallbacks: Vec<Arc<Cluster>> = Vec::with_capacity(to.len());
        for (i, to) in to.iter().enumerate() {
            match self.fallback(service, port.port, client, to) {
                // Itself would be asked again for nothing.
                Ok(fallback) if fallback.name == plain.name => {}
                Ok(fallback) => fallbacks.push(fallback),
                Err((part, not_found)) => {
                    let field = format!("spec.fallbacks[{place}].to[{i}].{part}");
                    self.unresolved.push((key_of(policy), field, not_found));
                }
            }
        }
        let cluster = if fallbacks.is_empty() {
            plain
        } else {
            let standby = Standby { fallbacks, ..plain.standby.clone() };
            Arc::new(Cluster { standby, limits_connections: true, ..Cluster::clone(&plain) })
        };
        self.made.insert(key, Arc::clone(&cluster));
        cluster
    }

    /// A cluster that serves for another: without fallbacks of its own.
    fn fallback(
        &mut self,
        service: &Definition<'a>,
        dialled: u16,
        client: Option<Client<'_>>,
        to: &FallbackTo,
    ) -> Result<Arc<Cluster>, (&'static str, NotFound)> {
        let host = to.host.as_ref().map(|host| resolve(host, &service.key.namespace));
        let other = host.as_ref().map(|host| self.definitions.get(host));
        let Some(target) = other.unwrap_or_else(|| self.definitions.get(&service.host)) else {
            let message = format!("no Service has the host {}", host.unwrap_or_default());
            return Err(("host", ("Service", message)));
        };
        let seen = client
            .map_or(target.visible == Visibility::Everywhere, |client| target.visible.to(client.namespace));
        if host.is_some() && !seen {
            let message = format!("{} is not exported to all who would be led there", target.key);
            return Err(("host", ("Service", message)));
        }
        let number = match (to.port, target.ports.as_slice()) {
            (Some(number), _) => number,
            (None, [only]) => only.port,
            (None, _) => dialled,
        };
        let Some(port) = target.port(number) else {
            return Err(("port", ("Service", format!("{} has no TCP port {number}", target.key))));
        };
        let client = client.and_then(|client| self.views.of_endpoints(&target.host, client));
        let merged = self.rules.find(client, &target.host, &target.key.namespace);
        let Some(name) = &to.subset else {
            return Ok(self.make(target, port, client, merged.as_ref(), None));
        };
        let subset = merged.as_ref().and_then(|merged| merged.subset(name));
        let Some(subset) = subset else {
            let text = format!("no DestinationRule defines the subset {name:?} of {}", target.host);
            return Err(("subset", ("DestinationRule", text)));
        };
        Ok(self.make(target, port, client, merged.as_ref(), Some(subset)))
    }
}

/// Every cluster that a snapshot leads to.
fn by_key(snapshot: &Snapshot) -> HashMap<Key, Arc<Cluster>> {
    let clusters = snapshot.clusters();
    clusters.map(|cluster| ((Arc::clone(&cluster.name), cluster.view.clone()), Arc::clone(cluster))).collect()
}
