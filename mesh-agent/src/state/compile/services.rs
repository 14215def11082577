//! Services as they are defined: host name, cluster addresses, ports, and the addresses behind each port.
//!
//! Tested in `tests.rs` beside it.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
};

use super::{
    Problems, covers,
    endpoints::{Backing, Candidate, Slices, port_number},
    locality::Localities,
    protocol,
    spread::Nearby,
    workloads::Pods,
};
use crate::state::{
    defaults,
    resource::{
        ObjectKey, Objects, Resource, export_to, load_balancer, of_kind,
        service::{ClusterIp, EXPORT_TO, Kind, Place, Service, TRAFFIC_DISTRIBUTION},
    },
    snapshot::{Protocol, Visibility},
};

/// A service before its routes.
pub(super) struct Definition<'a> {
    /// Which Service.
    pub key: &'a ObjectKey,
    /// Fully qualified host name.
    pub host: Arc<str>,
    /// Who may know of it (annotation `networking.istio.io/exportTo`).
    pub visible: Visibility,
    /// Its cluster addresses.
    pub vips: Vec<IpAddr>,
    /// `clusterIP: None`: its pods are dialled by their own addresses.
    pub headless: bool,
    /// Which of its endpoints it prefers (`trafficDistribution`).
    pub nearby: Option<Nearby>,
    /// Whether they are chosen by their latency (annotation `mesh.io/load-balancer: PEAK_EWMA`).
    pub by_latency: bool,
    /// Its TCP ports.
    pub ports: Vec<PortDefinition<'a>>,
}

/// A port before its routes.
pub(super) struct PortDefinition<'a> {
    /// The number clients dial.
    pub port: u16,
    /// What is declared.
    pub protocol: Option<Protocol>,
    /// Its ready addresses.
    pub candidates: Vec<Candidate<'a>>,
}

/// All services by host name.
pub(super) struct Definitions<'a>(BTreeMap<Arc<str>, Definition<'a>>);

/// `NAME.NAMESPACE.svc.cluster.local`.
pub(super) fn host_name(name: &str, namespace: &str) -> String {
    format!("{name}.{namespace}.svc.{}", defaults::CLUSTER_DOMAIN)
}

impl<'a> Definitions<'a> {
    /// Looks through all Services.
    pub fn index(
        objects: &'a Objects,
        pods: &Pods<'a>,
        localities: &Localities<'a>,
        problems: &mut Problems<'_>,
    ) -> Self {
        let slices = Slices::index(objects);
        let backing = Backing { pods, slices: &slices, localities };
        let mut owners: HashMap<IpAddr, &ObjectKey> = HashMap::new();
        let mut definitions = BTreeMap::new();
        for (key, object) in of_kind(objects, "Service") {
            let Resource::Service(service) = &object.resource else { continue };
            let Some(definition) = define(key, service, &backing, &mut owners, problems) else { continue };
            definitions.insert(Arc::clone(&definition.host), definition);
        }
        Self(definitions)
    }

    /// The service of this host name.
    pub fn get(&self, host: &str) -> Option<&Definition<'a>> {
        self.0.get(host)
    }

    /// The services that a host, possibly a wildcard, covers.
    pub fn covered_by(&self, pattern: &str) -> impl Iterator<Item = &Definition<'a>> {
        // Hosts are looked up, not searched: there are many of both.
        let (exact, all) =
            if pattern.starts_with('*') { (None, Some(&self.0)) } else { (self.0.get(pattern), None) };
        let matching = all.into_iter().flat_map(BTreeMap::values).filter(move |d| covers(pattern, &d.host));
        exact.into_iter().chain(matching)
    }

    /// All, in the order of their host names.
    pub fn iter(&self) -> impl Iterator<Item = &Definition<'a>> {
        self.0.values()
    }
}

impl<'a> Definition<'a> {
    /// The port with this number.
    pub fn port(&self, port: u16) -> Option<&PortDefinition<'a>> {
        self.ports.iter().find(|candidate| candidate.port == port)
    }
}

