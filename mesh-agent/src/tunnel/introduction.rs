//! What an app is told of the client at the start of its connection: the header of the PROXY protocol, versions 1 and 2.
//!
//! Promises that the header is complete by itself, so that it can be written at once, and that what cannot be said of a client
//! is not made up. Whom it speaks of is the caller's to know. Between agents it travels as a header of a native request. Tested
//! below, and in the lab (`tests/tests/proxy_protocol.rs`).

use std::{fmt::Write as _, net::SocketAddr};

use http::HeaderValue;

use crate::{
    error::{Error, Kind, Result},
    state::snapshot::ProxyProtocol,
};

/// How every header of version 2 begins.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

/// Version 2 and a command, in one byte: it is about the connection itself (LOCAL), or about a client (PROXY).
const LOCAL: u8 = 0x20;
const PROXY: u8 = 0x21;

/// TCP over IPv4 and IPv6, in one byte each.
const TCP4: u8 = 0x11;
const TCP6: u8 = 0x21;

/// Who an app's connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Introduction {
    /// How it is written.
    pub version: ProxyProtocol,
    /// The client, and what it has dialled; `None`: the connection is nobody's but the agent's.
    pub ends: Option<(SocketAddr, SocketAddr)>,
}

impl Introduction {
    /// The header.
    pub fn bytes(&self) -> Vec<u8> {
        match self.version {
            ProxyProtocol::V1 => self.text().into_bytes(),
            ProxyProtocol::V2 => self.binary(),
        }
    }

