//! Routes of connections that carry no HTTP the mesh reads: `tls[]` and `tcp[]`.
//!
//! Tested through `compile/` and `route/`; subnets below.

use std::{net::IpAddr, sync::Arc};

use super::WeightedBackend;

/// One `tls[]` or `tcp[]` entry of a `VirtualService`.
#[derive(Debug, Clone)]
pub struct StreamRoute {
    /// For logs: its place, for example `tcp[0]`.
    pub name: Arc<str>,
    /// The object that wrote it, for example `VirtualService default/mongo`.
    pub origin: Arc<str>,
    /// Alternatives (OR); empty matches everything. Those of `tls[]` all ask for server names.
    pub matches: Vec<StreamMatch>,
    /// Where to, by weight; never empty, the sum of weights is above 0.
    pub backends: Vec<WeightedBackend>,
}

/// One `match[]` entry: all that is set must hold (AND).
#[derive(Debug, Clone, Default)]
pub struct StreamMatch {
    /// `sniHosts`: one must be what the client's `ClientHello` names; never empty in `tls[]`, always in `tcp[]`.
    pub sni_hosts: Vec<SniHost>,
    /// `destinationSubnets`: one must have the address that the client dialled.
    pub destination_subnets: Vec<Subnet>,
    /// `port`.
    pub port: Option<u16>,
    /// `sourceLabels`.
    pub source_labels: Vec<(String, String)>,
    /// `sourceNamespace`.
    pub source_namespace: Option<String>,
    /// `sourceSubnet`.
    pub source_subnet: Option<Subnet>,
}

/// A name that a `ClientHello` may carry, in small letters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SniHost {
    /// `*`: any name.
    Any,
    /// The name itself.
    Exact(String),
    /// `*.example.com` as `.example.com`: every name below.
    Below(String),
}

/// An address with the number of its leading bits that count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subnet {
    address: IpAddr,
    bits: u8,
}

impl Subnet {
    /// `10.0.0.0/8`, or an address, which is a subnet of its own; `None` when it is neither.
    pub fn parse(text: &str) -> Option<Self> {
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().ok()?;
        let longest = if address.is_ipv4() { 32 } else { 128 };
        let bits = match bits {
            // Digits alone: `+8` is no number of bits.
            Some(bits) if bits.bytes().all(|b| b.is_ascii_digit()) => bits.parse().ok()?,
            Some(_) => return None,
            None => longest,
        };
        (bits <= longest).then_some(Self { address, bits })
    }

    /// The address as it was written, which may have bits beyond those that count.
    pub const fn address(&self) -> IpAddr {
        self.address
    }

    /// How many leading bits count.
    pub const fn bits(&self) -> u8 {
        self.bits
    }

    /// Whether the address is inside; never one of the other family.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(ours), IpAddr::V4(theirs)) => {
                let differ = ours.to_bits() ^ theirs.to_bits();
                differ.checked_shr(32 - u32::from(self.bits)).unwrap_or(0) == 0
            }
            (IpAddr::V6(ours), IpAddr::V6(theirs)) => {
                let differ = ours.to_bits() ^ theirs.to_bits();
                differ.checked_shr(128 - u32::from(self.bits)).unwrap_or(0) == 0
            }
            _ => false,
        }
    }
}

impl std::fmt::Display for Subnet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn subnets_hold_their_addresses() {
        let table = [
            ("10.0.0.0/8", "10.255.0.1", true),
            ("10.0.0.0/8", "11.0.0.1", false),
            ("10.1.2.3", "10.1.2.3", true),
            ("10.1.2.3", "10.1.2.4", false),
            ("0.0.0.0/0", "192.0.2.1", true),
            ("0.0.0.0/0", "2001:db8::1", false),
            ("10.1.2.3/31", "10.1.2.2", true),
            ("::/0", "2001:db8::1", true),
            ("2001:db8::/32", "2001:db8:1::1", true),
            ("2001:db8::/32", "2001:db9::1", false),
            ("2001:db8::1", "2001:db8::1", true),
            ("2001:db8::1/128", "2001:db8::2", false),
        ];
        for (subnet, address, inside) in table {
            let address = address.parse().unwrap();
            assert_eq!(Subnet::parse(subnet).unwrap().contains(address), inside, "{subnet} {address}");
        }
    }

    #[test]
    fn what_is_no_subnet() {
        for text in ["", "a", "10.0.0.0/33", "::/129", "10.0.0.0/", "10.0.0.0/+8", "10.0.0/8", "/8"] {
            assert_eq!(Subnet::parse(text), None, "{text:?}");
        }
    }
}
