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
/// alone has no business outside. What has no socket may only refuse or answer (a reset; a SYN-ACK, which under SYN
/// cookies has none yet).
#[inline(always)]
pub const fn may_leave(socket: Option<(u8, u8)>, tcp_flags: u8, bare: bool, flags: u8) -> bool {
    const SYN: u8 = 2;
    const RST: u8 = 4;
    const ACK: u8 = 16;
    match socket {
        None | Some((tcp::LISTEN, _)) => {
            bare && (tcp_flags & RST != 0 || tcp_flags & (SYN | ACK) == SYN | ACK)
        }
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
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::maps::PortRange;

    const POD: PodAddrs =
        PodAddrs { v4: [10, 0, 0, 7], v6: [0xfd; 16], has_v4: 1, has_v6: 1, low_ports: 0, flags: 0 };
    const ANY: Addr = Addr::v4([0; 4], 0);

    fn v6(first: u8, second: u8) -> Addr {
        let mut ip = [1; 16];
        (ip[0], ip[1]) = (first, second);
        Addr::v6(ip, 80)
    }

    #[test]
    fn captured_connections_go_to_the_pods_address_of_their_family() {
        let v4 = outbound(&POD, IPPROTO_TCP, &ANY, &Addr::v4([10, 96, 0, 1], 443));
        assert_eq!(v4.map(|a| a.ip), Some(Addr::v4(POD.v4, 0).ip));
        let other = outbound(&POD, IPPROTO_TCP, &ANY, &v6(0x20, 0x01));
        assert_eq!(other.map(|a| a.ip), Some(POD.v6));
    }

    #[test]
    fn left_alone() {
        let cases = [
            (17, Addr::v4([8, 8, 8, 8], 53), "UDP"),
            (6, Addr::v4([127, 0, 0, 1], 80), "loopback"),
            (6, Addr::v4([0, 0, 0, 0], 80), "unspecified"),
            (6, Addr::v6([0; 16], 80), "unspecified"),
            (6, Addr::v4(POD.v4, 80), "itself"),
            (6, Addr::v6(POD.v6, 80), "itself"),
            (6, Addr::v4([224, 0, 0, 1], 80), "multicast"),
            (6, Addr::v4([255; 4], 80), "broadcast"),
            (6, v6(0xff, 0x02), "multicast"),
            (6, v6(0xfe, 0x80), "link-local"),
            (6, v6(0xfe, 0xbf), "link-local"),
        ];
        for (protocol, dst, why) in cases {
            assert_eq!(outbound(&POD, protocol, &ANY, &dst), None, "{why}");
        }
        assert!(outbound(&POD, 6, &ANY, &v6(0xfe, 0xc0)).is_some());
    }

    #[test]
    fn a_family_the_pod_lacks_is_left_alone() {
        let only_v4 = PodAddrs { has_v6: 0, ..POD };
        assert_eq!(outbound(&only_v4, 6, &ANY, &v6(0x20, 0x01)), None);
        assert!(outbound(&only_v4, 6, &ANY, &Addr::v4([1, 1, 1, 1], 1)).is_some());
        let only_v6 = PodAddrs { has_v4: 0, ..POD };
        assert_eq!(outbound(&only_v6, 6, &ANY, &Addr::v4([1, 1, 1, 1], 1)), None);
    }

    #[test]
    fn hash_ports_stay_below_source_ports_and_spread() {
        let mut ports = HashSet::new();
        for host in 0..=255u8 {
            for port in 8000..8016u16 {
                let hashed = hash_port(&Addr::v4([10, 0, 0, host], port), HASH_PORTS);
                assert!((1024..=32767).contains(&hashed), "{hashed}");
                ports.insert(hashed);
            }
        }
        // 4096 balls into 31,744 bins leave about 3843 bins in use.
        assert!(ports.len() > 3700, "{}", ports.len());
    }

    #[test]
    fn a_connection_comes_from_where_it_goes_to_and_never_to_itself() {
        let dst = Addr::v4([192, 0, 2, 10], 8080);
        let other = Addr::v4([10, 0, 0, 8], 0);
        let to = |pod: &PodAddrs, bound: &Addr| outbound(pod, IPPROTO_TCP, bound, &dst);
        assert_eq!(to(&POD, &other).map(|to| to.ip), Some(other.ip));
        assert_eq!(outbound(&POD, IPPROTO_TCP, &other, &Addr { port: 80, ..other }), None);
        assert_eq!(to(&POD, &Addr::v4([127, 0, 0, 1], 0)), None);
        for low_ports in [0, 1] {
            let pod = PodAddrs { low_ports, ..POD };
            for ip in [ANY, other] {
                let usual = to(&pod, &ip).map_or(0, |to| to.port);
                assert_eq!(usual < 1024, low_ports == 1);
                let moved = to(&pod, &Addr { port: usual, ..ip }).map_or(0, |to| to.port);
                assert!(moved != 0 && moved != usual && (moved < 1024) == (low_ports == 1), "{moved}");
            }
        }
        for port in 1..=2000 {
            let dst = Addr::v4([10, 96, 0, 1], port);
            let low = hash_port(&dst, LOW_HASH_PORTS);
            assert!((1..1024).contains(&low), "{low}");
        }
        assert!(is_low_source(&Addr { port: 32_767, ..other }));
        assert!(!is_low_source(&Addr { port: 32_768, ..other }));
    }

    #[test]
    fn inbound_by_origin_and_port() {
        let local = Addr::v4([10, 0, 0, 7], 8080);
        let mesh = Addr { port: 15008, ..local };
        assert_eq!(inbound(&local, false, false), Inbound::Listener(listener::INBOUND));
        assert_eq!(inbound(&local, false, true), Inbound::Pass);
        assert_eq!(inbound(&mesh, false, false), Inbound::Listener(listener::MESH));
        assert_eq!(inbound(&mesh, false, true), Inbound::Listener(listener::MESH), "never excluded");
        assert_eq!(own(false, false), Inbound::Pass);
        assert_eq!(own(true, true), Inbound::Listener(listener::OUTBOUND));
        assert_eq!(own(false, true), Inbound::Refuse);
        assert_eq!(inbound(&local, true, true), Inbound::Listener(listener::OUTBOUND), "another address");
        assert!(is_own(&local, &Addr { port: 1, ..local }));
        assert!(is_own(&local, &Addr::v4([127, 3, 2, 1], 9)));
        assert!(!is_own(&local, &Addr::v4([10, 0, 0, 8], 8080)));
    }

    #[test]
    fn a_guests_connection_is_told_by_where_it_goes() {
        let (guest, far) = (Addr::v4([172, 17, 0, 2], 40_000), Addr::v4([10, 96, 0, 1], 80));
        assert!(is_guests(&POD, &far, &guest));
        assert!(!is_guests(&POD, &Addr { port: port::OUTBOUND, ..far }, &guest), "the listener itself");
        assert!(
            !is_guests(&POD, &Addr::v4(POD.v4, 5000), &Addr::v4([10, 0, 0, 8], 9)),
            "another of its addresses"
        );
        assert!(!is_guests(&POD, &Addr::v6(POD.v6, 5000), &v6(0xfd, 1)));
        assert!(!is_guests(&POD, &far, &Addr { port: 9, ..far }), "bound to another address");
        assert_eq!(from_inner(true), Inbound::Listener(listener::OUTBOUND));
        assert_eq!(from_inner(false), Inbound::Pass);
    }

    #[test]
    fn without_an_agent_plaintext_alone_passes_and_only_where_the_pod_wants_it() {
        for index in [listener::OUTBOUND, listener::INBOUND, listener::MESH] {
            assert_eq!(without_agent(index, !policy::OPEN), Inbound::Refuse);
        }
        assert_eq!(without_agent(listener::INBOUND, policy::OPEN), Inbound::Pass);
        assert_eq!(without_agent(listener::OUTBOUND, policy::OPEN), Inbound::Refuse);
        assert_eq!(without_agent(listener::MESH, policy::OPEN), Inbound::Refuse);
    }

    #[test]
    fn where_egress_is_restricted_only_known_sockets_speak() {
        const SYN: u8 = 2;
        const RST: u8 = 4;
        const ACK: u8 = 16;
        for nobody in [None, Some((tcp::LISTEN, kind::NONE))] {
            for (flags, bare, leaves) in [
                (SYN, true, false),
                (ACK, true, false),
                (ACK, false, false),
                (RST, true, true),
                (RST | ACK, true, true),
                (RST, false, false),
                (SYN | ACK, true, true),
                (SYN | ACK, false, false),
            ] {
                assert_eq!(may_leave(nobody, flags, bare, policy::OPEN), leaves, "{flags} {bare}");
            }
        }
        for kind in [kind::DIALLER, kind::LISTENER, kind::APP, kind::EXCLUDED, kind::NONE] {
            assert!(may_leave(Some((tcp::ESTABLISHED, kind)), ACK, false, 0));
            assert!(may_leave(Some((tcp::SYN_SENT, kind)), SYN, true, 0));
        }
        assert!(!may_leave(Some((tcp::SYN_SENT, kind::PASSING)), SYN, true, 0));
        assert!(may_leave(Some((tcp::ESTABLISHED, kind::PASSING)), ACK, false, policy::OPEN));
    }

    #[test]
    fn ranges_hold_their_ends_and_nothing_after_the_count() {
        let range = |first, last| PortRange { first, last };
        let mut ports = Ports::default();
        assert!(!holds(&ports, 0), "an empty list has a zero in it");
        ports.ranges[..3].copy_from_slice(&[range(80, 80), range(9000, 9010), range(1, 65535)]);
        ports.count = 2;
        for (port, held) in [(79, false), (80, true), (81, false), (8999, false), (9000, true), (9010, true)]
        {
            assert_eq!(holds(&ports, port), held, "{port}");
        }
        assert!(!holds(&ports, 9011), "beyond the count");
        ports.ranges[EXCLUDED_PORTS_CAPACITY - 1] = range(7, 7);
        ports.count = EXCLUDED_PORTS_CAPACITY as u32;
        assert!(holds(&ports, 7));
    }

    #[test]
    fn full_is_forgotten() {
        assert!(!recently_full(0, 5));
        assert!(recently_full(5, 6));
        assert!(!recently_full(5, 5 + FULL_NS));
    }

    /// Walks a connection through its states; `acked` tells for the last step whether all was acknowledged.
    fn walk(start: u8, states: &[u8], acked: bool) -> u8 {
        let mut bits = start;
        let mut old = tcp::ESTABLISHED;
        for &new in states {
            bits = on_state(bits, old, new, acked);
            old = new;
        }
        bits
    }

    #[test]
    fn payload_is_exact_in_every_closing_order() {
        let active = seen::ACTIVE | seen::ESTABLISHED;
        // We close first, the peer's FIN never reaches the socket (it is in time-wait by then).
        let bits = walk(active, &[tcp::FIN_WAIT1, tcp::FIN_WAIT2, tcp::CLOSE], true);
        assert_eq!(payload(bits, 102, 50, 0, 0), (100, 50));
        // We shut down, the peer's FIN arrives.
        assert_eq!(payload(bits | seen::FIN_COMING, 102, 51, 9, 9), (100, 50));
        // The same, but what came before that FIN is missing and the connection ends.
        assert_eq!(payload(bits | seen::FIN_COMING, 102, 50, 9, 8), (100, 50));
        // The peer closes first.
        let bits = walk(seen::ESTABLISHED, &[tcp::CLOSE_WAIT, tcp::LAST_ACK, tcp::CLOSE], true);
        assert_eq!(payload(bits, 51, 101, 0, 0), (50, 100));
        // Reset before our FIN was acknowledged.
        let bits = walk(seen::ESTABLISHED, &[tcp::CLOSE_WAIT, tcp::LAST_ACK, tcp::CLOSE], false);
        assert_eq!(payload(bits, 50, 101, 0, 0), (50, 100));
        // Both at once.
        let bits = walk(active, &[tcp::FIN_WAIT1, tcp::CLOSING, tcp::CLOSE], true);
        assert_eq!(payload(bits, 102, 51, 0, 0), (100, 50));
        // Reset while data flows.
        assert_eq!(payload(walk(active, &[tcp::CLOSE], true), 101, 50, 0, 0), (100, 50));
        // Never established.
        assert_eq!(payload(seen::ACTIVE, 0, 0, 0, 0), (0, 0));
    }
}
