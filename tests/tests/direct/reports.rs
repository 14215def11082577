//! The agent sees none of the bytes, and tells of all of them, each connection once.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result, ensure};
use lab::{apps::LoadKind, eventually, fields, metric, require_root};
use serde_json::Value;

use super::{
    permission::{long_lived, says},
    world::{PLAIN, World, is_direct},
};

const BYTES: u64 = 300_000;
const TIMES: u64 = 5;

impl World {
    /// One of the TCP metrics, as each side reports it.
    async fn counted(&self, name: &str) -> Result<[u64; 2]> {
        let text = self.pair.agent_a.metrics().await?;
        let labels = [
            ("source_workload", "client"),
            ("source_principal", "spiffe://cluster.local/ns/default/sa/client"),
            ("destination_workload", "near"),
            ("destination_principal", "spiffe://cluster.local/ns/default/sa/keeper"),
            ("destination_service", "near.default.svc.cluster.local"),
            ("connection_security_policy", "none"),
        ];
        Ok(["source", "destination"].map(|side| {
            let labels: Vec<_> = labels.iter().copied().chain([("reporter", side)]).collect();
            metric(&text, name, &labels) as u64
        }))
    }

    async fn counts(&self, expected: [(&str, u64); 4]) -> Result<()> {
        eventually("all that was sent is counted", async || {
            for (name, expected) in expected {
                let counted = self.counted(&format!("istio_tcp_{name}_total")).await?;
                ensure!(counted == [expected; 2], "{name}: {counted:?} and not {expected}");
            }
            Ok(())
        })
        .await
    }

    async fn direct_flows(&self, state: &str) -> Result<Vec<Value>> {
        let all = self.pair.agent_a.flows().await?;
        let all = all.as_array().context("a list")?.clone();
        Ok(all.into_iter().filter(|flow| flow["verdict"] == "direct" && flow["state"] == state).collect())
    }
}

#[tokio::test]
async fn flows_metrics_and_log_sum_to_what_apps_sent() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("direct-told").await?;
    let World { pair, near, service, .. } = &world;
    for _ in 0..TIMES {
        ensure!(pair.client.tcp(world.plain(), BYTES, &[]).await?.intact);
    }
    // Received is what came from the client.
    let bytes = TIMES * BYTES;
    let expected = [
        ("connections_opened", TIMES),
        ("connections_closed", TIMES),
        ("received_bytes", bytes),
        ("sent_bytes", bytes),
    ];
    world.counts(expected).await?;

    let flows = world.direct_flows("closed").await?;
    ensure!(flows.len() as u64 == 2 * TIMES, "{flows:#?}");
    for flow in &flows {
        ensure!(flow["tx_bytes"] == BYTES && flow["rx_bytes"] == BYTES, "{flow}");
        ensure!(flow["service"] == service.host() && flow["security"] == "none", "{flow}");
        ensure!(flow["srtt_us"].as_u64() > Some(0) && flow["protocol"] == "tcp", "{flow}");
        let out = flow["direction"] == "outbound";
        let (pod, peer, account) =
            if out { ("client", "near", "keeper") } else { ("near", "client", "client") };
        ensure!(flow["pod"] == pod && flow["peer_pod"] == format!("default/{peer}"), "{flow}");
        ensure!(flow["peer_identity"] == format!("spiffe://cluster.local/ns/default/sa/{account}"), "{flow}");
        ensure!(!out || flow["endpoint"] == near.at(PLAIN).to_string(), "{flow}");
    }
    for reporter in ["source", "destination"] {
        let lines: Vec<_> = pair.agent_a.access_log().iter().map(|line| fields(line)).collect();
        let is = |line: &&BTreeMap<String, String>| {
            line["event"] == "connection" && line["reporter"] == reporter && line["security"] == "none"
        };
        let lines: Vec<_> = lines.iter().filter(is).collect();
        ensure!(lines.len() as u64 == TIMES, "{lines:#?}");
        for line in lines {
            ensure!(
                line["bytes_received"] == BYTES.to_string() && line["dst.service"] == service.host(),
                "{line:?}"
            );
            ensure!(
                line["src.identity"].ends_with("sa/client") && line["dst.identity"].ends_with("sa/keeper")
            );
        }
    }
    let told = metric(&pair.agent_a.metrics().await?, "mesh_flows_closed_total", &[]) as u64;
    ensure!(told >= 2 * TIMES, "{told}");

    // Open ones are seen too, and counted as opened.
    let open = long_lived(&pair.client, world.v4())?;
    says(&open, "one\n").await?;
    eventually("both ends of an open connection", async || {
        let flows = world.direct_flows("established").await?;
        ensure!(flows.len() == 2 && flows.iter().all(|flow| flow["tx_bytes"] == 4), "{flows:#?}");
        ensure!(world.counted("istio_tcp_connections_opened_total").await? == [TIMES + 1; 2]);
        Ok(())
    })
    .await?;
    ensure!(world.counted("istio_tcp_connections_closed_total").await? == [TIMES; 2]);
    world.pair.finish().await
}

const CLIENTS: u32 = 20;

#[tokio::test]
async fn a_successor_keeps_what_is_open_and_reports_its_end() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let mut world = World::new("direct-handed").await?;
    let url = world.service.url(71, "/");
    let load = world.pair.client.load(LoadKind::Tcp, &url, CLIENTS, Duration::from_millis(20)).await?;
    let before = world.pair.agent_a.upgrade().await?;
    load.goes_on(3).await?;
    // New ones go as before, and what is open was not told of to be.
    is_direct(&world.pair.agent_a, &world.pair.client, world.v4()).await?;
    ensure!(world.dial(world.v4()).await?);
    let flows = world.direct_flows("established").await?;
    ensure!(flows.len() == 2 * CLIENTS as usize, "{} flows", flows.len());
    ensure!(flows.iter().all(|flow| flow["service"] == world.service.host()), "{flows:#?}");
    let seen = load.finish().await?;
    ensure!(seen.errors.is_empty() && seen.opened == u64::from(CLIENTS), "{seen:?}");
    let status = before.wait(Duration::from_secs(20)).await?;
    ensure!(status.success(), "{status}");
    eventually("every connection counted once", async || {
        for name in ["opened", "closed"] {
            let counted = world.counted(&format!("istio_tcp_connections_{name}_total")).await?;
            ensure!(counted == [u64::from(CLIENTS) + 1; 2], "{name}: {counted:?}");
        }
        Ok(())
    })
    .await?;
    // And it forbids what the agent before has let be made.
    let open = long_lived(&world.pair.client, world.v4())?;
    says(&open, "one\n").await?;
    let before = world.pair.agent_a.upgrade().await?;
    world.near.annotate("mesh.io/direct", Some("disabled"))?;
    says(&open, "one\nended\n").await?;
    ensure!(before.wait(Duration::from_secs(20)).await?.success());
    world.pair.finish().await
}
