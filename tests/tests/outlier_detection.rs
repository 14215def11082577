//! `outlierDetection`: an endpoint that fails again and again gets nothing for a while, and then its share back.

use anyhow::{Result, ensure};
use lab::{Agent, Pair, Pod, Service, apps, apps::Then, eventually, metric, require_root};

const FAILS: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\nx-lab-pod: bad\r\n\r\nlate";

/// Three errors in a row; nothing is tried twice, so that each is seen.
const RULES: &str = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: web, namespace: default }
spec:
  host: web
  trafficPolicy:
    outlierDetection:
      consecutive5xxErrors: 3
      interval: 500ms
      baseEjectionTime: 3s
      maxEjectionPercent: 50
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: web, namespace: default }
spec:
  hosts: [web]
  http: [{ retries: { attempts: 0 }, route: [{ destination: { host: web } }] }]
";

/// Two replicas that serve and one that does not: by an error, or because no app listens there.
async fn web(pair: &Pair, bad_listens: bool) -> Result<(Service, Vec<Pod>)> {
    let mut pods = Vec::new();
    for (node, name) in [(&pair.a, "good-1"), (&pair.b, "good-2"), (&pair.b, "bad")] {
        let pod = node.pod(name).label("app", "web").start().await?;
        match name {
            "bad" if bad_listens => drop(pod.serve(apps::http1_raw(8080, &[FAILS; 8], Then::Close)).await?),
            "bad" => {}
            _ => drop(pod.serve(apps::http(8080)).await?),
        }
        pods.push(pod);
    }
    let service = pair.lab.service("web").selector("app", "web").port("http", 80, 8080).port("tcp", 81, 8080);
    let service = service.apply()?;
    pair.apply("rules.yaml", RULES).await?;
    for pod in &pods {
        pod.enrolled().await?;
    }
    Ok((service, pods))
}

async fn ejections(agent: &Agent, port: u16) -> Result<(f64, f64)> {
    let metrics = agent.metrics().await?;
    let cluster = format!("outbound|{port}||web.default.svc.cluster.local");
    let labels = [("cluster", &*cluster), ("reason", "consecutive_5xx")];
    let total = metric(&metrics, "mesh_endpoint_ejections_total", &labels);
    Ok((total, metric(&metrics, "mesh_endpoints_ejected", &labels[..1])))
}

/// Ejected after exactly so many errors, back after its time, and ejected again.
async fn goes_and_comes_back(pair: &Pair, service: &Service) -> Result<()> {
    let url = service.url(80, "/");
    for times in [1.0, 2.0] {
        let tally = pair.client.get(&url).many(60, 1, None).await?;
        let failed = tally.statuses.get(&503).copied().unwrap_or_default();
        ensure!(failed == 3 && tally.statuses.get(&200) == Some(&57), "time {times}: {tally:?}");
        ensure!(
            ejections(&pair.agent_a, 80).await? == (times, 1.0),
            "{:?}",
            ejections(&pair.agent_a, 80).await?
        );
        eventually("the endpoint is back", async || {
            let now = ejections(&pair.agent_a, 80).await?;
            ensure!(now == (times, 0.0), "{now:?}");
            Ok(())
        })
        .await?;
    }
    let log = pair.agent_a.log();
    for what in ["endpoint ejected", "endpoint is back"] {
        let lines =
            log.iter().filter(|line| line.contains(what) && line.contains("outbound|80||web")).count();
        ensure!(lines == 2, "{what} {lines} times in\n{}", log.join("\n"));
    }
    Ok(())
}

#[tokio::test]
async fn an_endpoint_that_answers_errors_is_ejected_and_comes_back() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("outlier").await?;
    let (service, _pods) = web(&pair, true).await?;
    goes_and_comes_back(&pair, &service).await?;
    // Another agent has seen nothing of it.
    ensure!(ejections(&pair.agent_b, 80).await? == (0.0, 0.0), "two agents share what they know");
    pair.finish().await
}

#[tokio::test]
async fn an_endpoint_that_cannot_be_reached_is_ejected_for_requests_and_for_bytes() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("outlierdown").await?;
    let (service, _pods) = web(&pair, false).await?;
    goes_and_comes_back(&pair, &service).await?;
    // Opaque bytes: a connection that does not come about is the only error there is. It ends without an answer.
    let url = service.url(81, "/");
    let mut failed = 0;
    for _ in 0..60 {
        failed += u32::from(pair.client.http_get(&url, &[]).await.is_err());
    }
    ensure!(failed == 3, "{failed} of 60 connections failed");
    ensure!(ejections(&pair.agent_a, 81).await? == (1.0, 1.0), "{:?}", ejections(&pair.agent_a, 81).await?);
    pair.finish().await
}
