//! Pods: who they are, which address is theirs alone, and whether they are enrolled.
//!
//! Never gives an identity to an address that two pods claim, nor to one of the host network. Tested in `tests.rs`
//! beside it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
};

use k8s_openapi::{
    api::core::v1::{Namespace, Pod},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use super::{Netns, Policies, Problems, Settings};
use crate::{
    identity::SpiffeId,
    state::{
        defaults,
        resource::{Object, ObjectKey, Objects, Resource, in_namespace, of_kind, pod, probes},
        snapshot::{Authentication, Authorization, CapturePolicy, SharedMap, Snapshot, Workload},
    },
};

/// Label that enrols a namespace or pod (`node`) or opts a pod out (`none`).
const DATAPLANE_MODE: &str = "mesh.io/dataplane-mode";

/// Annotation that names a pod's network namespace.
const NETNS: &str = "mesh.io/netns";

/// Annotation by which the agent of a pod's node says that the pod is in the mesh.
pub const ENROLLED: &str = "mesh.io/enrolled";

/// What it says then.
pub const ANNOUNCED: &str = "true";

/// The same of Istio's ambient mode: `enabled`.
const REDIRECTION: &str = "ambient.istio.io/redirection";

/// Label that Deployments put on the pods of each of their `ReplicaSets`.
const TEMPLATE_HASH: &str = "pod-template-hash";

/// One running pod with its addresses.
pub(super) struct PodEntry<'a> {
    /// Which one.
    pub key: &'a ObjectKey,
    /// The object.
    pub pod: &'a Pod,
    /// Its addresses, canonical; those of its node when it is on the host network.
    pub ips: Vec<IpAddr>,
}

impl<'a> PodEntry<'a> {
    /// Its labels.
    pub fn labels(&self) -> Option<&'a BTreeMap<String, String>> {
        self.pod.metadata.labels.as_ref()
    }

    /// `spec.nodeName`.
    pub fn node(&self) -> Option<&'a str> {
        let node = self.pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
        node.filter(|node| !node.is_empty())
    }

    /// Its share as an endpoint.
    pub fn weight(&self) -> u32 {
        // Checked when the pod was read.
        pod::weight(self.pod.metadata.annotations.as_ref()).unwrap_or(1)
    }

    /// Whether it takes traffic: its Ready condition, where it has one, holds and it is not being deleted.
    pub fn ready(&self) -> bool {
        let conditions = self.pod.status.as_ref().and_then(|status| status.conditions.as_ref());
        let ready = conditions.into_iter().flatten().find(|condition| condition.type_ == "Ready");
        self.pod.metadata.deletion_timestamp.is_none()
            && ready.is_none_or(|condition| condition.status == "True")
    }
}

/// All pods that run.
pub(super) struct Pods<'a> {
    /// Pods by each address that is theirs alone.
    pub workloads: SharedMap<IpAddr, Arc<Workload>>,
    /// Running pods by namespace and name.
    pub by_namespace: HashMap<&'a str, BTreeMap<&'a str, PodEntry<'a>>>,
    /// Addresses that several pods have.
    pub shared: HashSet<IpAddr>,
    /// The gateway's own pod, whatever its addresses are.
    pub own: Option<Arc<Workload>>,
}

impl<'a> Pods<'a> {
    /// Looks through all pods.
    pub fn index(
        objects: &'a Objects,
        previous: Option<&Snapshot>,
        settings: &Settings,
        policies: &mut Policies<'_>,
        problems: &mut Problems<'_>,
    ) -> Self {
        let mut pods = Self::knowing(SharedMap::default());
        let mut owners: HashMap<IpAddr, &ObjectKey> = HashMap::new();
        for (key, object) in of_kind(objects, "Pod") {
            let Resource::Pod(pod) = &object.resource else { continue };
            let Some(entry) = running(key, pod, settings, problems) else { continue };
            let workload = of_entry(&entry, (objects, previous), settings, policies, problems);
            if settings.is_own(key) {
                let other = || made(&entry, (objects, previous), settings, policies, problems);
                pods.own = Some(workload.clone().unwrap_or_else(other));
            }
            if let Some(workload) = workload {
                for ip in &entry.ips {
                    if let Some(other) = owners.insert(*ip, key) {
                        pods.shared.insert(*ip);
                        let message =
                            format!("{ip} is also the address of {other}, so it identifies neither");
                        problems.add(key, "status.podIPs", message);
                    }
                    pods.workloads.insert(*ip, Arc::clone(&workload));
                }
            }
            pods.add(entry);
        }
        for ip in &pods.shared {
            pods.workloads.remove(ip);
        }
        pods
    }

