//! The addresses behind a service port: from `EndpointSlices` where a service has them, else from its selector.
//!
//! Promises addresses of one family per port, sorted, each once, ready ones only. Tested in `tests.rs` beside it.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use k8s_openapi::api::core::v1::Pod;

use super::{
    Problems,
    locality::Localities,
    workloads::{PodEntry, Pods},
};
use crate::state::{
    resource::{
        Object, ObjectKey, Objects, Resource,
        endpoint_slice::{Endpoint, EndpointSlice},
        of_kind,
        service::{Port, Service, Target, is_tcp},
    },
    snapshot::{Locality, Workload},
};

/// One ready address, before subsets choose among them.
#[derive(Clone)]
pub(super) struct Candidate<'a> {
    /// Where the app listens.
    pub address: SocketAddr,
    /// Labels of its pod, if it is a pod.
    pub labels: Option<&'a BTreeMap<String, String>>,
    /// Its pod, when it alone owns the address.
    pub workload: Option<Arc<Workload>>,
    /// Where it is.
    pub locality: Locality,
    /// Its share, among those of the others.
    pub weight: u32,
    /// Name of its node.
    pub node: Option<&'a str>,
    /// Whom hints of its slice mean it for: 0 this node, 1 this node's zone, 2 others.
    pub hint: Option<u8>,
}

/// `EndpointSlices` by namespace and service.
pub(super) struct Slices<'a>(HashMap<(&'a str, &'a str), Vec<(&'a ObjectKey, &'a EndpointSlice)>>);

impl<'a> Slices<'a> {
    /// Looks through all `EndpointSlices`.
    pub fn index(objects: &'a Objects) -> Self {
        Self::of(of_kind(objects, "EndpointSlice"))
    }

    /// Of these alone, which are in the order of their keys.
    pub fn of(objects: impl Iterator<Item = (&'a ObjectKey, &'a Arc<Object>)>) -> Self {
        let mut slices: HashMap<_, Vec<_>> = HashMap::new();
        for (key, object) in objects {
            let Resource::EndpointSlice(slice) = &object.resource else { continue };
            if let Some(service) = &slice.service {
                slices.entry((&*key.namespace, &**service)).or_default().push((key, &**slice));
            }
        }
        Self(slices)
    }
}

/// What endpoints are made from.
pub(super) struct Backing<'a, 'p> {
    /// All pods.
    pub pods: &'p Pods<'a>,
    /// All `EndpointSlices`.
    pub slices: &'p Slices<'a>,
    /// Where everything is.
    pub localities: &'p Localities<'a>,
}

