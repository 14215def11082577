//! What has no socket in a pod, nested containers and virtual machines, is the pod's all the same: captured, routed and
//! counted as it, unless it stays inside the pod or the pod excludes it; and nothing of that is left in a pod.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use lab::{Behind, Guest, Pair, Pod, Recording, Service, apps, eventually, metric, require_root, residue};
use mesh_agent::capture::rules_and_routes_in;
use serde_json::Value;
use socket2::{Domain, Socket, Type};

const ALL: [Behind; 3] = [Behind::Veth, Behind::Bridge, Behind::Tap];
const PRINCIPAL: &str = "spiffe://cluster.local/ns/default/sa/client";
const MIB: u64 = 1 << 20;

/// A client with guests, and a service in two versions on two nodes.
struct World {
    pair: Pair,
    guests: Vec<Guest>,
    http: Service,
    tcp: Service,
    _servers: [Pod; 2],
}

const ROUTES: &str = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: web, namespace: default }
spec:
  host: web
  subsets:
    - { name: v1, labels: { version: v1 } }
    - { name: v2, labels: { version: v2 } }
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: web, namespace: default }
spec:
  hosts: [web]
  http:
    - match: [{ headers: { end-user: { exact: jason } } }]
      route: [{ destination: { host: web, subset: v2 } }]
    - route: [{ destination: { host: web, subset: v1 } }]
";

impl World {
    /// The guests come after the pod was enrolled.
    async fn new(name: &str, guests: &[Behind]) -> Result<Self> {
        let pair = Pair::new(name).await?;
        let server = async |node: &lab::Node, version: &str| {
            let pod = node.pod(&format!("web-{version}")).sa("web");
            let pod = pod.labels([("app", "web"), ("version", version)]).start().await?;
            pod.serve(apps::http(8080)).await?;
            pod.serve(apps::tcp_echo(7000).arg("--report")).await?;
            anyhow::Ok(pod)
        };
        let servers = [server(&pair.a, "v1").await?, server(&pair.b, "v2").await?];
        let http = pair.lab.service("web").selector("app", "web").port("http", 80, 8080).apply()?;
        let tcp = pair.lab.service("echo").selector("version", "v2").port("tcp", 7000, 7000).apply()?;
        pair.apply("routes.yaml", ROUTES).await?;
        for pod in &servers {
            pod.enrolled().await?;
        }
        let mut world = Self { pair, guests: Vec::new(), http, tcp, _servers: servers };
        for (n, behind) in (1..).zip(guests) {
            let guest = world.pair.client.guest(n, *behind).await?;
            guest.captured().await?;
            world.guests.push(guest);
        }
        Ok(world)
    }

    /// Requests that the client's agent has answered for, as the client.
    async fn requests(&self) -> Result<u64> {
        let own = [("reporter", "source"), ("source_principal", PRINCIPAL)];
        Ok(metric(&self.pair.agent_a.metrics().await?, "istio_requests_total", &own) as u64)
    }

    /// A guest's requests go where the route says, over both families.
    async fn is_routed(&self, guest: &Guest) -> Result<()> {
        for url in [self.http.url(80, "/"), self.http.url6(80, "/")] {
            for (user, version) in [("jason", "web-v2"), ("anna", "web-v1")] {
                let answer = guest.pod.get(&url).header("end-user", user).send().await?;
                ensure!(answer.status == 200 && answer.pod() == Some(version), "{url} {user}: {answer:?}");
            }
        }
        Ok(())
    }
}

/// Flows of the client whose far end is this address.
async fn flows(world: &World, remote: SocketAddr) -> Result<Vec<Value>> {
    let flows = world.pair.agent_a.flows().await?;
    let all = flows.as_array().context("flows are no list")?;
    let wanted = |flow: &&Value| flow["pod"] == "client" && flow["remote"] == remote.to_string();
    Ok(all.iter().filter(wanted).cloned().collect())
}

