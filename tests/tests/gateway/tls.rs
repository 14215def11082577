//! TLS ends at a gateway: the certificate by the name that is asked for, clients by theirs; what is replaced holds for who comes
//! anew.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use lab::{
    clients::{Curled, Transferred},
    eventually,
    pki::{Authority, put},
    require_root,
};

use super::world::{APP, World, bound, gateway, leaf, secret, to_version};

const SERVERS: &str = "
  - port: { number: 8443, name: a, protocol: HTTPS }
    hosts: [a.example]
    tls: { mode: SIMPLE, credentialName: a }
  - port: { number: 8443, name: b, protocol: HTTPS }
    hosts: [b.example]
    tls: { mode: SIMPLE, credentialName: b, minProtocolVersion: TLSV1_3 }
  - port: { number: 8444, name: mutual, protocol: HTTPS }
    hosts: [a.example]
    tls: { mode: MUTUAL, credentialName: mutual, subjectAltNames: [friend.example] }
";

/// A directory for what curl is given.
struct Files(tempfile::TempDir);

impl Files {
    fn new(files: &[(&str, &str)]) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        for (name, content) in files {
            put(&dir.path().join(name), content)?;
        }
        Ok(Self(dir))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

async fn ask(world: &World, files: &Files, port: u16, host: &str, more: &[&str]) -> Result<Curled> {
    let resolve = format!("{host}:{port}:{}", world.gateway.pod().ip());
    let (roots, url) = (text(&files.path("roots.pem")), format!("https://{host}:{port}/"));
    let mut args = vec!["--resolve", &resolve, "--cacert", &roots];
    args.extend(more);
    args.push(&url);
    world.client.curl(&args).await
}

fn answered(curled: &Curled) -> Result<&Transferred> {
    let first = curled.transfers.first().filter(|one| one.status == 200);
    first.ok_or_else(|| anyhow::anyhow!("not answered: {curled:?}"))
}

#[tokio::test]
async fn certificates_are_chosen_by_name_and_clients_by_theirs() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let (root, friends) = (Authority::root("servers")?, Authority::root("friends")?);
    let of = |name: &str| leaf(&root, name, None);
    let friend = leaf(&friends, "friend.example", Some("spiffe://elsewhere/ns/x/sa/friend"))?;
    let (other, stranger) = (leaf(&friends, "other.example", None)?, leaf(&root, "friend.example", None)?);
    let files = Files::new(&[
        ("roots.pem", &root.certificate),
        ("friend.pem", &(friend.0.clone() + &friend.1)),
        ("other.pem", &(other.0.clone() + &other.1)),
        ("stranger.pem", &(stranger.0.clone() + &stranger.1)),
    ])?;
    let manifests = gateway(SERVERS)
        + &bound("a", "a.example", &to_version("v1"))
        + &bound("b", "b.example", &to_version("v2"))
        + &secret("a", &of("a.example")?, None)
        + &secret("b", &of("b.example")?, None)
        + &secret("mutual", &of("a.example")?, Some(&friends));
    let world = World::new("gwtls", &manifests).await?;

    let curled = ask(&world, &files, 8443, "a.example", &[]).await?;
    let first = answered(&curled)?;
    ensure!(first.version == "2" && curled.stdout.contains("shop-v1"), "{curled:?}");
    ensure!(curled.stdout.contains("\"x-forwarded-proto\":\"https\""), "{curled:?}");
    let curled = ask(&world, &files, 8443, "b.example", &["--http1.1"]).await?;
    ensure!(answered(&curled)?.version == "1.1" && curled.stdout.contains("shop-v2"), "{curled:?}");
    ensure!(answered(&ask(&world, &files, 8443, "a.example", &["--tls-max", "1.2"]).await?).is_ok());
    ensure!(answered(&ask(&world, &files, 8443, "b.example", &["--tls-max", "1.2"]).await?).is_err());
    // Another server's host on this one's connection is nobody's, and so is a name that no server has.
    let curled = ask(&world, &files, 8443, "a.example", &["-H", "Host: b.example"]).await?;
    ensure!(curled.transfers[0].status == 404, "{curled:?}");
    let curled = ask(&world, &files, 8443, "c.example", &["--insecure"]).await?;
    ensure!(curled.transfers[0].status == 0, "{curled:?}");

    for (shown, expected) in
        [(None, 0), (Some("friend.pem"), 200), (Some("other.pem"), 0), (Some("stranger.pem"), 0)]
    {
        let shown = shown.map(|name| text(&files.path(name)));
        let more: Vec<&str> = shown.iter().flat_map(|shown| ["--cert", &**shown]).collect();
        let curled = ask(&world, &files, 8444, "a.example", &more).await?;
        ensure!(curled.transfers[0].status == expected, "{more:?}: {curled:?}");
        if expected == 200 {
            // The app is told of both: the client by the gateway, the gateway by the app's own node.
            let cert = "Subject=\\\"CN=friend.example\\\";URI=spiffe://elsewhere/ns/x/sa/friend,By=spiffe://";
            ensure!(curled.stdout.contains(cert), "{curled:?}");
        }
    }
    let dump = world.gateway.config_dump().await?["gateway"].to_string();
    ensure!(dump.contains("friend.example"), "{dump}");
    ensure!(!dump.contains("PRIVATE KEY"), "{dump}");
    let refused = world.gateway.logged(&[("event", "refused")]);
    for why in ["shown no client certificate", "none of the names", "\\\"c.example\\\"", "not acceptable"] {
        ensure!(refused.iter().any(|line| line.contains(why)), "{why}: {refused:#?}");
    }
    world.finish().await
}

