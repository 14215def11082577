//! Certificates that a CRL lists: refused at both ends, and what is open on them is cut; the agent whose own they are has
//! others at once. A list that cannot be read changes nothing, and is said to be wrong.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use lab::{
    Agent, Lab, Pair, Pod, Service, apps,
    apps::{Load, LoadKind},
    eventually, metric,
    peer::{self, Certificate, Validity},
    pki::{Authority, put},
    require_root,
    wire::H2_PREFACE,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/default/sa/server";
const QUICK: Duration = Duration::from_millis(20);

fn count(metrics: &str, name: &str, labels: &[(&str, &str)]) -> u64 {
    metric(metrics, name, labels) as u64
}

/// A client and a server on two nodes, whose agents go by one CRL, empty at first.
struct World {
    pair: Pair,
    server: Pod,
    service: Service,
    crl: PathBuf,
    _dir: tempfile::TempDir,
}

impl World {
    async fn new(name: &str) -> Result<Option<Self>> {
        if !require_root()? {
            return Ok(None);
        }
        let dir = tempfile::tempdir()?;
        let crl = dir.path().join("crl.pem");
        put(&crl, "")?;
        let pair = Pair::with(name, &["--crl", &crl.to_string_lossy()]).await?;
        let server = pair.b.pod("server").sa("server").label("app", "server").start().await?;
        server.serve(apps::http(8080)).await?;
        server.serve(apps::tcp_echo(7000)).await?;
        let service = pair.lab.service("server").selector("app", "server");
        let service = service.port("http", 80, 8080).port("tcp", 70, 7000).apply()?;
        pair.settled().await?;
        server.enrolled().await?;
        Ok(Some(Self { pair, server, service, crl, _dir: dir }))
    }

    fn revoke(&self, serials: &[&str]) -> Result<()> {
        put(&self.crl, &Authority::of_state_dir(self.pair.agent_a.state_dir())?.revokes(serials)?)
    }

    /// Bytes that go between the two for as long as they may.
    async fn bytes(&self) -> Result<Load> {
        self.pair.client.load(LoadKind::Tcp, &self.service.url(70, "/"), 1, QUICK).await
    }

    async fn served(&self) -> Result<()> {
        eventually("requests are answered", async || {
            let answer = self.pair.client.get(self.service.url(80, "/")).send().await?;
            ensure!(answer.status == 200, "{answer:?}");
            Ok(())
        })
        .await
    }
}

async fn is_cut(load: &Load) -> Result<()> {
    eventually("the connection is cut", async || {
        let seen = load.seen()?;
        ensure!(!seen.errors.is_empty(), "{seen:?}");
        Ok(())
    })
    .await
}

/// The serial number of a workload's certificate, once it is another than before.
async fn serial(agent: &Agent, identity: &str, before: Option<&str>) -> Result<String> {
    let mut found = String::new();
    eventually("the certificate is another", async || {
        found = agent.certificates("workload").await?.remove(identity).context("it has none")?;
        ensure!(before != Some(&*found), "{found}");
        Ok(())
    })
    .await?;
    Ok(found)
}

#[tokio::test]
async fn a_client_that_is_revoked_is_cut_and_has_another_certificate_at_once() -> Result<()> {
    let Some(world) = World::new("revoked-client").await? else { return Ok(()) };
    let World { pair, server, .. } = &world;
    let (load, before) = (world.bytes().await?, serial(&pair.agent_a, CLIENT, None).await?);
    let socket = pair.client.load(LoadKind::WebSocket, &world.service.url(80, "/ws"), 1, QUICK).await?;
    world.served().await?;
    ensure!(count(&pair.agent_b.metrics().await?, "mesh_refused_total", &[]) == 0);
    world.revoke(&[&before])?;
    is_cut(&load).await?;
    is_cut(&socket).await?;
    serial(&pair.agent_a, CLIENT, Some(&before)).await?;
    world.served().await?;

    let labels = [("side", "destination"), ("kind", "revoked"), ("pod", server.name())];
    eventually("the cut is counted", async || {
        let metrics = pair.agent_b.metrics().await?;
        ensure!(count(&metrics, "mesh_refused_total", &labels) >= 2, "{metrics}");
        ensure!(count(&metrics, "mesh_revoked_certificates", &[]) == 1, "{metrics}");
        let labels = [("reporter", "destination"), ("response_flags", "CERT_REVOKED")];
        ensure!(count(&metrics, "istio_tcp_connections_closed_total", &labels) >= 1, "{metrics}");
        Ok(())
    })
    .await?;
    let dialled = server.at(7000).to_string();
    let line = pair.agent_b.logged_as("the cut of the bytes", |line| {
        line["event"] == "refused" && line["kind"] == "revoked" && line["dst.addr"] == dialled
    });
    let line = line.await?;
    ensure!(line["flags"] == "CERT_REVOKED" && line["error"].contains("is revoked"), "{line:?}");
    world.pair.finish().await
}