#[tokio::test]
async fn guests_are_routed_counted_and_carried_as_their_pod() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("guests", &ALL).await?;
    for guest in &world.guests {
        world.is_routed(guest).await?;
    }
    eventually("the requests are the pod's", async || {
        let requests = world.requests().await?;
        ensure!(requests == 12, "{requests} of 12");
        Ok(())
    })
    .await?;
    for guest in &world.guests {
        for to in [world.tcp.at(7000), world.tcp.at6(7000)] {
            let answer = guest.pod.tcp(to, 8 * MIB, &["--report"]).await?;
            let report = answer.report.as_ref().context("no report")?;
            ensure!(answer.intact && answer.received == 8 * MIB && answer.peer == to, "{answer:?}");
            // Others know the pod alone.
            let pods = [world.pair.client.ip(), world.pair.client.ip6()];
            ensure!(pods.contains(&report.peer.ip()) && report.received == 8 * MIB, "{report:?}");
        }
    }
    let seen = flows(&world, world.tcp.at(7000)).await?;
    ensure!(seen.len() == 3, "{seen:?}");
    for flow in &seen {
        ensure!(flow["verdict"] == "captured" && flow["direction"] == "outbound", "{flow}");
        // IP bytes, so more than the payload, both ways.
        let bytes = |name: &str| flow[name].as_u64().unwrap_or_default();
        ensure!(bytes("tx_bytes") > 8 * MIB && bytes("rx_bytes") > 8 * MIB, "{flow}");
    }
    world.pair.finish().await
}

#[tokio::test]
async fn what_stays_in_the_pod_is_left_alone() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("inside", &[Behind::Veth, Behind::Bridge]).await?;
    let [one, two] = &world.guests[..] else { bail!("two guests") };
    world.pair.client.serve(apps::tcp_echo(7000).arg("--report")).await?;
    two.pod.serve(apps::tcp_echo(7000).arg("--report")).await?;
    let targets = [
        SocketAddr::new(one.gateway.v4.into(), 7000),
        SocketAddr::new(one.gateway.v6.into(), 7000),
        world.pair.client.at(7000),
        two.pod.at(7000),
        two.pod.at6(7000),
    ];
    for to in targets {
        let answer = one.pod.tcp(to, 10_000, &["--report"]).await?;
        let report = answer.report.as_ref().context("no report")?;
        ensure!(answer.intact && report.peer == answer.local, "{to}: {answer:?}");
    }
    let metrics = world.pair.agent_a.metrics().await?;
    let opened = metric(&metrics, "istio_tcp_connections_opened_total", &[]);
    ensure!(opened == 0.0, "{opened} connections were the agent's");
    // The agent's ports serve nobody who dials them, from wherever.
    let port = SocketAddr::new(one.gateway.v4.into(), 15001);
    let dialled = one.pod.tcp(port, 10, &["--timeout-ms", "5000"]).await;
    ensure!(dialled.as_ref().map_or(0, |answer| answer.received) == 0, "{dialled:?}");
    world.pair.finish().await
}

/// Asks for a page from this port and reads until the server has closed; the status line.
fn ask_from(from: SocketAddr, to: SocketAddr) -> Result<String> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&from.into())?;
    socket.connect_timeout(&to.into(), Duration::from_secs(5)).context("connecting")?;
    socket.set_read_timeout(Some(Duration::from_secs(20)))?;
    (&socket).write_all(b"GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    (&socket).read_to_string(&mut text)?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// Sockets of the pod in time-wait (06) on this port of another's, by the kernel's own table.
fn in_time_wait(pod: &Pod, port: u16) -> Result<usize> {
    let end = format!(":{port:04X}");
    let table = pod.netns().inside(|| Ok(std::fs::read_to_string("/proc/thread-self/net/tcp6")?))?
        + &pod.netns().inside(|| Ok(std::fs::read_to_string("/proc/thread-self/net/tcp")?))?;
    let waits = |line: &&str| {
        let mut fields = line.split_whitespace().skip(1);
        fields.next().is_some_and(|local| local.ends_with(&end)) && fields.nth(1) == Some("06")
    };
    Ok(table.lines().filter(waits).count())
}

#[tokio::test]
async fn a_port_is_used_again_at_once() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("again", &[Behind::Veth]).await?;
    let guest = &world.guests[0];
    let to = world.http.at(80);
    let from = SocketAddr::new(guest.pod.ip(), 40_001);
    for round in 0..10 {
        let netns = guest.pod.netns();
        let status = netns.inside(|| ask_from(from, to));
        let status = status.with_context(|| format!("round {round}"))?;
        ensure!(status.contains(" 200 "), "round {round}: {status}");
        // The agent has closed first: the next SYN meets what is left of this connection.
        eventually("the agent's end in time-wait", async || {
            ensure!(in_time_wait(&world.pair.client, 80)? == 1, "no socket in time-wait");
            Ok(())
        })
        .await?;
    }
    world.pair.finish().await
}

