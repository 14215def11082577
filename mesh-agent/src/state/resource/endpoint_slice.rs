//! `EndpointSlice`s: what is compiled of them, held compactly, for a mesh has more endpoints than anything else.
//!
//! Tested through `compile/`.

use std::{net::IpAddr, sync::Arc};

use k8s_openapi::api::discovery::v1::{self, EndpointHints};

use super::service::is_tcp;

/// Label that ties an `EndpointSlice` to its service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// What is compiled of an `EndpointSlice`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Name of the service it belongs to; none: it is nobody's.
    pub service: Option<Arc<str>>,
    /// Its addresses are names of hosts.
    pub is_fqdn: bool,
    /// Its TCP ports.
    pub ports: Box<[Port]>,
    /// Its endpoints, in their order.
    pub endpoints: Box<[Endpoint]>,
}

/// A port of all its endpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// Which port of the service it is; empty where that has no name.
    pub name: Box<str>,
    /// The number, as it is written; none: any, which is none to dial.
    pub number: Option<i32>,
}

/// One endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// The first address, which alone has a meaning; what is no address as it is written.
    pub address: Option<Result<IpAddr, Box<str>>>,
    /// Whether it takes traffic.
    pub ready: bool,
    /// What else there is of it.
    place: Option<Box<Place>>,
}

/// What an endpoint may have besides an address.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    pod: Option<Box<str>>,
    node: Option<Box<str>>,
    zone: Option<Arc<str>>,
    hints: Option<Hints>,
}

/// Whom an endpoint is meant for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hints {
    /// Names of nodes.
    pub nodes: Box<[Box<str>]>,
    /// Names of zones.
    pub zones: Box<[Box<str>]>,
}

impl EndpointSlice {
    /// Keeps what is compiled.
    pub(super) fn of(slice: v1::EndpointSlice) -> Self {
        let labels = slice.metadata.labels.as_ref();
        let ports = slice.ports.into_iter().flatten().filter(|port| is_tcp(port.protocol.as_deref()));
        let port =
            |port: v1::EndpointPort| Port { name: port.name.unwrap_or_default().into(), number: port.port };
        Self {
            service: labels.and_then(|labels| labels.get(SERVICE_NAME)).map(|name| name.as_str().into()),
            is_fqdn: slice.address_type == "FQDN",
            ports: ports.map(port).collect(),
            endpoints: slice.endpoints.into_iter().flatten().map(Endpoint::of).collect(),
        }
    }
}

impl Endpoint {
    fn of(endpoint: v1::Endpoint) -> Self {
        let address = endpoint.addresses.into_iter().next().map(|text| match text.parse::<IpAddr>() {
            Ok(ip) => Ok(ip.to_canonical()),
            Err(_) => Err(text.into()),
        });
        let target = endpoint.target_ref.filter(|target| target.kind.as_deref() == Some("Pod"));
        let place = Place {
            pod: target.and_then(|target| target.name).map(String::into),
            node: endpoint.node_name.map(String::into),
            zone: endpoint.zone.map(String::into),
            hints: endpoint.hints.and_then(Hints::of),
        };
        let is_empty =
            place.pod.is_none() && place.node.is_none() && place.zone.is_none() && place.hints.is_none();
        Self {
            address,
            ready: endpoint.conditions.and_then(|conditions| conditions.ready).unwrap_or(true),
            place: (!is_empty).then(|| Box::new(place)),
        }
    }

    /// Name of its pod, where one is named.
    pub fn pod(&self) -> Option<&str> {
        self.place.as_ref()?.pod.as_deref()
    }

    /// Name of its node, where one is named.
    pub fn node(&self) -> Option<&str> {
        self.place.as_ref()?.node.as_deref()
    }

    /// Its zone, where one is named.
    pub fn zone(&self) -> Option<&Arc<str>> {
        self.place.as_ref()?.zone.as_ref()
    }

    /// Whom it is meant for, where that is said.
    pub fn hints(&self) -> Option<&Hints> {
        self.place.as_ref()?.hints.as_ref()
    }
}

impl Hints {
    fn of(hints: EndpointHints) -> Option<Self> {
        if hints.for_nodes.is_none() && hints.for_zones.is_none() {
            return None;
        }
        Some(Self {
            nodes: hints.for_nodes.into_iter().flatten().map(|node| node.name.into()).collect(),
            zones: hints.for_zones.into_iter().flatten().map(|zone| zone.name.into()).collect(),
        })
    }
}