    /// None but those that are added; of all others, whose an address is.
    fn knowing(workloads: SharedMap<IpAddr, Arc<Workload>>) -> Self {
        Self { workloads, by_namespace: HashMap::new(), shared: HashSet::new(), own: None }
    }

    fn add(&mut self, entry: PodEntry<'a>) {
        self.by_namespace.entry(&entry.key.namespace).or_default().insert(&entry.key.name, entry);
    }

    /// Only those that are behind these slices.
    pub fn named(
        objects: &'a Objects,
        workloads: SharedMap<IpAddr, Arc<Workload>>,
        slices: &[(&'a ObjectKey, &'a Arc<Object>)],
        settings: &Settings,
    ) -> Self {
        let mut pods = Self::knowing(workloads);
        for (slice, object) in slices {
            let Resource::EndpointSlice(written) = &object.resource else { continue };
            for endpoint in &written.endpoints {
                let workload = || pods.workloads.get(endpoint.address.as_ref()?.as_ref().ok()?);
                let name =
                    endpoint.pod().map(Arc::from).or_else(|| workload().map(|one| Arc::clone(&one.name)));
                let Some(name) = name else { continue };
                let key = ObjectKey { kind: "Pod".into(), namespace: Arc::clone(&slice.namespace), name };
                pods.extend(objects, objects.get_key_value(&key).into_iter(), settings);
            }
        }
        pods
    }

    /// Only those of one namespace.
    pub fn in_namespace(
        objects: &'a Objects,
        workloads: SharedMap<IpAddr, Arc<Workload>>,
        namespace: &'a str,
        settings: &Settings,
    ) -> Self {
        let mut pods = Self::knowing(workloads);
        pods.extend(objects, in_namespace(objects, "Pod", namespace), settings);
        pods
    }

    fn extend(
        &mut self,
        objects: &Objects,
        pods: impl Iterator<Item = (&'a ObjectKey, &'a Arc<Object>)>,
        settings: &Settings,
    ) {
        // What is wrong with a pod was found when it was compiled.
        let mut known = Problems::new(objects);
        for (key, object) in pods {
            let Resource::Pod(pod) = &object.resource else { continue };
            if let Some(entry) = running(key, pod, settings, &mut known) {
                self.add(entry);
            }
        }
    }

    /// A running pod by name.
    pub fn get(&self, namespace: &str, name: &str) -> Option<&PodEntry<'a>> {
        self.by_namespace.get(namespace)?.get(name)
    }
}

/// The pod as the mesh sees it, where its addresses are its own.
pub(super) fn of_entry(
    entry: &PodEntry<'_>,
    (objects, previous): (&Objects, Option<&Snapshot>),
    settings: &Settings,
    policies: &mut Policies<'_>,
    problems: &mut Problems<'_>,
) -> Option<Arc<Workload>> {
    let own = !host_network(entry.pod) && !entry.ips.is_empty();
    own.then(|| made(entry, (objects, previous), settings, policies, problems))
}

fn made(
    entry: &PodEntry<'_>,
    (objects, previous): (&Objects, Option<&Snapshot>),
    settings: &Settings,
    policies: &mut Policies<'_>,
    problems: &mut Problems<'_>,
) -> Arc<Workload> {
    let PodEntry { key, pod, .. } = entry;
    let tokens = policies.tokens.of(key, pod);
    let authentication = Authentication { tokens, ..policies.authentications.of(key, pod) };
    let view = policies.selections.view(&key.namespace, entry.labels());
    let policies = (policies.authorizations.of(key, pod), authentication);
    keep(Workload { view, ..workload(entry, objects, settings, policies, problems) }, previous)
}

