//! A snapshot like the one before, but for the endpoints of some services.
//!
//! Promises to share with it all that does not lead to those endpoints. Tested in `tests/incremental.rs`.

mod gateway;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, hash_map::Entry},
    net::SocketAddr,
    sync::Arc,
};

use super::{
    Kept,
    clusters::Key,
    endpoints::Candidate,
    locality::Localities,
    mesh_config::MeshSettings,
    recipe::{LaidOut, Recipe},
};
use crate::state::snapshot::{
    Backend, Checked, CheckedPort, Cluster, HttpRoute, RouteAction, Service, ServicePort, Snapshot, Standby,
    StreamRoute,
};

/// The addresses behind each port of the services that have changed, by host name.
pub(super) type Changed<'a> = BTreeMap<Arc<str>, BTreeMap<u16, Vec<Candidate<'a>>>>;

/// Addresses that are endpoints of several services.
pub(super) type Shared = HashMap<SocketAddr, BTreeSet<Arc<str>>>;

/// Makes clusters anew, each once, and what leads to them.
pub(super) struct Renewal<'r, 'a> {
    before: &'r Snapshot,
    recipes: &'r HashMap<Key, Recipe>,
    place: (&'r Localities<'a>, &'r MeshSettings),
    changed: Changed<'a>,
    laid_out: HashMap<Key, LaidOut>,
    /// What the clusters before have become, by where they are.
    made: HashMap<*const Cluster, Arc<Cluster>>,
    /// What is known of addresses that are checked, by host name and port of their service.
    checked: HashMap<(Arc<str>, u16), HashMap<SocketAddr, Arc<Checked>>>,
}

impl<'r, 'a> Renewal<'r, 'a> {
    /// Nothing made yet.
    pub fn new(
        before: &'r Snapshot,
        recipes: &'r HashMap<Key, Recipe>,
        place: (&'r Localities<'a>, &'r MeshSettings),
        changed: Changed<'a>,
    ) -> Self {
        let (laid_out, made, checked) = (HashMap::new(), HashMap::new(), HashMap::new());
        Self { before, recipes, place, changed, laid_out, made, checked }
    }

    /// The snapshot; and which services share the addresses that it is about.
    pub fn snapshot(mut self, kept: &Kept) -> (Snapshot, Shared) {
        let mut snapshot = Snapshot { revision: self.before.revision + 1, ..self.before.clone() };
        let changed: Vec<Arc<str>> = self.changed.keys().cloned().collect();
        let leading = changed.iter().filter_map(|host| kept.users.get(host)).flatten();
        let concerned: BTreeSet<&Arc<str>> = changed.iter().chain(leading).collect();
        for host in &concerned {
            let Some(service) = self.before.services.get(*host) else { continue };
            let service = Arc::new(self.service(service));
            for vip in &service.vips {
                snapshot.vips.insert(*vip, Arc::clone(&service));
            }
            snapshot.services.insert(Arc::clone(*host), service);
        }
        if changed.iter().any(|host| kept.of_gateway.contains(host)) {
            snapshot.gateway = self.before.gateway.as_ref().map(|gateway| self.gateway(gateway));
        }
        let mut shared = Shared::new();
        // Those that only lead there too: a cluster of theirs may fall back to one that is new.
        for host in concerned {
            let [before, after] = [self.before, &snapshot].map(|all| all.services.get(host).cloned());
            let (Some(before), Some(after)) = (before, after) else { continue };
            enter_checked(&mut snapshot, &after);
            for address in addresses(&before).union(&addresses(&after)) {
                let mut hosts =
                    shared.remove(address).or_else(|| kept.shared.get(address).cloned()).unwrap_or_default();
                enter_address(&mut snapshot, &after, *address, &mut hosts);
                shared.insert(*address, hosts);
            }
        }
        (snapshot, shared)
    }

    fn service(&mut self, before: &Service) -> Service {
        let ports = before.ports.iter().map(|port| self.port(port)).collect();
        let views = before.views.iter().map(|(client, ports)| {
            (Arc::clone(client), ports.iter().map(|port| self.port(port)).collect::<Vec<_>>())
        });
        Service {
            host: Arc::clone(&before.host),
            name: Arc::clone(&before.name),
            namespace: Arc::clone(&before.namespace),
            vips: before.vips.clone(),
            headless: before.headless,
            visible: before.visible.clone(),
            views: views.collect(),
            ports,
        }
    }

    fn port(&mut self, before: &ServicePort) -> ServicePort {
        ServicePort {
            port: before.port,
            protocol: before.protocol,
            routes: shared(&before.routes, |route| self.route(route)),
            streams: shared(&before.streams, |route| self.stream(route)),
            cluster: self.cluster(&before.cluster),
        }
    }

    fn route(&mut self, before: &Arc<HttpRoute>) -> Arc<HttpRoute> {
        let mut backends: Vec<&Backend> = before.mirrors.iter().map(|mirror| &mirror.backend).collect();
        if let RouteAction::Forward(all) = &before.action {
            backends.extend(all.iter().map(|backend| &backend.backend));
        }
        if !self.changes_any(&backends) {
            return Arc::clone(before);
        }
        let mut route = HttpRoute::clone(before);
        for mirror in &mut route.mirrors {
            self.renew(&mut mirror.backend);
        }
        if let RouteAction::Forward(all) = &mut route.action {
            for backend in all {
                self.renew(&mut backend.backend);
            }
        }
        Arc::new(route)
    }

    fn stream(&mut self, before: &Arc<StreamRoute>) -> Arc<StreamRoute> {
        let backends: Vec<&Backend> = before.backends.iter().map(|backend| &backend.backend).collect();
        if !self.changes_any(&backends) {
            return Arc::clone(before);
        }
        let mut route = StreamRoute::clone(before);
        for backend in &mut route.backends {
            self.renew(&mut backend.backend);
        }
        Arc::new(route)
    }

    fn changes_any(&mut self, backends: &[&Backend]) -> bool {
        backends.iter().any(|backend| match backend {
            Backend::Cluster(cluster) => !Arc::ptr_eq(cluster, &self.cluster(cluster)),
            Backend::Missing(_) => false,
        })
    }

    fn renew(&mut self, backend: &mut Backend) {
        if let Backend::Cluster(cluster) = backend {
            *cluster = self.cluster(cluster);
        }
    }

    /// What a cluster has become; the same where nothing of it has changed.
    fn cluster(&mut self, before: &Arc<Cluster>) -> Arc<Cluster> {
        if let Some(made) = self.made.get(&Arc::as_ptr(before)) {
            return Arc::clone(made);
        }
        let old = &before.standby.fallbacks;
        let fallbacks: Vec<Arc<Cluster>> = old.iter().map(|fallback| self.cluster(fallback)).collect();
        let as_before = old.iter().zip(&fallbacks).all(|(old, new)| Arc::ptr_eq(old, new));
        let has_fallbacks = !fallbacks.is_empty();
        let standby = Standby { fallbacks, ..before.standby.clone() };
        let cluster = match self.laid_out(before) {
            Some(LaidOut { endpoints, spread, balancing, hash, limits_connections }) => Arc::new(Cluster {
                endpoints,
                spread,
                balancing,
                hash,
                limits_connections: limits_connections || has_fallbacks,
                standby,
                ..Cluster::clone(before)
            }),
            None if as_before => Arc::clone(before),
            None => Arc::new(Cluster { standby, ..Cluster::clone(before) }),
        };
        self.made.insert(Arc::as_ptr(before), Arc::clone(&cluster));
        cluster
    }

    /// The new endpoints of a cluster, where they are new.
    fn laid_out(&mut self, before: &Arc<Cluster>) -> Option<LaidOut> {
        let candidates = self.changed.get(&before.host)?.get(&before.port)?;
        let key = (Arc::clone(&before.name), before.view.clone());
        let port = (Arc::clone(&before.host), before.port);
        let mut known = match before.standby.checks.is_some().then(|| self.checked.entry(port)) {
            None => None,
            Some(Entry::Occupied(known)) => Some(known.into_mut()),
            Some(Entry::Vacant(entry)) => {
                let known = self.before.checked.get(entry.key()).into_iter();
                let known = known.flat_map(|port| port.endpoints());
                let known = known.map(|(endpoint, checked)| (endpoint.address, Arc::clone(checked)));
                Some(entry.insert(known.collect()))
            }
        };
        let checked = known.as_mut().map(|known| |address| Arc::clone(known.entry(address).or_default()));
        let laid_out = self.laid_out.entry(key).or_insert_with_key(|key| match self.recipes.get(key) {
            Some(recipe) => recipe.lay_out(candidates, Some(before), self.place, checked),
            None => Recipe::plain(before.port).lay_out(candidates, Some(before), self.place, checked),
        });
        Some(laid_out.clone())
    }
}

/// The same list where each of its items is the same.
fn shared<T>(before: &Arc<[Arc<T>]>, renew: impl FnMut(&Arc<T>) -> Arc<T>) -> Arc<[Arc<T>]> {
    let after: Vec<Arc<T>> = before.iter().map(renew).collect();
    let as_before = before.iter().zip(&after).all(|(old, new)| Arc::ptr_eq(old, new));
    if as_before { Arc::clone(before) } else { after.into() }
}

/// Enters how the endpoints of a service are checked, where they are.
fn enter_checked(snapshot: &mut Snapshot, service: &Service) {
    for port in &service.ports {
        let key = (Arc::clone(&service.host), port.port);
        let Some(before) = snapshot.checked.get(&key) else { continue };
        let checked = CheckedPort { cluster: Arc::clone(&port.cluster), check: Arc::clone(&before.check) };
        snapshot.checked.insert(key, Arc::new(checked));
    }
}

fn addresses(service: &Service) -> BTreeSet<SocketAddr> {
    let endpoints = service.ports.iter().flat_map(|port| &port.cluster.endpoints);
    endpoints.map(|endpoint| endpoint.address).collect()
}

/// Enters whose an address is that this service has or had: the first's by host name. `hosts`: all of them, where there were
/// several.
fn enter_address(
    snapshot: &mut Snapshot,
    service: &Service,
    address: SocketAddr,
    hosts: &mut BTreeSet<Arc<str>>,
) {
    hosts.extend(snapshot.inbound.get(&address).map(|cluster| Arc::clone(&cluster.host)));
    if cluster_at(service, address).is_some() {
        hosts.insert(Arc::clone(&service.host));
    } else {
        hosts.remove(&service.host);
    }
    let first = hosts.first().and_then(|host| cluster_at(snapshot.services.get(host)?, address));
    let headless = hosts.iter().find(|host| snapshot.services.get(*host).is_some_and(|one| one.headless));
    match headless.cloned() {
        Some(host) => drop(snapshot.headless.insert(address, host)),
        None => drop(snapshot.headless.remove(&address)),
    }
    match first {
        Some(cluster) => drop(snapshot.inbound.insert(address, cluster)),
        None => drop(snapshot.inbound.remove(&address)),
    }
}

/// The first cluster of a service that has this endpoint.
fn cluster_at(service: &Service, address: SocketAddr) -> Option<Arc<Cluster>> {
    let mut clusters = service.ports.iter().map(|port| &port.cluster);
    let has = |cluster: &&Arc<Cluster>| cluster.endpoints.iter().any(|endpoint| endpoint.address == address);
    clusters.find(has).cloned()
}
