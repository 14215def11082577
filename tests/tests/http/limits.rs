//! What a client may take of the agent: each limit holds, is told to the client, and is counted.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::{apps::RawEnd, metric};
use tokio::task::JoinSet;

use crate::world::{HTTP, HTTP2, UNDECLARED, World, counted, logged_times};

const ROUTES: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: near, namespace: default }
spec: { hosts: [near], http: [{ route: [{ destination: { host: near } }] }] }
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: far, namespace: default }
spec: { hosts: [far], http: [{ route: [{ destination: { host: far } }] }] }
";

async fn refused(world: &World, status: &str, flags: &str) -> Result<f64> {
    let labels = [("reporter", "source"), ("response_code", status), ("response_flags", flags)];
    Ok(metric(&world.pair.agent_a.metrics().await?, "istio_requests_total", &labels))
}

#[tokio::test]
async fn heads_that_are_too_large_or_too_slow() -> Result<()> {
    let flags = [
        "--request-head-timeout=0.4",
        "--max-request-head-bytes=4096",
        "--max-request-headers=20",
        "--max-request-target-bytes=200",
    ];
    let Some(world) = World::with("heads", &flags).await? else { return Ok(()) };
    let at = world.far.at(HTTP);
    let send = |head: String| world.client().raw(at).send(head).run();
    let target = "x".repeat(300);
    let long = send(format!("GET /{target} HTTP/1.1\r\nHost: lab\r\n\r\n")).await?;
    ensure!(long.statuses() == [414] && long.end == RawEnd::Closed, "{long:?}");
    let many = send(format!("GET / HTTP/1.1\r\nHost: lab\r\n{}\r\n", "x-a: b\r\n".repeat(30))).await?;
    ensure!(many.statuses() == [431], "{many:?}");
    let large = send(format!("GET / HTTP/1.1\r\nHost: lab\r\nx-a: {}\r\n\r\n", "b".repeat(5000))).await?;
    ensure!(large.statuses() == [431], "{large:?}");
    // Byte by byte, a head never gets done: the time for it is bounded all the same.
    let head = format!("GET / HTTP/1.1\r\nHost: lab\r\nx-slow: {}", "z".repeat(2000));
    let slow = world.client().raw(at).drip(Duration::from_millis(20), head).run().await?;
    ensure!(slow.statuses() == [408] && slow.end != RawEnd::Open && slow.sent < 1000, "{slow:?}");
    // So is that for a header block of HTTP/2 which stops in the middle.
    let block = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00\x64\x01\x04\x00\x00\x00\x01\x82";
    let slow = world.client().raw(at).send(block).run().await?;
    ensure!(slow.end != RawEnd::Open, "{slow:?}");
    let late = [("kind", "head_timeout"), ("side", "source"), ("pod", "client")];
    counted(&world.pair.agent_a, "mesh_refused_total", &late, 1).await?;
    let line = [("event", "refused"), ("kind", "head_timeout"), ("pod", "client"), ("flags", "SI")];
    world.pair.agent_a.logged(&line).await?;
    for (path, header, status) in
        [(format!("/{target}"), "b".to_owned(), 414), ("/".to_owned(), "b".repeat(5000), 431)]
    {
        let request = world.client().get(world.far.service.url(HTTP2, &path)).h2c().header("x-a", &header);
        ensure!(request.send().await?.status == status, "{status} over HTTP/2");
    }
    for (status, count) in [("414", 2.0), ("431", 3.0)] {
        let seen = refused(&world, status, "DPE").await?;
        ensure!((seen - count).abs() < f64::EPSILON, "{seen} with {status}");
    }
    // So large that it is not even decoded: known is only whose it was.
    let request =
        world.client().get(world.far.service.url(HTTP2, "/")).h2c().header("x-a", &"b".repeat(20_000));
    ensure!(request.send().await?.status == 431);
    let undecoded = [("kind", "head_too_large"), ("side", "source"), ("pod", "client")];
    counted(&world.pair.agent_a, "mesh_refused_total", &undecoded, 1).await?;
    let line = [("event", "refused"), ("kind", "head_too_large"), ("pod", "client"), ("flags", "DPE")];
    let line = world.pair.agent_a.logged(&line).await?;
    ensure!(line["error"] == "the headers are far larger than the 4096 bytes allowed", "{line:?}");
    ensure!((refused(&world, "408", "SI").await? - 1.0).abs() < f64::EPSILON);
    for (status, flags, sentence, count) in [
        ("414", "DPE", "the target of the request is longer than 200 bytes", 1),
        ("414", "DPE", "the target has 301 bytes, 200 are allowed", 1),
        ("431", "DPE", "the request has more than 20 header lines", 1),
        ("431", "DPE", "the head of the request is larger than 4096 bytes", 1),
        ("408", "SI", "the head of the request did not arrive in time", 1),
    ] {
        let line = [("status", status), ("flags", flags), ("error", sentence), ("src.workload", "client")];
        logged_times(&world.pair.agent_a, &line, count).await?;
    }
    ensure!(world.client().http_get(&world.far.url("/"), &[]).await?.status == 200);
    world.finish().await
}