impl<'a> Backing<'a, '_> {
    /// The ready addresses of one port of a service, of the family that suits it.
    pub fn candidates(
        &self,
        key: &ObjectKey,
        service: &Service,
        port: &Port,
        vips: &[IpAddr],
        problems: &mut Problems<'_>,
    ) -> Vec<Candidate<'a>> {
        let slices = self.slices.0.get(&(&*key.namespace, &*key.name));
        let mut all = match slices {
            Some(slices) => {
                slices.iter().flat_map(|(key, slice)| self.sliced(key, slice, port, problems)).collect()
            }
            None => self.selected(key, service, port),
        };
        one_family(&mut all, prefers_v6(service, vips));
        all.sort_by_key(|candidate| candidate.address);
        all.dedup_by_key(|candidate| candidate.address);
        all
    }

    fn sliced(
        &self,
        key: &ObjectKey,
        slice: &'a EndpointSlice,
        port: &Port,
        problems: &mut Problems<'_>,
    ) -> Vec<Candidate<'a>> {
        if slice.is_fqdn {
            problems.add(key, "addressType", "FQDN is not supported yet; the slice is left out");
            return Vec::new();
        }
        let found = slice.ports.iter().find(|candidate| candidate.name == port.name);
        let Some(number) = found.and_then(|port| port.number) else { return Vec::new() };
        let Some(number) = port_number(number) else {
            problems.add(key, "ports", format!("{number} is not a port number; the slice is left out"));
            return Vec::new();
        };
        let mut candidates = Vec::new();
        for (i, endpoint) in slice.endpoints.iter().enumerate().filter(|(_, endpoint)| endpoint.ready) {
            match &endpoint.address {
                Some(Ok(ip)) => {
                    candidates.push(self.candidate(key, endpoint, SocketAddr::new(*ip, number)));
                }
                Some(Err(text)) => {
                    let message = format!("{text:?} is not an address; the endpoint is left out");
                    problems.add(key, &format!("endpoints[{i}].addresses[0]"), message);
                }
                None => {}
            }
        }
        candidates
    }

    fn candidate(&self, slice: &ObjectKey, endpoint: &'a Endpoint, address: SocketAddr) -> Candidate<'a> {
        let workload = self.pods.workloads.get(&address.ip()).cloned();
        let name = endpoint.pod().or_else(|| workload.as_ref().map(|workload| &*workload.name));
        let pod = name.and_then(|name| self.pods.get(&slice.namespace, name));
        Candidate {
            address,
            labels: pod.and_then(PodEntry::labels),
            locality: self.localities.of_sliced(endpoint, pod),
            weight: pod.map_or(1, PodEntry::weight),
            node: endpoint.node().or_else(|| pod.and_then(PodEntry::node)),
            hint: self.localities.hint(endpoint),
            workload,
        }
    }

    fn selected(&self, key: &ObjectKey, service: &Service, port: &Port) -> Vec<Candidate<'a>> {
        let (selector, unready) = (&service.selector, service.publishes_unready);
        if selector.is_empty() {
            return Vec::new();
        }
        let pods = self.pods.by_namespace.get(&*key.namespace).into_iter().flat_map(BTreeMap::values);
        pods.filter(|pod| selects(selector, pod.labels()) && (unready || pod.ready()))
            .filter_map(|pod| Some((pod, target_port(port, pod.pod)?)))
            .flat_map(|(pod, number)| pod.ips.iter().map(move |ip| (pod, SocketAddr::new(*ip, number))))
            .map(|(pod, address)| Candidate {
                address,
                labels: pod.labels(),
                workload: self.pods.workloads.get(&address.ip()).cloned(),
                locality: self.localities.of_pod(pod),
                weight: pod.weight(),
                node: pod.node(),
                hint: None,
            })
            .collect()
    }
}

/// Whether labels have all that a selector asks for.
pub(super) fn selects(
    selector: &BTreeMap<String, String>,
    labels: Option<&BTreeMap<String, String>>,
) -> bool {
    selector.iter().all(|(name, value)| labels.and_then(|labels| labels.get(name)) == Some(value))
}

/// A port number Kubernetes keeps as `i32`.
pub(super) fn port_number(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|number| *number != 0)
}

/// Where the app listens: the service's own number when nothing else is said, else a number, else the number of
/// the container port with that name.
pub(super) fn target_port(port: &Port, pod: &Pod) -> Option<u16> {
    let name = match &port.target {
        Target::Same => return port_number(port.number),
        Target::Number(number) => return port_number(*number),
        Target::Name(name) => name,
    };
    let spec = pod.spec.as_ref()?;
    // Init containers that go on running beside the others may serve too.
    let sidecars = spec.init_containers.iter().flatten();
    let sidecars = sidecars.filter(|container| container.restart_policy.as_deref() == Some("Always"));
    let mut ports =
        spec.containers.iter().chain(sidecars).flat_map(|container| container.ports.iter().flatten());
    let found =
        ports.find(|port| port.name.as_deref() == Some(&**name) && is_tcp(port.protocol.as_deref()))?;
    port_number(found.container_port)
}

/// The family of the first cluster address, else the one the service asks for, else IPv4.
fn prefers_v6(service: &Service, vips: &[IpAddr]) -> bool {
    vips.first().map_or(service.asks_for_v6, IpAddr::is_ipv6)
}

/// Keeps the preferred family where it has any address, else IPv4, else what there is.
fn one_family(candidates: &mut Vec<Candidate<'_>>, prefer_v6: bool) {
    let has = |v6: bool| candidates.iter().any(|candidate| candidate.address.is_ipv6() == v6);
    let keep_v6 = if has(prefer_v6) { prefer_v6 } else { !has(false) };
    candidates.retain(|candidate| candidate.address.is_ipv6() == keep_v6);
}
