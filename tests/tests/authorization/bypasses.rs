//! Ways around a rule about requests that are none: other spellings of a path, bytes that come slowly, tunnels, and
//! what only an agent may say.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use hyper::{Method, Request};
use lab::{
    Pod,
    apps::RawEnd,
    peer::{self, Certificate, Validity},
    require_root,
};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};

use super::{DENIED, Side, World};

/// Everything but what lies below `/admin`, of the HTTP app alone.
const RULES: &str = "  action: DENY\n  rules:\n  - to: [{ operation: { paths: ['/admin*'], ports: ['8080'] } }]\n  \
                     - to: [{ operation: { ports: ['7000'] } }]";

/// Paths of which some server or other would make `/admin`.
const SPELLINGS: [&str; 14] = [
    "/admin",
    "/admin/x",
    "/admin?x=1",
    "/%61dmin",
    "/%61%64%6d%69%6e",
    "/x/../admin",
    "/x/%2e%2e/admin",
    "/x/.%2E/admin",
    "/./admin",
    "/x\\..\\admin",
    "/x/..;/admin",
    "/x/%2e%2e;a=b/admin",
    "/admin%00",
    "/../admin",
];

/// Some more where slashes are merged and their encodings decoded.
const SLASHES: [&str; 6] =
    ["//admin", "/x/..%2fadmin", "/x/..%5cadmin", "/%2fadmin", "/%5Cadmin", "/x%2F..%2F/admin"];

/// What the HTTP app of a side was ever asked for.
async fn reached(side: &Side) -> Result<Vec<String>> {
    Ok(side.pod.stats(8080).await?.paths.into_keys().collect())
}

async fn spellings_are_refused(world: &World, spellings: &[&str]) -> Result<()> {
    for side in world.sides() {
        let far = [(&world.pair.client, side.http.at(80)), (&world.pair.client, side.pod.at(8080))];
        for (from, to) in far.into_iter().chain([(&world.stranger, side.pod.at(8080))]) {
            for path in spellings {
                let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
                let raw = from.raw(to).send(request).run().await?;
                ensure!([&[403][..], &[400]].contains(&&*raw.statuses()), "{path} at {to}: {}", raw.text());
            }
            let open =
                from.raw(to).send("GET /open HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").run().await?;
            ensure!(open.statuses() == [200], "{}", open.text());
        }
        let reached = reached(side).await?;
        ensure!(reached.iter().all(|path| path == "/open"), "{reached:?}");
    }
    Ok(())
}

#[tokio::test]
async fn other_spellings_of_a_path_are_the_same_path() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("authz-spellings").await?;
    world.apply("deny", RULES).await?;
    spellings_are_refused(&world, &SPELLINGS).await?;
    // As the mesh-wide settings say.
    let mesh = "apiVersion: v1\nkind: ConfigMap\nmetadata: { name: mesh, namespace: istio-system }\n\
                data: { mesh: 'pathNormalization: { normalization: DECODE_AND_MERGE_SLASHES }' }\n";
    world.pair.apply("mesh.yaml", mesh).await?;
    spellings_are_refused(&world, &SPELLINGS).await?;
    spellings_are_refused(&world, &SLASHES).await?;
    world.pair.finish().await
}

/// A certificate of the client, in the hands of somebody with no agent: a ztunnel of another mesh may be one.
async fn hbone(world: &World, to: &Pod) -> Result<h2::client::SendRequest<Bytes>> {
    const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";
    let certificate = Certificate::of_lab(world.pair.agent_b.state_dir(), CLIENT, Validity::Now)?;
    let stream = peer::hbone_handshake(peer::dial(&world.stranger, to.at(15008))?, &certificate).await?;
    let (send, connection) = h2::client::handshake(stream).await?;
    tokio::spawn(async move {
        // Ends with the test.
        let _ = connection.await;
    });
    Ok(send.ready().await?)
}

/// Sends bytes through a tunnel to a port of the pod, and returns the status of the CONNECT and what came back.
async fn through(world: &World, to: &Pod, port: u16, bytes: &str) -> Result<(u16, String)> {
    let mut send = hbone(world, to).await?;
    let authority = SocketAddr::new(to.ip(), port).to_string();
    let request = Request::builder().method(Method::CONNECT).uri(authority).body(())?;
    let (response, mut stream) = send.send_request(request, false)?;
    let response = response.await?;
    let status = response.status().as_u16();
    if status != 200 {
        return Ok((status, String::new()));
    }
    stream.send_data(Bytes::copy_from_slice(bytes.as_bytes()), false)?;
    let (mut body, mut answer) = (response.into_body(), Vec::new());
    while let Some(Ok(data)) = body.data().await {
        body.flow_control().release_capacity(data.len())?;
        answer.extend_from_slice(&data);
    }
    Ok((status, String::from_utf8_lossy(&answer).into_owned()))
}

