//! One address type for both families, with a layout the kernel can use as part of a map key.

/// An IPv4 or IPv6 address and a port. IPv4 is kept v4-mapped (`::ffff:a.b.c.d`), so that one key type serves
/// both families and a v4-mapped IPv6 socket is the same address as its IPv4 twin. All bytes are in network
/// order except `port`, which is in host order.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Addr {
    /// The address, IPv4 as `::ffff:a.b.c.d`.
    pub ip: [u8; 16],
    /// The port, host byte order.
    pub port: u16,
    /// Always zero: map keys may have no unnamed padding.
    pub pad: u16,
}

const _: () = assert!(size_of::<Addr>() == 20);

// Second words of addresses, in memory order: whole words keep the kernel's small stack free of single bytes.
/// `::ffff:0.0.0.0`.
const MAPPED: u64 = u64::from_ne_bytes([0, 0, 0xff, 0xff, 0, 0, 0, 0]);
/// `::ffff:127.0.0.0`, which is all of `127.0.0.0/8` under [`MAPPED_8`].
const MAPPED_127: u64 = u64::from_ne_bytes([0, 0, 0xff, 0xff, 127, 0, 0, 0]);
/// The mask of the first eight bits of a mapped address.
const MAPPED_8: u64 = u64::from_ne_bytes([0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0]);
/// `::1`.
const ONE: u64 = u64::from_ne_bytes([0, 0, 0, 0, 0, 0, 0, 1]);

impl Addr {
    /// The v4-mapped form of an IPv4 address in network order.
    #[inline(always)]
    pub const fn v4(ip: [u8; 4], port: u16) -> Self {
        let [a, b, c, d] = ip;
        Self { ip: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d], port, pad: 0 }
    }

    /// An IPv6 address (which may be v4-mapped) in network order.
    #[inline(always)]
    pub const fn v6(ip: [u8; 16], port: u16) -> Self {
        Self { ip, port, pad: 0 }
    }

    /// The four bytes of an IPv4 address (also of one that came in its v4-mapped form); `None` for IPv6.
    #[inline(always)]
    pub const fn as_v4(&self) -> Option<[u8; 4]> {
        match self.ip {
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d] => Some([a, b, c, d]),
            _ => None,
        }
    }

    /// Whether this is `0.0.0.0` or `::`, whatever the port.
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        let (a, b) = self.words();
        a == 0 && (b == 0 || b == MAPPED)
    }

    /// Whether this is in `127.0.0.0/8` or `::1`.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        let (a, b) = self.words();
        a == 0 && (b == ONE || b & MAPPED_8 == MAPPED_127)
    }

    /// Whether both have the same address, whatever their ports.
    #[inline(always)]
    pub const fn same_ip(&self, other: &Self) -> bool {
        // Compared as two words: a byte-wise comparison becomes a call the kernel does not have.
        let (a, b) = (self.words(), other.words());
        a.0 == b.0 && a.1 == b.1
    }

    /// The address as two words, for comparing and hashing.
    #[inline(always)]
    pub(crate) const fn words(&self) -> (u64, u64) {
        let both = u128::from_ne_bytes(self.ip);
        (both as u64, (both >> 64) as u64)
    }
}

#[cfg(feature = "user")]
mod user {
    use core::net::{IpAddr, SocketAddr};

    use super::Addr;

    impl From<SocketAddr> for Addr {
        fn from(addr: SocketAddr) -> Self {
            match addr.ip() {
                IpAddr::V4(ip) => Self::v4(ip.octets(), addr.port()),
                IpAddr::V6(ip) => Self::v6(ip.octets(), addr.port()),
            }
        }
    }

    impl From<Addr> for SocketAddr {
        /// Canonical: a v4-mapped address comes out as IPv4.
        fn from(addr: Addr) -> Self {
            Self::new(IpAddr::from(addr.ip).to_canonical(), addr.port)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Addr;

    #[test]
    fn mapped_and_plain_ipv4_are_one_address() {
        let mapped = Addr::v6([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 1, 2, 3], 80);
        assert_eq!(mapped, Addr::v4([10, 1, 2, 3], 80));
        assert_eq!(mapped.as_v4(), Some([10, 1, 2, 3]));
    }

    #[test]
    fn loopback_and_unspecified_in_all_spellings() {
        let mut one = [0; 16];
        assert!(Addr::v6(one, 0).is_unspecified());
        one[15] = 1;
        assert!(Addr::v6(one, 0).is_loopback());
        assert!(Addr::v4([127, 9, 9, 9], 0).is_loopback());
        assert!(!Addr::v4([128, 0, 0, 1], 0).is_loopback());
        assert!(Addr::v4([0; 4], 0).is_unspecified());
        assert!(!Addr::v4([0, 0, 0, 1], 0).is_unspecified());
        assert!(!Addr::v6([0xfe; 16], 0).is_loopback());
    }

    #[cfg(feature = "user")]
    #[test]
    fn there_and_back() {
        use core::net::SocketAddr;
        for text in ["10.0.0.1:80", "[fd00::1]:443"] {
            let addr: SocketAddr = text.parse().unwrap_or_else(|_| SocketAddr::from(([0, 0, 0, 0], 0)));
            assert_eq!(SocketAddr::from(Addr::from(addr)), addr);
        }
    }
}
