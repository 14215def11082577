//! From checked objects to the [`Snapshot`] the path reads.
//!
//! Pure: the same objects give the same snapshot, and whatever is wrong becomes a [`Problem`] and changes only what
//! it names. What follows changes one by one, and compiles only what they concern, is [`Compiled`].
//! Tested by tables of YAML in `tests.rs`.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::Arc,
};

use self::{
    authentication::Authentications,
    authorization::Authorizations,
    clients::{Client, Clients, Selections},
    clusters::Clusters,
    destination_rules::DestinationRules,
    destinations::Destinations,
    gateways::Bindings,
    locality::Localities,
    mesh_config::MeshSettings,
    recipe::Recipe,
    request_authentication::TokenRules,
    service_policies::ServicePolicies,
    services::{Definition, Definitions},
    views::Views,
    virtual_services::{Routed, VirtualServices},
    workloads::Pods,
};
use super::{
    Cause, Problem, defaults,
    resource::{ObjectKey, Objects},
    snapshot::{CheckedPort, Cluster, Guard, Service, ServicePort, SharedMap, Snapshot},
};

mod authentication;
mod authorization;
mod client_tls;
mod clients;
mod clusters;
mod delegates;
mod destination_rules;
mod destinations;
mod endpoints;
mod gateways;
mod hosts;
mod incremental;
mod locality;
mod mesh_config;
mod origins;
mod pod_changes;
mod protocol;
mod recipe;
mod renewal;
mod request_authentication;
mod routes;
mod selectors;
mod service_policies;
mod services;
mod spread;
mod starting;
mod streams;
#[cfg(test)]
mod tests;
mod views;
mod virtual_services;
mod workloads;

pub use self::{
    client_tls::named_secrets,
    incremental::{Change, Compiled},
    workloads::{ANNOUNCED, ENROLLED},
};

/// What compiling needs to know besides the objects.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Trust domain of identities.
    pub trust_domain: Arc<str>,
    /// Namespace whose policies and rules are the whole mesh's (Istio's `rootNamespace`).
    pub root_namespace: Arc<str>,
    /// Name of the node whose clients it is for, which decides what is near; `None`: of no node.
    pub node: Option<Arc<str>>,
    /// Where pods' network namespaces come from.
    pub netns: Netns,
    /// Namespace and name of the gateway's own pod, where it is for a gateway.
    pub gateway: Option<GatewayPod>,
}

/// Namespace and name of a gateway's own pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayPod {
    /// `metadata.namespace`.
    pub namespace: Arc<str>,
    /// `metadata.name`.
    pub name: Arc<str>,
}

impl Settings {
    /// Whether this is the gateway's own pod.
    pub fn is_own(&self, key: &ObjectKey) -> bool {
        let is_it = |own: &GatewayPod| own.namespace == key.namespace && own.name == key.name;
        &*key.kind == "Pod" && self.gateway.as_ref().is_some_and(is_it)
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            trust_domain: defaults::TRUST_DOMAIN.into(),
            root_namespace: defaults::ROOT_NAMESPACE.into(),
            node: None,
            netns: Netns::Annotation,
            gateway: None,
        }
    }
}

/// Where pods' network namespaces come from, and with that, who says which pods are in the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Netns {
    /// The annotation `mesh.io/netns`; an enrolled pod that has none is left alone. Labels say which pods are in the mesh.
    Annotation,
    /// They are found on the node, and have names in this directory: the pods' UIDs. Labels say which pods of this node
    /// are to be in the mesh, annotations of their agents which pods of other nodes are.
    Node(Arc<Path>),
}

/// Compiles objects. Endpoints, clusters and workloads that were in `previous` keep what they remember.
pub fn compile(
    objects: &Objects,
    previous: Option<&Snapshot>,
    settings: &Settings,
) -> (Snapshot, Vec<Problem>) {
    let Whole { snapshot, problems, .. } = whole(objects, previous, settings);
    (snapshot, problems.into_iter().collect())
}

/// What comes of compiling all there is.
struct Whole {
    snapshot: Snapshot,
    problems: BTreeSet<Problem>,
    /// What it takes to follow changes of endpoints.
    kept: Kept,
}

/// What the snapshot does not show and changes of endpoints go by.
#[derive(Debug, Default)]
struct Kept {
    /// What the clusters are made by that a rule is about.
    recipes: HashMap<clusters::Key, Recipe>,
    /// By host name: the other services that lead to clusters of this one.
    users: HashMap<Arc<str>, BTreeSet<Arc<str>>>,
    /// Addresses that are endpoints of several services.
    shared: renewal::Shared,
    /// Addresses that several pods have.
    shared_ips: HashSet<IpAddr>,
    /// Whether it is counted where the pods of workloads are.
    counts_origins: bool,
    /// The host names of clusters that the gateway leads to.
    of_gateway: BTreeSet<Arc<str>>,
}

