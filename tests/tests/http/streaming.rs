//! Bodies of any size pass as they come: in constant memory, and no faster than they are taken.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::world::{HTTP, HTTP2, World, logged_times};

/// `MESH_LAB_LARGE` sets how much is passed, in bytes: more than memory holds shows what a test need not take the time for.
fn large() -> u64 {
    std::env::var("MESH_LAB_LARGE").ok().and_then(|bytes| bytes.parse().ok()).unwrap_or(256 << 20)
}

/// What the agents may grow by while a large body passes: windows and buffers on the way.
const MEMORY: u64 = 48 << 20;

#[tokio::test]
async fn large_bodies_pass_in_constant_memory() -> Result<()> {
    let Some(world) = World::new("large").await? else { return Ok(()) };
    let agents = [&world.pair.agent_a, &world.pair.agent_b];
    let before = agents.map(lab::Agent::rss_bytes);
    let size = large();
    for (side, h2c, port) in
        [(&world.far, false, HTTP), (&world.far, true, HTTP2), (&world.near, false, HTTP)]
    {
        let request = |path: &str| {
            let request = world.client().get(side.service.url(port, path));
            if h2c { request.h2c() } else { request }
        };
        let down = request(&format!("/pattern/{size}")).download(size, 0).await?;
        ensure!(down.intact && down.bytes == size && down.broken.is_none(), "{} {down:?}", side.name());
        let up = request("/consume").upload(size, 0).await?;
        ensure!(up.intact && up.bytes == size && up.broken.is_none(), "{} {up:?}", side.name());
    }
    for (agent, before) in agents.into_iter().zip(before) {
        let grown = agent.peak_rss_bytes()?.saturating_sub(before?);
        ensure!(grown < MEMORY, "an agent grew by {} MiB", grown >> 20);
    }
    let bytes = size.to_string();
    for (side, times) in [(&world.far, 2), (&world.near, 1)] {
        for (path, key) in
            [(format!("/pattern/{size}"), "bytes_sent"), ("/consume".to_owned(), "bytes_received")]
        {
            let line = [("path", &*path), (key, &*bytes), ("status", "200"), ("flags", "-")];
            let line = [&line[..], &[("reporter", "source"), ("dst.workload", side.name())]].concat();
            logged_times(&world.pair.agent_a, &line, times).await?;
        }
        let labels =
            [("response_code", "200"), ("response_flags", "-"), ("destination_workload", side.name())];
        world.requests(&labels, 2 * times as u64).await?;
    }
    world.finish().await
}

#[tokio::test]
async fn a_slow_reader_holds_back_the_writer() -> Result<()> {
    let Some(world) = World::new("slow").await? else { return Ok(()) };
    let agents = [&world.pair.agent_a, &world.pair.agent_b];
    let before = agents.map(lab::Agent::rss_bytes);
    for side in world.both() {
        for h2c in [false, true] {
            let request = |path: &str| {
                let request = world.client().get(side.url(path));
                if h2c { request.h2c() } else { request }
            };
            // What the writer had got rid of when the reader was done says what stood in between.
            let size = 200 << 20;
            let limit = Duration::from_secs(2);
            let cut = request(&format!("/pattern/{size}")).timeout(limit).download(size, 1 << 20).await?;
            ensure!(cut.bytes < size / 2, "{cut:?}");
            let slow = request("/read-slow/4000000").upload(8 << 20, 0).await?;
            ensure!(slow.intact && slow.millis >= 1900, "{slow:?}");
        }
    }
    for (agent, before) in agents.into_iter().zip(before) {
        let grown = agent.peak_rss_bytes()?.saturating_sub(before?);
        ensure!(grown < MEMORY, "an agent grew by {} MiB", grown >> 20);
    }
    for side in world.both() {
        let path = format!("/pattern/{}", 200 << 20);
        let line = [("path", &*path), ("flags", "DC"), ("dst.workload", side.name()), ("reporter", "source")];
        logged_times(&world.pair.agent_a, &line, 2).await?;
        let line = [("path", "/read-slow/4000000"), ("flags", "-"), ("reporter", "source")];
        let size = (8u64 << 20).to_string();
        let line = [&line[..], &[("bytes_received", &*size), ("dst.workload", side.name())]].concat();
        logged_times(&world.pair.agent_a, &line, 2).await?;
        let labels = [("response_flags", "DC"), ("destination_workload", side.name())];
        world.requests(&labels, 2).await?;
    }
    world.finish().await
}
