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
    /// How many direct connections its pod's table holds; 0 where an older agent did not say.
    pub room: u32,
    /// Network namespace cookie of its pod, when that is enrolled on this node, else 0.
    pub netns: u64,
    /// Connections of this node's pods open to it for which the kernel chose it. Written by the kernel.
    pub open: u64,
}

const _: () = assert!(size_of::<Endpoint>() == 40);

/// Key of [`super::HELD`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct HeldKey {
    /// Network namespace cookie of the server's pod.
    pub server: u64,
    /// That of the client's; [`HeldKey::ALL`] for those of all clients together.
    pub client: u64,
}

const _: () = assert!(size_of::<HeldKey>() == 16);

impl HeldKey {
    /// No namespace has this cookie.
    pub const ALL: u64 = 0;
}

/// A direct connection, listed from before its SYN leaves until both its sockets have closed; one that was never accepted
/// goes with the client's.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Admitted {
    /// Network namespace cookie of the pod that dials.
    pub netns: u64,
    /// Cookie of the client's socket, [`Admitted::CLOSED`] after its end.
    pub socket: u64,
    /// Cookie of the app's socket; 0 until there is one, [`Admitted::CLOSED`] after its end. Only while it is 0 a SYN is let
    /// in.
    pub accepted: u64,
    /// What the client dialled.
    pub dialled: Addr,
    /// Number of the endpoint.
    pub endpoint: u32,
    /// Cookie of a socket of the app's that was accepted for an earlier connection of the same ends, whose client closed
    /// without a word; 0 without one, and after its end.
    pub before: u64,
}

const _: () = assert!(size_of::<Admitted>() == 56);

impl Admitted {
    /// In place of a cookie: that socket has closed.
    pub const CLOSED: u64 = u64::MAX;

    /// The app's socket that is open; there is one at most, whichever connection it was accepted for. 0 without one.
    #[inline(always)]
    pub const fn servers(&self) -> u64 {
        if self.accepted == 0 || self.accepted == Self::CLOSED { self.before } else { self.accepted }
    }

    /// Whether a SYN is let in for it.
    #[inline(always)]
    pub const fn is_awaited(&self) -> bool {
        self.accepted == 0 && self.socket != Self::CLOSED
    }

    /// Whether nobody has anything to do with it any more.
    #[inline(always)]
    pub const fn is_over(&self) -> bool {
        self.socket == Self::CLOSED && self.servers() == 0
    }
}

#[cfg(feature = "user")]
mod user {
    #![expect(unsafe_code, reason = "aya copies keys and values as bytes only for types marked so")]

    use super::{Admitted, DirectKey, DirectService, Endpoint, HeldKey, Slot, SlotKey};

    // SAFETY (all seven): `repr(C)`, all fields are integers or arrays of them, and there is no padding: each size is
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
    // SAFETY: as above.
    unsafe impl aya::Pod for HeldKey {}
}

#[cfg(test)]
mod tests {
    use super::Admitted;

    #[test]
    fn whichever_socket_closes_last_ends_it() {
        const CLOSED: u64 = Admitted::CLOSED;
        let table = [
            // The client's socket, the app's, one from before: whether a SYN is let in, which is open, whether it is over.
            ((7, 0, 0), (true, 0, false)),
            ((7, 8, 0), (false, 8, false)),
            ((7, CLOSED, 0), (false, 0, false)),
            ((CLOSED, 0, 0), (false, 0, true)),
            ((CLOSED, 8, 0), (false, 8, false)),
            ((CLOSED, CLOSED, 0), (false, 0, true)),
            ((7, 0, 6), (true, 6, false)),
            ((CLOSED, 0, 6), (false, 6, false)),
            ((CLOSED, CLOSED, 6), (false, 6, false)),
        ];
        for ((socket, accepted, before), expected) in table {
            let one = Admitted { socket, accepted, before, ..Admitted::default() };
            assert_eq!((one.is_awaited(), one.servers(), one.is_over()), expected, "{one:?}");
        }
    }
}
