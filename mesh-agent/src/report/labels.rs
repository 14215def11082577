//! The label sets of Istio's standard metrics.
//!
//! Promises the names and meanings that existing dashboards query; what is not known is `unknown`, never left
//! out. Never looks anything up: it renders what the path knew. Tested through the exposition in `metrics.rs`.

use std::{
    fmt,
    sync::{Arc, LazyLock},
};

use prometheus_client::encoding::{EncodeLabel as _, EncodeLabelSet, LabelSetEncoder};

use super::{GaveUp, Peer, RequestOutcome, RequestProtocol, Security, Side};
use crate::{
    error::Kind,
    state::snapshot::{Cluster, Workload},
};

/// Highest status number gRPC defines (`UNAUTHENTICATED`); others come from peers and would be endless series.
const LAST_GRPC_STATUS: u32 = 16;

static UNKNOWN: LazyLock<Arc<str>> = LazyLock::new(|| "unknown".into());

/// The word for what is not known.
pub(super) fn unknown() -> Arc<str> {
    UNKNOWN.clone()
}

/// One end: the `source_…` or `destination_…` labels.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct End {
    workload: Arc<str>,
    namespace: Arc<str>,
    canonical_service: Arc<str>,
    canonical_revision: Arc<str>,
    app: Arc<str>,
    version: Arc<str>,
    principal: Arc<str>,
    cluster: &'static str,
}

impl End {
    fn new(peer: &Peer) -> Self {
        let principal = peer.identity.as_ref().map_or_else(unknown, |id| id.to_string().into());
        let Some(workload) = &peer.workload else {
            return Self {
                workload: unknown(),
                namespace: unknown(),
                canonical_service: unknown(),
                canonical_revision: unknown(),
                app: unknown(),
                version: unknown(),
                principal,
                cluster: "unknown",
            };
        };
        Self {
            workload: workload.workload_name.clone(),
            namespace: workload.namespace.clone(),
            canonical_service: workload.canonical_service.clone(),
            canonical_revision: workload.canonical_revision.clone(),
            app: label(workload, "app", &workload.canonical_service),
            version: label(workload, "version", &workload.canonical_revision),
            principal,
            cluster: "Kubernetes",
        }
    }
}

fn label(workload: &Workload, key: &str, otherwise: &Arc<str>) -> Arc<str> {
    workload.labels.get(key).unwrap_or(otherwise).clone()
}

/// The `destination_service…` labels.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Addressed {
    host: Arc<str>,
    name: Arc<str>,
    namespace: Arc<str>,
}

impl Addressed {
    fn new(cluster: Option<&Cluster>) -> Self {
        match cluster {
            Some(c) => Self { host: c.host.clone(), name: c.service.clone(), namespace: c.namespace.clone() },
            None => Self { host: unknown(), name: unknown(), namespace: unknown() },
        }
    }
}

/// What went wrong, as `response_flags`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Flags {
    /// A delay was injected.
    pub delay: bool,
    /// Flag of the error, `-` when none.
    pub error: &'static str,
    /// Why there was no further try.
    pub gave_up: Option<GaveUp>,
}

impl Flags {
    /// Nothing to report.
    pub const NONE: Self = Self { delay: false, error: "-", gave_up: None };

    /// The flags of an error.
    pub fn new(error: Option<&crate::error::Error>) -> Self {
        Self { error: error.map_or("-", |error| error.kind.row().flag), ..Self::NONE }
    }

    /// The flags of a request.
    pub fn of(outcome: &RequestOutcome<'_>) -> Self {
        // Of a request that policy refuses Envoy has a status and a detail, and no flag. One that is cut has another status.
        let refused = outcome.status == 403 || outcome.grpc_status.is_some();
        let failed = outcome.error.filter(|error| error.kind != Kind::Denied || !refused);
        Self { delay: outcome.delay_injected, gave_up: outcome.gave_up, ..Self::new(failed) }
    }
}

impl fmt::Display for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let delay = self.delay.then_some("DI");
        let error = Some(self.error).filter(|error| *error != "-");
        let gave_up = self.gave_up.map(GaveUp::flag);
        let mut rest = [delay, error, gave_up].into_iter().flatten();
        f.write_str(rest.next().unwrap_or("-"))?;
        rest.try_for_each(|flag| write!(f, ",{flag}"))
    }
}

