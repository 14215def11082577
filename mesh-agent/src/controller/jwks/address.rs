//! Where key sets may be fetched from: not from the controller's own machine, network or API server.
//!
//! Looks at addresses, never at names: a name is what its owner makes of it, from one moment to the next.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::state::snapshot::Subnet;

/// Addresses that are refused or allowed.
#[derive(Debug, Clone, Default)]
pub struct Addresses {
    /// Allowed whatever else is said of them (`--jwks-allow`).
    pub allowed: Vec<Subnet>,
    /// Refused besides: those of the API server.
    pub refused: Vec<IpAddr>,
}

impl Addresses {
    /// Why nothing is fetched from there; `None` where something may be.
    pub fn refuses(&self, address: IpAddr) -> Option<&'static str> {
        let address = plain(address);
        if self.allowed.iter().any(|subnet| subnet.contains(address)) {
            return None;
        }
        if self.refused.iter().any(|refused| plain(*refused) == address) {
            return Some("it is the API server's");
        }
        match address {
            IpAddr::V4(address) => v4(address),
            IpAddr::V6(address) => v6(address),
        }
    }
}

/// The first 96 bits of `::ffff:0:0/96` and of `64:ff9b::/96`.
const MAPPED: u128 = 0xffff;
const TRANSLATED: u128 = 0x0064_ff9b << 64;

/// The IPv4 address inside an IPv6 one, where that is what is meant: mapped, compatible, or behind a translator (RFC 6052).
fn plain(address: IpAddr) -> IpAddr {
    let IpAddr::V6(six) = address else { return address };
    let bits = six.to_bits();
    let four = IpAddr::V4(Ipv4Addr::from_bits((bits & 0xffff_ffff) as u32));
    match bits >> 32 {
        MAPPED | TRANSLATED => four,
        // Not `::` and `::1`.
        0 if bits > 0xffff => four,
        _ => address,
    }
}

fn v4(address: Ipv4Addr) -> Option<&'static str> {
    let [a, b, ..] = address.octets();
    match (a, b) {
        (0, _) => Some("it is nobody's"),
        (127, _) => Some("it is a loopback address"),
        (169, 254) => Some("it is a link-local address"),
        (10, _) | (172, 16..=31) | (192, 168) | (100, 64..=127) | (198, 18..=19) => {
            Some("it is a private address")
        }
        (224..=239, _) => Some("it is a multicast address"),
        (240.., _) => Some("it is a reserved address"),
        _ => None,
    }
}

fn v6(address: Ipv6Addr) -> Option<&'static str> {
    let first = address.segments()[0];
    if address.is_unspecified() {
        return Some("it is nobody's");
    }
    if address.is_loopback() {
        return Some("it is a loopback address");
    }
    match first {
        0xfe80..=0xfebf => Some("it is a link-local address"),
        0xfc00..=0xfdff | 0xfec0..=0xfeff => Some("it is a private address"),
        0xff00.. => Some("it is a multicast address"),
        // 6to4 has an IPv4 address inside, and so has Teredo: nobody serves keys there.
        0x2002 => Some("it is a 6to4 address"),
        0x2001 if address.segments()[1] == 0 => Some("it is a Teredo address"),
        // Discarded, and translated within a network (RFC 8215).
        0x0100 | 0x0064 => Some("it is a reserved address"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn only_addresses_of_the_world_are_fetched_from() {
        let addresses = Addresses {
            allowed: vec![Subnet::parse("10.9.0.0/16").unwrap(), Subnet::parse("fd00:9::/32").unwrap()],
            refused: vec!["203.0.113.7".parse().unwrap(), "2001:db8::7".parse().unwrap()],
        };
        for (address, expected) in [
            ("8.8.8.8", ""),
            ("2606:4700::1", ""),
            ("172.15.0.1", ""),
            ("172.32.0.1", ""),
            ("100.63.0.1", ""),
            ("100.128.0.1", ""),
            ("64:ff9b::808:808", ""),
            ("::ffff:8.8.8.8", ""),
            ("10.9.1.1", ""),
            ("::ffff:10.9.1.1", ""),
            ("fd00:9::1", ""),
            ("10.8.1.1", "private"),
            ("172.16.0.1", "private"),
            ("172.31.255.255", "private"),
            ("192.168.1.1", "private"),
            ("100.64.0.1", "private"),
            ("198.19.0.1", "private"),
            ("127.0.0.1", "loopback"),
            ("127.9.9.9", "loopback"),
            ("0.0.0.0", "nobody"),
            ("0.1.2.3", "nobody"),
            ("169.254.169.254", "link-local"),
            ("224.0.0.1", "multicast"),
            ("255.255.255.255", "reserved"),
            ("240.0.0.1", "reserved"),
            ("::", "nobody"),
            ("::1", "loopback"),
            ("::ffff:127.0.0.1", "loopback"),
            ("::127.0.0.1", "loopback"),
            ("::ffff:169.254.169.254", "link-local"),
            ("64:ff9b::a00:1", "private"),
            ("64:ff9b:1::a00:1", "reserved"),
            ("fe80::1", "link-local"),
            ("febf::1", "link-local"),
            ("fc00::1", "private"),
            ("fdff::1", "private"),
            ("fec0::1", "private"),
            ("ff02::1", "multicast"),
            ("2002:a00:1::1", "6to4"),
            ("2001::1", "Teredo"),
            ("100::1", "reserved"),
            ("203.0.113.7", "API server"),
            ("::ffff:203.0.113.7", "API server"),
            ("2001:db8::7", "API server"),
            ("203.0.113.8", ""),
        ] {
            let said = addresses.refuses(address.parse().unwrap()).unwrap_or_default();
            assert!(said.contains(expected) && said.is_empty() == expected.is_empty(), "{address}: {said:?}");
        }
    }
}
