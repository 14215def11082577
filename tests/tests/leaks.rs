//! What leaves a pod around the agent, where its egress is restricted, is dropped on the node's end of its veth and counted,
//! however it was sent; what is the agent's, excluded or an answer passes, and other pods are left alone.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context as _, Result, ensure};
use lab::{Agent, Behind, Lab, Node, Pod, Recording, apps, eventually, metric, require_root, residue};

const EGRESS: &str = "mesh.io/egress";
const DROPPED: &str = "mesh_kernel_dropped_packets_total";

/// Made by hand: a SYN, data, an answer with data, a reset with data. None is a connection's.
const LEAKS: [(u16, &str); 4] = [(9001, "2:0"), (9002, "16:100"), (9003, "18:10"), (9004, "4:10")];
/// Resets and SYN-ACKs without data may have no socket, in the kernel's own life too.
const ANSWERS: [(u16, &str); 2] = [(9005, "4:0"), (9006, "18:0")];
/// Of IPv6: TCP behind a header of options.
const HIDDEN: (u16, &str) = (9007, "2:0:hidden");
/// Of IPv6, from an IPv4 address in its mapped form, which no socket sends. (A node's kernel drops these by itself: they are
/// seen by their count.)
const MAPPED: [(u16, &str); 2] = [(9008, "2:0:mapped"), (9009, "2:0:hidden:mapped")];

/// A restricted pod and one that is not, and a stranger on another node.
struct World {
    lab: Lab,
    a: Node,
    b: Node,
    agent: Agent,
    restricted: Pod,
    free: Pod,
    stranger: Pod,
}

impl World {
    async fn new(name: &str) -> Result<Self> {
        let lab = Lab::new(name).await?;
        let (a, b) = (lab.node("a").await?, lab.node("b").await?);
        let restricted = a.pod("restricted").annotation(EGRESS, "restricted").label("app", "restricted");
        let restricted = restricted.annotation("mesh.io/exclude-outbound-ports", "7001").start().await?;
        let free = a.pod("free").start().await?;
        let stranger = b.pod("stranger").unenrolled().start().await?;
        let agent = a.agent().start().await?;
        for pod in [&restricted, &free] {
            pod.enrolled().await?;
        }
        Ok(Self { lab, a, b, agent, restricted, free, stranger })
    }

    async fn dropped(&self) -> Result<u64> {
        Ok(metric(&self.agent.metrics().await?, DROPPED, &[("reason", "leaked")]) as u64)
    }

    /// Which of the ports are seen on the wire when this pod has sent all by hand.
    async fn sends(&self, pod: &Pod, v6: bool, bypass: bool) -> Result<BTreeSet<u16>> {
        let (from, to) = if v6 { (pod.ip6(), self.stranger.ip6()) } else { (pod.ip(), self.stranger.ip()) };
        let of_v6 = [HIDDEN].into_iter().chain(MAPPED).filter(|_| v6);
        let all = LEAKS.into_iter().chain(ANSWERS).chain(of_v6);
        let all: Vec<(u16, String)> = all.map(|(port, what)| (port, format!("{port}:{what}"))).collect();
        let (from, to_text) = (from.to_string(), to.to_string());
        let mut args = vec![from.as_str(), to_text.as_str(), if bypass { "1" } else { "0" }];
        args.extend(all.iter().map(|(_, text)| text.as_str()));
        let tap = self.lab.tap()?;
        pod.untrusted("by_hand", &args).await?;
        let recording = tap.stop()?;
        Ok(all.iter().map(|(port, _)| *port).filter(|port| has_tcp(&recording, to, *port)).collect())
    }
}

/// Whether a TCP segment to this port of an address crossed the wire.
fn has_tcp(recording: &Recording, to: IpAddr, port: u16) -> bool {
    recording.frames.iter().any(|frame| {
        let packet = frame.get(14..).unwrap_or_default();
        let (destination, at) = match to {
            IpAddr::V4(to) => (packet.get(16..20) == Some(&to.octets()), 20),
            // Behind the header, and behind eight bytes of options where there are any.
            IpAddr::V6(to) => {
                (packet.get(24..40) == Some(&to.octets()), if packet.get(6) == Some(&60) { 48 } else { 40 })
            }
        };
        destination && packet.get(at + 2..at + 4) == Some(&port.to_be_bytes())
    })
}

