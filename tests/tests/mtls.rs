//! Between nodes nothing travels in the clear, every peer has a name, and a stranger gets nothing from port 15008.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use lab::{Pair, Pod, Tap, apps, eventually, metric, require_root};
use mesh_agent::{
    error::Kind,
    identity::{Authority, SpiffeId},
    tunnel,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

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

/// Connects from inside a pod that is not in the mesh.
fn dial(from: &Pod, to: SocketAddr) -> Result<TcpStream> {
    let stream = from.netns().inside(|| Ok(std::net::TcpStream::connect(to)?))?;
    stream.set_nonblocking(true)?;
    Ok(TcpStream::from_std(stream)?)
}

/// What a client of the mesh wire comes to: the kind of its failure, in the handshake or at its first use.
async fn refused(
    stranger: &Pod,
    to: SocketAddr,
    own: &SpiffeId,
    by: &Authority,
    expected: &SpiffeId,
) -> Result<Kind> {
    let identity = by.identity(own).await?;
    let expected = std::slice::from_ref(expected);
    let connected = tunnel::connect_tunnels(dial(stranger, to)?, &identity, expected).await;
    let used = match connected {
        Ok(connection) => connection.open_tunnel(SocketAddr::new(to.ip(), 8080)).await.map(drop),
        Err(error) => Err(error),
    };
    Ok(used.err().context("a stranger was let in")?.kind)
}

#[tokio::test]
async fn strangers_are_refused_and_counted() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("strangers").await?;
    let server = pair.b.pod("server").sa("keeper").start().await?;
    server.serve(apps::http(8080)).await?;
    let stranger = pair.a.pod("stranger").unenrolled().start().await?;
    pair.settled().await?;
    server.enrolled().await?;
    let mesh = server.at(15008);

    // Plaintext, and bytes of no protocol at all.
    for garbage in ["GET / HTTP/1.1\r\nHost: server\r\n\r\n", "\0\u{1}\u{2}garbage"] {
        let mut stream = dial(&stranger, mesh)?;
        stream.write_all(garbage.as_bytes()).await?;
        let mut answer = Vec::new();
        // A reset is as good an end as any.
        let _ = stream.read_to_end(&mut answer).await;
        ensure!(!String::from_utf8_lossy(&answer).contains("HTTP/1.1 200"), "plaintext was answered");
    }
    let id = |account: &str| -> Result<SpiffeId> {
        Ok(format!("spiffe://cluster.local/ns/default/sa/{account}").parse()?)
    };
    let foreign = Authority::in_memory("cluster.local")?;
    let kind = refused(&stranger, mesh, &id("client")?, &foreign, &id("keeper")?).await?;
    ensure!(matches!(kind, Kind::TlsFailure | Kind::IdentityMismatch), "{kind:?}");
    // A rightful certificate, but the server is not whom the client expects.
    let state = pair.agent_a.state_dir();
    let own = Authority::open(state, "cluster.local")?;
    let kind = refused(&stranger, mesh, &id("client")?, &own, &id("somebody-else")?).await?;
    ensure!(kind == Kind::IdentityMismatch, "{kind:?}");

    eventually("every refusal is counted", async || {
        let metrics = pair.agent_b.metrics().await?;
        let refused = metric(&metrics, "mesh_refused_total", &[("side", "destination"), ("pod", "server")]);
        ensure!(refused >= 4.0, "{refused} refusals\n{metrics}");
        Ok(())
    })
    .await?;
    // Nobody else is any worse for it.
    let answer = pair.client.http_get(&format!("http://{}/", server.at(8080)), &[]).await?;
    ensure!(answer.status == 200, "{answer:?}");
    pair.finish().await
}