#[tokio::test]
async fn what_the_pod_excludes_passes() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("excluded", &[Behind::Bridge]).await?;
    let (client, guest) = (&world.pair.client, &world.guests[0]);
    let stranger = world.pair.b.pod("stranger").unenrolled().start().await?;
    for port in [7000, 7001] {
        stranger.serve(apps::tcp_echo(port).arg("--report")).await?;
    }
    client.annotate("mesh.io/exclude-outbound-ports", Some("7000"))?;
    world.pair.settled().await?;
    let opened = async || -> Result<u64> {
        let own = [("reporter", "source"), ("source_principal", PRINCIPAL)];
        let metrics = world.pair.agent_a.metrics().await?;
        Ok(metric(&metrics, "istio_tcp_connections_opened_total", &own) as u64)
    };
    eventually("the exclusion is in force", async || {
        let before = opened().await?;
        let answer = guest.pod.tcp(stranger.at(7000), 1000, &["--report"]).await?;
        let peer = answer.report.context("no report")?.peer.ip();
        ensure!(answer.intact && peer == client.ip(), "{peer}");
        ensure!(opened().await? == before, "it was the agent's");
        Ok(())
    })
    .await?;
    let before = opened().await?;
    for to in [stranger.at(7001), stranger.at6(7001)] {
        ensure!(guest.pod.tcp(to, 1000, &["--report"]).await?.intact);
    }
    eventually("what is not excluded is captured", async || {
        let now = opened().await?;
        ensure!(now == before + 2, "{now} after {before}");
        Ok(())
    })
    .await?;
    world.pair.finish().await
}

/// Whether a TCP segment to this port of an address crossed the wire.
fn has_tcp_to(recording: &Recording, ip: IpAddr, port: u16) -> bool {
    let IpAddr::V4(ip) = ip else { return false };
    recording.frames.iter().any(|frame| {
        let packet = frame.get(14..).unwrap_or_default();
        let header = packet.first().map_or(0, |first| usize::from(first & 0xf) * 4);
        frame.get(12..14) == Some(&[8, 0])
            && packet.get(9) == Some(&6)
            && packet.get(16..20) == Some(&ip.octets())
            && packet.get(header + 2..header + 4) == Some(&port.to_be_bytes())
    })
}

#[tokio::test]
async fn without_an_agent_guests_are_refused_or_pass_as_the_pod_says() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let lab = lab::Lab::new("gone").await?;
    let (a, b) = (lab.node("a").await?, lab.node("b").await?);
    let stranger = b.pod("stranger").unenrolled().start().await?;
    stranger.serve(apps::tcp_echo(7000)).await?;
    let shut = a.pod("shut").start().await?;
    let open = a.pod("open").annotation("mesh.io/when-agent-is-down", "open").start().await?;
    // Guests that were there before the agent.
    let (in_shut, in_open) = (shut.guest(1, Behind::Tap).await?, open.guest(1, Behind::Bridge).await?);
    let agent = a.agent().start().await?;
    for guest in [&in_shut, &in_open] {
        guest.captured().await?;
        ensure!(guest.pod.tcp(stranger.at(7000), 1000, &[]).await?.intact);
    }
    agent.kill().await?;
    let tap = lab.tap()?;
    let answer = in_open.pod.tcp(stranger.at(7000), 1000, &[]).await?;
    ensure!(answer.intact, "{answer:?}");
    ensure!(has_tcp_to(&tap.stop()?, stranger.ip(), 7000), "the tap does not see");
    let tap = lab.tap()?;
    let refused = in_shut.pod.tcp(stranger.at(7000), 1000, &["--timeout-ms", "3000"]).await;
    ensure!(refused.is_err(), "{refused:?}");
    ensure!(!has_tcp_to(&tap.stop()?, stranger.ip(), 7000), "a segment left in the clear");

    let next = a.agent().start().await?;
    for guest in [&in_shut, &in_open] {
        guest.captured().await?;
        ensure!(guest.pod.tcp(stranger.at(7000), 1000, &[]).await?.intact);
    }
    // After a crash there is nobody but `clean` to take it all away.
    next.kill().await?;
    ensure!(!rules_and_routes_in(&shut.netns().path())?.is_empty());
    a.clean().await?;
    for pod in [&shut, &open] {
        let left = residue::wait_until_none(|| residue::in_netns(&pod.netns().path()));
        ensure!(left.is_empty(), "{left:?}");
    }
    ensure!(in_shut.pod.tcp(stranger.at(7000), 1000, &[]).await?.intact, "NAT alone");
    lab.finish().await
}