#[tokio::test]
async fn connections_and_streams_on_which_nothing_moves() -> Result<()> {
    let flags = ["--idle-timeout=0.5", "--stream-idle-timeout=0.7", "--request-head-timeout=0.5"];
    let Some(world) = World::with("idle", &flags).await? else { return Ok(()) };
    for side in world.both() {
        let idle =
            world.client().raw(side.at(HTTP)).send("GET / HTTP/1.1\r\nHost: lab\r\n\r\n").run().await?;
        ensure!(idle.statuses() == [200] && idle.end == RawEnd::Closed && idle.millis >= 400, "{idle:?}");
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00";
        let idle = world.client().raw(side.at(HTTP)).send(preface).run().await?;
        ensure!(idle.end == RawEnd::Closed && idle.millis >= 400, "{idle:?}");
    }
    let client = [("pod", "client"), ("namespace", "default")];
    counted(&world.pair.agent_a, "mesh_idle_closed_total", &client, 4).await?;
    for side in world.both() {
        for h2c in [false, true] {
            let request = world.client().get(side.url("/slow/30000"));
            let stalled = if h2c { request.h2c() } else { request }.send().await?;
            ensure!(stalled.status == 504, "{stalled:?}");
            // What moves may last longer than that.
            let request = world.client().get(side.url("/pattern/200000"));
            let slow = if h2c { request.h2c() } else { request }.download(200_000, 100_000).await?;
            ensure!(slow.intact && slow.millis >= 1500, "{slow:?}");
        }
    }
    ensure!((refused(&world, "504", "SI").await? - 4.0).abs() < f64::EPSILON);
    for side in world.both() {
        let line = [("path", "/slow/30000"), ("status", "504"), ("flags", "SI"), ("reporter", "source")];
        let line = [&line[..], &[("dst.workload", side.name())]].concat();
        logged_times(&world.pair.agent_a, &line, 2).await?;
        let line = [("path", "/pattern/200000"), ("status", "200"), ("flags", "-"), ("reporter", "source")];
        let line = [&line[..], &[("dst.workload", side.name()), ("bytes_sent", "200000")]].concat();
        logged_times(&world.pair.agent_a, &line, 2).await?;
    }
    let named = |line: &String| {
        line.contains("status=504") && line.contains("nothing moved for too long while waiting for")
    };
    ensure!(world.pair.agent_a.access_log().iter().any(named), "no line says what was waited for");
    world.finish().await
}

#[tokio::test]
async fn clients_that_say_nothing() -> Result<()> {
    let Some(world) = World::with("silent", &["--detection-timeout=0.6"]).await? else { return Ok(()) };
    world.pair.apply("routes.yaml", ROUTES).await?;
    for side in world.both() {
        // A port declared HTTP, and one that is not but whose requests are routed: nothing else may pass.
        for port in [HTTP, UNDECLARED] {
            let silent = world.client().raw(side.at(port)).run().await?;
            ensure!(silent.end != RawEnd::Open && silent.received.0.is_empty(), "{port}: {silent:?}");
            ensure!(silent.millis >= 500, "{port}: {silent:?}");
        }
    }
    let client = [("pod", "client"), ("namespace", "default"), ("side", "source")];
    counted(&world.pair.agent_a, "mesh_refused_total", &client, 4).await?;
    for (sentence, count) in [("no request within 600ms", 2), ("nothing known within 600ms", 2)] {
        let line = |line: &&String| line.contains("event=refused") && line.contains(sentence);
        let seen = world.pair.agent_a.access_log().iter().filter(line).count();
        ensure!(seen == count, "{seen} times {sentence}");
    }
    world.finish().await
}

