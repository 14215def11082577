//! Clusters: the endpoints of one (service, port, subset), made once however many routes lead there.
//!
//! Promises that an endpoint and a cluster that were there before keep their in-flight counts and positions.
//! Tested in `tests.rs` beside it.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::Arc,
};

use super::{
    destination_rules::{self, DestinationRules, Policy},
    endpoints::{Candidate, selects},
    services::{Definition, Definitions, PortDefinition},
};
use crate::state::{
    resource::destination_rule::Subset,
    snapshot::{Backend, Cluster, Endpoint, RouteAction, Snapshot},
};

/// Makes clusters and remembers them by name.
pub(super) struct Clusters<'a, 'p> {
    definitions: &'p Definitions<'a>,
    rules: &'p DestinationRules<'a>,
    before: HashMap<Arc<str>, Arc<Cluster>>,
    made: HashMap<Arc<str>, Arc<Cluster>>,
}

impl<'a, 'p> Clusters<'a, 'p> {
    /// Nothing made yet; what is made keeps the state it had in `previous`.
    pub fn new(
        definitions: &'p Definitions<'a>,
        rules: &'p DestinationRules<'a>,
        previous: Option<&Snapshot>,
    ) -> Self {
        let before = previous.map(by_name).unwrap_or_default();
        Self { definitions, rules, before, made: HashMap::new() }
    }

    /// The service of this host name.
    pub fn definition(&self, host: &str) -> Option<&'p Definition<'a>> {
        self.definitions.get(host)
    }

    /// All endpoints of a port.
    pub fn whole(&mut self, service: &Definition<'a>, port: &PortDefinition<'a>) -> Arc<Cluster> {
        self.make(service, port, None)
    }

    /// The endpoints of a port that are in a subset; `None` when no rule defines the subset.
    pub fn subset(
        &mut self,
        service: &Definition<'a>,
        port: &PortDefinition<'a>,
        subset: &str,
    ) -> Option<Arc<Cluster>> {
        let merged = self.rules.find(None, &service.host, &service.key.namespace)?;
        let subset = merged.subset(subset)?;
        Some(self.make(service, port, Some(subset)))
    }

    fn make(
        &mut self,
        service: &Definition<'a>,
        port: &PortDefinition<'a>,
        subset: Option<&Subset>,
    ) -> Arc<Cluster> {
        let subset_name = subset.map_or("", |subset| &subset.name);
        let name: Arc<str> = format!("outbound|{}|{subset_name}|{}", port.port, service.host).into();
        if let Some(made) = self.made.get(&name) {
            return Arc::clone(made);
        }
        let merged = self.rules.find(None, &service.host, &service.key.namespace);
        let Policy { balancing, connect_timeout } = destination_rules::policy(merged, subset);
        let before = self.before.get(&name);
        let labels = subset.map(|subset| &subset.labels);
        let cluster = Arc::new(Cluster {
            name: Arc::clone(&name),
            host: Arc::clone(&service.host),
            service: Arc::clone(&service.key.name),
            namespace: Arc::clone(&service.key.namespace),
            port: port.port,
            protocol: port.protocol,
            subset: subset.map(|subset| subset.name.as_str().into()),
            endpoints: endpoints(&port.candidates, labels, before),
            balancing,
            connect_timeout,
            state: before.map(|before| Arc::clone(&before.state)).unwrap_or_default(),
        });
        self.made.insert(name, Arc::clone(&cluster));
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
fn by_name(snapshot: &Snapshot) -> HashMap<Arc<str>, Arc<Cluster>> {
    let mut clusters = HashMap::new();
    let mut add = |cluster: &Arc<Cluster>| {
        clusters.entry(Arc::clone(&cluster.name)).or_insert_with(|| Arc::clone(cluster));
    };
    for port in snapshot.services.values().flat_map(|service| &service.ports) {
        add(&port.cluster);
        for route in port.routes.iter() {
            let RouteAction::Forward(backends) = &route.action else { continue };
            for backend in backends {
                if let Backend::Cluster(cluster) = &backend.backend {
                    add(cluster);
                }
            }
        }
    }
    clusters
}