fn ports(of: &[(u16, &str)]) -> BTreeSet<u16> {
    of.iter().map(|(port, _)| *port).collect()
}

#[tokio::test]
async fn segments_made_by_hand_do_not_leave_and_are_counted() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("leaks").await?;
    let mut everything = ports(&LEAKS);
    everything.extend(ports(&ANSWERS));
    let mut expected = 0;
    for bypass in [true, false] {
        for v6 in [false, true] {
            if v6 {
                everything.insert(HIDDEN.0);
            }
            let seen = world.sends(&world.free, v6, bypass).await?;
            ensure!(seen.is_superset(&everything), "an ordinary pod: {seen:?} of {everything:?}");
            let seen = world.sends(&world.restricted, v6, bypass).await?;
            ensure!(
                seen == ports(&ANSWERS),
                "past a restriction (v6: {v6}, past queues: {bypass}): {seen:?}"
            );
            expected += (LEAKS.len() + if v6 { 1 + MAPPED.len() } else { 0 }) as u64;
        }
        everything.remove(&HIDDEN.0);
    }
    eventually("every one is counted", async || {
        let dropped = world.dropped().await?;
        ensure!(dropped == expected, "{dropped} of {expected}");
        Ok(())
    })
    .await?;
    let flows = world.agent.flows().await?;
    let flows = flows.as_array().context("flows are no list")?;
    for (port, _) in LEAKS {
        let remote = SocketAddr::new(world.stranger.ip(), port).to_string();
        let of = |pod: &str| {
            let found = flows.iter().find(|flow| flow["pod"] == pod && flow["remote"] == remote);
            found.map(|flow| (flow["verdict"].clone(), flow["tx_packets"].clone()))
        };
        ensure!(of("restricted") == Some(("leaked".into(), 2.into())), "{remote}: {:?}", of("restricted"));
        ensure!(of("free").is_none_or(|(verdict, _)| verdict != "leaked"), "{remote}: {:?}", of("free"));
    }
    let log = world.agent.log();
    let lines: Vec<_> = log.iter().filter(|line| line.contains("leaked") && line.contains(EGRESS)).collect();
    ensure!(lines.len() == 1, "{lines:?}");
    world.lab.finish().await
}

#[tokio::test]
async fn what_is_known_passes() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("known").await?;
    let server = world.b.pod("server").label("app", "server").start().await?;
    server.serve(apps::http(8080)).await?;
    for port in [7000, 7001] {
        world.stranger.serve(apps::tcp_echo(port)).await?;
    }
    world.stranger.serve(apps::udp_echo(7002)).await?;
    world.restricted.serve(apps::http(8080)).await?;
    world.restricted.serve(apps::tcp_echo(7000)).await?;
    let service = world.lab.service("server").selector("app", "server").port("http", 80, 8080).apply()?;
    let own = world.lab.service("own").selector("app", "restricted").port("http", 80, 8080).apply()?;
    let other = world.b.agent().start().await?;
    server.enrolled().await?;
    for to in [&server, &world.restricted] {
        for agent in [&world.agent, &other] {
            let name = format!("{}/{}", to.namespace(), to.name());
            agent
                .config("both services", |dump| {
                    let text = dump.to_string();
                    ensure!(text.contains(&service.host()) && text.contains(&own.host()), "{name}");
                    Ok(())
                })
                .await?;
        }
    }
    let (pod, stranger) = (&world.restricted, &world.stranger);
    // Through the mesh, in plaintext through the agent, excluded from it, and no TCP at all.
    for url in [service.url(80, "/"), service.url6(80, "/")] {
        let answer = pod.get(url).send().await?;
        ensure!(answer.status == 200 && answer.pod() == Some("server"), "{answer:?}");
    }
    for to in [stranger.at(7000), stranger.at6(7000), stranger.at(7001), stranger.at6(7001)] {
        let answer = pod.tcp(to, 1 << 20, &[]).await?;
        ensure!(answer.intact, "{to}: {answer:?}");
    }
    ensure!(pod.udp(stranger.at(7002), 3, 100).await?.received == 3, "UDP");
    // Nobody listens there: who is refused is told so.
    let refused = pod.tcp(stranger.at(7001 + 8), 10, &[]).await;
    ensure!(refused.as_ref().is_ok_and(|answer| answer.received == 0) || refused.is_err(), "{refused:?}");
    // What comes in is answered: from the mesh, from strangers, and from the node.
    let answer = server.get(own.url(80, "/")).send().await?;
    ensure!(answer.status == 200 && answer.pod() == Some("restricted"), "{answer:?}");
    for to in [pod.at(7000), pod.at6(7000)] {
        ensure!(stranger.tcp(to, 1 << 20, &[]).await?.intact, "{to}");
    }
    // Its guests are its own.
    let guest = pod.guest(1, Behind::Bridge).await?;
    guest.captured().await?;
    ensure!(guest.pod.get(service.url(80, "/")).send().await?.status == 200);
    ensure!(guest.pod.tcp(stranger.at(7001), 1000, &[]).await?.intact, "excluded");
    ensure!(world.dropped().await? == 0, "{} dropped", world.dropped().await?);
    world.lab.finish().await
}