/// The labels of the TCP metrics, and those that requests share with them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct TrafficLabels {
    side: Side,
    source: End,
    destination: End,
    service: Addressed,
    protocol: RequestProtocol,
    flags: Flags,
    security: Security,
}

impl TrafficLabels {
    /// The labels of this traffic, without flags.
    pub fn new(
        side: Side,
        (source, destination): (&Peer, &Peer),
        cluster: Option<&Cluster>,
        protocol: RequestProtocol,
        security: Security,
    ) -> Self {
        Self {
            side,
            source: End::new(source),
            destination: End::new(destination),
            service: Addressed::new(cluster),
            protocol,
            flags: Flags::NONE,
            security,
        }
    }

    /// The same traffic with these flags.
    pub fn with_flags(self, flags: Flags) -> Self {
        Self { flags, ..self }
    }
}

/// The labels of the request metrics.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct RequestLabels {
    /// What TCP has too.
    pub traffic: TrafficLabels,
    /// `response_code`.
    pub status: u16,
    /// `grpc_response_status`; empty in the text when the request was not gRPC.
    pub grpc: Option<u32>,
}

impl EncodeLabelSet for TrafficLabels {
    fn encode(&self, e: &mut LabelSetEncoder<'_>) -> fmt::Result {
        ("reporter", self.side.word()).encode(e.encode_label())?;
        let s = &self.source;
        ("source_workload", &*s.workload).encode(e.encode_label())?;
        ("source_canonical_service", &*s.canonical_service).encode(e.encode_label())?;
        ("source_canonical_revision", &*s.canonical_revision).encode(e.encode_label())?;
        ("source_workload_namespace", &*s.namespace).encode(e.encode_label())?;
        ("source_principal", &*s.principal).encode(e.encode_label())?;
        ("source_app", &*s.app).encode(e.encode_label())?;
        ("source_version", &*s.version).encode(e.encode_label())?;
        ("source_cluster", s.cluster).encode(e.encode_label())?;
        let d = &self.destination;
        ("destination_workload", &*d.workload).encode(e.encode_label())?;
        ("destination_canonical_service", &*d.canonical_service).encode(e.encode_label())?;
        ("destination_canonical_revision", &*d.canonical_revision).encode(e.encode_label())?;
        ("destination_workload_namespace", &*d.namespace).encode(e.encode_label())?;
        ("destination_principal", &*d.principal).encode(e.encode_label())?;
        ("destination_app", &*d.app).encode(e.encode_label())?;
        ("destination_version", &*d.version).encode(e.encode_label())?;
        ("destination_cluster", d.cluster).encode(e.encode_label())?;
        ("destination_service", &*self.service.host).encode(e.encode_label())?;
        ("destination_service_name", &*self.service.name).encode(e.encode_label())?;
        ("destination_service_namespace", &*self.service.namespace).encode(e.encode_label())?;
        ("request_protocol", self.protocol.word()).encode(e.encode_label())?;
        ("response_flags", self.flags.to_string()).encode(e.encode_label())?;
        ("connection_security_policy", self.security.word()).encode(e.encode_label())
    }
}

impl EncodeLabelSet for RequestLabels {
    fn encode(&self, e: &mut LabelSetEncoder<'_>) -> fmt::Result {
        self.traffic.encode(e)?;
        ("response_code", self.status).encode(e.encode_label())?;
        let grpc = match self.grpc {
            None => String::new(),
            Some(code @ 0..=LAST_GRPC_STATUS) => code.to_string(),
            Some(_) => "unknown".to_owned(),
        };
        ("grpc_response_status", grpc).encode(e.encode_label())
    }
}

/// Labels of `mesh_refused_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct RefusedLabels {
    /// Who refused.
    pub side: Side,
    /// Word of the kind.
    pub kind: &'static str,
    /// The captured pod.
    pub pod: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
}

impl EncodeLabelSet for RefusedLabels {
    fn encode(&self, e: &mut LabelSetEncoder<'_>) -> fmt::Result {
        ("side", self.side.word()).encode(e.encode_label())?;
        ("kind", self.kind).encode(e.encode_label())?;
        ("pod", &*self.pod).encode(e.encode_label())?;
        ("pod_namespace", &*self.namespace).encode(e.encode_label())
    }
}
