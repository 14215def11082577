//! Mirrors get copies, and the request never feels it.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::{apps, eventually, metric};

use crate::world::{APP, World, counted, logged_times};

const ROUTES: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: far, namespace: default }
spec:
  hosts: [far]
  http:
    - match: [{ uri: { prefix: /half } }]
      route: [{ destination: { host: far } }]
      mirror: { host: near }
      mirrorPercentage: { value: 50 }
    - match: [{ uri: { prefix: /slow-mirror } }]
      route: [{ destination: { host: far } }]
      mirrors: [{ destination: { host: sleepy }, percentage: { value: 100 } }]
    - match: [{ uri: { prefix: /lost-mirror } }]
      route: [{ destination: { host: far } }]
      mirrors: [{ destination: { host: nobody } }, { destination: { host: near } }]
    - match: [{ uri: { prefix: /all } }]
      route: [{ destination: { host: far } }]
      rewrite: { uri: /copied }
      mirror: { host: near }
";

/// Copies are no requests of the client: 2 and a long one, 400, and 2 are, all of them to the destination.
async fn originals_are_told_of(world: &World) -> Result<()> {
    world.requests(&[], 405).await?;
    world.requests(&[("destination_workload", "far"), ("response_code", "200")], 405).await?;
    let nobody = [("cluster", "outbound|80||nobody.default.svc.cluster.local")];
    counted(&world.pair.agent_a, "mesh_mirrored_requests_total", &nobody, 1).await?;
    for (path, count) in [("/all", 3), ("/half", 400), ("/slow-mirror", 1), ("/lost-mirror", 1)] {
        let line = [("path", path), ("reporter", "source"), ("dst.workload", "far"), ("status", "200")];
        logged_times(&world.pair.agent_a, &line, count).await?;
    }
    Ok(())
}

#[tokio::test]
async fn copies_are_sent_and_forgotten() -> Result<()> {
    let Some(world) = World::new("mirror").await? else { return Ok(()) };
    let sleepy = world.pair.b.pod("sleepy").label("app", "sleepy").start().await?;
    sleepy.serve(apps::http(APP).arg("--delay-ms=20000")).await?;
    world.pair.lab.service("sleepy").selector("app", "sleepy").port("http", 80, APP).apply()?;
    world.pair.lab.service("nobody").selector("app", "nobody").port("http", 80, APP).apply()?;
    world.pair.apply("far.yaml", ROUTES).await?;
    sleepy.enrolled().await?;
    let mirrored = async |path: &str, count: u64| {
        eventually("the mirror has its copies", async || {
            let stats = world.near.pod.stats(APP).await?;
            let seen = stats.paths.get(path).copied().unwrap_or_default();
            ensure!(seen == count && stats.open == 0, "{seen} of {count}: {stats:?}");
            Ok(())
        })
        .await
    };
    // With a body, rewritten as the request is, over both versions; the answer is the destination's.
    for h2c in [false, true] {
        let request = world.client().get(world.far.url("/all")).method("POST").body_bytes(20_000);
        let answer = if h2c { request.h2c() } else { request }.send().await?;
        ensure!(answer.pod() == Some("far") && answer.echo()?.body_bytes == 20_000, "{answer:?}");
    }
    mirrored("/copied", 2).await?;
    // A body that is too long to be kept is passed on all the same, and nothing of it is copied.
    let answer =
        world.client().get(world.far.url("/all")).method("POST").body_bytes(1_000_000).send().await?;
    ensure!(answer.pod() == Some("far") && answer.echo()?.body_bytes == 1_000_000, "{answer:?}");
    let too_long = [("cluster", "outbound|80||near.default.svc.cluster.local"), ("outcome", "body_too_long")];
    counted(&world.pair.agent_a, "mesh_mirrored_requests_total", &too_long, 1).await?;
    mirrored("/copied", 2).await?;
    let tally = world.client().get(world.far.url("/half")).many(400, 4, None).await?;
    ensure!(tally.statuses.get(&200) == Some(&400), "{tally:?}");
    eventually("about half was mirrored", async || {
        let stats = world.near.pod.stats(APP).await?;
        let seen = stats.paths.get("/half").copied().unwrap_or_default();
        // Five standard deviations.
        ensure!((150..=250).contains(&seen) && stats.open == 0, "{seen}: {stats:?}");
        Ok(())
    })
    .await?;
    // Nobody waits for a mirror, and nobody minds one that is not there.
    let begun = std::time::Instant::now();
    ensure!(world.client().http_get(&world.far.url("/slow-mirror"), &[]).await?.pod() == Some("far"));
    ensure!(world.client().http_get(&world.far.url("/lost-mirror"), &[]).await?.pod() == Some("far"));
    ensure!(begun.elapsed() < Duration::from_secs(15));
    mirrored("/lost-mirror", 1).await?;
    originals_are_told_of(&world).await?;
    let metrics = world.pair.agent_a.metrics().await?;
    let count = |outcome| metric(&metrics, "mesh_mirrored_requests_total", &[("outcome", outcome)]);
    ensure!(count("answered") > 150.0 && count("no_healthy_upstream") >= 1.0, "{metrics}");
    world.finish().await
}
