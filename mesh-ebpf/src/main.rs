//! The kernel side: one file per hook, each thin over `mesh_common::decide`.
//!
//! `connect.rs` sends the connections of enrolled pods to the agent, or to where `direct.rs` chooses, `sockops.rs` tells
//! both ends what belongs together and counts flows, `peername.rs` tells apps the truth about their peers, `inbound.rs` steers what arrives
//! at a pod, `tc.rs` counts packets no socket hook sees, `guests.rs` hands over the connections of nested containers and
//! virtual machines, `guard.rs` drops what leaves around the agent, `probes.rs` knows the kubelet's connections. Never sends a packet of its own and never changes one.
//! Built by `cargo xtask build-ebpf`; on any other target it is an empty program. Tested in the lab
//! (`tests/tests/capture/`).
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]
#![cfg_attr(
    target_arch = "bpf",
    allow(
        clippy::needless_borrows_for_generic_args,
        clippy::needless_pass_by_value,
        clippy::verbose_bit_mask,
        clippy::cast_possible_wrap,
        clippy::items_after_statements,
        reason = "what is borrowed stays off the stack of 512 bytes, contexts are passed as the macros hand them over"
    )
)]
#![cfg_attr(
    target_arch = "bpf",
    expect(unsafe_code, reason = "kernel programs speak to the kernel through raw contexts and pointers")
)]

#[cfg(target_arch = "bpf")]
mod connect;
#[cfg(target_arch = "bpf")]
mod direct;
#[cfg(target_arch = "bpf")]
mod ends;
#[cfg(target_arch = "bpf")]
mod guard;
#[cfg(target_arch = "bpf")]
mod guests;
#[cfg(target_arch = "bpf")]
mod inbound;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod peername;
#[cfg(target_arch = "bpf")]
mod probes;
#[cfg(target_arch = "bpf")]
mod sockops;
#[cfg(target_arch = "bpf")]
mod tc;

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: the verifier rejects a program that could.
    loop {}
}

/// Some helpers (`bpf_sk_assign`, `bpf_ktime_get_ns`) are for programs under the GPL only.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";

#[cfg(not(target_arch = "bpf"))]
fn main() {}
