//! A flow as people see it: the kernel's record joined with the configuration and with what the agent knows.
//!
//! [`join`] is pure: the same record, snapshot, facts and clock give the same view. Never guesses: what nobody
//! knows is absent. Tested below.

use std::{
    borrow::Cow,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_common::{
    addr::Addr,
    flow::{FlowRecord, direction, verdict},
};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::{FlowFacts, FlowKey, RequestProtocol, access_log::rfc3339};
use crate::state::snapshot::{Snapshot, Workload};

/// One flow: one connection of an app, or packets between two addresses that belong to no socket of the pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowView {
    /// Namespace of the pod, when the pod is known.
    pub namespace: Option<String>,
    /// Name of the pod, when the pod is known.
    pub pod: Option<String>,
    /// Who dialled.
    pub direction: Direction,
    /// `tcp`, `udp`, … or the number of the IP protocol.
    pub transport: Cow<'static, str>,
    /// `http`, `grpc` or `tcp` where the agent looked, else the transport.
    pub protocol: Cow<'static, str>,
    /// The pod's side, as its app sees it.
    pub local: SocketAddr,
    /// The other side, as the pod's app sees it.
    pub remote: SocketAddr,
    /// Host name of the service.
    pub service: Option<String>,
    /// Where the connection or its last request went.
    pub endpoint: Option<SocketAddr>,
    /// Pod of the other end, `namespace/name`.
    pub peer_pod: Option<String>,
    /// SPIFFE identity of the other end.
    pub peer_identity: Option<String>,
    /// Last route.
    pub route: Option<String>,
    /// Last response flag.
    pub flag: Option<String>,
    /// Whether the bytes travel as mTLS between the nodes.
    pub security: Protection,
    /// TCP state; `open` or `closed` for other protocols.
    pub state: Cow<'static, str>,
    /// What the kernel did with it.
    pub verdict: Verdict,
    /// Bytes the pod sent (payload for sockets, IP bytes for packet flows).
    pub tx_bytes: u64,
    /// Bytes the pod received.
    pub rx_bytes: u64,
    /// Packets the pod sent.
    pub tx_packets: u64,
    /// Packets the pod received.
    pub rx_packets: u64,
    /// Smoothed round-trip time, microseconds.
    pub srtt_us: u32,
    /// Segments the pod sent again.
    pub retransmits: u32,
    /// When it began, RFC 3339 in UTC.
    pub start: String,
    /// How long it has been or was open, milliseconds.
    pub duration_ms: u64,
    /// Since something was last seen of it, milliseconds.
    pub age_ms: u64,
    /// Cookie of the app's socket, 0 for a packet flow: tells two flows of the same addresses apart.
    pub socket: u64,
}

/// Who dialled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// The pod.
    Outbound,
    /// The other side.
    Inbound,
    /// A record of another version says something else.
    Unknown,
}

/// How the bytes travel between the nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protection {
    /// As mTLS, or within this node's agent, which vouches for both ends.
    MutualTls,
    /// In the clear.
    None,
    /// Nobody knows (any more).
    Unknown,
}

impl Protection {
    /// The word in JSON and tables.
    pub const fn word(self) -> &'static str {
        match self {
            Self::MutualTls => "mutual_tls",
            Self::None => "none",
            Self::Unknown => "unknown",
        }
    }
}

/// What the kernel did with a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Handed to the agent.
    Captured,
    /// Left alone.
    Bypassed,
    /// Never established.
    Failed,
    /// Left alone because the pod excludes its port or address.
    Excluded,
    /// Dropped: sent around the agent by a pod whose egress is restricted.
    Leaked,
    /// From app to app without the agent, as the agent allows it.
    Direct,
    /// From the kubelet to the app without the agent: a probe that sends nothing.
    Probe,
    /// A record of another version says something else.
    Unknown,
}

impl Verdict {
    /// The word in JSON and tables.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Captured => "captured",
            Self::Bypassed => "bypassed",
            Self::Failed => "failed",
            Self::Excluded => "excluded",
            Self::Leaked => "leaked",
            Self::Direct => "direct",
            Self::Probe => "probe",
            Self::Unknown => "unknown",
        }
    }
}

/// The two clocks at one moment: records count nanoseconds of the kernel's monotonic clock.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub monotonic_ns: u64,
    /// The same moment as people write it.
    pub wall: SystemTime,
}

