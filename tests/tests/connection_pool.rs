//! `connectionPool`: of a destination each client's pod uses so much at a time and no more, whether it is on this node, on
//! another, or outside the mesh; and its connections are kept as the rule says.

use std::{process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use lab::{
    Agent, Pair, Pod, Service,
    apps::{self, LoadKind, RawEnd, Tally},
    eventually, metric, require_root,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

const HTTP: u16 = 80;
const HTTP2: u16 = 81;
const TCP: u16 = 82;
const APP: u16 = 8080;
const ECHO: u16 = 9000;

/// How long a client waits for what is held until somebody lets go.
const PATIENCE: Duration = Duration::from_mins(2);

/// A server on the client's node, one on the other, and one outside the mesh.
async fn servers(pair: &Pair) -> Result<Vec<(Pod, Service)>> {
    let mut servers = Vec::new();
    let near = pair.a.pod("near").label("app", "near").start().await?;
    let far = pair.b.pod("far").label("app", "far").start().await?;
    let plain = pair.b.pod("plain").label("app", "plain").unenrolled().start().await?;
    for pod in [near, far, plain] {
        pod.serve(apps::http(APP)).await?;
        pod.serve(apps::tcp_echo(ECHO)).await?;
        let service = pair.lab.service(pod.name()).selector("app", pod.name());
        let service = service.port("http", HTTP, APP).port("http2", HTTP2, APP).port("tcp", TCP, ECHO);
        servers.push((pod, service.apply()?));
    }
    pair.settled().await?;
    for (pod, _) in &servers[..2] {
        pod.enrolled().await?;
    }
    Ok(servers)
}

/// The same `connectionPool` for all of them, and nothing tried twice.
async fn rule(pair: &Pair, pool: &str) -> Result<()> {
    let rules: Vec<_> = ["near", "far", "plain"]
        .iter()
        .map(|host| {
            format!(
                "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{ name: {host}, namespace: default }}
spec:
  host: {host}
  trafficPolicy: {{ connectionPool: {{ {pool} }} }}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{ name: {host}, namespace: default }}
spec:
  hosts: [{host}]
  http: [{{ retries: {{ attempts: 0 }}, route: [{{ destination: {{ host: {host} }} }}] }}]
"
            )
        })
        .collect();
    pair.apply("rules.yaml", &rules.join("---")).await
}

async fn overflows(agent: &Agent, host: &str, port: u16, limit: &str) -> Result<f64> {
    let cluster = format!("outbound|{port}||{host}.default.svc.cluster.local");
    let labels = [("cluster", &*cluster), ("limit", limit)];
    Ok(metric(&agent.metrics().await?, "mesh_upstream_overflow_total", &labels))
}

/// Waits until so many requests are held by the app, and so many were refused.
async fn held(pair: &Pair, pod: &Pod, port: u16, number: u64, refused: (&str, f64)) -> Result<()> {
    eventually("requests that are held, and the others refused", async || {
        let held = pod.stats(APP).await?.held;
        let over = overflows(&pair.agent_a, pod.name(), port, refused.0).await?;
        ensure!(held == number, "{held} are held at {}", pod.name());
        ensure!((over - refused.1).abs() < f64::EPSILON, "{over} were refused by {}", refused.0);
        Ok(())
    })
    .await
}

fn answered(tally: &Tally, ok: u64, overflow: u64) -> Result<()> {
    let of = |status| tally.statuses.get(&status).copied().unwrap_or_default();
    ensure!((of(200), of(503)) == (ok, overflow) && tally.errors.is_empty(), "{tally:?}");
    Ok(())
}

/// Three are under way, two wait, and the others are refused at once; over HTTP/1.
async fn connections_and_those_who_wait(pair: &Pair, pod: &Pod, service: &Service) -> Result<()> {
    let url = service.url(HTTP, "/hold");
    let asking = pair.client.get(&url).timeout(PATIENCE).many(12, 12, None);
    let watching = async {
        held(pair, pod, HTTP, 3, ("pending_requests", 7.0)).await?;
        ensure!(pod.stats(APP).await?.peak == 3, "{:?}", pod.stats(APP).await?);
        let refused = pair.client.http_get(&service.url(HTTP, "/"), &[]).await?;
        ensure!(refused.status == 503 && refused.body == "overflow", "{refused:?}");
        ensure!(refused.headers.get("x-envoy-overloaded").map(String::as_str) == Some("true"), "{refused:?}");
        ensure!(pod.release(APP).await? == 3);
        // Those who have waited have their turn.
        held(pair, pod, HTTP, 2, ("pending_requests", 8.0)).await?;
        ensure!(pod.release(APP).await? == 2);
        Ok(())
    };
    let (tally, ()) = tokio::try_join!(asking, watching)?;
    answered(&tally, 5, 7)?;
    let host = service.host();
    let labels = [
        ("reporter", "source"),
        ("response_flags", "UO"),
        ("response_code", "503"),
        ("destination_service", &*host),
    ];
    let flagged = metric(&pair.agent_a.metrics().await?, "istio_requests_total", &labels);
    ensure!((flagged - 8.0).abs() < f64::EPSILON, "{flagged} flagged UO");
    // Everything is free again, and another client's use is its own.
    answered(&pair.client.get(service.url(HTTP, "/slow/50")).many(9, 3, None).await?, 9, 0)
}

/// So many requests are under way over HTTP/2, on whatever connections.
async fn requests(pair: &Pair, pod: &Pod, service: &Service) -> Result<()> {
    let asking = pair.client.get(service.url(HTTP2, "/hold")).timeout(PATIENCE).streams(10, 10);
    let watching = async {
        held(pair, pod, HTTP2, 4, ("requests", 6.0)).await?;
        ensure!(pod.release(APP).await? == 4);
        Ok(())
    };
    let (streams, ()) = tokio::try_join!(asking, watching)?;
    let statuses: Vec<_> = streams.statuses.iter().map(|(status, count)| (*status, *count)).collect();
    ensure!(statuses == [(200, 4), (503, 6)], "{streams:?}");
    Ok(())
}

/// Three byte streams, and no fourth: it is closed without a byte.
async fn byte_streams(pair: &Pair, service: &Service) -> Result<()> {
    let at = service.at(TCP);
    let load = pair.client.load(LoadKind::Tcp, &format!("tcp://{at}"), 3, Duration::from_millis(50)).await?;
    let fourth = pair.client.raw(at).send("a").run().await?;
    ensure!(
        matches!(fourth.end, RawEnd::Closed | RawEnd::Reset) && fourth.received.0.is_empty(),
        "{fourth:?}"
    );
    ensure!(
        (overflows(&pair.agent_a, &service.name, TCP, "connections").await? - 1.0).abs() < f64::EPSILON,
        "not counted"
    );
    let dialled = at.to_string();
    let line = [("event", "refused"), ("kind", "overflow"), ("flags", "UO"), ("dst.addr", &*dialled)];
    pair.agent_a.logged(&line).await?;
    load.goes_on(2).await?;
    load.finish().await?;
    eventually("places for byte streams", async || {
        let next = pair.client.raw(at).send("a").expect("a").leave().run().await?;
        ensure!(next.end == RawEnd::Left, "{next:?}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_client_uses_so_much_of_a_destination_and_no_more() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("pool").await?;
    let servers = servers(&pair).await?;
    let pool = "tcp: { maxConnections: 3 }, http: { http1MaxPendingRequests: 2, http2MaxRequests: 4 }";
    rule(&pair, pool).await?;
    for (pod, service) in &servers {
        connections_and_those_who_wait(&pair, pod, service).await.with_context(|| service.host())?;
        requests(&pair, pod, service).await.with_context(|| service.host())?;
        byte_streams(&pair, service).await.with_context(|| service.host())?;
    }
    pair.finish().await
}

/// Connections of the app, and the most requests that one of them has had.
async fn spread(client: &Pod, url: &str, h2c: bool) -> Result<(usize, u64)> {
    let (mut connections, mut most) = (std::collections::BTreeSet::new(), 0);
    for _ in 0..6 {
        let request = client.get(url);
        let echo = if h2c { request.h2c() } else { request }.send().await?.echo()?;
        connections.insert(echo.connection);
        most = most.max(echo.request);
    }
    Ok((connections.len(), most))
}

#[tokio::test]
async fn a_rule_says_how_connections_are_kept_and_what_they_speak() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("poolkept").await?;
    let servers = servers(&pair).await?;
    rule(&pair, "http: { maxRequestsPerConnection: 2 }").await?;
    for ((_, service), (port, h2c)) in
        servers.iter().flat_map(|server| [(server, (HTTP, false)), (server, (HTTP2, true))])
    {
        let spread = spread(&pair.client, &service.url(port, "/"), h2c).await?;
        ensure!(spread == (3, 2), "{}: {spread:?} on port {port}", service.name);
    }
    let version = async |service: &Service, h2c: bool| -> Result<String> {
        let request = pair.client.get(service.url(HTTP, "/"));
        Ok(if h2c { request.h2c() } else { request }.send().await?.echo()?.version)
    };
    for (pool, over_http1, over_http2) in [
        ("tcp: {}", "HTTP/1.1", "HTTP/1.1"),
        ("http: { h2UpgradePolicy: UPGRADE }", "HTTP/2.0", "HTTP/2.0"),
        ("http: { useClientProtocol: true }", "HTTP/1.1", "HTTP/2.0"),
    ] {
        rule(&pair, pool).await?;
        for (_, service) in &servers {
            let seen = (version(service, false).await?, version(service, true).await?);
            let expected = (over_http1.to_owned(), over_http2.to_owned());
            ensure!(seen == expected, "{}: {seen:?} with {pool}", service.name);
        }
    }
    pair.finish().await
}

#[tokio::test]
async fn byte_streams_last_as_long_as_the_rule_says() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("poollasts").await?;
    let servers = servers(&pair).await?;
    let table = [("idleTimeout: 500ms", "SI"), ("maxConnectionDuration: 500ms", "DT")];
    for (pool, flag) in table {
        rule(&pair, &format!("tcp: {{ {pool} }}")).await?;
        for (_, service) in &servers {
            let at = service.at(TCP);
            let ended = pair.client.raw(at).send("a").expect("a").limit(PATIENCE).run().await?;
            ensure!(ended.end == RawEnd::Closed, "{}: {ended:?} with {pool}", service.name);
            let dialled = at.to_string();
            let line =
                [("event", "connection"), ("reporter", "source"), ("dst.addr", &*dialled), ("flags", flag)];
            pair.agent_a.logged(&line).await?;
        }
    }
    // The kernel's own word of who is asked for a sign of life.
    rule(&pair, "tcp: { tcpKeepalive: { time: 600s, interval: 5s, probes: 3 } }").await?;
    let (plain, service) = &servers[2];
    let url = format!("tcp://{}", service.at(TCP));
    let load = pair.client.load(LoadKind::Tcp, &url, 1, Duration::from_mins(1)).await?;
    let mut command = Command::new("ss");
    command.args(["-tnoH", "state", "established", "dst", &plain.at(ECHO).to_string()]);
    let sockets = pair.client.run(command).await?.stdout;
    ensure!(sockets.contains("timer:(keepalive,9min"), "{sockets}");
    load.process().stop(Duration::ZERO).await?;
    pair.finish().await
}

const RETRIES: &str = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: fails, namespace: default }
spec:
  host: fails
  trafficPolicy: { connectionPool: { http: { maxRetries: 1 } } }
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: fails, namespace: default }
spec:
  hosts: [fails]
  http: [{ retries: { attempts: 1, retryOn: 5xx }, route: [{ destination: { host: fails } }] }]
