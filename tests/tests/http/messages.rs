//! Requests and responses come through as they were meant, whatever the versions of HTTP at both ends.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::apps::{self, RawEnd};

use crate::world::{APP, HTTP, HTTP2, UNDECLARED, World, counted, logged_times};

#[tokio::test]
async fn connections_are_kept_and_requests_pipelined() -> Result<()> {
    let Some(world) = World::new("kept").await? else { return Ok(()) };
    for side in world.both() {
        let request = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: lab\r\nx-lab-id: kept\r\n\r\n");
        let script = world.client().raw(side.at(HTTP)).send(request("/one") + &request("/two"));
        let script = script.expect("/two").send(request("/three")).expect("/three");
        let last = "GET /four HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n";
        let answer = script.send(last).run().await?;
        ensure!(answer.statuses() == [200; 4] && answer.end == RawEnd::Closed, "{answer:?}");
        let stats = side.pod.stats(APP).await?;
        // A request that follows at the heels of another may find its connection not free yet.
        ensure!(stats.connections <= 2, "each request had a connection of its own to the app: {stats:?}");
        world.requests(&[("response_code", "200"), ("destination_workload", side.name())], 4).await?;
        for path in ["/one", "/two", "/three", "/four"] {
            let line = [("path", path), ("dst.workload", side.name()), ("reporter", "source")];
            let line = world.pair.agent_a.logged(&line).await?;
            ensure!((&*line["status"], &*line["tries"], &*line["flags"]) == ("200", "1", "-"), "{line:?}");
        }
    }
    world.finish().await
}