impl Clock {
    /// Now.
    pub fn now() -> Self {
        // The monotonic clock always exists; were it to fail, ages would read as zero.
        let monotonic = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
        Self { monotonic_ns: monotonic.as_nanos() as u64, wall: SystemTime::now() }
    }

    fn wall_at(&self, monotonic_ns: u64) -> SystemTime {
        let before = Duration::from_nanos(self.monotonic_ns.saturating_sub(monotonic_ns));
        self.wall.checked_sub(before).unwrap_or(SystemTime::UNIX_EPOCH)
    }

    fn ms_open(&self, record: &FlowRecord) -> u64 {
        match record.end_ns {
            0 => self.ms_since(record.start_ns),
            end => end.saturating_sub(record.start_ns) / 1_000_000,
        }
    }

    fn ms_since(&self, monotonic_ns: u64) -> u64 {
        self.monotonic_ns.saturating_sub(monotonic_ns) / 1_000_000
    }
}

/// The facts of a pod's flow by (pod, side, client address).
pub type FindFacts<'a> = &'a dyn Fn(&Workload, FlowKey) -> Option<FlowFacts>;

/// What a record is joined with.
pub struct Context<'a> {
    /// The configuration in force.
    pub snapshot: &'a Snapshot,
    /// The pod that a network namespace cookie belongs to.
    pub pod_of: &'a dyn Fn(u64) -> Option<Arc<Workload>>,
    /// What the agent knows.
    pub facts: FindFacts<'a>,
    /// The address of an endpoint that the kernel chose, by its number.
    pub endpoint: &'a dyn Fn(u32) -> Option<SocketAddr>,
    /// Now.
    pub clock: Clock,
}

/// The address as the standard library writes it; IPv4 never v4-mapped.
pub fn socket_addr(addr: Addr) -> SocketAddr {
    SocketAddr::new(IpAddr::V6(Ipv6Addr::from(addr.ip)).to_canonical(), addr.port)
}

/// Joins a kernel record with names and facts.
pub fn join(record: &FlowRecord, context: &Context<'_>) -> FlowView {
    let (local, remote) = (socket_addr(record.local), socket_addr(record.remote));
    let pod = (context.pod_of)(record.netns).or_else(|| context.snapshot.workload_at(local.ip()).cloned());
    let (direction, key) = match record.direction {
        direction::OUTBOUND => (Direction::Outbound, Some(FlowKey::Outbound(local, remote))),
        direction::INBOUND => (Direction::Inbound, Some(FlowKey::Inbound(remote))),
        _ => (Direction::Unknown, None),
    };
    let captured = record.verdict == verdict::CAPTURED;
    let facts = pod.as_ref().zip(key).filter(|_| captured);
    let known = facts.and_then(|(pod, key)| (context.facts)(pod, key));
    let security = protection(captured, known.as_ref());
    let facts = if record.verdict == verdict::DIRECT {
        facts_of_direct(record, direction, context)
    } else {
        known.unwrap_or_default()
    };
    let there = endpoint(&facts, direction, remote, context.snapshot);
    let transport = transport(record.protocol);
    FlowView {
        namespace: pod.as_ref().map(|pod| pod.namespace.to_string()),
        pod: pod.as_ref().map(|pod| pod.name.to_string()),
        direction,
        protocol: facts.protocol.map_or_else(|| transport.clone(), |protocol| protocol.word().into()),
        transport,
        local,
        remote,
        service: service(&facts, direction, remote, context.snapshot),
        endpoint: there,
        peer_pod: peer_pod(&facts, there.unwrap_or(remote), context.snapshot),
        peer_identity: facts.peer.as_ref().map(ToString::to_string),
        route: facts.route.as_ref().map(ToString::to_string),
        flag: facts.flag.filter(|flag| *flag != "-").map(str::to_owned),
        security,
        state: state(record),
        verdict: verdict_of(record.verdict),
        tx_bytes: record.tx_bytes,
        rx_bytes: record.rx_bytes,
        tx_packets: record.tx_packets,
        rx_packets: record.rx_packets,
        srtt_us: record.srtt_us,
        retransmits: record.retransmits,
        start: rfc3339(context.clock.wall_at(record.start_ns)),
        duration_ms: context.clock.ms_open(record),
        age_ms: context.clock.ms_since(record.last_seen_ns.max(record.end_ns)),
        socket: record.socket,
    }
}

