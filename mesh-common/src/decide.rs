//! Pure capture decisions: the same code in the kernel and in host tests.
//!
//! Each function takes what a hook has read and says what the hook is to do. Tested by the unit tests below and, in
//! the kernel, by the lab's capture tests.

pub mod direct;

use crate::{
    addr::Addr,
    maps::{EXCLUDED_PORTS_CAPACITY, FULL_NS, PodAddrs, Ports, kind, listener, policy, port},
};

/// IP protocol number of TCP.
pub const IPPROTO_TCP: u32 = 6;

/// Lowest of the source ports the kernel chooses from, unless `net.ipv4.ip_local_port_range` says otherwise.
pub const SOURCE_PORT_MIN: u16 = 32_768;

/// The ports of the pod that captured connections are sent to. Source and destination address are the same, so a
/// destination port that equals the source port would have TCP connect a socket to itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HashPorts {
    /// The lowest.
    pub first: u16,
    /// How many there are.
    pub count: u16,
}

/// As many as there are below the usual range of source ports: 1024..=32767.
pub const HASH_PORTS: HashPorts = HashPorts { first: 1024, count: SOURCE_PORT_MIN - 1024 };
/// For a pod whose source ports may be lower: 1..=1023, which the kernel chooses for nobody by itself.
pub const LOW_HASH_PORTS: HashPorts = HashPorts { first: 1, count: 1023 };

/// The port that connections to this destination are sent to. One port per destination rather than one for all: a
/// pod keeps as many source ports for each destination as it has without the mesh.
#[inline(always)]
pub const fn hash_port(dst: &Addr, ports: HashPorts) -> u16 {
    let (a, b) = dst.words();
    // Multiplications by odd constants (those of the xxHash family) with the high half folded in.
    let mut hash = a.wrapping_mul(0x9e37_79b1_85eb_ca87) ^ b.wrapping_mul(0xc2b2_ae3d_27d4_eb4f);
    hash ^= (dst.port as u64).wrapping_mul(0x1656_67b1_9e37_79f9);
    hash ^= hash >> 32;
    hash = hash.wrapping_mul(0x85eb_ca77_c2b2_ae63);
    hash ^= hash >> 29;
    ports.first + ((hash as u32) % ports.count as u32) as u16
}

/// Where a connection that an app of this pod is opening goes: `Some` is the address inside the pod to which it is
/// sent instead, `None` leaves it alone. `bound` is what the app has bound its socket to: the connection is sent to
/// that very address, so that it comes from where it goes to, as every captured one does.
///
/// Left alone: what is not TCP, loopback (bound to it or dialled), the unspecified address (which means loopback), the
/// pod's own address, multicast and broadcast, IPv6 link-local (its scope would be lost), and a family the pod has no
/// address of.
#[inline(always)]
pub const fn outbound(pod: &PodAddrs, protocol: u32, bound: &Addr, dst: &Addr) -> Option<Addr> {
    if protocol != IPPROTO_TCP || dst.is_loopback() || dst.is_unspecified() || bound.is_loopback() {
        return None;
    }
    let pods = if let Some([first, ..]) = dst.as_v4() {
        if pod.has_v4 == 0 || first >= 224 {
            return None;
        }
        Addr::v4(pod.v4, 0)
    } else {
        let link_local = dst.ip[0] == 0xfe && (dst.ip[1] & 0xc0) == 0x80;
        if pod.has_v6 == 0 || dst.ip[0] == 0xff || link_local {
            return None;
        }
        Addr::v6(pod.v6, 0)
    };
    let own = if bound.is_unspecified() { pods } else { *bound };
    if dst.same_ip(&pods) || dst.same_ip(&own) {
        return None;
    }
    let ports = if pod.low_ports == 0 { HASH_PORTS } else { LOW_HASH_PORTS };
    let mut port = hash_port(dst, ports);
    if port == bound.port {
        port = if port == ports.first { port + 1 } else { port - 1 };
    }
    Some(Addr { port, ..own })
}

/// Whether a captured connection from this port says that the kernel chooses the pod's source ports from a wider
/// range than usual, which [`HASH_PORTS`] may be part of. (It may also be that the app has bound it.)
#[inline(always)]
pub const fn is_low_source(src: &Addr) -> bool {
    src.port < SOURCE_PORT_MIN
}

