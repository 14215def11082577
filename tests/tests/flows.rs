//! `meshctl flows` shows every connection of an app once, with the bytes that were really sent, joined with what the
//! agent knows of it.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lab::{Agent, Pair, apps, eventually, require_root};
use serde_json::Value;

/// Sent, and echoed.
const BYTES: u64 = 1_234_567;

/// The flows of a pod in one direction.
async fn flows(agent: &Agent, pod: &str, direction: &str) -> Result<Vec<Value>> {
    let all = agent.flows().await?;
    let all = all.as_array().context("meshctl flows gives a list")?.clone();
    Ok(all.into_iter().filter(|flow| flow["pod"] == pod && flow["direction"] == direction).collect())
}

/// Those of sockets; neighbour discovery and the like are flows of their own.
async fn tcp_flows(agent: &Agent, pod: &str, direction: &str) -> Result<Vec<Value>> {
    let all = flows(agent, pod, direction).await?;
    Ok(all.into_iter().filter(|flow| flow["transport"] == "tcp").collect())
}

#[tokio::test]
async fn counts_equal_what_was_sent_and_rows_are_joined() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("flows").await?;
    let server = pair.b.pod("server").sa("keeper").label("app", "server").start().await?;
    server.serve(apps::tcp_echo(7000)).await?;
    let service = pair.lab.service("server").selector("app", "server").port("tcp", 70, 7000).apply()?;
    pair.settled().await?;
    server.enrolled().await?;
    ensure!(pair.client.tcp(service.at(70), BYTES, &[]).await?.intact);

    for (agent, pod, direction) in
        [(&pair.agent_a, "client", "outbound"), (&pair.agent_b, "server", "inbound")]
    {
        eventually("the flow has ended and its counts are exact", async || {
            let rows = tcp_flows(agent, pod, direction).await?;
            ensure!(rows.len() == 1, "{} rows: {rows:?}", rows.len());
            let row = &rows[0];
            ensure!(row["tx_bytes"] == BYTES && row["rx_bytes"] == BYTES, "{row}");
            ensure!(row["verdict"] == "captured", "{row}");
            Ok(())
        })
        .await?;
    }
    let row = tcp_flows(&pair.agent_a, "client", "outbound").await?.remove(0);
    ensure!(row["remote"] == service.at(70).to_string(), "{row}");
    ensure!(row["service"] == service.host() && row["endpoint"] == server.at(7000).to_string(), "{row}");
    ensure!(row["peer_pod"] == "default/server", "{row}");
    ensure!(row["peer_identity"] == "spiffe://cluster.local/ns/default/sa/keeper", "{row}");
    ensure!(row["srtt_us"].as_u64() > Some(0) && row["tx_packets"].as_u64() > Some(0), "{row}");
    let row = tcp_flows(&pair.agent_b, "server", "inbound").await?.remove(0);
    ensure!(row["peer_identity"] == "spiffe://cluster.local/ns/default/sa/client", "{row}");

    // The maps themselves, read without the agent's help.
    let maps = pair.agent_a.meshctl(&["maps", "list"]).await?;
    for map in ["PODS", "FLOWS", "ORIGINAL_DST"] {
        ensure!(maps.contains(map), "{maps}");
    }
    let pods = pair.agent_a.meshctl(&["maps", "dump", "PODS"]).await?;
    ensure!(pods.contains(&pair.client.ip().to_string()), "{pods}");
    pair.finish().await
}

#[tokio::test]
async fn udp_is_untouched_and_counted() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("udp").await?;
    let server = pair.b.pod("server").start().await?;
    server.serve(apps::udp_echo(5353)).await?;
    pair.settled().await?;
    server.enrolled().await?;
    let seen = pair.client.udp(server.at(5353), 10, 100).await?;
    ensure!(seen.received == 10, "{seen:?}");
    eventually("the datagrams are counted", async || {
        let rows = flows(&pair.agent_a, "client", "outbound").await?;
        let row = rows.iter().find(|row| row["protocol"] == "udp").context("no UDP flow")?;
        ensure!(row["tx_packets"] == 10 && row["rx_packets"] == 10, "{row}");
        Ok(())
    })
    .await?;
    pair.finish().await
}

const REQUEST: &str = "GET / HTTP/1.1\r\nHost: server\r\n\r\n";
const TIMES: usize = 5;

#[tokio::test]
async fn open_connections_are_told_of_to_the_last_byte() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("live").await?;
    let server = pair.b.pod("server").label("app", "server").start().await?;
    server.serve(apps::http(8080)).await?;
    let service = pair.lab.service("server").selector("app", "server").port("http", 80, 8080).apply()?;
    pair.settled().await?;
    server.enrolled().await?;
    // A few quick requests, the last of them a moment after the others, and then nothing: the connection stays.
    let quiet =
        pair.client.raw(service.at(80)).send(REQUEST.repeat(TIMES)).limit(Duration::from_secs(6)).run();
    let looking = async {
        eventually("both ends are told of while they are open", async || {
            let answered =
                pair.agent_a.access_log().iter().filter(|line| line.contains("status=200")).count();
            ensure!(answered == TIMES, "{answered} answers");
            let mut rows = tcp_flows(&pair.agent_a, "client", "outbound").await?;
            let row = rows.pop().context("no flow yet")?;
            ensure!(row["tx_bytes"] == REQUEST.len() * TIMES && row["state"] == "established", "{row}");
            let mut rows = tcp_flows(&pair.agent_b, "server", "inbound").await?;
            let far = rows.pop().context("no flow yet")?;
            ensure!(far["tx_bytes"].as_u64() > Some(1000) && far["rx_bytes"].as_u64() > Some(100), "{far}");
            ensure!(far["state"] == "established", "{far}");
            Ok(row["rx_bytes"].clone())
        })
        .await
    };
    let (answer, received) = tokio::join!(quiet, looking);
    let (answer, received) = (answer?, received?);
    ensure!(
        answer.statuses() == [200; TIMES] && received == answer.received.0.len(),
        "{received}: {answer:?}"
    );
    pair.finish().await
}
