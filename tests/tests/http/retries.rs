//! Bodies and retries: what is short enough is sent again, whole; what is not is sent once.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::world::{APP, HTTP, World};

const ROUTES: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: far, namespace: default }
spec:
  hosts: [far]
  http: [{ retries: { attempts: 2, retryOn: 5xx, backoff: 1ms }, route: [{ destination: { host: far } }] }]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: near, namespace: default }
spec:
  hosts: [near]
  http: [{ retries: { attempts: 2, retryOn: 5xx, backoff: 1ms }, route: [{ destination: { host: near } }] }]
";

#[tokio::test]
async fn bodies_are_sent_again_up_to_a_limit() -> Result<()> {
    let Some(world) = World::new("retry-bodies").await? else { return Ok(()) };
    world.pair.apply("routes.yaml", ROUTES).await?;
    for side in world.both() {
        for (size, tries) in [(30_000, 3), (200_000, 1)] {
            let path = format!("/status/503?{size}");
            let request = world.client().get(side.url(&path)).method("POST").body_bytes(size);
            ensure!(request.send().await?.status == 503);
            let seen = side.pod.stats(APP).await?.paths[&path];
            ensure!(seen == tries, "{size} bytes were sent {seen} times");
            let line = [("path", path.as_str()), ("reporter", "source"), ("dst.workload", side.name())];
            ensure!(world.pair.agent_a.logged(&line).await?["tries"] == tries.to_string());
        }
        let again =
            world.client().get(side.url("/fail-first/1")).method("POST").body_bytes(50_000).send().await?;
        ensure!(again.echo()?.body_bytes == 50_000, "{again:?}");
        let workload = ("destination_workload", side.name());
        world.requests(&[("response_code", "200"), workload], 1).await?;
        // All tries failed; or there was one, for a body that is too long for others.
        world.requests(&[("response_code", "503"), ("response_flags", "URX"), workload], 1).await?;
        world.requests(&[("response_code", "503"), ("response_flags", "-"), workload], 1).await?;
    }
    world.finish().await
}

#[tokio::test]
async fn a_body_that_is_still_coming_is_sent_whole_the_second_time() -> Result<()> {
    let Some(world) = World::new("retry-coming").await? else { return Ok(()) };
    world.pair.apply("routes.yaml", ROUTES).await?;
    for side in world.both() {
        // The first try is answered while most of the body has not been sent yet.
        let head =
            "POST /refuse-once HTTP/1.1\r\nHost: lab\r\nContent-Length: 40000\r\nConnection: close\r\n\r\n";
        let head = head.replace("/refuse-once", "/refuse/503");
        let script = world.client().raw(side.at(HTTP)).send(&head).send("x".repeat(10_000));
        let script = script.pause(Duration::from_millis(300)).send("x".repeat(30_000));
        let answer = script.run().await?;
        ensure!(answer.statuses() == [503], "{}: {answer:?}", side.name());
        let seen = side.pod.stats(APP).await?.paths["/refuse/503"];
        ensure!(seen == 3, "{}: {seen} tries", side.name());
        // And one that is taken in the end is whole.
        let head = head.replace("/refuse/503", "/fail-first/1");
        let script = world.client().raw(side.at(HTTP)).send(&head).send("x".repeat(10_000));
        let answer = script.pause(Duration::from_millis(300)).send("x".repeat(30_000)).run().await?;
        ensure!(answer.statuses() == [200], "{}: {answer:?}", side.name());
        ensure!(answer.text().contains(r#""body_bytes":40000"#), "{}: {answer:?}", side.name());
    }
    world.finish().await
}