";

#[tokio::test]
async fn so_many_requests_are_tried_again_at_a_time() -> Result<()> {
    const REQUESTS: u64 = 10;
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("poolretry").await?;
    let fails = pair.b.pod("fails").label("app", "fails").start().await?;
    fails.serve(apps::http(APP).arg("--delay-ms=1000")).await?;
    let service = pair.lab.service("fails").selector("app", "fails").port("http", HTTP, APP).apply()?;
    pair.apply("rules.yaml", RETRIES).await?;
    fails.enrolled().await?;
    let tally = pair
        .client
        .get(service.url(HTTP, "/status/503"))
        .timeout(PATIENCE)
        .many(REQUESTS, REQUESTS, None)
        .await?;
    ensure!(tally.statuses.get(&503) == Some(&REQUESTS), "{tally:?}");
    let cluster = format!("outbound|{HTTP}||{}", service.host());
    let labels = [("cluster", &*cluster)];
    let over = metric(&pair.agent_a.metrics().await?, "mesh_retries_over_budget_total", &labels);
    // By default all ten may be tried again at once.
    let retried = fails.stats(APP).await?.paths["/status/503"] - REQUESTS;
    ensure!(over >= 1.0 && retried >= 1, "{over} were not tried again, {retried} were");
    ensure!((over + retried as f64 - REQUESTS as f64).abs() < f64::EPSILON, "{over} and {retried}");
    pair.finish().await
}

