//! Apps for pods, and clients that run inside pods: `lab-app` with types.
//!
//! Promises: a server is listening when [`Pod::serve`] returns; a client is a process of the pod, so that the kernel
//! sees what it would see of any app, and says what it saw: answers, `getpeername`, `getsockname`. Everything is
//! bounded in time. Tested in `tests/lab.rs`.

use std::{collections::BTreeMap, net::SocketAddr, process::Command, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{Pod, Process, binary, eventually};

/// The header by which the HTTP and gRPC apps name their pod.
pub const POD_HEADER: &str = "x-lab-pod";

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

/// A server to run in a pod.
#[derive(Debug, Clone)]
#[must_use = "an app runs once a pod serves it"]
pub struct App {
    args: Vec<String>,
}

/// HTTP/1.1 and HTTP/2 with prior knowledge on one port, both families: answers with an [`Echo`]. Special paths:
/// `/status/N`, `/fail-first/N` (the first N requests of that path and query get 503), `/slow/MS`, `/bytes/N`,
/// `/mirror` (streams the body back), `/trailers`, `/cut` (breaks off within the body), `/stats`.
pub fn http(port: u16) -> App {
    App::new("http", port)
}

/// Echoes bytes until the client's end of file, then closes.
pub fn tcp_echo(port: u16) -> App {
    App::new("tcp-echo", port)
}

/// Greets with a line before the client has said anything, then echoes.
pub fn server_first(port: u16) -> App {
    App::new("server-first", port)
}

/// Swallows bytes until the client's end of file, then reports.
pub fn sink(port: u16) -> App {
    App::new("sink", port)
}

/// Echoes datagrams.
pub fn udp_echo(port: u16) -> App {
    App::new("udp-echo", port)
}

/// gRPC's health service: `Check`, and `Watch`, which streams as many messages as the service's name says
/// (`count/5`) and ends.
pub fn grpc(port: u16) -> App {
    App::new("grpc", port)
}

impl App {
    fn new(kind: &str, port: u16) -> Self {
        Self { args: vec![kind.to_owned(), "--listen".to_owned(), format!("[::]:{port}")] }
    }

    /// Listens on this address instead of on all of both families.
    pub fn listen(mut self, address: SocketAddr) -> Self {
        self.args[2] = address.to_string();
        self
    }

    /// Adds an argument of `lab-app`, for example `--status=503` for an HTTP app that always fails, or `--report`
    /// for a TCP app that says in the end what it saw.
    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.args.push(arg.into());
        self
    }
}

impl Pod {
    /// Starts a server in the pod and waits until it listens.
    pub async fn serve(&self, app: App) -> Result<Process> {
        let mut command = lab_app()?;
        command.args(&app.args).args(["--name", self.name()]);
        let process = self.spawn(command)?;
        eventually("an app that listens", async || {
            if process.stdout().contains("listening") || process.status().is_some() {
                return Ok(());
            }
            bail!("{} does not listen yet", process.label())
        })
        .await?;
        ensure!(process.status().is_none(), "{} has ended\n{}", process.label(), process.tail());
        Ok(process)
    }

    /// Begins a request from this pod to a URL with an address.
    pub fn get(&self, url: impl Into<String>) -> Request<'_> {
        Request { pod: self, url: url.into(), args: Vec::new() }
    }

    /// GETs a URL with these headers.
    pub async fn http_get(&self, url: &str, headers: &[(&str, &str)]) -> Result<Answer> {
        let request = self.get(url);
        headers.iter().fold(request, |request, (name, value)| request.header(name, value)).send().await
    }

    /// Connects, sends `bytes` bytes, shuts down its write side, reads to the end. `args` are those of
    /// `lab-app tcp`, for example `--greeting`, `--report`, `--sink`.
    pub async fn tcp(&self, to: SocketAddr, bytes: u64, args: &[&str]) -> Result<TcpAnswer> {
        let (to, bytes) = (to.to_string(), bytes.to_string());
        let mut all = vec!["tcp", &to, "--bytes", &bytes];
        all.extend(args);
        self.client(&all).await
    }

    /// Sends `count` datagrams of `size` bytes, each after the last came back or was given up.
    pub async fn udp(&self, to: SocketAddr, count: u64, size: u64) -> Result<UdpAnswer> {
        self.client(&["udp", &to.to_string(), "--count", &count.to_string(), "--size", &size.to_string()])
            .await
    }

    /// Calls `Check` and `Watch` of gRPC's health service, for this service name.
    pub async fn grpc(&self, url: &str, service: &str) -> Result<GrpcAnswer> {
        self.client(&["grpc-client", url, "--service", service]).await
    }

    /// Runs a client of `lab-app` in the pod and reads what it says.
    async fn client<T: DeserializeOwned>(&self, args: &[&str]) -> Result<T> {
        let mut command = lab_app()?;
        command.args(args);
        let output = self.run(command).await?;
        let said = output.stderr.trim_end();
        ensure!(output.status.success(), "{} {}: {said}", self.name(), args[0]);
        serde_json::from_str(&output.stdout).with_context(|| format!("not an answer: {}", output.stdout))
    }
}

/// A request from a pod.
#[derive(Debug, Clone)]
#[must_use = "a request goes out with `send` or `many`"]
pub struct Request<'a> {
    pod: &'a Pod,
    url: String,
    args: Vec<String>,
}

impl Request<'_> {
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

    /// Speaks HTTP/2 with prior knowledge.
    pub fn h2c(mut self) -> Self {
        self.args.push("--h2c".to_owned());
        self
    }

    /// Gives up after this (20 s).
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
}

fn lab_app() -> Result<Command> {
    Ok(Command::new(binary("lab-app", "MESH_LAB_APP", "lab")?))
}
