//! Follows the objects of a mesh change by change, and compiles what each change concerns.
//!
//! Promises the snapshot and the problems that compiling all objects would give, whatever the changes were. A change of
//! `EndpointSlice`s and pods makes anew the clusters of their services and the routes that lead to those, and shares everything
//! else with the snapshot before; any other change compiles everything. Knows nothing of where objects come from. Tested in
//! `tests/incremental.rs`.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    Kept, Problems, Settings,
    endpoints::{Backing, Candidate, Slices, port_number, selects},
    locality::Localities,
    mesh_config::MeshSettings,
    origins,
    pod_changes::{ChangedPods, PodChange, PodChanges},
    renewal::{Changed, Renewal},
    services::host_name,
    starting, whole,
    workloads::Pods,
};
use crate::state::{
    Problem,
    resource::{
        Object, ObjectKey, Objects, Resource, endpoint_slice::Endpoint, in_namespace, of_kind,
        service::Service as Written,
    },
    snapshot::{Service, Snapshot},
};

/// What has become of an object.
#[derive(Debug)]
pub enum Change {
    /// It is there, new or otherwise than before.
    Set(ObjectKey, Arc<Object>),
    /// It is there no more.
    Gone(ObjectKey),
}

/// Namespace and name of a service.
type ServiceName = (Arc<str>, Arc<str>);

/// What changes concern.
#[derive(Default)]
struct Concerned {
    services: BTreeSet<ServiceName>,
    pods: BTreeMap<ObjectKey, PodChange>,
    /// The objects, by the names that problems have for them.
    names: BTreeSet<String>,
}

/// All objects of a mesh, and what was compiled from them last.
#[derive(Debug)]
pub struct Compiled {
    settings: Settings,
    objects: Objects,
    /// `EndpointSlice`s by the namespace and the name of their service.
    slices: BTreeSet<(Arc<str>, Arc<str>, Arc<str>)>,
    snapshot: Arc<Snapshot>,
    problems: BTreeSet<Problem>,
    kept: Kept,
}

