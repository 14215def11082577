//! What the kernel knows of the kubelet's probes: the ports that pods declare, and the connections to them.

/// A port that a pod of this node declares for probes: value of [`super::PROBE_PORTS`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ProbePort {
    /// Network namespace cookie of the pod.
    pub netns: u64,
    /// A value of [`probe`].
    pub kind: u32,
    /// Always zero.
    pub pad: u32,
}

const _: () = assert!(size_of::<ProbePort>() == 16);

/// A connection of the kubelet's to a declared port, listed before its SYN leaves and until its socket closes: value of
/// [`super::POD_PROBES`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Probe {
    /// Cookie of the kubelet's socket.
    pub socket: u64,
    /// Cookie of the socket that has accepted; 0 until there is one. Only until then a SYN is let in.
    pub accepted: u64,
    /// A value of [`probe`].
    pub kind: u32,
    /// Always zero.
    pub pad: u32,
}

const _: () = assert!(size_of::<Probe>() == 24);

/// What may come to a port that is declared for probes.
pub mod probe {
    /// Connections without a byte from the kubelet: they go to the app.
    pub const BARE: u32 = 1;
    /// Declared requests: they go to the agent, which compares them.
    pub const REQUESTS: u32 = 2;
}

#[cfg(feature = "user")]
mod user {
    #![expect(unsafe_code, reason = "aya copies keys and values as bytes only for types marked so")]

    use super::{Probe, ProbePort};

    // SAFETY (both): `repr(C)`, all fields are integers, and there is no padding: each size is asserted beside its type to
    // be the sum of its fields.
    unsafe impl aya::Pod for ProbePort {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Probe {}
}
