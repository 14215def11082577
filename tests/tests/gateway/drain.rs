//! SIGTERM: what is under way is answered, over each version and in bytes, and nothing new is taken.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::{apps::LoadKind, eventually, require_root};
use nix::sys::signal::Signal;

use super::world::{APP, World, bound, gateway, to_version};

const SERVERS: &str = "
  - port: { number: 8080, name: http, protocol: HTTP }
    hosts: [\"*\"]
";

#[tokio::test]
async fn no_request_under_way_is_lost() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let manifests = gateway(SERVERS) + &bound("shop", "*", &to_version("v1"));
    let world = World::with("gwdrain", &manifests, &["--drain-deadline", "20"]).await?;
    let held = |h2c: bool| {
        let (client, url) = (world.client.clone(), world.url(8080, "/hold"));
        tokio::spawn(async move {
            let request = client.get(url);
            if h2c { request.h2c() } else { request }.send().await
        })
    };
    let (over_1, over_2) = (held(false), held(true));
    eventually("requests that are held", async || {
        let held = world.v1.stats(APP).await?.held;
        ensure!(held == 2, "{held}");
        Ok(())
    })
    .await?;
    let kept =
        world.client.load(LoadKind::KeptAlive, &world.url(8080, "/"), 4, Duration::from_millis(20)).await?;
    kept.goes_on(3).await?;
    world.gateway.process().signal(Signal::SIGTERM)?;
    eventually("an end of what is taken", async || {
        ensure!(!world.gateway.pod().listens(8080));
        Ok(())
    })
    .await?;
    let (ready, body) = world.gateway.readiness().await?;
    ensure!(!ready && body.contains("stopped"), "{body}");
    // Nobody on a kept connection has lost a request: each was told with an answer that it was the last.
    let seen = kept.finish().await?;
    let lost: Vec<_> = seen.errors.keys().filter(|reason| !reason.contains("refused")).collect();
    ensure!(lost.is_empty(), "{seen:?}");
    world.v1.release(APP).await?;
    for answer in [over_1.await??, over_2.await??] {
        ensure!(answer.status == 200 && answer.pod() == Some("shop-v1"), "{answer:?}");
    }
    let status = world.gateway.process().wait(Duration::from_secs(15)).await?;
    ensure!(status.success(), "{status}");
    world.ended().await
}
