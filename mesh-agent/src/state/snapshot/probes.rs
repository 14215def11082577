//! What a pod declares for the kubelet: probes and lifecycle hooks, by port. Read in `resource/probes.rs`, let in by the
//! kernel and by `policy/probes.rs`.

/// A port of the pod that is declared for probes or hooks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbePort {
    /// The port.
    pub port: u16,
    /// The requests that may come; none where only connections are declared, which carry no byte of the kubelet's.
    pub requests: Vec<ProbeRequest>,
}

/// A declared request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeRequest {
    /// `GET` of this target, with its query, as the kubelet writes it.
    Get(Box<str>),
    /// A `Check` of the gRPC health service, of whatever service.
    GrpcHealth,
}
