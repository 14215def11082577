//! The kubelet's probes reach the pods that declare them, whatever policies refuse: from the kubelet's cgroup, to the
//! declared port, with the declared request; and nobody else does, nor the kubelet with anything else.

use std::{net::SocketAddr, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use lab::{
    Pair, Pod, Process,
    apps::{self, CallKind, RawAnswer},
    eventually, metric, require_root,
};
use mesh_agent::capture::inspect;
use mesh_common::maps;
use serde_json::{Value, json};

const KUBELET: &str = "system.slice/kubelet.service";
const DENIED: &str = "RBAC: access denied";

/// What may come in plaintext: nothing.
const POLICY: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: mesh-only, namespace: default }
spec:
  selector: { matchLabels: { app: server } }
  rules: [{ from: [{ source: { principals: ['*'] } }] }]
";

/// The same by the mode of mutual TLS.
const STRICT: &str = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: strict, namespace: default }
spec: { mtls: { mode: STRICT } }
";

/// Dials from a port and asks for a path: `python3 -c … PORT TARGET PORT PATH`. Says the status, or what went wrong.
const FROM: &str = "
import socket, sys
source, host, port, path = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
sock = socket.socket()
sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
sock.settimeout(10)
sock.bind(('', source))
sock.connect((host, port))
sock.sendall(f'GET {path} HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n'.encode())
try:
    answer = sock.recv(100)
except ConnectionResetError:
    answer = b''
print(answer[9:12].decode() or 'nothing')
";

struct World {
    pair: Pair,
    server: Pod,
    /// HTTP on 8080, and on 8081, which is not declared; an echo of bytes on 7000; gRPC on 9000.
    apps: [Process; 4],
    kubelet: Pod,
    /// A process of the node that is not the kubelet's, and one of a pod on the host network.
    others: [Pod; 2],
}

impl World {
    async fn new(name: &str) -> Result<Self> {
        let pair = Pair::new(name).await?;
        // Made after the agent has looked for it.
        let kubelet = Pod::on_host(&pair.a, KUBELET)?;
        let others = [
            Pod::on_host(&pair.a, "system.slice/other.service")?,
            Pod::on_host(&pair.a, "kubepods/host-network")?,
        ];
        let server = pair.a.pod("server").sa("server").label("app", "server").start().await?;
        let apps = [
            server.serve(apps::http(8080)).await?,
            server.serve(apps::http(8081)).await?,
            server.serve(apps::tcp_echo(7000)).await?,
            server.serve(apps::grpc(9000)).await?,
        ];
        server.set_containers(containers("/status/200?probe=1"))?;
        pair.apply("mesh-only.yaml", POLICY).await?;
        server.enrolled().await?;
        let world = Self { pair, server, apps, kubelet, others };
        world.answers("/status/200?probe=1").await?;
        Ok(world)
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.server.at(8080))
    }

    /// Waits until the kubelet is answered: the agent sees its cgroup, and changes of pods, within a second.
    async fn answers(&self, path: &str) -> Result<()> {
        eventually("the probe is answered", async || {
            let (told, body) = status(&self.kubelet, &self.url(path)).await?;
            ensure!(told == 200, "{path}: {told} {body}");
            Ok(())
        })
        .await
    }

    async fn is_refused(&self, path: &str) -> Result<()> {
        eventually("the probe is refused", async || {
            let (told, body) = status(&self.kubelet, &self.url(path)).await?;
            ensure!(told == 403 && body == DENIED, "{path}: {told} {body}");
            Ok(())
        })
        .await
    }

    /// Connections listed for any pod of the node.
    fn listed(&self) -> Result<usize> {
        let tables = inspect::dump(&self.pair.agent_a.bpf_dir(), maps::PROBES)?.entries;
        let sizes = tables.iter().map(|table| Some(table.value["entries"].as_array()?.len()));
        sizes.sum::<Option<usize>>().context("tables in a table")
    }
}

