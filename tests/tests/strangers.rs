//! A stranger gets nothing from port 15008, and neither does an endpoint that is not whom it should be: each is refused,
//! and counted once by its kind.

use std::{collections::BTreeMap, fs, net::SocketAddr};

use anyhow::{Context as _, Result, ensure};
use lab::{
    Agent, Lab, Pair, Pod, apps, eventually, metric,
    peer::{self, Certificate, Validity},
    require_root,
    wire::{H2_PREFACE, H2_STRAY_CONTINUATION},
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";
/// Kinds of refusals that an agent counts where traffic arrives.
const KINDS: [&str; 5] =
    ["tls_failure", "unauthenticated", "identity_mismatch", "bad_request", "downstream_reset"];

/// Refusals at the destination so far, by kind.
async fn refusals(agent: &Agent) -> Result<BTreeMap<&'static str, u64>> {
    let metrics = agent.metrics().await?;
    let count = |kind| {
        let labels = [("side", "destination"), ("pod", "server"), ("kind", kind)];
        metric(&metrics, "mesh_refused_total", &labels) as u64
    };
    Ok(KINDS.into_iter().map(|kind| (kind, count(kind))).collect())
}

/// One more of this kind than before, and not one of any other.
async fn one_more(agent: &Agent, before: &BTreeMap<&'static str, u64>, kind: &str) -> Result<()> {
    let mut expected = before.clone();
    *expected.get_mut(kind).context("a kind that is not looked at")? += 1;
    eventually("the refusal is counted", async || {
        let now = refusals(agent).await?;
        ensure!(now == expected, "{now:?}, expected {expected:?}");
        Ok(())
    })
    .await
}

/// Reads until the other side ends the connection, with an alert, a reset or a plain end.
async fn read_to_end(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> Vec<u8> {
    let mut answer = Vec::new();
    // Any end is as good as another.
    let _ = stream.read_to_end(&mut answer).await;
    answer
}

/// The same hand with a good certificate is let in: the others were refused for what they should be refused for.
async fn welcome(pair: &Pair, from: &Pod, to: SocketAddr, certificate: &Certificate) -> Result<()> {
    let before = refusals(&pair.agent_b).await?;
    let mut stream = peer::handshake(peer::dial(from, to)?, Some(certificate)).await?;
    stream.write_all(H2_PREFACE).await?;
    stream.write_all(b"\0\0\0\x04\0\0\0\0\0").await?;
    let mut first = [0; 9];
    stream.read_exact(&mut first).await?;
    ensure!(first[3] == 4, "the first frame is SETTINGS: {first:?}");
    ensure!(refusals(&pair.agent_b).await? == before);
    Ok(())
}

#[tokio::test]
async fn strangers_are_refused_and_each_is_counted_by_its_kind() -> Result<()> {
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

    for garbage in ["GET / HTTP/1.1\r\nHost: server\r\n\r\n", "\0\u{1}\u{2}garbage"] {
        let before = refusals(&pair.agent_b).await?;
        let mut stream = peer::dial(&stranger, mesh)?;
        stream.write_all(garbage.as_bytes()).await?;
        let answer = read_to_end(&mut stream).await;
        ensure!(!String::from_utf8_lossy(&answer).contains("HTTP/1.1"), "plaintext was answered");
        one_more(&pair.agent_b, &before, "tls_failure").await?;
    }
    let lab = |validity| Certificate::of_lab(pair.agent_b.state_dir(), CLIENT, validity);
    let refused = [
        ("no certificate", None),
        ("an expired one", Some(lab(Validity::Expired)?)),
        ("one of a foreign root", Some(Certificate::of_another_root(CLIENT)?)),
    ];
    for (what, certificate) in &refused {
        let before = refusals(&pair.agent_b).await?;
        let mut stream = peer::handshake(peer::dial(&stranger, mesh)?, certificate.as_ref()).await?;
        // May fail already: the refusal is on its way.
        let _ = stream.write_all(H2_PREFACE).await;
        let answer = read_to_end(&mut stream).await;
        ensure!(answer.is_empty(), "with {what} came {answer:?}");
        one_more(&pair.agent_b, &before, "unauthenticated").await.context(*what)?;
    }
    welcome(&pair, &stranger, mesh, &lab(Validity::Now)?).await?;
    // Nobody else is any worse for it.
    let answer = pair.client.http_get(&format!("http://{}/", server.at(8080)), &[]).await?;
    ensure!(answer.status == 200, "{answer:?}");
    pair.finish().await
}

#[tokio::test]
async fn a_peer_with_a_good_certificate_that_breaks_http2_is_counted() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("broken-peer").await?;
    let server = pair.b.pod("server").sa("keeper").start().await?;
    server.serve(apps::http(8080)).await?;
    let stranger = pair.a.pod("stranger").unenrolled().start().await?;
    pair.settled().await?;
    server.enrolled().await?;
    let before = refusals(&pair.agent_b).await?;
    let good = Certificate::of_lab(pair.agent_b.state_dir(), CLIENT, Validity::Now)?;
    let mut stream = peer::handshake(peer::dial(&stranger, server.at(15008))?, Some(&good)).await?;
    stream.write_all(&[H2_PREFACE, H2_STRAY_CONTINUATION].concat()).await?;
    read_to_end(&mut stream).await;
    one_more(&pair.agent_b, &before, "bad_request").await?;
    let answer = pair.client.http_get(&format!("http://{}/", server.at(8080)), &[]).await?;
    ensure!(answer.status == 200, "{answer:?}");
    pair.finish().await
}

