//! Nobody gets past the agent by saying that a connection is a direct one: the kernel lists it, and lets it in once.

use std::{net::SocketAddr, process::Command};

use anyhow::{Context as _, Result, ensure};
use lab::{Agent, Pod, Process, Recording, Tap, apps, eventually, require_root};
use mesh_common::maps;
use serde_json::Value;

use super::world::{PLAIN, World, cookie, entries, flow, is_direct, is_not_direct};

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

/// As above, and is answered once; then the connection is closed without a word to the server (`TCP_REPAIR`).
const SILENT: &str = "
import socket, sys
source, sport, host, port = sys.argv[1:]
conn = socket.create_connection((host, int(port)), source_address=(source, int(sport)))
conn.sendall(b'one\\n')
conn.recv(4)
conn.setsockopt(socket.IPPROTO_TCP, 19, 1)
conn.close()
print('connected', flush=True)
";

/// Dials from this port, and never learns that it is answered, for a packet filter of the pod's own keeps the answer from
/// it. Says what the server's answer was: `connected SEQUENCE ACKNOWLEDGED`.
const HALF: &str = "
import socket, struct, subprocess, sys, time
source, sport, host, port = sys.argv[1:]
drop = f'iptables -w -A INPUT -p tcp --dport {sport} -j DROP'
subprocess.run(drop.split(), check=True)
packets = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x800))
conn = socket.socket()
conn.setblocking(False)
conn.bind((source, int(sport)))
conn.connect_ex((host, int(port)))
while True:
    packet = packets.recv(65536)
    tcp = packet[(packet[0] & 15) * 4:]
    if packet[9] == 6 and tcp[2:4] == struct.pack('!H', int(sport)) and tcp[13] & 0x12 == 0x12:
        break
print('connected', *struct.unpack('!II', tcp[4:12]), flush=True)
time.sleep(600)
";

/// Acknowledges such an answer, with bytes, past every socket: `python3 -c … SOURCE PORT TARGET PORT SEQUENCE
/// ACKNOWLEDGED`. Says what comes of it: `reset`, or the bytes that come back.
const ACKNOWLEDGE: &str = "
import socket, struct, sys
source, sport, host, port, theirs, ours = sys.argv[1:]
ends = socket.inet_aton(source) + socket.inet_aton(host)
def checksum(data):
    total = sum(struct.unpack(f'!{len(data) // 2}H', data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
fields = [int(sport), int(port), int(ours), (int(theirs) + 1) & 0xFFFFFFFF, 5 << 4, 0x18, 65535, 0, 0]
pseudo = ends + struct.pack('!HH', 6, 24)
fields[7] = checksum(pseudo + struct.pack('!HHIIBBHHH', *fields) + b'one\\n')
packets = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x800))
packets.settimeout(10)
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
ip = struct.pack('!BBHHHBBH', 0x45, 0, 44, 1, 0, 64, 6, 0) + ends
raw.sendto(ip + struct.pack('!HHIIBBHHH', *fields) + b'one\\n', (host, 0))
while True:
    packet = packets.recv(65536)
    tcp = packet[(packet[0] & 15) * 4:struct.unpack('!H', packet[2:4])[0]]
    if packet[9] != 6 or tcp[2:4] != struct.pack('!H', int(sport)):
        continue
    data = tcp[(tcp[12] >> 4) * 4:]
    if tcp[13] & 4 or data:
        print('reset' if tcp[13] & 4 else data.decode(), flush=True)
        break
";

/// Runs one of these until it is connected.
async fn dial(from: &Pod, own: u16, script: &str, to: SocketAddr) -> Result<Process> {
    let (source, host, port) = (from.ip().to_string(), to.ip().to_string(), to.port().to_string());
    let mut command = Command::new("python3");
    command.args(["-I", "-c", script, &source, &own.to_string(), &host, &port]);
    let process = from.spawn(command)?;
    eventually("the connection", async || {
        ensure!(process.stdout().contains("connected"), "{}", process.tail());
        Ok(())
    })
    .await?;
    Ok(process)
}

/// The direct connections to a pod that are listed.
fn listed(agent: &Agent, pod: &Pod) -> Result<Vec<Value>> {
    let cookie = cookie(agent, pod)?;
    let all = entries(agent, maps::ADMITTED)?;
    let of = all.iter().find(|one| one.key == cookie).context("no table of the pod")?;
    Ok(of.value["entries"].as_array().context("a table")?.clone())
}