#[tokio::test]
async fn a_restriction_comes_and_goes_with_its_annotation() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("annotated").await?;
    let answers = ports(&ANSWERS);
    for (value, pod, is_restricted) in [
        (Some("restricted"), &world.free, true),
        (None, &world.restricted, false),
        (Some("unrestricted"), &world.free, false),
    ] {
        pod.annotate(EGRESS, value)?;
        eventually("the annotation is in force", async || {
            let seen = world.sends(pod, false, true).await?;
            ensure!((seen == answers) == is_restricted, "{value:?}: {seen:?}");
            Ok(())
        })
        .await?;
    }
    // The guard outlives its agent, and goes with `clean`.
    world.restricted.annotate(EGRESS, Some("restricted"))?;
    eventually("restricted again", async || {
        ensure!(world.sends(&world.restricted, false, true).await? == answers);
        Ok(())
    })
    .await?;
    let World { lab, a, agent, restricted, stranger, .. } = world;
    agent.kill().await?;
    let netns = a.netns().path();
    ensure!(!residue::in_netns(&netns)?.is_empty(), "no guard on the node's end");
    let tap = lab.tap()?;
    let (from, to) = (restricted.ip().to_string(), stranger.ip().to_string());
    restricted.untrusted("by_hand", &[&from, &to, "1", "9001:2:0"]).await?;
    ensure!(!has_tcp(&tap.stop()?, stranger.ip(), 9001), "a SYN has left");
    a.clean().await?;
    let left = residue::wait_until_none(|| residue::in_netns(&netns));
    ensure!(left.is_empty(), "{left:?}");
    lab.finish().await
}

#[tokio::test]
async fn ways_out_that_come_later_are_guarded_or_named() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("later").await?;
    let (pod, node) = (&world.restricted, &world.a);
    let inside = pod.netns().name();
    node.netns().ip(&[
        format!("link add later type veth peer name net1 netns {inside}"),
        "link set later up".to_owned(),
    ])?;
    pod.netns().ip(&["link set net1 up".to_owned()])?;
    let (from, to) = (pod.ip().to_string(), world.stranger.ip().to_string());
    eventually("a second veth has a guard", async || {
        pod.untrusted("by_hand_from", &["net1", &from, &to, "9001:2:0"]).await?;
        let dropped = world.dropped().await?;
        ensure!(dropped > 0, "nothing was dropped");
        Ok(())
    })
    .await?;
    // One that has the pod's address and no end with the node is named, and the pod stays as it is.
    let name = format!("{}/{}", pod.namespace(), pod.name());
    let failing = async |expected: bool| {
        eventually("the status of the pod", async || {
            let pods = world.agent.status().await?["failing"].to_string();
            ensure!((pods.contains(&name) && pods.contains("odd0")) == expected, "{pods}");
            Ok(())
        })
        .await
    };
    pod.netns()
        .ip(&["link add odd0 type bridge".to_owned(), format!("addr add {}/32 dev odd0", pod.ip())])?;
    failing(true).await?;
    world.stranger.serve(apps::tcp_echo(7000)).await?;
    ensure!(pod.tcp(world.stranger.at(7000), 1000, &[]).await?.intact, "through the agent");
    let seen = world.sends(pod, false, true).await?;
    ensure!(seen == ports(&ANSWERS), "past the guard that it has: {seen:?}");
    pod.netns().ip(&["link del odd0".to_owned()])?;
    failing(false).await?;
    world.lab.finish().await
}
