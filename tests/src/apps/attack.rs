//! Abuse of HTTP/2, bounded in frames and time, and only against the address that is given.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use anyhow::Result;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::Bytes;
use crate::Pod;

/// What the server is bothered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum AttackKind {
    /// Requests that are reset at once: `HEADERS`, `RST_STREAM`, again and again (two frames each).
    RapidReset,
    /// One request whose header block goes on in `CONTINUATION` frames without end.
    ContinuationFlood,
    /// `SETTINGS` that all want to be acknowledged.
    SettingsFlood,
    /// `PING`s that all want to be answered.
    PingFlood,
    /// Requests whose answers may not be sent: every window stays 0.
    ZeroWindow,
    /// Requests whose answers may be of any size: every window is as large as can be.
    OpenWindows,
    /// Requests whose few bytes of HPACK stand for very many bytes of headers.
    HeaderBomb,
    /// A request's body of empty `DATA` frames without end.
    EmptyDataFlood,
    /// Requests that are begun and never finished.
    OpenStreams,
}

/// What an attack did, and how it ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attack {
    /// What it was.
    pub kind: AttackKind,
    /// Frames of the attack that were written: what went out before the server closed, or the whole count.
    pub frames_sent: u64,
    /// Bytes of them.
    pub bytes_sent: u64,
    /// How the server ended it.
    pub end: End,
    /// What the server's `GOAWAY` said, if one came (the last one, where there were several).
    pub goaway: Option<Goaway>,
    /// `RST_STREAM` frames received, by code.
    pub resets: BTreeMap<u32, u64>,
    /// Header blocks received: how many streams were answered.
    pub answers: u64,
    /// Bytes of `DATA` received.
    pub data_bytes: u64,
    /// Frames received.
    pub frames_received: u64,
    /// How long it took.
    pub millis: u64,
}

/// A `GOAWAY`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Goaway {
    /// The error code: 11 is `ENHANCE_YOUR_CALM`.
    pub code: u32,
    /// The last stream that was or may be processed.
    pub last_stream: u32,
    /// Its debug data.
    pub debug: Bytes,
}

/// How the server ended an attack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// It closed the connection; whether after a `GOAWAY` is said beside.
    Closed,
    /// It reset the connection.
    Reset,
    /// It took everything, and still answers on the connection.
    Survived,
    /// It keeps the connection and answers nothing any more.
    Silent,
}

impl Pod {
    /// Attacks an address of the lab: at most `count` frames (or streams) and `limit` of time. `args` are those of
    /// `lab-app h2-attack`, for example `--path=/pattern/1000000`, `--deaf` (reads nothing until the end).
    pub async fn h2_attack(
        &self,
        to: SocketAddr,
        kind: AttackKind,
        count: u64,
        limit: Duration,
        args: &[&str],
    ) -> Result<Attack> {
        let name = kind.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
        let (to, count, millis) = (to.to_string(), count.to_string(), limit.as_millis().to_string());
        let mut all = vec!["h2-attack", &name, &to, "--count", &count, "--limit-ms", &millis];
        all.extend(args);
        self.client_within(limit + super::CLIENT_LIMIT, &all).await
    }
}