#[tokio::test]
async fn a_server_that_is_revoked_is_left_until_it_has_another_certificate() -> Result<()> {
    let Some(world) = World::new("revoked-server").await? else { return Ok(()) };
    let agent = &world.pair.agent_b;
    let (load, before) = (world.bytes().await?, serial(agent, SERVER, None).await?);
    world.served().await?;
    world.revoke(&[&before])?;
    is_cut(&load).await?;
    serial(agent, SERVER, Some(&before)).await?;
    world.served().await?;
    world.bytes().await?.finish().await?;
    world.pair.finish().await
}

/// Whether somebody with this certificate is let in.
async fn is_let_in(from: &Pod, to: SocketAddr, certificate: &Certificate) -> Result<bool> {
    let mut stream = peer::handshake(peer::dial(from, to)?, Some(certificate)).await?;
    // May fail already: a refusal is on its way.
    let _ = stream.write_all(H2_PREFACE).await;
    let _ = stream.write_all(b"\0\0\0\x04\0\0\0\0\0").await;
    let mut first = [0; 9];
    Ok(stream.read_exact(&mut first).await.is_ok())
}

#[tokio::test]
async fn a_list_that_cannot_be_read_leaves_the_last_one_in_force() -> Result<()> {
    let Some(world) = World::new("bad-crl").await? else { return Ok(()) };
    let (agent, mesh) = (&world.pair.agent_b, world.server.at(15008));
    let stranger = world.pair.a.pod("stranger").unenrolled().start().await?;
    let of_lab = || Certificate::of_lab(agent.state_dir(), CLIENT, Validity::Now);
    let (revoked, good) = (of_lab()?, of_lab()?);
    ensure!(is_let_in(&stranger, mesh, &revoked).await? && is_let_in(&stranger, mesh, &good).await?);
    world.revoke(&[&revoked.serial])?;
    let told = async |problems: bool| {
        eventually("the agent says what is wrong, or that nothing is", async || {
            let metrics = agent.metrics().await?;
            ensure!(count(&metrics, "mesh_revoked_certificates", &[]) == 1, "{metrics}");
            ensure!((count(&metrics, "mesh_certificate_problems", &[]) == 1) == problems, "{metrics}");
            let status = agent.status().await?["problems"].to_string();
            ensure!(status.contains("--crl") == problems, "{status}");
            Ok(())
        })
        .await
    };
    told(false).await?;
    ensure!(!is_let_in(&stranger, mesh, &revoked).await? && is_let_in(&stranger, mesh, &good).await?);

    put(&world.crl, "-----BEGIN X509 CRL-----\nMIIB\n")?;
    told(true).await?;
    ensure!(!is_let_in(&stranger, mesh, &revoked).await? && is_let_in(&stranger, mesh, &good).await?);
    world.revoke(&[&revoked.serial])?;
    told(false).await?;
    world.pair.finish().await
}

#[tokio::test]
async fn an_agent_does_not_start_without_knowing_what_is_revoked() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let lab = Lab::new("no-crl").await?;
    let agent = lab.node("a").await?.agent().arg("--crl").arg("/nowhere/crl.pem").spawn()?;
    let (status, said) = agent.ends().await?;
    ensure!(status.code() == Some(1) && said.contains("cannot read the CRL /nowhere/crl.pem"), "{said}");
    lab.finish().await
}