/// Whether the pod has a TCP socket whose other end is this port.
async fn has_other_end(pod: &Pod, port: u16) -> Result<bool> {
    let mut command = Command::new("cat");
    command.args(["/proc/net/tcp", "/proc/net/tcp6"]);
    Ok(pod.run(command).await?.stdout.contains(&format!(":{port:04X}")))
}

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
    let holder = dial(&pair.client, SOURCE, HOLD, held.at(71)).await?;
    let out = flow(&pair.agent_a, "outbound", SocketAddr::new(pair.client.ip(), SOURCE), held.at(71)).await?;
    ensure!(out["verdict"] == "direct", "{out}");
    let listed = |pod| listed(&pair.agent_a, pod).map(|listed| listed.len());
    ensure!(listed(near)? == 1, "{}", listed(near)?);

    // The app goes, and leaves the client's end open: a SYN that were let in would be reset, for nobody listens.
    near.netns().sysctl("net/ipv4/tcp_fin_timeout", "1")?;
    app.stop(std::time::Duration::ZERO).await?;
    eventually("the end of the server's socket", async || {
        ensure!(!has_other_end(near, SOURCE).await?);
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

#[tokio::test]
async fn a_client_that_closes_in_silence_hides_nothing() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("direct-silent").await?;
    let World { pair, near, .. } = &world;
    let at = world.plain();
    is_direct(&pair.agent_a, &pair.client, at).await?;
    let one = |listed: &[Value]| listed.len() == 1;
    for _ in 0..2 {
        // The second finds the server's socket of the first, which is reset, and takes its place.
        let silent = dial(&pair.client, SOURCE, SILENT, at).await?;
        ensure!(silent.wait(std::time::Duration::from_secs(5)).await?.success(), "{}", silent.tail());
        ensure!(has_other_end(near, SOURCE).await?, "the server was told");
        let listed = listed(&pair.agent_a, near)?;
        ensure!(one(&listed), "{listed:?}");
    }
    // A connection of the same ends in earnest: struck off at its end, for good.
    let held = dial(&pair.client, SOURCE, HOLD, at).await?;
    ensure!(one(&listed(&pair.agent_a, near)?), "{:?}", listed(&pair.agent_a, near)?);
    held.stop(std::time::Duration::ZERO).await?;
    eventually("it is struck off", async || {
        let listed = listed(&pair.agent_a, near)?;
        ensure!(listed.is_empty(), "{listed:?}");
        Ok(())
    })
    .await?;
    // What is not allowed any more ends where it still is.
    let other = SOURCE + 1;
    let silent = dial(&pair.client, other, SILENT, at).await?;
    silent.wait(std::time::Duration::from_secs(5)).await?;
    near.annotate("mesh.io/direct", Some("disabled"))?;
    is_not_direct(&pair.agent_a, &pair.client, at).await?;
    eventually("the end of the server's socket", async || {
        ensure!(!has_other_end(near, other).await?);
        let listed = listed(&pair.agent_a, near)?;
        ensure!(listed.is_empty(), "{listed:?}");
        Ok(())
    })
    .await?;
    world.pair.finish().await
}

#[tokio::test]
async fn a_handshake_that_a_change_finds_half_done_is_not_completed_by_hand() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("direct-half").await?;
    let World { pair, near, .. } = &world;
    let (at, endpoint) = (world.plain(), near.at(PLAIN));
    is_direct(&pair.agent_a, &pair.client, at).await?;
    let acknowledge = async |half: &Process, own: u16| {
        let said = half.stdout();
        let mut command = Command::new("python3");
        command.args(["-I", "-c", ACKNOWLEDGE, &pair.client.ip().to_string(), &own.to_string()]);
        command.args([endpoint.ip().to_string(), endpoint.port().to_string()]);
        command.args(said.split_whitespace().skip(1));
        Ok::<_, anyhow::Error>(pair.client.run(command).await?.stdout)
    };
    // It is as a handshake's end is: while it is allowed, the app answers.
    let allowed = dial(&pair.client, SOURCE, HALF, at).await?;
    ensure!(has_other_end(near, SOURCE).await?, "the SYN was not let in");
    let said = acknowledge(&allowed, SOURCE).await?;
    ensure!(said == "one\n\n", "{said:?}");

    let (own, strict) = (SOURCE + 1, "strict.yaml");
    let half = dial(&pair.client, own, HALF, at).await?;
    ensure!(has_other_end(near, own).await?, "the SYN was not let in");
    ensure!(listed(&pair.agent_a, near)?.len() == 2, "{:?}", listed(&pair.agent_a, near)?);
    pair.apply(
        strict,
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
         metadata: { name: all, namespace: default }\nspec: { mtls: { mode: STRICT } }\n",
    )
    .await?;
    is_not_direct(&pair.agent_a, &pair.client, at).await?;
    eventually("the end of what was begun", async || {
        ensure!(!has_other_end(near, SOURCE).await?, "the established one");
        ensure!(!has_other_end(near, own).await?, "the one half done");
        ensure!(listed(&pair.agent_a, near)?.is_empty());
        Ok(())
    })
    .await?;
    let said = acknowledge(&half, own).await?;
    ensure!(said == "reset\n", "{said:?}");
    for process in [allowed, half] {
        process.stop(std::time::Duration::ZERO).await?;
    }
    world.pair.finish().await
}
