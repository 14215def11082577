//! The kubelet's probes: its sockets are marked by programs attached at its cgroup alone, its connections to ports that pods
//! declare for probes are listed for the pod before their SYN leaves, and struck off when its socket closes.
//!
//! Nothing is told by an address: without the mark, which the attachment alone gives, no connection is listed. What is
//! listed is let in once. Where only bare connections are declared (TCP probes), what the kubelet sends all the same is
//! dropped here: `httpGet.host` of a pod may name any other. Tested in the lab (`tests/tests/probes.rs`).

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_SOCK_OPS_STATE_CB_FLAG, bpf_sock},
    helpers::generated::{
        bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_setsockopt, bpf_sk_fullsock, bpf_skb_load_bytes,
    },
    macros::{cgroup_skb, cgroup_sock_addr},
    programs::{SkBuffContext, SockAddrContext, SockOpsContext},
};
use core::ptr::read_volatile;
use mesh_common::{
    decide::IPPROTO_TCP,
    flow::verdict,
    maps::{Probe, SocketFacts, Tuple, counter, kind, probe},
};

use crate::{
    direct,
    ends::ends,
    maps::{NETNS_COOKIE, PROBE_PORTS, PROBES, SOCKETS, count},
};

const ALLOW: i32 = 1;
const DROP: i32 = 0;

const SOL_SOCKET: i32 = 1;
const SO_KEEPALIVE: i32 = 9;
const SOL_TCP: i32 = 6;
const TCP_KEEPIDLE: i32 = 4;
const TCP_KEEPINTVL: i32 = 5;
const TCP_USER_TIMEOUT: i32 = 18;
/// How long a bare connection may wait for an acknowledgement. Probes have a second, unless they say otherwise.
const UNACKNOWLEDGED_MS: i32 = 5_000;
/// After how long without a word the app's end asks whether the kubelet's is still there. Later than that gives up.
const IDLE_S: i32 = 10;

#[cgroup_sock_addr(connect4)]
pub fn m000000_kube4(ctx: SockAddrContext) -> i32 {
    mark(&ctx);
    ALLOW
}

#[cgroup_sock_addr(connect6)]
pub fn m000000_kube6(ctx: SockAddrContext) -> i32 {
    mark(&ctx);
    ALLOW
}

/// In another network namespace than the node's an address may be somebody else's.
#[inline(always)]
fn mark(ctx: &SockAddrContext) {
    let sa = ctx.sock_addr;
    // SAFETY: context fields; volatile so that each is read on its own, as the verifier wants it.
    let (protocol, sk) = unsafe {
        (read_volatile(&raw const (*sa).protocol), read_volatile(&raw const (*sa).__bindgen_anon_1.sk))
    };
    // SAFETY: the helper takes the context of this hook.
    if protocol != IPPROTO_TCP
        || sk.is_null()
        || unsafe { bpf_get_netns_cookie(ctx.as_ptr()) } != NETNS_COOKIE.load()
    {
        return;
    }
    let mut fresh = SocketFacts::default();
    if let Some(facts) = SOCKETS.get_or(sk, &mut fresh)
        && matches!(facts.kind, kind::NONE | kind::BARE_PROBE)
    {
        facts.kind = kind::KUBELET;
    }
}

/// The kubelet's socket is about to send its SYN. What cannot be listed for want of room is refused.
#[inline(never)]
pub fn connecting(ctx: SockOpsContext, sk: *mut bpf_sock) {
    let ctx = &ctx;
    let Some(facts) = SOCKETS.get(sk) else { return };
    if facts.kind != kind::KUBELET {
        return;
    }
    facts.start_ns = 0;
    let (src, dst) = ends(ctx);
    // SAFETY: entries and inner maps are freed after the programs that hold them have ended.
    let Some(port) = (unsafe { PROBE_PORTS.get(&dst) }) else { return };
    // SAFETY: as above.
    let Some(map) = (unsafe { PROBES.get(&port.netns) }) else { return };
    // SAFETY: the helper takes the context of this hook.
    let socket = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let listed = Probe { socket, accepted: 0, kind: port.kind, pad: 0 };
    if map.insert(&Tuple { src, dst }, &listed, 0).is_err() {
        count(counter::PROBES_FULL);
        direct::refuse(ctx);
        return;
    }
    facts.start_ns = port.netns;
    if port.kind == probe::BARE {
        facts.kind = kind::BARE_PROBE;
        // What is dropped is not sent again for minutes.
        set(ctx, SOL_TCP, TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS);
    }
    // SAFETY: a context field. What others have asked for stays.
    let now = unsafe { read_volatile(&raw const (*ctx.ops).bpf_sock_ops_cb_flags) };
    let _ = ctx.set_cb_flags((now | BPF_SOCK_OPS_STATE_CB_FLAG) as i32);
}