fn protection(captured: bool, facts: Option<&FlowFacts>) -> Protection {
    match (captured, facts) {
        (true, None) => Protection::Unknown,
        (true, Some(facts)) if facts.mutual_tls => Protection::MutualTls,
        _ => Protection::None,
    }
}

/// Nobody in user space has seen a direct connection; but the kernel lets none be made from an address that is not its
/// pod's own, nor to another endpoint than it chose.
fn facts_of_direct(record: &FlowRecord, direction: Direction, context: &Context<'_>) -> FlowFacts {
    let (local, remote) = (socket_addr(record.local), socket_addr(record.remote));
    let endpoint = (context.endpoint)(record.endpoint);
    let inbound = direction == Direction::Inbound;
    let service = inbound.then(|| context.snapshot.inbound.get(&local)).flatten();
    let peer = if inbound { Some(remote) } else { endpoint };
    let peer = peer.and_then(|peer| context.snapshot.workload_at(peer.ip()));
    FlowFacts {
        service: service.map(|cluster| Arc::clone(&cluster.host)),
        endpoint,
        peer_pod: peer.map(|pod| format!("{}/{}", pod.namespace, pod.name).into()),
        peer: peer.map(|pod| pod.identity.clone()),
        protocol: Some(RequestProtocol::Tcp),
        ..FlowFacts::default()
    }
}

/// Only a client's side has a service it dialled; a server's is known by facts alone.
fn service(
    facts: &FlowFacts,
    direction: Direction,
    remote: SocketAddr,
    snapshot: &Snapshot,
) -> Option<String> {
    let known = facts.service.as_ref();
    let dialled = || (direction == Direction::Outbound).then(|| snapshot.vips.get(&remote.ip())).flatten();
    known.or_else(|| dialled().map(|service| &service.host)).map(ToString::to_string)
}

fn endpoint(
    facts: &FlowFacts,
    direction: Direction,
    remote: SocketAddr,
    snapshot: &Snapshot,
) -> Option<SocketAddr> {
    let direct = || {
        (direction == Direction::Outbound && snapshot.workload_at(remote.ip()).is_some()).then_some(remote)
    };
    facts.endpoint.or_else(direct)
}

fn peer_pod(facts: &FlowFacts, there: SocketAddr, snapshot: &Snapshot) -> Option<String> {
    let by_address = || snapshot.workload_at(there.ip()).map(|pod| format!("{}/{}", pod.namespace, pod.name));
    facts.peer_pod.as_ref().map(ToString::to_string).or_else(by_address)
}

fn transport(protocol: u8) -> Cow<'static, str> {
    Cow::Borrowed(match protocol {
        1 => "icmp",
        6 => "tcp",
        17 => "udp",
        58 => "icmpv6",
        132 => "sctp",
        other => return other.to_string().into(),
    })
}

/// States as in `include/net/tcp_states.h`.
fn state(record: &FlowRecord) -> Cow<'static, str> {
    Cow::Borrowed(match (record.end_ns, record.protocol, record.tcp_state) {
        (0, 6, 1) => "established",
        (0, 6, 2) => "syn_sent",
        (0, 6, 3 | 12) => "syn_recv",
        (0, 6, 4) => "fin_wait1",
        (0, 6, 5) => "fin_wait2",
        (0, 6, 6) => "time_wait",
        (1.., ..) | (0, 6, 7) => "closed",
        (0, 6, 8) => "close_wait",
        (0, 6, 9) => "last_ack",
        (0, 6, 11) => "closing",
        (0, ..) => "open",
    })
}

fn verdict_of(value: u8) -> Verdict {
    match value {
        verdict::CAPTURED => Verdict::Captured,
        verdict::BYPASSED => Verdict::Bypassed,
        verdict::FAILED => Verdict::Failed,
        verdict::EXCLUDED => Verdict::Excluded,
        verdict::LEAKED => Verdict::Leaked,
        verdict::DIRECT => Verdict::Direct,
        verdict::PROBE => Verdict::Probe,
        _ => Verdict::Unknown,
    }
}

#[cfg(test)]
#[path = "flows_tests.rs"]
mod tests;
