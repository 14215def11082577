//! Where endpoints are, and where this node is: from the labels of pods and nodes, and from `EndpointSlices`.
//!
//! Tested in `tests/locality.rs`.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use super::{Settings, workloads::PodEntry};
use crate::state::{
    resource::{
        Objects, Resource,
        endpoint_slice::Endpoint,
        locality::{HOSTNAME, REGION, SUBZONE, ZONE},
        of_kind,
    },
    snapshot::Locality,
};

/// Istio's label of a pod that says where it is, in the place of its node's: `REGION.ZONE.SUBZONE`.
const ISTIO_LOCALITY: &str = "istio-locality";

/// Labels of nodes before Kubernetes 1.17.
const OLD_REGION: &str = "failure-domain.beta.kubernetes.io/region";
const OLD_ZONE: &str = "failure-domain.beta.kubernetes.io/zone";

type Labels = BTreeMap<String, String>;

/// All nodes, and which is this one.
pub(super) struct Localities<'a> {
    nodes: HashMap<&'a str, &'a Labels>,
    /// The regions of zones.
    regions: HashMap<&'a str, &'a str>,
    /// Name of this node.
    node: &'a str,
    /// Where it is.
    pub own: Locality,
}

/// The node that a gateway's own pod is on.
fn of_gateway<'a>(objects: &'a Objects, settings: &Settings) -> Option<&'a str> {
    settings.gateway.as_ref()?;
    let own = of_kind(objects, "Pod").find(|(key, _)| settings.is_own(key))?;
    let Resource::Pod(pod) = &own.1.resource else { return None };
    pod.spec.as_ref()?.node_name.as_deref()
}

impl<'a> Localities<'a> {
    /// Looks through all nodes.
    pub fn index(objects: &'a Objects, settings: &'a Settings) -> Self {
        let nodes = of_kind(objects, "Node").filter_map(|(key, object)| match &object.resource {
            Resource::Node(labels) => Some((&*key.name, labels)),
            _ => None,
        });
        let nodes: HashMap<&str, &Labels> = nodes.collect();
        let zones = nodes.values().filter_map(|labels| {
            Some((label(labels, &[ZONE, OLD_ZONE])?, label(labels, &[REGION, OLD_REGION])?))
        });
        let regions = zones.collect();
        let node = settings.node.as_deref().or_else(|| of_gateway(objects, settings)).unwrap_or_default();
        let own = nodes.get(node).map(|labels| of_labels(labels)).unwrap_or_default();
        Self { nodes, regions, node, own }
    }

    /// Where a pod is.
    pub fn of_pod(&self, pod: &PodEntry<'_>) -> Locality {
        let written = pod.labels().and_then(|labels| labels.get(ISTIO_LOCALITY));
        match written {
            // A label holds no slashes.
            Some(text) if text.contains('/') => Locality::parse(text),
            Some(text) => Locality::parse(&text.replace('.', "/")),
            None => pod.node().map(|node| self.of_node(node)).unwrap_or_default(),
        }
    }

    fn of_node(&self, name: &str) -> Locality {
        self.nodes.get(name).map(|labels| of_labels(labels)).unwrap_or_default()
    }

    /// Where an endpoint of a slice is, which may be a pod that is known.
    pub fn of_sliced(&self, endpoint: &Endpoint, pod: Option<&PodEntry<'_>>) -> Locality {
        let of_pod = pod.map(|pod| self.of_pod(pod)).filter(|found| !found.is_unknown());
        let of_node = || endpoint.node().map(|node| self.of_node(node));
        let found = of_pod.or_else(of_node).filter(|found| !found.is_unknown());
        found.unwrap_or_else(|| {
            let zone = endpoint.zone().cloned().unwrap_or_default();
            let region = self.regions.get(&*zone).map(|region| (*region).into()).unwrap_or_default();
            Locality { region, zone, subzone: Arc::default() }
        })
    }

    /// Whom a slice's hints mean an endpoint for: 0 this node, 1 this node's zone, 2 others; `None` without hints.
    pub fn hint(&self, endpoint: &Endpoint) -> Option<u8> {
        let hints = endpoint.hints()?;
        if hints.nodes.iter().any(|node| **node == *self.node) {
            return Some(0);
        }
        let own = hints.zones.iter().any(|zone| **zone == *self.own.zone);
        Some(if own { 1 } else { 2 })
    }

    /// Whether a node is this one.
    pub fn is_here(&self, node: Option<&str>) -> bool {
        node.is_some_and(|node| node == self.node)
    }

    /// What a label of this node's says, as `failoverPriority` reads it; empty where it has none.
    pub fn own_label(&self, label: &str) -> &str {
        label_of_place(label, &self.own).unwrap_or_else(|| self.node_label(Some(self.node), label))
    }

    /// What a label says of an endpoint that is at this place and node, and whose pod has these labels.
    pub fn label<'s>(
        &'s self,
        label: &str,
        (place, node): (&'s Locality, Option<&'s str>),
        pod: Option<&'s Labels>,
    ) -> &'s str {
        if let Some(value) = label_of_place(label, place) {
            return value;
        }
        let own = pod.and_then(|labels| labels.get(label)).map(String::as_str);
        own.unwrap_or_else(|| self.node_label(node, label))
    }

    fn node_label<'s>(&'s self, node: Option<&'s str>, label: &str) -> &'s str {
        let Some(node) = node.filter(|_| label == HOSTNAME) else { return "" };
        let written = self.nodes.get(node).and_then(|labels| labels.get(label));
        written.map_or(node, String::as_str)
    }
}

fn label_of_place<'s>(label: &str, place: &'s Locality) -> Option<&'s str> {
    match label {
        REGION => Some(&place.region),
        ZONE => Some(&place.zone),
        SUBZONE => Some(&place.subzone),
        _ => None,
    }
}

fn of_labels(labels: &Labels) -> Locality {
    let part = |names: &[&str]| label(labels, names).map(Arc::from).unwrap_or_default();
    Locality { region: part(&[REGION, OLD_REGION]), zone: part(&[ZONE, OLD_ZONE]), subzone: part(&[SUBZONE]) }
}

fn label<'a>(labels: &'a Labels, names: &[&str]) -> Option<&'a str> {
    names.iter().find_map(|name| labels.get(*name)).map(String::as_str)
}
