//! Active health checks: an endpoint that says it is sick gets nothing, while nobody notices, until it says it is well; asked
//! by pods, through the mesh, under the policies that hold.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::{Agent, Pair, Pod, Service, apps, apps::LoadKind, eventually, metric, require_root};

const CLUSTER: &str = "outbound|80||web.default.svc.cluster.local";

/// Mutual TLS alone, and nobody but the client.
const POLICIES: &str = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: default, namespace: default }
spec: { mtls: { mode: STRICT } }
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: web, namespace: default }
spec:
  selector: { matchLabels: { app: web } }
  action: ALLOW
  rules: [{ from: [{ source: { principals: [cluster.local/ns/default/sa/client] } }] }]
";

fn policy(check: &str) -> String {
    format!(
        "apiVersion: mesh.io/v1alpha1\nkind: ServicePolicy\nmetadata: {{ name: web, namespace: default }}\n\
         spec: {{ service: web, port: 80, healthCheck: {{ {check} }} }}\n"
    )
}

const BY_HTTP: &str = "http: { path: /healthz }, interval: 200ms, unhealthyThreshold: 2, healthyThreshold: 2";

/// Replicas on the client's node and on the other.
async fn web(pair: &Pair, app: fn(u16) -> apps::App, port: &str) -> Result<(Service, [Pod; 2])> {
    let near = pair.a.pod("near").sa("web").label("app", "web").start().await?;
    let far = pair.b.pod("far").sa("web").label("app", "web").start().await?;
    for pod in [&near, &far] {
        pod.serve(app(8080)).await?;
    }
    let service = pair.lab.service("web").selector("app", "web").port(port, 80, 8080).apply()?;
    pair.settled().await?;
    for pod in [&near, &far] {
        pod.enrolled().await?;
    }
    Ok((service, [near, far]))
}

async fn unhealthy(agent: &Agent) -> Result<f64> {
    Ok(metric(&agent.metrics().await?, "mesh_endpoints_unhealthy", &[("cluster", CLUSTER)]))
}

async fn checks(agent: &Agent, result: &str) -> Result<f64> {
    let labels = [("cluster", CLUSTER), ("result", result)];
    Ok(metric(&agent.metrics().await?, "mesh_health_checks_total", &labels))
}

async fn becomes(agent: &Agent, count: f64) -> Result<()> {
    eventually("as many are unhealthy", async || {
        let now = unhealthy(agent).await?;
        ensure!((now - count).abs() < 0.5, "{now}, not {count}");
        Ok(())
    })
    .await
}

/// Which pods answer; all do with 200.
async fn answering(pair: &Pair, url: &str) -> Result<Vec<String>> {
    let tally = pair.client.get(url).many(40, 1, None).await?;
    ensure!(tally.statuses.get(&200) == Some(&40), "{tally:?}");
    Ok(tally.pods.keys().cloned().collect())
}

