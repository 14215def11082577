//! cgroup/getpeername4 and getpeername6: who the other side is, as the app shall see it: the client sees the address
//! it dialled, the server (`accept` too) the real client. Both stand on the socket itself.
//!
//! An app's MPTCP socket is not the one that was captured: that is a TCP socket of its own, inside the kernel, with the
//! same two ends. What it dialled is found by those.
//!
//! The agent's own sockets see the plain truth. Tested in the lab.

use aya_ebpf::{
    EbpfContext as _, bindings::bpf_sock, helpers::generated::bpf_get_netns_cookie, macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use core::ptr::read_volatile;
use mesh_common::{
    addr::Addr,
    maps::{Tuple, kind},
};

use crate::maps::{ORIGINAL_DST, SOCKETS, join, split};

const IPPROTO_MPTCP: u32 = 262;

#[cgroup_sock_addr(getpeername4)]
pub fn m000000_peer4(ctx: SockAddrContext) -> i32 {
    let sa = ctx.sock_addr;
    // SAFETY: a context field.
    let sk = unsafe { read_volatile(&raw const (*sa).__bindgen_anon_1.sk) };
    if sk.is_null() {
        return 1;
    }
    let of_the_socket = || multipath4(&ctx, sk).and_then(|tuple| dialled(&ctx, &tuple));
    if let Some(peer) = peer(sk).or_else(of_the_socket)
        && let Some(ip) = peer.as_v4()
    {
        // SAFETY: fields this hook may write.
        unsafe {
            (*sa).user_ip4 = u32::from_ne_bytes(ip);
            (*sa).user_port = u32::from(peer.port.to_be());
        }
    }
    1
}

#[cgroup_sock_addr(getpeername6)]
pub fn m000000_peer6(ctx: SockAddrContext) -> i32 {
    let sa = ctx.sock_addr;
    // SAFETY: a context field.
    let sk = unsafe { read_volatile(&raw const (*sa).__bindgen_anon_1.sk) };
    if sk.is_null() {
        return 1;
    }
    let of_the_socket = || multipath6(&ctx, sk).and_then(|tuple| dialled(&ctx, &tuple));
    if let Some(peer) = peer(sk).or_else(of_the_socket) {
        let [a, b, c, d] = split(peer.ip);
        // SAFETY: fields this hook may write.
        unsafe {
            (*sa).user_ip6[0] = a;
            (*sa).user_ip6[1] = b;
            (*sa).user_ip6[2] = c;
            (*sa).user_ip6[3] = d;
            (*sa).user_port = u32::from(peer.port.to_be());
        }
    }
    1
}

#[inline(always)]
fn peer(sk: *mut bpf_sock) -> Option<Addr> {
    let facts = SOCKETS.get(sk)?;
    matches!(facts.kind, kind::CLIENT | kind::APP).then_some(facts.addr)
}

/// What the captured connection with these ends was meant for.
#[inline(always)]
fn dialled(ctx: &SockAddrContext, tuple: &Tuple) -> Option<Addr> {
    // SAFETY: the helper takes the context of this hook.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: inner maps, and their entries, are freed after the programs that hold them have ended.
    unsafe { ORIGINAL_DST.get_value(&netns, tuple) }.map(|entry| entry.addr)
}

/// The ends of an MPTCP socket.
#[inline(always)]
fn multipath4(ctx: &SockAddrContext, sk: *mut bpf_sock) -> Option<Tuple> {
    let sa = ctx.sock_addr;
    // SAFETY: fields of the context and of the socket; volatile so that each is read on its own, as the verifier
    // wants it.
    let (protocol, remote, remote_port, local, local_port) = unsafe {
        (
            read_volatile(&raw const (*sa).protocol),
            read_volatile(&raw const (*sa).user_ip4),
            read_volatile(&raw const (*sa).user_port),
            read_volatile(&raw const (*sk).src_ip4),
            read_volatile(&raw const (*sk).src_port),
        )
    };
    let src = Addr::v4(local.to_ne_bytes(), local_port as u16);
    let dst = Addr::v4(remote.to_ne_bytes(), u16::from_be(remote_port as u16));
    (protocol == IPPROTO_MPTCP).then_some(Tuple { src, dst })
}

/// As [`multipath4`].
#[inline(always)]
fn multipath6(ctx: &SockAddrContext, sk: *mut bpf_sock) -> Option<Tuple> {
    let sa = ctx.sock_addr;
    // SAFETY: as above.
    let (protocol, remote_port, local_port) = unsafe {
        (
            read_volatile(&raw const (*sa).protocol),
            read_volatile(&raw const (*sa).user_port),
            read_volatile(&raw const (*sk).src_port),
        )
    };
    // SAFETY: as above.
    let (remote, local) = unsafe {
        (
            [
                read_volatile(&raw const (*sa).user_ip6[0]),
                read_volatile(&raw const (*sa).user_ip6[1]),
                read_volatile(&raw const (*sa).user_ip6[2]),
                read_volatile(&raw const (*sa).user_ip6[3]),
            ],
            [
                read_volatile(&raw const (*sk).src_ip6[0]),
                read_volatile(&raw const (*sk).src_ip6[1]),
                read_volatile(&raw const (*sk).src_ip6[2]),
                read_volatile(&raw const (*sk).src_ip6[3]),
            ],
        )
    };
    let src = Addr::v6(join(local), local_port as u16);
    let dst = Addr::v6(join(remote), u16::from_be(remote_port as u16));
    (protocol == IPPROTO_MPTCP).then_some(Tuple { src, dst })
}