#[tokio::test]
async fn old_clients_absolute_targets_and_empty_answers() -> Result<()> {
    let Some(world) = World::new("forms").await? else { return Ok(()) };
    for side in world.both() {
        let raw = |bytes: &str| world.client().raw(side.at(HTTP)).send(bytes).run();
        let old = raw("GET /old HTTP/1.0\r\n\r\n").await?;
        ensure!(old.statuses() == [200] && old.end == RawEnd::Closed, "{old:?}");
        let absolute =
            raw("GET http://other.example/abs HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n").await?;
        ensure!(absolute.text().contains(r#""authority":"other.example""#), "{absolute:?}");
        let user = raw("GET / HTTP/1.1\r\nHost: me@lab\r\nConnection: close\r\n\r\n").await?;
        ensure!(user.statuses() == [400], "{user:?}");
        let asterisk = raw("OPTIONS * HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n").await?;
        ensure!(asterisk.statuses() == [200], "{asterisk:?}");
        for h2c in [false, true] {
            let send = async |path: &str, method: &str| {
                let request = world.client().get(side.url(path)).method(method);
                if h2c { request.h2c() } else { request }.send().await
            };
            for (path, method, status) in
                [("/status/204", "GET", 204), ("/status/304", "GET", 304), ("/", "HEAD", 200)]
            {
                let answer = send(path, method).await?;
                ensure!((answer.status, answer.body_bytes) == (status, 0), "{method} {path}: {answer:?}");
            }
            let head = send("/", "HEAD").await?;
            ensure!(head.headers["content-length"].parse::<u64>()? > 100, "{head:?}");
        }
        for (status, count) in [("204", 2), ("304", 2)] {
            let labels = [("response_code", status), ("destination_workload", side.name())];
            world.requests(&labels, count).await?;
        }
        let line = [("path", "/old"), ("status", "200"), ("dst.workload", side.name())];
        let line = [&line[..], &[("reporter", "source")]].concat();
        ensure!(world.pair.agent_a.logged(&line).await?["bytes_sent"] != "0");
        // The size that an answer to HEAD tells of is none that was sent.
        let line = [("method", "HEAD"), ("bytes_sent", "0"), ("reporter", "source"), ("status", "200")];
        let line = [&line[..], &[("dst.workload", side.name())]].concat();
        logged_times(&world.pair.agent_a, &line, 4).await?;
    }
    world.finish().await
}

#[tokio::test]
async fn interim_answers_and_expectations() -> Result<()> {
    let Some(world) = World::new("interim").await? else { return Ok(()) };
    for side in world.both() {
        let hinted = world.client().get(side.url("/early-hints/2")).send().await?;
        ensure!((hinted.status, hinted.informational.len()) == (200, 2), "{}: {hinted:?}", side.name());
        ensure!(hinted.informational == [103, 103], "{hinted:?}");
        // What is of the app's own connection stays there.
        let port = if side.name() == "far" { 8201 } else { 8200 };
        let hint = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nConnection: x-own\r\nx-own: 1\r\nKeep-Alive: timeout=5\r\n\r\n\
                     HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
        side.pod.serve(apps::http1_raw(port, &[hint], apps::Then::Keep)).await?;
        let odd = world.pair.lab.service(&format!("odd-{}", side.name())).selector("app", side.name());
        let odd = odd.port("http", 80, port).apply()?;
        world.pair.settled().await?;
        let bare = "GET / HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n";
        let seen = world.client().raw(odd.at(80)).send(bare).run().await?;
        ensure!(seen.statuses() == [103, 200], "{}: {seen:?}", side.name());
        ensure!(seen.text().contains("link: </a>") && !seen.text().contains("x-own"), "{seen:?}");
        let continued = world
            .client()
            .raw(side.at(HTTP))
            .send("POST /consume HTTP/1.1\r\nHost: lab\r\nExpect: 100-continue\r\nContent-Length: 5\r\nConnection: close\r\n\r\n")
            .expect("HTTP/1.1 100 Continue\r\n\r\n")
            .send("hello")
            .run()
            .await?;
        ensure!(continued.statuses() == [100, 200], "{}: {continued:?}", side.name());
        // Over HTTP/2 a head that waits, `:status: 100` as HPACK writes it, and then the body.
        let head = b"\x83\x86\x44\x08/consume\x41\x03lab\x00\x06expect\x0c100-continue";
        let waiting = [
            &b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00"[..],
            &[u8::try_from(head.len())?, 1, 4, 0, 0, 0, 1],
            head,
        ]
        .concat();
        let continued = world.client().raw(side.at(HTTP)).send(waiting).expect(b"\x48\x82\x08\x01");
        let continued =
            continued.send(b"\x00\x00\x05\x00\x01\x00\x00\x00\x01hello").expect("\"bytes\":5").leave();
        let continued = continued.run().await?;
        ensure!(continued.text().contains("\"bytes\":5"), "{continued:?}");
        // An answer without the body having been asked for: no 100, and the connection ends.
        let refused = world
            .client()
            .raw(side.at(HTTP))
            .send("POST /refuse/417 HTTP/1.1\r\nHost: lab\r\nExpect: 100-continue\r\nContent-Length: 5\r\nConnection: close\r\n\r\n")
            .run()
            .await?;
        ensure!(refused.statuses().last() == Some(&417), "{}: {refused:?}", side.name());
        // Interim answers are no answers of their own, in figures and in the log.
        let workload = ("destination_workload", side.name());
        world.requests(&[("response_code", "200"), workload], 4).await?;
        world.requests(&[("response_code", "417"), workload], 1).await?;
        world.requests(&[workload], 5).await?;
        for (path, status, received, times) in [("/consume", "200", "5", 2), ("/refuse/417", "417", "0", 1)] {
            let line = [("path", path), ("status", status), ("bytes_received", received)];
            let line = [&line[..], &[("dst.workload", side.name()), ("reporter", "source")]].concat();
            logged_times(&world.pair.agent_a, &line, times).await?;
        }
    }
    world.finish().await
}

#[tokio::test]
async fn trailers_pass_in_both_directions_and_versions() -> Result<()> {
    let Some(world) = World::new("trailers").await? else { return Ok(()) };
    for side in world.both() {
        for (h2c, port) in [(false, HTTP), (true, HTTP2), (false, HTTP2), (true, HTTP)] {
            let request =
                world.client().get(side.service.url(port, "/trailers")).method("POST").body_bytes(10);
            let request = request.trailer("x-sum", "12").header("te", "trailers");
            let answer = if h2c { request.h2c() } else { request }.send().await?;
            let what = format!("{} h2c={h2c} port {port}: {answer:?}", side.name());
            let sent = answer.echo()?.trailers;
            ensure!(sent.get("x-sum").is_some_and(|sum| sum == "12"), "{what}");
            ensure!(answer.trailers.get("x-sum").is_some_and(|sum| sum == "12"), "{what}");
        }
        let labels = [("response_code", "200"), ("response_flags", "-")];
        world.requests(&[&labels[..], &[("destination_workload", side.name())]].concat(), 4).await?;
        // Trailers are no part of the body, and bodies of no declared size are counted like others.
        let line = [("path", "/trailers"), ("bytes_received", "10"), ("reporter", "source")];
        let line = [&line[..], &[("dst.workload", side.name()), ("flags", "-")]].concat();
        logged_times(&world.pair.agent_a, &line, 4).await?;
    }
    world.finish().await
}

#[tokio::test]
async fn each_end_speaks_its_own_version() -> Result<()> {
    let Some(world) = World::new("versions").await? else { return Ok(()) };
    for side in world.both() {
        for (h2c, port, seen) in [
            (false, HTTP, "HTTP/1.1"),
            (true, HTTP, "HTTP/1.1"),
            (false, HTTP2, "HTTP/2.0"),
            (true, HTTP2, "HTTP/2.0"),
            (false, UNDECLARED, "HTTP/1.1"),
            (true, UNDECLARED, "HTTP/2.0"),
        ] {
            let request = world.client().get(side.service.url(port, "/")).method("POST").body_bytes(70_000);
            let answer = if h2c { request.h2c() } else { request }.send().await?;
            let echo = answer.echo()?;
            ensure!(
                echo.version == seen && echo.body_bytes == 70_000,
                "{} {port} h2c={h2c}: {answer:?}",
                side.name()
            );
            ensure!(answer.version == if h2c { "HTTP/2.0" } else { "HTTP/1.1" }, "{answer:?}");
        }
        let streams = world.client().get(side.service.url(HTTP2, "/")).streams(200, 50).await?;
        ensure!(streams.statuses.get(&200) == Some(&200) && streams.connection.is_none(), "{streams:?}");
        world.requests(&[("response_code", "200"), ("destination_workload", side.name())], 206).await?;
        for (port, count) in [(HTTP, 2), (HTTP2, 2), (UNDECLARED, 2)] {
            let cluster = format!("outbound|{port}||{}.default.svc.cluster.local", side.name());
            let line = [("cluster", &*cluster), ("bytes_received", "70000"), ("reporter", "source")];
            logged_times(&world.pair.agent_a, &line, count).await?;
        }
    }
    world.finish().await
}

#[tokio::test]
async fn cookies_that_came_apart_are_one_line_again() -> Result<()> {
    let Some(world) = World::new("cookies").await? else { return Ok(()) };
    let routes = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: far, namespace: default }
spec:
  hosts: [far]
  http:
    - match: [{ headers: { cookie: { exact: \"a=1; b=2\" } } }]
      name: both
      route: [{ destination: { host: far } }]
    - name: other
      route: [{ destination: { host: far } }]
";
    world.pair.apply("far.yaml", routes).await?;
    for (port, version) in [(HTTP, "HTTP/1.1"), (HTTP2, "HTTP/2.0")] {
        let request = world.client().get(world.far.service.url(port, "/")).h2c();
        let echo = request.header("cookie", "a=1").header("cookie", "b=2").send().await?.echo()?;
        ensure!(echo.version == version && echo.headers["cookie"] == "a=1; b=2", "{echo:?}");
    }
    logged_times(&world.pair.agent_a, &[("route", "both"), ("reporter", "source")], 2).await?;
    world.finish().await
}

#[tokio::test]
async fn resets_and_goodbyes_are_mapped() -> Result<()> {
    let Some(world) = World::new("resets").await? else { return Ok(()) };
    for side in world.both() {
        for h2c in [false, true] {
            let get = |path: &str| {
                let request = world.client().get(side.service.url(HTTP2, path));
                if h2c { request.h2c() } else { request }
            };
            // INTERNAL_ERROR instead of an answer, and within one.
            let early = get("/reset/2").send().await?;
            ensure!(early.status == 502, "{early:?}");
            // A reset overtakes what is still queued before it: the head of the response may never have left.
            let broken = |answer: &Result<lab::apps::Answer>| match answer {
                Ok(answer) => answer.status == 502,
                Err(_) => true,
            };
            let late = get("/reset-late/8").send().await;
            ensure!(broken(&late), "half a body passed for a whole one: {late:?}");
            ensure!(get("/goaway").send().await?.status == 200);
            ensure!(get("/").send().await?.status == 200, "after a goodbye a new connection is made");
            let cut = get("/cut").send().await;
            ensure!(broken(&cut), "{cut:?}");
        }
        // Whoever is beside the app tells what it did: nothing came, or something came and broke off.
        let beside = if side.name() == "far" { &world.pair.agent_b } else { &world.pair.agent_a };
        let workload = ("destination_workload", side.name());
        for (status, flags, count) in [("502", "UC", 2), ("200", "UC", 4), ("200", "-", 4)] {
            let labels = [("reporter", "destination"), ("response_code", status), ("response_flags", flags)];
            counted(beside, "istio_requests_total", &[&labels[..], &[workload]].concat(), count).await?;
        }
        for (path, status) in [("/reset/2", "502"), ("/reset-late/8", "200"), ("/cut", "200")] {
            let line = [("path", path), ("status", status), ("flags", "UC"), ("reporter", "destination")];
            logged_times(beside, &line, 2).await?;
            let line = [("path", path), ("flags", "UC"), ("dst.workload", side.name())];
            logged_times(&world.pair.agent_a, &[&line[..], &[("reporter", "source")]].concat(), 2).await?;
        }
        // A client that leaves is noticed by the app, and reported as what it is.
        for (left, h2c) in [(1, false), (2, true)] {
            let asked = world.client().get(side.url("/hold")).timeout(Duration::from_millis(300));
            ensure!(if h2c { asked.h2c() } else { asked }.send().await.is_err());
            lab::eventually("the app notices that its client has left", async || {
                let stats = side.pod.stats(APP).await?;
                ensure!(stats.held == 0 && stats.aborted.get("/hold") == Some(&left), "{stats:?}");
                Ok(())
            })
            .await?;
        }
        world.requests(&[("response_code", "0"), ("response_flags", "DC"), workload], 2).await?;
        let line = [("path", "/hold"), ("status", "0"), ("flags", "DC"), ("dst.workload", side.name())];
        logged_times(&world.pair.agent_a, &[&line[..], &[("reporter", "source")]].concat(), 2).await?;
    }
    world.finish().await
}
