//! What passes is what was sent, in both families, whoever ends it and how; and both apps are told the truth.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use lab::{
    apps::{self, RawEnd, Then},
    eventually, metric, require_root,
};

use super::world::{World, flow, verdict};

const MANY: u64 = 64 << 20;

#[tokio::test]
async fn many_bytes_pass_each_way_and_both_apps_are_told_the_truth() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("direct-bytes").await?;
    let World { pair, near, .. } = &world;
    for dialled in [world.v4(), world.v6] {
        // The client ends its side first; the server's last word comes after that.
        let seen = pair.client.tcp(dialled, MANY, &["--report", "--timeout-ms=50000"]).await?;
        ensure!(seen.intact && seen.received == MANY && seen.peer == dialled, "{seen:?}");
        let report = seen.report.as_ref().context("no report")?;
        // Not over loopback inside the server's pod: the client's own socket is at the other end.
        ensure!(report.peer == seen.local && report.peername == seen.local, "{seen:?}");
        ensure!(report.local.ip() == if dialled.is_ipv4() { near.ip() } else { near.ip6() }, "{seen:?}");
        let out = flow(&pair.agent_a, "outbound", seen.local, dialled).await?;
        ensure!(out["verdict"] == "direct" && out["tx_bytes"] == MANY, "{out}");
        let into = flow(&pair.agent_a, "inbound", report.local, seen.local).await?;
        ensure!(into["verdict"] == "direct" && into["rx_bytes"] == MANY, "{into}");
    }
    // What the agent carried itself it would have reported as encrypted.
    let carried = metric(
        &pair.agent_a.metrics().await?,
        "istio_tcp_connections_opened_total",
        &[("connection_security_policy", "mutual_tls")],
    );
    ensure!(carried.abs() < f64::EPSILON, "{carried} connections by way of the agent");
    world.pair.finish().await
}

#[tokio::test]
async fn each_side_may_end_or_reset() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("direct-ends").await?;
    let World { pair, near, .. } = &world;
    let talks = [b"hi".as_slice()];
    near.serve(apps::http1_raw(7004, &talks, Then::Reset)).await?;
    near.serve(apps::http1_raw(7002, &talks, Then::Close)).await?;
    let sink = near.serve(apps::tcp_echo(7003)).await?;
    let ends = pair.lab.service("ends").selector("app", "near");
    let ends =
        ends.port("tcp-reset", 71, 7004).port("tcp-close", 72, 7002).port("tcp-echo", 73, 7003).apply()?;
    pair.settled().await?;
    super::world::is_direct(&pair.agent_a, &pair.client, ends.at(73)).await?;

    let head = "GET / HTTP/1.1\r\n\r\n";
    let reset = pair.client.raw(ends.at(71)).send(head).run().await?;
    ensure!(reset.end == RawEnd::Reset, "{reset:?}");
    let closed = pair.client.raw(ends.at(72)).send(head).run().await?;
    ensure!(closed.end == RawEnd::Closed && closed.text() == "hi", "{closed:?}");
    // The client's half is closed, the server's answer comes all the same.
    let half = pair.client.raw(ends.at(73)).send("half").finish().expect("half").run().await?;
    ensure!(half.end == RawEnd::Closed && half.text() == "half", "{half:?}");
    pair.client.raw(ends.at(73)).send("gone").expect("gone").reset().run().await?;
    eventually("the server's app is told of the reset", async || {
        ensure!(sink.stderr().contains("reset"), "{}", sink.tail());
        Ok(())
    })
    .await?;
    let flows = pair.agent_a.flows().await?;
    let flows = flows.as_array().context("a list")?.iter();
    let direct = flows.filter(|flow| flow["service"] == ends.host() && flow["verdict"] == "direct").count();
    ensure!(direct == 8, "{direct} ends of connections without the agent");
    world.pair.finish().await
}

/// Connects, echoes, and says what it saw: `python3 -c … FAMILY TARGET SOURCE`.
const DIAL: &str = "
import socket, sys
family, host, port, source = sys.argv[1:]
conn = socket.socket(socket.AF_INET6 if family == '6' else socket.AF_INET)
if source: conn.bind((source, 0))
conn.connect((host, int(port)))
peer, own = conn.getpeername(), conn.getsockname()
conn.sendall(b'hello')
conn.shutdown(socket.SHUT_WR)
said = b''
while data := conn.recv(4096): said += data
print(peer[0], own[0], own[1], said[:5].decode())
";

#[tokio::test]
async fn sockets_of_all_kinds_and_apps_that_bind_are_served() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("direct-sockets").await?;
    let World { pair, .. } = &world;
    pair.client.netns().ip(&["address add 10.111.0.9/32 dev lo".to_owned()])?;
    let (v4, own) = (world.v4(), pair.client.ip().to_string());
    // An IPv6 socket that dials a mapped address; a socket bound to the pod's address; one bound to an address that is
    // not known as the pod's, which takes the agent.
    let table = [
        ("6", format!("::ffff:{}", v4.ip()), "", format!("::ffff:{own}"), "direct"),
        ("4", v4.ip().to_string(), own.as_str(), own.clone(), "direct"),
        ("4", v4.ip().to_string(), "10.111.0.9", "10.111.0.9".to_owned(), "captured"),
    ];
    for (family, host, source, local, expected) in table {
        let mut command = Command::new("python3");
        command.args(["-I", "-c", DIAL, family, &host, &v4.port().to_string(), source]);
        let output = pair.client.run(command).await?;
        let said: Vec<&str> = output.stdout.split_whitespace().collect();
        ensure!(said.len() == 4 && said[0] == host && said[1] == local && said[3] == "hello", "{output:?}");
        let local: std::net::SocketAddr =
            format!("{}:{}", local.trim_start_matches("::ffff:"), said[2]).parse()?;
        let verdict = verdict(&pair.agent_a, local, v4).await?;
        ensure!(verdict == expected, "{family} {host} {source}: {verdict}");
    }
    world.pair.finish().await
}
