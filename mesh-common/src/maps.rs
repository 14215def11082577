//! Every map: its name, key, value and capacity. `mesh-ebpf/src/maps.rs` declares them, the agent opens them by
//! these names under `BPF_DIR/maps/`.
//!
//! Maps "of a pod" exist once for each enrolled pod, so that no pod can fill another's: the shared maps
//! [`ORIGINAL_DST`], [`CLIENTS`], [`FLOWS`], [`PACKET_FLOWS`], [`STEERING`], [`ADMITTED`] and [`PROBES`] hold them by the network namespace's cookie.
//! Layouts only ever grow at their end: an older agent may have pinned them.

mod direct;
mod probes;

pub use self::{
    direct::{Admitted, DirectKey, DirectService, Endpoint, HeldKey, Slot, SlotKey, balancing},
    probes::{Probe, ProbePort, probe},
};
use crate::addr::Addr;

/// Enrolled pods: network namespace cookie → [`PodAddrs`].
pub const PODS: &str = "PODS";
/// Socket storage: [`SocketFacts`] of one socket.
pub const SOCKETS: &str = "SOCKETS";
/// Network namespace cookie → the pod's [`POD_ORIGINAL_DST`].
pub const ORIGINAL_DST: &str = "ORIGINAL_DST";
/// Network namespace cookie → the pod's [`POD_CLIENTS`].
pub const CLIENTS: &str = "CLIENTS";
/// Network namespace cookie → the pod's [`POD_FLOWS`].
pub const FLOWS: &str = "FLOWS";
/// Network namespace cookie → the pod's [`POD_PACKET_FLOWS`].
pub const PACKET_FLOWS: &str = "PACKET_FLOWS";
/// Ring buffer of ended flows, each a [`crate::flow::FlowRecord`].
pub const CLOSED: &str = "CLOSED";
/// Counters per CPU, indexed by [`counter`].
pub const COUNTERS: &str = "COUNTERS";
/// What pods ask of their capture beside the defaults: network namespace cookie → [`PodPolicy`].
pub const POLICIES: &str = "POLICIES";
/// Excluded addresses of all pods, a trie of longest prefixes: [`CidrKey`] → 1.
pub const EXCLUDED_CIDRS: &str = "EXCLUDED_CIDRS";
/// Network namespace cookie → the pod's [`LISTENERS`].
pub const STEERING: &str = "STEERING";
/// Services that a pod may reach directly: [`DirectKey`] → [`DirectService`].
pub const DIRECT: &str = "DIRECT";
/// The endpoints of those services: [`SlotKey`] → [`Slot`].
pub const DIRECT_SLOTS: &str = "DIRECT_SLOTS";
/// Endpoints of those services, each once: its number → [`Endpoint`].
pub const ENDPOINTS: &str = "ENDPOINTS";
/// How many entries a client has in a server's [`POD_ADMITTED`]: [`HeldKey`] → a signed number (`i64`). The agent takes entries
/// away while the kernel counts, so that it may be off by a few, below zero too.
pub const HELD: &str = "HELD";
/// Network namespace cookie → the pod's [`POD_ADMITTED`].
pub const ADMITTED: &str = "ADMITTED";
/// Ports that this node's pods declare for probes: [`Addr`] → [`ProbePort`].
pub const PROBE_PORTS: &str = "PROBE_PORTS";
/// Network namespace cookie → the pod's [`POD_PROBES`].
pub const PROBES: &str = "PROBES";
/// Of a pod: the kubelet's connections to its declared ports, [`Tuple`] → [`Probe`].
pub const POD_PROBES: &str = "POD_PROBES";
/// Of a pod: direct connections to it, [`Tuple`] → [`Admitted`].
pub const POD_ADMITTED: &str = "POD_ADMITTED";
/// Of a pod: the app's captured connections, [`Tuple`] → [`Entry`] with the address dialled.
pub const POD_ORIGINAL_DST: &str = "POD_ORIGINAL_DST";
/// Of a pod: the agent's connections to the app, [`Tuple`] → [`Entry`] with the real client.
pub const POD_CLIENTS: &str = "POD_CLIENTS";
/// Of a pod: flows seen at sockets, socket cookie → [`crate::flow::FlowRecord`].
pub const POD_FLOWS: &str = "POD_FLOWS";
/// Of a pod: flows seen as packets only, [`PacketKey`] → [`crate::flow::FlowRecord`].
pub const POD_PACKET_FLOWS: &str = "POD_PACKET_FLOWS";
/// Of a pod: its inner interfaces, by index: those that lead to nested containers and virtual machines, not out of it.
pub const INNER_LINKS: &str = "INNER_LINKS";
/// Of a pod: connections of its guests (what is behind its inner interfaces) that are being handed to the agent,
/// [`Tuple`] → when the last SYN came (`CLOCK_MONOTONIC`, ns). Needed until the connection has its socket.
pub const POD_GUESTS: &str = "POD_GUESTS";
/// Of a pod: the agent's listeners in it, indexed by [`listener`].
pub const LISTENERS: &str = "LISTENERS";
/// Read-only global of the programs of one pod: its network namespace cookie (`u64`).
pub const NETNS_COOKIE: &str = "NETNS_COOKIE";
/// Read-only global of the guard of one pod: the number that the pod's network namespace has in the agent's (`u64`).
pub const NETNS_NUMBER: &str = "NETNS_NUMBER";

