//! What a [`Recording`] of the wire holds: TCP segments, and what TLS servers agreed to.
//!
//! Promises: judges only whole frames; what cannot be parsed is no segment. Tested by every test that asserts on the
//! wire.

use etherparse::{SlicedPacket, TransportSlice};
use tls_parser::{
    TlsExtension, TlsMessage, TlsMessageHandshake, TlsVersion, parse_tls_extensions, parse_tls_plaintext,
};

use crate::Recording;

/// Payload of one TCP segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment<'a> {
    /// Source port.
    pub from: u16,
    /// Destination port.
    pub to: u16,
    /// The bytes.
    pub payload: &'a [u8],
}

impl Recording {
    /// TCP segments that carry bytes.
    pub fn segments(&self) -> impl Iterator<Item = Segment<'_>> {
        self.frames.iter().filter_map(|frame| segment(frame))
    }

    /// TLS versions that servers agreed to, one for each `ServerHello` from this port.
    pub fn tls_versions(&self, port: u16) -> Vec<u16> {
        self.segments().filter(|s| s.from == port).filter_map(|s| server_hello_version(s.payload)).collect()
    }
}

fn segment(packet: &[u8]) -> Option<Segment<'_>> {
    match SlicedPacket::from_ethernet(packet).ok()?.transport? {
        TransportSlice::Tcp(tcp) if !tcp.payload().is_empty() => {
            Some(Segment { from: tcp.source_port(), to: tcp.destination_port(), payload: tcp.payload() })
        }
        _ => None,
    }
}

/// The version a `ServerHello` settles on: `supported_versions` where it is there (RFC 8446 §4.2.1).
fn server_hello_version(payload: &[u8]) -> Option<u16> {
    let (_, record) = parse_tls_plaintext(payload).ok()?;
    let hello = record.msg.iter().find_map(|message| match message {
        TlsMessage::Handshake(TlsMessageHandshake::ServerHello(hello)) => Some(hello),
        _ => None,
    })?;
    let (_, extensions) = parse_tls_extensions(hello.ext?).ok()?;
    let settled = extensions.iter().find_map(|extension| match extension {
        TlsExtension::SupportedVersions(versions) => versions.first().copied(),
        _ => None,
    });
    let TlsVersion(version) = settled.unwrap_or(hello.version);
    Some(version)
}
