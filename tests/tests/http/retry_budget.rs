//! Retries never make a bad day worse: a brown-out is amplified by the budget and no more.

use anyhow::{Result, ensure};
use lab::{apps, metric};

use crate::world::World;

const ROUTES: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: brown, namespace: default }
spec:
  hosts: [brown]
  http: [{ retries: { attempts: 5, retryOn: 5xx, backoff: 1ms }, route: [{ destination: { host: brown } }] }]
";

#[tokio::test]
async fn a_brown_out_is_amplified_by_a_fifth_at_most() -> Result<()> {
    const REQUESTS: u64 = 2000;
    /// Retries that are allowed at a time however few requests are under way.
    const MINIMUM: u64 = 10;
    let Some(world) = World::new("budget").await? else { return Ok(()) };
    let brown = world.pair.b.pod("brown").label("app", "brown").start().await?;
    brown.serve(apps::http(8080).arg("--delay-ms=50")).await?;
    let service = world.pair.lab.service("brown").selector("app", "brown").port("http", 80, 8080).apply()?;
    world.pair.apply("brown.yaml", ROUTES).await?;
    brown.enrolled().await?;
    let streams = world.client().get(service.url(80, "/status/503")).streams(REQUESTS, 100).await?;
    ensure!(streams.statuses.get(&503) == Some(&REQUESTS), "{streams:?}");
    let seen = brown.stats(8080).await?.paths["/status/503"];
    ensure!(seen > REQUESTS, "nothing was tried again");
    // A fifth; and once so few are left that ten are more than a fifth of them, those ten.
    ensure!(seen <= REQUESTS * 12 / 10 + MINIMUM, "{seen} tries of {REQUESTS} requests");
    // What was tried is what the log says was tried.
    world.requests(&[("response_code", "503"), ("destination_workload", "brown")], REQUESTS).await?;
    let metrics = world.pair.agent_a.metrics().await?;
    let flagged =
        |flag| metric(&metrics, "istio_requests_total", &[("response_flags", flag), ("reporter", "source")]);
    let (over, out_of_tries) = (flagged("UO"), flagged("URX"));
    ensure!(over > 1000.0 && (over + out_of_tries - REQUESTS as f64).abs() < f64::EPSILON, "{metrics}");
    let cluster = "outbound|80||brown.default.svc.cluster.local";
    lab::eventually("every request is in the log", async || {
        let lines = world.pair.agent_a.access_log();
        let tries = lines.iter().map(|line| lab::fields(line)).filter(|line| {
            line.get("cluster").is_some_and(|name| name == cluster) && line["status"] == "503"
        });
        let tries: Vec<u64> = tries.map(|line| Ok(line["tries"].parse()?)).collect::<Result<_>>()?;
        let (requests, sum) = (tries.len() as u64, tries.iter().sum::<u64>());
        ensure!((requests, sum) == (REQUESTS, seen), "{requests} requests of {sum} tries, not {seen}");
        Ok(())
    })
    .await?;
    let labels = [("cluster", "outbound|80||brown.default.svc.cluster.local")];
    let stopped = metric(&world.pair.agent_a.metrics().await?, "mesh_retries_over_budget_total", &labels);
    ensure!((stopped - over).abs() < f64::EPSILON, "{stopped}, {over} by their flag");
    world.finish().await
}
