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
    assert!(may_leave(Some((tcp::TIME_WAIT, kind::NONE)), ACK, true, 0));
    assert!(!may_leave(Some((tcp::TIME_WAIT, kind::NONE)), ACK, false, 0));
    for nobody in [None, Some((tcp::LISTEN, kind::NONE)), Some((tcp::NEW_SYN_RECV, kind::NONE))] {
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
    for (port, held) in [(79, false), (80, true), (81, false), (8999, false), (9000, true), (9010, true)] {
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