/// A container with probes of every kind, at ports with names.
fn containers(path: &str) -> Value {
    json!([{
        "name": "app",
        "image": "lab",
        "ports": [{ "name": "web", "containerPort": 8080 }, { "name": "bytes", "containerPort": 7000 }],
        "readinessProbe": { "httpGet": { "path": path, "port": "web" } },
        "livenessProbe": { "tcpSocket": { "port": "bytes" } },
        "startupProbe": { "grpc": { "port": 9000 } },
    }])
}

async fn status(from: &Pod, url: &str) -> Result<(u16, String)> {
    let answer = from.http_get(url, &[]).await?;
    Ok((answer.status, answer.body))
}

async fn raw(from: &Pod, to: SocketAddr, bytes: &str) -> Result<RawAnswer> {
    from.raw(to).send(bytes).limit(Duration::from_secs(2)).run().await
}

fn get(path: &str, connection: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: {connection}\r\n\r\n")
}

#[tokio::test]
async fn declared_probes_come_through_and_nothing_else_does() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("probes").await?;
    let World { pair, server, kubelet, others, .. } = &world;
    let path = "/status/200?probe=1";
    for to in [server.at(8080), server.at6(8080)] {
        let (told, body) = status(kubelet, &format!("http://{to}{path}")).await?;
        ensure!(told == 200, "{to}: {told} {body}");
        // The target as a whole, and the method.
        for path in ["/status/200", "/status/200?probe=2", "/x/../status/200?probe=1", "/admin"] {
            let (told, body) = status(kubelet, &format!("http://{to}{path}")).await?;
            ensure!(told == 403 && body == DENIED, "{to}{path}: {told} {body}");
        }
        let posted = kubelet.get(format!("http://{to}{path}")).method("POST").send().await?;
        ensure!(posted.status == 403, "{posted:?}");
        // Each request of a connection.
        let kept = raw(kubelet, to, &(get(path, "keep-alive") + &get("/admin", "close"))).await?;
        ensure!(kept.statuses() == [200, 403], "{}", kept.text());
        let garbage = raw(kubelet, to, "\0garbage\r\n").await?;
        ensure!(garbage.received.0.is_empty(), "{garbage:?}");
    }
    let seen = server.stats(8080).await?.paths;
    ensure!(seen.keys().all(|path| path.starts_with("/status/200") || path == "/stats"), "{seen:?}");

    let grpc = format!("http://{}", server.at(9000));
    let health = kubelet.grpc(&grpc, "count/1").await?;
    ensure!(health.check == "SERVING" && health.ended == "PermissionDenied", "{health:?}");
    let called = kubelet.call(&grpc, CallKind::Unary).send().await?;
    ensure!(called.code == "PermissionDenied", "{called:?}");

    for other in others {
        for port in [8080, 8081, 7000, 9000] {
            let told = raw(other, server.at(port), &get(path, "close")).await;
            ensure!(told.as_ref().is_ok_and(|told| told.received.0.is_empty()), "{port}: {told:?}");
        }
        ensure!(other.http_get(&world.url(path), &[]).await.is_err(), "{} came through", other.name());
    }
    // A port that is not declared, for the kubelet too.
    let told = raw(kubelet, server.at(8081), &get(path, "close")).await?;
    ensure!(told.received.0.is_empty(), "{told:?}");

    let metrics = pair.agent_a.metrics().await?;
    let labels = [("reporter", "destination"), ("response_code", "403"), ("destination_workload", "server")];
    ensure!(metric(&metrics, "istio_requests_total", &labels) >= 12.0, "{metrics}");
    let labels = [("side", "destination"), ("kind", "denied"), ("pod", "server")];
    ensure!(metric(&metrics, "mesh_refused_total", &labels) >= 9.0, "{metrics}");
    let logged = pair.agent_a.access_log();
    let denied = |line: &&String| line.contains("path=/admin ") && line.contains("matched_policy[none]");
    ensure!(logged.iter().any(|line| denied(&line)), "{logged:#?}");
    world.pair.finish().await
}

