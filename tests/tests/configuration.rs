//! Configuration changes while traffic flows, and what is wrong with it stays where it is.

use anyhow::{Result, ensure};
use lab::{Pair, Service, apps, eventually, metric, require_root};
use serde_json::json;

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

/// What is not the mesh's business is no problem: it is passed over, with one line for each kind.
async fn others_are_passed_over(pair: &Pair) -> Result<()> {
    let problems =
        async || Ok::<_, anyhow::Error>(metric(&pair.agent_a.metrics().await?, "mesh_config_problems", &[]));
    let before = problems().await?;
    let deployment = "{apiVersion: apps/v1, kind: Deployment, metadata: {name: web}}";
    let job = "{apiVersion: batch/v1, kind: Job, metadata: {name: once}}";
    pair.lab.apply("others.yaml", &[deployment, job].join("\n---\n"))?;
    pair.apply("more.yaml", &deployment.replace("web", "another")).await?;
    for kind in ["Deployment (apps/v1)", "Job (batch/v1)"] {
        let log = pair.agent_a.log();
        let lines: Vec<_> = log.iter().filter(|line| line.contains(kind)).collect();
        ensure!(lines.len() == 1 && lines[0].contains("INFO"), "{kind}: {lines:?}");
    }
    let after = problems().await?;
    ensure!((after - before).abs() < f64::EPSILON, "{before} problems before, {after} after");
    Ok(())
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
    log_says(&pair, &["web.yaml", "not valid YAML"]).await?;
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
    others_are_passed_over(&pair).await?;
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
    log_says(&pair, &["web.yaml", "v9", "subset"]).await?;
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

/// The pod `doomed` of node a cannot be enrolled: that is logged once, shown and counted.
async fn doomed_is_told_once(pair: &Pair) -> Result<()> {
    let gone = "its network namespace /run/netns/";
    log_says(pair, &["cannot be enrolled", "default/doomed", gone, "is not there"]).await?;
    eventually("the failing pod is shown and counted", async || {
        let status = pair.agent_a.status().await?;
        let failing = &status["failing"];
        let reason = failing[0]["reason"].as_str().unwrap_or_default();
        ensure!(failing[0]["pod"] == "default/doomed" && reason.contains(gone), "{status}");
        ensure!(
            status["enrolled"] == json!(["default/client", "default/web-v1"]),
            "of node a alone: {status}"
        );
        let metrics = pair.agent_a.metrics().await?;
        let gauges =
            ["mesh_enrolment_failures", "mesh_enrolled_pods"].map(|name| metric(&metrics, name, &[]) as u64);
        ensure!(gauges == [1, 2], "{gauges:?}");
        Ok(())
    })
    .await?;
    // Each of these makes the agent try again; the reason is told once.
    for _ in 0..3 {
        pair.settled().await?;
    }
    let told = pair.agent_a.log().iter().filter(|line| line.contains(gone)).count();
    ensure!(told == 1, "told {told} times:\n{}", pair.agent_a.log().join("\n"));
    let table = pair.agent_a.meshctl(&["status"]).await?;
    ensure!(table.contains("not enrolled     default/doomed: its network namespace"), "{table}");
    Ok(())
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
    ensure!(pair.agent_a.status().await?["failing"] == json!([]));
    doomed.vanish().await?;
    doomed_is_told_once(&pair).await?;
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

/// A direct answer with this text, so that a request tells which configuration it was routed by.
fn answers(text: usize) -> String {
    format!(
        "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{ name: told, namespace: default }}
spec:
  hosts: [told]
  http: [{{ directResponse: {{ status: 200, body: {{ string: answer-{text} }} }} }}]
"
    )
}

/// Pods that are being enrolled take the agent a while each; a change of routes waits for none of them.
#[tokio::test]
async fn what_is_shown_is_in_force_while_pods_are_being_enrolled() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("inforce").await?;
    let service = pair.lab.service("told").selector("app", "told").port("http", 80, 8080).apply()?;
    let mut pods = Vec::new();
    for number in 0..8 {
        pods.push(pair.a.pod(&format!("late-{number}")).start().await?);
        pair.apply("told.yaml", &answers(number)).await?;
        let answer = pair.client.http_get(&service.url(80, "/"), &[]).await?;
        ensure!(answer.body == format!("answer-{number}"), "shown was {number}, in force {}", answer.body);
    }
    for pod in &pods {
        pod.enrolled().await?;
    }
    pair.finish().await
}