impl Compiled {
    /// Without any object, and with the snapshot of revision 0.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            objects: Objects::new(),
            slices: BTreeSet::new(),
            snapshot: Arc::default(),
            problems: BTreeSet::new(),
            kept: Kept::default(),
        }
    }

    /// All objects.
    pub fn objects(&self) -> &Objects {
        &self.objects
    }

    /// What was compiled last.
    pub fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }

    /// What is wrong with the objects.
    pub fn problems(&self) -> &BTreeSet<Problem> {
        &self.problems
    }

    /// Takes changes over, all at once, and compiles what they concern. Also without any there is a new snapshot.
    pub fn apply(&mut self, changes: Vec<Change>) {
        let (mut concerned, mut everything) = (Concerned::default(), changes.is_empty());
        for change in changes {
            let (key, after) = match change {
                Change::Set(key, object) => (key, Some(object)),
                Change::Gone(key) => (key, None),
            };
            let before = match &after {
                Some(object) => self.objects.insert(key.clone(), Arc::clone(object)),
                None => self.objects.remove(&key),
            };
            for (object, is_there) in [(&before, false), (&after, true)] {
                match object.as_ref().map(|object| &object.resource) {
                    Some(Resource::EndpointSlice(slice)) => {
                        let Some(service) = &slice.service else { continue };
                        self.file(&key, service, is_there);
                        concerned.services.insert((Arc::clone(&key.namespace), Arc::clone(service)));
                    }
                    Some(Resource::Pod(_)) | None => {}
                    Some(_) => everything = true,
                }
            }
            concerned.names.insert(key.to_string());
            if &*key.kind == "Pod" {
                let new = PodChange { key: key.clone(), before, after: None };
                concerned.pods.entry(key).or_insert(new).after = after;
            }
        }
        if everything || self.follow(concerned).is_none() {
            self.compile();
        }
    }

    /// Knows which service a slice belongs to, or forgets it.
    fn file(&mut self, slice: &ObjectKey, service: &Arc<str>, is_there: bool) {
        let entry = (Arc::clone(&slice.namespace), Arc::clone(service), Arc::clone(&slice.name));
        if is_there {
            self.slices.insert(entry);
        } else {
            self.slices.remove(&entry);
        }
    }

    fn compile(&mut self) {
        let before = (self.snapshot.revision > 0).then_some(&*self.snapshot);
        let whole = whole(&self.objects, before, &self.settings);
        (self.snapshot, self.problems, self.kept) = (Arc::new(whole.snapshot), whole.problems, whole.kept);
    }

    /// Makes anew what is concerned; `None`, having done nothing, where that is not all there is to do.
    fn follow(&mut self, concerned: Concerned) -> Option<()> {
        let Concerned { mut services, pods, mut names } = concerned;
        let pods: Vec<PodChange> = pods.into_values().collect();
        if pods.iter().any(|change| self.settings.is_own(&change.key)) {
            // Its labels say which gateways it serves.
            return None;
        }
        let (mut problems, mut known) = (Problems::new(&self.objects), Problems::new(&self.objects));
        // What is wrong with the settings was found when they were compiled.
        let (mesh, settings) = MeshSettings::find(&self.objects, &self.settings, &mut known);
        let mut workloads = self.snapshot.workloads.clone();
        if !pods.is_empty() {
            let (before, shared) = (&*self.snapshot, &self.kept.shared_ips);
            let changes =
                PodChanges { objects: &self.objects, before, shared, settings: &settings, mesh: &mesh };
            let changed = changes.follow(&pods, &mut workloads, &mut problems)?;
            let lost = |problem: &Problem| {
                problem.object.as_ref().is_some_and(|object| changed.namespaces.contains(object))
            };
            if self.problems.iter().any(lost) {
                return None;
            }
            services.extend(self.services_of(&changed));
        }
        let localities = Localities::index(&self.objects, &settings);
        let mut starting = self.snapshot.starting.clone();
        starting::follow(&mut starting, (&self.objects, &settings), &pods);
        let mut origins = self.snapshot.origins.clone();
        if self.kept.counts_origins {
            origins::follow(&mut origins, (&self.objects, &settings), &pods, &localities);
        }
        let mut new = Changed::default();
        for name in &services {
            let slices = self.slices_of(name);
            names.extend(slices.iter().map(|(key, _)| key.to_string()));
            let Some((key, written, service)) = self.compiled(name) else { continue };
            if self.is_guarded(name) {
                return None;
            }
            let workloads = workloads.clone();
            let pods = if slices.is_empty() && !written.selector.is_empty() {
                Pods::in_namespace(&self.objects, workloads, &key.namespace, &settings)
            } else {
                Pods::named(&self.objects, workloads, &slices, &settings)
            };
            let slices = Slices::of(slices.into_iter());
            let backing = Backing { pods: &pods, slices: &slices, localities: &localities };
            let candidates = candidates(&backing, (key, written), service, &mut problems);
            new.insert(Arc::clone(&service.host), candidates);
        }
        let found = problems.found;
        let renewal = Renewal::new(&self.snapshot, &self.kept.recipes, (&localities, &mesh), new);
        let (snapshot, shared) = renewal.snapshot(&self.kept);
        self.kept.share(shared);
        self.snapshot = Arc::new(Snapshot { workloads, starting, origins, ..snapshot });
        let is_found_anew =
            |problem: &Problem| problem.object.as_ref().is_some_and(|object| names.contains(object));
        self.problems.retain(|problem| !is_found_anew(problem));
        self.problems.extend(found);
        Some(())
    }

    /// The services whose endpoints these pods are, were, or may be.
    fn services_of(&self, changed: &ChangedPods) -> BTreeSet<ServiceName> {
        let mut services = BTreeSet::new();
        if changed.pods.is_empty() {
            return services;
        }
        for (key, object) in of_kind(&self.objects, "EndpointSlice") {
            let Resource::EndpointSlice(slice) = &object.resource else { continue };
            let Some(service) = &slice.service else { continue };
            let is_one = |endpoint: &Endpoint| {
                let named =
                    endpoint.pod().is_some_and(|pod| changed.pods.contains_key(&(&*key.namespace, pod)));
                named || matches!(&endpoint.address, Some(Ok(ip)) if changed.ips.contains(ip))
            };
            if slice.endpoints.iter().any(is_one) {
                services.insert((Arc::clone(&key.namespace), Arc::clone(service)));
            }
        }
        for ((namespace, _), labels) in &changed.pods {
            for (key, object) in in_namespace(&self.objects, "Service", namespace) {
                let Resource::Service(written) = &object.resource else { continue };
                let selector = &written.selector;
                if !selector.is_empty() && labels.iter().any(|labels| selects(selector, *labels)) {
                    services.insert((Arc::clone(&key.namespace), Arc::clone(&key.name)));
                }
            }
        }
        services
    }

    fn slices_of(&self, (namespace, service): &ServiceName) -> Vec<(&ObjectKey, &Arc<Object>)> {
        let first = (Arc::clone(namespace), Arc::clone(service), Arc::default());
        let of_it = self.slices.range(first..).take_while(|(of, name, _)| of == namespace && name == service);
        let key = |name: &Arc<str>| ObjectKey {
            kind: "EndpointSlice".into(),
            namespace: Arc::clone(namespace),
            name: Arc::clone(name),
        };
        of_it.filter_map(|(_, _, name)| self.objects.get_key_value(&key(name))).collect()
    }

    /// The Service of this name, where something was compiled from it.
    fn compiled(&self, (namespace, name): &ServiceName) -> Option<(&ObjectKey, &Written, &Arc<Service>)> {
        let (key, object) = self.objects.get_key_value(&ObjectKey::new("Service", namespace, name))?;
        let Resource::Service(written) = &object.resource else { return None };
        let compiled = self.snapshot.services.get(&*host_name(name, namespace))?;
        Some((key, written, compiled))
    }

    /// Whether there is anything that requests to the pods of a service are held to.
    fn is_guarded(&self, (namespace, name): &ServiceName) -> bool {
        of_kind(&self.objects, "ServicePolicy").any(|(_, object)| match &object.resource {
            Resource::ServicePolicy(policy) => {
                let holds = !policy.rate_limits.is_empty() || policy.concurrency.is_some();
                holds && *policy.service == **name && policy.namespace == *namespace
            }
            _ => false,
        })
    }
}

/// The addresses behind each port of a service.
fn candidates<'a>(
    backing: &Backing<'a, '_>,
    (key, written): (&ObjectKey, &'a Written),
    service: &Service,
    problems: &mut Problems<'_>,
) -> BTreeMap<u16, Vec<Candidate<'a>>> {
    let port = |number: u16| {
        let mut ports = written.ports.iter().filter(|port| port.is_tcp);
        ports.find(|port| port_number(port.number) == Some(number))
    };
    let mut all = BTreeMap::new();
    for number in service.ports.iter().map(|port| port.port) {
        let Some(port) = port(number) else { continue };
        all.insert(number, backing.candidates(key, written, port, &service.vips, problems));
    }
    all
}
