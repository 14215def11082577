//! Where something asks for the agent, connections take it; and what is open ends when that comes to be asked for.

use std::{process::Command, time::Duration};

use anyhow::{Result, ensure};
use lab::{Pod, Process, apps, eventually, metric, require_root};
use mesh_common::maps;
use serde_json::Value;

use super::world::{PORT, World, entries, is_direct, is_not_direct, verdict};

const SWITCH: &str = "mesh.io/direct";
/// What a connection that has no way to go is told with its first bytes.
const ECONNABORTED: i32 = 103;
const FULL: [(&str, &str); 1] = [("reason", "direct_connections_full")];

/// A connection that says `one`, and goes on reading until it ends, of which it tells.
pub fn long_lived(from: &Pod, to: std::net::SocketAddr) -> Result<Process> {
    let script = format!(
        "exec 3<>/dev/tcp/{}/{}; echo one >&3; read -r line <&3; echo \"$line\"; read -r line <&3; echo ended",
        to.ip(),
        to.port()
    );
    let mut command = Command::new("bash");
    command.args(["-c", &script]);
    from.spawn(command)
}

pub async fn says(process: &Process, expected: &str) -> Result<()> {
    eventually("an answer on a connection that stays", async || {
        let said = process.stdout();
        ensure!(said == expected, "{said:?} is not {expected:?}\n{}", process.tail());
        Ok(())
    })
    .await
}

impl World {
    /// A change that asks for the agent: open connections end, new ones take the agent, and when it is taken back the
    /// agent is not needed again.
    async fn asks_for_the_agent(&self, what: &str, apply: impl AsyncFn(bool) -> Result<()>) -> Result<()> {
        let open = [long_lived(&self.pair.client, self.v4())?, long_lived(&self.pair.client, self.v6)?];
        for process in &open {
            says(process, "one\n").await?;
        }
        apply(true).await?;
        for (process, dialled) in open.iter().zip([self.v4(), self.v6]) {
            is_not_direct(&self.pair.agent_a, &self.pair.client, dialled).await?;
            says(process, "one\nended\n").await?;
            ensure!(!self.dial(dialled).await?, "{what}: {dialled} was dialled without the agent");
        }
        apply(false).await?;
        for dialled in [self.v4(), self.v6] {
            is_direct(&self.pair.agent_a, &self.pair.client, dialled).await?;
            ensure!(self.dial(dialled).await?, "{what}: {dialled} takes the agent for no reason");
        }
        Ok(())
    }

    async fn applied(&self, file: &str, yaml: Option<&str>) -> Result<()> {
        match yaml {
            Some(yaml) => self.pair.apply(file, yaml).await,
            None => self.pair.lab.delete(file),
        }
    }
}

#[tokio::test]
async fn either_pod_may_ask_for_the_agent() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("direct-annotated").await?;
    for (what, pod) in [("the client", &world.pair.client), ("the server", &world.near)] {
        let annotate = async |asks: bool| pod.annotate(SWITCH, asks.then_some("disabled"));
        world.asks_for_the_agent(what, annotate).await?;
    }
    // A word that means nothing changes nothing, and is named.
    world.near.annotate(SWITCH, Some("off"))?;
    world
        .pair
        .agent_a
        .config("a problem that names the annotation", |dump| {
            ensure!(dump["problems"].to_string().contains(SWITCH), "{}", dump["problems"]);
            Ok(())
        })
        .await?;
    ensure!(world.dial(world.v4()).await?);
    world.pair.finish().await
}

#[tokio::test]
async fn rules_that_the_agent_keeps_take_the_agent() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("direct-rules").await?;
    let limits = "apiVersion: networking.istio.io/v1\nkind: DestinationRule\n\
                  metadata: { name: all, namespace: default }\n\
                  spec:\n  host: '*.default.svc.cluster.local'\n  \
                  trafficPolicy: { connectionPool: { tcp: { connectTimeout: 3s } } }\n";
    let route = |host: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: VirtualService\n\
             metadata: {{ name: {host}, namespace: default }}\nspec:\n  hosts: [{host}]\n  \
             tcp: [{{ route: [{{ destination: {{ host: {host} }} }}] }}]\n"
        )
    };
    let routes = format!("{}---\n{}", route("near"), route("near6"));
    let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
                  metadata: { name: all, namespace: default }\nspec: { action: ALLOW, rules: [{}] }\n";
    let strict = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
                  metadata: { name: all, namespace: default }\nspec: { mtls: { mode: STRICT } }\n";
    for (what, yaml) in [
        ("connectionPool", limits),
        ("tcp routes", &routes),
        ("authorization", policy),
        ("mutual TLS", strict),
    ] {
        let apply = async |asks: bool| world.applied("rules.yaml", asks.then_some(yaml)).await;
        world.asks_for_the_agent(what, apply).await?;
    }
    world.pair.finish().await
}

