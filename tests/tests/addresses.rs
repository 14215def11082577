//! Whatever address a pod dials, it gets there, and both ends are told the truth: a headless Service's pod, a port of a
//! node, the pod itself, and a Service whose only endpoint is the pod itself.

use std::{net::SocketAddr, process::Command};

use anyhow::{Context as _, Result, ensure};
use lab::{Pair, apps, binary, eventually, metric, require_root};

const PORT: u16 = 7000;
const NODE_PORT: u16 = 30_070;

/// Dials from the client, whose connection ends at `app`.
async fn reaches(pair: &Pair, what: &str, to: SocketAddr, app: &str) -> Result<()> {
    let seen = pair.client.tcp(to, 100_000, &["--report"]).await.with_context(|| format!("{what}: {to}"))?;
    ensure!(seen.intact && seen.received == 100_000 && seen.peer == to, "{what}: {seen:?}");
    let report = seen.report.as_ref().with_context(|| format!("{what}: no report: {seen:?}"))?;
    ensure!(report.pod == app && report.received == 100_000, "{what}: {seen:?}");
    ensure!(report.peer == report.peername, "{what}: accept and getpeername agree: {seen:?}");
    let client = [pair.client.ip(), pair.client.ip6()];
    ensure!(client.contains(&report.peer.ip()), "{what}: the server sees the client's own address: {seen:?}");
    Ok(())
}

/// A node is outside the mesh: what its ports lead to is the node's affair, and it sees the pod.
async fn node_ports(pair: &Pair) -> Result<()> {
    let mut server = Command::new(binary("lab-app", "MESH_LAB_APP", "lab")?);
    server.args(["tcp-echo", "--listen", &format!("[::]:{NODE_PORT}"), "--report", "--name", "node"]);
    let server = pair.b.spawn(server)?;
    eventually("a server on the node", async || {
        ensure!(server.stdout().contains("listening"), "it does not listen yet");
        Ok(())
    })
    .await?;
    let node = pair.b.addresses();
    for ip in node.both() {
        reaches(pair, "a port of a node", SocketAddr::new(ip, NODE_PORT), "node").await?;
    }
    Ok(())
}

#[tokio::test]
async fn every_kind_of_address_leads_where_it_should() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("addresses").await?;
    let far = pair.b.pod("far").label("app", "far").start().await?;
    for pod in [&far, &pair.client] {
        pod.serve(apps::tcp_echo(PORT).arg("--report")).await?;
    }
    let headless = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: headless, namespace: default }}\nspec:\n  \
         clusterIP: None\n  clusterIPs: [None]\n  selector: {{ app: far }}\n  \
         ports: [{{ name: tcp, port: {PORT}, targetPort: {PORT} }}]\n"
    );
    pair.lab.apply("headless.yaml", &headless)?;
    let own = pair.lab.service("own").selector("app", "client").port("tcp", 70, PORT).apply()?;
    pair.settled().await?;
    far.enrolled().await?;

    // A name of a headless Service is the addresses of its pods.
    reaches(&pair, "headless", far.at(PORT), "far").await?;
    reaches(&pair, "headless over IPv6", far.at6(PORT), "far").await?;
    let labels = [("reporter", "destination"), ("connection_security_policy", "mutual_tls")];
    let opened = metric(&pair.agent_b.metrics().await?, "istio_tcp_connections_opened_total", &labels);
    ensure!((opened - 2.0).abs() < f64::EPSILON, "{opened}");

    let at_the_agent = async || {
        let metrics = pair.agent_a.metrics().await?;
        let labels = [("reporter", "source")];
        anyhow::Ok(metric(&metrics, "istio_tcp_connections_opened_total", &labels))
    };
    let before = at_the_agent().await?;
    reaches(&pair, "its own address", pair.client.at(PORT), "client").await?;
    reaches(&pair, "its own address over IPv6", pair.client.at6(PORT), "client").await?;
    ensure!(
        (at_the_agent().await? - before).abs() < f64::EPSILON,
        "the pod itself is no business of the agent's"
    );
    reaches(&pair, "its own service", own.at(70), "client").await?;
    reaches(&pair, "its own service over IPv6", own.at6(70), "client").await?;
    ensure!((at_the_agent().await? - before - 2.0).abs() < f64::EPSILON, "its own service is a service");

    node_ports(&pair).await?;
    pair.finish().await
}
