//! Leaves, the authority that signs them, and the root are replaced under load: no request fails, and no handshake.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use anyhow::{Result, ensure};
use lab::{
    Agent, Pair, Pod, Service, apps,
    apps::{Load, LoadKind},
    eventually, metric,
    peer::{self, Certificate, Validity},
    pki::{Authority, put},
    require_root,
    wire::H2_PREFACE,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";
const QUICK: Duration = Duration::from_millis(10);
/// Leaves live so long, seconds: they are replaced every 7.
const FLAGS: [&str; 2] = ["--certificate-lifetime", "10"];

fn count(metrics: &str, name: &str, labels: &[(&str, &str)]) -> u64 {
    metric(metrics, name, labels) as u64
}

/// A client and a server on two nodes, and what goes on between them.
struct World {
    pair: Pair,
    server: Pod,
    service: Service,
}

impl World {
    async fn of(pair: Pair) -> Result<Self> {
        let server = pair.b.pod("server").sa("server").label("app", "server").start().await?;
        server.serve(apps::http(8080)).await?;
        server.serve(apps::tcp_echo(7000)).await?;
        let service = pair.lab.service("server").selector("app", "server");
        let service = service.port("http", 80, 8080).port("tcp", 70, 7000).apply()?;
        pair.settled().await?;
        server.enrolled().await?;
        Ok(Self { pair, server, service })
    }

    fn agents(&self) -> [&Agent; 2] {
        [&self.pair.agent_a, &self.pair.agent_b]
    }

    async fn load(&self, kind: LoadKind, port: u16, path: &str) -> Result<Load> {
        self.pair.client.load(kind, &self.service.url(port, path), 2, QUICK).await
    }

    /// The certificates of the workloads, by agent.
    async fn leaves(&self) -> Result<[BTreeMap<String, String>; 2]> {
        let [a, b] = self.agents();
        Ok([a.certificates("workload").await?, b.certificates("workload").await?])
    }

    /// Waits until every workload has another certificate than then.
    async fn replaced(&self, before: [BTreeMap<String, String>; 2]) -> Result<()> {
        eventually("all leaves are replaced", async || {
            for (before, now) in before.iter().zip(self.leaves().await?) {
                let other = now.iter().all(|(identity, serial)| before.get(identity) != Some(serial));
                ensure!(!now.is_empty() && other, "{now:?}, before {before:?}");
            }
            Ok(())
        })
        .await
    }

    /// Waits until both agents believe so many roots.
    async fn believe(&self, roots: usize) -> Result<()> {
        for agent in self.agents() {
            eventually("the roots are taken over", async || {
                let now = agent.certificates("root").await?;
                ensure!(now.len() == roots, "{now:?}");
                Ok(())
            })
            .await?;
        }
        Ok(())
    }

    /// No handshake has failed, at either end of any connection, and nothing was refused.
    async fn nothing_failed(&self) -> Result<()> {
        for agent in self.agents() {
            let metrics = agent.metrics().await?;
            ensure!(count(&metrics, "mesh_refused_total", &[]) == 0, "{metrics}");
            ensure!(count(&metrics, "istio_tcp_connections_failed_total", &[]) == 0, "{metrics}");
            for flag in ["TLS_FAILURE", "IDENTITY_ERROR", "CERT_REVOKED", "UC", "UF"] {
                let failed = count(&metrics, "istio_requests_total", &[("response_flags", flag)]);
                ensure!(failed == 0, "{flag}\n{metrics}");
            }
        }
        Ok(())
    }
}

async fn all_go_on(loads: &[&Load]) -> Result<()> {
    for load in loads {
        load.goes_on(3).await?;
    }
    Ok(())
}

async fn ended_well(loads: impl IntoIterator<Item = Load>) -> Result<()> {
    for load in loads {
        let seen = load.finish().await?;
        ensure!(seen.errors.is_empty() && seen.least > 0, "{seen:?}");
    }
    Ok(())
}

/// Whether somebody with this certificate is let in.
async fn is_let_in(from: &Pod, to: &Pod, certificate: &Certificate) -> Result<bool> {
    let mut stream = peer::handshake(peer::dial(from, to.at(15008))?, Some(certificate)).await?;
    // May fail already: a refusal is on its way.
    let _ = stream.write_all(H2_PREFACE).await;
    let _ = stream.write_all(b"\0\0\0\x04\0\0\0\0\0").await;
    let mut first = [0; 9];
    Ok(stream.read_exact(&mut first).await.is_ok())
}

#[tokio::test]
async fn leaves_and_the_root_are_replaced_under_load() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::of(Pair::with("rotate-root", &FLAGS).await?).await?;
    let agent = &world.pair.agent_b;
    let stranger = world.pair.a.pod("stranger").unenrolled().start().await?;
    let short =
        [world.load(LoadKind::Requests, 80, "/").await?, world.load(LoadKind::KeptAlive, 80, "/").await?];
    let long = [world.load(LoadKind::WebSocket, 80, "/ws").await?, world.load(LoadKind::Tcp, 70, "/").await?];
    let stale = world.load(LoadKind::Tcp, 70, "/").await?;
    let all: Vec<&Load> = short.iter().chain(&long).chain([&stale]).collect();

    world.replaced(world.leaves().await?).await?;
    all_go_on(&all).await?;
    let old = Certificate::of_lab(agent.state_dir(), CLIENT, Validity::Now)?;
    ensure!(is_let_in(&stranger, &world.server, &old).await?);

    ensure!(agent.ca(&["prepare"]).await?.contains("next: `switch`"));
    world.believe(2).await?;
    all_go_on(&all).await?;
    let refused = agent.ca(&["drop", "--now"]).await;
    ensure!(refused.is_err_and(|error| format!("{error:#}").contains("`switch` first")));

    let before = world.leaves().await?;
    agent.ca(&["switch", "--now"]).await?;
    world.replaced(before).await?;
    all_go_on(&all).await?;
    ensure!(is_let_in(&stranger, &world.server, &old).await?, "both roots are believed");
    let new = Certificate::of_lab(agent.state_dir(), CLIENT, Validity::Now)?;
    ensure!(is_let_in(&stranger, &world.server, &new).await?);
    ended_well(long).await?;
    world.nothing_failed().await?;

    agent.ca(&["drop", "--now"]).await?;
    world.believe(1).await?;
    let short_loads: Vec<&Load> = short.iter().collect();
    all_go_on(&short_loads).await?;
    ensure!(!is_let_in(&stranger, &world.server, &old).await?, "its root has gone");
    ensure!(is_let_in(&stranger, &world.server, &new).await?);
    // What has stood on the root all the time is cut in the end.
    eventually("the old connections are cut", async || {
        let seen = stale.seen()?;
        ensure!(!seen.errors.is_empty(), "{seen:?}");
        Ok(())
    })
    .await?;
    all_go_on(&short_loads).await?;
    ended_well(short).await?;
    world.pair.finish().await
}