#[tokio::test]
async fn a_client_that_takes_nothing_is_given_up() -> Result<()> {
    let Some(world) = World::with("flush", &["--flush-timeout=0.7"]).await? else { return Ok(()) };
    for side in world.both() {
        // More than every buffer on the way holds, and nobody who reads it.
        let request = "GET /bytes/1000000000 HTTP/1.1\r\nHost: lab\r\n\r\n";
        let deaf = world.client().raw(side.at(HTTP)).send(request).deaf(Duration::from_secs(3)).run().await?;
        ensure!(
            deaf.end != RawEnd::Open,
            "{}: {:?} after {} bytes",
            side.name(),
            deaf.end,
            deaf.received.0.len()
        );
    }
    lab::eventually("both are counted", async || {
        let seen = refused(&world, "200", "SI").await?;
        ensure!(seen >= 2.0, "{seen}");
        Ok(())
    })
    .await?;
    for side in world.both() {
        let line = [("dst.workload", side.name()), ("reporter", "source"), ("flags", "SI")];
        let line = world.pair.agent_a.logged(&line).await?;
        ensure!(line["error"] == "nothing moved within the response for too long", "{line:?}");
        ensure!(line["bytes_sent"].parse::<u64>()? < 1_000_000_000, "{line:?}");
    }
    ensure!(world.client().http_get(&world.far.url("/"), &[]).await?.status == 200);
    world.finish().await
}

/// 64 KiB a second, in sips that are small against the limit: so slow that no write goes through within it.
#[tokio::test]
async fn a_client_that_takes_little_at_a_time_is_served_to_the_end() -> Result<()> {
    const SIZE: u64 = 12_000_000;
    const SIP: Duration = Duration::from_millis(250);
    const SIPS: u64 = 48;
    let Some(world) = World::with("trickle", &["--flush-timeout=4"]).await? else { return Ok(()) };
    let path = format!("/bytes/{SIZE}");
    let http1 = format!("GET {path} HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n").into_bytes();
    // Windows as large as they may be, then a GET of nothing but what is needed.
    let mut http2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x06\x04\0\0\0\0\0\0\x04\x7f\xff\xff\xff".to_vec();
    http2.extend(b"\0\0\x04\x08\0\0\0\0\0\x7f\xff\0\0");
    http2.extend([0, 0, 4 + path.len() as u8 + 5, 1, 5, 0, 0, 0, 1, 0x82, 0x86, 0x04, path.len() as u8]);
    http2.extend(path.as_bytes());
    http2.extend(b"\x01\x03lab");
    let mut slow = JoinSet::new();
    for side in world.both() {
        for (request, port) in [(&http1, HTTP), (&http2, HTTP2)] {
            let (client, at, request) = (world.client().clone(), side.at(port), request.clone());
            slow.spawn(async move {
                let limit = SIP * SIPS as u32 + Duration::from_secs(10);
                client.raw(at).send(request).sip(SIP, SIPS).limit(limit).run().await
            });
        }
    }
    for taken in slow.join_all().await {
        let taken = taken?;
        ensure!(taken.received.0.len() as u64 > SIZE, "{:?} after {}", taken.end, taken.received.0.len());
    }
    for side in world.both() {
        let line = [("path", &*path), ("status", "200"), ("flags", "-"), ("reporter", "source")];
        let line = [&line[..], &[("dst.workload", side.name())]].concat();
        logged_times(&world.pair.agent_a, &line, 2).await?;
    }
    world.finish().await
}

#[tokio::test]
async fn a_pod_has_so_many_connections_and_no_more() -> Result<()> {
    let Some(world) = World::with("connections", &["--max-connections-per-pod=5"]).await? else {
        return Ok(());
    };
    let mut held = JoinSet::new();
    for _ in 0..5 {
        let (client, url) = (world.client().clone(), world.far.url("/hold"));
        held.spawn(async move { client.get(url).send().await });
    }
    lab::eventually("five connections are held", async || {
        let stats = world.far.pod.stats(crate::world::APP).await?;
        ensure!(stats.held == 5, "{stats:?}");
        Ok(())
    })
    .await?;
    let more =
        world.client().raw(world.far.at(HTTP)).send("GET / HTTP/1.1\r\nHost: lab\r\n\r\n").run().await?;
    world.far.pod.release(crate::world::APP).await?;
    let held = held.join_all().await;
    ensure!(more.received.0.is_empty() && more.end != RawEnd::Open, "{more:?}");
    ensure!(held.into_iter().all(|answer| answer.is_ok_and(|answer| answer.status == 200)));
    let labels = [("side", "source"), ("kind", "overflow"), ("pod", "client")];
    let counted = metric(&world.pair.agent_a.metrics().await?, "mesh_refused_total", &labels);
    ensure!((counted - 1.0).abs() < f64::EPSILON, "{counted}");
    let line = [("event", "refused"), ("kind", "overflow"), ("pod", "client"), ("flags", "UO")];
    let line = world.pair.agent_a.logged(&line).await?;
    ensure!(line["error"] == "the pod has 5 connections open already", "{line:?}");
    world.requests(&[("response_code", "200"), ("destination_workload", "far")], 5).await?;
    // Another pod of the node has its own.
    ensure!(world.near.pod.http_get(&world.far.url("/"), &[]).await?.status == 200);
    world.finish().await
}
