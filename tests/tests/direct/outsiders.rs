//! Nobody gets past the agent by saying that a connection is a direct one: the kernel lists it, and lets it in once.

use std::{net::SocketAddr, process::Command};

use anyhow::{Context as _, Result, ensure};
use lab::{Recording, Tap, apps, eventually, require_root};
use mesh_common::maps;

use super::world::{World, cookie, entries, flow, is_direct};

/// The first source port of those that `forged` claims.
const SOURCE: u16 = 40_000;
const FORGED: usize = 20;

/// Dials from this port, and holds the connection: `python3 -c … SOURCE PORT TARGET PORT`.
const HOLD: &str = "
import socket, sys
source, sport, host, port = sys.argv[1:]
conn = socket.create_connection((host, int(port)), source_address=(source, int(sport)))
print('connected', flush=True)
sys.stdin.read() or conn.recv(1)
import time
time.sleep(600)
";

/// Answers to SYNs, from this address: whether each was taken (else it was reset).
fn answers(recording: &Recording, from: SocketAddr) -> Vec<(u16, bool)> {
    let SocketAddr::V4(from) = from else { return Vec::new() };
    let answer = |frame: &Vec<u8>| {
        let ip = frame.get(14..)?;
        let tcp = ip.get(usize::from(ip.first()? & 0xf) * 4..)?;
        let port = |at: usize| Some(u16::from_be_bytes([*tcp.get(at)?, *tcp.get(at + 1)?]));
        let sent = frame.get(12..14)? == [8, 0] && ip.get(9) == Some(&6);
        let ours = sent && ip.get(12..16)? == from.ip().octets() && port(0)? == from.port();
        let flags = tcp.get(13)? & 0x16;
        // SYN with ACK, or a reset.
        (ours && flags != 0x10).then_some((port(2)?, flags & 2 != 0))
    };
    recording.frames.iter().filter_map(answer).collect()
}

#[tokio::test]
async fn a_forged_connection_finds_the_agent() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("direct-forged").await?;
    let World { pair, near, .. } = &world;
    let app = near.serve(apps::tcp_echo(7002)).await?;
    let held = pair.lab.service("held").selector("app", "near").port("tcp", 71, 7002).apply()?;
    pair.settled().await?;
    is_direct(&pair.agent_a, &pair.client, held.at(71)).await?;
    let source = pair.client.ip().to_string();
    let mut command = Command::new("python3");
    let (host, port) = (held.ip().to_string(), held.at(71).port().to_string());
    command.args(["-I", "-c", HOLD, &source, &SOURCE.to_string(), &host, &port]);
    let holder = pair.client.spawn(command)?;
    eventually("the connection", async || {
        ensure!(holder.stdout().contains("connected"), "{}", holder.tail());
        Ok(())
    })
    .await?;
    let out = flow(&pair.agent_a, "outbound", SocketAddr::new(pair.client.ip(), SOURCE), held.at(71)).await?;
    ensure!(out["verdict"] == "direct", "{out}");
    let listed = |pod| -> Result<usize> {
        let cookie = cookie(&pair.agent_a, pod)?;
        let all = entries(&pair.agent_a, maps::ADMITTED)?;
        let of = all.iter().find(|one| one.key == cookie).context("no table of the pod")?;
        Ok(of.value["entries"].as_array().context("a table")?.len())
    };
    ensure!(listed(near)? == 1, "{}", listed(near)?);

    // The app goes, and leaves the client's end open: a SYN that were let in would be reset, for nobody listens.
    near.netns().sysctl("net/ipv4/tcp_fin_timeout", "1")?;
    app.stop(std::time::Duration::ZERO).await?;
    let claimed = format!(":{SOURCE:04X}");
    eventually("the end of the server's socket", async || {
        let mut command = Command::new("cat");
        command.args(["/proc/net/tcp", "/proc/net/tcp6"]);
        let sockets = near.run(command).await?.stdout;
        ensure!(!sockets.contains(&claimed), "{sockets}");
        Ok(())
    })
    .await?;
    ensure!(listed(near)? == 1, "the client's socket is not closed");
    let other = pair.a.pod("other").start().await?;
    other.enrolled().await?;
    let tap = Tap::open(near.netns())?;
    let target = near.at(7002).to_string();
    // Root in another pod of the node, and root in the client's own.
    for pod in [&other, &pair.client] {
        pod.untrusted("forged", &[&source, &target, &FORGED.to_string()]).await?;
    }
    // A real one, so that everything before it has been answered.
    ensure!(world.dial(world.v4()).await?);
    let recording = tap.stop()?;
    let seen = answers(&recording, near.at(7002));
    // To the port of the connection that was listed, too.
    for port in SOURCE..SOURCE + FORGED as u16 {
        let of: Vec<bool> = seen.iter().filter(|(to, _)| *to == port).map(|(_, taken)| *taken).collect();
        ensure!(of.contains(&true), "port {port} was not answered by the agent: {seen:?}");
    }
    holder.stop(std::time::Duration::ZERO).await?;
    eventually("it is struck off", async || {
        ensure!(listed(near)? == 0, "{}", listed(near)?);
        Ok(())
    })
    .await?;
    world.pair.finish().await
}