#[tokio::test]
async fn guests_come_and_go_and_leave_nothing() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("come", &[]).await?;
    let client = &world.pair.client;
    let left = || rules_and_routes_in(&client.netns().path());
    ensure!(left()?.is_empty(), "no guest, no rule: {:?}", left()?);
    let guests = BTreeMap::from([
        (1, client.guest(1, Behind::Veth).await?),
        (2, client.guest(2, Behind::Bridge).await?),
    ]);
    for guest in guests.values() {
        guest.captured().await?;
        world.is_routed(guest).await?;
    }
    // One goes: the other stays.
    guests[&1].leave()?;
    let of = |lines: Vec<String>| lines.iter().any(|line| line.starts_with("2 rule"));
    eventually("the rules of one guest", async || {
        ensure!(of(left()?), "{:?}", left()?);
        Ok(())
    })
    .await?;
    world.is_routed(&guests[&2]).await?;
    guests[&2].leave()?;
    eventually("no guest, no rule", async || {
        ensure!(left()?.is_empty(), "{:?}", left()?);
        Ok(())
    })
    .await?;
    // A pod that leaves the mesh has its guests as they were.
    let guest = client.guest(3, Behind::Bridge).await?;
    guest.captured().await?;
    let file = "pod-default-client.yaml";
    let text = std::fs::read_to_string(world.pair.lab.config_dir().join(file))?;
    let mut object: Value = serde_json::from_str(&text)?;
    object["metadata"]["labels"]["mesh.io/dataplane-mode"] = "none".into();
    world.pair.lab.apply(file, &object.to_string())?;
    client.not_enrolled().await?;
    let left = residue::wait_until_none(|| residue::in_netns(&client.netns().path()));
    ensure!(left.is_empty(), "{left:?}");
    world.pair.finish().await
}

#[tokio::test]
async fn an_upgrade_loses_nothing_of_a_guest() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let mut world = World::new("upgrade", &[Behind::Bridge]).await?;
    let (to, netns) = (world.tcp.at(7000), world.guests[0].pod.netns().path());
    let connect = || Ok(std::net::TcpStream::connect_timeout(&to, Duration::from_secs(20))?);
    let mut open = lab::net::inside(&netns, connect)?;
    open.set_read_timeout(Some(Duration::from_secs(20)))?;
    let echo = |stream: &mut std::net::TcpStream| -> Result<()> {
        let mut text = [0; 4];
        stream.write_all(b"here")?;
        stream.read_exact(&mut text)?;
        ensure!(&text == b"here");
        Ok(())
    };
    echo(&mut open)?;
    let old = world.pair.agent_a.upgrade().await?;
    echo(&mut open).context("a connection from before")?;
    world.is_routed(&world.guests[0]).await?;
    // A guest that comes now is the successor's.
    let late = world.pair.client.guest(9, Behind::Veth).await?;
    late.captured().await?;
    world.is_routed(&late).await?;
    drop(open);
    old.wait(Duration::from_secs(30)).await?;
    world.pair.finish().await
}

#[tokio::test]
async fn interfaces_that_come_and_go_all_the_time_keep_nobody_busy() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("flaps", &[]).await?;
    let client = &world.pair.client;
    let script =
        "for i in $(seq 100); do ip link add flap type bridge && sleep 0.02 && ip link del flap; done";
    let mut command = std::process::Command::new("sh");
    command.args(["-c", script]);
    let flapped = client.run(command).await?;
    ensure!(flapped.status.success(), "{flapped:?}");
    // What stays is captured all the same, and nothing is left of the rest.
    let guest = client.guest(1, Behind::Bridge).await?;
    guest.captured().await?;
    world.is_routed(&guest).await?;
    eventually("the rules of one guest", async || {
        let left = rules_and_routes_in(&client.netns().path())?;
        ensure!(left.iter().any(|line| line.starts_with("2 rule")), "{left:?}");
        Ok(())
    })
    .await?;
    let log = world.pair.agent_a.log();
    let told: Vec<_> =
        log.iter().filter(|line| line.contains("connections of guests are captured")).collect();
    ensure!(told.len() == 1, "{} lines: {told:?}", told.len());
    world.pair.finish().await
}