/// Maps that all programs of one agent share, pinned under these names.
pub const SHARED: [&str; 18] = [
    PODS,
    SOCKETS,
    ORIGINAL_DST,
    CLIENTS,
    FLOWS,
    PACKET_FLOWS,
    CLOSED,
    COUNTERS,
    POLICIES,
    EXCLUDED_CIDRS,
    STEERING,
    DIRECT,
    DIRECT_SLOTS,
    ENDPOINTS,
    ADMITTED,
    HELD,
    PROBE_PORTS,
    PROBES,
];
/// Maps that exist once for each pod.
pub const OF_A_POD: [&str; 9] = [
    POD_ORIGINAL_DST,
    POD_CLIENTS,
    POD_FLOWS,
    POD_PACKET_FLOWS,
    LISTENERS,
    INNER_LINKS,
    POD_GUESTS,
    POD_ADMITTED,
    POD_PROBES,
];

/// How every map and program of ours is called in the object, before the agent that loads it puts the mark of its
/// instance there: `m000000_NAME`. The kernel keeps 15 characters of a name.
pub const UNMARKED: &str = "m000000_";

/// What follows the mark in the kernel's name of each map.
pub const KERNEL_NAMES: [(&str, &str); 27] = [
    (PODS, "pods"),
    (SOCKETS, "sockets"),
    (ORIGINAL_DST, "origdst"),
    (CLIENTS, "clients"),
    (FLOWS, "flows"),
    (PACKET_FLOWS, "pktflow"),
    (CLOSED, "closed"),
    (COUNTERS, "counter"),
    (POLICIES, "policy"),
    (EXCLUDED_CIDRS, "cidrs"),
    (STEERING, "steer"),
    (DIRECT, "direct"),
    (DIRECT_SLOTS, "slots"),
    (ENDPOINTS, "endpts"),
    (ADMITTED, "admit"),
    (HELD, "held"),
    (POD_ADMITTED, "pod_adm"),
    (PROBE_PORTS, "prbport"),
    (PROBES, "probes"),
    (POD_PROBES, "pod_prb"),
    (POD_ORIGINAL_DST, "pod_dst"),
    (POD_CLIENTS, "pod_cli"),
    (POD_FLOWS, "pod_flw"),
    (POD_PACKET_FLOWS, "pod_pkt"),
    (LISTENERS, "listen"),
    (INNER_LINKS, "inner"),
    (POD_GUESTS, "guests"),
];

