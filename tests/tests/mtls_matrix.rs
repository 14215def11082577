//! Modes of mutual TLS by kinds of clients: what each client sees, what is counted, and what is logged. Whoever replays a
//! token is told no and gets no certificate, whatever the mode (`certificate_authority.rs`): it comes without one.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use lab::{
    Pair, Pod, Service, apps, eventually, metric,
    peer::{self, Certificate, Validity},
    pki::{Authority, put},
    require_root,
    wire::H2_PREFACE,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";
const ELSEWHERE: &str = "spiffe://elsewhere.example/ns/default/sa/client";

/// What a client comes with.
enum Comes {
    /// A pod of the mesh, by its agent.
    Meshed,
    /// A pod that is not in the mesh, in plaintext.
    Plaintext,
    /// A hand-made peer of port 15008, with or without a certificate.
    Peer(Option<Certificate>),
}

/// The kind that is counted, and words of the log.
type Refusal = Option<(&'static str, &'static str)>;

fn count(metrics: &str, name: &str, labels: &[(&str, &str)]) -> u64 {
    metric(metrics, name, labels) as u64
}

struct World {
    pair: Pair,
    server: Pod,
    service: Service,
    stranger: Pod,
}

impl World {
    async fn refusals(&self) -> Result<u64> {
        Ok(count(&self.pair.agent_b.metrics().await?, "mesh_refused_total", &[]))
    }

    async fn refused_as(&self, kind: &str) -> Result<u64> {
        let labels = [("side", "destination"), ("pod", self.server.name()), ("kind", kind)];
        Ok(count(&self.pair.agent_b.metrics().await?, "mesh_refused_total", &labels))
    }

    /// Requests and connections of one kind of security that the server's agent has reported.
    async fn reported(&self, security: &str) -> Result<u64> {
        let metrics = self.pair.agent_b.metrics().await?;
        let labels = [("reporter", "destination"), ("connection_security_policy", security)];
        let of = |name| count(&metrics, name, &labels);
        Ok(of("istio_requests_total") + of("istio_tcp_connections_opened_total"))
    }

    /// Whether the server answers, and the address that asked where it is known.
    async fn served(&self, comes: &Comes) -> Result<(bool, Option<SocketAddr>)> {
        match comes {
            Comes::Meshed => {
                let answer = self.pair.client.http_get(&self.service.url(80, "/"), &[]).await?;
                Ok((answer.status == 200, None))
            }
            Comes::Plaintext => {
                let mut stream = peer::dial(&self.stranger, self.server.at(8080))?;
                let from = stream.local_addr()?;
                let request = b"GET / HTTP/1.1\r\nHost: server\r\nConnection: close\r\n\r\n";
                // May fail: it is closed before a byte is read.
                let _ = stream.write_all(request).await;
                let mut answer = Vec::new();
                let _ = stream.read_to_end(&mut answer).await;
                ensure!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 200"), "{answer:?}");
                Ok((!answer.is_empty(), Some(from)))
            }
            Comes::Peer(certificate) => {
                let stream = peer::dial(&self.stranger, self.server.at(15008))?;
                let from = stream.local_addr()?;
                let mut stream = peer::handshake(stream, certificate.as_ref()).await?;
                // May fail already: a refusal is on its way.
                let _ = stream.write_all(H2_PREFACE).await;
                let _ = stream.write_all(b"\0\0\0\x04\0\0\0\0\0").await;
                let mut first = [0; 9];
                Ok((stream.read_exact(&mut first).await.is_ok(), Some(from)))
            }
        }
    }

