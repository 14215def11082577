//! Clusters: the endpoints of one (service, port, subset), made once however many routes lead there, and once more
//! for clients of each namespace that have rules of their own.
//!
//! Promises that an endpoint and a cluster that were there before keep their in-flight counts and positions.
//! Tested in `tests.rs` beside it.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::Arc,
};

use super::{
    destination_rules::{self, DestinationRules, Merged, Policy},
    endpoints::{Candidate, selects},
    services::{Definition, Definitions, PortDefinition},
    views::Views,
};
use crate::state::{
    resource::{destination_rule::Subset, load_balancer::Balancer},
    snapshot::{Balancing, Cluster, ConsistentHash, Endpoint, Snapshot},
};

/// A cluster's name, and the namespace of its clients where it is theirs alone.
type Key = (Arc<str>, Option<Arc<str>>);

/// Makes clusters and remembers them by name and view.
pub(super) struct Clusters<'a, 'p> {
    definitions: &'p Definitions<'a>,
    rules: &'p DestinationRules<'a>,
    views: &'p Views<'p>,
    before: HashMap<Key, Arc<Cluster>>,
    made: HashMap<Key, Arc<Cluster>>,
}

impl<'a, 'p> Clusters<'a, 'p> {
    /// Nothing made yet; what is made keeps the state it had in `previous`.
    pub fn new(
        definitions: &'p Definitions<'a>,
        rules: &'p DestinationRules<'a>,
        views: &'p Views<'p>,
        previous: Option<&Snapshot>,
    ) -> Self {
        let before = previous.map(by_key).unwrap_or_default();
        Self { definitions, rules, views, before, made: HashMap::new() }
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
        client: Option<&str>,
    ) -> Arc<Cluster> {
        let client = client.filter(|client| self.views.is_special(&service.host, client));
        let merged = self.rules.find(client, &service.host, &service.key.namespace);
        self.make(service, port, client, merged.as_ref(), None)
    }

    /// The endpoints of a port that are in a subset; `None` when no rule defines the subset.
    pub fn subset(
        &mut self,
        service: &Definition<'a>,
        port: &PortDefinition<'a>,
        subset: &str,
        client: Option<&str>,
    ) -> Option<Arc<Cluster>> {
        let client = client.filter(|client| self.views.is_special(&service.host, client));
        let merged = self.rules.find(client, &service.host, &service.key.namespace)?;
        let subset = merged.subset(subset)?;
        Some(self.make(service, port, client, Some(&merged), Some(subset)))
    }

    fn make(
        &mut self,
        service: &Definition<'a>,
        port: &PortDefinition<'a>,
        client: Option<&str>,
        merged: Option<&Merged<'a>>,
        subset: Option<&Subset>,
    ) -> Arc<Cluster> {
        let subset_name = subset.map_or("", |subset| &subset.name);
        let name: Arc<str> = format!("outbound|{}|{subset_name}|{}", port.port, service.host).into();
        let view: Option<Arc<str>> = client.map(Arc::from);
        let key = (Arc::clone(&name), view.clone());
        if let Some(made) = self.made.get(&key) {
            return Arc::clone(made);
        }
        let Policy { balancer, connect_timeout, outlier, limits_connections, retry_budget } =
            destination_rules::policy(merged, subset, port.port);
        let before = self.before.get(&key);
        let labels = subset.map(|subset| &subset.labels);
        let endpoints = endpoints(&port.candidates, labels, before);
        let (balancing, hash) = match balancer {
            Balancer::Simple(balancing) => (balancing, None),
            Balancer::Hash(key, table) => {
                let addresses: Vec<_> = endpoints.iter().map(|endpoint| endpoint.address).collect();
                (Balancing::Random, Some(ConsistentHash::new(key, table, &addresses)))
            }
        };
        let cluster = Arc::new(Cluster {
            name,
            host: Arc::clone(&service.host),
            service: Arc::clone(&service.key.name),
            namespace: Arc::clone(&service.key.namespace),
            port: port.port,
            protocol: port.protocol,
            subset: subset.map(|subset| subset.name.as_str().into()),
            view,
            endpoints,
            balancing,
            hash,
            outlier,
            connect_timeout,
            limits_connections,
            retry_budget,
            state: before.map(|before| Arc::clone(&before.state)).unwrap_or_default(),
        });
        self.made.insert(key, Arc::clone(&cluster));
        cluster
    }
}

fn endpoints(
    candidates: &[Candidate<'_>],
    labels: Option<&BTreeMap<String, String>>,
    before: Option<&Arc<Cluster>>,
) -> Vec<Arc<Endpoint>> {
    let before: HashMap<SocketAddr, &Arc<Endpoint>> = before
        .iter()
        .flat_map(|cluster| &cluster.endpoints)
        .map(|endpoint| (endpoint.address, endpoint))
        .collect();
    let chosen =
        candidates.iter().filter(|candidate| labels.is_none_or(|labels| selects(labels, candidate.labels)));
    chosen
        .map(|candidate| {
            let before = before.get(&candidate.address);
            Arc::new(Endpoint {
                address: candidate.address,
                workload: candidate.workload.clone(),
                state: before.map(|before| Arc::clone(&before.state)).unwrap_or_default(),
            })
        })
        .collect()
}

/// Every cluster that a snapshot leads to.
fn by_key(snapshot: &Snapshot) -> HashMap<Key, Arc<Cluster>> {
    let clusters = snapshot.clusters();
    clusters.map(|cluster| ((Arc::clone(&cluster.name), cluster.view.clone()), Arc::clone(cluster))).collect()
}