/// A connection is established at an app or at the agent: whether it is a probe, which it is told of by its socket. From
/// then on no other SYN is let in for it.
#[inline(never)]
pub fn accepted(ctx: SockOpsContext, sk: *mut bpf_sock) {
    let ctx = &ctx;
    let Some(facts) = SOCKETS.get(sk) else { return };
    if !matches!(facts.kind, kind::APP | kind::LISTENER) {
        return;
    }
    let (dst, src) = ends(ctx);
    // SAFETY: the helpers take the context of this hook.
    let (netns, socket) =
        unsafe { (bpf_get_netns_cookie(ctx.as_ptr()), bpf_get_socket_cookie(ctx.as_ptr())) };
    // SAFETY: inner maps, and their entries, are freed after the programs that hold them have ended.
    let Some(listed) = (unsafe { PROBES.get_value_ptr_mut(&netns, &Tuple { src, dst }) }) else { return };
    // SAFETY: as above.
    let of = unsafe {
        if (*listed).accepted != 0 {
            return;
        }
        (*listed).accepted = socket;
        (*listed).kind
    };
    match (facts.kind, of) {
        (kind::APP, probe::BARE) => {
            facts.verdict = verdict::PROBE;
            // The kubelet's end may be gone without a word, where bytes of its were dropped.
            set(ctx, SOL_SOCKET, SO_KEEPALIVE, 1);
            set(ctx, SOL_TCP, TCP_KEEPIDLE, IDLE_S);
            set(ctx, SOL_TCP, TCP_KEEPINTVL, IDLE_S);
        }
        (kind::LISTENER, probe::REQUESTS) => facts.kind = kind::PROBE,
        // What was declared has changed meanwhile.
        _ => {}
    }
}

/// The kubelet's socket changes its TCP state: once it closes, its connection is struck off.
#[inline(never)]
pub fn closing(ctx: SockOpsContext, sk: *mut bpf_sock) {
    let ctx = &ctx;
    if !direct::closes(ctx) {
        return;
    }
    let Some(facts) = SOCKETS.get(sk) else { return };
    if !matches!(facts.kind, kind::KUBELET | kind::BARE_PROBE) || facts.start_ns == 0 {
        return;
    }
    let (src, dst) = ends(ctx);
    let tuple = Tuple { src, dst };
    // SAFETY: inner maps are freed after the programs that hold them have ended.
    let Some(map) = (unsafe { PROBES.get(&facts.start_ns) }) else { return };
    facts.start_ns = 0;
    // A new connection may have taken the same ends over.
    // SAFETY: as above; the helper takes the context of this hook.
    if unsafe { map.get(&tuple).is_some_and(|one| one.socket == bpf_get_socket_cookie(ctx.as_ptr())) } {
        let _ = map.remove(&tuple);
    }
}

/// Sets an option of the hook's socket.
#[inline(always)]
fn set(ctx: &SockOpsContext, level: i32, option: i32, mut value: i32) {
    // SAFETY: the helper takes the context of this hook, and reads four bytes.
    unsafe { bpf_setsockopt(ctx.as_ptr(), level, option, (&raw mut value).cast(), 4) };
}

/// What the kubelet sends: bytes where none belong are dropped.
#[cgroup_skb(egress)]
pub fn m000000_kubeout(ctx: SkBuffContext) -> i32 {
    let skb = ctx.skb.skb;
    // SAFETY: a context field; the helper returns null or a socket that lives as long as the hook runs.
    let sk = unsafe {
        let sk = read_volatile(&raw const (*skb).__bindgen_anon_2.sk);
        if sk.is_null() {
            return ALLOW;
        }
        bpf_sk_fullsock(sk)
    };
    if sk.is_null() {
        return ALLOW;
    }
    match SOCKETS.get(sk) {
        Some(facts) if facts.kind == kind::BARE_PROBE && !is_bare(&ctx) => {
            count(counter::PROBE_BYTES);
            DROP
        }
        _ => ALLOW,
    }
}

/// Whether a segment has headers alone. What cannot be read has more.
#[inline(always)]
fn is_bare(ctx: &SkBuffContext) -> bool {
    const TCP_LENGTH: u32 = 12;
    const IPV6_NEXT: u32 = 6;
    const IPV6_HEADER: u32 = 40;
    // SAFETY: a context field.
    let len = unsafe { read_volatile(&raw const (*ctx.skb.skb).len) };
    let Some(first) = byte(ctx, 0) else { return false };
    let header = if first >> 4 == 4 {
        u32::from(first & 0xf) * 4
    } else if byte(ctx, IPV6_NEXT) == Some(IPPROTO_TCP as u8) {
        IPV6_HEADER
    } else {
        return false;
    };
    byte(ctx, header + TCP_LENGTH).is_some_and(|length| len <= header + u32::from(length >> 4) * 4)
}

/// A byte of the packet from its IP header on.
#[inline(always)]
fn byte(ctx: &SkBuffContext, at: u32) -> Option<u8> {
    let mut to = 0_u8;
    // SAFETY: the helper writes all of `to` or fails.
    let failed = unsafe { bpf_skb_load_bytes(ctx.as_ptr().cast_const(), at, (&raw mut to).cast(), 1) };
    (failed == 0).then_some(to)
}
