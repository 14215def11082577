//! The two ends of a socket, as sockops programs are told of them. Never reads anything else. Tested in the lab.

use aya_ebpf::programs::SockOpsContext;
use core::ptr::read_volatile;
use mesh_common::addr::Addr;

use crate::maps::join;

const AF_INET: u32 = 2;

/// Local and remote address.
#[inline(always)]
pub fn ends(ctx: &SockOpsContext) -> (Addr, Addr) {
    let ops = ctx.ops;
    // SAFETY: context fields.
    let (family, local4, remote4, local_port, remote_port) = unsafe {
        (
            read_volatile(&raw const (*ops).family),
            read_volatile(&raw const (*ops).local_ip4),
            read_volatile(&raw const (*ops).remote_ip4),
            read_volatile(&raw const (*ops).local_port),
            read_volatile(&raw const (*ops).remote_port),
        )
    };
    // SAFETY: as above.
    let (local6, remote6) = unsafe {
        (
            [
                read_volatile(&raw const (*ops).local_ip6[0]),
                read_volatile(&raw const (*ops).local_ip6[1]),
                read_volatile(&raw const (*ops).local_ip6[2]),
                read_volatile(&raw const (*ops).local_ip6[3]),
            ],
            [
                read_volatile(&raw const (*ops).remote_ip6[0]),
                read_volatile(&raw const (*ops).remote_ip6[1]),
                read_volatile(&raw const (*ops).remote_ip6[2]),
                read_volatile(&raw const (*ops).remote_ip6[3]),
            ],
        )
    };
    let (local_port, remote_port) = (local_port as u16, u32::from_be(remote_port) as u16);
    if family == AF_INET {
        (Addr::v4(local4.to_ne_bytes(), local_port), Addr::v4(remote4.to_ne_bytes(), remote_port))
    } else {
        (Addr::v6(join(local6), local_port), Addr::v6(join(remote6), remote_port))
    }
}
