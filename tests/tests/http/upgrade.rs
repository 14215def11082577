//! Connections that stop being HTTP: WebSocket, other upgrades, CONNECT, from either version of HTTP.

use anyhow::{Result, ensure};

use crate::world::{APP, HTTP, HTTP2, UNDECLARED, World, logged_times};

const ONLY_GETS: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: far, namespace: default }
spec:
  hosts: [far]
  http:
    - match: [{ method: { exact: GET } }]
      route: [{ destination: { host: far } }]
    - directResponse: { status: 405 }
";

#[tokio::test]
async fn websockets_pass_whatever_both_ends_speak() -> Result<()> {
    let Some(world) = World::new("websocket").await? else { return Ok(()) };
    // An upgrade is a GET for routes too, in either version.
    world.pair.apply("far.yaml", ONLY_GETS).await?;
    for side in world.both() {
        for port in [HTTP, HTTP2, UNDECLARED] {
            for (h2c, status) in [(false, 101), (true, 200)] {
                let url = side.service.url(port, "/ws");
                let spoken = world.client().websocket(&url, h2c, &["one", "zwei"]).await?;
                let what = format!("{} port {port} h2c={h2c}: {spoken:?}", side.name());
                ensure!(spoken.status == status && spoken.pod.as_deref() == Some(side.name()), "{what}");
                ensure!(spoken.messages == ["one", "zwei"] && spoken.binary_bytes == 100_000, "{what}");
                ensure!(spoken.pong && spoken.close == Some(1000), "{what}");
            }
        }
        let workload = ("destination_workload", side.name());
        world.requests(&[("response_code", "101"), ("response_flags", "-"), workload], 3).await?;
        // Over HTTP/2 the program may end before its library has ended the stream: then it broke it.
        world.requests(&[("response_code", "200"), workload], 3).await?;
        world.requests(&[("response_code", "200"), ("response_flags", "UC"), workload], 0).await?;
        let line = [("path", "/ws"), ("status", "101"), ("src.workload", "client")];
        let logged = |line_of: &std::collections::BTreeMap<String, String>| {
            line.iter().all(|(key, value)| line_of.get(*key).is_some_and(|found| found == value))
                && line_of["dst.workload"] == side.name()
                && line_of["reporter"] == "source"
                && line_of["bytes_sent"].parse::<u64>().is_ok_and(|bytes| bytes > 100_000)
        };
        lab::eventually("both HTTP/1.1 sockets are in the log", async || {
            let seen = world.pair.agent_a.access_log();
            let seen = seen.iter().map(|line| lab::fields(line)).filter(|line| logged(line)).count();
            ensure!(seen >= 2, "{seen} lines");
            Ok(())
        })
        .await?;
    }
    world.finish().await
}

#[tokio::test]
async fn other_upgrades_and_their_refusals() -> Result<()> {
    let Some(world) = World::new("upgrades").await? else { return Ok(()) };
    for side in world.both() {
        let upgraded = world.client().upgrade(&side.url("/upgrade"), "lab-echo", 300_000).await?;
        ensure!(upgraded.status == 101 && upgraded.intact, "{upgraded:?}");
        let refused = world.client().upgrade(&side.url("/upgrade"), "something-else", 10).await?;
        ensure!(refused.status == 426 && refused.received == 0, "{refused:?}");
        // A refused upgrade leaves the connection as it was, and h2c is no upgrade.
        let both = world
            .client()
            .raw(side.at(HTTP))
            .send("GET /upgrade HTTP/1.1\r\nHost: lab\r\nConnection: upgrade\r\nUpgrade: other\r\n\r\n")
            .expect("426")
            .send("GET / HTTP/1.1\r\nHost: lab\r\nConnection: close, upgrade, http2-settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n")
            .run()
            .await?;
        ensure!(both.statuses() == [426, 200], "{both:?}");
        ensure!(!both.text().contains("http2-settings"), "{both:?}");
        for (status, count) in [("101", 1), ("426", 2), ("200", 1)] {
            let labels = [("response_code", status), ("destination_workload", side.name())];
            world.requests(&labels, count).await?;
        }
        let line = [("path", "/upgrade"), ("status", "101"), ("reporter", "source"), ("flags", "-")];
        let line = [&line[..], &[("dst.workload", side.name())]].concat();
        let line = world.pair.agent_a.logged(&line).await?;
        ensure!(line["bytes_received"] == "300000" && line["bytes_sent"] == "300000", "{line:?}");
        let line = [("status", "426"), ("dst.workload", side.name()), ("reporter", "source")];
        logged_times(&world.pair.agent_a, &line, 2).await?;
    }
    world.finish().await
}

#[tokio::test]
async fn connect_is_bytes_and_never_a_native_request() -> Result<()> {
    let Some(world) = World::new("connect").await? else { return Ok(()) };
    for side in world.both() {
        for h2c in [false, true] {
            let tunnelled = world.client().connect(side.at(HTTP), "db.example:5432", 300_000, h2c).await?;
            ensure!(tunnelled.status == 200 && tunnelled.intact, "{} h2c={h2c}: {tunnelled:?}", side.name());
            ensure!(tunnelled.greeting.0 == b"CONNECT db.example:5432\r\n", "{tunnelled:?}");
        }
        let labels = [("response_code", "200"), ("destination_workload", side.name())];
        world.requests(&labels, 2).await?;
        let line = [("method", "CONNECT"), ("authority", "db.example:5432"), ("status", "200")];
        let line = [&line[..], &[("dst.workload", side.name()), ("reporter", "source")]].concat();
        logged_times(&world.pair.agent_a, &line, 2).await?;
    }
    world.finish().await
}

/// So many that each endpoint is asked.
const SOCKETS: u64 = 12;

#[tokio::test]
async fn an_endpoint_that_is_not_there_is_passed_over() -> Result<()> {
    let Some(world) = World::new("upgrade-retries").await? else { return Ok(()) };
    // Two endpoints of one service, of which one has nobody listening.
    let mut pods = Vec::new();
    for (name, node) in [("up", &world.pair.a), ("down", &world.pair.b)] {
        pods.push(node.pod(name).label("app", "shaky").start().await?);
    }
    pods[0].serve(lab::apps::http(APP)).await?;
    let shaky = world.pair.lab.service("shaky").selector("app", "shaky").port("http", HTTP, APP).apply()?;
    world.pair.settled().await?;
    for pod in &pods {
        pod.enrolled().await?;
    }
    for h2c in [false, true] {
        for _ in 0..SOCKETS / 2 {
            let spoken = world.client().websocket(&shaky.url(HTTP, "/ws"), h2c, &["one"]).await?;
            ensure!(spoken.pod.as_deref() == Some("up") && spoken.messages == ["one"], "{spoken:?}");
        }
    }
    for status in ["101", "200"] {
        world.requests(&[("response_code", status), ("destination_workload", "up")], SOCKETS / 2).await?;
    }
    let tries = || -> Vec<String> {
        let lines = world.pair.agent_a.access_log();
        let lines = lines.iter().map(|line| lab::fields(line)).filter(|line| {
            line.get("dst.workload").is_some_and(|workload| workload == "up") && line["reporter"] == "source"
        });
        lines.map(|line| line["tries"].clone()).collect()
    };
    lab::eventually("each is in the log, and some of them were tried again", async || {
        let tries = tries();
        ensure!(tries.len() as u64 == SOCKETS && tries.iter().any(|tries| tries == "2"), "{tries:?}");
        Ok(())
    })
    .await?;
    world.finish().await
}