/// The entry of a pod whose addresses are its own: not one that has finished and may have given them back.
pub(super) fn running<'a>(
    key: &'a ObjectKey,
    pod: &'a Pod,
    settings: &Settings,
    problems: &mut Problems<'_>,
) -> Option<PodEntry<'a>> {
    let status = pod.status.as_ref();
    let phase = status.and_then(|status| status.phase.as_deref()).unwrap_or_default();
    if ["Succeeded", "Failed"].contains(&phase) {
        return None;
    }
    let listed = status.and_then(|status| status.pod_ips.as_ref()).into_iter().flatten();
    let mut written: Vec<(String, &str)> =
        listed.enumerate().map(|(i, ip)| (format!("status.podIPs[{i}].ip"), ip.ip.as_str())).collect();
    if let (true, Some(ip)) = (written.is_empty(), status.and_then(|status| status.pod_ip.as_deref())) {
        written.push(("status.podIP".to_owned(), ip));
    }
    let mut ips = Vec::with_capacity(written.len());
    for (field, text) in written.iter().filter(|(_, text)| !text.is_empty()) {
        match text.parse::<IpAddr>().map(|ip| ip.to_canonical()) {
            Ok(ip) if usable(ip) => ips.push(ip),
            _ => problems.add(
                key,
                field,
                format!("{text:?} is not an address a pod can have; the pod is left out"),
            ),
        }
    }
    if ips.len() < written.iter().filter(|(_, text)| !text.is_empty()).count() {
        return None;
    }
    if ips.is_empty() && settings.netns == Netns::Annotation {
        problems.add(key, "status.podIPs", "is required here: nothing else tells the pod's address");
    }
    Some(PodEntry { key, pod, ips })
}

/// Addresses that every pod has, or none, identify nobody.
fn usable(ip: IpAddr) -> bool {
    !ip.is_unspecified() && !ip.is_loopback() && !ip.is_multicast()
}

pub(super) fn host_network(pod: &Pod) -> bool {
    pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false)
}

/// The same allocation as before where nothing changed.
fn keep(workload: Workload, previous: Option<&Snapshot>) -> Arc<Workload> {
    let before = workload.ips.first().and_then(|ip| previous?.workloads.get(ip));
    match before {
        Some(before) if **before == workload => Arc::clone(before),
        _ => Arc::new(workload),
    }
}

fn workload(
    entry: &PodEntry<'_>,
    objects: &Objects,
    settings: &Settings,
    (authorization, authentication): (Arc<Authorization>, Authentication),
    problems: &mut Problems<'_>,
) -> Workload {
    let meta = &entry.pod.metadata;
    let label = |name: &str| meta.labels.as_ref().and_then(|labels| labels.get(name)).map(String::as_str);
    let (mut enrolled, netns) = match &settings.netns {
        Netns::Annotation => {
            (wants_mesh(entry, objects, problems), annotation(meta, NETNS).map(PathBuf::from))
        }
        // To a gateway all pods are others'.
        Netns::Node(_) if settings.gateway.is_some() => (is_announced(meta), None),
        Netns::Node(dir) if settings.node.as_deref() == entry.node() => {
            let uid = meta.uid.as_deref().filter(|uid| is_uid(uid));
            (wants_mesh(entry, objects, problems), uid.map(|uid| dir.join(uid)))
        }
        // Whoever certifies agents has to know which pods are to be in the mesh before they are.
        Netns::Node(_) if settings.node.is_none() => (wants_mesh(entry, objects, problems), None),
        Netns::Node(_) => (is_announced(meta), None),
    };
    if enrolled && netns.is_none() && settings.netns == Netns::Annotation {
        let message = "missing: the pod cannot be enrolled without its network namespace, and is left alone";
        problems.add(entry.key, &format!("metadata.annotations.{NETNS}"), message);
        enrolled = false;
    }
    let workload_name = workload_name(meta, &entry.key.name);
    let first =
        |names: [&str; 3]| names.into_iter().find_map(|name| label(name).filter(|value| !value.is_empty()));
    let service = first(["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"]);
    let revision = first(["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"]);
    Workload {
        namespace: Arc::clone(&entry.key.namespace),
        name: Arc::clone(&entry.key.name),
        ips: entry.ips.clone(),
        node: entry.node().map(Arc::from),
        identity: identity(entry, settings),
        labels: meta.labels.iter().flatten().map(|(k, v)| (k.as_str().into(), v.as_str().into())).collect(),
        view: None,
        enrolled,
        netns,
        announced: annotation(meta, ENROLLED) == Some(ANNOUNCED),
        capture: capture(entry, enrolled, problems),
        authorization,
        authentication,
        canonical_service: service.unwrap_or(workload_name).into(),
        canonical_revision: revision.unwrap_or("latest").into(),
        workload_name: workload_name.into(),
    }
}

/// An annotation that says something.
fn annotation<'p>(meta: &'p ObjectMeta, name: &str) -> Option<&'p str> {
    let value = meta.annotations.as_ref().and_then(|annotations| annotations.get(name));
    value.map(String::as_str).filter(|value| !value.is_empty())
}

