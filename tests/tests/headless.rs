//! Headless services: who dials an endpoint gets that endpoint, as requests where the port carries HTTP, with the routes and rules of
//! the service.

use anyhow::{Result, ensure};
use lab::{Pair, Pod, apps, eventually, metric, require_root};

const APP: u16 = 8080;
const ECHO: u16 = 9000;

const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: { name: db, namespace: default }
spec:
  clusterIP: None
  clusterIPs: [None]
  selector: { app: db }
  ports:
    - { name: http, port: 80, targetPort: 8080 }
    - { name: tcp, port: 90, targetPort: 9000 }
";

/// The limit on requests is for each client pod, as everywhere.
const RULES: &str = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: db, namespace: default }
spec:
  host: db
  trafficPolicy:
    loadBalancer: { simple: ROUND_ROBIN }
    connectionPool: { http: { http2MaxRequests: 1 } }
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: db, namespace: default }
spec:
  hosts: [db]
  http:
    - match: [{ headers: { x-who: { exact: jason } } }]
      directResponse: { status: 418 }
    - route: [{ destination: { host: db }, headers: { request: { set: { x-routed: 'yes' } } } }]
";

async fn is_as_dialled(pair: &Pair, pods: &[&Pod]) -> Result<()> {
    for pod in pods {
        for _ in 0..4 {
            let answer = pair.client.http_get(&format!("http://{}/", pod.at(APP)), &[]).await?;
            ensure!(answer.status == 200 && answer.pod() == Some(pod.name()), "{}: {answer:?}", pod.name());
        }
        let bytes = pair.client.tcp(pod.at(ECHO), 50_000, &[]).await?;
        ensure!(bytes.intact && bytes.peer == pod.at(ECHO), "{}: {bytes:?}", pod.name());
    }
    Ok(())
}

#[tokio::test]
async fn whoever_is_dialled_answers_by_the_rules_of_the_service() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("headless").await?;
    let far = pair.b.pod("far").label("app", "db").start().await?;
    let near = pair.a.pod("near").label("app", "db").start().await?;
    let out = pair.b.pod("out").label("app", "db").unenrolled().start().await?;
    for pod in [&far, &near, &out] {
        pod.serve(apps::http(APP)).await?;
        pod.serve(apps::tcp_echo(ECHO)).await?;
    }
    pair.lab.apply("service.yaml", SERVICE)?;
    // The same pods behind an address as well, by a name that comes first.
    pair.lab.service("an-address").selector("app", "db").port("http", 80, APP).apply()?;
    pair.settled().await?;
    for pod in [&far, &near] {
        pod.enrolled().await?;
    }
    let pods = [&far, &near, &out];
    is_as_dialled(&pair, &pods).await?;
    let labels = [("reporter", "source"), ("destination_service_name", "db"), ("response_code", "200")];
    let requests = metric(&pair.agent_a.metrics().await?, "istio_requests_total", &labels);
    ensure!((requests - 12.0).abs() < f64::EPSILON, "{requests} requests");

    pair.apply("rules.yaml", RULES).await?;
    is_as_dialled(&pair, &pods).await?;
    for pod in pods {
        let url = format!("http://{}", pod.at(APP));
        let jason = pair.client.http_get(&format!("{url}/"), &[("x-who", "jason")]).await?;
        ensure!(jason.status == 418, "{}: {jason:?}", pod.name());
        let routed = pair.client.http_get(&format!("{url}/"), &[]).await?;
        ensure!(routed.echo()?.headers.get("x-routed").is_some_and(|value| value == "yes"), "{routed:?}");

        let (client, held) = (pair.client.clone(), format!("{url}/hold"));
        let held = tokio::spawn(async move { client.http_get(&held, &[]).await });
        eventually("a request that is held", async || {
            ensure!(pod.stats(APP).await?.held == 1);
            Ok(())
        })
        .await?;
        let beyond = pair.client.http_get(&format!("{url}/"), &[]).await?;
        ensure!(beyond.status == 503, "{}: {beyond:?}", pod.name());
        pod.release(APP).await?;
        ensure!(held.await??.status == 200, "{}", pod.name());
    }
    pair.finish().await
}

/// Leads from a service with an address to one without.
const LEADS_THERE: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: front, namespace: default }
spec: { hosts: [front], http: [{ route: [{ destination: { host: db } }] }] }
";

#[tokio::test]
async fn whoever_comes_by_another_service_is_balanced() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("headless-behind").await?;
    let far = pair.b.pod("far").label("app", "db").start().await?;
    let near = pair.a.pod("near").label("app", "db").start().await?;
    for pod in [&far, &near] {
        pod.serve(apps::http(APP)).await?;
    }
    pair.lab.apply("service.yaml", SERVICE)?;
    let front = pair.lab.service("front").selector("app", "none").port("http", 80, APP).apply()?;
    pair.apply("leads.yaml", LEADS_THERE).await?;
    // One that has no address yet is not headless: its pods are dialled as any other's.
    let unready =
        SERVICE.replace("name: db", "name: a-new").replace("  clusterIP: None\n  clusterIPs: [None]\n", "");
    let unready = unready.replace("targetPort: 8080", "targetPort: 8081");
    pair.apply("unready.yaml", &unready).await?;
    for pod in [&far, &near] {
        pod.enrolled().await?;
        pod.serve(apps::http(8081)).await?;
    }
    let tally = pair.client.get(front.url(80, "/")).many(40, 4, None).await?;
    ensure!(tally.statuses.get(&200) == Some(&40) && tally.pods.len() == 2, "{tally:?}");
    for pod in [&far, &near] {
        for _ in 0..8 {
            let answer = pair.client.http_get(&format!("http://{}/", pod.at(8081)), &[]).await?;
            ensure!(answer.status == 200 && answer.pod() == Some(pod.name()), "{answer:?}");
        }
    }
    pair.finish().await
}

#[tokio::test]
async fn who_is_no_endpoint_is_a_pod_as_any_other() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("headless-not").await?;
    let far = pair.b.pod("far").label("app", "db").start().await?;
    far.serve(apps::http(APP)).await?;
    pair.lab.apply("service.yaml", SERVICE)?;
    pair.apply("rules.yaml", RULES).await?;
    far.enrolled().await?;
    let at = format!("http://{}/", far.at(APP));
    let status = async || anyhow::Ok(pair.client.http_get(&at, &[("x-who", "jason")]).await?.status);
    ensure!(status().await? == 418);
    // Its name does not lead there any more, and who knows its address still reaches it.
    pair.apply("service.yaml", &SERVICE.replace("app: db", "app: none")).await?;
    ensure!(status().await? == 200);
    pair.apply("service.yaml", SERVICE).await?;
    ensure!(status().await? == 418);
    pair.finish().await
}
