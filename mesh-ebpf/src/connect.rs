//! cgroup/connect4 and connect6: an app of an enrolled pod opens a connection. It is sent to the agent's listener in
//! the pod, or to the endpoint itself where the agent allows that, and what it dialled is kept on its socket.
//!
//! A socket outside enrolled pods costs one failed lookup. The agent's own dialling sockets are told by what the
//! agent, and nobody else, can put on them. Tested in the lab.

use aya_ebpf::{
    EbpfContext as _,
    bindings::bpf_sock,
    helpers::generated::{bpf_get_netns_cookie, bpf_ktime_get_ns},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use aya_log_ebpf::debug;
use core::ptr::read_volatile;
use mesh_common::{
    addr::Addr,
    decide,
    flow::verdict,
    maps::{PodAddrs, SocketFacts, counter, kind, policy},
};

use crate::{
    direct,
    maps::{PODS, SOCKETS, agent_is_gone, count, excludes_outbound, join, split},
};

const ALLOW: i32 = 1;
/// `connect` fails with `EPERM`.
const DENY: i32 = 0;

enum Steer {
    Leave,
    To(Addr),
    Refuse,
}

#[cgroup_sock_addr(connect4)]
pub fn m000000_conn4(ctx: SockAddrContext) -> i32 {
    let sa = ctx.sock_addr;
    // SAFETY: context fields; volatile so that each is read on its own, as the verifier wants it.
    let (ip, port, protocol, sk) = unsafe {
        (
            read_volatile(&raw const (*sa).user_ip4),
            read_volatile(&raw const (*sa).user_port),
            read_volatile(&raw const (*sa).protocol),
            read_volatile(&raw const (*sa).__bindgen_anon_1.sk),
        )
    };
    if sk.is_null() {
        return ALLOW;
    }
    let bound = || {
        // SAFETY: fields of the socket, which lives as long as the hook runs.
        let (own, own_port) =
            unsafe { (read_volatile(&raw const (*sk).src_ip4), read_volatile(&raw const (*sk).src_port)) };
        Addr::v4(own.to_ne_bytes(), own_port as u16)
    };
    match steer(&ctx, sk, protocol, bound, Addr::v4(ip.to_ne_bytes(), u16::from_be(port as u16))) {
        Steer::Leave => ALLOW,
        Steer::Refuse => DENY,
        Steer::To(to) => {
            let [.., a, b, c, d] = to.ip;
            // SAFETY: fields this hook may write.
            unsafe {
                (*sa).user_ip4 = u32::from_ne_bytes([a, b, c, d]);
                (*sa).user_port = u32::from(to.port.to_be());
            }
            ALLOW
        }
    }
}

#[cgroup_sock_addr(connect6)]
pub fn m000000_conn6(ctx: SockAddrContext) -> i32 {
    let sa = ctx.sock_addr;
    // SAFETY: as above.
    let (a, b, c, d, port, protocol, sk) = unsafe {
        (
            read_volatile(&raw const (*sa).user_ip6[0]),
            read_volatile(&raw const (*sa).user_ip6[1]),
            read_volatile(&raw const (*sa).user_ip6[2]),
            read_volatile(&raw const (*sa).user_ip6[3]),
            read_volatile(&raw const (*sa).user_port),
            read_volatile(&raw const (*sa).protocol),
            read_volatile(&raw const (*sa).__bindgen_anon_1.sk),
        )
    };
    if sk.is_null() {
        return ALLOW;
    }
    let bound = || {
        // SAFETY: as above.
        let (own, own_port) = unsafe {
            (
                [
                    read_volatile(&raw const (*sk).src_ip6[0]),
                    read_volatile(&raw const (*sk).src_ip6[1]),
                    read_volatile(&raw const (*sk).src_ip6[2]),
                    read_volatile(&raw const (*sk).src_ip6[3]),
                ],
                read_volatile(&raw const (*sk).src_port),
            )
        };
        Addr::v6(join(own), own_port as u16)
    };
    match steer(&ctx, sk, protocol, bound, Addr::v6(join([a, b, c, d]), u16::from_be(port as u16))) {
        Steer::Leave => ALLOW,
        Steer::Refuse => DENY,
        Steer::To(to) => {
            let [a, b, c, d] = split(to.ip);
            // SAFETY: as above.
            unsafe {
                (*sa).user_ip6[0] = a;
                (*sa).user_ip6[1] = b;
                (*sa).user_ip6[2] = c;
                (*sa).user_ip6[3] = d;
                (*sa).user_port = u32::from(to.port.to_be());
            }
            ALLOW
        }
    }
}

/// Whether the pod's own wishes have the connection left alone, and what that makes of its socket.
#[inline(always)]
fn passes(pod: &PodAddrs, netns: u64, dst: &Addr) -> Option<u8> {
    if excludes_outbound(pod.flags, netns, dst) {
        return Some(kind::EXCLUDED);
    }
    (pod.flags & policy::OPEN != 0 && agent_is_gone(netns)).then_some(kind::NONE)
}

/// What is known of the socket, from here on at least. (A function of its own in the kernel as well: of the 512 bytes of stack
/// the hook of IPv6 leaves few.)
#[inline(never)]
fn facts_of<'a>(sk: *mut bpf_sock) -> Option<&'a mut SocketFacts> {
    let mut fresh = SocketFacts::default();
    SOCKETS.get_or(sk, &mut fresh)
}

/// `bound`: what the app has bound its socket to, read for enrolled pods alone.
#[inline(always)]
fn steer(
    ctx: &SockAddrContext,
    sk: *mut bpf_sock,
    protocol: u32,
    bound: impl FnOnce() -> Addr,
    dst: Addr,
) -> Steer {
    // SAFETY: the helper takes the context of this hook.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: an entry is replaced as a whole and freed after the programs that hold it have ended.
    let Some(pod) = (unsafe { PODS.get(&netns) }) else { return Steer::Leave };
    let known = SOCKETS.get(sk);
    if known.as_ref().is_some_and(|facts| facts.kind == kind::DIALLER) {
        return Steer::Leave;
    }
    let bound = bound();
    let Some(to) = decide::outbound(pod, protocol, &bound, &dst) else {
        // The socket may have been captured before, and disconnected.
        if let Some(facts) = known {
            facts.kind = kind::NONE;
        }
        return Steer::Leave;
    };
    // Most pods ask for nothing: this is all they pay for what others may.
    if pod.flags != 0
        && let Some(kind) = passes(pod, netns, &dst)
    {
        if let Some(facts) = facts_of(sk) {
            facts.kind = kind;
        }
        return Steer::Leave;
    }
    // Without memory for it the agent could not tell where the connection was going: refused, not sent astray.
    let Some(facts) = facts_of(sk) else {
        count(counter::NO_STORAGE);
        return Steer::Refuse;
    };
    facts.kind = kind::CLIENT;
    facts.verdict = verdict::CAPTURED;
    facts.addr = dst;
    (facts.endpoint, facts.seen) = (0, 0);
    if let Some(chosen) = direct::choose(netns, pod, &bound, &dst) {
        facts.endpoint = chosen.endpoint;
        if let Some(endpoint) = chosen.direct {
            facts.verdict = verdict::DIRECT;
            // SAFETY: the helper takes nothing.
            facts.start_ns = unsafe { bpf_ktime_get_ns() };
            debug!(ctx, target: "mesh_ebpf", "a connection to port {} goes to its endpoint", dst.port);
            return Steer::To(endpoint);
        }
    }
    debug!(ctx, target: "mesh_ebpf", "captured a connection to port {}, by way of port {}", dst.port, to.port);
    Steer::To(to)
}
