//! HTTP/1.1 of the benchmarks' own clients: one request, and the least that tells where its answer ends.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, bail, ensure};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// A head and a body of the benchmarks have room in it.
const BUFFER: usize = 16 << 10;
const HEAD_END: &[u8] = b"\r\n\r\n";

/// A kept connection.
pub struct Connection {
    stream: TcpStream,
    request: Vec<u8>,
    buffer: Vec<u8>,
}

impl Connection {
    pub async fn open(server: SocketAddr, host: &str) -> Result<Self> {
        let stream = TcpStream::connect(server).await.with_context(|| format!("connecting to {server}"))?;
        stream.set_nodelay(true)?;
        let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").into_bytes();
        Ok(Self { stream, request, buffer: Vec::new() })
    }

    /// Asks, and reads all of the answer, which has to be 200. What was read into is given back: a connection that is
    /// idle holds nothing.
    pub async fn ask(&mut self) -> Result<()> {
        self.stream.write_all(&self.request).await?;
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.clear();
        buffer.reserve(BUFFER);
        let end = loop {
            let read = self.stream.read_buf(&mut buffer).await?;
            ensure!(read > 0, "the connection ended within an answer");
            if let Some(end) = end(&buffer)? {
                break end;
            }
        };
        ensure!(end == buffer.len(), "{} bytes after the answer", buffer.len() - end);
        self.buffer = buffer;
        Ok(())
    }

    /// Gives up the memory for the next answer.
    pub fn rest(&mut self) {
        self.buffer = Vec::new();
    }
}

/// How long the answer is, once its head is there and all of its body.
fn end(bytes: &[u8]) -> Result<Option<usize>> {
    let Some(head) = bytes.windows(HEAD_END.len()).position(|window| window == HEAD_END) else {
        return Ok(None);
    };
    let text = std::str::from_utf8(&bytes[..head])?;
    ensure!(text.starts_with("HTTP/1.1 200 "), "answered {text:?}");
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    for (name, value) in lines {
        if name.eq_ignore_ascii_case("content-length") {
            let end = head + HEAD_END.len() + value.trim().parse::<usize>()?;
            return Ok((bytes.len() >= end).then_some(end));
        }
    }
    bail!("an answer without content-length: {text:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_ends_where_its_length_says() {
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc";
        assert_eq!(end(answer).ok(), Some(Some(answer.len())));
        assert_eq!(end(&answer[..answer.len() - 1]).ok(), Some(None));
        assert_eq!(end(b"HTTP/1.1 200 OK\r\n").ok(), Some(None));
        assert!(end(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n").is_err());
        assert!(end(b"HTTP/1.1 200 OK\r\n\r\n").is_err());
    }
}