/// Pods of one node. Kubernetes stops at 110 by default, large nodes at 1000.
pub const PODS_CAPACITY: usize = 4096;
/// Captured connections a pod may have open at once.
pub const ORIGINAL_DST_CAPACITY: usize = 65_536;
/// Connections of the agent to a pod's apps at once.
pub const CLIENTS_CAPACITY: usize = 65_536;
/// Flows of a pod in the table: open ones, and ended ones for half a minute.
pub const FLOWS_CAPACITY: usize = 32_768;
/// Packet flows of a pod in the table.
pub const PACKET_FLOWS_CAPACITY: usize = 16_384;
/// Inner interfaces of a pod.
pub const INNER_LINKS_CAPACITY: usize = 256;
/// Connections of a pod's guests that have no socket yet; the oldest gives way.
pub const GUESTS_CAPACITY: usize = 1024;
/// Ranges of ports that a pod may exclude, for each direction.
pub const EXCLUDED_PORTS_CAPACITY: usize = 64;
/// Subnets that a pod may exclude, for each direction.
pub const EXCLUDED_CIDRS_OF_A_POD: usize = 256;
/// Subnets that all pods of a node may exclude. An entry takes memory when it comes to be.
pub const EXCLUDED_CIDRS_CAPACITY: usize = 131_072;
/// Services reached directly, each once for every pod that may. What does not fit is reached through the agent.
pub const DIRECT_CAPACITY: usize = 65_536;
/// Places for the endpoints of those services.
pub const DIRECT_SLOTS_CAPACITY: usize = 65_536;
/// Endpoints of those services.
pub const ENDPOINTS_CAPACITY: usize = 32_768;
/// Direct connections to a pod at once.
pub const ADMITTED_CAPACITY: usize = 65_536;
/// Pairs of pods with direct connections. What does not fit is not counted.
pub const HELD_CAPACITY: usize = 65_536;
/// Ports that a pod may declare for probes; those beyond have no privilege.
pub const PROBE_PORTS_OF_A_POD: usize = 64;
/// Ports that the pods of a node may declare for probes, each once for every address of its pod.
pub const PROBE_PORTS_CAPACITY: usize = 32_768;
/// Connections of the kubelet to the declared ports of a pod at once.
pub const PROBES_CAPACITY: usize = 1024;
/// Bytes of the ring buffer of ended flows: about 7700 flows, so 77,000 a second at ten reads a second.
pub const CLOSED_BYTES: usize = 1 << 20;

/// `BPF_F_NO_PREALLOC`: an entry takes memory when it comes to be, so an idle pod costs only empty buckets.
pub const NO_PREALLOC: usize = 1;
/// `BPF_F_NO_PREALLOC | BPF_F_CLONE`: what an agent's listener carries is handed to each socket it accepts.
pub const STORAGE_FLAGS: usize = 1 | 512;

/// Least time between two refreshes of a live flow's record, nanoseconds.
pub const REFRESH_NS: u64 = 250_000_000;
/// After [`POD_ORIGINAL_DST`] was found full, how long connections of the pod to itself are refused: one of them may
/// be a captured connection that has no entry. The same for [`POD_CLIENTS`] and connections from loopback to the pod's
/// address. Nanoseconds.
pub const FULL_NS: u64 = 1_000_000_000;

/// The mark of packets of a pod's guests that are the agent's, between the interface they come in by and their route.
/// It means something on that interface alone, and nothing on any wire.
pub const GUEST_MARK: u32 = 0x6d65_7368;

/// The agent's ports inside a pod's network namespace.
pub mod port {
    /// Outbound capture.
    pub const OUTBOUND: u16 = 15001;
    /// Inbound plaintext capture.
    pub const INBOUND: u16 = 15006;
    /// Mesh mTLS.
    pub const MESH: u16 = 15008;
    /// All of them: never a destination.
    pub const ALL: [u16; 3] = [OUTBOUND, INBOUND, MESH];
}

/// Index into [`LISTENERS`].
pub mod listener {
    /// Listener of [`super::port::OUTBOUND`].
    pub const OUTBOUND: u32 = 0;
    /// Listener of [`super::port::INBOUND`].
    pub const INBOUND: u32 = 1;
    /// Listener of [`super::port::MESH`].
    pub const MESH: u32 = 2;
    /// How many there are.
    pub const COUNT: usize = 3;
}

/// Index into [`COUNTERS`].
pub mod counter {
    /// Captured connections that found their pod's [`super::POD_ORIGINAL_DST`] full.
    pub const ORIGINAL_DST_FULL: u32 = 0;
    /// Connections to apps that found their pod's [`super::POD_CLIENTS`] full.
    pub const CLIENTS_FULL: u32 = 1;
    /// Flows not recorded: the pod's table was full.
    pub const FLOWS_FULL: u32 = 2;
    /// Ended flows not reported: the ring buffer was full.
    pub const CLOSED_FULL: u32 = 3;
    /// Connections refused because there was no memory to keep what they dialled.
    pub const NO_STORAGE: u32 = 4;
    /// Packets dropped because a pod whose egress is restricted sent them around the agent.
    pub const LEAKED: u32 = 5;
    /// Direct connections that found the [`super::POD_ADMITTED`] of their server's pod full.
    pub const ADMITTED_FULL: u32 = 6;
    /// Connections of the kubelet's that found the [`super::POD_PROBES`] of their pod full.
    pub const PROBES_FULL: u32 = 7;
    /// Packets dropped because they carry bytes to a port where only bare connections are declared as probes.
    pub const PROBE_BYTES: u32 = 8;
    /// How many there are.
    pub const COUNT: usize = 9;
}

