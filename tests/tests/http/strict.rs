//! Nothing that two programs could read in two ways gets to an app, and whoever sends it is told so.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use lab::{apps::RawEnd, eventually, fields, metric};

use crate::world::{HTTP, World, logged_times};

const GOOD: &str = "GET /good HTTP/1.1\r\nHost: lab\r\nx-lab-id: good\r\n\r\n";

/// Bytes, and what is wrong with them.
const REFUSED: &[(&str, &[u8])] = &[
    ("TE and CL", b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("CL and TE", b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n"),
    ("two CLs", b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcde"),
    ("equal CLs", b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nContent-Length: 4\r\n\r\nabcd"),
    ("CL list", b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 4, 4\r\n\r\nabcd"),
    ("signed CL", b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: +4\r\n\r\nabcd"),
    ("TE twice", b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    ("other TE", b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
    ("TE in 1.0", b"POST /x HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    ("fold", b"GET /x HTTP/1.1\r\nHost: a\r\nx-a: b\r\n c\r\n\r\n"),
    ("bare LF", b"GET /x HTTP/1.1\nHost: a\r\n\r\n"),
    ("bare LF in headers", b"GET /x HTTP/1.1\r\nHost: a\nx: y\r\n\r\n"),
    ("bare CR", b"GET /x HTTP/1.1\r\nHost: a\r\nx-a: b\rc\r\n\r\n"),
    ("space before colon", b"GET /x HTTP/1.1\r\nHost: a\r\nContent-Length : 4\r\n\r\nabcd"),
    ("NUL", b"GET /x HTTP/1.1\r\nHost: a\r\nx-a: b\0c\r\n\r\n"),
    ("no Host", b"GET /x HTTP/1.1\r\n\r\n"),
    ("two Hosts", b"GET /x HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
    ("tab in request line", b"GET\t/x HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("version", b"GET /x HTTP/2.0\r\nHost: a\r\n\r\n"),
];

#[tokio::test]
async fn what_can_be_read_in_two_ways_is_refused_and_never_reaches_the_app() -> Result<()> {
    let Some(world) = World::new("strict").await? else { return Ok(()) };
    for (what, bytes) in REFUSED {
        let answer = world.client().raw(world.far.at(HTTP)).send(GOOD).send(bytes).run().await?;
        ensure!(answer.statuses() == [200, 400], "{what}: {answer:?}");
        ensure!(answer.end != RawEnd::Open, "{what}: the connection stays open: {answer:?}");
    }
    let stats = world.far.pod.stats(crate::world::APP).await?;
    ensure!(stats.paths.keys().all(|path| path == "/good"), "{:?}", stats.paths);
    ensure!(stats.ids["good"] == REFUSED.len() as u64, "{stats:?}");
    let labels = [("reporter", "source"), ("response_code", "400"), ("response_flags", "DPE")];
    let counted = metric(&world.pair.agent_a.metrics().await?, "istio_requests_total", &labels);
    ensure!((counted - REFUSED.len() as f64).abs() < f64::EPSILON, "{counted} of {}", REFUSED.len());
    // And each is in the log, with what is wrong with it; nothing is told of a request that was not read.
    let refused = [("status", "400"), ("flags", "DPE"), ("path", "-"), ("method", "-")];
    let normalised = [("status", "400"), ("flags", "DPE"), ("path", "/x")];
    eventually("every refusal is in the log", async || {
        let lines: Vec<_> = world.pair.agent_a.access_log().iter().map(|line| fields(line)).collect();
        let like = |wanted: &[(&str, &str)]| {
            let is = |line: &&BTreeMap<String, String>| {
                wanted.iter().all(|(key, value)| line.get(*key).is_some_and(|found| found == value))
            };
            lines.iter().filter(is).cloned().collect::<Vec<_>>()
        };
        let seen = [like(&refused), like(&normalised)].concat();
        ensure!(seen.len() == REFUSED.len(), "{} lines: {seen:#?}", seen.len());
        ensure!(seen.iter().all(|line| line["error"].len() > 10), "{seen:#?}");
        Ok(())
    })
    .await?;
    world.finish().await
}

#[tokio::test]
async fn a_bad_chunk_breaks_the_request_off() -> Result<()> {
    let Some(world) = World::new("chunks").await? else { return Ok(()) };
    let head = "POST /consume HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    for chunk in
        ["zz\r\nabc\r\n", "3 \r\nabc\r\n", "3\nabc\r\n", "3\r\nabcd\r\n", "-1\r\n", "11111111111111111\r\n"]
    {
        for side in world.both() {
            let answer =
                world.client().raw(side.at(HTTP)).send(head).send(chunk).send("0\r\n\r\n").run().await?;
            ensure!(answer.statuses() == [400], "{chunk:?}: {answer:?}");
            ensure!(answer.end != RawEnd::Open, "{chunk:?}: {answer:?}");
        }
    }
    for side in world.both() {
        let broken =
            [("response_flags", "DPE"), ("response_code", "400"), ("destination_workload", side.name())];
        world.requests(&broken, 6).await?;
        let line = [("path", "/consume"), ("flags", "DPE"), ("status", "400"), ("dst.workload", side.name())];
        logged_times(&world.pair.agent_a, &[&line[..], &[("reporter", "source")]].concat(), 6).await?;
    }
    ensure!(world.client().http_get(&world.far.url("/"), &[]).await?.status == 200);
    world.finish().await
}

#[tokio::test]
async fn answers_of_broken_apps_break_nobody_else() -> Result<()> {
    let Some(world) = World::new("broken-apps").await? else { return Ok(()) };
    let answers: [&[u8]; 5] = [
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
        b"HTTP/1.1 200 OK\r\nx: a\r\n b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\na\r\n0123456789\r\n0\r\n\r\n",
    ];
    for (n, bytes) in answers.into_iter().enumerate() {
        let port = 8100 + u16::try_from(n)?;
        world.far.pod.serve(lab::apps::http1_raw(port, &[bytes], lab::apps::Then::Close)).await?;
        let service = world.pair.lab.service(&format!("broken-{n}")).selector("app", "far");
        let service = service.port("http", 80, port).apply()?;
        world.pair.settled().await?;
        let answer = world.client().http_get(&service.url(80, "/"), &[]).await;
        let refused = answer.as_ref().map_or(true, |answer| answer.status >= 500);
        ensure!(refused, "{}: {answer:?}", String::from_utf8_lossy(bytes));
        let host = format!("broken-{n}.default.svc.cluster.local");
        world.requests(&[("response_flags", "UC"), ("destination_service", &host)], 1).await?;
        let line = [("dst.service", host.as_str()), ("reporter", "source"), ("flags", "UC")];
        world.pair.agent_a.logged(&line).await?;
    }
    ensure!(world.client().http_get(&world.far.url("/"), &[]).await?.status == 200);
    world.finish().await
}