    /// One field of the matrix.
    async fn check(&self, comes: &Comes, refusal: Refusal) -> Result<()> {
        let before =
            (self.refusals().await?, self.reported("none").await?, self.reported("mutual_tls").await?);
        let before_kind = self.refused_as(refusal.map_or("-", |(kind, _)| kind)).await?;
        let (served, from) = self.served(comes).await?;
        ensure!(served == refusal.is_none(), "served: {served}");
        let [more, plain, mutual] = match (refusal, comes) {
            (Some(_), _) => [1, 0, 0],
            (None, Comes::Meshed) => [0, 0, 1],
            (None, Comes::Plaintext) => [0, 1, 0],
            // It has asked for nothing.
            (None, Comes::Peer(_)) => [0, 0, 0],
        };
        let expected = (before.0 + more, before.1 + plain, before.2 + mutual);
        eventually("it is counted once, as what it is", async || {
            let now =
                (self.refusals().await?, self.reported("none").await?, self.reported("mutual_tls").await?);
            ensure!(now == expected, "{now:?}, expected {expected:?}");
            Ok(())
        })
        .await?;
        let Some((kind, words)) = refusal else { return Ok(()) };
        let counted = self.refused_as(kind).await?;
        ensure!(counted == before_kind + 1, "{kind}: {counted}, {before_kind} before");
        let from = from.context("a refused client with an address")?.to_string();
        let line = self
            .pair
            .agent_b
            .logged_as("the refusal", |line| line["event"] == "refused" && line["src.addr"] == from);
        let line = line.await?;
        ensure!(line["kind"] == kind && line["error"].contains(words), "{line:?}");
        Ok(())
    }
}

fn clients(world: &World) -> Result<Vec<(&'static str, Comes, Refusal)>> {
    let of_lab = |identity, validity| {
        Certificate::of_lab(world.pair.agent_b.state_dir(), identity, validity).map(Some).map(Comes::Peer)
    };
    let foreign = Comes::Peer(Some(Certificate::of_another_root(CLIENT)?));
    let unauthenticated = |words| Some(("unauthenticated", words));
    Ok(vec![
        ("meshed", Comes::Meshed, None),
        ("a peer of the mesh", of_lab(CLIENT, Validity::Now)?, None),
        (
            "of a foreign trust domain",
            of_lab(ELSEWHERE, Validity::Now)?,
            unauthenticated("another trust domain"),
        ),
        ("of a foreign root", foreign, unauthenticated("not of this mesh's root")),
        ("expired", of_lab(CLIENT, Validity::Expired)?, unauthenticated("has expired")),
        ("revoked", of_lab(CLIENT, Validity::Now)?, Some(("revoked", "is revoked"))),
        ("without a certificate", Comes::Peer(None), unauthenticated("no client certificate")),
    ])
}

#[tokio::test]
async fn every_mode_by_every_client() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let crl = dir.path().join("crl.pem");
    put(&crl, "")?;
    let pair = Pair::with("mtls-matrix", &["--crl", &crl.to_string_lossy()]).await?;
    let server = pair.b.pod("server").sa("server").label("app", "server").start().await?;
    server.serve(apps::http(8080)).await?;
    let service = pair.lab.service("server").selector("app", "server").port("http", 80, 8080).apply()?;
    let stranger = pair.a.pod("stranger").unenrolled().start().await?;
    pair.settled().await?;
    server.enrolled().await?;
    let world = World { pair, server, service, stranger };
    let clients = clients(&world)?;
    let revoked = clients.iter().find_map(|(name, comes, _)| match comes {
        Comes::Peer(Some(certificate)) if *name == "revoked" => Some(certificate.serial.clone()),
        _ => None,
    });
    let list = Authority::of_state_dir(world.pair.agent_b.state_dir())?;
    put(&crl, &list.revokes(&[revoked.context("nobody is revoked")?])?)?;
    eventually("the list is in force", async || {
        let metrics = world.pair.agent_b.metrics().await?;
        ensure!(count(&metrics, "mesh_revoked_certificates", &[]) == 1, "{metrics}");
        Ok(())
    })
    .await?;

    for mode in ["none set", "UNSET", "DISABLE", "PERMISSIVE", "STRICT"] {
        if mode != "none set" {
            let manifest = format!(
                "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
                 metadata: {{ name: all, namespace: default }}\nspec: {{ mtls: {{ mode: {mode} }} }}\n"
            );
            world.pair.apply("peers.yaml", &manifest).await?;
        }
        for (name, comes, refusal) in &clients {
            world.check(comes, *refusal).await.with_context(|| format!("{mode}: a client {name}"))?;
        }
        let strict = (mode == "STRICT").then_some(("plaintext", "PeerAuthentication default/all"));
        let checked = world.check(&Comes::Plaintext, strict).await;
        checked.with_context(|| format!("{mode}: a client in plaintext"))?;
    }
    world.pair.finish().await
}
