//! cgroup/getpeername4 and getpeername6: who the other side is, as the app shall see it: the client sees the address
//! it dialled, the server (`accept` too) the real client. Both stand on the socket itself.
//!
//! The agent's own sockets see the plain truth. Tested in the lab.

use aya_ebpf::{bindings::bpf_sock, macros::cgroup_sock_addr, programs::SockAddrContext};
use core::ptr::read_volatile;
use mesh_common::{addr::Addr, maps::kind};

use crate::maps::{SOCKETS, split};

#[cgroup_sock_addr(getpeername4)]
pub fn on_getpeername4(ctx: SockAddrContext) -> i32 {
    let sa = ctx.sock_addr;
    // SAFETY: a context field.
    let sk = unsafe { read_volatile(&raw const (*sa).__bindgen_anon_1.sk) };
    if let Some(peer) = peer(sk)
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
pub fn on_getpeername6(ctx: SockAddrContext) -> i32 {
    let sa = ctx.sock_addr;
    // SAFETY: a context field.
    let sk = unsafe { read_volatile(&raw const (*sa).__bindgen_anon_1.sk) };
    if let Some(peer) = peer(sk) {
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
    if sk.is_null() {
        return None;
    }
    let facts = SOCKETS.get(sk)?;
    matches!(facts.kind, kind::CLIENT | kind::APP).then_some(facts.addr)
}
