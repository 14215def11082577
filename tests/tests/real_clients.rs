//! Clients of the real world see through two agents what they would see without: curl, nghttp, Python, gRPC in Go.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lab::{
    Pair, Pod, Service, apps,
    clients::{Client, Step, require},
};

/// The HTTP app and the gRPC app on the other node, behind one Service.
struct World {
    pair: Pair,
    service: Service,
    server: Pod,
}

impl World {
    async fn new(name: &str) -> Result<Self> {
        let pair = Pair::new(name).await?;
        let server = pair.b.pod("web").sa("web").label("app", "web").start().await?;
        server.serve(apps::http(8080)).await?;
        server.serve(apps::grpc(9000)).await?;
        let service = pair.lab.service("web").selector("app", "web");
        let service =
            service.port("http", 80, 8080).port("http2", 81, 8080).port("grpc", 50051, 9000).apply()?;
        pair.settled().await?;
        server.enrolled().await?;
        Ok(Self { pair, service, server })
    }

    fn client(&self) -> &Pod {
        &self.pair.client
    }
}

fn step<'a>(steps: &'a std::collections::BTreeMap<String, Step>, name: &str) -> Result<&'a Step> {
    steps.get(name).with_context(|| format!("no step {name}: {steps:?}"))
}

#[tokio::test]
async fn curl_gets_posts_and_keeps_its_connection() -> Result<()> {
    if !require(&[Client::Curl])? {
        return Ok(());
    }
    let world = World::new("curl").await?;
    let resolve = format!("web.default:80:{}", world.service.ip());
    let url = |path: &str| format!("http://web.default{path}");
    let (first, second) = (url("/first?x=1"), url("/second"));
    let both = world.client().curl(&["--resolve", &resolve, &first, &second]).await?;
    ensure!(both.exit == Some(0) && both.transfers.len() == 2, "{both:?}");
    let [one, two] = &both.transfers[..] else { anyhow::bail!("{both:?}") };
    ensure!((one.status, one.version.as_str(), one.connects) == (200, "1.1", 1), "{one:?}");
    ensure!((two.status, two.connects) == (200, 0), "the connection is used again: {two:?}");
    ensure!(one.headers["x-lab-pod"] == ["web"], "{one:?}");
    ensure!(both.stdout.contains(r#""authority":"web.default""#), "{both:?}");
    let line = [("reporter", "source"), ("path", "/first?x=1"), ("status", "200"), ("method", "GET")];
    let line = world.pair.agent_a.logged(&line).await?;
    ensure!(line["authority"] == "web.default" && line["security"] == "mutual_tls", "{line:?}");
    let line = [("reporter", "destination"), ("path", "/first?x=1"), ("status", "200")];
    world.pair.agent_b.logged(&line).await?;

    // A body above a mebibyte makes curl ask first, with `Expect: 100-continue`.
    let data = "x".repeat(100_000);
    let args = ["--resolve", &resolve, "--data-binary", &data, "--header", "Expect: 100-continue"];
    let posted = world.client().curl(&[&args[..], &[&url("/post")]].concat()).await?;
    let transfer = posted.transfers.first().context("no transfer")?;
    ensure!((transfer.status, transfer.sent) == (200, 100_000), "{posted:?}");
    ensure!(posted.stdout.contains(r#""body_bytes":100000"#), "{posted:?}");
    ensure!(transfer.seconds < 0.9, "curl waits a second for a 100 that does not come: {transfer:?}");
    let head = world.client().curl(&["--resolve", &resolve, "--head", &url("/head")]).await?;
    ensure!(head.transfers[0].status == 200 && head.transfers[0].received == 0, "{head:?}");
    world.pair.finish().await
}

#[tokio::test]
async fn curl_speaks_http_2_with_prior_knowledge() -> Result<()> {
    if !require(&[Client::Curl])? {
        return Ok(());
    }
    let world = World::new("curl-h2").await?;
    for port in [80, 81] {
        let url = world.service.url(port, "/bytes/1000000");
        let got = world.client().curl(&["--http2-prior-knowledge", &url, "--output", "/dev/null"]).await?;
        let transfer = got.transfers.first().context("no transfer")?;
        ensure!(
            (transfer.status, transfer.version.as_str(), transfer.received) == (200, "2", 1_000_000),
            "{port}: {got:?}"
        );
        let url = world.service.url(port, "/post");
        let posted = world.client().curl(&["--http2-prior-knowledge", "--data", "a=b", &url]).await?;
        ensure!(posted.transfers[0].status == 200, "{port}: {posted:?}");
        ensure!(posted.stdout.contains(r#""body_bytes":3"#), "{port}: {posted:?}");
    }
    for agent in [&world.pair.agent_a, &world.pair.agent_b] {
        let (now, peak) = (agent.rss_bytes()?, agent.peak_rss_bytes()?);
        ensure!((1 << 20..200 << 20).contains(&now) && peak >= now, "{now} of {peak} bytes");
        ensure!(agent.cpu_time()? > Duration::ZERO);
    }
    world.pair.finish().await
}

#[tokio::test]
async fn nghttp_and_h2load_use_many_streams() -> Result<()> {
    if !require(&[Client::Nghttp])? {
        return Ok(());
    }
    let world = World::new("nghttp").await?;
    let url = world.service.url(81, "/trailers");
    let seen = world.client().nghttp(&["--verbose", "--multiply=5", "--header=te: trailers", &url]).await?;
    let count = |what: &str| seen.matches(what).count();
    ensure!(count(":status: 200") == 5 && count("x-lab-trailer: last") == 5, "{seen}");
    let url = world.service.url(81, "/load");
    let load = world
        .client()
        .h2load(&["--requests=300", "--clients=3", "--max-concurrent-streams=20", &url])
        .await?;
    ensure!(load.contains("status codes: 300 2xx, 0 3xx, 0 4xx, 0 5xx"), "{load}");
    ensure!(world.server.stats(8080).await?.paths.get("/load") == Some(&300));
    world.pair.finish().await
}

#[tokio::test]
async fn requests_makes_all_steps_of_a_session() -> Result<()> {
    if !require(&[Client::Requests])? {
        return Ok(());
    }
    let world = World::new("requests").await?;
    let steps = world.client().requests(&world.service.url(80, ""), "web").await?;
    expect(&steps, &[("chunked", 50_000), ("post", 100_000)])?;
    let echo = step(&steps, "json")?.echo.as_ref().context("no echo")?;
    ensure!(echo.method == "PUT" && echo.headers["content-type"] == "application/json", "{echo:?}");
    let chunked = step(&steps, "chunked")?.echo.as_ref().context("no echo")?;
    ensure!(!chunked.headers.contains_key("content-length"), "{chunked:?}");
    let line = [("reporter", "source"), ("path", "/status/404"), ("status", "404")];
    world.pair.agent_a.logged(&line).await?;
    world.pair.finish().await
}

/// What the steps of both Python clients have in common.
fn expect(steps: &std::collections::BTreeMap<String, Step>, bodies: &[(&str, u64)]) -> Result<()> {
    let get = step(steps, "get")?;
    let echo = get.echo.as_ref().with_context(|| format!("no echo: {get:?}"))?;
    ensure!(get.status == 200 && get.pod.as_deref() == Some("web"), "{get:?}");
    ensure!(echo.target == "/get?a=1&b=%20" && echo.authority == "web", "{get:?}");
    for (name, size) in bodies {
        let posted = step(steps, name)?;
        let received = posted.echo.as_ref().map(|echo| echo.body_bytes);
        ensure!(posted.status == 200 && received == Some(*size), "{name}: {posted:?}");
    }
    for (name, status, bytes) in [("head", 200, 0), ("empty", 204, 0), ("download", 200, 1_000_000)] {
        let step = step(steps, name)?;
        ensure!((step.status, step.bytes) == (status, bytes), "{name}: {step:?}");
    }
    ensure!(step(steps, "missing")?.status == 404, "{steps:?}");
    Ok(())
}

#[tokio::test]
async fn httpx_speaks_both_versions() -> Result<()> {
    if !require(&[Client::Httpx])? {
        return Ok(());
    }
    let world = World::new("httpx").await?;
    for (h2c, port, version) in [(false, 80, "HTTP/1.1"), (true, 80, "HTTP/2"), (true, 81, "HTTP/2")] {
        let (steps, at_once) = world.client().httpx(&world.service.url(port, ""), "web", h2c).await?;
        expect(&steps, &[("post", 300_000), ("streamed", 50_000)])?;
        ensure!(steps.values().all(|step| step.version == version), "{steps:?}");
        ensure!(at_once.len() == 30 && at_once.iter().all(|step| step.status == 200), "{at_once:?}");
    }
    ensure!(world.server.stats(8080).await?.ids.get("httpx") == Some(&3));
    world.pair.finish().await
}

#[tokio::test]
async fn grpc_in_go_checks_watches_and_keeps_its_deadline() -> Result<()> {
    if !require(&[Client::Grpc])? {
        return Ok(());
    }
    let world = World::new("go-grpc").await?;
    let address = world.service.at(50051).to_string();
    let health = world.client().go_grpc(&address, "count/5", Duration::from_secs(10)).await?;
    ensure!(health.check.code == "OK" && health.check.messages == ["SERVING"], "{health:?}");
    ensure!(health.check.pod == "web" && health.watch.pod == "web", "{health:?}");
    ensure!(health.watch.code == "OK" && health.watch.messages.len() == 5, "{health:?}");
    let unknown = world.client().go_grpc(&address, "nobody", Duration::from_secs(10)).await?;
    ensure!(unknown.check.code == "NotFound" && unknown.watch.code == "NotFound", "{unknown:?}");
    let late = world.client().go_grpc(&address, "slow/10000", Duration::from_millis(400)).await?;
    ensure!(late.check.code == "DeadlineExceeded" && late.check.ms < 3000, "{late:?}");
    world.pair.finish().await
}

/// Python's WebSocket client against the WebSocket of the HTTP app at `url`.
async fn speaks_websocket(client: &Pod, url: &str, pod: &str) -> Result<()> {
    let socket = client.websockets(url).await?;
    ensure!(socket.text == "grüße" && socket.pieces == "in three pieces", "{socket:?}");
    ensure!(socket.binary_bytes == 1_000_000 && socket.close == 1000, "{socket:?}");
    ensure!(socket.pod.as_deref() == Some(pod), "{socket:?}");
    Ok(())
}

#[tokio::test]
async fn websockets_are_spoken_through_the_mesh() -> Result<()> {
    if !require(&[Client::Websockets])? {
        return Ok(());
    }
    let world = World::new("websockets").await?;
    for port in [80, 81] {
        let url = world.service.url(port, "/ws").replace("http://", "ws://");
        speaks_websocket(world.client(), &url, "web").await?;
    }
    let line = [
        ("reporter", "source"),
        ("status", "101"),
        ("cluster", "outbound|80||web.default.svc.cluster.local"),
    ];
    let line = world.pair.agent_a.logged(&line).await?;
    ensure!(line["bytes_sent"].parse::<u64>()? > 1_000_000 && line["security"] == "mutual_tls", "{line:?}");
    world.pair.finish().await
}
