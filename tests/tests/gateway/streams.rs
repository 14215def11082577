//! Bytes: TCP ports, TLS that is passed on as it is, and TLS that ends at the gateway around bytes.

use anyhow::{Result, ensure};
use lab::{apps, eventually, metric, peer, pki::Authority, require_root};
use std::sync::Arc;

use rustls::{
    ServerConfig,
    crypto::aws_lc_rs::default_provider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use tokio::io::copy_bidirectional;
use tokio_rustls::TlsAcceptor;

use super::world::{APP, World, bound, gateway, leaf, secret};

const SERVERS: &str = "
  - port: { number: 9000, name: tcp, protocol: TCP }
    hosts: [\"*\"]
  - port: { number: 9443, name: ended, protocol: TLS }
    hosts: [ended.example]
    tls: { mode: SIMPLE, credentialName: ended }
  - port: { number: 9443, name: passed, protocol: TLS }
    hosts: [\"*.passed.example\"]
    tls: { mode: PASSTHROUGH }
";

const ECHO: u16 = 9000;
const TLS: u16 = 9443;

#[tokio::test]
async fn bytes_go_where_their_port_or_server_name_says() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let root = Authority::root("servers")?;
    let manifests = gateway(SERVERS)
        + &bound(
            "tcp",
            "*",
            "  tcp:\n  - match: [{ port: 9000 }]\n    route: [{ destination: { host: echo } }]\n",
        )
        + &bound(
            "ended",
            "ended.example",
            "  tcp:\n  - match: [{ port: 9443 }]\n    route: [{ destination: { host: shop } }]\n",
        )
        + &bound(
            "passed",
            "*.passed.example",
            "  tls:\n  - match: [{ sniHosts: [\"*.passed.example\"] }]\n    route: [{ destination: { host: secure } }]\n",
        )
        + &secret("ended", &leaf(&root, "ended.example", None)?, None);
    let world = World::new("gwstreams", &manifests).await?;
    world.v1.serve(apps::tcp_echo(ECHO)).await?;
    let _secure = serve_tls(&world, &leaf(&root, "a.passed.example", None)?)?;
    let service = |name: &str, target| {
        world.lab.service(name).selector("version", "v1").port("tcp", target, target).apply()
    };
    service("echo", ECHO)?;
    service("secure", TLS)?;
    world.settled().await?;

    let echoed = world.client.tcp(world.gateway.pod().at(9000), 3 << 20, &[]).await?;
    ensure!(echoed.intact && echoed.received == 3 << 20, "{echoed:?}");

    let dir = tempfile::tempdir()?;
    let roots = dir.path().join("roots.pem");
    std::fs::write(&roots, &root.certificate)?;
    let roots = roots.to_string_lossy().into_owned();
    for (host, expected) in [("a.passed.example", 200), ("ended.example", 200), ("other.example", 0)] {
        let resolve = format!("{host}:9443:{}", world.gateway.pod().ip());
        let url = format!("https://{host}:9443/{host}");
        let args = ["--resolve", &resolve, "--cacert", &roots, "--http1.1", "--no-alpn", &url];
        let curled = world.client.curl(&args).await?;
        ensure!(curled.transfers[0].status == expected, "{host}: {curled:?}");
    }
    let labels = [
        ("reporter", "source"),
        ("source_workload", "edge"),
        ("destination_workload", "shop-v1"),
        ("connection_security_policy", "mutual_tls"),
    ];
    eventually("the connections in the gateway's metrics", async || {
        let closed = metric(&world.gateway.metrics().await?, "istio_tcp_connections_closed_total", &labels);
        ensure!(closed >= 2.0, "{closed}");
        Ok(())
    })
    .await?;
    let refused = world.gateway.logged(&[("event", "refused"), ("flags", "NR")]);
    ensure!(refused.iter().any(|line| line.contains("other.example")), "{refused:#?}");
    world.finish().await
}

/// Ends TLS in the first pod, in front of its app.
fn serve_tls(world: &World, shown: &(String, String)) -> Result<tokio::task::JoinSet<()>> {
    let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(
            vec![CertificateDer::from_pem_slice(shown.0.as_bytes())?],
            PrivateKeyDer::from_pem_slice(shown.1.as_bytes())?,
        )?;
    let (acceptor, pod) = (TlsAcceptor::from(Arc::new(config)), world.v1.clone());
    world.v1.serve_own(TLS, move |stream| {
        let (acceptor, pod) = (acceptor.clone(), pod.clone());
        async move {
            // What is refused, the test sees from the other side.
            let Ok(mut stream) = acceptor.accept(stream).await else { return };
            let Ok(mut app) = peer::dial(&pod, ([127, 0, 0, 1], APP).into()) else { return };
            let _ = copy_bidirectional(&mut stream, &mut app).await;
        }
    })
}
