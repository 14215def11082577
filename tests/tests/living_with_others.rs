//! The mesh shares the machine: with a socket load balancer at the cgroup root, with programs of others on a pod's
//! interfaces, and with a sidecar that has its ports.

use std::net::{SocketAddr, SocketAddrV4};

use anyhow::{Context as _, Result, bail, ensure};
use lab::{Lab, Pair, apps, eventually, foreign::Foreign, metric, require_root};

fn v4(at: SocketAddr) -> Result<SocketAddrV4> {
    match at {
        SocketAddr::V4(at) => Ok(at),
        SocketAddr::V6(_) => bail!("{at} is no IPv4 address"),
    }
}

#[tokio::test]
async fn a_socket_load_balancer_at_the_root_does_not_take_services_away() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let lab = Lab::new("balancer").await?;
    let (a, b) = (lab.node("a").await?, lab.node("b").await?);
    let client = a.pod("client").start().await?;
    let plain = a.pod("plain").unenrolled().start().await?;
    let server = b.pod("server").label("app", "server").start().await?;
    server.serve(apps::http(8080)).await?;
    server.serve(apps::tcp_echo(7000)).await?;
    let service = lab
        .service("server")
        .selector("app", "server")
        .port("http", 80, 8080)
        .port("tcp", 70, 7000)
        .apply()?;
    // There before the agent, and so the first to run of all that are attached at the same place.
    let balancer = Foreign::load_balancer(a.cgroup(), v4(service.at(80))?, v4(server.at(8080))?)?;
    let watcher = Foreign::sockops(a.cgroup())?;
    let (agent, agent_b) = tokio::try_join!(a.agent().start(), b.agent().start())?;
    client.enrolled().await?;
    server.enrolled().await?;

    // It works for those who are not in the mesh.
    let answer = plain.http_get(&service.url(80, "/"), &[]).await?;
    ensure!(answer.status == 200 && answer.echo()?.pod == "server", "{answer:?}");
    let balanced = balancer.runs()?;
    ensure!(balanced > 0 && watcher.runs()? > 0, "the foreign programs do not run");
    // And the mesh sees the service that was dialled.
    let answer = client.http_get(&service.url(80, "/"), &[]).await?;
    ensure!(answer.status == 200 && answer.echo()?.headers.contains_key("x-request-id"), "{answer:?}");
    eventually("the request is one to the service", async || {
        let labels = [
            ("reporter", "source"),
            ("destination_service", &*service.host()),
            ("source_workload", "client"),
        ];
        let requests = metric(&agent.metrics().await?, "istio_requests_total", &labels) as u64;
        ensure!(requests == 1, "{requests}");
        Ok(())
    })
    .await?;
    ensure!(balancer.runs()? > balanced, "the foreign program has stopped running");
    // Apps are told what they dialled, and bytes are counted as ever.
    let echoed = client.tcp(service.at(70), 100_000, &[]).await?;
    ensure!(echoed.intact && echoed.peer == service.at(70), "{echoed:?}");
    eventually("the flow is counted", async || {
        let flows = agent.flows().await?;
        let flow =
            flows.as_array().into_iter().flatten().find(|flow| flow["remote"] == service.at(70).to_string());
        let flow = flow.context("no flow")?;
        ensure!(flow["tx_bytes"] == 100_000 && flow["rx_bytes"] == 100_000, "{flow}");
        Ok(())
    })
    .await?;
    drop((balancer, watcher));
    for agent in [agent, agent_b] {
        ensure!(agent.stop().await?.success());
    }
    lab.finish().await
}

#[tokio::test]
async fn programs_on_a_pods_interface_run_beside_the_agents() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("tcx").await?;
    let server = pair.b.pod("server").label("app", "server").start().await?;
    server.serve(apps::http(8080)).await?;
    server.serve(apps::udp_echo(5353)).await?;
    pair.lab.namespace("late", false)?;
    let pod = pair.a.pod("late").ns("late").start().await?;
    let service = pair.lab.service("server").selector("app", "server").port("http", 80, 8080).apply()?;
    pair.settled().await?;
    server.enrolled().await?;
    let before = pod.netns().inside(|| Foreign::tcx("eth0"))?;
    pair.lab.namespace("late", true)?;
    pod.enrolled().await?;
    let after = pod.netns().inside(|| Foreign::tcx("eth0"))?;

    let seen = pod.udp(server.at(5353), 10, 100).await?;
    ensure!(seen.received == 10, "{seen:?}");
    let answer = pod.http_get(&service.url(80, "/"), &[]).await?;
    ensure!(answer.status == 200, "{answer:?}");
    ensure!(before.runs()? >= 20 && after.runs()? >= 20, "{} {}", before.runs()?, after.runs()?);
    eventually("the agent counts as well", async || {
        let flows = pair.agent_a.flows().await?;
        let flow = flows
            .as_array()
            .into_iter()
            .flatten()
            .find(|flow| flow["protocol"] == "udp" && flow["pod"] == "late");
        let flow = flow.context("no UDP flow")?;
        ensure!(flow["tx_packets"] == 10 && flow["rx_packets"] == 10, "{flow}");
        Ok(())
    })
    .await?;
    // The pod leaves, and they stay.
    pair.lab.namespace("late", false)?;
    pod.not_enrolled().await?;
    let counted = (before.runs()?, after.runs()?);
    ensure!(pod.udp(server.at(5353), 5, 100).await?.received == 5);
    ensure!(before.runs()? >= counted.0 + 10 && after.runs()? >= counted.1 + 10, "they have stopped");
    drop((before, after));
    pair.finish().await
}

#[tokio::test]
async fn a_pod_with_a_sidecars_ports_is_refused_alone_until_they_are_free() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("sidecar").await?;
    pair.lab.namespace("late", false)?;
    let pod = pair.a.pod("late").ns("late").label("app", "late").start().await?;
    let sidecar = [pod.serve(apps::tcp_echo(15001)).await?, pod.serve(apps::tcp_echo(15006)).await?];
    pod.serve(apps::http(8080)).await?;
    pair.lab.namespace("late", true)?;
    eventually("the operator is told", async || {
        let status = pair.agent_a.status().await?;
        let failing = status["failing"].to_string();
        ensure!(failing.contains("late/late") && failing.contains("15001"), "{status}");
        Ok(())
    })
    .await?;
    ensure!(pair.agent_a.log().iter().filter(|line| line.contains("port 15001 is taken")).count() == 1);
    ensure!(pair.agent_a.status().await?["enrolled"] == serde_json::json!(["default/client"]));
    for process in sidecar {
        process.stop(std::time::Duration::from_secs(5)).await?;
    }
    pod.enrolled().await?;
    ensure!(pair.agent_a.status().await?["failing"] == serde_json::json!([]));
    pair.finish().await
}