#[tokio::test]
async fn strict_mutual_tls_lets_declared_probes_in_and_nothing_else() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("probes-strict").await?;
    let World { pair, server, kubelet, others, .. } = &world;
    // In the place of the policy: from here on the mode alone refuses.
    pair.apply("mesh-only.yaml", STRICT).await?;
    let by_mode =
        [("event", "refused"), ("kind", "plaintext"), ("pod", "server"), ("reporter", "destination")];
    eventually("the mode is in force", async || {
        ensure!(others[0].http_get(&world.url("/"), &[]).await.is_err(), "plaintext came through");
        Ok(())
    })
    .await?;
    pair.agent_a.logged(&by_mode).await?;
    let path = "/status/200?probe=1";
    for to in [server.at(8080), server.at6(8080)] {
        ensure!(status(kubelet, &format!("http://{to}{path}")).await?.0 == 200, "{to}");
        for path in ["/status/200", "/admin"] {
            let (told, body) = status(kubelet, &format!("http://{to}{path}")).await?;
            ensure!(told == 403, "{to}{path}: {told} {body}");
        }
    }
    kubelet.raw(server.at(7000)).leave().run().await?;
    ensure!(kubelet.grpc(&format!("http://{}", server.at(9000)), "count/1").await?.check == "SERVING");
    for other in others {
        for port in [8080, 8081, 7000, 9000] {
            let told = raw(other, server.at(port), &get(path, "close")).await;
            ensure!(told.as_ref().is_ok_and(|told| told.received.0.is_empty()), "{port}: {told:?}");
        }
    }
    let told = raw(kubelet, server.at(8081), &get(path, "close")).await?;
    ensure!(told.received.0.is_empty(), "{told:?}");
    let metrics = pair.agent_a.metrics().await?;
    let labels = [("side", "destination"), ("kind", "plaintext"), ("pod", "server")];
    ensure!(metric(&metrics, "mesh_refused_total", &labels) >= 9.0, "{metrics}");
    world.pair.finish().await
}

#[tokio::test]
async fn bare_connections_find_out_whether_the_app_listens() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("probes-tcp").await?;
    let World { pair, server, kubelet, apps, .. } = &world;
    for to in [server.at(7000), server.at6(7000)] {
        kubelet.raw(to).leave().run().await?;
    }
    let flows = eventually("the flows of the probes", async || {
        let flows = pair.agent_a.flows().await?;
        let is = |flow: &&Value| flow["pod"] == "server" && flow["verdict"] == "probe";
        let found: Vec<Value> = flows.as_array().context("a list")?.iter().filter(is).cloned().collect();
        ensure!(found.len() == 2 && found.iter().all(|flow| flow["state"] == "closed"), "{flows:#}");
        Ok(found)
    })
    .await?;
    ensure!(flows.iter().all(|flow| flow["rx_bytes"] == 0 && flow["direction"] == "inbound"), "{flows:#?}");

    // Bytes have no business there: some pod's `httpGet.host` may name any other.
    let told = raw(kubelet, server.at(7000), "hello").await?;
    ensure!(told.received.0.is_empty(), "{told:?}");
    let dropped = [("reason", "probe_bytes")];
    eventually("the drops are counted", async || {
        let metrics = pair.agent_a.metrics().await?;
        ensure!(metric(&metrics, "mesh_kernel_dropped_packets_total", &dropped) > 0.0, "{metrics}");
        Ok(())
    })
    .await?;
    // And leave nothing behind that stays.
    eventually("the app's end of it closes", async || {
        let mut sockets = Command::new("cat");
        sockets.args(["/proc/net/tcp", "/proc/net/tcp6"]);
        let sockets = server.run(sockets).await?.stdout;
        let open = |line: &&str| line.contains(":1B58 ") && line.contains(" 01 ");
        ensure!(!sockets.lines().any(|line| open(&line)), "{sockets}");
        Ok(())
    })
    .await?;

    // To a port with declared requests a connection alone is no refusal, and none of the app's business.
    let refused = async || {
        let labels = [("side", "destination"), ("pod", "server")];
        anyhow::Ok(metric(&pair.agent_a.metrics().await?, "mesh_refused_total", &labels))
    };
    let before = refused().await?;
    for to in [server.at(8080), server.at6(8080)] {
        kubelet.raw(to).leave().run().await?;
    }
    world.answers("/status/200?probe=1").await?;
    ensure!(refused().await? <= before, "a bare connection counts as refused");

    // No agent answers for an app that is not there.
    apps[2].stop(Duration::ZERO).await?;
    ensure!(kubelet.raw(server.at(7000)).leave().run().await.is_err(), "somebody listens");
    eventually("what has closed is struck off", async || {
        ensure!(world.listed()? == 0, "{}", world.listed()?);
        Ok(())
    })
    .await?;
    world.pair.finish().await
}

