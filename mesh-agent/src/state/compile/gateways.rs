//! Gateways: which `VirtualService`s are bound to which, and what the gateway's own process serves.
//!
//! Promises, as Istio has it: on a port of plain HTTP all servers are one; of several `VirtualService`s for one host the oldest
//! comes first, and what takes everything comes last; of a port that is spoken in two ways, and of a name that TLS asks for
//! twice, the oldest `Gateway` keeps it, and the others are told. Only a gateway's own process compiles what it serves
//! (`Settings::gateway`); what is wrong whoever serves it, everybody says. Tested in `tests/gateways.rs`.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    Problems, Settings, client_tls, covers,
    delegates::{self, Rule},
    destinations::{Destinations, Place},
    endpoints::selects,
    resolve,
    virtual_services::{key_of, report_mirrors},
};
use crate::state::{
    resource::{
        ObjectKey, Objects, Resource,
        gateway::{Gateway as Written, Host},
        of_kind,
        virtual_service::{RuleAction, Target, VirtualService},
    },
    snapshot::{Gateway, Snapshot, Workload},
};

mod merge;
mod routes;
mod serve;
mod tls;

/// The gateway that is between the pods of the mesh, which is none.
const MESH: &str = "mesh";

/// A `VirtualService` that is bound to gateways, its delegates' rules in their places.
struct Bound<'a> {
    /// The object.
    service: &'a VirtualService,
    /// Its hosts, in small letters.
    hosts: Vec<String>,
    /// Its HTTP rules; none of them delegates.
    http: Vec<Rule<'a>>,
}

impl Bound<'_> {
    /// The hosts that it and a server have in common, each as the narrower of the two names it.
    fn shared<'h>(&self, hosts: impl Iterator<Item = &'h Host>) -> Vec<String> {
        let mut shared: Vec<String> = Vec::new();
        for host in hosts {
            if host.namespace.as_ref().is_some_and(|namespace| **namespace != *self.service.namespace) {
                continue;
            }
            for other in &self.hosts {
                let narrower = if covers(&host.name, other) {
                    other
                } else if covers(other, &host.name) {
                    &host.name
                } else {
                    continue;
                };
                if !shared.contains(narrower) {
                    shared.push(narrower.clone());
                }
            }
        }
        shared
    }

    /// Says of a gateway that it names if nothing comes of that.
    fn report(&self, field: &str, name: &str, gateway: Option<&Written>, problems: &mut Problems<'_>) {
        let key = key_of(self.service);
        let Some(gateway) = gateway else {
            let message = format!("there is no Gateway {name}, so the routes hold for nothing there");
            return problems.not_found(&key, field, "Gateway", message);
        };
        let hosts = gateway.servers.iter().flat_map(|server| &server.hosts);
        if !self.hosts.is_empty() && self.shared(hosts).is_empty() {
            let namespace = &self.service.namespace;
            let message = format!(
                "no server of Gateway {name} has any of spec.hosts for namespace {namespace}, so the routes hold for \
                 nothing there"
            );
            problems.add(&key, field, message);
        }
    }
}

/// All that are bound to gateways.
pub(super) struct Bindings<'a> {
    /// Oldest first.
    all: Vec<Bound<'a>>,
    /// Places in `all` by `NAMESPACE/NAME` of the gateway.
    by_gateway: BTreeMap<&'a str, Vec<usize>>,
}

impl<'a> Bindings<'a> {
    /// Looks through all of them.
    pub fn index(objects: &'a Objects, problems: &mut Problems<'_>) -> Self {
        let known: BTreeMap<String, &Written> = written(objects).map(|one| (name_of(one), one)).collect();
        let services = of_kind(objects, "VirtualService").filter_map(|(_, object)| match &object.resource {
            Resource::VirtualService(service) => Some(&**service),
            _ => None,
        });
        let is_bound = |service: &&VirtualService| service.gateways.iter().any(|name| name != MESH);
        let mut services: Vec<&VirtualService> = services.filter(is_bound).collect();
        services.sort_by_key(|service| {
            (service.created.is_none(), &service.created, &service.name, &service.namespace)
        });
        let mut bindings = Self { all: Vec::new(), by_gateway: BTreeMap::new() };
        for service in services {
            let http = delegates::expand(objects, service, problems);
            report_mirrors(&http, problems);
            let hosts = service.hosts.iter().map(|host| resolve(host, &service.namespace)).collect();
            let one = Bound { service, hosts, http };
            for (i, name) in service.gateways.iter().enumerate().filter(|(_, name)| *name != MESH) {
                one.report(&format!("spec.gateways[{i}]"), name, known.get(name).copied(), problems);
                let bound = bindings.by_gateway.entry(name).or_default();
                if bound.last() != Some(&bindings.all.len()) {
                    bound.push(bindings.all.len());
                }
            }
            bindings.all.push(one);
        }
        bindings
    }

