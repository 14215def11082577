//! Ports come and go with the configuration; one that cannot be had is told, and is nobody else's trouble.

use anyhow::{Result, ensure};
use lab::{apps, eventually, require_root};

use super::world::{APP, World, bound, gateway, to_version};

fn servers(ports: &[u16]) -> String {
    let one = |port: &u16| {
        format!("  - port: {{ number: {port}, name: http-{port}, protocol: HTTP }}\n    hosts: [\"*\"]\n")
    };
    gateway(&ports.iter().map(one).collect::<String>()) + &bound("shop", "*", &to_version("v1"))
}

#[tokio::test]
async fn a_port_is_added_and_removed_while_it_runs() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("gwports", &servers(&[8080])).await?;
    let asks = async |port| anyhow::Ok(world.client.get(world.url(port, "/")).send().await?.status);
    ensure!(asks(8080).await? == 200 && asks(8081).await.is_err());
    ensure!(!world.gateway.pod().listens(8081));
    world.apply("gateway.yaml", &servers(&[8080, 8081])).await?;
    eventually("the new port", async || {
        ensure!(asks(8081).await? == 200);
        Ok(())
    })
    .await?;
    // Over IPv6 too.
    let at6 = format!("http://{}/", world.gateway.pod().at6(8081));
    ensure!(world.client.get(at6).send().await?.status == 200);

    // A request under way on a port that goes is answered, its connection told to end, and nobody else is taken.
    let under_way = tokio::spawn({
        let (client, held, next) = (world.client.clone(), world.url(8081, "/hold"), world.url(8081, "/"));
        async move { client.curl(&[&held, &next]).await }
    });
    let held = async || {
        ensure!(world.v1.stats(APP).await?.held == 1);
        Ok(())
    };
    eventually("a request that is held", held).await?;
    world.apply("gateway.yaml", &servers(&[8080])).await?;
    eventually("the port to be closed", async || {
        ensure!(!world.gateway.pod().listens(8081));
        Ok(())
    })
    .await?;
    world.v1.release(APP).await?;
    let answers = under_way.await??;
    let statuses: Vec<u16> = answers.transfers.iter().map(|one| one.status).collect();
    ensure!(statuses == [200, 0], "{answers:?}");
    ensure!(asks(8080).await? == 200);
    world.finish().await
}

#[tokio::test]
async fn a_port_that_cannot_be_had_is_told_and_tried_again() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("gwtaken", &servers(&[8080])).await?;
    // Somebody else in the pod has it.
    let other = world.gateway.pod().serve(apps::http(8082)).await?;
    world.apply("gateway.yaml", &servers(&[8080, 8082])).await?;
    eventually("the problem in the status", async || {
        let status = world.gateway.meshctl(&["status"]).await?;
        ensure!(status.contains("port 8082 (Gateway default/edge"), "{status}");
        Ok(())
    })
    .await?;
    ensure!(world.client.get(world.url(8080, "/")).send().await?.status == 200);
    // What serves goes on to; what starts anew does not say that it is ready.
    ensure!(world.gateway.readiness().await?.0);
    other.stop(std::time::Duration::from_secs(5)).await?;
    eventually("the port to be the gateway's", async || {
        let answer = world.client.get(world.url(8082, "/")).send().await?;
        ensure!(answer.pod() == Some("shop-v1"), "{answer:?}");
        Ok(())
    })
    .await?;
    let status = world.gateway.meshctl(&["status"]).await?;
    ensure!(!status.contains("8082"), "{status}");
    world.finish().await
}

#[tokio::test]
async fn it_is_not_ready_without_its_pod_or_a_port() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("gwready", &servers(&[8080])).await?;
    let node = world.lab.node("a").await?;
    let second = node.pod("second").label("istio", "ingressgateway").unenrolled().start().await?;
    let other = second.serve(apps::http(8080)).await?;
    let gateway = second.unready_gateway(&[])?;
    eventually("the reason", async || {
        let (ready, body) = gateway.readiness().await?;
        ensure!(!ready && body.contains("port 8080 (Gateway default/edge"), "{body}");
        Ok(())
    })
    .await?;
    other.stop(std::time::Duration::from_secs(5)).await?;
    eventually("readiness", async || {
        let (ready, body) = gateway.readiness().await?;
        ensure!(ready, "{body}");
        Ok(())
    })
    .await?;
    ensure!(gateway.stop().await?.success());

    let stray = node.pod("stray").unenrolled().start().await?;
    let file = "pod-default-stray.yaml";
    let manifest = std::fs::read_to_string(world.lab.config_dir().join(file))?;
    world.lab.delete(file)?;
    world.settled().await?;
    let gateway = stray.unready_gateway(&[])?;
    eventually("the reason", async || {
        let (ready, body) = gateway.readiness().await?;
        ensure!(!ready && body.contains("pod default/stray (--pod)"), "{body}");
        Ok(())
    })
    .await?;
    world.lab.apply(file, &manifest)?;
    eventually("readiness", async || {
        let (ready, body) = gateway.readiness().await?;
        ensure!(ready, "{body}");
        Ok(())
    })
    .await?;
    ensure!(gateway.stop().await?.success());
    world.finish().await
}