impl Kept {
    /// Knows which services share addresses now, of those that may have changed.
    fn share(&mut self, addresses: renewal::Shared) {
        for (address, hosts) in addresses {
            if hosts.len() > 1 {
                self.shared.insert(address, hosts);
            } else {
                self.shared.remove(&address);
            }
        }
    }
}

fn whole(objects: &Objects, previous: Option<&Snapshot>, settings: &Settings) -> Whole {
    let mut problems = Problems::new(objects);
    let (mesh, settings) = MeshSettings::find(objects, settings, &mut problems);
    let settings = &*settings;
    let mut policies = Policies::index(objects, previous, (settings, &mesh), &mut problems);
    let pods = Pods::index(objects, previous, settings, &mut policies, &mut problems);
    let localities = Localities::index(objects, settings);
    let definitions = Definitions::index(objects, &pods, &localities, &mut problems);
    mesh.check(&definitions, &mut problems);
    let rules = DestinationRules::index(objects, settings, &definitions, &mut problems);
    let virtual_services = VirtualServices::index(objects, &definitions, &mut problems);
    let bindings = Bindings::index(objects, &mut problems);
    let service_policies = ServicePolicies::index(objects, &definitions, &mut problems);
    let clients = Clients::index(&policies.selections, &pods);
    let views = Views::index(&definitions, &rules, &clients, &pods);
    let mut clusters =
        Clusters::new(&definitions, &rules, &service_policies, &views, (&localities, &mesh), previous);
    let mut entries = Entries::default();
    for definition in definitions.iter() {
        let mut seen = |client| {
            let mut destinations = Destinations { clusters: &mut clusters, problems: &mut problems, client };
            let namespace = client.map(|client: Client<'_>| client.namespace);
            ports(&mut destinations, definition, virtual_services.find(&definition.host, namespace))
        };
        let ports = seen(None);
        let special = views.of(definition, &virtual_services, &pods).into_iter();
        let views = special.map(|name| (name.into(), seen(Some(views.named(name))))).collect();
        let service = Arc::new(Service {
            host: Arc::clone(&definition.host),
            name: Arc::clone(&definition.key.name),
            namespace: Arc::clone(&definition.key.namespace),
            vips: definition.vips.clone(),
            headless: definition.headless,
            visible: definition.visible.clone(),
            ports,
            views,
        });
        for port in &service.ports {
            let policies = service_policies.of(&service.host, port.port);
            service_policies::enter(&mut entries, previous, policies, port);
        }
        entries.enter(service);
    }
    let own = pods.own.as_ref().map(|own| (own, views.named(own.view())));
    let destinations =
        Destinations { clusters: &mut clusters, problems: &mut problems, client: own.map(|own| own.1) };
    let gateway = bindings.gateway((objects, previous), own.map(|own| own.0), destinations);
    for (key, field, (kind, message)) in clusters.unresolved {
        problems.not_found(&key, &field, kind, message);
    }
    let counts_origins = origins::are_asked_for(objects);
    let snapshot = Snapshot {
        origins: if counts_origins { origins::of_all(&pods, &localities) } else { SharedMap::default() },
        revision: previous.map_or(0, |previous| previous.revision) + 1,
        workloads: pods.workloads,
        services: entries.services.into_iter().collect(),
        vips: entries.vips.into_iter().collect(),
        inbound: entries.inbound.into_iter().collect(),
        headless: entries.headless.into_iter().collect(),
        guards: entries.guards.into_iter().collect(),
        checked: entries.checked.into_iter().collect(),
        path_normalization: mesh.path_normalization,
        starting: starting::of_all(objects, settings),
        enrolling: Arc::new(workloads::enrolling(objects)),
        key_sets: std::mem::take(&mut policies.tokens.key_sets),
        gateway,
    };
    let kept = Kept {
        of_gateway: gateways::led_to(&snapshot),
        recipes: clusters.recipes,
        users: entries.users,
        shared: entries.shared,
        shared_ips: pods.shared,
        counts_origins,
    };
    Whole { snapshot, problems: problems.found, kept }
}

/// Who may come to which pod, and what selects pods as clients.
struct Policies<'a> {
    selections: Selections<'a>,
    authentications: Authentications<'a>,
    authorizations: Authorizations<'a>,
    tokens: TokenRules<'a>,
}

