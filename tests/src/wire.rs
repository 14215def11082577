//! What a [`Recording`] of the wire holds: TCP segments, and what TLS servers agreed to; and what an HTTP/2 server has
//! said, frame by frame.
//!
//! Promises: judges only whole frames; what cannot be parsed is no segment. Tested below and by every test that asserts
//! on the wire.

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

/// What opens an HTTP/2 connection, from its client (RFC 9113 §3.4).
pub const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// A frame that no connection may begin with: CONTINUATION without a HEADERS before it, of stream 0 at that.
pub const H2_STRAY_CONTINUATION: &[u8] = b"\x00\x00\x00\x09\x00\x00\x00\x00\x00";

/// One HTTP/2 frame (RFC 9113 §4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct H2Frame<'a> {
    /// Its type.
    pub kind: u8,
    /// What it carries.
    pub payload: &'a [u8],
}

impl H2Frame<'_> {
    /// Type of HEADERS.
    pub const HEADERS: u8 = 1;
    /// Type of GOAWAY.
    pub const GOAWAY: u8 = 7;

    /// The error code, if this is a GOAWAY (RFC 9113 §6.8); 0 says that there was no error.
    pub fn goaway_code(&self) -> Option<u32> {
        let code = self.payload.get(4..)?.first_chunk().filter(|_| self.kind == Self::GOAWAY)?;
        Some(u32::from_be_bytes(*code))
    }
}

/// The whole frames that a server's bytes begin with.
pub fn h2_frames(mut bytes: &[u8]) -> Vec<H2Frame<'_>> {
    let mut frames = Vec::new();
    while let Some(([a, b, c, kind, ..], rest)) = bytes.split_first_chunk::<9>() {
        let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
        let Some((payload, after)) = rest.split_at_checked(length) else { break };
        frames.push(H2Frame { kind: *kind, payload });
        bytes = after;
    }
    frames
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_whole_and_goaway_has_its_code() {
        let settings = b"\0\0\x06\x04\0\0\0\0\0\0\x03\0\0\0\x64";
        let goaway = b"\0\0\x08\x07\0\0\0\0\0\0\0\0\0\0\0\0\x01";
        let bytes = [settings.as_slice(), goaway].concat();
        let frames = h2_frames(&bytes);
        assert_eq!(frames.iter().map(|frame| frame.kind).collect::<Vec<_>>(), [4, H2Frame::GOAWAY]);
        assert_eq!(frames.iter().map(H2Frame::goaway_code).collect::<Vec<_>>(), [None, Some(1)]);
        assert_eq!(h2_frames(&bytes[..bytes.len() - 1]).len(), 1, "half a frame is none");
        assert!(h2_frames(b"").is_empty());
    }
}