/// A server that is there and does nothing any more: PINGs tell, and what is under way fails instead of waiting for ever.
#[tokio::test]
async fn a_server_that_answers_no_ping_is_left() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("pings").await?;
    let servers = servers(&pair).await?;
    rule(&pair, "http: { http2KeepAlive: { interval: 200ms, timeout: 400ms } }").await?;
    for (pod, service) in &servers {
        // One that takes its time answers PINGs meanwhile.
        let slow = pair.client.get(service.url(HTTP2, "/slow/1500")).h2c().send().await?;
        ensure!(slow.status == 200, "{slow:?}");
        let (client, url) = (pair.client.clone(), service.url(HTTP2, "/hold"));
        let waiting =
            tokio::spawn(async move { client.get(&url).h2c().timeout(Duration::from_secs(30)).send().await });
        held(&pair, pod, HTTP2, 1, ("requests", 0.0)).await?;
        signal_apps(pod, Signal::SIGSTOP)?;
        let left = waiting.await??;
        signal_apps(pod, Signal::SIGCONT)?;
        ensure!(left.status == 502, "{left:?}");
        let endpoint = pod.at(APP).to_string();
        let line = [("path", "/hold"), ("reporter", "source"), ("endpoint", &*endpoint)];
        let line = pair.agent_a.logged(&line).await?;
        ensure!(line.get("flags").is_some_and(|flags| flags == "UC"), "{line:?}");
        eventually("it is asked again", async || {
            let answer = pair.client.get(service.url(HTTP2, "/")).h2c().send().await?;
            ensure!(answer.status == 200, "{answer:?}");
            Ok(())
        })
        .await?;
    }
    pair.finish().await
}

/// Sends a signal to every process of the pod.
fn signal_apps(pod: &Pod, signal: Signal) -> Result<()> {
    let pids = std::fs::read_to_string(pod.cgroup().join("cgroup.procs"))?;
    for pid in pids.lines() {
        kill(Pid::from_raw(pid.parse()?), signal)?;
    }
    Ok(())
}
