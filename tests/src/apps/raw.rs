//! Exact bytes on one connection: what no well-behaved library would send.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::Pod;

/// Bytes that are told as text, with escapes as in a Rust string.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl Bytes {
    /// Reads `\r`, `\n`, `\t`, `\\`, `\'`, `\"`, `\0` and `\xNN` back into bytes.
    pub fn unescape(text: &str) -> Result<Self> {
        let mut bytes = Vec::with_capacity(text.len());
        let mut rest = text.bytes();
        while let Some(byte) = rest.next() {
            if byte != b'\\' {
                bytes.push(byte);
                continue;
            }
            bytes.push(match rest.next() {
                Some(b'r') => b'\r',
                Some(b'n') => b'\n',
                Some(b't') => b'\t',
                Some(b'0') => 0,
                Some(b'x') => {
                    let mut digit = || char::from(rest.next().unwrap_or(b'?')).to_digit(16);
                    let (high, low) = (digit(), digit());
                    let number = high.zip(low).map(|(high, low)| (high * 16 + low) as u8);
                    number.with_context(|| format!("\\x wants two digits: {text}"))?
                }
                Some(byte @ (b'\\' | b'\'' | b'"')) => byte,
                other => bail!("no such escape: {:?} in {text}", other.map(char::from)),
            });
        }
        Ok(Self(bytes))
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "b\"{}\"", self.0.escape_ascii())
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0.escape_ascii())
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::unescape(&text).map_err(serde::de::Error::custom)
    }
}

/// What came back on a raw connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RawAnswer {
    /// Everything that was received.
    pub received: Bytes,
    /// How it ended.
    pub end: RawEnd,
    /// The error of a write, where the other side would not take it all.
    pub write_error: Option<String>,
    /// Bytes sent.
    pub sent: u64,
    /// How long the connection was open.
    pub millis: u64,
}

/// How a raw connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RawEnd {
    /// The other side ended its stream.
    Closed,
    /// The other side reset the connection.
    Reset,
    /// Nothing ended it within the time limit.
    Open,
    /// The script left by itself.
    Left,
}

impl RawAnswer {
    /// What was received, as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.received.0).into_owned()
    }

    /// The statuses of the HTTP/1.x responses in it, in their order: of every line that begins with `HTTP/1.`.
    pub fn statuses(&self) -> Vec<u16> {
        let text = self.text();
        let lines = text.split("HTTP/1.").skip(1);
        lines.filter_map(|line| line.split(' ').nth(1)?.get(..3)?.parse().ok()).collect()
    }
}

/// A connection with a script: steps are taken one after the other, then it is read until the other side ends it.
#[derive(Debug, Clone)]
#[must_use = "a script runs with `run`"]
pub struct Raw<'a> {
    pod: &'a Pod,
    to: SocketAddr,
    steps: Vec<String>,
    limit: Duration,
}

impl Pod {
    /// Begins a script of exact bytes on one connection.
    pub fn raw(&self, to: SocketAddr) -> Raw<'_> {
        Raw { pod: self, to, steps: Vec::new(), limit: Duration::from_secs(10) }
    }
}

impl Raw<'_> {
    fn step(mut self, step: String) -> Self {
        self.steps.push(step);
        self
    }

    /// Sends these bytes in one write.
    pub fn send(self, bytes: impl AsRef<[u8]>) -> Self {
        self.step(format!("send:{}", bytes.as_ref().escape_ascii()))
    }

    /// Sends these bytes `count` times.
    pub fn repeat(self, count: u64, bytes: impl AsRef<[u8]>) -> Self {
        self.step(format!("repeat:{count}:{}", bytes.as_ref().escape_ascii()))
    }

    /// Sends these bytes one by one, with this time before each.
    pub fn drip(self, every: Duration, bytes: impl AsRef<[u8]>) -> Self {
        self.step(format!("drip:{}:{}", every.as_millis(), bytes.as_ref().escape_ascii()))
    }

    /// Waits until these bytes were received, after all that earlier steps waited for.
    pub fn expect(self, bytes: impl AsRef<[u8]>) -> Self {
        self.step(format!("expect:{}", bytes.as_ref().escape_ascii()))
    }

    /// Sends nothing for this time.
    pub fn pause(self, time: Duration) -> Self {
        self.step(format!("pause:{}", time.as_millis()))
    }

    /// Reads nothing for this time, so that what comes fills every buffer on the way.
    pub fn deaf(self, time: Duration) -> Self {
        self.step(format!("deaf:{}", time.as_millis()))
    }

    /// Reads at most 16 KiB after each `every`, so many times.
    pub fn sip(self, every: Duration, times: u64) -> Self {
        self.step(format!("sip:{}:{times}", every.as_millis()))
    }

    /// Ends the write side.
    pub fn finish(self) -> Self {
        self.step("finish".to_owned())
    }

    /// Closes the connection without reading to its end.
    pub fn leave(self) -> Self {
        self.step("leave".to_owned())
    }

    /// Resets the connection.
    pub fn reset(self) -> Self {
        self.step("reset".to_owned())
    }

    /// How long all of it may take (10 s); what came until then is the answer.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Connects and runs the script.
    pub async fn run(self) -> Result<RawAnswer> {
        let (to, limit) = (self.to.to_string(), self.limit.as_millis().to_string());
        let mut args = vec!["raw", &to, "--limit-ms", &limit, "--"];
        args.extend(self.steps.iter().map(String::as_str));
        self.pod.client_within(self.limit + super::CLIENT_LIMIT, &args).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_survives_the_escape() -> Result<()> {
        let all: Vec<u8> = (0..=u8::MAX).collect();
        assert_eq!(Bytes::unescape(&all.escape_ascii().to_string())?.0, all);
        for wrong in ["\\", "\\q", "\\x1", "\\xg0"] {
            assert!(Bytes::unescape(wrong).is_err(), "{wrong}");
        }
        Ok(())
    }

    #[test]
    fn statuses_are_read_in_order() {
        let received =
            Bytes(b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\n\r\nhiHTTP/1.0 400 Bad\r\n".into());
        let answer = RawAnswer { received, end: RawEnd::Closed, write_error: None, sent: 0, millis: 0 };
        assert_eq!(answer.statuses(), [103, 200, 400]);
    }
}
