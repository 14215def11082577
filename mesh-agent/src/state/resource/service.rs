//! Services: what is compiled of them, held compactly, for every node holds every one.
//!
//! Tested through `compile/`.

use std::{collections::BTreeMap, net::IpAddr};

use k8s_openapi::{api::core::v1, apimachinery::pkg::util::intstr::IntOrString};

use super::load_balancer;

/// Annotation of a Service that says who may know of it.
pub const EXPORT_TO: &str = "networking.istio.io/exportTo";

/// Istio's annotation of a Service for what is `trafficDistribution` since Kubernetes 1.30.
pub const TRAFFIC_DISTRIBUTION: &str = "networking.istio.io/traffic-distribution";

/// The annotations that something is compiled from.
const ANNOTATIONS: [&str; 3] = [EXPORT_TO, TRAFFIC_DISTRIBUTION, load_balancer::ANNOTATION];

/// What is compiled of a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// How it is reached.
    pub kind: Kind,
    /// `clusterIPs`, else `clusterIP`. Without "None" and "".
    pub cluster_ips: Box<[ClusterIp]>,
    /// `ports`, those of other protocols among them.
    pub ports: Box<[Port]>,
    /// `selector`; empty where there is none.
    pub selector: BTreeMap<String, String>,
    /// Those of its annotations that something is compiled from.
    pub annotations: BTreeMap<String, String>,
    /// Whether the first of `ipFamilies` is IPv6.
    pub asks_for_v6: bool,
    /// `publishNotReadyAddresses`.
    pub publishes_unready: bool,
    /// `trafficDistribution`.
    pub traffic_distribution: Option<Box<str>>,
}

/// How a Service is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// By its cluster addresses, if it has any.
    ClusterIp,
    /// By the addresses of its pods (`clusterIP: None`).
    Headless,
    /// Under another name (`type: ExternalName`).
    ExternalName,
}

/// A cluster address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterIp {
    /// Where it is written.
    pub place: Place,
    /// The address; what is none as it is written.
    pub ip: Result<IpAddr, Box<str>>,
}

/// Where a cluster address is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// `spec.clusterIP`.
    Single,
    /// `spec.clusterIPs[i]`.
    Listed(usize),
}

/// A port of a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// `name`; empty where it has none.
    pub name: Box<str>,
    /// `port`.
    pub number: i32,
    /// Whether it is one the mesh carries.
    pub is_tcp: bool,
    /// `appProtocol`.
    pub app_protocol: Option<Box<str>>,
    /// `targetPort`.
    pub target: Target,
}

/// Which port of a pod a Service's port leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// The same.
    Same,
    /// This one.
    Number(i32),
    /// The container port of this name.
    Name(Box<str>),
}

impl Service {
    /// Keeps what is compiled.
    pub(super) fn of(service: v1::Service) -> Self {
        let spec = service.spec.unwrap_or_default();
        let mut annotations = service.metadata.annotations.unwrap_or_default();
        annotations.retain(|name, _| ANNOTATIONS.contains(&name.as_str()));
        Self {
            kind: match (spec.type_.as_deref(), spec.cluster_ip.as_deref()) {
                (Some("ExternalName"), _) => Kind::ExternalName,
                (_, Some("None")) => Kind::Headless,
                _ => Kind::ClusterIp,
            },
            cluster_ips: cluster_ips(spec.cluster_ips, spec.cluster_ip),
            ports: spec.ports.into_iter().flatten().map(Port::of).collect(),
            selector: spec.selector.unwrap_or_default(),
            annotations,
            asks_for_v6: spec
                .ip_families
                .and_then(|all| all.into_iter().next())
                .is_some_and(|one| one == "IPv6"),
            publishes_unready: spec.publish_not_ready_addresses.unwrap_or(false),
            traffic_distribution: spec.traffic_distribution.map(String::into),
        }
    }
}

fn cluster_ips(listed: Option<Vec<String>>, single: Option<String>) -> Box<[ClusterIp]> {
    let listed = listed.unwrap_or_default();
    let single = if listed.is_empty() { single } else { None };
    let listed = listed.into_iter().enumerate().map(|(i, text)| (Place::Listed(i), text));
    let all = listed.chain(single.map(|text| (Place::Single, text)));
    // "None" is a headless service: clients reach its pods by their own addresses.
    let all = all.filter(|(_, text)| !["", "None"].contains(&text.as_str()));
    let one = |(place, text): (Place, String)| {
        let ip = text.parse::<IpAddr>().map(|ip| ip.to_canonical());
        ClusterIp { place, ip: ip.map_err(|_| text.into()) }
    };
    all.map(one).collect()
}

impl Port {
    fn of(port: v1::ServicePort) -> Self {
        let target = match port.target_port {
            None | Some(IntOrString::Int(0)) => Target::Same,
            Some(IntOrString::Int(number)) => Target::Number(number),
            Some(IntOrString::String(name)) if name.is_empty() => Target::Same,
            Some(IntOrString::String(name)) => Target::Name(name.into()),
        };
        Self {
            name: port.name.unwrap_or_default().into(),
            number: port.port,
            is_tcp: is_tcp(port.protocol.as_deref()),
            app_protocol: port.app_protocol.map(String::into),
            target,
        }
    }
}

/// Whether a port is one the mesh carries; TCP is Kubernetes' default.
pub fn is_tcp(protocol: Option<&str>) -> bool {
    protocol.is_none_or(|protocol| protocol.is_empty() || protocol == "TCP")
}