/// A root that is kept elsewhere, and one authority below it after the other that signs.
#[tokio::test]
async fn the_authority_below_a_root_is_replaced_under_load() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::with("rotate-below", &FLAGS).await?;
    let dir = pair.agent_a.state_dir().to_owned();
    let world = World::of(pair).await?;
    let loads = [
        world.load(LoadKind::Requests, 80, "/").await?,
        world.load(LoadKind::KeptAlive, 80, "/").await?,
        world.load(LoadKind::WebSocket, 80, "/ws").await?,
        world.load(LoadKind::Tcp, 70, "/").await?,
    ];
    let all: Vec<&Load> = loads.iter().collect();
    let root = Authority::root("kept elsewhere")?;
    let own = Authority::of_state_dir(&dir)?;
    put(&dir.join("root-cert.pem"), &format!("{}{}", own.certificate, root.certificate))?;
    world.believe(2).await?;
    all_go_on(&all).await?;
    for name in ["first", "second"] {
        let before = world.leaves().await?;
        sign_with(&dir, &root.below(name)?)?;
        world.replaced(before).await?;
        for agent in world.agents() {
            let signing = agent.certificates("signing").await?;
            ensure!(signing.keys().any(|subject| subject.contains(name)), "{signing:?}");
        }
        all_go_on(&all).await?;
    }
    ended_well(loads).await?;
    world.nothing_failed().await?;
    world.pair.finish().await
}

/// As the documentation says: both certificates, then the key.
fn sign_with(dir: &Path, next: &Authority) -> Result<()> {
    let before = fs::read_to_string(dir.join("ca-cert.pem"))?;
    put(&dir.join("ca-cert.pem"), &format!("{}{before}", next.certificate))?;
    put(&dir.join("ca-key.pem"), &next.key)?;
    put(&dir.join("ca-cert.pem"), &next.certificate)
}
