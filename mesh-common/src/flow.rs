//! The record of one flow: one app connection, seen at the app's own socket, or one packet flow that no socket
//! hook sees.

use crate::addr::Addr;

/// What the kernel knows of one flow. Written by `sockops.rs` and `tc.rs`, read in batches by the agent.
///
/// Times are nanoseconds of `CLOCK_MONOTONIC`. Byte counts are TCP payload as the socket counts it (without SYN
/// and FIN) for socket flows, and IP bytes for packet flows. `tx` is what the pod sent, `rx` what it received.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FlowRecord {
    /// Network namespace cookie of the pod.
    pub netns: u64,
    /// Cookie of the app's socket; 0 for a packet flow.
    pub socket: u64,
    /// When the flow began.
    pub start_ns: u64,
    /// When the record was last updated.
    pub last_seen_ns: u64,
    /// When the flow ended; 0 while it is open.
    pub end_ns: u64,
    /// Payload bytes the pod sent and the other side acknowledged.
    pub tx_bytes: u64,
    /// Payload bytes the pod received.
    pub rx_bytes: u64,
    /// Packets the pod sent.
    pub tx_packets: u64,
    /// Packets the pod received.
    pub rx_packets: u64,
    /// Smoothed round-trip time, microseconds.
    pub srtt_us: u32,
    /// Segments the pod sent again.
    pub retransmits: u32,
    /// The pod's side of the connection, as the app's `getsockname` shows it.
    pub local: Addr,
    /// The other side as the app's `getpeername` shows it: the address dialled (outbound) or the real client
    /// (inbound).
    pub remote: Addr,
    /// A [`direction`] value.
    pub direction: u8,
    /// A [`verdict`] value.
    pub verdict: u8,
    /// IP protocol number: 6 TCP, 17 UDP, …
    pub protocol: u8,
    /// Last TCP state (`TCP_ESTABLISHED` = 1 … as in `include/net/tcp_states.h`).
    pub tcp_state: u8,
    /// Number of the endpoint that the kernel chose ([`crate::maps::ENDPOINTS`]); 0 where it chose none.
    pub endpoint: u32,
}

const _: () = assert!(size_of::<FlowRecord>() == 9 * 8 + 8 + 40 + 8);

/// Values of [`FlowRecord::direction`].
pub mod direction {
    /// The pod dialled.
    pub const OUTBOUND: u8 = 1;
    /// The pod was dialled.
    pub const INBOUND: u8 = 2;
}

/// Values of [`FlowRecord::verdict`].
pub mod verdict {
    /// Handed to the agent.
    pub const CAPTURED: u8 = 1;
    /// Left alone: loopback to itself, exempt, or a protocol the mesh does not carry.
    pub const BYPASSED: u8 = 2;
    /// Never came to be: refused, timed out or reset before it was established.
    pub const FAILED: u8 = 3;
    /// Left alone because the pod excludes its port or its address from capture.
    pub const EXCLUDED: u8 = 4;
    /// Dropped: sent around the agent by a pod whose egress is restricted.
    pub const LEAKED: u8 = 5;
    /// From app to app without the agent, as the agent allows it.
    pub const DIRECT: u8 = 6;
    /// From the kubelet to the app without the agent: a probe that sends nothing.
    pub const PROBE: u8 = 7;
}

#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "aya copies map values as bytes only for types marked so")]
// SAFETY: `repr(C)`, all fields are integers or arrays of them, and there is no padding (size asserted above).
unsafe impl aya::Pod for FlowRecord {}