/// The client's agent reads another manifest than the server's: it expects another identity there.
#[tokio::test]
async fn an_endpoint_that_proves_another_identity_is_refused() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let lab = Lab::new("impostor").await?;
    let (a, b) = (lab.node("a").await?, lab.node("b").await?);
    let client = a.pod("client").sa("client").start().await?;
    let server = b.pod("server").sa("impostor").label("app", "server").start().await?;
    server.serve(apps::http(8080)).await?;
    let service = lab.service("server").selector("app", "server").port("http", 80, 8080).apply()?;

    let other = tempfile::tempdir()?;
    for entry in fs::read_dir(lab.config_dir())? {
        let entry = entry?;
        let text = fs::read_to_string(entry.path())?;
        fs::write(other.path().join(entry.file_name()), text.replace("\"impostor\"", "\"keeper\""))?;
    }
    let agent_a = a.agent().config_dir(other.path().to_owned()).start().await?;
    let agent_b = b.agent().start().await?;
    client.enrolled().await?;
    server.enrolled().await?;

    let answer = client.http_get(&service.url(80, "/"), &[("x-secret", "not-for-impostors")]).await?;
    ensure!(answer.status == 502, "{answer:?}");
    let metrics = agent_a.metrics().await?;
    let count = |labels: &[(&str, &str)]| metric(&metrics, "istio_requests_total", labels) as u64;
    let flagged = [("reporter", "source"), ("response_flags", "IDENTITY_ERROR"), ("response_code", "502")];
    ensure!(count(&flagged) == 1 && count(&[]) == 1, "{metrics}");
    let arrived = metric(&agent_b.metrics().await?, "istio_requests_total", &[]) as u64;
    ensure!(arrived == 0, "the impostor was handed the request");
    // With both agents of one mind it is served.
    fs::copy(lab.config_dir().join("pod-default-server.yaml"), other.path().join("pod-default-server.yaml"))?;
    agent_a
        .config("the right identity is expected", |dump| {
            ensure!(dump.to_string().contains("sa/impostor"), "not yet");
            Ok(())
        })
        .await?;
    ensure!(client.http_get(&service.url(80, "/"), &[]).await?.status == 200);
    lab.finish().await
}

/// There is no PeerAuthentication: what comes from outside the mesh in plaintext is served, and told apart.
#[tokio::test]
async fn plaintext_from_outside_is_served_and_reported_as_such() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("outside").await?;
    let server = pair.b.pod("server").label("app", "server").start().await?;
    server.serve(apps::http(8080)).await?;
    let outsider = pair.a.pod("outsider").unenrolled().start().await?;
    pair.settled().await?;
    server.enrolled().await?;
    let answer = outsider.http_get(&format!("http://{}/", server.at(8080)), &[]).await?;
    ensure!(answer.status == 200 && answer.echo()?.peer.ip() == outsider.ip(), "{answer:?}");
    let names = |policy| [("reporter", "destination"), ("connection_security_policy", policy)];
    let metrics = pair.agent_b.metrics().await?;
    let opened = |policy| {
        let names = names(policy);
        let of = |name| metric(&metrics, name, &names) as u64;
        of("istio_tcp_connections_opened_total") + of("istio_requests_total")
    };
    ensure!((opened("none"), opened("mutual_tls")) == (1, 0), "{metrics}");
    eventually("the flow is shown without protection", async || {
        let flows = pair.agent_b.flows().await?;
        let flow = flows
            .as_array()
            .into_iter()
            .flatten()
            .find(|flow| flow["pod"] == "server" && flow["socket"] != 0);
        let flow = flow.context("no flow of the server's")?;
        ensure!(flow["security"] == "none" && flow["verdict"] == "captured", "{flow}");
        ensure!(flow["peer_identity"].is_null() && flow["peer_pod"] == "default/outsider", "{flow}");
        Ok(())
    })
    .await?;
    pair.finish().await
}
