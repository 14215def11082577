//! Between nodes nothing travels in the clear, and every peer has a name.

use anyhow::{Result, ensure};
use lab::{Pair, Tap, apps, metric, require_root};

const SECRET: &str = "the-one-secret-nobody-else-may-read";

#[tokio::test]
async fn the_wire_shows_tls13_and_the_metrics_name_both_peers() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("wire").await?;
    let server = pair.b.pod("server").sa("keeper").label("app", "server").start().await?;
    server.serve(apps::http(8080)).await?;
    server.serve(apps::tcp_echo(7000)).await?;
    let service = pair
        .lab
        .service("server")
        .selector("app", "server")
        .port("http", 80, 8080)
        .port("tcp", 70, 7000)
        .apply()?;
    pair.settled().await?;
    server.enrolled().await?;
    let tap = pair.lab.tap()?;
    let answer = pair.client.http_get(&service.url(80, "/"), &[("x-secret", SECRET)]).await?;
    ensure!(answer.echo()?.headers["x-secret"] == SECRET, "{answer:?}");
    ensure!(pair.client.tcp(service.at(70), 5000, &[]).await?.intact);
    let seen = tap.stop()?;
    ensure!(seen.segments().count() > 10, "{} packets", seen.frames.len());
    ensure!(seen.segments().all(|segment| segment.from == 15008 || segment.to == 15008), "a stray segment");
    for clear in [SECRET, "x-secret", "HTTP/1.1", "reviews", "GET /"] {
        ensure!(!seen.contains(clear.as_bytes()), "{clear:?} crossed between the nodes in the clear");
    }
    let versions = seen.tls_versions(15008);
    ensure!(!versions.is_empty() && versions.iter().all(|version| *version == 0x0304), "{versions:04x?}");

    let names = [
        ("connection_security_policy", "mutual_tls"),
        ("source_principal", "spiffe://cluster.local/ns/default/sa/client"),
        ("destination_principal", "spiffe://cluster.local/ns/default/sa/keeper"),
    ];
    for agent in [&pair.agent_a, &pair.agent_b] {
        let metrics = agent.metrics().await?;
        for name in ["istio_requests_total", "istio_tcp_connections_opened_total"] {
            ensure!((metric(&metrics, name, &names) - 1.0).abs() < f64::EPSILON, "{name}\n{metrics}");
        }
    }
    pair.finish().await
}

#[tokio::test]
async fn pods_of_one_node_take_one_pass_and_nothing_crosses() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("same").await?;
    let server = pair.a.pod("server").label("app", "server").start().await?;
    server.serve(apps::http(8080)).await?;
    let service = pair.lab.service("server").selector("app", "server").port("http", 80, 8080).apply()?;
    pair.settled().await?;
    server.enrolled().await?;
    let tap = Tap::open(pair.a.netns())?;
    let answer = pair.client.http_get(&service.url(80, "/"), &[("x-secret", SECRET)]).await?;
    let seen = tap.stop()?;
    ensure!(answer.status == 200 && answer.echo()?.peer.ip() == pair.client.ip(), "{answer:?}");
    ensure!(seen.segments().count() == 0, "{} packets crossed the node", seen.frames.len());
    pair.finish().await
}
