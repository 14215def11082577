//! An agent that is told to stop finishes what is under way and tells its clients to go elsewhere.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::{Pair, apps::RawEnd};

use crate::world::{APP, HTTP, HTTP2, World, counted};

#[tokio::test]
async fn requests_under_way_are_finished_and_connections_said_goodbye_to() -> Result<()> {
    let Some(world) = World::with("drain", &["--drain-deadline=20"]).await? else { return Ok(()) };
    let raw = world
        .client()
        .raw(world.far.at(HTTP))
        .send("GET /hold HTTP/1.1\r\nHost: lab\r\nx-request-id: one\r\n\r\n");
    let one = raw.limit(Duration::from_secs(30)).run();
    // An HTTP/2 client with nothing under way, which is told by GOAWAY.
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00";
    let idle = world.client().raw(world.far.at(HTTP2)).send(preface).limit(Duration::from_secs(30)).run();
    let two = world.client().get(world.far.url("/hold")).h2c().header("x-request-id", "two").send();
    let stopping = async {
        lab::eventually("both are held", async || {
            let stats = world.far.pod.stats(APP).await?;
            ensure!(stats.held == 2, "{stats:?}");
            Ok(())
        })
        .await?;
        world.pair.agent_a.process().signal(nix::sys::signal::Signal::SIGTERM)?;
        // It has let go of the pod once nobody listens there.
        world.client().not_enrolled().await?;
        ensure!(world.far.pod.stats(APP).await?.held == 2, "a drain has cut a request off");
        world.far.pod.release(APP).await?;
        anyhow::Ok(())
    };
    let (one, two, idle, stopped) = tokio::join!(one, two, idle, stopping);
    stopped?;
    let idle = idle?;
    let frames = lab::wire::h2_frames(&idle.received.0);
    ensure!(frames.iter().any(|frame| frame.goaway_code() == Some(0)), "{frames:?}");
    ensure!(idle.end == RawEnd::Closed, "{idle:?}");
    let one = one?;
    ensure!(one.statuses() == [200] && one.end == RawEnd::Closed, "{one:?}");
    ensure!(one.text().to_lowercase().contains("connection: close"), "{one:?}");
    ensure!(two?.status == 200);
    // The agent that goes tells of both before it does, and the one that stays has counted them.
    let Pair { lab, agent_a, agent_b, .. } = world.pair;
    for id in ["one", "two"] {
        let line = [("request_id", id), ("reporter", "source"), ("path", "/hold")];
        let line = agent_a.logged(&line).await?;
        ensure!(line["status"] == "200" && line["flags"] == "-" && line["dst.workload"] == "far", "{line:?}");
    }
    let labels = [("reporter", "destination"), ("source_workload", "client"), ("response_code", "200")];
    counted(&agent_b, "istio_requests_total", &labels, 2).await?;
    let (status, said) = agent_a.ends().await?;
    ensure!(status.success(), "{status}: {said}");
    ensure!(agent_b.stop().await?.success());
    lab.finish().await
}