#[tokio::test]
async fn ports_that_are_not_declared_take_the_agent() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("direct-declared").await?;
    let World { pair, near, .. } = &world;
    // Learnt to carry bytes is not declared to.
    let undeclared = pair.lab.service("undeclared").selector("app", "near").port("raw", 70, PORT).apply()?;
    pair.settled().await?;
    ensure!(!world.dial(undeclared.at(70)).await?);
    ensure!(!world.dial(near.at(PORT)).await?, "a pod's own address has no declared port");

    let open = long_lived(&pair.client, world.v4())?;
    says(&open, "one\n").await?;
    let addresses = world.service.addresses;
    let renamed =
        pair.lab.service("near").selector("app", "near").port("http", 70, PORT).addresses(addresses);
    renamed.apply()?;
    says(&open, "one\nended\n").await?;
    is_not_direct(&pair.agent_a, &pair.client, world.v4()).await?;
    ensure!(world.dial(world.v6).await?, "the other service is as it was");
    world.pair.finish().await
}

#[tokio::test]
async fn a_flag_switches_it_off() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::with("direct-off", &["--direct=false"]).await?;
    for dialled in [world.v4(), world.v6] {
        ensure!(!world.dial(dialled).await?, "{dialled}");
    }
    ensure!(entries(&world.pair.agent_a, maps::DIRECT)?.is_empty());
    world.pair.finish().await
}

#[tokio::test]
async fn beyond_its_share_a_client_takes_the_agent() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::with("direct-share", &["--max-direct-connections-per-pod=8"]).await?;
    let World { pair, .. } = &world;
    let other = pair.a.pod("other").start().await?;
    other.enrolled().await?;
    is_direct(&pair.agent_a, &other, world.v4()).await?;
    let mut open = vec![long_lived(&pair.client, world.v4())?, long_lived(&pair.client, world.v6)?];
    for process in &open {
        says(process, "one\n").await?;
    }
    // A quarter of the table, whichever service of the pod it is.
    for dialled in [world.v4(), world.v6, world.v4()] {
        ensure!(!world.dial(dialled).await?, "more than its share of {dialled}");
    }
    let seen = other.tcp(world.v4(), 1000, &["--report"]).await?;
    ensure!(seen.intact && verdict(&pair.agent_a, seen.local, world.v4()).await? == "direct", "{seen:?}");
    drop(open.pop().map(|process| process.stop_blocking(Duration::ZERO)));
    eventually("room again", async || {
        ensure!(world.dial(world.v4()).await?);
        Ok(())
    })
    .await?;
    // A change that ends connections gives their room back too.
    world.near.annotate(SWITCH, Some("disabled"))?;
    for process in &open {
        says(process, "one\nended\n").await?;
    }
    world.near.annotate(SWITCH, None)?;
    is_direct(&pair.agent_a, &pair.client, world.v4()).await?;
    for _ in 0..2 {
        let process = long_lived(&pair.client, world.v4())?;
        says(&process, "one\n").await?;
        open.push(process);
    }
    let held = entries(&pair.agent_a, maps::HELD)?;
    ensure!(held.iter().all(|entry| [0, 2].contains(&entry.value.as_i64().unwrap_or(-1))), "{held:?}");
    let refused = metric(&pair.agent_a.metrics().await?, "mesh_kernel_refusals_total", &FULL);
    ensure!(refused.abs() < f64::EPSILON, "{refused} refused");
    drop(open);
    world.pair.finish().await
}

/// Chooses for so many connections before the first of them begins: their SYNs leave with the first bytes
/// (`TCP_FASTOPEN_CONNECT`, without a cookie). Says how each went.
const AT_ONCE: &str = "
import socket, sys
made = [socket.socket() for _ in range(int(sys.argv[3]))]
for conn in made:
    for option in (30, 34):
        conn.setsockopt(socket.IPPROTO_TCP, option, 1)
    conn.connect((sys.argv[1], int(sys.argv[2])))
for conn in made:
    try:
        conn.send(b'one\\n')
        print(conn.recv(4).decode().strip())
    except OSError as error:
        print(error.errno)