#[tokio::test]
async fn a_replaced_certificate_is_shown_to_who_comes_anew() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let (root, next) = (Authority::root("servers")?, Authority::root("next")?);
    let files = Files::new(&[("roots.pem", &root.certificate), ("next.pem", &next.certificate)])?;
    let routes = gateway(
        "
  - port: { number: 8443, name: a, protocol: HTTPS }
    hosts: [a.example]
    tls: { mode: SIMPLE, credentialName: a }
  - port: { number: 8444, name: files, protocol: HTTPS }
    hosts: [a.example]
    tls: { mode: SIMPLE, serverCertificate: certs/a.pem, privateKey: certs/a.key }
",
    ) + &bound("a", "a.example", &to_version("v1"));
    let before = leaf(&root, "a.example", None)?;
    let world = World::new("gwreplaced", &routes).await?;
    let certs = world.lab.config_dir().join("certs");
    std::fs::create_dir(&certs)?;
    put(&certs.join("a.pem"), &before.0)?;
    put(&certs.join("a.key"), &before.1)?;
    world.apply("secret.yaml", &secret("a", &before, None)).await?;
    for port in [8443, 8444] {
        answered(&ask(&world, &files, port, "a.example", &[]).await?)?;
    }
    // Held open over the change: its second request comes on the connection of the first.
    let resolve = format!("a.example:8443:{}", world.gateway.pod().ip());
    let kept = tokio::spawn({
        let (client, roots) = (world.client.clone(), text(&files.path("roots.pem")));
        async move {
            let hold = "https://a.example:8443/hold";
            client.curl(&["--resolve", &resolve, "--cacert", &roots, hold, "https://a.example:8443/"]).await
        }
    });
    eventually("a request that is held", async || {
        ensure!(world.v1.stats(APP).await?.held == 1);
        Ok(())
    })
    .await?;
    let after = leaf(&next, "a.example", None)?;
    put(&certs.join("a.key"), &after.1)?;
    put(&certs.join("a.pem"), &after.0)?;
    world.apply("secret.yaml", &secret("a", &after, None)).await?;
    let next_roots = text(&files.path("next.pem"));
    for port in [8443, 8444] {
        answered(&ask(&world, &files, port, "a.example", &["--cacert", &next_roots]).await?)?;
        ensure!(answered(&ask(&world, &files, port, "a.example", &[]).await?).is_err(), "{port}");
    }
    ensure!(world.v1.release(APP).await? == 1);
    let kept = kept.await??;
    ensure!(
        kept.transfers.iter().all(|one| one.status == 200) && kept.transfers[1].connects == 0,
        "{kept:?}"
    );

    // Without its Secret a server serves nobody, and that is told; the other goes on.
    world.lab.delete("secret.yaml")?;
    world.settled().await?;
    ensure!(answered(&ask(&world, &files, 8443, "a.example", &["--cacert", &next_roots]).await?).is_err());
    answered(&ask(&world, &files, 8444, "a.example", &["--cacert", &next_roots]).await?)?;
    let status = world.gateway.meshctl(&["status"]).await?;
    ensure!(status.contains("problem") && status.contains("credentialName"), "{status}");
    std::fs::remove_dir_all(&certs)?;
    world.finish().await
}