/// Addresses of an enrolled pod.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PodAddrs {
    /// IPv4 address; meaningful when `has_v4` is not 0.
    pub v4: [u8; 4],
    /// IPv6 address; meaningful when `has_v6` is not 0.
    pub v6: [u8; 16],
    /// 1 when the pod has an IPv4 address.
    pub has_v4: u8,
    /// 1 when the pod has an IPv6 address.
    pub has_v6: u8,
    /// 1 once the kernel has seen that the pod's source ports may be low ([`crate::decide::is_low_source`]).
    pub low_ports: u8,
    /// Bits of [`policy`]: what the pod's [`PodPolicy`] is to be looked at for.
    pub flags: u8,
}

const _: () = assert!(size_of::<PodAddrs>() == 24);

/// Bits of [`PodAddrs::flags`] and [`PodPolicy::flags`].
pub mod policy {
    /// Some ports are excluded from outbound capture.
    pub const OUTBOUND_PORTS: u8 = 1;
    /// Some subnets are excluded from outbound capture.
    pub const OUTBOUND_CIDRS: u8 = 2;
    /// Some ports are excluded from inbound capture.
    pub const INBOUND_PORTS: u8 = 4;
    /// Some subnets are excluded from inbound capture.
    pub const INBOUND_CIDRS: u8 = 8;
    /// When the agent is gone connections pass, instead of being refused.
    pub const OPEN: u8 = 16;
    /// Anything excluded from outbound capture.
    pub const OUTBOUND: u8 = OUTBOUND_PORTS | OUTBOUND_CIDRS;
    /// Anything excluded from inbound capture.
    pub const INBOUND: u8 = INBOUND_PORTS | INBOUND_CIDRS;
}

/// Ports, both ends included.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PortRange {
    /// The lowest.
    pub first: u16,
    /// The highest.
    pub last: u16,
}

/// Some ranges of ports.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ports {
    /// How many ranges there are.
    pub count: u32,
    /// The ranges; those after `count` mean nothing.
    pub ranges: [PortRange; EXCLUDED_PORTS_CAPACITY],
}

impl Default for Ports {
    fn default() -> Self {
        Self { count: 0, ranges: [PortRange::default(); EXCLUDED_PORTS_CAPACITY] }
    }
}

/// What a pod asks of its capture. A pod that asks for nothing has no entry.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PodPolicy {
    /// Bits of [`policy`].
    pub flags: u8,
    /// Always zero.
    pub pad: [u8; 3],
    /// Ports that the pod's apps dial past the agent.
    pub outbound: Ports,
    /// Ports of the pod that are reached past the agent.
    pub inbound: Ports,
}

const _: () = assert!(size_of::<PodPolicy>() == 4 + 2 * (4 + 4 * EXCLUDED_PORTS_CAPACITY));

/// Key of [`EXCLUDED_CIDRS`] in the kernel: the number of leading bits that count, and those bits.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CidrKey {
    /// Bits that count of what follows.
    pub prefix_len: u32,
    /// What follows.
    pub of: CidrOf,
}

/// An address or subnet that a pod excludes.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct CidrOf {
    /// A value of [`crate::flow::direction`].
    pub direction: u8,
    /// [`CidrOf::V4`] or [`CidrOf::V6`]: `::/0` is not to hold IPv4 in its mapped form.
    pub family: u8,
    /// Always zero.
    pub pad: [u8; 2],
    /// Network namespace cookie of the pod, in native order. (Bytes: a trie's key has four bytes before it.)
    pub netns: [u8; 8],
    /// The address, IPv4 as `::ffff:a.b.c.d`.
    pub ip: [u8; 16],
}

impl CidrOf {
    /// Bits before those of the address.
    pub const BITS_BEFORE_IP: u32 = 96;
    /// IPv4.
    pub const V4: u8 = 4;
    /// IPv6.
    pub const V6: u8 = 6;
}

const _: () = assert!(size_of::<CidrOf>() == 28 && size_of::<CidrKey>() == 32);

/// A connection by its two ends, seen from who dialled.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Tuple {
    /// Who dialled.
    pub src: Addr,
    /// What was dialled.
    pub dst: Addr,
}

