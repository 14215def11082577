//! Configuration changes while traffic flows, and what is wrong with it stays where it is.

use anyhow::{Result, ensure};
use lab::{Pair, Service, apps, eventually, metric, require_root};

const TO_V1: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: web, namespace: default }
spec:
  hosts: [web]
  http: [{ route: [{ destination: { host: web, subset: v1 } }] }]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: web, namespace: default }
spec:
  host: web
  subsets: [{ name: v1, labels: { version: v1 } }, { name: v2, labels: { version: v2 } }]
";

async fn web(pair: &Pair) -> Result<Service> {
    for (node, version) in [(&pair.a, "v1"), (&pair.b, "v2")] {
        let pod = node
            .pod(&format!("web-{version}"))
            .labels([("app", "web"), ("version", version)])
            .start()
            .await?;
        pod.serve(apps::http(8080)).await?;
        pair.settled().await?;
        pod.enrolled().await?;
    }
    let service = pair.lab.service("web").selector("app", "web").port("http", 80, 8080).apply()?;
    pair.settled().await?;
    Ok(service)
}

async fn log_says(pair: &Pair, words: &[&str]) -> Result<()> {
    eventually("the log names what is wrong", async || {
        let log = pair.agent_a.log();
        let found = log.iter().any(|line| words.iter().all(|word| line.contains(word)));
        ensure!(found, "no line with {words:?} in:\n{}", log.join("\n"));
        Ok(())
    })
    .await
}

#[tokio::test]
async fn changes_take_effect_and_broken_files_change_nothing() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("reload").await?;
    let service = web(&pair).await?;
    let url = service.url(80, "/");
    let from = async |pod: &str| -> Result<()> {
        let tally = pair.client.get(&url).many(10, 2, None).await?;
        ensure!(tally.pods.get(pod) == Some(&10), "wanted {pod}: {tally:?}");
        Ok(())
    };
    pair.apply("web.yaml", TO_V1).await?;
    from("web-v1").await?;
    pair.apply("web.yaml", &TO_V1.replacen("subset: v1", "subset: v2", 1)).await?;
    from("web-v2").await?;
    // Each of these is refused, by name, and the last good state stays.
    pair.apply("web.yaml", "kind: [unclosed").await?;
    log_says(&pair, &["web.yaml"]).await?;
    from("web-v2").await?;
    pair.apply("web.yaml", &TO_V1.replace("route:", "rouet:")).await?;
    log_says(&pair, &["web.yaml", "rouet"]).await?;
    from("web-v2").await?;
    let typed = TO_V1.replace("hosts: [web]", "hosts: [web]\n  exportTo: 7");
    pair.apply("web.yaml", &typed).await?;
    log_says(&pair, &["web.yaml", "exportTo"]).await?;
    from("web-v2").await?;
    let metrics = pair.agent_a.metrics().await?;
    ensure!(metric(&metrics, "mesh_config_problems", &[]) >= 1.0, "{metrics}");
    // Another file is not affected by this one's trouble.
    let other = pair.lab.service("other").selector("app", "web").port("http", 80, 8080).apply()?;
    pair.settled().await?;
    ensure!(pair.client.http_get(&other.url(80, "/"), &[]).await?.status == 200);
    // Deleted: back to all endpoints.
    pair.lab.delete("web.yaml")?;
    pair.settled().await?;
    let tally = pair.client.get(&url).many(40, 2, None).await?;
    ensure!(tally.pods.len() == 2 && tally.statuses.get(&200) == Some(&40), "{tally:?}");
    pair.finish().await
}

#[tokio::test]
async fn missing_subsets_and_empty_services_answer_503_for_themselves_alone() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("missing").await?;
    let service = web(&pair).await?;
    let routes = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: web, namespace: default }
spec:
  hosts: [web]
  http:
    - match: [{ uri: { prefix: /lost } }]
      route: [{ destination: { host: web, subset: v9 } }]
    - route: [{ destination: { host: web } }]
";
    pair.apply("web.yaml", routes).await?;
    log_says(&pair, &["v9"]).await?;
    ensure!(pair.client.http_get(&service.url(80, "/lost"), &[]).await?.status == 503);
    ensure!(pair.client.http_get(&service.url(80, "/"), &[]).await?.status == 200);
    let empty = pair
        .lab
        .service("empty")
        .selector("app", "nobody")
        .port("http", 80, 8080)
        .port("tcp", 70, 70)
        .apply()?;
    pair.settled().await?;
    ensure!(pair.client.http_get(&empty.url(80, "/"), &[]).await?.status == 503);
    let cut = pair.client.tcp(empty.at(70), 10, &[]).await;
    ensure!(cut.is_err() || cut.as_ref().is_ok_and(|seen| seen.received == 0), "{cut:?}");
    let unknown_port = pair.client.tcp(service.at(4242), 10, &[]).await;
    ensure!(
        unknown_port.is_err() || unknown_port.as_ref().is_ok_and(|seen| seen.received == 0),
        "{unknown_port:?}"
    );
    let flags = [("reporter", "source"), ("response_flags", "UH"), ("response_code", "503")];
    let metrics = pair.agent_a.metrics().await?;
    ensure!((metric(&metrics, "istio_requests_total", &flags) - 2.0).abs() < f64::EPSILON, "{metrics}");
    pair.finish().await
}

#[tokio::test]
async fn labels_enrol_and_release_and_a_vanished_namespace_disturbs_nobody() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("enrol").await?;
    let service = web(&pair).await?;
    let doomed = pair.a.pod("doomed").start().await?;
    pair.settled().await?;
    doomed.enrolled().await?;
    ensure!(doomed.http_get(&service.url(80, "/"), &[]).await?.status == 200);
    doomed.vanish().await?;
    log_says(&pair, &["doomed"]).await?;
    ensure!(pair.client.http_get(&service.url(80, "/"), &[]).await?.status == 200);

    pair.lab.namespace("default", false)?;
    pair.settled().await?;
    pair.client.not_enrolled().await?;
    // Untouched now: service addresses lead nowhere, pods are reached as if there were no mesh.
    ensure!(pair.client.http_get(&service.url(80, "/"), &[]).await.is_err());
    pair.lab.namespace("default", true)?;
    pair.settled().await?;
    pair.client.enrolled().await?;
    eventually("the servers are back in the mesh", async || {
        let tally = pair.client.get(service.url(80, "/")).many(4, 1, None).await?;
        ensure!(tally.statuses.get(&200) == Some(&4), "{tally:?}");
        Ok(())
    })
    .await?;
    pair.finish().await
}
