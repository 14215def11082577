//! TCX on the node's end of a pod's veth, where the pod's egress is restricted: TCP that leaves around the agent is dropped and
//! counted. Here and not inside the pod: a packet socket with `PACKET_QDISC_BYPASS` passes every hook of the pod's own end.
//!
//! What leaves has to belong to a socket of the pod's that the other hooks know (`decide::may_leave`), or to what the pod
//! excludes from capture. Everything else but TCP is left alone. Never redirects or changes a packet: what is not dropped is
//! for the next program to decide. Tested in the lab (`tests/tests/leaks.rs`).

use aya_ebpf::{macros::classifier, programs::TcContext};
use mesh_common::{
    decide,
    flow::{direction, verdict},
    maps::{PacketKey, Tuple, counter},
};

use crate::{
    maps::{NETNS_COOKIE, NETNS_NUMBER, POD_PACKET_FLOWS, PODS, count, excludes_outbound},
    tc::{self, IPV6_HEADER, Packet, TCP, TCX_NEXT},
};

const TCX_DROP: i32 = 2;
/// In a TCP header: the byte with its length, the byte with the flags.
const LENGTH: u32 = 12;
/// Extension headers of IPv6 that may stand before TCP.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const OPTIONS: u8 = 60;
/// More of them than these nobody has a reason to send.
const MOST_EXTENSIONS: usize = 4;

#[classifier]
pub fn m000000_guard(ctx: TcContext) -> i32 {
    let mut key = PacketKey::default();
    let Some(packet) = tc::read(&ctx, true, &mut key) else { return TCX_NEXT };
    if may_leave(&ctx, &key, &packet) {
        return TCX_NEXT;
    }
    leaked(&key, &packet);
    TCX_DROP
}

// Each of the two a function of its own in the kernel as well: both in one need more than its 512 bytes of stack.

#[inline(never)]
fn leaked(key: &PacketKey, packet: &Packet) {
    count(counter::LEAKED);
    match POD_PACKET_FLOWS.get_ptr_mut(key) {
        // SAFETY: an entry of the map, freed after the programs that hold it have ended; all write the same.
        Some(flow) if unsafe { (*flow).verdict } != verdict::LEAKED => unsafe {
            // Counted already, at the pod's end.
            (*flow).verdict = verdict::LEAKED;
        },
        Some(flow) => tc::add(flow, true, packet),
        None => {
            if let Some(flow) = tc::begin(key, direction::OUTBOUND, verdict::LEAKED) {
                tc::add(flow, true, packet);
            }
        }
    }
}

#[inline(never)]
fn may_leave(ctx: &TcContext, key: &PacketKey, packet: &Packet) -> bool {
    if key.protocol != TCP {
        return !packet.v6 || !is_hidden_tcp(ctx, key.protocol);
    }
    // The kernel speaks IPv4 with a mapped address. A lookup by such ends would find sockets that did not send this.
    if packet.v6 && (key.local.as_v4().is_some() || key.remote.as_v4().is_some()) {
        return false;
    }
    let netns = NETNS_COOKIE.load();
    // SAFETY: an entry is replaced as a whole and freed after the programs that hold it have ended.
    let Some(pod) = (unsafe { PODS.get(&netns) }) else { return true };
    // No port tells whose a later fragment is. The kernel sends TCP whole.
    let header = if packet.first { tc::load::<[u8; 2]>(ctx, packet.header + LENGTH) } else { None };
    let Some([length, flags]) = header else { return false };
    if excludes_outbound(pod.flags, netns, &key.remote) {
        return true;
    }
    let headers = u64::from(packet.header) + u64::from(length >> 4) * 4;
    let bare = packet.packets == 1 && packet.bytes <= headers;
    // The socket sees it from its own side: what it sends to is where it receives from.
    let ends = Tuple { src: key.remote, dst: key.local };
    decide::may_leave(tc::socket(ctx, &ends, NETNS_NUMBER.load()), flags, bare, pod.flags)
}

/// Whether there is TCP behind extension headers, which no socket sends, or may be: there are too many.
#[inline(always)]
fn is_hidden_tcp(ctx: &TcContext, first: u8) -> bool {
    let (mut next, mut at) = (first, IPV6_HEADER);
    for _ in 0..MOST_EXTENSIONS {
        if !matches!(next, HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | OPTIONS) {
            return next == TCP;
        }
        let Some([following, length]) = tc::load::<[u8; 2]>(ctx, at) else { return true };
        at += match next {
            FRAGMENT => 8,
            AUTHENTICATION => (u32::from(length) + 2) * 4,
            _ => (u32::from(length) + 1) * 8,
        };
        next = following;
    }
    true
}