const _: () = assert!(size_of::<Tuple>() == 40);

/// What is known of a connection between the agent and an app of the pod.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Entry {
    /// The app's socket (its cookie), whose flow this is; 0 while there is none.
    pub socket: u64,
    /// In the entry with the all-zero key only: when the table was last found full (`CLOCK_MONOTONIC`, ns).
    pub full_ns: u64,
    /// The address the app dialled ([`POD_ORIGINAL_DST`]) or the app's real client ([`POD_CLIENTS`]).
    pub addr: Addr,
    /// Number of the endpoint that the kernel has chosen for the connection; 0 leaves that to the agent.
    pub endpoint: u32,
}

const _: () = assert!(size_of::<Entry>() == 40);

/// A packet flow from the pod's point of view.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct PacketKey {
    /// The pod's side.
    pub local: Addr,
    /// The other side.
    pub remote: Addr,
    /// IP protocol number.
    pub protocol: u8,
    /// Always zero.
    pub pad: [u8; 3],
}

const _: () = assert!(size_of::<PacketKey>() == 44);

/// What the mesh knows of one socket. From outside the kernel only the agent can write it, and only by holding the
/// socket: that is what makes the agent's own sockets exempt from capture.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SocketFacts {
    /// When the flow began (`CLOCK_MONOTONIC`, ns). Of a kubelet's socket whose connection is listed: the network namespace
    /// cookie of the pod that it is listed for.
    pub start_ns: u64,
    /// When the flow's record was last written.
    pub written_ns: u64,
    /// By [`kind`]: what a captured socket dialled, the client an agent's dialling socket stands for, the
    /// destination an accepted one was meant for, the real client of an app's.
    pub addr: Addr,
    /// Sequence number after the peer's FIN, when [`crate::decide::seen::FIN_COMING`] is set.
    pub fin_end: u32,
    /// A [`kind`] value.
    pub kind: u8,
    /// What was seen of the connection: bits of [`crate::decide::seen`].
    pub seen: u8,
    /// A [`crate::flow::verdict`] value.
    pub verdict: u8,
    /// Last TCP state.
    pub tcp_state: u8,
    /// Number of the endpoint that was chosen for the connection, at both its ends; 0 where the kernel chose none.
    pub endpoint: u32,
}

const _: () = assert!(size_of::<SocketFacts>() == 48);

/// Values of [`SocketFacts::kind`].
pub mod kind {
    /// Nothing is known.
    pub const NONE: u8 = 0;
    /// An app's socket whose connection was captured.
    pub const CLIENT: u8 = 1;
    /// An app's socket whose connection was left alone.
    pub const PASSING: u8 = 2;
    /// The agent's own dialling socket.
    pub const DIALLER: u8 = 3;
    /// The agent's listener of outbound connections, and what it has just accepted.
    pub const OUTBOUND_LISTENER: u8 = 4;
    /// Another listener of the agent, and what it has accepted.
    pub const LISTENER: u8 = 5;
    /// A captured connection, at the agent.
    pub const ACCEPTED: u8 = 6;
    /// A connection accepted by an app.
    pub const APP: u8 = 7;
    /// An app's socket whose connection the pod has excluded from capture.
    pub const EXCLUDED: u8 = 8;
    /// A socket of the kubelet's.
    pub const KUBELET: u8 = 9;
    /// The same, connected to a port where only bare connections are declared as probes.
    pub const BARE_PROBE: u8 = 10;
    /// A connection of the kubelet's to a port with declared requests, at the agent.
    pub const PROBE: u8 = 11;
}

#[cfg(feature = "user")]
mod user {
    #![expect(unsafe_code, reason = "aya copies keys and values as bytes only for types marked so")]

    use super::{Addr, CidrOf, Entry, PacketKey, PodAddrs, PodPolicy, SocketFacts, Tuple};

    // SAFETY (all eight): `repr(C)`, all fields are integers or arrays of them, and there is no padding: each size is
    // asserted beside its type to be the sum of its fields.
    unsafe impl aya::Pod for PodAddrs {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Addr {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Tuple {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Entry {}
    // SAFETY: as above.
    unsafe impl aya::Pod for PacketKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for SocketFacts {}
    // SAFETY: as above.
    unsafe impl aya::Pod for PodPolicy {}
    // SAFETY: as above.
    unsafe impl aya::Pod for CidrOf {}
}
