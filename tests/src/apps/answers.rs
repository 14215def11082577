//! What apps and clients say: the JSON that `lab-app` prints and the HTTP app answers with, as types.

use std::{collections::BTreeMap, net::SocketAddr};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::POD_HEADER;

/// What the HTTP app answers with: the request as it arrived.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Echo {
    /// Which pod answered.
    pub pod: String,
    /// The method.
    pub method: String,
    /// Path and query.
    pub target: String,
    /// `HTTP/1.1` or `HTTP/2.0`.
    pub version: String,
    /// `Host`, or `:authority`.
    pub authority: String,
    /// Headers by lower-case name; several values are joined by `, `.
    pub headers: BTreeMap<String, String>,
    /// Size of the body.
    pub body_bytes: u64,
    /// Trailers, likewise.
    pub trailers: BTreeMap<String, String>,
    /// Which of the app's connections it came on, from 1 in the order of `accept`.
    pub connection: u64,
    /// Which request of that connection it was, from 1.
    pub request: u64,
    /// What `accept` returned as the peer.
    pub peer: SocketAddr,
    /// What `getsockname` says of the accepted socket.
    pub local: SocketAddr,
}

/// What an HTTP client saw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The statuses of the informational answers before it (seen over HTTP/1.1 only).
    pub informational: Vec<u16>,
    /// `HTTP/1.1` or `HTTP/2.0`.
    pub version: String,
    /// Headers by lower-case name; several values are joined by `, `.
    pub headers: BTreeMap<String, String>,
    /// Trailers, likewise.
    pub trailers: BTreeMap<String, String>,
    /// The body, or the first mebibyte of it.
    pub body: String,
    /// Size of the body.
    pub body_bytes: u64,
    /// `getpeername` of the client's socket.
    pub peer: SocketAddr,
    /// `getsockname` of the client's socket.
    pub local: SocketAddr,
}

impl Answer {
    /// The request as the HTTP app saw it.
    pub fn echo(&self) -> Result<Echo> {
        serde_json::from_str(&self.body)
            .with_context(|| format!("no echo but {}: {}", self.status, self.body))
    }

    /// Which pod answered, by its header.
    pub fn pod(&self) -> Option<&str> {
        self.headers.get(POD_HEADER).map(String::as_str)
    }
}

/// What came of many requests.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// How many were sent.
    pub sent: u64,
    /// Answers by status.
    pub statuses: BTreeMap<u16, u64>,
    /// Answers by pod (or by another header that was asked for).
    pub pods: BTreeMap<String, u64>,
    /// Requests without an answer, by reason.
    pub errors: BTreeMap<String, u64>,
}

/// What a TCP client saw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpAnswer {
    /// Bytes sent before the write side was shut down.
    pub sent: u64,
    /// Bytes that came back, but for greeting and report.
    pub received: u64,
    /// Whether what came back is what was sent.
    pub intact: bool,
    /// The first line, where the server speaks first.
    pub greeting: Option<String>,
    /// What the server says of the connection, where it was asked to.
    pub report: Option<TcpReport>,
    /// `getpeername` of the client's socket.
    pub peer: SocketAddr,
    /// `getsockname` of the client's socket.
    pub local: SocketAddr,
}

/// What a TCP server saw of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpReport {
    /// Which pod.
    pub pod: String,
    /// What `accept` returned as the peer.
    pub peer: SocketAddr,
    /// What `getpeername` says of the accepted socket.
    pub peername: SocketAddr,
    /// What `getsockname` says of the accepted socket.
    pub local: SocketAddr,
    /// Bytes until the client's end of file.
    pub received: u64,
}

/// What a UDP client saw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UdpAnswer {
    /// Datagrams sent.
    pub sent: u64,
    /// Datagrams that came back as they were sent.
    pub received: u64,
}

/// What a gRPC client saw of the health service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrpcAnswer {
    /// The answer to `Check`, for example `SERVING`; with an error, its code, for example `NotFound`.
    pub check: String,
    /// Which pod answered it.
    pub pod: Option<String>,
    /// The messages of `Watch`.
    pub stream: Vec<String>,
    /// The code `Watch` ended with, for example `Ok`.
    pub ended: String,
}

/// What the HTTP app counted, as `/stats` answers it. The requests for `/stats` and `/release` are not in it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Requests by path and query.
    pub paths: BTreeMap<String, u64>,
    /// Requests by their header `x-lab-id`.
    pub ids: BTreeMap<String, u64>,
    /// Connections whose first request is counted here.
    pub connections: u64,
    /// Requests not answered to their end yet.
    pub open: u64,
    /// The most of them that there ever were.
    pub peak: u64,
    /// Requests that wait in `/hold`.
    pub held: u64,
    /// Requests whose client left before the end of the answer, by path and query.
    pub aborted: BTreeMap<String, u64>,
}

/// What `/consume` and `/read-slow` say of a body.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Consumed {
    /// Its size.
    pub bytes: u64,
    /// Whether it is the lab's pattern from its first byte to its last (see [`super::pattern`]).
    pub intact: bool,
    /// FNV-1a, 64 bits, of its first mebibyte.
    pub checksum: u64,
    /// How it broke off, if it did not come to its end.
    pub broken: Option<String>,
}

/// What came of an upload or a download.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transfer {
    /// The status of the answer.
    pub status: u16,
    /// Bytes of the body that were handed to the connection, or that came.
    pub bytes: u64,
    /// Whether they were the lab's pattern, as the one who received them says.
    pub intact: bool,
    /// How long it took.
    pub millis: u64,
    /// How it broke off, if it did.
    pub broken: Option<String>,
}

/// What many requests on one HTTP/2 connection saw.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Streams {
    /// Answers by status.
    pub statuses: BTreeMap<u16, u64>,
    /// Answers by pod.
    pub pods: BTreeMap<String, u64>,
    /// Streams without an answer, by reason.
    pub errors: BTreeMap<String, u64>,
    /// How the connection ended, if it ended by an error.
    pub connection: Option<String>,
}