#[tokio::test]
async fn tunnels_of_others_meet_the_same_rules() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("authz-hbone").await?;
    world.apply("deny", RULES).await?;
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
    for side in world.sides() {
        let (status, answer) = through(&world, &side.pod, 8080, &get("/open")).await?;
        ensure!(status == 200 && answer.starts_with("HTTP/1.1 200"), "{status} {answer}");
        for path in ["/admin", "/x/../admin", "/%61dmin"] {
            let (status, answer) = through(&world, &side.pod, 8080, &get(path)).await?;
            ensure!(
                status == 200 && answer.starts_with("HTTP/1.1 403") && answer.contains(DENIED),
                "{path}: {answer}"
            );
        }
        // Another port, and bytes that are no requests.
        ensure!(through(&world, &side.pod, 7000, "hello").await?.0 == 401);
        let (_, answer) = through(&world, &side.pod, 8080, "\0garbage\r\n\r\n").await?;
        ensure!(answer.is_empty(), "{answer:?}");
        ensure!(reached(side).await? == ["/open"]);
    }
    world.pair.finish().await
}

/// Reads to the end, whatever that is.
async fn rest(mut stream: impl AsyncRead + Unpin) -> Vec<u8> {
    let mut answer = Vec::new();
    // Any end is as good as another.
    let _ = stream.read_to_end(&mut answer).await;
    answer
}

#[tokio::test]
async fn bytes_that_come_slowly_are_refused_until_they_are_a_request() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::with("authz-slow", &["--detection-timeout=1"]).await?;
    world.apply("deny", RULES).await?;
    for side in world.sides() {
        let to = side.pod.at(8080);
        for from in [&world.pair.client, &world.stranger] {
            // Recognised too late: by then it has been refused, and no byte has reached the app.
            for beginning in ["G", "PRI * HT", "\u{16}\u{3}\u{1}"] {
                let raw = from.raw(to).send(beginning).limit(Duration::from_secs(30)).run().await?;
                ensure!(raw.received.0.is_empty() && raw.end != RawEnd::Open, "{beginning:?}: {raw:?}");
            }
            // What is a request is judged as one, however slowly the rest of it comes.
            let slow = "GET /admin HTTP/1.1\r\nHost: a\r\n\r\n";
            let raw = from
                .raw(to)
                .drip(Duration::from_millis(5), slow)
                .expect("HTTP/1.1 403")
                .leave()
                .run()
                .await?;
            ensure!(raw.statuses() == [403], "{}", raw.text());
        }
        // Nobody is let in by saying nothing either.
        let silent = peer::dial(&world.stranger, to)?;
        ensure!(rest(silent).await.is_empty());
        let reached = reached(side).await?;
        ensure!(reached.is_empty(), "{reached:?}");
    }
    world.pair.finish().await
}

#[tokio::test]
async fn what_apps_say_opens_no_tunnel() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("authz-connect").await?;
    world.apply("deny", RULES).await?;
    let client = &world.pair.client;
    for side in world.sides() {
        // A CONNECT of an app's is a request to the app it was sent to; the authority is that app's to read.
        let echo = side.pod.at(7000).to_string();
        for h2c in [false, true] {
            let told = client.connect(side.http.at(80), &echo, 1000, h2c).await?;
            ensure!(told.greeting.0 == format!("CONNECT {echo}\r\n").as_bytes(), "{told:?}");
        }
        // What agents tell one another counts for nothing from anybody else.
        for (from, url) in [
            (client, side.http.url(80, "/open")),
            (client, format!("http://{}/open", side.pod.at(8080))),
            (&world.stranger, format!("http://{}/open", side.pod.at(8080))),
        ] {
            let forged =
                [("mesh-port", "7000"), ("mesh-app-protocol", "h2"), ("x-forwarded-for", "10.0.0.1")];
            let answer = from.http_get(&url, &forged).await?;
            ensure!(answer.status == 200 && !answer.body.contains("mesh-port"), "{answer:?}");
        }
        // Nor does it within bytes.
        let mut plain = peer::dial(&world.stranger, side.pod.at(8080))?;
        plain.write_all(format!("CONNECT {echo} HTTP/1.1\r\nHost: {echo}\r\n\r\n").as_bytes()).await?;
        let mut answer = vec![0; 12];
        plain.read_exact(&mut answer).await.context("an answer to CONNECT")?;
        ensure!(answer == b"HTTP/1.1 200", "{}", answer.escape_ascii());
    }
    world.pair.finish().await
}