    /// Both ends in one family: an IPv4 address stands in IPv6 where the other is of that.
    fn in_one_family(&self) -> Option<(SocketAddr, SocketAddr)> {
        let canonical = |at: SocketAddr| SocketAddr::new(at.ip().to_canonical(), at.port());
        let (client, dialled) = self.ends.map(|(client, dialled)| (canonical(client), canonical(dialled)))?;
        let in_v6 = |at: SocketAddr| match at {
            SocketAddr::V4(v4) => SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port()),
            SocketAddr::V6(_) => at,
        };
        let same = client.is_ipv4() == dialled.is_ipv4();
        Some(if same { (client, dialled) } else { (in_v6(client), in_v6(dialled)) })
    }

    fn text(&self) -> String {
        let Some((client, dialled)) = self.in_one_family() else { return "PROXY UNKNOWN\r\n".to_owned() };
        let family = if client.is_ipv4() { "TCP4" } else { "TCP6" };
        let (from, to) = (client.ip(), dialled.ip());
        format!("PROXY {family} {from} {to} {} {}\r\n", client.port(), dialled.port())
    }

    fn binary(&self) -> Vec<u8> {
        let mut header = SIGNATURE.to_vec();
        match self.in_one_family() {
            Some((SocketAddr::V4(client), SocketAddr::V4(dialled))) => {
                header.extend([PROXY, TCP4, 0, 12]);
                header.extend(client.ip().octets().into_iter().chain(dialled.ip().octets()));
            }
            Some((SocketAddr::V6(client), SocketAddr::V6(dialled))) => {
                header.extend([PROXY, TCP6, 0, 36]);
                header.extend(client.ip().octets().into_iter().chain(dialled.ip().octets()));
            }
            _ => {
                header.extend([LOCAL, 0, 0, 0]);
                return header;
            }
        }
        if let Some((client, dialled)) = self.ends {
            header.extend(client.port().to_be_bytes().into_iter().chain(dialled.port().to_be_bytes()));
        }
        header
    }

    /// As the other agent is told of it.
    pub(super) fn to_header(self) -> HeaderValue {
        let version = match self.version {
            ProxyProtocol::V1 => "v1",
            ProxyProtocol::V2 => "v2",
        };
        let mut text = version.to_owned();
        if let Some((client, dialled)) = self.ends {
            // Writing to a text cannot fail.
            let _ = write!(text, " {client} {dialled}");
        }
        // Addresses are made of characters that a header value may have.
        HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static("v2"))
    }

    /// What the other agent has said.
    pub(super) fn from_header(text: &str) -> Result<Self> {
        let mut words = text.split(' ');
        let version = match words.next() {
            Some("v1") => Some(ProxyProtocol::V1),
            Some("v2") => Some(ProxyProtocol::V2),
            _ => None,
        };
        let address = |word: &str| word.parse::<SocketAddr>().ok();
        let ends = match (words.next(), words.next(), words.next()) {
            (None, ..) => Some(None),
            (Some(client), Some(dialled), None) => address(client).zip(address(dialled)).map(Some),
            _ => None,
        };
        let read = version.zip(ends).map(|(version, ends)| Self { version, ends });
        read.ok_or_else(|| Error::new(Kind::BadRequest, format!("{text:?} is no version and two addresses")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn introduction(version: ProxyProtocol, client: &str, dialled: &str) -> Introduction {
        let ends = client.parse().ok().zip(dialled.parse().ok());
        Introduction { version, ends }
    }

    #[test]
    fn version_1_is_a_line() {
        let table = [
            ("10.0.0.5:51000", "10.96.0.1:80", "PROXY TCP4 10.0.0.5 10.96.0.1 51000 80\r\n"),
            ("[fd00::5]:51000", "[fd00::1]:80", "PROXY TCP6 fd00::5 fd00::1 51000 80\r\n"),
            ("[::ffff:10.0.0.5]:1", "10.96.0.1:80", "PROXY TCP4 10.0.0.5 10.96.0.1 1 80\r\n"),
            ("10.0.0.5:1", "[fd00::1]:80", "PROXY TCP6 ::ffff:10.0.0.5 fd00::1 1 80\r\n"),
            ("", "", "PROXY UNKNOWN\r\n"),
        ];
        for (client, dialled, expected) in table {
            let bytes = introduction(ProxyProtocol::V1, client, dialled).bytes();
            assert_eq!(String::from_utf8_lossy(&bytes), expected);
            // The longest that version 1 allows.
            assert!(bytes.len() <= 107);
        }
    }

    #[test]
    fn version_2_is_binary() {
        let four = introduction(ProxyProtocol::V2, "10.0.0.5:258", "10.96.0.1:80").bytes();
        let expected =
            [&b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c"[..], &[10, 0, 0, 5, 10, 96, 0, 1, 1, 2, 0, 80]];
        assert_eq!(four, expected.concat());
        let six = introduction(ProxyProtocol::V2, "[fd00::5]:258", "[fd00::1]:80").bytes();
        assert_eq!((&six[12..16], six.len()), (&b"\x21\x21\0\x24"[..], 16 + 36));
        assert_eq!((six[16], six[31], six[47], &six[48..]), (0xfd, 5, 1, &[1, 2, 0, 80][..]));
        let own = Introduction { version: ProxyProtocol::V2, ends: None }.bytes();
        assert_eq!(own, b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0");
    }

    #[test]
    fn agents_understand_one_another() {
        let all = [
            introduction(ProxyProtocol::V1, "10.0.0.5:51000", "10.96.0.1:80"),
            introduction(ProxyProtocol::V2, "[fd00::5]:51000", "[fd00::1]:80"),
            Introduction { version: ProxyProtocol::V1, ends: None },
        ];
        for one in all {
            let header = one.to_header();
            let read = header.to_str().ok().and_then(|text| Introduction::from_header(text).ok());
            assert_eq!(read, Some(one), "{header:?}");
        }
        for bad in ["", "v3", "v1 10.0.0.5:1", "v1 a b", "v1 10.0.0.5:1 10.0.0.6:1 x", "v1  ", "10.0.0.5:1"] {
            let error = Introduction::from_header(bad).map_err(|error| error.kind);
            assert_eq!(error, Err(Kind::BadRequest), "{bad:?}");
        }
    }
}
