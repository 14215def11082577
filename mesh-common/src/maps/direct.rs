//! What the kernel chooses from for connections without the agent, and what it lists of them.

use crate::addr::Addr;

/// Key of [`super::DIRECT`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct DirectKey {
    /// Network namespace cookie of the pod that dials.
    pub netns: u64,
    /// What it dials.
    pub addr: Addr,
    /// Always zero.
    pub pad: u32,
}

const _: () = assert!(size_of::<DirectKey>() == 32);

/// A service as one pod sees it, some endpoint of which may be reached without the agent.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DirectService {
    /// Which set of [`Slot`]s. A set never changes; another one takes its place.
    pub set: u32,
    /// How many slots it has.
    pub count: u32,
    /// A value of [`balancing`].
    pub balancing: u32,
    /// Whose turn it is, where they take turns. Written by the kernel.
    pub next: u32,
}

const _: () = assert!(size_of::<SlotKey>() == 8 && size_of::<DirectService>() == 16);

/// Values of [`DirectService::balancing`].
pub mod balancing {
    /// Two drawn by weight, the one with fewer connections open.
    pub const LEAST_REQUEST: u32 = 0;
    /// One drawn by weight.
    pub const RANDOM: u32 = 1;
    /// One after the other.
    pub const ROUND_ROBIN: u32 = 2;
}

/// Key of [`super::DIRECT_SLOTS`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct SlotKey {
    /// Which set.
    pub set: u32,
    /// Which place in it.
    pub place: u32,
}

/// One place in a set of endpoints. A draw takes two numbers: one for the place, and one that decides between the
/// endpoint of the place and that of its alias, so that weights are kept without looking through all of them.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Slot {
    /// Number of the endpoint.
    pub endpoint: u32,
    /// Up to this the second number leaves it at this place.
    pub threshold: u32,
    /// The place that is taken instead.
    pub alias: u32,
    /// 1 when the endpoint may be reached without the agent.
    pub direct: u32,
}

const _: () = assert!(size_of::<Slot>() == 16);

/// An endpoint that the kernel may choose.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Endpoint {
    /// Where the app listens.
    pub addr: Addr,
    /// Always zero.
    pub pad: u32,
    /// Network namespace cookie of its pod, when that is enrolled on this node, else 0.
    pub netns: u64,
    /// Connections of this node's pods open to it for which the kernel chose it. Written by the kernel.
    pub open: u64,
}

const _: () = assert!(size_of::<Endpoint>() == 40);

/// A direct connection, listed before its SYN leaves and until the client's socket closes.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Admitted {
    /// Network namespace cookie of the pod that dials.
    pub netns: u64,
    /// Cookie of the client's socket.
    pub socket: u64,
    /// Cookie of the app's socket; 0 until there is one. Only until then a SYN is let in.
    pub accepted: u64,
    /// What the client dialled.
    pub dialled: Addr,
    /// Number of the endpoint.
    pub endpoint: u32,
}

const _: () = assert!(size_of::<Admitted>() == 48);

#[cfg(feature = "user")]
mod user {
    #![expect(unsafe_code, reason = "aya copies keys and values as bytes only for types marked so")]

    use super::{Admitted, DirectKey, DirectService, Endpoint, Slot, SlotKey};

    // SAFETY (all six): `repr(C)`, all fields are integers or arrays of them, and there is no padding: each size is
    // asserted beside its type to be the sum of its fields.
    unsafe impl aya::Pod for DirectKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for DirectService {}
    // SAFETY: as above.
    unsafe impl aya::Pod for SlotKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Slot {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Endpoint {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Admitted {}
}
