//! Apps for pods, and clients that run inside pods: `lab-app` with types.
//!
//! Promises: a server is listening when [`Pod::serve`] returns; a client is a process of the pod, so that the kernel
//! sees what it would see of any app, and says what it saw: answers, `getpeername`, `getsockname`. Everything is
//! bounded in time. Tested in `tests/lab.rs` and `tests/http_tools.rs`.

mod answers;
mod attack;
mod authorizer;
mod call;
mod load;
mod pattern;
mod raw;
mod request;
mod tunnel;

pub use answers::{
    Answer, Consumed, Echo, GrpcAnswer, Stats, Streams, Tally, TcpAnswer, TcpReport, Transfer, UdpAnswer,
};
pub use attack::{Attack, AttackKind, End, Goaway};
pub use authorizer::{Question, WANT, authorizer, questions};
pub use call::{Call, CallKind, Called, Note};
pub use load::{Load, LoadKind, Loaded};
pub use pattern::{Pattern, pattern};
pub use raw::{Bytes, Raw, RawAnswer, RawEnd};
pub use request::Request;
pub use tunnel::{Spoken, Tunnelled};

use std::{
    net::{Ipv4Addr, SocketAddr},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::de::DeserializeOwned;

use crate::{Pod, Process, binary, eventually, fetch::get_inside};

/// How long a client of `lab-app` may run, whatever it was told.
const CLIENT_LIMIT: Duration = Duration::from_mins(1);

/// The header by which the HTTP and gRPC apps name their pod.
pub const POD_HEADER: &str = "x-lab-pod";

/// A server to run in a pod.
#[derive(Debug, Clone)]
#[must_use = "an app runs once a pod serves it"]
pub struct App {
    args: Vec<String>,
}

/// HTTP/1.1 and HTTP/2 with prior knowledge on one port, both families: answers with an [`Echo`].
///
/// Paths that answer otherwise:
///
/// | | |
/// |---|---|
/// | `/status/N` | the echo with this status; without a body for 204 and 304 |
/// | `/fail-first/N` | 503 for the first N requests of that path and query |
/// | `/healthz` | the echo, with 503 from `/sick/1` until `/sick/0` was asked for |
/// | `/refuse/N` | this status at once, without reading the body |
/// | `/slow/MS` | the echo after this time |
/// | `/hold` | the echo once somebody asks for `/release`, which says how many it released |
/// | `/early-hints/N` | N (1) times 103 with a `Link`, then the echo |
/// | `/bytes/N`, `/pattern/N` | a body of N bytes, of `x` or of the lab's [`pattern()`] |
/// | `/header-bytes/N` | the echo with N bytes of headers more |
/// | `/mirror` | the body, streamed back |
/// | `/consume`, `/read-slow/RATE` | [`Consumed`]: the body read to its end, the latter at RATE bytes a second |
/// | `/trailers` | the echo with a trailer, and the request's own trailers back as trailers |
/// | `/cut` | breaks off within the body |
/// | `/reset/CODE`, `/reset-late/CODE` | `RST_STREAM` with the code (of TCP over HTTP/1.1), instead of an answer or within its body |
/// | `/goaway` | the echo, and no more on this connection: `GOAWAY`, or `Connection: close` |
/// | `/goaway/CODE` | `GOAWAY` with the code, no stream having been processed, and the end |
/// | `/upgrade` | 101 and an echo of bytes, for `Upgrade: lab-echo`; 426 for any other |
/// | `/ws` | a WebSocket that sends messages back, over HTTP/1.1 or extended CONNECT; the text `close` closes it |
/// | `/stats` | [`Stats`] |
///
/// `CONNECT` with any authority is answered 200, then one line with the authority and an echo of bytes. Options:
/// `--status=N`, `--delay-ms=N`, `--read-rate=N` (every body is read at N bytes a second), `--max-streams=N`.
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

/// Answers each connection with exactly these bytes, once it has read a request's head, and does as `then` says.
/// Several responses answer several requests of one connection, one each.
pub fn http1_raw(port: u16, responses: &[&[u8]], then: Then) -> App {
    let app = App::new("http1-raw", port).arg(format!("--then={}", then.name()));
    responses.iter().fold(app, |app, bytes| app.arg(format!("--response={}", bytes.escape_ascii())))
}

/// What a raw server does once it has sent all it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// Ends its side and reads on until the client ends.
    Close,
    /// Resets the connection.
    Reset,
    /// Keeps it open and sends no more.
    Keep,
}

impl Then {
    fn name(self) -> &'static str {
        match self {
            Self::Close => "close",
            Self::Reset => "reset",
            Self::Keep => "keep",
        }
    }
}

/// gRPC's health service: `Check`, and `Watch`, which streams as many messages as the service's name says
/// (`count/5`) and ends; both wait first with `slow/MS`. And `lab.Notes`, with a method of each of the four kinds
/// (see [`CallKind`]). It tells the `grpc-timeout` it saw, and never acts on it.
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
        Request::new(self, url.into())
    }

    /// GETs a URL with these headers.
    pub async fn http_get(&self, url: &str, headers: &[(&str, &str)]) -> Result<Answer> {
        let request = self.get(url);
        headers.iter().fold(request, |request, (name, value)| request.header(name, value)).send().await
    }

    /// What the HTTP app of this pod has counted, asked from inside the pod and past the mesh.
    pub async fn stats(&self, port: u16) -> Result<Stats> {
        let (status, body) = get_inside(self.netns(), loopback(port), "/stats").await?;
        ensure!(status.is_success(), "/stats answered {status}: {body}");
        serde_json::from_str(&body).with_context(|| format!("no statistics: {body}"))
    }

    /// Answers the requests that the HTTP app of this pod holds, and says how many those were.
    pub async fn release(&self, port: u16) -> Result<u64> {
        let (status, body) = get_inside(self.netns(), loopback(port), "/release").await?;
        ensure!(status.is_success(), "/release answered {status}: {body}");
        body.parse().with_context(|| format!("no number: {body}"))
    }

    /// Says what `/healthz` of the HTTP app of this pod answers from now on, from inside the pod and past the mesh.
    pub async fn set_sick(&self, port: u16, sick: bool) -> Result<()> {
        let path = format!("/sick/{}", u8::from(sick));
        let (status, body) = get_inside(self.netns(), loopback(port), &path).await?;
        ensure!(status.is_success(), "{path} answered {status}: {body}");
        Ok(())
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
        self.client_within(CLIENT_LIMIT, args).await
    }

    async fn client_within<T: DeserializeOwned>(&self, limit: Duration, args: &[&str]) -> Result<T> {
        let mut command = lab_app()?;
        command.args(args);
        let output = self.run_within(limit, command).await?;
        let said = output.stderr.trim_end();
        ensure!(output.status.success(), "{} {}: {said}", self.name(), args[0]);
        serde_json::from_str(&output.stdout).with_context(|| format!("not an answer: {}", output.stdout))
    }
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

fn lab_app() -> Result<Command> {
    Ok(Command::new(binary("lab-app", "MESH_LAB_APP", "lab")?))
}