/// Who gets a connection that arrives at the pod.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Inbound {
    /// Whoever listens: the app, or the agent when its port was dialled from inside the pod.
    Pass,
    /// The agent's listener with this index.
    Listener(u32),
    /// Nobody.
    Refuse,
}

/// Whether a connection comes from inside the pod: from the address it goes to, or from loopback. The kernel lets
/// neither in from outside.
#[inline(always)]
pub const fn is_own(local: &Addr, remote: &Addr) -> bool {
    remote.same_ip(local) || remote.is_loopback()
}

/// Who gets a connection to `local` that has no socket yet and comes from inside the pod ([`is_own`]). `captured`:
/// there is an entry of the original destination; `full`: there may be one missing, because the table was full a moment
/// ago.
#[inline(always)]
pub const fn own(captured: bool, full: bool) -> Inbound {
    match (captured, full) {
        (true, _) => Inbound::Listener(listener::OUTBOUND),
        (false, true) => Inbound::Refuse,
        (false, false) => Inbound::Pass,
    }
}

/// Who gets a connection to `local` that has no socket yet and comes from elsewhere. `captured`: it is one of the pod's own
/// all the same, from another address of its. `passes`: it is a direct connection that the kernel has listed, or the pod
/// excludes its port or where it comes from. The mesh's own port is never excluded: others send what they have there,
/// encrypted.
#[inline(always)]
pub const fn inbound(local: &Addr, captured: bool, passes: bool) -> Inbound {
    match (local.port, captured, passes) {
        (_, true, _) => Inbound::Listener(listener::OUTBOUND),
        (port::MESH, ..) => Inbound::Listener(listener::MESH),
        (_, _, true) => Inbound::Pass,
        (_, _, false) => Inbound::Listener(listener::INBOUND),
    }
}

/// Who gets a connection that comes in by an inner interface of the pod. `guest`: it was on its way out of the pod; else it
/// was for the pod itself, which is nobody else's affair.
#[inline(always)]
pub const fn from_inner(guest: bool) -> Inbound {
    if guest { Inbound::Listener(listener::OUTBOUND) } else { Inbound::Pass }
}

/// Whether a connection that the agent's outbound listener has accepted is one of the pod's guests, which dialled `local`
/// itself. A captured connection goes to an address of the pod's or comes from where it goes to; and what was not
/// steered has dialled the listener's own port.
#[inline(always)]
pub const fn is_guests(pod: &PodAddrs, local: &Addr, remote: &Addr) -> bool {
    let pods = local.same_ip(&Addr::v4(pod.v4, 0)) || local.same_ip(&Addr::v6(pod.v6, 0));
    local.port != port::OUTBOUND && !pods && !is_own(local, remote)
}

/// Who gets a connection whose listener of the agent's is gone, in a pod with these bits of [`policy`]: the app, where
/// the pod wants that of plaintext. Never what was captured from inside: it goes to a port that is not the one dialled.
#[inline(always)]
pub const fn without_agent(index: u32, flags: u8) -> Inbound {
    if flags & policy::OPEN != 0 && index == listener::INBOUND { Inbound::Pass } else { Inbound::Refuse }
}

/// Whether a TCP segment may leave a pod whose egress is restricted. `socket`: the state of the socket in the pod that has
/// exactly these ends, and what is known of it ([`kind`]); `bare`: the segment has no payload; `tcp_flags`: of its
/// header; `flags`: the pod's bits of [`policy`].
///
/// Every socket of an enrolled pod is either the agent's, has accepted, is excluded, or was left alone by the hooks; the last
/// alone has no business outside. What has no socket, or half of one, which a forged SYN is enough for, may only refuse or answer (a reset; a SYN-ACK, which under SYN
/// cookies has none yet).
#[inline(always)]
pub const fn may_leave(socket: Option<(u8, u8)>, tcp_flags: u8, bare: bool, flags: u8) -> bool {
    const SYN: u8 = 2;
    const RST: u8 = 4;
    const ACK: u8 = 16;
    match socket {
        None | Some((tcp::LISTEN | tcp::NEW_SYN_RECV, _)) => {
            bare && (tcp_flags & RST != 0 || tcp_flags & (SYN | ACK) == SYN | ACK)
        }
        // It only acknowledges.
        Some((tcp::TIME_WAIT, _)) => bare,
        // While there is no agent such a pod's connections pass, and then stay.
        Some((_, kind::PASSING)) => flags & policy::OPEN != 0,
        Some(_) => true,
    }
}

