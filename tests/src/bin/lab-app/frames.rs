//! Frames of HTTP/2, as bytes and back: for clients and servers that break the protocol's rules on purpose.

use tokio::io::{self, AsyncRead, AsyncReadExt as _};

/// What a client's connection begins with.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const CONTINUATION: u8 = 9;

/// Of `SETTINGS` and `PING`.
pub const ACK: u8 = 1;
/// Of `DATA` and `HEADERS`.
pub const END_STREAM: u8 = 1;
/// Of `HEADERS` and `CONTINUATION`.
pub const END_HEADERS: u8 = 4;

/// The setting for a stream's first window.
pub const WINDOW_UPDATE: u8 = 8;
pub const INITIAL_WINDOW_SIZE: u16 = 4;

/// Length, type, flags and stream.
const HEAD: usize = 9;

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    pub fn new(kind: u8, flags: u8, stream: u32, payload: impl Into<Vec<u8>>) -> Self {
        Self { kind, flags, stream, payload: payload.into() }
    }

    /// `SETTINGS` with these values.
    pub fn settings(values: &[(u16, u32)]) -> Self {
        let payload: Vec<u8> = values
            .iter()
            .flat_map(|(id, value)| [&id.to_be_bytes()[..], &value.to_be_bytes()[..]].concat())
            .collect();
        Self::new(SETTINGS, 0, 0, payload)
    }

    pub fn encode(&self) -> Vec<u8> {
        let length = (self.payload.len() as u32).to_be_bytes();
        let mut bytes = vec![length[1], length[2], length[3], self.kind, self.flags];
        bytes.extend(self.stream.to_be_bytes());
        bytes.extend(&self.payload);
        bytes
    }

    /// Reads the next frame.
    pub async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Self> {
        let mut head = [0; HEAD];
        from.read_exact(&mut head).await?;
        let [a, b, c, kind, flags, stream @ ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        from.read_exact(&mut payload).await?;
        Ok(Self { kind, flags, stream: u32::from_be_bytes(stream) & 0x7fff_ffff, payload })
    }

    /// Four bytes of the payload as a number; 0 where it is too short.
    pub fn number(&self, at: usize) -> u32 {
        let bytes = self.payload.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u32::from_be_bytes)
    }
}

/// Header blocks in which no name or value is compressed and no table is touched.
pub fn literals(headers: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in headers {
        block.push(0);
        string(&mut block, name.as_bytes());
        string(&mut block, value.as_bytes());
    }
    block
}

/// A header that goes into the dynamic table.
pub fn indexed(name: &str, value: &str) -> Vec<u8> {
    let mut block = vec![0x40];
    string(&mut block, name.as_bytes());
    string(&mut block, value.as_bytes());
    block
}

/// A string, not Huffman-coded: its length in the integers of HPACK with seven bits of prefix, and itself.
fn string(block: &mut Vec<u8>, bytes: &[u8]) {
    let mut length = bytes.len();
    if length < 127 {
        block.push(length as u8);
    } else {
        block.push(127);
        length -= 127;
        while length >= 128 {
            block.push((length % 128) as u8 | 0x80);
            length /= 128;
        }
        block.push(length as u8);
    }
    block.extend(bytes);
}

#[cfg(test)]
mod tests {
    use anyhow::Result;

    use super::*;

    #[tokio::test]
    async fn a_frame_is_read_as_it_was_written() -> Result<()> {
        let frame = Frame::new(GOAWAY, 0, 0, [0, 0, 0, 7, 0, 0, 0, 11]);
        let bytes = frame.encode();
        assert_eq!(bytes[..HEAD], [0, 0, 8, GOAWAY, 0, 0, 0, 0, 0]);
        let read = Frame::read(&mut bytes.as_slice()).await?;
        assert_eq!((read.number(0), read.number(4), read.number(5)), (7, 11, 0));
        assert_eq!(read, frame);
        assert!(Frame::read(&mut &bytes[..12]).await.is_err());
        Ok(())
    }

    #[test]
    fn settings_and_strings_have_their_lengths() {
        assert_eq!(Frame::settings(&[(4, 1), (3, 2)]).payload, [0, 4, 0, 0, 0, 1, 0, 3, 0, 0, 0, 2]);
        assert_eq!(literals(&[("a", "bc")]), b"\0\x01a\x02bc");
        // RFC 7541, C.1.2: 1337 after a prefix of seven bits.
        let long = "x".repeat(1337);
        assert_eq!(literals(&[("a", &long)])[3..6], [127, 0xba, 0x09]);
    }
}