";

/// As many as have chosen at once, before any was counted, do not all find room: a client gets its quarter of the table.
#[tokio::test]
async fn those_that_chose_at_once_beyond_a_share_are_refused() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::with("direct-full", &["--max-direct-connections-per-pod=8"]).await?;
    let World { pair, .. } = &world;
    let plain = world.plain();
    is_direct(&pair.agent_a, &pair.client, plain).await?;
    let mut command = Command::new("python3");
    command.args(["-I", "-c", AT_ONCE, &plain.ip().to_string(), &plain.port().to_string(), "3"]);
    let said = pair.client.run(command).await?;
    ensure!(said.stdout == format!("one\none\n{ECONNABORTED}\n"), "{said:?}");
    eventually("the refusal is counted", async || {
        let counted = metric(&pair.agent_a.metrics().await?, "mesh_kernel_refusals_total", &FULL);
        ensure!(counted >= 1.0, "{counted}");
        Ok(())
    })
    .await?;
    eventually("room again", async || {
        let seen = pair.client.tcp(plain, 1000, &[]).await?;
        ensure!(seen.intact && verdict(&pair.agent_a, seen.local, plain).await? == "direct", "{seen:?}");
        Ok(())
    })
    .await?;
    world.pair.finish().await
}

/// Whether the server's own label lets it be in the mesh, as `kubectl label` would say it.
fn enrol(world: &World, is: bool) -> Result<()> {
    let file = "pod-default-near.yaml";
    let text = std::fs::read_to_string(world.pair.lab.config_dir().join(file))?;
    let mut pod: Value = serde_json::from_str(&text)?;
    pod["metadata"]["labels"]["mesh.io/dataplane-mode"] = if is { "node" } else { "none" }.into();
    world.pair.lab.apply(file, &pod.to_string())
}

#[tokio::test]
async fn pods_that_leave_are_reached_otherwise_and_keep_what_is_open() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("direct-leaving").await?;
    let World { pair, near, .. } = &world;
    let open = long_lived(&pair.client, world.v4())?;
    says(&open, "one\n").await?;
    enrol(&world, false)?;
    near.not_enrolled().await?;
    is_not_direct(&pair.agent_a, &pair.client, world.v4()).await?;
    let outside = pair.client.tcp(world.v4(), 1000, &["--report"]).await?;
    ensure!(outside.intact, "{outside:?}");
    ensure!(verdict(&pair.agent_a, outside.local, world.v4()).await? == "captured");
    enrol(&world, true)?;
    near.enrolled().await?;
    is_direct(&pair.agent_a, &pair.client, world.v4()).await?;
    ensure!(world.dial(world.v4()).await?);
    says(&open, "one\n").await?;
    ensure!(open.status().is_none(), "ended\n{}", open.tail());
    world.pair.finish().await
}

#[tokio::test]
async fn without_an_agent_closed_pods_are_refused_and_open_ones_pass() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let World { pair, near, service, v6 } = World::new("direct-killed").await?;
    let open = pair.a.pod("open").annotation("mesh.io/when-agent-is-down", "open").start().await?;
    open.enrolled().await?;
    let at = service.at(70);
    is_direct(&pair.agent_a, &open, at).await?;
    // Without the mesh the service's address is a pod's, outside it.
    let outside = pair.a.pod("outside").unenrolled().start().await?;
    outside.netns().ip(&[format!("address add {}/32 dev lo", at.ip())])?;
    pair.a.netns().ip(&[format!("route add {} via {}", at.ip(), outside.ip())])?;
    outside.serve(apps::tcp_echo(70)).await?;

    let staying = long_lived(&pair.client, at)?;
    says(&staying, "one\n").await?;
    pair.agent_a.kill().await?;
    for dialled in [at, v6] {
        let error = pair.client.tcp(dialled, 10, &[]).await.err();
        ensure!(error.as_ref().is_some_and(|error| format!("{error:#}").contains("refused")), "{error:?}");
    }
    let passed = open.tcp(at, 1000, &[]).await?;
    ensure!(passed.intact && passed.report.is_none(), "{passed:?}");

    let agent = pair.a.agent().start().await?;
    near.enrolled().await?;
    is_direct(&agent, &pair.client, at).await?;
    ensure!(pair.client.tcp(at, 1000, &["--report"]).await?.intact);
    says(&staying, "one\n").await?;
    ensure!(staying.status().is_none(), "ended\n{}", staying.tail());
    pair.lab.finish().await
}
