//! The lab's HTTP apps, clients and attackers do what they promise, with no agent between them.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use lab::{
    Lab, Pod,
    apps::{self, AttackKind, CallKind, End, RawEnd, Then},
    eventually,
};

/// Two nodes with a pod on each, neither of the mesh, and the HTTP app.
struct World {
    lab: Lab,
    client: Pod,
    server: Pod,
    to: SocketAddr,
}

impl World {
    async fn new(name: &str) -> Result<Option<Self>> {
        if !lab::require_root()? {
            return Ok(None);
        }
        let lab = Lab::new(name).await?;
        let client = lab.node("a").await?.pod("client").start().await?;
        let server = lab.node("b").await?.pod("server").start().await?;
        server.serve(apps::http(8080)).await?;
        let to = server.at(8080);
        Ok(Some(Self { lab, client, server, to }))
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.to)
    }
}

#[tokio::test]
async fn informational_answers_and_trailers_arrive() -> Result<()> {
    let Some(world) = World::new("tools-1xx").await? else { return Ok(()) };
    let hinted = world.client.get(world.url("/early-hints/2")).send().await?;
    assert_eq!((hinted.status, hinted.informational), (200, vec![103, 103]));
    assert_eq!(world.client.get(world.url("/early-hints")).h2c().send().await?.status, 200);
    // What `Expect` does: nothing of the body is sent before 100 came.
    let continued = world
        .client
        .raw(world.to)
        .send("POST /continue HTTP/1.1\r\nHost: lab\r\nExpect: 100-continue\r\nContent-Length: 5\r\nConnection: close\r\n\r\n")
        .expect("HTTP/1.1 100 Continue\r\n\r\n")
        .send("hello")
        .run()
        .await?;
    ensure!(continued.statuses() == [100, 200] && continued.end == RawEnd::Closed, "{continued:?}");
    ensure!(continued.text().contains(r#""expect":"100-continue""#), "{continued:?}");
    for h2c in [false, true] {
        let request = world.client.get(world.url("/trailers")).method("POST").body_bytes(10);
        let request = request.trailer("x-sum", "12").header("te", "trailers");
        let answer = if h2c { request.h2c() } else { request }.send().await?;
        let (sent, back) = (answer.echo()?.trailers, &answer.trailers);
        ensure!(sent.get("x-sum").is_some_and(|sum| sum == "12") && back["x-sum"] == "12", "{answer:?}");
        ensure!(back["x-lab-trailer"] == "last", "{answer:?}");
    }
    let stats = world.server.stats(8080).await?;
    ensure!(stats.aborted.is_empty() && stats.open == 0, "{stats:?}");
    world.lab.finish().await
}

#[tokio::test]
async fn answers_without_a_body_have_none() -> Result<()> {
    let Some(world) = World::new("tools-empty").await? else { return Ok(()) };
    for h2c in [false, true] {
        let get = |path: &str, method: &str| {
            let request = world.client.get(world.url(path)).method(method);
            if h2c { request.h2c() } else { request }
        };
        for (path, method, status) in [
            ("/status/204", "GET", 204),
            ("/status/304", "GET", 304),
            ("/", "HEAD", 200),
            ("/refuse/417", "POST", 417),
        ] {
            let answer = get(path, method).send().await?;
            ensure!((answer.status, answer.body_bytes) == (status, 0), "{method} {path}: {answer:?}");
        }
        let head = get("/", "HEAD").send().await?;
        ensure!(head.headers["content-length"].parse::<u64>()? > 100, "{head:?}");
        let large = get("/header-bytes/50000", "GET").send().await?;
        ensure!(large.headers["x-lab-filling"].len() > 45_000, "{}", large.headers["x-lab-filling"].len());
    }
    world.lab.finish().await
}

#[tokio::test]
async fn connections_are_kept_counted_and_said_goodbye_to() -> Result<()> {
    let Some(world) = World::new("tools-count").await? else { return Ok(()) };
    let request = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: lab\r\nx-lab-id: kept\r\n\r\n");
    // Two at once, and a third that ends the connection.
    let script = world.client.raw(world.to).send(request("/one") + &request("/two")).expect(r#""request":2"#);
    let kept = script.send(request("/goaway")).run().await?;
    ensure!(kept.statuses() == [200; 3] && kept.end == RawEnd::Closed, "{kept:?}");
    ensure!(kept.text().contains(r#""request":3"#), "{kept:?}");
    let streams = world.client.get(world.url("/")).header("x-lab-id", "streams").streams(50, 10).await?;
    ensure!(streams.statuses.get(&200) == Some(&50) && streams.connection.is_none(), "{streams:?}");
    ensure!(streams.pods.get("server") == Some(&50), "{streams:?}");
    let stats = world.server.stats(8080).await?;
    ensure!(stats.ids["kept"] == 3 && stats.ids["streams"] == 50 && stats.open == 0, "{stats:?}");
    ensure!(stats.connections == 2, "{stats:?}");
    ensure!(stats.paths["/two"] == 1 && stats.peak >= 1 && stats.aborted.is_empty(), "{stats:?}");
    let gone = world.client.get(world.url("/goaway/11")).h2c().send().await;
    ensure!(gone.is_err(), "{gone:?}");
    let stats = world.server.stats(8080).await?;
    ensure!(stats.aborted.is_empty(), "what was asked for is no abort: {stats:?}");
    world.lab.finish().await
}

#[tokio::test]
async fn whoever_leaves_early_is_noticed() -> Result<()> {
    let Some(world) = World::new("tools-hold").await? else { return Ok(()) };
    let held = |count| {
        let server = &world.server;
        eventually("requests that are held", async move || {
            let stats = server.stats(8080).await?;
            ensure!(stats.held == count, "{stats:?}");
            Ok(stats)
        })
    };
    let (answer, released) = tokio::join!(world.client.get(world.url("/hold")).send(), async {
        held(1).await?;
        world.server.release(8080).await
    });
    ensure!(answer?.status == 200 && released? == 1);
    for h2c in [false, true] {
        let request = world.client.get(world.url("/hold?left")).timeout(Duration::from_millis(300));
        let request = if h2c { request.h2c() } else { request };
        let (answer, stats) = tokio::join!(request.send(), held(1));
        ensure!(answer.is_err() && stats?.aborted.len() == usize::from(h2c));
        let stats = held(0).await?;
        ensure!(stats.aborted["/hold?left"] == 1 + u64::from(h2c) && stats.open == 0, "{stats:?}");
    }
    world.lab.finish().await
}

#[tokio::test]
async fn large_bodies_are_checked_as_they_pass_and_can_be_slow() -> Result<()> {
    const LARGE: u64 = 200 * 1024 * 1024;
    let Some(world) = World::new("tools-large").await? else { return Ok(()) };
    let server = world.server.serve(apps::http(8081)).await?;
    let url = |path: &str| format!("http://{}{path}", world.server.at(8081));
    for h2c in [false, true] {
        let get = |path: &str| {
            let request = world.client.get(url(path));
            if h2c { request.h2c() } else { request }
        };
        let up = get("/consume").upload(LARGE, 0).await?;
        ensure!(up.intact && up.bytes == LARGE && up.broken.is_none(), "{up:?}");
        let down = get(&format!("/pattern/{LARGE}")).download(LARGE, 0).await?;
        ensure!(down.intact && down.bytes == LARGE && down.broken.is_none(), "{down:?}");
        let other = get("/bytes/100000").download(100_000, 0).await?;
        ensure!(other.bytes == 100_000 && !other.intact, "{other:?}");
        let slow = get("/read-slow/1000000").upload(500_000, 0).await?;
        ensure!(slow.intact && slow.millis >= 450, "{slow:?}");
        let early =
            get("/pattern/500000").timeout(Duration::from_millis(200)).download(500_000, 1_000_000).await?;
        ensure!((1..400_000).contains(&early.bytes) && early.broken.is_some(), "{early:?}");
        let slow = get("/pattern/500000").download(500_000, 1_000_000).await?;
        ensure!(slow.intact && slow.millis >= 450, "{slow:?}");
    }
    ensure!(server.peak_rss_bytes()? < LARGE / 2, "{}", server.peak_rss_bytes()?);
    ensure!(server.cpu_time()? > Duration::from_millis(10) && server.rss_bytes()? > 1_000_000);
    world.lab.finish().await
}

#[tokio::test]
async fn tunnels_carry_bytes_and_messages() -> Result<()> {
    let Some(world) = World::new("tools-tunnel").await? else { return Ok(()) };
    for (h2c, status) in [(false, 101), (true, 200)] {
        let spoken = world.client.websocket(&world.url("/ws"), h2c, &["one", "zwei"]).await?;
        ensure!(spoken.status == status && spoken.pod.as_deref() == Some("server"), "{spoken:?}");
        ensure!(spoken.messages == ["one", "zwei"] && spoken.binary_bytes == 100_000, "{spoken:?}");
        ensure!(spoken.pong && spoken.close == Some(1000), "{spoken:?}");
        let tunnelled = world.client.connect(world.to, "db.example:5432", 300_000, h2c).await?;
        ensure!(tunnelled.status == 200 && tunnelled.intact, "{tunnelled:?}");
        ensure!(tunnelled.greeting.0 == b"CONNECT db.example:5432\r\n", "{tunnelled:?}");
    }
    let upgraded = world.client.upgrade(&world.url("/upgrade"), "lab-echo", 300_000).await?;
    ensure!(upgraded.status == 101 && upgraded.intact, "{upgraded:?}");
    let refused = world.client.upgrade(&world.url("/upgrade"), "something-else", 10).await?;
    ensure!(refused.status == 426 && refused.received == 0, "{refused:?}");
    world.lab.finish().await
}

#[tokio::test]
async fn raw_bytes_go_and_come_exactly() -> Result<()> {
    let Some(world) = World::new("tools-raw").await? else { return Ok(()) };
    let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n\x00\xff!";
    world.server.serve(apps::http1_raw(8081, &[answer, b"nonsense\r\n"], Then::Close)).await?;
    world.server.serve(apps::http1_raw(8082, &[b"HTTP/1.1 200 OK\r\n"], Then::Reset)).await?;
    world.server.serve(apps::http1_raw(8083, &[], Then::Keep)).await?;
    let head = "GET / HTTP/1.1\r\nHost: lab\r\n\r\n";
    let both = world.client.raw(world.server.at(8081)).send(head).expect("!").send(head).run().await?;
    ensure!(
        both.received.0 == [&answer[..], b"nonsense\r\n"].concat() && both.end == RawEnd::Closed,
        "{both:?}"
    );
    let reset = world.client.raw(world.server.at(8082)).send(head).run().await?;
    ensure!(reset.text() == "HTTP/1.1 200 OK\r\n" && reset.end == RawEnd::Reset, "{reset:?}");
    let limit = Duration::from_millis(200);
    let open = world.client.raw(world.server.at(8083)).send(head).limit(limit).run().await?;
    ensure!(open.end == RawEnd::Open && open.received.0.is_empty(), "{open:?}");
    // A head that comes byte by byte, and pieces that are repeated.
    let slow = world.client.raw(world.to).drip(Duration::from_millis(2), head).expect("\r\n\r\n").leave();
    let slow = slow.run().await?;
    ensure!(slow.statuses() == [200] && slow.end == RawEnd::Left && slow.millis >= 58, "{slow:?}");
    let many = world.client.raw(world.to).send("GET / HTTP/1.1\r\nHost: lab\r\n").repeat(500, "x-a: b\r\n");
    let many = many.send("Connection: close\r\n\r\n").run().await?;
    ensure!(many.statuses() == [200] && many.text().matches("b, b").count() > 100, "{many:?}");
    let resets = world.client.raw(world.to).send("GET /reset HTTP/1.1\r\nHost: lab\r\n\r\n").run().await?;
    ensure!(resets.received.0.is_empty() && resets.end == RawEnd::Reset, "{resets:?}");
    let late = world.client.raw(world.to).send("GET /reset-late HTTP/1.1\r\nHost: lab\r\n\r\n").run().await?;
    ensure!(late.text().contains("so far so g") && late.end == RawEnd::Reset, "{late:?}");
    world.lab.finish().await
}

#[tokio::test]
async fn grpc_calls_of_all_kinds_end_as_they_are_asked_to() -> Result<()> {
    let Some(world) = World::new("tools-grpc").await? else { return Ok(()) };
    world.server.serve(apps::grpc(9000)).await?;
    let url = format!("http://{}", world.server.at(9000));
    for (kind, notes, counted) in [
        (CallKind::Unary, 1, 1),
        (CallKind::ServerStream, 3, 3),
        (CallKind::ClientStream, 1, 3),
        (CallKind::Bidi, 3, 3),
    ] {
        let call = world.client.call(&url, kind).count(3).filling(100_000).deadline(Duration::from_secs(7));
        let called = call.send().await?;
        ensure!(called.code == "Ok" && called.notes.len() == notes, "{kind:?}: {called:?}");
        let last = &called.notes[notes - 1];
        ensure!(
            last.count == counted && last.pod == "server" && last.timeout == "7000m",
            "{kind:?}: {called:?}"
        );
        let failed = world.client.call(&url, kind).count(3).text("status/9").send().await?;
        ensure!(failed.code == "FailedPrecondition" && failed.notes.len() == notes, "{kind:?}: {failed:?}");
    }
    // Nobody on the way keeps the deadline, and neither do client and server.
    let late = world.client.call(&url, CallKind::Unary).text("sleep/300").deadline(Duration::from_millis(50));
    let late = late.send().await?;
    ensure!(late.code == "Ok" && late.millis >= 300, "{late:?}");
    ensure!(world.client.grpc(&url, "slow/50").await?.check == "SERVING");
    world.lab.finish().await
}

#[tokio::test]
async fn attacks_are_bounded_and_say_how_they_ended() -> Result<()> {
    let Some(world) = World::new("tools-attack").await? else { return Ok(()) };
    let limit = Duration::from_secs(5);
    let attack = async |kind, count, args: &[&str]| {
        let attack = world.client.h2_attack(world.to, kind, count, limit, args).await?;
        eprintln!("{attack:?}");
        anyhow::Ok(attack)
    };
    // What the h2 library does by itself: these are its limits, not promises of the mesh.
    let resets = attack(AttackKind::RapidReset, 5000, &[]).await?;
    ensure!(
        resets.frames_sent > 0 && resets.goaway.as_ref().is_some_and(|goaway| goaway.code == 11),
        "{resets:?}"
    );
    let continued = attack(AttackKind::ContinuationFlood, 100_000, &[]).await?;
    ensure!(continued.end != End::Survived && continued.frames_sent < 100_000, "{continued:?}");
    let settings = attack(AttackKind::SettingsFlood, 500, &["--linger-ms=100"]).await?;
    ensure!(settings.end == End::Survived && settings.frames_sent == 500, "{settings:?}");
    let pings = attack(AttackKind::PingFlood, 500, &["--deaf", "--linger-ms=100"]).await?;
    ensure!(pings.end == End::Survived && pings.frames_received > 500, "{pings:?}");
    let stalled = attack(AttackKind::ZeroWindow, 20, &["--path=/bytes/1000000", "--linger-ms=300"]).await?;
    ensure!(stalled.end == End::Survived && stalled.answers == 20 && stalled.data_bytes == 0, "{stalled:?}");
    let bomb = attack(AttackKind::HeaderBomb, 5, &["--linger-ms=300"]).await?;
    ensure!(bomb.bytes_sent < 100_000, "{bomb:?}");
    let empty = attack(AttackKind::EmptyDataFlood, 1000, &["--linger-ms=100"]).await?;
    ensure!(empty.frames_sent == 1001 && empty.answers == 0, "{empty:?}");
    let open = attack(AttackKind::OpenStreams, 1500, &["--path=/hold", "--linger-ms=300"]).await?;
    ensure!(open.resets.get(&7).is_some_and(|refused| *refused >= 400) || open.goaway.is_some(), "{open:?}");
    world.lab.finish().await
}
