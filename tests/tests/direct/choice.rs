//! The kernel chooses as the agent would: each endpoint has its share, on this node or another, and a change of endpoints
//! is felt at once.

use std::{process::Command, time::Instant};

use anyhow::{Context as _, Result, ensure};
use lab::{Pair, Pod, Service, apps, eventually, require_root};
use mesh_common::maps;

use super::world::{entries, is_direct};

/// Dials so often, and says who greeted; `keep` leaves all connections open until the end.
const GREETED: &str = "for i in $(seq \"$1\"); do exec {fd}<>\"/dev/tcp/$2/$3\"; read -r _ name _ <&\"$fd\"; \
                       echo \"$name\"; [ \"$4\" = keep ] || exec {fd}>&-; done";

async fn greeted(client: &Pod, service: &Service, times: usize, keep: bool) -> Result<[usize; 2]> {
    let mut command = Command::new("bash");
    let at = service.at(25);
    let keep = if keep { "keep" } else { "" };
    command.args(["-c", GREETED, "greeted"]);
    command.args([&times.to_string(), &at.ip().to_string(), &at.port().to_string(), keep]);
    let output = client.run(command).await?;
    let count = |name: &str| output.stdout.lines().filter(|line| *line == name).count();
    let counts = [count("near"), count("far")];
    ensure!(counts[0] + counts[1] == times, "{counts:?} {output:?}");
    Ok(counts)
}

async fn balance(pair: &Pair, service: &Service, simple: &str) -> Result<()> {
    let before = set(pair)?;
    pair.apply(
        "balance.yaml",
        &format!(
            "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: mail, namespace: default}}\n\
             spec: {{host: {}, trafficPolicy: {{loadBalancer: {{simple: {simple}}}}}}}\n",
            service.host()
        ),
    )
    .await?;
    eventually("the kernel balances anew", async || {
        ensure!(set(pair)? != before);
        Ok(())
    })
    .await
}

/// What the kernel chooses from.
fn set(pair: &Pair) -> Result<Vec<String>> {
    let all = entries(&pair.agent_a, maps::DIRECT)?;
    let mut sets: Vec<String> = all.iter().map(|entry| entry.value["set"].to_string()).collect();
    sets.sort();
    Ok(sets)
}

#[tokio::test]
async fn a_local_and_a_remote_endpoint_have_their_shares() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("direct-shares").await?;
    let (near, far) = (pair.a.pod("near").label("app", "mail"), pair.b.pod("far").label("app", "mail"));
    let (near, far) = (near.start().await?, far.start().await?);
    for pod in [&near, &far] {
        pod.serve(apps::server_first(7025)).await?;
    }
    let service = pair.lab.service("mail").selector("app", "mail").port("tcp-mail", 25, 7025).apply()?;
    pair.settled().await?;
    near.enrolled().await?;
    far.enrolled().await?;
    is_direct(&pair.agent_a, &pair.client, service.at(25)).await?;

    // Open connections count, of both: with two draws the busier one is left alone.
    let held = greeted(&pair.client, &service, 100, true).await?;
    ensure!(held.iter().all(|count| *count >= 35), "least requests: {held:?}");
    balance(&pair, &service, "ROUND_ROBIN").await?;
    let turns = greeted(&pair.client, &service, 100, false).await?;
    ensure!(turns == [50, 50], "round robin: {turns:?}");
    balance(&pair, &service, "RANDOM").await?;
    // Ten is the standard deviation.
    let drawn = greeted(&pair.client, &service, 400, false).await?;
    ensure!(drawn.iter().all(|count| (140..=260).contains(count)), "random: {drawn:?}");
    println!("least requests {held:?}, round robin {turns:?}, random {drawn:?}");

    eventually("each connection is a flow, direct or not by its endpoint", async || {
        let flows = pair.agent_a.flows().await?;
        let out = flows.as_array().context("a list")?.iter().filter(|flow| flow["direction"] == "outbound");
        let of = |verdict: &str, pod: &Pod| {
            let is = |flow: &&serde_json::Value| {
                flow["verdict"] == verdict && flow["endpoint"] == pod.at(7025).to_string()
            };
            out.clone().filter(is).count()
        };
        let seen = [of("direct", &near), of("captured", &far)];
        let expected = [0, 1].map(|n| held[n] + turns[n] + drawn[n]);
        ensure!(seen == expected, "{seen:?} instead of {expected:?}");
        Ok(())
    })
    .await?;
    eventually("no connection counts as open any more", async || {
        let open = entries(&pair.agent_a, maps::ENDPOINTS)?;
        ensure!(open.iter().all(|entry| entry.value["open"] == 0), "{open:?}");
        let admitted = entries(&pair.agent_a, maps::ADMITTED)?;
        ensure!(admitted.iter().all(|pod| pod.value["entries"].as_array().is_some_and(Vec::is_empty)));
        Ok(())
    })
    .await?;
    pair.finish().await
}

#[tokio::test]
async fn an_endpoint_that_is_gone_is_not_chosen() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("direct-gone").await?;
    let mut pods = Vec::new();
    for name in ["near", "far"] {
        let pod = pair.a.pod(name).label("app", "mail").start().await?;
        pod.serve(apps::server_first(7025)).await?;
        pods.push(pod);
    }
    let service = pair.lab.service("mail").selector("app", "mail").port("tcp-mail", 25, 7025).apply()?;
    pair.settled().await?;
    let endpoints = async |count: usize| {
        eventually("the kernel's choice", async || {
            let slots = entries(&pair.agent_a, maps::DIRECT_SLOTS)?;
            ensure!(slots.iter().filter(|slot| slot.value["direct"] == 1).count() == count, "{slots:?}");
            Ok(())
        })
        .await
    };
    endpoints(2).await?;
    let both = greeted(&pair.client, &service, 100, true).await?;
    ensure!(both.iter().all(|count| *count >= 35), "{both:?}");

    let seen = pair.agent_a.revision().await?;
    let gone = pods.pop().context("two pods")?;
    gone.remove().await?;
    pair.agent_a.revision_after(seen).await?;
    let known = Instant::now();
    endpoints(1).await?;
    println!("the kernel's choice followed the configuration by {:?} at most", known.elapsed());
    ensure!(greeted(&pair.client, &service, 50, false).await? == [50, 0]);
    // What the pod had is gone with it.
    eventually("nothing of the pod", async || {
        let endpoints = entries(&pair.agent_a, maps::ENDPOINTS)?;
        ensure!(endpoints.len() == 1, "{endpoints:?}");
        ensure!(entries(&pair.agent_a, maps::ADMITTED)?.len() == 2);
        Ok(())
    })
    .await?;
    pair.finish().await
}
