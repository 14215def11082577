//! Policies at both ends: the apps' see the gateway, proved by mutual TLS; the gateway's own see the client.

use anyhow::{Result, ensure};
use lab::{Issuer, apps, eventually, require_root};
use serde_json::json;

use super::world::{IDENTITY, World, bound, gateway, to_version};

const SERVERS: &str = "
  - port: { number: 8080, name: http, protocol: HTTP }
    hosts: [\"*\"]
  - port: { number: 9000, name: tcp, protocol: TCP }
    hosts: [\"*\"]
";

const ECHO: u16 = 9000;

/// The whole mesh takes mutual TLS alone.
const STRICT: &str = "
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: default, namespace: istio-system }
spec: { mtls: { mode: STRICT } }
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: default, namespace: default }
spec: { mtls: { mode: STRICT } }
";

fn policy(name: &str, app: &str, action: &str, rule: &str) -> String {
    format!(
        "
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{ name: {name}, namespace: default }}
spec:
  selector: {{ matchLabels: {{ app: {app} }} }}
  action: {action}
  rules: [{rule}]
"
    )
}

#[tokio::test]
async fn the_app_sees_the_gateway_and_the_gateway_its_client() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let tcp = "  tcp:\n  - match: [{ port: 9000 }]\n    route: [{ destination: { host: echo } }]\n";
    let manifests = gateway(SERVERS) + &bound("shop", "*", &(to_version("v1") + tcp)) + STRICT;
    let world = World::new("gwpolicies", &manifests).await?;
    world.v1.serve(apps::tcp_echo(ECHO)).await?;
    world.lab.service("echo").selector("version", "v1").port("tcp", ECHO, ECHO).apply()?;
    world.settled().await?;
    let echoes = async || {
        let echoed = world.client.tcp(world.gateway.pod().at(9000), 10, &[]).await;
        // Refused it may be before or after the client has said all it has.
        echoed.is_ok_and(|echoed| echoed.received == 10 && echoed.intact)
    };
    let status = async |path: &str| {
        let answer = world.client.get(world.url(8080, path)).send().await?;
        anyhow::Ok((answer.status, answer.body))
    };
    // PeerAuthentication is no matter of the gateway's own ports, and what it sends is mutual TLS.
    ensure!(status("/").await?.0 == 200 && echoes().await);
    let direct = world.client.get(format!("http://{}/", world.v1.at(super::world::APP))).send().await;
    ensure!(direct.is_err(), "{direct:?}");

    let only_edge = format!("{{ from: [{{ source: {{ principals: [\"{IDENTITY}\"] }} }}] }}");
    world.apply("app.yaml", &policy("app", "shop", "ALLOW", &only_edge)).await?;
    ensure!(status("/").await?.0 == 200);
    let nobody = "{ from: [{ source: { principals: [\"cluster.local/ns/default/sa/other\"] } }] }";
    world.apply("app.yaml", &policy("app", "shop", "ALLOW", nobody)).await?;
    ensure!(status("/").await? == (403, "RBAC: access denied".to_owned()));
    world.lab.delete("app.yaml")?;

    // The gateway's own: of requests, and of bytes.
    let (client, paths) = (world.client.ip(), "{ to: [{ operation: { paths: [\"/admin*\"] } }] }");
    world.apply("own.yaml", &policy("own", "edge", "DENY", paths)).await?;
    ensure!(status("/admin/x").await? == (403, "RBAC: access denied".to_owned()));
    ensure!(status("/").await?.0 == 200);
    ensure!(!world.v1.stats(super::world::APP).await?.paths.contains_key("/admin/x"));
    // What asks for a path refuses bytes of which nobody knows any.
    ensure!(!echoes().await);
    for (blocks, expected) in [(client.to_string(), 403), ("192.0.2.0/24".to_owned(), 200)] {
        let from = format!("{{ from: [{{ source: {{ remoteIpBlocks: [\"{blocks}\"] }} }}] }}");
        world.apply("own.yaml", &policy("own", "edge", "DENY", &from)).await?;
        ensure!(status("/").await?.0 == expected && echoes().await == (expected == 200), "{blocks}");
    }
    world.finish().await
}

#[tokio::test]
async fn tokens_are_judged_at_the_gateway_and_a_change_cuts_what_is_open() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let issuer = Issuer::new()?;
    let tokens = json!({
        "apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication",
        "metadata": { "name": "edge", "namespace": "default" },
        "spec": { "selector": { "matchLabels": { "app": "edge" } },
                  "jwtRules": [{ "issuer": "https://issuer", "jwks": issuer.jwks() }] }
    });
    let needs = policy("own", "edge", "ALLOW", "{ from: [{ source: { requestPrincipals: [\"*\"] } }] }");
    let manifests =
        gateway(SERVERS) + &bound("shop", "*", &to_version("v1")) + &format!("\n---\n{tokens}\n") + &needs;
    let world = World::new("gwtokens", &manifests).await?;
    let ask = async |token: Option<&str>, path: &str| {
        let request = world.client.get(world.url(8080, path));
        let request = match token {
            Some(token) => request.header("authorization", &format!("Bearer {token}")),
            None => request,
        };
        anyhow::Ok(request.send().await?.status)
    };
    let good = issuer.token("anna", &json!({}))?;
    let bad = Issuer::new()?.token("anna", &json!({}))?;
    ensure!(ask(Some(&good), "/").await? == 200);
    ensure!(ask(None, "/").await? == 403);
    ensure!(ask(Some(&bad), "/").await? == 401);

    // What is under way is cut once it would not be let in any more.
    let open = tokio::spawn({
        let (client, url) = (world.client.clone(), world.url(8080, "/hold"));
        async move { client.get(url).header("authorization", &format!("Bearer {good}")).send().await }
    });
    eventually("a request that is held", async || {
        ensure!(world.v1.stats(super::world::APP).await?.held == 1);
        Ok(())
    })
    .await?;
    world.lab.apply("none.yaml", &policy("none", "edge", "DENY", "{}"))?;
    let cut = open.await??;
    ensure!(cut.status == 403, "{cut:?}");
    world.v1.release(super::world::APP).await?;
    world.finish().await
}