fn define<'a>(
    key: &'a ObjectKey,
    service: &'a Service,
    backing: &Backing<'a, '_>,
    owners: &mut HashMap<IpAddr, &'a ObjectKey>,
    problems: &mut Problems<'_>,
) -> Option<Definition<'a>> {
    if service.kind == Kind::ExternalName {
        problems.add(key, "spec.type", "ExternalName is not supported yet; the service is left out");
        return None;
    }
    let vips = vips(key, service, owners, problems);
    let mut ports: Vec<PortDefinition<'a>> = Vec::new();
    for (i, port) in service.ports.iter().enumerate().filter(|(_, port)| port.is_tcp) {
        let number =
            port_number(port.number).filter(|number| ports.iter().all(|other| other.port != *number));
        let Some(number) = number else {
            let message =
                format!("{} is no port number, or given twice; this entry is left out", port.number);
            problems.add(key, &format!("spec.ports[{i}].port"), message);
            continue;
        };
        ports.push(PortDefinition {
            port: number,
            protocol: protocol::declared(port.app_protocol.as_deref(), Some(&port.name), number),
            candidates: backing.candidates(key, service, port, &vips, problems),
        });
    }
    let visible = service.annotations.get(EXPORT_TO);
    let visible = visible.map(|text| export_to::annotation(&key.namespace, text)).unwrap_or_default();
    let host = host_name(&key.name, &key.namespace).into();
    let by_latency = load_balancer::by_latency(&service.annotations).unwrap_or_else(|error| {
        problems.add(key, &format!("metadata.{}", error.field), error.message);
        false
    });
    let nearby = nearby(key, service, problems);
    let headless = service.kind == Kind::Headless;
    Some(Definition { key, host, visible, vips, headless, nearby, by_latency, ports })
}

/// Kubernetes' `trafficDistribution`, else Istio's annotation for it.
fn nearby(key: &ObjectKey, service: &Service, problems: &mut Problems<'_>) -> Option<Nearby> {
    let spec = service.traffic_distribution.as_deref();
    let annotated = service.annotations.get(TRAFFIC_DISTRIBUTION).map(String::as_str);
    let (field, word) = match (spec, annotated) {
        (Some(word), _) => ("spec.trafficDistribution".to_owned(), word),
        (None, Some(word)) => (format!("metadata.annotations.{TRAFFIC_DISTRIBUTION}"), word),
        (None, None) => return None,
    };
    match word {
        "PreferClose" | "PreferSameZone" => Some(Nearby::Zone),
        "PreferSameNode" => Some(Nearby::Node),
        "" | "Any" => None,
        other => {
            let message = format!(
                "{other:?} is not PreferClose, PreferSameZone or PreferSameNode; all endpoints are used alike"
            );
            problems.add(key, &field, message);
            None
        }
    }
}

/// The cluster addresses; each belongs to the first service (by namespace and name) that claims it.
fn vips<'a>(
    key: &'a ObjectKey,
    service: &Service,
    owners: &mut HashMap<IpAddr, &'a ObjectKey>,
    problems: &mut Problems<'_>,
) -> Vec<IpAddr> {
    let field = |place: &Place| match place {
        Place::Single => "spec.clusterIP".to_owned(),
        Place::Listed(i) => format!("spec.clusterIPs[{i}]"),
    };
    let mut vips = Vec::new();
    for ClusterIp { place, ip } in &service.cluster_ips {
        let ip = match ip {
            Ok(ip) => *ip,
            Err(text) => {
                let message = format!("{text:?} is not an address; the service has no such address");
                problems.add(key, &field(place), message);
                continue;
            }
        };
        if let Some(other) = owners.get(&ip) {
            problems.conflict(
                key,
                &field(place),
                format!("{ip} is already an address of {other}, which keeps it"),
            );
        } else {
            owners.insert(ip, key);
            vips.push(ip);
        }
    }
    vips
}