    /// What the gateway's own process serves in its pod. For anybody else nothing, but what would be wrong with it.
    pub fn gateway(
        &self,
        (objects, previous): (&Objects, Option<&Snapshot>),
        own: Option<&Arc<Workload>>,
        mut destinations: Destinations<'_, '_, '_, '_>,
    ) -> Option<Arc<Gateway>> {
        let Some(own) = own else {
            self.check(&mut destinations);
            return None;
        };
        let before = previous.and_then(|previous| previous.gateway.as_deref());
        Some(Arc::new(self.served(objects, own, before, destinations)))
    }

    /// Says which destinations are nobody's, whoever looks. A gateway's own process finds that out itself.
    fn check(&self, destinations: &mut Destinations<'_, '_, '_, '_>) {
        for bound in &self.all {
            for rule in &bound.http {
                if let RuleAction::Forward(all) = &rule.says.action {
                    for to in all {
                        let field = format!("spec.http[{}].route[{}].destination", rule.index, to.index);
                        destinations.check(&Place { owner: rule.owner, field }, &to.target);
                    }
                }
                let (owner, index) = rule.mirrored_by();
                for mirror in rule.says.mirrors.iter().flatten() {
                    let field = format!("spec.http[{index}].{}", mirror.field);
                    destinations.check(&Place { owner, field }, &mirror.target);
                }
            }
            for (field, target) in streams(bound.service) {
                destinations.check(&Place { owner: bound.service, field }, target);
            }
        }
    }

    /// Those that are bound to a gateway and there for its pod, oldest first, with their places.
    fn of<'s>(&'s self, gateway: &str, namespace: &str) -> impl Iterator<Item = (usize, &'s Bound<'a>)> {
        let places = self.by_gateway.get(gateway).into_iter().flatten();
        let all = places.filter_map(|place| Some((*place, self.all.get(*place)?)));
        all.filter(move |(_, bound)| bound.service.visible.to(namespace))
    }

    fn served(
        &self,
        objects: &Objects,
        workload: &Arc<Workload>,
        before: Option<&Gateway>,
        destinations: Destinations<'_, '_, '_, '_>,
    ) -> Gateway {
        let labels = |written: &&Written| {
            written.selector.iter().all(|(name, value)| {
                workload.labels.get(name.as_str()).is_some_and(|found| **found == **value)
            })
        };
        let mut selecting: Vec<&Written> = written(objects).filter(labels).collect();
        selecting.sort_by_key(|one| (one.created.is_none(), &one.created, &one.name, &one.namespace));
        let ports = merge::ports(&selecting, destinations.problems);
        let mut serve = serve::Serve::new(self, objects, workload, before, destinations);
        let ports =
            ports.into_iter().map(|(number, servers)| Arc::new(serve.port(number, &servers))).collect();
        Gateway { workload: Arc::clone(workload), ports }
    }
}

/// The destinations of `tls[]` and `tcp[]`, and where they stand.
fn streams(service: &VirtualService) -> impl Iterator<Item = (String, &Target)> {
    let lists = [("tls", &service.tls), ("tcp", &service.tcp)];
    lists.into_iter().flat_map(|(list, rules)| {
        rules.iter().enumerate().flat_map(move |(i, rule)| {
            let field = move |index| format!("spec.{list}[{i}].route[{index}].destination");
            rule.route.iter().map(move |to| (field(to.index), &to.target))
        })
    })
}

/// All `Gateway`s.
fn written(objects: &Objects) -> impl Iterator<Item = &Written> {
    of_kind(objects, "Gateway").filter_map(|(_, object)| match &object.resource {
        Resource::Gateway(gateway) => Some(&**gateway),
        _ => None,
    })
}

/// As `VirtualService`s name it.
fn name_of(gateway: &Written) -> String {
    format!("{}/{}", gateway.namespace, gateway.name)
}

/// The host names of clusters that the gateway leads to.
pub(super) fn led_to(snapshot: &Snapshot) -> BTreeSet<Arc<str>> {
    let clusters = snapshot.gateway.iter().flat_map(|gateway| gateway.clusters());
    clusters.map(|cluster| Arc::clone(&cluster.host)).collect()
}

/// The key of a `Gateway`.
fn key_of_gateway(gateway: &Written) -> ObjectKey {
    ObjectKey::new("Gateway", &gateway.namespace, &gateway.name)
}

/// Namespace and name of each Secret that the gateway's own process has to show, or believes clients by: of the `Gateway`s that
/// select its pod, in its pod's namespace. None for anybody else.
pub(super) fn named_secrets(objects: &Objects, settings: &Settings) -> BTreeSet<(Arc<str>, Arc<str>)> {
    let mut named = BTreeSet::new();
    let Some(own) = &settings.gateway else { return named };
    let pod = objects.get(&ObjectKey::new("Pod", &own.namespace, &own.name)).map(|object| &object.resource);
    let Some(Resource::Pod(pod)) = pod else { return named };
    let labels = pod.metadata.labels.as_ref();
    let selecting = written(objects).filter(|one| one.selector.is_empty() || selects(&one.selector, labels));
    for terms in selecting.flat_map(Written::terms) {
        let Some(name) = &terms.credential else { continue };
        named.insert((Arc::clone(&own.namespace), name.as_str().into()));
        if terms.asks_clients() {
            named.insert((Arc::clone(&own.namespace), client_tls::roots_alone(name).into()));
        }
    }
    named
}
