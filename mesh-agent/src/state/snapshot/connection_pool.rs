//! `connectionPool` of a cluster: how many connections and requests it may have, and how its connections are kept.
//!
//! What is `None` is unlimited, unless it says otherwise. Tested through `resource/connection_pool.rs` (what is written),
//! `upstream/usage.rs` and `upstream/pool.rs` (what it comes to).

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// `connectionPool` with nothing left to be looked up. Limits hold for each client pod on its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ConnectionPool {
    /// `tcp.maxConnections`: byte streams, and requests under way over HTTP/1, at a time.
    pub connections: Option<u32>,
    /// `tcp.tcpKeepalive`.
    pub keepalive: Option<TcpKeepalive>,
    /// `tcp.maxConnectionDuration`.
    pub max_duration: Option<Duration>,
    /// `tcp.idleTimeout`: a byte stream on which nothing moves for so long is closed.
    pub stream_idle: Option<Duration>,
    /// `http.http1MaxPendingRequests`: requests that wait for a connection, at a time.
    pub pending: Option<u32>,
    /// `http.http2MaxRequests`: requests under way over either version, at a time.
    pub requests: Option<u32>,
    /// `http.maxRequestsPerConnection`.
    pub requests_per_connection: Option<u32>,
    /// `http.maxRetries`: retries at a time, in the place of the budget.
    pub retries: Option<u32>,
    /// `http.idleTimeout`: what becomes of a connection that waits for its next request.
    pub idle: Idle,
    /// `http.maxConcurrentStreams`: requests on one HTTP/2 connection, at a time.
    pub streams: Option<u32>,
    /// `http.h2UpgradePolicy` is `UPGRADE`: HTTP/2, whatever the port declares.
    pub upgrade: bool,
    /// `http.useClientProtocol`: what the client speaks, whatever the port declares.
    pub client_protocol: bool,
    /// `http.http2KeepAlive`.
    pub pings: Option<Pings>,
}

/// `http.http2KeepAlive`: HTTP/2 connections are asked whether anybody is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pings {
    /// `interval` between an answer and the next PING.
    pub interval: Duration,
    /// `timeout`: a PING without an answer for so long ends the connection.
    pub timeout: Duration,
}

/// How long a connection may wait for its next request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Idle {
    /// As long as the agent finds good.
    #[default]
    Default,
    /// So long.
    After(Duration),
    /// For good (`0s`).
    Never,
}

/// `tcp.tcpKeepalive`; what is `None` is the kernel's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TcpKeepalive {
    /// `time`: how long nothing has to come before the first probe.
    pub time: Option<Duration>,
    /// `interval` between probes.
    pub interval: Option<Duration>,
    /// `probes` without an answer that end the connection.
    pub probes: Option<u32>,
}

impl ConnectionPool {
    /// Nothing is limited, and connections are kept as long as the agent finds good.
    pub const UNLIMITED: Self = Self {
        connections: None,
        keepalive: None,
        max_duration: None,
        stream_idle: None,
        pending: None,
        requests: None,
        requests_per_connection: None,
        retries: None,
        idle: Idle::Default,
        streams: None,
        upgrade: false,
        client_protocol: false,
        pings: None,
    };

    /// Whether anything is to be counted.
    pub const fn counts(&self) -> bool {
        self.connections.is_some()
            || self.pending.is_some()
            || self.requests.is_some()
            || self.retries.is_some()
    }
}

/// What tells clusters apart for as long as the agent runs, through all snapshots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ClusterId(u64);

impl Default for ClusterId {
    /// One that no other cluster has.
    fn default() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}
