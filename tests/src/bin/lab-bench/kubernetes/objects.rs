//! The objects that are written: Services with their endpoints and rules, and a pod that asks.

use std::net::{IpAddr, Ipv4Addr};

use kube::{Api, core::DynamicObject};
use serde_json::{Value, json};

use super::api_server::{ApiServer, resource};

pub const NAMESPACE: &str = "mesh-bench";
/// Of each Service.
pub const ENDPOINTS: usize = 10;
/// One of so many Services has a VirtualService.
pub const ROUTED: usize = 10;
/// The Service whose endpoint changes.
pub const MOVING: &str = "moving";
/// Version, kind and plural.
pub const ROUTES: (&str, &str, &str) = ("networking.istio.io/v1", "VirtualService", "virtualservices");
pub const SLICES: (&str, &str, &str) = ("discovery.k8s.io/v1", "EndpointSlice", "endpointslices");

const ACCOUNT: &str = "client";

/// The Services of these numbers with all that is about them, each with where it is to be written.
pub fn services(
    api: &ApiServer,
    numbers: std::ops::Range<usize>,
    routed: bool,
) -> impl Iterator<Item = (Api<DynamicObject>, Value)> {
    let of = |(version, kind, plural)| api.of(&resource(version, kind, plural), NAMESPACE);
    let (services, slices, routes) = (of(("v1", "Service", "services")), of(SLICES), of(ROUTES));
    numbers.flat_map(move |number| {
        let name = format!("many-{number}");
        let endpoints: Vec<IpAddr> = (0..ENDPOINTS).map(|endpoint| address(number, endpoint)).collect();
        let mut all = vec![(services.clone(), service(&name)), (slices.clone(), slice(&name, &endpoints))];
        if routed && number % ROUTED == 0 {
            all.push((routes.clone(), route(&name)));
        }
        all
    })
}

/// Where nobody is.
fn address(number: usize, endpoint: usize) -> IpAddr {
    let bits = u32::from(Ipv4Addr::new(11, 0, 0, 0)) | u32::try_from((number << 4) + endpoint).unwrap_or(0);
    Ipv4Addr::from(bits).into()
}

/// Its pods are in the mesh if they do not say otherwise.
pub fn namespace() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": { "name": NAMESPACE, "labels": { "mesh.io/dataplane-mode": "node" } },
    })
}

pub fn account() -> Value {
    json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": ACCOUNT } })
}

pub fn pod(name: &str, node: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name },
        "spec": {
            "nodeName": node, "serviceAccountName": ACCOUNT, "automountServiceAccountToken": false,
            "terminationGracePeriodSeconds": 0,
            "containers": [{ "name": "app", "image": "lab" }],
        },
    })
}

/// The status of a pod that runs.
pub fn running(ip: IpAddr) -> Value {
    json!({
        "phase": "Running", "podIP": ip, "podIPs": [{ "ip": ip }],
        "conditions": [{ "type": "Ready", "status": "True" }],
    })
}

pub fn service(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": name },
        "spec": { "ports": [{ "name": "http", "port": 80, "targetPort": 8080 }] },
    })
}

pub fn slice_name(service: &str) -> String {
    format!("{service}-1")
}

pub fn slice(service: &str, endpoints: &[IpAddr]) -> Value {
    json!({
        "apiVersion": SLICES.0, "kind": SLICES.1, "addressType": "IPv4",
        "metadata": { "name": slice_name(service), "labels": { "kubernetes.io/service-name": service } },
        "endpoints": endpoints.iter().copied().map(endpoint).collect::<Vec<_>>(),
        "ports": [{ "name": "http", "port": 8080 }],
    })
}

pub fn endpoint(address: IpAddr) -> Value {
    json!({ "addresses": [address], "conditions": { "ready": true } })
}

fn route(service: &str) -> Value {
    let to = json!([{ "destination": { "host": service } }]);
    json!({
        "apiVersion": ROUTES.0, "kind": ROUTES.1,
        "metadata": { "name": service },
        "spec": {
            "hosts": [service],
            "http": [
                { "match": [{ "headers": { "end-user": { "exact": "jason" } } }], "route": to },
                { "match": [{ "uri": { "prefix": "/never" } }], "route": to },
                { "route": to },
            ],
        },
    })
}
