//! Connections that stop being HTTP: upgrades, WebSocket, CONNECT.

use std::net::SocketAddr;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::Bytes;
use crate::Pod;

/// What a WebSocket client saw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spoken {
    /// The status of the handshake: 101, or 200 over HTTP/2.
    pub status: u16,
    /// Which pod answered it.
    pub pod: Option<String>,
    /// The text messages that came back; nothing where the handshake was refused.
    pub messages: Vec<String>,
    /// Size of the binary message that came back.
    pub binary_bytes: u64,
    /// Whether a ping was answered.
    pub pong: bool,
    /// The code the server's close came with.
    pub close: Option<u16>,
}

/// What a client of a tunnel saw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tunnelled {
    /// The status: 101 for an upgrade, 200 for CONNECT.
    pub status: u16,
    /// Which pod answered.
    pub pod: Option<String>,
    /// What came first, of a server that names the authority it was asked for.
    pub greeting: Bytes,
    /// Bytes sent through the tunnel before its write side was ended.
    pub sent: u64,
    /// Bytes that came back.
    pub received: u64,
    /// Whether they are what was sent.
    pub intact: bool,
}

impl Pod {
    /// A WebSocket: the handshake, then texts, a binary message of 100,000 bytes, a ping, and the close, all of
    /// which the server is to answer. Over HTTP/2 by extended CONNECT if `h2c`.
    pub async fn websocket(&self, url: &str, h2c: bool, texts: &[&str]) -> Result<Spoken> {
        let mut args = vec!["ws", url];
        args.extend(h2c.then_some("--h2c"));
        args.extend(texts.iter().flat_map(|text| ["--text", text]));
        self.client(&args).await
    }

    /// HTTP/1.1 (or HTTP/2) CONNECT for `authority` to a proxy, then `bytes` bytes and back.
    pub async fn connect(&self, to: SocketAddr, authority: &str, bytes: u64, h2c: bool) -> Result<Tunnelled> {
        let (to, bytes) = (to.to_string(), bytes.to_string());
        let mut args = vec!["connect", &to, "--authority", authority, "--bytes", &bytes];
        args.extend(h2c.then_some("--h2c"));
        self.client(&args).await
    }

    /// HTTP/1.1 `Upgrade` to `protocol`, then `bytes` bytes and back.
    pub async fn upgrade(&self, url: &str, protocol: &str, bytes: u64) -> Result<Tunnelled> {
        let bytes = bytes.to_string();
        self.client(&["upgrade", url, "--protocol", protocol, "--bytes", &bytes]).await
    }
}
