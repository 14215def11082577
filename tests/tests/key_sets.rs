//! Key sets by URI: the controller fetches them, from where it may, and tells the agents; nothing is believed before.

use anyhow::{Result, ensure};
use lab::{Issuer, Lab, Pod, Service, apps, apps::Then, eventually, require_root};
use serde_json::json;

/// A rule about tokens, by the keys at this URI.
fn rule(uri: &str) -> String {
    json!({
        "apiVersion": "security.istio.io/v1",
        "kind": "RequestAuthentication",
        "metadata": { "name": "tokens", "namespace": "default" },
        "spec": {
            "selector": { "matchLabels": { "app": "server" } },
            "jwtRules": [{ "issuer": "https://issuer", "audiences": ["app"], "jwksUri": uri }],
        },
    })
    .to_string()
}

async fn status(client: &Pod, service: &Service, token: &str) -> Result<u16> {
    let bearer = format!("Bearer {token}");
    Ok(client.http_get(&service.url(80, "/"), &[("authorization", &bearer)]).await?.status)
}

#[tokio::test]
async fn the_controller_fetches_them_from_where_it_may_and_tells_the_agents() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let lab = Lab::new("keysets").await?;
    let (a, b) = (lab.node("a").await?, lab.node("b").await?);
    // Not in the mesh, and at a private address, as is everything in a lab.
    let keys = b.pod("keys").unenrolled().start().await?;
    let controller = a.controller(&[&format!("--jwks-allow={}/32", keys.ip())]).await?;
    let (issuer, other) = (Issuer::new()?, Issuer::new()?);
    let set = issuer.jwks();
    let answer =
        format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{set}", set.len());
    keys.serve(apps::http1_raw(8000, &[answer.as_bytes()], Then::Close)).await?;

    let client = a.pod("client").start().await?;
    let server = b.pod("server").label("app", "server").start().await?;
    server.serve(apps::http(8080)).await?;
    let service = lab.service("server").selector("app", "server").port("http", 80, 8080).apply()?;
    // Where nothing may be fetched from: the agents' own machine, and a private address that nobody has allowed.
    lab.apply("tokens.yaml", &rule("http://127.0.0.1:8000/keys"))?;
    for node in [&a, &b] {
        controller.token(node).await?;
    }
    let (agent_a, agent_b) = tokio::try_join!(controller.agent(&a).start(), controller.agent(&b).start())?;
    tokio::try_join!(client.enrolled(), server.enrolled())?;
    let good = issuer.token("alice", &json!({}))?;
    for refused in ["127.0.0.1", "10.255.255.1"] {
        let uri = format!("http://{refused}:8000/keys");
        lab.apply("tokens.yaml", &rule(&uri))?;
        eventually("the refusal of an address", async || {
            let log = controller.log();
            let told = |line: &&String| line.contains("a key set was not fetched") && line.contains(&uri);
            ensure!(log.iter().any(|line| told(&line)), "{}", log.join("\n"));
            Ok(())
        })
        .await?;
        ensure!(status(&client, &service, &good).await? == 401, "a token was believed without its keys");
    }
    ensure!(client.http_get(&service.url(80, "/"), &[]).await?.status == 200, "who has no token is nobody");

    lab.apply("tokens.yaml", &rule(&format!("http://{}:8000/keys", keys.ip())))?;
    eventually("a token that is believed", async || {
        let status = status(&client, &service, &good).await?;
        ensure!(status == 200, "{status}");
        Ok(())
    })
    .await?;
    ensure!(status(&client, &service, &other.token("alice", &json!({}))?).await? == 401, "another's token");
    // What was told stays while the controller is away.
    controller.stop().await?;
    ensure!(status(&client, &service, &good).await? == 200, "the keys went with the controller");
    for agent in [agent_a, agent_b] {
        ensure!(agent.stop().await?.success());
    }
    lab.finish().await
}