impl<'a> Policies<'a> {
    /// Looks through all of them.
    fn index(
        objects: &'a Objects,
        previous: Option<&Snapshot>,
        (settings, mesh): (&Settings, &MeshSettings),
        problems: &mut Problems<'_>,
    ) -> Self {
        Self {
            selections: Selections::index(objects),
            authentications: Authentications::index(objects, settings),
            authorizations: Authorizations::index(objects, settings, mesh, problems),
            tokens: TokenRules::index(objects, previous, settings, problems),
        }
    }
}

/// The ports of a service as the clients see them that `destinations` is for.
fn ports<'a>(
    destinations: &mut Destinations<'_, 'a, '_, '_>,
    definition: &Definition<'a>,
    routed: Option<&Routed<'_>>,
) -> Vec<ServicePort> {
    let ports = definition.ports.iter().map(|port| ServicePort {
        port: port.port,
        protocol: port.protocol,
        routes: routes::compile(destinations, definition, port, routed),
        streams: streams::compile(destinations, routed.map(|routed| routed.service), port.port),
        cluster: destinations.clusters.whole(definition, port, destinations.client),
    });
    ports.collect()
}

/// The tables of a snapshot while they are filled.
#[derive(Default)]
struct Entries {
    services: Vec<(Arc<str>, Arc<Service>)>,
    vips: HashMap<IpAddr, Arc<Service>>,
    inbound: HashMap<SocketAddr, Arc<Cluster>>,
    headless: HashMap<SocketAddr, Arc<str>>,
    guards: HashMap<SocketAddr, Arc<Guard>>,
    checked: HashMap<(Arc<str>, u16), Arc<CheckedPort>>,
    /// As in [`Kept`].
    users: HashMap<Arc<str>, BTreeSet<Arc<str>>>,
    shared: HashMap<SocketAddr, BTreeSet<Arc<str>>>,
}

impl Entries {
    /// Makes a service known by its name and addresses.
    fn enter(&mut self, service: Arc<Service>) {
        for port in &service.ports {
            for endpoint in &port.cluster.endpoints {
                if service.headless {
                    self.headless.entry(endpoint.address).or_insert_with(|| Arc::clone(&service.host));
                }
                let first = self.inbound.entry(endpoint.address).or_insert_with(|| Arc::clone(&port.cluster));
                if first.host != service.host {
                    let all = self.shared.entry(endpoint.address).or_default();
                    all.extend([Arc::clone(&first.host), Arc::clone(&service.host)]);
                }
            }
        }
        for cluster in service.clusters().filter(|cluster| cluster.host != service.host) {
            self.users.entry(Arc::clone(&cluster.host)).or_default().insert(Arc::clone(&service.host));
        }
        for vip in &service.vips {
            self.vips.insert(*vip, Arc::clone(&service));
        }
        self.services.push((Arc::clone(&service.host), service));
    }
}

/// Collects problems, each once.
struct Problems<'a> {
    objects: &'a Objects,
    found: BTreeSet<Problem>,
}

impl<'a> Problems<'a> {
    fn new(objects: &'a Objects) -> Self {
        Self { objects, found: BTreeSet::new() }
    }

    /// Of what has no effect, or another one than it says.
    fn add(&mut self, key: &ObjectKey, field: &str, message: impl Into<String>) {
        self.caused(key, field, Cause::NoEffect, message);
    }

    /// Of what names something of a kind that is not there.
    fn not_found(&mut self, key: &ObjectKey, field: &str, kind: &'static str, message: impl Into<String>) {
        self.caused(key, field, Cause::NotFound(kind), message);
    }

    /// Of what another object holds in place of.
    fn conflict(&mut self, key: &ObjectKey, field: &str, message: impl Into<String>) {
        self.caused(key, field, Cause::Conflict, message);
    }

    fn caused(&mut self, key: &ObjectKey, field: &str, cause: Cause, message: impl Into<String>) {
        self.found.insert(Problem {
            file: self.objects.get(key).map(|object| object.file.to_string()).unwrap_or_default(),
            object: Some(key.to_string()),
            field: Some(field.to_owned()).filter(|field| !field.is_empty()),
            message: message.into(),
            cause,
        });
    }
}

/// A host as Istio reads it: a name without dots is a service in the object's own namespace.
fn resolve(host: &str, namespace: &str) -> String {
    let host = host.to_ascii_lowercase();
    if host.contains('.') || host.starts_with('*') { host } else { services::host_name(&host, namespace) }
}

/// Whether a host, possibly a wildcard, covers a name.
fn covers(pattern: &str, name: &str) -> bool {
    pattern.strip_prefix('*').map_or(pattern == name, |suffix| name.ends_with(suffix))
}
