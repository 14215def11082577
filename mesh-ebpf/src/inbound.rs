//! `sk_lookup`, one instance in each pod's network namespace: a connection arrives that has no socket yet, and
//! `decide::inbound` says whose it is. Runs once per connection, never per packet of one.
//!
//! When the agent's listener is gone, what would have been the agent's is refused, and handed to the app only where the
//! pod asks for that. Tested in the lab.

use aya_ebpf::{helpers::generated::bpf_ktime_get_ns, macros::sk_lookup, programs::SkLookupContext};
use aya_log_ebpf::debug;
use core::ptr::read_volatile;
use mesh_common::{
    addr::Addr,
    decide::{self, IPPROTO_TCP, Inbound},
    maps::{Admitted, Entry, Tuple, port, probe},
};

use crate::maps::{
    INNER_LINKS, LISTENERS, NETNS_COOKIE, POD_ADMITTED, POD_CLIENTS, POD_GUESTS, POD_ORIGINAL_DST,
    POD_PROBES, POLICIES, excludes_inbound, join,
};

const SK_DROP: u32 = 0;
const SK_PASS: u32 = 1;
/// `BPF_SK_LOOKUP_F_REPLACE | BPF_SK_LOOKUP_F_NO_REUSEPORT`: our choice stands, and no other socket of the
/// listener's reuseport group takes its place.
const ASSIGN: u64 = 3;
const AF_INET: u32 = 2;

#[sk_lookup]
pub fn m000000_inbound(ctx: SkLookupContext) -> u32 {
    let l = ctx.lookup;
    // SAFETY: context fields; volatile so that each is read on its own, as the verifier wants it.
    let (protocol, family, remote4, local4, remote_port, local_port, interface) = unsafe {
        (
            read_volatile(&raw const (*l).protocol),
            read_volatile(&raw const (*l).family),
            read_volatile(&raw const (*l).remote_ip4),
            read_volatile(&raw const (*l).local_ip4),
            read_volatile(&raw const (*l).remote_port),
            read_volatile(&raw const (*l).local_port),
            read_volatile(&raw const (*l).ingress_ifindex),
        )
    };
    // SAFETY: as above.
    let (remote6, local6) = unsafe {
        (
            [
                read_volatile(&raw const (*l).remote_ip6[0]),
                read_volatile(&raw const (*l).remote_ip6[1]),
                read_volatile(&raw const (*l).remote_ip6[2]),
                read_volatile(&raw const (*l).remote_ip6[3]),
            ],
            [
                read_volatile(&raw const (*l).local_ip6[0]),
                read_volatile(&raw const (*l).local_ip6[1]),
                read_volatile(&raw const (*l).local_ip6[2]),
                read_volatile(&raw const (*l).local_ip6[3]),
            ],
        )
    };
    if protocol != IPPROTO_TCP {
        return SK_PASS;
    }
    let (remote_port, local_port) = (u16::from_be(remote_port), local_port as u16);
    let (src, dst) = if family == AF_INET {
        (Addr::v4(remote4.to_ne_bytes(), remote_port), Addr::v4(local4.to_ne_bytes(), local_port))
    } else {
        (Addr::v6(join(remote6), remote_port), Addr::v6(join(local6), local_port))
    };
    // Whatever address of the pod's an app has bound itself to, its connection is known by where it comes from.
    let tuple = Tuple { src, dst };
    // SAFETY: an entry is freed after the programs that hold it have ended.
    let captured = unsafe { POD_ORIGINAL_DST.get(&tuple) }.is_some();
    let choice = if decide::is_own(&dst, &src) {
        decide::own(captured, !captured && may_be_missing(&tuple))
    } else if !captured && is_inner(interface) {
        // SAFETY: only whether there is an entry counts.
        decide::from_inner(unsafe { POD_GUESTS.get(&tuple) }.is_some())
    } else {
        let passes =
            dst.port != port::MESH && (admitted(&tuple) || is_bare_probe(&tuple) || excluded(dst.port, &src));
        decide::inbound(&dst, captured, passes)
    };
    let Inbound::Listener(index) = choice else { return verdict(choice) };
    match LISTENERS.redirect_sk_lookup(&ctx, index, ASSIGN) {
        Ok(()) => SK_PASS,
        Err(error) => {
            debug!(&ctx, target: "mesh_ebpf", "port {}: listener {} is gone: {}", dst.port, index, error);
            // SAFETY: an entry is replaced as a whole and freed after the programs that hold it have ended.
            let flags = unsafe { POLICIES.get(&NETNS_COOKIE.load()) }.map_or(0, |pod| pod.flags);
            verdict(decide::without_agent(index, flags))
        }
    }
}

#[inline(always)]
const fn verdict(choice: Inbound) -> u32 {
    if matches!(choice, Inbound::Pass) { SK_PASS } else { SK_DROP }
}

/// Whether what is behind this interface is inside the pod.
#[inline(always)]
fn is_inner(interface: u32) -> bool {
    // SAFETY: only whether there is an entry counts.
    unsafe { INNER_LINKS.get(&interface) }.is_some()
}

/// Whether it is a direct connection, which has no socket yet.
#[inline(always)]
fn admitted(tuple: &Tuple) -> bool {
    // SAFETY: an entry is freed after the programs that hold it have ended.
    unsafe { POD_ADMITTED.get(tuple) }.is_some_and(Admitted::is_awaited)
}

/// Whether it is a probe of the kubelet's that sends nothing, which has no socket yet.
#[inline(always)]
fn is_bare_probe(tuple: &Tuple) -> bool {
    // SAFETY: an entry is freed after the programs that hold it have ended.
    unsafe { POD_PROBES.get(tuple) }.is_some_and(|one| one.kind == probe::BARE && one.accepted == 0)
}

/// Whether the pod excludes its port or the address that dials it.
#[inline(always)]
fn excluded(port: u16, remote: &Addr) -> bool {
    let netns = NETNS_COOKIE.load();
    // SAFETY: an entry is replaced as a whole and freed after the programs that hold it have ended.
    unsafe { POLICIES.get(&netns) }.is_some_and(|pod| excludes_inbound(pod, netns, port, remote))
}

/// Whether a connection from inside the pod may have no entry for want of room.
#[inline(always)]
fn may_be_missing(tuple: &Tuple) -> bool {
    // SAFETY: an entry is freed after the programs that hold it have ended.
    unsafe {
        let none = Tuple::default();
        // The agent's own dialling of the app, or the pod's loopback: neither has anything to do with the tables' room.
        if tuple.dst.is_loopback() || POD_CLIENTS.get(tuple).is_some() {
            return false;
        }
        let now = bpf_ktime_get_ns();
        let full =
            |entry: Option<&Entry>| entry.is_some_and(|entry| decide::recently_full(entry.full_ns, now));
        // From loopback, and over IPv6 from the pod's own address too, the agent may have dialled: it has no entry when
        // there was no room for one. Apps have no reason to dial from loopback.
        let loopback = tuple.src.is_loopback();
        let dialled = (loopback || tuple.src.as_v4().is_none()) && full(POD_CLIENTS.get(&none));
        dialled || (!loopback && full(POD_ORIGINAL_DST.get(&none)))
    }
}