/// Whether the agent of its node has said that it is in the mesh.
fn is_announced(meta: &ObjectMeta) -> bool {
    annotation(meta, ENROLLED) == Some(ANNOUNCED) || annotation(meta, REDIRECTION) == Some("enabled")
}

/// Whether it is a UID as API servers make them, and no path.
fn is_uid(uid: &str) -> bool {
    !uid.is_empty() && uid.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// The identity that its service account gives it.
pub(super) fn identity(entry: &PodEntry<'_>, settings: &Settings) -> SpiffeId {
    let spec = entry.pod.spec.as_ref();
    let account = spec.and_then(|spec| spec.service_account_name.as_deref()).filter(|name| !name.is_empty());
    SpiffeId {
        trust_domain: Arc::clone(&settings.trust_domain),
        namespace: Arc::clone(&entry.key.namespace),
        service_account: account.unwrap_or(defaults::SERVICE_ACCOUNT).into(),
    }
}

/// What it asks of its capture, and what the kubelet may ask of it.
fn capture(entry: &PodEntry<'_>, enrolled: bool, problems: &mut Problems<'_>) -> CapturePolicy {
    // Checked when the pod was read.
    let asked = pod::capture_policy(entry.pod.metadata.annotations.as_ref()).unwrap_or_default();
    let Some(spec) = entry.pod.spec.as_ref().filter(|_| enrolled) else { return asked };
    let (mut probes, left_out) = probes::declared(spec, &entry.ips);
    // What is excluded passes in any case, with whatever bytes there are.
    probes.retain(|probe| !asked.exclude_inbound.ports.iter().any(|range| range.holds(probe.port)));
    for problem in left_out {
        problems.add(entry.key, &problem.field, problem.message);
    }
    CapturePolicy { probes, ..asked }
}

/// Namespaces whose label enrols their pods.
pub(super) fn enrolling(objects: &Objects) -> BTreeSet<Arc<str>> {
    let enrols = |object: &Object| match &object.resource {
        Resource::Namespace(namespace) => {
            let labels = namespace.metadata.labels.as_ref();
            labels.and_then(|labels| labels.get(DATAPLANE_MODE)).is_some_and(|mode| mode == "node")
        }
        _ => false,
    };
    let all = of_kind(objects, "Namespace").filter(|(_, object)| enrols(object));
    all.map(|(key, _)| Arc::clone(&key.name)).collect()
}

/// The pod's own label decides, else its namespace's.
pub(super) fn wants_mesh(entry: &PodEntry<'_>, objects: &Objects, problems: &mut Problems<'_>) -> bool {
    let mode =
        |meta: &ObjectMeta| meta.labels.as_ref().and_then(|labels| labels.get(DATAPLANE_MODE)).cloned();
    let namespace_key = ObjectKey::new("Namespace", "", &entry.key.namespace);
    let namespace = objects.get(&namespace_key).and_then(|object| match &object.resource {
        Resource::Namespace(namespace) => mode(&(namespace as &Namespace).metadata),
        _ => None,
    });
    for (key, mode) in [(entry.key, mode(&entry.pod.metadata)), (&namespace_key, namespace)] {
        match mode.as_deref() {
            Some("node") => return true,
            Some("none") => return false,
            Some(other) => {
                let message =
                    format!("{other:?} is neither node nor none; it is read as if it were not there");
                problems.add(key, &format!("metadata.labels.{DATAPLANE_MODE}"), message);
            }
            None => {}
        }
    }
    false
}

/// The controller's name, with a `ReplicaSet` standing for its Deployment.
pub(super) fn workload_name<'p>(meta: &'p ObjectMeta, name: &'p str) -> &'p str {
    let hash =
        meta.labels.as_ref().and_then(|labels| labels.get(TEMPLATE_HASH)).filter(|hash| !hash.is_empty());
    let owners = meta.owner_references.as_ref();
    if let Some(owner) = owners.into_iter().flatten().find(|owner| owner.controller == Some(true)) {
        let stripped = hash
            .filter(|_| owner.kind == "ReplicaSet")
            .and_then(|hash| owner.name.strip_suffix(hash.as_str())?.strip_suffix('-'));
        return stripped.unwrap_or(&owner.name);
    }
    hash.and_then(|hash| name.split_once(&format!("-{hash}"))).map_or(name, |(deployment, _)| deployment)
}
