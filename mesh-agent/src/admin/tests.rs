//! Over real sockets in a directory of its own.

use std::{os::unix::fs::PermissionsExt, path::Path, sync::Mutex};

use anyhow::{Context as _, Result};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
};

use super::*;
use crate::report::{Clock, Context, join};

/// When the flows are looked at.
const NOW: std::time::Duration = std::time::Duration::from_secs(1000);

/// A flow of namespace `default`, or of `other` from socket 100 on; it began in the second of its number.
pub(crate) fn flow(socket: u64) -> FlowView {
    let record = mesh_common::flow::FlowRecord {
        socket,
        local: mesh_common::addr::Addr::v4([10, 244, 0, 1], 4),
        start_ns: socket * 1_000_000_000,
        ..Default::default()
    };
    let snapshot = Snapshot::default();
    let context = Context {
        snapshot: &snapshot,
        pod_of: &|_| None,
        facts: &|_, _| None,
        endpoint: &|_| None,
        clock: Clock { monotonic_ns: NOW.as_nanos() as u64, wall: std::time::SystemTime::UNIX_EPOCH + NOW },
    };
    let mut view = join(&record, &context);
    view.namespace = Some(if socket < 100 { "default" } else { "other" }.to_owned());
    view
}

/// An agent's admin endpoint without an agent.
pub(crate) struct Agent {
    dir: tempfile::TempDir,
    pub(crate) reporter: Arc<Reporter>,
    pub(crate) stop: CancellationToken,
    _snapshot: watch::Sender<Arc<Snapshot>>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn state(reporter: &Arc<Reporter>, readiness: &Readiness) -> (State, watch::Sender<Arc<Snapshot>>) {
    let (sender, snapshot) = watch::channel(Arc::new(Snapshot { revision: 3, ..Snapshot::default() }));
    let level = Arc::new(Mutex::new("info".to_owned()));
    let shown = level.clone();
    let lock = |level: &Mutex<String>| level.lock().map_or_else(|_| String::new(), |level| level.clone());
    let state = State {
        version: "1.2.3",
        readiness: readiness.clone(),
        snapshot,
        problems: Arc::new(|| vec!["a.yaml: VirtualService default/x: spec.http: is missing".to_owned()]),
        pods: Arc::new(|| PodsView {
            node: "a".to_owned(),
            enrolled: vec!["default/client".to_owned()],
            failing: vec![FailingPod {
                pod: "default/lost".to_owned(),
                reason: "its network namespace is not there".to_owned(),
            }],
        }),
        overload: Arc::new(|| OverloadView {
            level: "high".to_owned(),
            memory_bytes: 440 << 20,
            memory_promised_bytes: 9 << 20,
            memory_limit_bytes: Some(512 << 20),
            shed: vec!["default/client".to_owned()],
        }),
        // As the kernel lists them: in no order.
        flows: Arc::new(|| Ok(vec![flow(101), flow(1)])),
        reporter: reporter.clone(),
        certificates: Arc::new(Vec::new),
        log_level: LogLevel::new(
            move || lock(&shown),
            move |wanted| {
                wanted.parse::<EnvFilter>().map_err(|error| error.to_string())?;
                level.lock().map_err(|error| error.to_string())?.clone_from(&wanted.to_owned());
                Ok(())
            },
        ),
    };
    (state, sender)
}

impl Agent {
    pub(crate) async fn start(readiness: &Readiness) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let reporter = Arc::new(Reporter::default());
        let (state, snapshot) = state(&reporter, readiness);
        let stop = CancellationToken::new();
        let listener = Listener::bind_admin(&Address::Unix(dir.path().join("run/admin.sock"))).await?;
        tokio::spawn(serve_admin(listener, state, stop.clone()));
        Ok(Self { dir, reporter, stop, _snapshot: snapshot })
    }

    pub(crate) fn socket(&self) -> std::path::PathBuf {
        self.dir.path().join("run/admin.sock")
    }

    async fn send(&self, method: &str, path: &str) -> Result<Response<Incoming>> {
        request(UnixStream::connect(self.socket()).await?, method, path).await
    }

    async fn ask(&self, method: &str, path: &str) -> Result<(u16, String)> {
        text(self.send(method, path).await?).await
    }
}

async fn request(
    stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
    method: &str,
    path: &str,
) -> Result<Response<Incoming>> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "127.0.0.1")
        .body(Empty::<bytes::Bytes>::new())?;
    Ok(sender.send_request(request).await?)
}

async fn text(response: Response<Incoming>) -> Result<(u16, String)> {
    let status = response.status().as_u16();
    let body = response.into_body().collect().await?.to_bytes();
    Ok((status, String::from_utf8(body.to_vec())?))
}