#[tokio::test]
async fn what_is_declared_and_by_whom_decides_now() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let mut world = World::new("probes-changes").await?;
    // Another pod has the kubelet ask this one.
    let other = world.pair.a.pod("other").start().await?;
    let host = world.server.ip().to_string();
    let aimed = |port: u16| json!({ "httpGet": { "host": host.as_str(), "port": port, "path": "/admin" } });
    other.set_containers(json!([
        { "name": "a", "image": "lab", "livenessProbe": aimed(8080), "readinessProbe": aimed(8081), "startupProbe": aimed(7000) },
    ]))?;
    world.pair.settled().await?;
    other.enrolled().await?;
    world.is_refused("/admin").await?;
    for port in [8081, 7000] {
        let told = raw(&world.kubelet, world.server.at(port), &get("/admin", "close")).await?;
        ensure!(told.received.0.is_empty(), "{port}: {told:?}");
    }

    // The source of a probe that has ended is nobody's.
    let from = async |who: &Pod| {
        let (host, path) = (world.server.ip().to_string(), "/status/200?probe=1");
        let mut command = Command::new("python3");
        command.args(["-I", "-c", FROM, "40123", &host, "8080", path]);
        let output = who.run(command).await?;
        ensure!(output.status.success(), "{}", output.stderr);
        anyhow::Ok(output.stdout.trim().to_owned())
    };
    let told = from(&world.kubelet).await?;
    ensure!(told == "200", "the kubelet was told {told}");
    for other in &world.others {
        let told = from(other).await?;
        ensure!(told == "nothing", "{} was told {told}", other.name());
    }

    world.server.set_containers(containers("/status/204"))?;
    world.is_refused("/status/200?probe=1").await?;
    let (told, _) = status(&world.kubelet, &world.url("/status/204")).await?;
    ensure!(told == 204, "{told}");

    // A successor knows what is declared, and takes away what is no more.
    world.pair.agent_a.upgrade().await?;
    let (told, _) = status(&world.kubelet, &world.url("/status/204")).await?;
    ensure!(told == 204, "{told}");
    world.server.set_containers(json!([{ "name": "app", "image": "lab" }]))?;
    eventually("nothing is declared any more", async || {
        let told = raw(&world.kubelet, world.server.at(8080), &get("/status/204", "close")).await?;
        ensure!(told.received.0.is_empty(), "{told:?}");
        let echo = raw(&world.kubelet, world.server.at(7000), "hello").await?;
        ensure!(echo.received.0.is_empty(), "{echo:?}");
        Ok(())
    })
    .await?;
    let ports = inspect::dump(&world.pair.agent_a.bpf_dir(), maps::PROBE_PORTS)?.entries;
    ensure!(ports.is_empty(), "{ports:?}");

    // A kubelet that is started again has a cgroup of its own.
    world.server.set_containers(containers("/status/200?probe=1"))?;
    lab::cgroup::remove_tree(world.kubelet.cgroup())?;
    world.kubelet = Pod::on_host(&world.pair.a, KUBELET)?;
    world.answers("/status/200?probe=1").await?;
    world.pair.finish().await
}
