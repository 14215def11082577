//! HTTP requests from a pod, made one option at a time.

use std::time::Duration;

use anyhow::Result;

use super::{Answer, POD_HEADER, Streams, Tally, Transfer};
use crate::Pod;

/// How long ten gibibytes may take on a slow machine.
const TRANSFER_LIMIT: Duration = Duration::from_mins(10);

/// A request from a pod.
#[derive(Debug, Clone)]
#[must_use = "a request goes out with `send` or `many`"]
pub struct Request<'a> {
    pod: &'a Pod,
    url: String,
    args: Vec<String>,
}

impl<'a> Request<'a> {
    pub(super) fn new(pod: &'a Pod, url: String) -> Self {
        Self { pod, url, args: Vec::new() }
    }

    fn args(mut self, args: [&str; 2]) -> Self {
        self.args.extend(args.map(str::to_owned));
        self
    }

    /// Adds a header. `host` sets `Host`, or `:authority`.
    pub fn header(self, name: &str, value: &str) -> Self {
        self.args(["--header", &format!("{name}: {value}")])
    }

    /// The method (GET).
    pub fn method(self, method: &str) -> Self {
        self.args(["--method", method])
    }

    /// Sends a body of this many bytes.
    pub fn body_bytes(self, bytes: u64) -> Self {
        self.args(["--body-bytes", &bytes.to_string()])
    }

    /// Sends a trailer after the body: chunked over HTTP/1.1.
    pub fn trailer(self, name: &str, value: &str) -> Self {
        self.args(["--trailer", &format!("{name}: {value}")])
    }

    /// Speaks HTTP/2 with prior knowledge.
    pub fn h2c(mut self) -> Self {
        self.args.push("--h2c".to_owned());
        self
    }

    /// Gives up after this (20 s; uploads and downloads never, and say how far they came).
    pub fn timeout(self, limit: Duration) -> Self {
        self.args(["--timeout-ms", &limit.as_millis().to_string()])
    }

    /// Sends it. A status of any kind is an answer; no answer is an error.
    pub async fn send(self) -> Result<Answer> {
        let mut args = vec!["get", &self.url];
        args.extend(self.args.iter().map(String::as_str));
        self.pod.client(&args).await
    }

    /// Sends it `count` times, `at_once` at a time, each on a connection of its own, and counts the answers by
    /// status and by the value of `header` (by default the pod's name).
    pub async fn many(self, count: u64, at_once: u64, header: Option<&str>) -> Result<Tally> {
        let (count, at_once) = (count.to_string(), at_once.to_string());
        let mut args = vec!["many", &self.url, "--count", &count, "--at-once", &at_once];
        args.extend(["--by", header.unwrap_or(POD_HEADER)]);
        args.extend(self.args.iter().map(String::as_str));
        self.pod.client(&args).await
    }

    /// Sends it `count` times on one HTTP/2 connection, at most `at_once` streams at a time.
    pub async fn streams(self, count: u64, at_once: u64) -> Result<Streams> {
        let (count, at_once) = (count.to_string(), at_once.to_string());
        let mut args = vec!["streams", &self.url, "--count", &count, "--at-once", &at_once];
        args.extend(self.args.iter().map(String::as_str));
        self.pod.client(&args).await
    }

    /// Sends this many bytes of the lab's pattern to a path that answers as `/consume` does, in constant memory, at
    /// most `rate` bytes a second (0: as fast as it goes). Its size is not declared.
    pub async fn upload(self, bytes: u64, rate: u64) -> Result<Transfer> {
        self.transfer("upload", bytes, rate).await
    }

    /// Reads a body of this many bytes of the lab's pattern, as `/pattern/N` gives, in constant memory, at most
    /// `rate` bytes a second (0: as fast as it goes).
    pub async fn download(self, bytes: u64, rate: u64) -> Result<Transfer> {
        self.transfer("download", bytes, rate).await
    }

    async fn transfer(self, kind: &str, bytes: u64, rate: u64) -> Result<Transfer> {
        let (bytes, rate) = (bytes.to_string(), rate.to_string());
        let mut args = vec![kind, &self.url, "--bytes", &bytes, "--rate", &rate];
        args.extend(self.args.iter().map(String::as_str));
        self.pod.client_within(TRANSFER_LIMIT, &args).await
    }
}