#[tokio::test]
async fn the_operator_reads_everything_over_the_socket() -> Result<()> {
    let readiness = Readiness::default();
    let agent = Agent::start(&readiness).await?;
    assert_eq!(
        agent.ask("GET", "/version").await?,
        (200, r#"{"component":"mesh-agent","version":"1.2.3"}"#.into())
    );
    let (status, body) = agent.ask("GET", "/config_dump").await?;
    let dump: serde_json::Value = serde_json::from_str(&body)?;
    assert_eq!((status, &dump["revision"]), (200, &serde_json::json!(3)));
    assert_eq!(dump["problems"][0], "a.yaml: VirtualService default/x: spec.http: is missing");
    let (_, body) = agent.ask("GET", "/flows?namespace=default").await?;
    assert_eq!(serde_json::from_str::<Vec<FlowView>>(&body)?, [flow(1)]);
    let (_, body) = agent.ask("GET", "/flows").await?;
    assert_eq!(serde_json::from_str::<Vec<FlowView>>(&body)?, [flow(1), flow(101)], "the oldest first");
    let (_, body) = agent.ask("GET", "/pods").await?;
    let pods: PodsView = serde_json::from_str(&body)?;
    assert_eq!((pods.node.as_str(), pods.failing[0].pod.as_str()), ("a", "default/lost"));
    assert_eq!(agent.ask("GET", "/certs").await?, (200, "[]".into()));
    let (status, body) = agent.ask("GET", "/nothing").await?;
    assert!(status == 404 && body.contains("/config_dump"), "{body}");
    assert_eq!(agent.ask("DELETE", "/flows").await?, (405, "use GET\n".into()));
    Ok(())
}

#[tokio::test]
async fn the_log_level_is_shown_and_set() -> Result<()> {
    let agent = Agent::start(&Readiness::default()).await?;
    assert_eq!(agent.ask("GET", "/logging").await?, (200, "info\n".into()));
    assert_eq!(
        agent.ask("POST", "/logging?level=warn,mesh_agent%3Ddebug").await?,
        (200, "warn,mesh_agent=debug\n".into())
    );
    assert_eq!(agent.ask("GET", "/logging?level=error").await?.1, "warn,mesh_agent=debug\n");
    assert_eq!(agent.ask("POST", "/logging").await?.0, 400);
    let (status, body) = agent.ask("POST", "/logging?level=a%3Dnonsense").await?;
    assert!(status == 400 && body.starts_with("level `a=nonsense`: "), "{body}");
    Ok(())
}

#[test]
fn the_filter_of_the_log_is_reloaded() {
    let (_layer, handle) =
        reload::Layer::<EnvFilter, tracing_subscriber::Registry>::new(EnvFilter::new("info"));
    let level = LogLevel::of(handle);
    assert_eq!((level.show)(), "info");
    // The layer must live for the handle to reach it.
    assert!((level.set)("warn").is_ok() && (level.show)() == "warn");
    assert!((level.set)("x=y=z").is_err());
}

#[tokio::test]
async fn readiness_names_what_it_waits_for() -> Result<()> {
    let readiness = Readiness::default();
    let guards =
        [readiness.block("capture"), readiness.block("first configuration"), readiness.block("capture")];
    let listener = Listener::bind(([127, 0, 0, 1], 0).into()).await?;
    let address = listener.tcp_address().context("no address")?;
    let stop = CancellationToken::new();
    let server = tokio::spawn(serve_readiness(listener, readiness.clone(), stop.clone()));
    let ask =
        async || text(request(TcpStream::connect(address).await?, "GET", "/healthz/ready").await?).await;
    let waiting = r#"{"ready":false,"waiting_for":["capture","first configuration"]}"#;
    assert_eq!(ask().await?, (503, waiting.into()));
    let [first, second, third] = guards;
    drop((first, second));
    assert_eq!(ask().await?, (503, r#"{"ready":false,"waiting_for":["capture"]}"#.into()));
    drop(third);
    assert_eq!(ask().await?, (200, r#"{"ready":true,"waiting_for":[]}"#.into()));
    stop.cancel();
    server.await?;
    Ok(())
}

#[tokio::test]
async fn prometheus_reads_openmetrics() -> Result<()> {
    let listener = Listener::bind(([127, 0, 0, 1], 0).into()).await?;
    let address = listener.tcp_address().context("no address")?;
    let stop = CancellationToken::new();
    tokio::spawn(serve_metrics(listener, Arc::new(Reporter::default()), stop.clone()));
    let response = request(TcpStream::connect(address).await?, "GET", "/metrics").await?;
    assert_eq!(response.headers()["content-type"], answer_type());
    assert!(text(response).await?.1.ends_with("# EOF\n"));
    assert_eq!(text(request(TcpStream::connect(address).await?, "GET", "/").await?).await?.0, 404);
    stop.cancel();
    Ok(())
}

fn answer_type() -> &'static str {
    "application/openmetrics-text; version=1.0.0; charset=utf-8"
}

#[tokio::test]
async fn a_follower_is_told_each_flow_that_ends_and_leaves_nothing_behind() -> Result<()> {
    let agent = Agent::start(&Readiness::default()).await?;
    let mut body = agent.send("GET", "/flows?follow=true&namespace=default").await?.into_body();
    let mut next = async || -> Result<FlowEvent> {
        let frame = body.frame().await.context("the stream ended")??;
        Ok(serde_json::from_slice(&frame.into_data().map_err(|_| anyhow::anyhow!("trailers"))?)?)
    };
    assert_eq!(next().await?, FlowEvent::Flow(Box::new(flow(1))));
    assert_eq!(next().await?, FlowEvent::Listed);
    agent.reporter.flow_closed(flow(102));
    agent.reporter.flow_closed(flow(2));
    assert_eq!(next().await?, FlowEvent::Flow(Box::new(flow(2))));
    agent.stop.cancel();
    assert!(body.frame().await.is_none());
    Ok(())
}

#[tokio::test]
async fn garbage_and_endless_headers_end_only_their_connection() -> Result<()> {
    let agent = Agent::start(&Readiness::default()).await?;
    for garbage in [
        b"\x16\x03\x01 hello\r\n\r\n".to_vec(),
        [b"GET / HTTP/1.1\r\nx: ".to_vec(), vec![b'a'; 100_000]].concat(),
    ] {
        let mut stream = UnixStream::connect(agent.socket()).await?;
        // The server may close before all is written.
        let _ = stream.write_all(&garbage).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        assert!(
            answer.is_empty() || answer.starts_with(b"HTTP/1.1 4"),
            "{}",
            String::from_utf8_lossy(&answer)
        );
    }
    assert_eq!(agent.ask("GET", "/healthz").await?.0, 200);
    Ok(())
}

fn mode(path: &Path) -> Result<u32> {
    Ok(std::fs::metadata(path)?.permissions().mode() & 0o777)
}

#[tokio::test]
async fn the_socket_is_private_and_taken_from_nobody() -> Result<()> {
    let agent = Agent::start(&Readiness::default()).await?;
    let path = agent.socket();
    assert_eq!((mode(&path)?, mode(path.parent().context("no parent")?)?), (0o600, 0o700));
    let address = Address::Unix(path.clone());
    let taken = Listener::bind_admin(&address).await.err().map(|error| error.to_string()).unwrap_or_default();
    assert!(taken.contains("another agent answers"), "{taken}");

    let stale = agent.dir.path().join("run/stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale)?);
    let bound = Listener::bind_admin(&Address::Unix(stale.clone())).await?;
    assert!(stale.exists());
    drop(bound);
    assert!(!stale.exists(), "the socket goes with its listener");
    // What another has put in its place since stays.
    let bound = Listener::bind_admin(&Address::Unix(stale.clone())).await?;
    std::fs::remove_file(&stale)?;
    std::fs::write(&stale, "another's")?;
    drop(bound);
    assert_eq!(std::fs::read(&stale)?, b"another's");

    let file = agent.dir.path().join("run/file");
    std::fs::write(&file, "precious")?;
    assert!(Listener::bind_admin(&Address::Unix(file.clone())).await.is_err());
    assert_eq!(std::fs::read(file)?, b"precious");

    let open = agent.dir.path().join("open");
    std::fs::create_dir(&open)?;
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o755))?;
    let refused = Listener::bind_admin(&Address::Unix(open.join("admin.sock"))).await;
    let refused = refused.err().map(|error| error.to_string()).unwrap_or_default();
    assert!(refused.contains("mode 755") && refused.contains("chmod 700"), "{refused}");
    Ok(())
}

#[test]
fn only_loopback_is_an_admin_address() {
    assert_eq!("unix:/a/b".parse(), Ok(Address::Unix("/a/b".into())));
    assert_eq!("[::1]:15000".parse(), Ok(Address::Tcp(([0, 0, 0, 0, 0, 0, 0, 1], 15000).into())));
    assert_eq!(
        "0.0.0.0:15000".parse::<Address>(),
        Err(AddressError::NotLoopback(([0, 0, 0, 0], 15000).into()))
    );
    assert_eq!("localhost".parse::<Address>(), Err(AddressError::Syntax("localhost".into())));
    assert_eq!("unix:".parse::<Address>(), Err(AddressError::Syntax("unix:".into())));
}