#[tokio::test]
async fn the_sick_get_nothing_until_they_are_well_and_nobody_notices() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("health").await?;
    let (service, pods) = web(&pair, apps::http, "http").await?;
    pair.apply("policies.yaml", POLICIES).await?;
    pair.apply("health.yaml", &policy(BY_HTTP)).await?;
    let url = service.url(80, "/");

    // Nobody asks for the service: nobody is asked.
    ensure!(checks(&pair.agent_a, "success").await? == 0.0, "checked without use");
    let load = pair.client.load(LoadKind::Requests, &url, 4, Duration::from_millis(5)).await?;
    eventually("both are asked", async || {
        let made = checks(&pair.agent_a, "success").await?;
        ensure!(made >= 4.0, "{made}");
        Ok(())
    })
    .await?;
    ensure!(answering(&pair, &url).await?.len() == 2);
    for (sick, well) in [(&pods[0], &pods[1]), (&pods[1], &pods[0])] {
        sick.set_sick(8080, true).await?;
        becomes(&pair.agent_a, 1.0).await?;
        let answering = answering(&pair, &url).await?;
        ensure!(answering == [well.name()], "{answering:?}");
        pair.agent_a
            .config("the dump shows who is sick", |dump| {
                let text = dump.to_string();
                ensure!(text.contains("\"healthy\":false"), "{text}");
                Ok(())
            })
            .await?;
        sick.set_sick(8080, false).await?;
        becomes(&pair.agent_a, 0.0).await?;
        let answering = self::answering(&pair, &url).await?;
        ensure!(answering.len() == 2, "{answering:?}");
    }
    load.goes_on(20).await?;
    let seen = load.finish().await?;
    ensure!(seen.errors.is_empty(), "{seen:?}");

    // Asked as the client, by mutual TLS; one checker for each endpoint, and none of the other agent's.
    let asked: Vec<_> =
        pair.agent_b.access_log().into_iter().filter(|line| line.contains("path=/healthz")).collect();
    let by_client = |line: &&String| {
        line.contains("sa/client") && line.contains("security=mutual_tls") && !line.contains("flags=DENY")
    };
    ensure!(!asked.is_empty() && asked.iter().filter(by_client).count() == asked.len(), "{asked:#?}");
    ensure!(checks(&pair.agent_b, "success").await? == 0.0, "no pod of node b uses the service");
    let log = pair.agent_a.log();
    for what in ["endpoint is unhealthy", "endpoint is healthy"] {
        let lines = log.iter().filter(|line| line.contains(what)).count();
        ensure!(lines == 2, "{what} {lines} times in\n{}", log.join("\n"));
    }
    pair.finish().await
}

#[tokio::test]
async fn a_check_that_policy_refuses_says_nothing_of_the_endpoint() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("healthdenied").await?;
    let (service, _pods) = web(&pair, apps::http, "http").await?;
    let deny = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: web, namespace: default }
spec:
  selector: { matchLabels: { app: web } }
  action: DENY
  rules: [{ to: [{ operation: { paths: [/healthz] } }] }]
";
    pair.apply("policies.yaml", deny).await?;
    pair.apply("health.yaml", &policy(BY_HTTP)).await?;
    let url = service.url(80, "/");
    ensure!(answering(&pair, &url).await?.len() == 2);
    eventually("checks of both are refused", async || {
        let made = checks(&pair.agent_a, "inconclusive").await?;
        ensure!(made >= 8.0, "{made}");
        Ok(())
    })
    .await?;
    ensure!(unhealthy(&pair.agent_a).await? == 0.0, "a refusal was taken for a failure");
    ensure!(checks(&pair.agent_a, "failure").await? < 0.5, "a refusal was counted as a failure");
    ensure!(answering(&pair, &url).await?.len() == 2);
    pair.finish().await
}

#[tokio::test]
async fn grpc_and_connections_are_checked_too() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("healthgrpc").await?;
    let (service, pods) = web(&pair, apps::grpc, "grpc").await?;
    pair.apply("policies.yaml", POLICIES).await?;
    let url = service.url(80, "");
    let ask = async || pair.client.grpc(&url, "count/1").await;
    pair.apply("health.yaml", &policy("grpc: { service: count/1 }, interval: 200ms")).await?;
    ensure!(ask().await?.check == "SERVING", "{:?}", ask().await?);
    eventually("they say that they serve", async || {
        ensure!(checks(&pair.agent_a, "success").await? >= 4.0);
        Ok(())
    })
    .await?;
    ensure!(unhealthy(&pair.agent_a).await? < 0.5, "who serves is taken for unhealthy");
    // A service that the servers do not know.
    pair.apply("health.yaml", &policy("grpc: { service: unknown }, interval: 200ms")).await?;
    becomes(&pair.agent_a, 2.0).await?;
    ensure!(ask().await?.check == "Unavailable", "{:?}", ask().await?);
    // A port at which one of them listens.
    pods[1].serve(apps::tcp_echo(7000)).await?;
    pair.apply("health.yaml", &policy("tcp: {}, port: 7000, interval: 200ms")).await?;
    becomes(&pair.agent_a, 1.0).await?;
    for _ in 0..10 {
        let answer = ask().await?;
        ensure!(answer.pod.as_deref() == Some("far"), "{answer:?}");
    }
    pair.finish().await
}
