//! TCX on the inner interfaces of a pod: TCP of nested containers and virtual machines, which have no socket in the pod.
//! A connection that is on its way out of the pod is marked before the pod's own NAT sees it; the route for marked packets
//! makes it the pod's, and `inbound.rs` gives it to the agent's listener.
//!
//! Whether it is the agent's is decided with its SYN; what follows goes where its socket is. What stays inside the pod, and
//! what the pod excludes, is left alone. Never drops, redirects or changes a packet. Tested in the lab
//! (`tests/tests/traffic_without_sockets.rs`).

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup,
    },
    helpers::generated::{bpf_fib_lookup as fib_lookup, bpf_ktime_get_ns},
    macros::classifier,
    programs::TcContext,
};
use core::{mem::zeroed, ptr::read_volatile};
use mesh_common::{
    addr::Addr,
    decide::{self, tcp},
    flow::{direction, verdict},
    maps::{GUEST_MARK, PacketKey, Tuple, policy},
};

use crate::{
    maps::{
        INNER_LINKS, LISTENERS, NETNS_COOKIE, POD_GUESTS, POD_PACKET_FLOWS, PODS, excludes_outbound,
        listener_is_gone, split,
    },
    tc::{self, TCP, TCX_NEXT},
};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// `BPF_FIB_LOOKUP_SKIP_NEIGH` (Linux 6.3): where it goes, whether or not the neighbour is known yet.
const SKIP_NEIGH: u32 = 4;
/// The byte of a TCP header with the flags, and two of them.
const FLAGS: u32 = 13;
const SYN: u8 = 2;
const ACK: u8 = 16;

/// Arriving at an inner interface: sent by a guest.
#[classifier]
pub fn m000000_gst_in(ctx: TcContext) -> i32 {
    let _ = sent(&ctx);
    TCX_NEXT
}

/// Leaving by an inner interface: counted where it belongs to what was captured. `tc.rs` does not count what has a socket,
/// and the agent's is no flow.
#[classifier]
pub fn m000000_gst_out(ctx: TcContext) -> i32 {
    let _ = received(&ctx);
    TCX_NEXT
}

#[inline(always)]
fn sent(ctx: &TcContext) -> Option<()> {
    let mut key = PacketKey::default();
    let packet = tc::read(ctx, true, &mut key)?;
    if key.protocol != TCP || !packet.first {
        return None;
    }
    let [flags] = tc::load::<[u8; 1]>(ctx, packet.header + FLAGS)?;
    let tuple = Tuple { src: key.local, dst: key.remote };
    if !is_agents(ctx, &tuple, flags) {
        return None;
    }
    ctx.set_mark(GUEST_MARK);
    let flow = match POD_PACKET_FLOWS.get_ptr_mut(&key) {
        Some(flow) => flow,
        // A connection with a socket may also be one between the guest and the pod itself.
        // SAFETY: only whether there is an entry counts.
        None if unsafe { POD_GUESTS.get(&tuple) }.is_some() => {
            tc::begin(&key, direction::OUTBOUND, verdict::CAPTURED)?
        }
        None => return None,
    };
    tc::add(flow, true, &packet);
    Some(())
}

#[inline(always)]
fn received(ctx: &TcContext) -> Option<()> {
    // SAFETY: a context field.
    let sk = unsafe { read_volatile(&raw const (*ctx.skb.skb).__bindgen_anon_2.sk) };
    if sk.is_null() {
        return None;
    }
    let mut key = PacketKey::default();
    let packet = tc::read(ctx, false, &mut key)?;
    if key.protocol == TCP {
        tc::add(POD_PACKET_FLOWS.get_ptr_mut(&key)?, false, &packet);
    }
    Some(())
}

/// Whether the packet is one of a connection with the agent.
#[inline(always)]
fn is_agents(ctx: &TcContext, tuple: &Tuple, flags: u8) -> bool {
    let opens = flags & (SYN | ACK) == SYN;
    match tc::socket(ctx, tuple, tc::THIS_NETNS).map(|(state, _)| state) {
        // A new connection may have the ends of one that is over: it is decided anew.
        Some(tcp::TIME_WAIT) if opens => {}
        None | Some(tcp::LISTEN) => {}
        Some(_) => return true,
    }
    if !opens {
        // Its SYN was answered with a cookie: there is no socket yet.
        // SAFETY: only whether there is an entry counts.
        return unsafe { POD_GUESTS.get(tuple) }.is_some();
    }
    if is_captured(&tuple.dst) && leaves_the_pod(ctx, tuple) {
        // SAFETY: the helper takes nothing.
        let now = unsafe { bpf_ktime_get_ns() };
        return POD_GUESTS.insert(tuple, &now, 0).is_ok();
    }
    let _ = POD_GUESTS.remove(tuple);
    false
}

/// Whether the pod has its connections to this address captured, as those of its sockets are.
#[inline(always)]
fn is_captured(dst: &Addr) -> bool {
    let netns = NETNS_COOKIE.load();
    // SAFETY: an entry is replaced as a whole and freed after the programs that hold it have ended.
    let Some(pod) = (unsafe { PODS.get(&netns) }) else { return false };
    decide::outbound(pod, decide::IPPROTO_TCP, &Addr::default(), dst).is_some()
        && (pod.flags == 0
            || !(excludes_outbound(pod.flags, netns, dst)
                || (pod.flags & policy::OPEN != 0 && listener_is_gone(&LISTENERS))))
}

/// Whether the pod routes this out of itself: not to an address of its own, nor to another of its guests.
#[inline(always)]
fn leaves_the_pod(ctx: &TcContext, tuple: &Tuple) -> bool {
    // SAFETY: integers alone.
    let mut params: bpf_fib_lookup = unsafe { zeroed() };
    params.l4_protocol = TCP;
    (params.sport, params.dport) = (tuple.src.port.to_be(), tuple.dst.port.to_be());
    // SAFETY: a context field.
    params.ifindex = unsafe { read_volatile(&raw const (*ctx.skb.skb).ifindex) };
    if let (Some(src), Some(dst)) = (tuple.src.as_v4(), tuple.dst.as_v4()) {
        params.family = AF_INET;
        params.__bindgen_anon_3.ipv4_src = u32::from_ne_bytes(src);
        params.__bindgen_anon_4.ipv4_dst = u32::from_ne_bytes(dst);
    } else {
        params.family = AF_INET6;
        params.__bindgen_anon_3.ipv6_src = split(tuple.src.ip);
        params.__bindgen_anon_4.ipv6_dst = split(tuple.dst.ip);
    }
    // SAFETY: the helper reads and writes `params`, whose size it is given.
    let found =
        unsafe { fib_lookup(ctx.as_ptr(), &raw mut params, size_of::<bpf_fib_lookup>() as i32, SKIP_NEIGH) };
    let forwarded = [BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_FRAG_NEEDED];
    // SAFETY: only whether there is an entry counts.
    forwarded.contains(&(found as u32)) && unsafe { INNER_LINKS.get(&params.ifindex) }.is_none()
}
