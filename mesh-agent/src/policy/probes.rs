//! The kubelet's privilege: requests that a pod declares as probes or hooks are permitted whatever policies say.
//!
//! To be asked only of connections that the kernel knows to be the kubelet's. Never looks at an address or a header: the
//! port, the method and the whole target have to be as declared. Tested below and in the lab (`tests/tests/probes.rs`).

use std::net::SocketAddr;

use http::{Method, Request};

use super::{Permit, refuse_mesh_ports};
use crate::state::snapshot::{ProbePort, ProbeRequest, Workload};

/// The one call of the gRPC health service that the kubelet makes.
const GRPC_CHECK: &str = "/grpc.health.v1.Health/Check";

/// Permits a request of the kubelet's that the pod declares for this port now; `None` leaves it to the policies.
pub fn declared<B>(workload: &Workload, destination: SocketAddr, request: &Request<B>) -> Option<Permit> {
    let target = request.uri().path_and_query().map_or("", |target| target.as_str());
    let is = is_declared(&workload.capture.probes, destination.port(), request.method(), target);
    is.then(|| refuse_mesh_ports(true, destination).ok()).flatten()
}

fn is_declared(probes: &[ProbePort], port: u16, method: &Method, target: &str) -> bool {
    let requests = probes.iter().filter(|probe| probe.port == port).flat_map(|probe| &probe.requests);
    requests.into_iter().any(|declared| match declared {
        ProbeRequest::Get(path) => method == Method::GET && target == &**path,
        ProbeRequest::GrpcHealth => method == Method::POST && target == GRPC_CHECK,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_method_and_target_have_to_be_the_declared_ones() {
        let http = ProbePort { port: 80, requests: vec![ProbeRequest::Get("/ready?full=1".into())] };
        let grpc = ProbePort { port: 90, requests: vec![ProbeRequest::GrpcHealth] };
        let probes = [http, grpc, ProbePort { port: 70, requests: Vec::new() }];
        let table = [
            (80, Method::GET, "/ready?full=1", true),
            (80, Method::GET, "/ready", false),
            (80, Method::GET, "/ready?full=2", false),
            (80, Method::GET, "/Ready?full=1", false),
            (80, Method::GET, "/x/../ready?full=1", false),
            (80, Method::HEAD, "/ready?full=1", false),
            (80, Method::POST, "/ready?full=1", false),
            (81, Method::GET, "/ready?full=1", false),
            (70, Method::GET, "/ready?full=1", false),
            (80, Method::POST, GRPC_CHECK, false),
            (90, Method::POST, GRPC_CHECK, true),
            (90, Method::GET, GRPC_CHECK, false),
            (90, Method::POST, "/grpc.health.v1.Health/Watch", false),
        ];
        for (port, method, target, expected) in table {
            assert_eq!(is_declared(&probes, port, &method, target), expected, "{port} {method} {target}");
        }
    }
}