#[tokio::test]
async fn clients_may_say_nothing_or_prove_an_identity_of_the_mesh() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let (root, friends) = (Authority::root("servers")?, Authority::root("friends")?);
    let servers = "
  - port: { number: 8443, name: mesh, protocol: HTTPS }
    hosts: [a.example]
    tls: { mode: ISTIO_MUTUAL }
  - port: { number: 8444, name: optional, protocol: HTTPS }
    hosts: [a.example]
    tls: { mode: OPTIONAL_MUTUAL, credentialName: optional }
  - port: { number: 8445, name: named, protocol: HTTPS }
    hosts: [a.example]
    tls: { mode: ISTIO_MUTUAL, subjectAltNames: [spiffe://cluster.local/ns/default/sa/friend] }
";
    let only_friend = "
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: own, namespace: default }
spec:
  selector: { matchLabels: { app: edge } }
  rules:
  - from: [{ source: { principals: [cluster.local/ns/default/sa/friend] } }]
  - to: [{ operation: { ports: [\"8444\", \"8445\"] } }]
";
    let manifests = gateway(servers)
        + &bound("a", "a.example", &to_version("v1"))
        + &secret("optional", &leaf(&root, "a.example", None)?, Some(&friends))
        + only_friend;
    let world = World::new("gwmesh", &manifests).await?;
    let mesh = Authority::of_state_dir(&world.gateway.state_dir())?;
    let of = |authority: &Authority, account: &str| {
        leaf(authority, account, Some(&format!("spiffe://cluster.local/ns/default/sa/{account}")))
            .map(|(certificate, key)| certificate + &key)
    };
    let files = Files::new(&[
        ("roots.pem", &root.certificate),
        ("friend.pem", &of(&mesh, "friend")?),
        ("other.pem", &of(&mesh, "other")?),
        ("outsider.pem", &of(&friends, "friend")?),
    ])?;
    for (port, shown, expected) in [
        (8443, Some("friend.pem"), 200),
        (8443, Some("other.pem"), 403),
        (8443, Some("outsider.pem"), 0),
        (8443, None, 0),
        (8444, None, 200),
        (8444, Some("outsider.pem"), 200),
        (8444, Some("friend.pem"), 0),
        (8445, Some("friend.pem"), 200),
        (8445, Some("other.pem"), 0),
        (8445, None, 0),
    ] {
        let shown = shown.map(|name| text(&files.path(name)));
        // What the gateway shows of the mesh has no name of a host.
        let more: Vec<&str> =
            ["--insecure"].into_iter().chain(shown.iter().flat_map(|shown| ["--cert", &**shown])).collect();
        let curled = ask(&world, &files, port, "a.example", &more).await?;
        ensure!(curled.transfers[0].status == expected, "{port} {more:?}: {curled:?}");
    }
    world.finish().await
}

/// A wildcard that anybody may come by, and below it a host whose clients prove themselves.
fn wide_and_narrow(mode_of_wide: &str) -> String {
    gateway(&format!(
        "
  - port: {{ number: 8443, name: wide, protocol: HTTPS }}
    hosts: ['*.example']
    tls: {{ mode: {mode_of_wide}, credentialName: wide }}
  - port: {{ number: 8443, name: narrow, protocol: HTTPS }}
    hosts: [narrow.example]
    tls: {{ mode: MUTUAL, credentialName: narrow }}
"
    )) + &bound("wide", "wide.example", &to_version("v1"))
        + &bound("narrow", "narrow.example", &to_version("v2"))
}

#[tokio::test]
async fn nobody_gets_past_what_a_server_asks_for_by_the_connection_of_another_or_an_older_one() -> Result<()>
{
    if !require_root()? {
        return Ok(());
    }
    let (root, friends) = (Authority::root("servers")?, Authority::root("friends")?);
    let friend = leaf(&friends, "friend.example", None)?;
    let files =
        Files::new(&[("roots.pem", &root.certificate), ("friend.pem", &(friend.0.clone() + &friend.1))])?;
    let world = World::new("gwpast", &wide_and_narrow("SIMPLE")).await?;
    let shown = |name: &str, host: &str| anyhow::Ok(secret(name, &leaf(&root, host, None)?, Some(&friends)));
    world.apply("wide.yaml", &shown("wide", "wide.example")?).await?;
    world.apply("narrow.yaml", &shown("narrow", "narrow.example")?).await?;
    let by_friend = text(&files.path("friend.pem"));
    answered(&ask(&world, &files, 8443, "wide.example", &[]).await?)?;
    answered(&ask(&world, &files, 8443, "narrow.example", &["--cert", &by_friend]).await?)?;
    ensure!(answered(&ask(&world, &files, 8443, "narrow.example", &[]).await?).is_err());
    let curled = ask(&world, &files, 8443, "wide.example", &["-H", "Host: narrow.example"]).await?;
    ensure!(curled.transfers[0].status == 404, "{curled:?}");

    // Held open while its own server begins to ask: the next request on it has proved nothing.
    let resolve = format!("wide.example:8443:{}", world.gateway.pod().ip());
    let kept = tokio::spawn({
        let (client, roots) = (world.client.clone(), text(&files.path("roots.pem")));
        async move {
            let hold = "https://wide.example:8443/hold";
            client
                .curl(&["--resolve", &resolve, "--cacert", &roots, hold, "https://wide.example:8443/"])
                .await
        }
    });
    eventually("a request that is held", async || {
        ensure!(world.v1.stats(APP).await?.held == 1);
        Ok(())
    })
    .await?;
    world.apply("gateway.yaml", &wide_and_narrow("MUTUAL")).await?;
    ensure!(world.v1.release(APP).await? == 1);
    let kept = kept.await??;
    let statuses: Vec<_> = kept.transfers.iter().map(|one| (one.status, one.connects)).collect();
    ensure!(statuses == [(200, 1), (401, 0)], "{kept:?}");
    answered(&ask(&world, &files, 8443, "wide.example", &["--cert", &by_friend]).await?)?;
    world.finish().await
}
