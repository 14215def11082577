//! Endpoints that come and go while they are in use: no request fails, and who goes finishes what it has.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lab::{
    Pair, Pod,
    apps::{self, LoadKind},
    eventually, require_root,
};
use serde_json::Value;

/// What is said of an endpoint.
#[derive(Debug, Clone, Copy)]
enum Is {
    Ready,
    Terminating,
    Gone,
}

/// The slice of service `web`.
fn slice(endpoints: &[(&Pod, Is)]) -> String {
    numbered_slice(0, endpoints)
}

fn numbered_slice(change: usize, endpoints: &[(&Pod, Is)]) -> String {
    let endpoint = |(pod, is): &(&Pod, Is)| {
        let (ready, terminating) = match is {
            Is::Ready => (true, false),
            Is::Terminating => (false, true),
            Is::Gone => return None,
        };
        Some(format!(
            "{{addresses: ['{}'], conditions: {{ready: {ready}, serving: true, terminating: {terminating}}}, \
             targetRef: {{kind: Pod, name: {}}}}}",
            pod.ip(),
            pod.name()
        ))
    };
    let endpoints: Vec<String> = endpoints.iter().filter_map(endpoint).collect();
    format!(
        "{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4, metadata: {{name: web, \
         namespace: default, labels: {{kubernetes.io/service-name: web}}, annotations: {{change: '{change}'}}}}, ports: [{{name: http, port: 8080}}], \
         endpoints: [{}]}}",
        endpoints.join(", ")
    )
}

async fn replicas(pair: &Pair, count: usize) -> Result<Vec<Pod>> {
    let mut pods = Vec::new();
    for number in 0..count {
        let node = if number % 2 == 0 { &pair.b } else { &pair.a };
        let pod = node.pod(&format!("web-{number}")).label("app", "web").start().await?;
        pod.serve(apps::http(8080)).await?;
        pod.enrolled().await?;
        pods.push(pod);
    }
    Ok(pods)
}

/// The endpoint of `web` with this pod, as `meshctl config endpoints` shows it.
async fn shown(pair: &Pair, pod: &str) -> Result<Option<Value>> {
    let all = pair.agent_a.endpoints("|80||web.").await?;
    Ok(all.into_iter().find(|one| one["workload"] == pod))
}

#[tokio::test]
async fn a_terminating_endpoint_finishes_what_it_has_and_gets_nothing_new() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("terminating").await?;
    let pods = replicas(&pair, 2).await?;
    let (old, new) = (&pods[0], &pods[1]);
    let service = pair.lab.service("web").selector("app", "web").port("http", 80, 8080).apply()?;
    pair.apply("slice.yaml", &slice(&[(old, Is::Ready)])).await?;

    let (client, hold) = (pair.client.clone(), service.url(80, "/hold"));
    let held = tokio::spawn(async move { client.http_get(&hold, &[]).await });
    eventually("a request that is held", async || {
        ensure!(old.stats(8080).await?.held == 1);
        Ok(())
    })
    .await?;
    pair.apply("slice.yaml", &slice(&[(old, Is::Terminating), (new, Is::Ready)])).await?;
    let tally = pair.client.get(service.url(80, "/")).many(40, 4, None).await?;
    ensure!(tally.pods.get("web-1") == Some(&40) && tally.statuses.get(&200) == Some(&40), "{tally:?}");
    let leaving = shown(&pair, "default/web-0").await?.context("it is not shown")?;
    ensure!(
        leaving["health"] == "leaving" && leaving["in_flight"] == 1 && leaving["level"].is_null(),
        "{leaving}"
    );

    old.release(8080).await?;
    let answer = held.await??;
    ensure!(answer.status == 200 && answer.pod() == Some("web-0"), "{answer:?}");
    eventually("it has left", async || {
        let left = shown(&pair, "default/web-0").await?;
        ensure!(left.is_none(), "{left:?}");
        Ok(())
    })
    .await?;
    pair.finish().await
}

/// One in a millisecond, for five seconds.
const CHANGES: usize = 5_000;

/// What this machine may make of it, at worst.
const SLOWEST: Duration = Duration::from_secs(10);

/// What is written without a pause is taken over together: so many changes at a time, on average, at least.
const TOGETHER: u64 = 20;

/// Of four endpoints three are always ready.
#[tokio::test]
async fn a_thousand_changes_a_second_fail_no_request_and_cost_a_bounded_part_of_a_processor() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("churn").await?;
    // An agent without pods: what it does is to follow the changes.
    let follower = pair.lab.node("c").await?.agent().start().await?;
    let pods = replicas(&pair, 4).await?;
    let service = pair.lab.service("web").selector("app", "web").port("http", 80, 8080).apply()?;
    let all: Vec<(&Pod, Is)> = pods.iter().map(|pod| (pod, Is::Ready)).collect();
    pair.apply("slice.yaml", &slice(&all)).await?;
    let url = service.url(80, "/");
    let pause = Duration::from_millis(5);
    let requests = pair.client.load(LoadKind::Requests, &url, 3, pause).await?;
    let kept = pair.client.load(LoadKind::KeptAlive, &url, 2, pause).await?;
    let agents = [&pair.agent_a, &pair.agent_b, &follower];
    let mut before = Vec::new();
    for agent in agents {
        before.push(agent.revision().await?);
    }

    let (begun, used) = (Instant::now(), follower.cpu_time()?);
    let mut millisecond = tokio::time::interval(Duration::from_millis(1));
    for change in 0..CHANGES {
        millisecond.tick().await;
        let mut now = all.clone();
        now[change % 4].1 = if change % 8 < 4 { Is::Terminating } else { Is::Gone };
        // Each is another one: whoever looks once in a while may find what comes round as it was before.
        pair.lab.apply("slice.yaml", &numbered_slice(change, &now))?;
    }
    let (took, used) = (begun.elapsed(), follower.cpu_time()?.saturating_sub(used));
    ensure!(took < SLOWEST, "{CHANGES} changes took {took:?}: this machine is too busy to say anything");
    println!("{CHANGES} changes in {took:?}; an agent that follows them used {used:?}");
    ensure!(used < took / 4, "following {CHANGES} changes took {used:?} of a processor's {took:?}");
    for (agent, before) in agents.into_iter().zip(before) {
        let taken_over = agent.revision().await? - before;
        ensure!(taken_over >= 3, "changes were not followed while they went on: {taken_over}");
        ensure!(taken_over * TOGETHER <= CHANGES as u64, "{CHANGES} changes were taken over in {taken_over}");
    }
    requests.goes_on(3).await?;
    kept.goes_on(3).await?;
    for load in [requests, kept] {
        let loaded = load.finish().await?;
        ensure!(loaded.errors.is_empty() && loaded.answers > 0, "{loaded:?}");
    }
    let status = follower.stop().await?;
    ensure!(status.success(), "the third agent ended with {status}");
    pair.finish().await
}