/// Whether the port is in one of these ranges.
#[inline(always)]
pub const fn holds(ports: &Ports, port: u16) -> bool {
    let mut i = 0;
    while i < EXCLUDED_PORTS_CAPACITY {
        if i as u32 >= ports.count {
            return false;
        }
        let range = &ports.ranges[i];
        if range.first <= port && port <= range.last {
            return true;
        }
        i += 1;
    }
    false
}

/// Whether a table last found full at `full_ns` counts as full now.
#[inline(always)]
pub const fn recently_full(full_ns: u64, now_ns: u64) -> bool {
    full_ns != 0 && now_ns.saturating_sub(full_ns) < FULL_NS
}

/// TCP states, as in the kernel's `include/net/tcp_states.h`.
pub mod tcp {
    /// Data flows.
    pub const ESTABLISHED: u8 = 1;
    /// SYN sent.
    pub const SYN_SENT: u8 = 2;
    /// Our FIN is on its way.
    pub const FIN_WAIT1: u8 = 4;
    /// Our FIN was acknowledged.
    pub const FIN_WAIT2: u8 = 5;
    /// Closed; late segments are still answered.
    pub const TIME_WAIT: u8 = 6;
    /// The end.
    pub const CLOSE: u8 = 7;
    /// The peer's FIN came.
    pub const CLOSE_WAIT: u8 = 8;
    /// The peer's FIN came first, ours is on its way.
    pub const LAST_ACK: u8 = 9;
    /// A listener.
    pub const LISTEN: u8 = 10;
    /// Both FINs crossed.
    pub const CLOSING: u8 = 11;
    /// A SYN came, and its SYN-ACK is not acknowledged yet.
    pub const NEW_SYN_RECV: u8 = 12;
}

/// Bits of [`crate::maps::SocketFacts::seen`].
pub mod seen {
    /// The socket dialled: its SYN is among the bytes acknowledged.
    pub const ACTIVE: u8 = 1;
    /// The connection was established.
    pub const ESTABLISHED: u8 = 2;
    /// Our FIN is queued or sent.
    pub const FIN_SENT: u8 = 4;
    /// Our FIN was acknowledged.
    pub const FIN_ACKED: u8 = 8;
    /// The peer's FIN is among the bytes received.
    pub const FIN_RECEIVED: u8 = 16;
    /// A segment with the peer's FIN arrived; it counts once everything before it has.
    pub const FIN_COMING: u8 = 32;
    /// Its endpoint counts it among what is open.
    pub const COUNTED: u8 = 64;
}

/// What is known of a connection after it goes to the TCP state `new`.
#[inline(always)]
pub const fn on_state(mut bits: u8, old: u8, new: u8, all_acked: bool) -> u8 {
    match new {
        tcp::ESTABLISHED => bits |= seen::ESTABLISHED,
        tcp::FIN_WAIT1 => bits |= seen::FIN_SENT,
        tcp::FIN_WAIT2 => bits |= seen::FIN_ACKED,
        tcp::CLOSE_WAIT | tcp::CLOSING => bits |= seen::FIN_RECEIVED,
        tcp::LAST_ACK => bits |= seen::FIN_SENT | seen::FIN_RECEIVED,
        // From these two the acknowledgement of our FIN leads straight to the end; so do a reset and a timeout.
        tcp::CLOSE if all_acked && matches!(old, tcp::LAST_ACK | tcp::CLOSING) => bits |= seen::FIN_ACKED,
        _ => {}
    }
    bits
}

/// Payload bytes (sent, received) from the kernel's counters, in which a SYN and a FIN count one each.
#[inline(always)]
pub const fn payload(
    bits: u8,
    bytes_acked: u64,
    bytes_received: u64,
    fin_end: u32,
    rcv_nxt: u32,
) -> (u64, u64) {
    // A socket that dialled has its SYN acknowledged once it is established; an accepted one starts after its SYN.
    let syn = (bits & seen::ACTIVE != 0 && bits & seen::ESTABLISHED != 0) as u64;
    let fin_out = (bits & seen::FIN_ACKED != 0) as u64;
    let fin_in = bits & seen::FIN_RECEIVED != 0 || (bits & seen::FIN_COMING != 0 && fin_end == rcv_nxt);
    (bytes_acked.saturating_sub(syn + fin_out), bytes_received.saturating_sub(fin_in as u64))
}

#[cfg(test)]
mod tests;
