//! Clients of the real world, run inside pods: curl, nghttp, Python's `requests`, `httpx` and `websockets`, and gRPC
//! in Go.
//!
//! Promises: a client is a process of the pod, so that the kernel sees what it would see of any app, and no setting of
//! the person who runs the tests (proxies, curlrc) reaches it; what it saw comes back as a value, errors included. The
//! clients are installed by `cargo xtask test`; their scripts and sources are in `tests/clients`. Tested in
//! `tests/real_clients.rs`.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;
use serde_json::Value;

use crate::{Output, Pod, apps::Echo, skip};

/// Debian's, whose modules the set-up installs.
pub(crate) const PYTHON: &str = "/usr/bin/python3";
/// Where the set-up puts the gRPC client, below the target directory.
const GRPC: &str = "tools/bin/lab-grpc-client";

/// What a test runs, to be asked for with [`require`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Client {
    /// curl, with HTTP/2.
    Curl,
    /// nghttp and h2load.
    Nghttp,
    /// Python's `requests`.
    Requests,
    /// Python's `httpx`, with `h2`.
    Httpx,
    /// Python's `websockets`.
    Websockets,
    /// google.golang.org/grpc.
    Grpc,
}

/// Whether all these clients are installed. Without one a test says so and returns, unless `MESH_REQUIRE_LAB=1` is set:
/// then this is an error. Without root it is the same, as for [`crate::require_root`].
pub fn require(clients: &[Client]) -> Result<bool> {
    if !crate::require_root()? {
        return Ok(false);
    }
    match clients.iter().find(|client| !client.is_installed()) {
        Some(client) => skip(&format!("{client:?} is not installed: `cargo xtask test` does that")),
        None => Ok(true),
    }
}

impl Client {
    fn is_installed(self) -> bool {
        let module = |name: &str| {
            Path::new(PYTHON).is_file() && Path::new("/usr/lib/python3/dist-packages").join(name).is_dir()
        };
        match self {
            Self::Curl => Path::new("/usr/bin/curl").is_file(),
            Self::Nghttp => {
                ["nghttp", "h2load"].iter().all(|name| Path::new("/usr/bin").join(name).is_file())
            }
            Self::Requests => module("requests"),
            Self::Httpx => module("httpx") && module("h2"),
            Self::Websockets => module("websockets"),
            Self::Grpc => grpc_client().is_ok(),
        }
    }
}

/// What curl says of all its transfers.
#[derive(Debug)]
pub struct Curled {
    /// One for each URL, in their order.
    pub transfers: Vec<Transferred>,
    /// The bodies, one after the other.
    pub stdout: String,
    /// The exit code: that of the last transfer.
    pub exit: Option<i32>,
}

/// What curl says of one transfer (`--write-out '%{json}'`), as far as tests look at it.
#[derive(Debug, Clone, Deserialize)]
pub struct Transferred {
    /// The status of the last answer; 0 if there was none.
    #[serde(rename = "http_code")]
    pub status: u16,
    /// `1.1`, `2`; `0` without an answer.
    #[serde(rename = "http_version")]
    pub version: String,
    /// Connections that this transfer had to open.
    #[serde(rename = "num_connects")]
    pub connects: u64,
    /// Bytes of the body received.
    #[serde(rename = "size_download")]
    pub received: u64,
    /// Bytes of the body sent.
    #[serde(rename = "size_upload")]
    pub sent: u64,
    /// What went wrong.
    #[serde(rename = "errormsg")]
    pub error: Option<String>,
    /// How long it took, in seconds.
    #[serde(rename = "time_total")]
    pub seconds: f64,
    /// The headers of the last answer by lower-case name.
    #[serde(skip)]
    pub headers: BTreeMap<String, Vec<String>>,
}

/// What a Python client saw in one of its steps.
#[derive(Debug, Clone, Deserialize)]
pub struct Step {
    /// The status.
    pub status: u16,
    /// `HTTP/1.1` or `HTTP/2`, where the library says so.
    #[serde(default)]
    pub version: String,
    /// Size of the body.
    pub bytes: u64,
    /// Which pod answered.
    pub pod: Option<String>,
    /// The answer, where it is an echo.
    pub echo: Option<Echo>,
}

/// What a WebSocket client in Python saw.
#[derive(Debug, Clone, Deserialize)]
pub struct Socket {
    /// The text that came back: `grüße`.
    pub text: String,
    /// Size of the binary message that came back: a million.
    pub binary_bytes: u64,
    /// The message that was sent in fragments: `in three pieces`.
    pub pieces: String,
    /// Which pod answered.
    pub pod: Option<String>,
    /// The code of the close.
    pub close: u16,
}

/// What the Go client saw of the health service.
#[derive(Debug, Clone, Deserialize)]
pub struct Health {
    /// `Check`.
    pub check: GoCall,
    /// `Watch`.
    pub watch: GoCall,
}

/// A call of the Go client.
#[derive(Debug, Clone, Deserialize)]
pub struct GoCall {
    /// The status code's name, for example `OK` or `DeadlineExceeded`.
    pub code: String,
    /// The status message.
    pub message: String,
    /// The messages that came before the end.
    pub messages: Vec<String>,
    /// Which pod answered; empty if none is known to have.
    pub pod: String,
    /// How long it took.
    pub ms: u64,
}

impl Pod {
    /// Runs curl with these arguments. A transfer that failed is told, not an error.
    pub async fn curl(&self, args: &[&str]) -> Result<Curled> {
        let mut curl = Command::new("/usr/bin/curl");
        curl.args([
            "--disable",
            "--silent",
            "--max-time",
            "20",
            "--write-out",
            "%{stderr}%{json}%{header_json}",
        ]);
        let Output { status, stdout, stderr } = self.run(alone(curl, args)).await?;
        let mut values = serde_json::Deserializer::from_str(&stderr).into_iter::<Value>();
        let mut transfers = Vec::new();
        while let Some(told) = values.next() {
            let told = told.with_context(|| format!("curl says {stderr}"))?;
            let mut transfer: Transferred = serde_json::from_value(told)?;
            let headers = values.next().context("curl tells of headers, if only that there are none")??;
            transfer.headers = serde_json::from_value(headers)?;
            transfers.push(transfer);
        }
        ensure!(!transfers.is_empty(), "curl ended with {status}: {stderr}");
        Ok(Curled { transfers, stdout, exit: status.code() })
    }

    /// Runs nghttp, which prints the frames it sees with `-v`. Says what it printed.
    pub async fn nghttp(&self, args: &[&str]) -> Result<String> {
        self.output(Command::new("/usr/bin/nghttp"), args).await
    }

    /// Runs h2load. Says what it printed, among it how many answers there were of each hundred of statuses.
    pub async fn h2load(&self, args: &[&str]) -> Result<String> {
        self.output(Command::new("/usr/bin/h2load"), args).await
    }

    /// A session of Python's `requests` against the HTTP app at `url`, with this host name. The steps by name.
    pub async fn requests(&self, url: &str, host: &str) -> Result<BTreeMap<String, Step>> {
        self.python("requests_client.py", &[url.trim_end_matches('/'), host]).await
    }

    /// Python's `httpx` against the HTTP app at `url`, over HTTP/2 with prior knowledge if `h2c`. The steps by name,
    /// and those that were made at once.
    pub async fn httpx(
        &self,
        url: &str,
        host: &str,
        h2c: bool,
    ) -> Result<(BTreeMap<String, Step>, Vec<Step>)> {
        let version = if h2c { "2" } else { "1" };
        let args = [url.trim_end_matches('/'), version, host];
        let mut steps: BTreeMap<String, Value> = self.python("httpx_client.py", &args).await?;
        let at_once = serde_json::from_value(steps.remove("at_once").context("nothing at once")?)?;
        let steps = steps.into_iter().map(|(name, step)| anyhow::Ok((name, serde_json::from_value(step)?)));
        Ok((steps.collect::<Result<_>>()?, at_once))
    }

    /// Python's `websockets` against a WebSocket that sends messages back, with a `ws://` URL.
    pub async fn websockets(&self, url: &str) -> Result<Socket> {
        self.python("websockets_client.py", &[url]).await
    }

    /// gRPC in Go: `Check` and `Watch` of the gRPC app at `address` (`HOST:PORT`), each with this deadline.
    pub async fn go_grpc(&self, address: &str, service: &str, deadline: Duration) -> Result<Health> {
        let deadline = format!("{}ms", deadline.as_millis());
        let args = ["-address", address, "-service", service, "-deadline", &deadline];
        let said = self.output(Command::new(grpc_client()?), &args).await?;
        serde_json::from_str(&said).with_context(|| format!("the gRPC client says {said}"))
    }

    async fn python<T: for<'de> Deserialize<'de>>(&self, script: &str, args: &[&str]) -> Result<T> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients").join(script);
        let mut python = Command::new(PYTHON);
        // Isolated: no variables, no modules but Debian's; and nothing is written beside the scripts.
        python.args(["-I", "-B"]).arg(script);
        let said = self.output(python, args).await?;
        serde_json::from_str(&said).with_context(|| format!("the client says {said}"))
    }

    async fn output(&self, command: Command, args: &[&str]) -> Result<String> {
        let name = command.get_program().to_owned();
        let Output { status, stdout, stderr } = self.run(alone(command, args)).await?;
        ensure!(status.success(), "{} ended with {status}\n{stdout}{stderr}", name.display());
        Ok(stdout)
    }
}

/// Without settings of the person who runs the tests.
fn alone(mut command: Command, args: &[&str]) -> Command {
    command
        .args(args)
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("HOME", "/nonexistent")
        .env("LANG", "C.UTF-8");
    command
}

fn grpc_client() -> Result<PathBuf> {
    tool(GRPC)
}

/// A program that `cargo xtask` keeps below the target directory, as `tools/bin/NAME`.
pub fn tool(path: &str) -> Result<PathBuf> {
    let executable = std::env::current_exe().context("finding this executable")?;
    let directories = executable.ancestors().skip(1);
    let found = directories.map(|directory| directory.join(path)).find(|path| path.is_file());
    found.with_context(|| format!("no {path} above {}", executable.display()))
}
