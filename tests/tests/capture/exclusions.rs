//! What a pod excludes from capture passes around the agent untouched, shows in flows as such, and can change while the
//! pod runs; everything else is captured as ever.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
};

use anyhow::{Result, ensure};
use mesh_agent::{
    capture::{Listener, inspect},
    state::{resource::pod, snapshot::CapturePolicy},
};
use mesh_common::flow::{FlowRecord, direction, verdict};

use crate::world::{LIMIT, Ns, PEER4, PEER6, POD4, POD6, World, addr, alone, workload_as};

fn asked(annotations: &[(&str, &str)]) -> Result<CapturePolicy> {
    let all: BTreeMap<String, String> =
        annotations.iter().map(|(name, value)| (format!("mesh.io/{name}"), (*value).to_owned())).collect();
    pod::capture_policy(Some(&all)).map_err(|error| anyhow::anyhow!("{}: {}", error.field, error.message))
}

/// `from` reaches an app of `to` at this address, and each sees the other as it is.
fn reaches(from: &Ns, to: &Ns, target: SocketAddr) -> Result<(TcpStream, TcpStream)> {
    let listener = to.run(move || Ok(TcpListener::bind(target)?))?;
    let mut client = from.run(move || Ok(TcpStream::connect_timeout(&target, LIMIT)?))?;
    client.write_all(b"past")?;
    let (mut server, peer) = listener.accept()?;
    assert_eq!((peer, client.peer_addr()?), (client.local_addr()?, target));
    let mut text = [0; 4];
    server.set_read_timeout(Some(LIMIT))?;
    server.read_exact(&mut text)?;
    assert_eq!(&text, b"past");
    // A child of another test, between its fork and its exec, would have it open still, and the address with it.
    alone(move || drop(listener));
    Ok((client, server))
}

fn captured_out(world: &World, target: SocketAddr) -> Result<()> {
    let _client = world.pod.run(move || Ok(TcpStream::connect_timeout(&target, LIMIT)?))?;
    assert_eq!(world.accept(Listener::Outbound)?.original_dst, target);
    Ok(())
}

fn captured_in(world: &World, target: SocketAddr) -> Result<()> {
    let _client = world.peer.run(move || Ok(TcpStream::connect_timeout(&target, LIMIT)?))?;
    assert_eq!(world.accept(Listener::Inbound)?.original_dst, target);
    Ok(())
}

/// The flow of this connection of the pod, in the kernel's tables.
fn flow(world: &World, local: SocketAddr, remote: SocketAddr) -> Result<FlowRecord> {
    let flows = inspect::read_flows(&world.agent.config.bpf_dir)?;
    let mut found =
        flows.into_iter().filter(|flow| flow.local == local.into() && flow.remote == remote.into());
    let one = found.next();
    ensure!(found.next().is_none(), "two flows of one connection");
    one.ok_or_else(|| anyhow::anyhow!("no flow from {local} to {remote}"))
}

#[test]
fn outbound_ports_pass_untouched() -> Result<()> {
    let world = World::asking(asked(&[("exclude-outbound-ports", "7000,7010-7012")])?)?;
    for (port, ip) in [(7000, PEER4), (7000, PEER6), (7010, PEER4), (7012, PEER6)] {
        let target = addr(ip, port)?;
        let (client, _server) = reaches(&world.pod, &world.peer, target)?;
        let flow = flow(&world, client.local_addr()?, target)?;
        assert_eq!((flow.verdict, flow.direction), (verdict::EXCLUDED, direction::OUTBOUND));
    }
    for port in [6999, 7001, 7009, 7013] {
        captured_out(&world, addr(PEER4, port)?)?;
    }
    Ok(())
}

#[test]
fn outbound_cidrs_pass_untouched() -> Result<()> {
    let world = World::asking(asked(&[("exclude-outbound-cidrs", "10.77.0.0/24,fd00:77::1/128")])?)?;
    for ip in [PEER4, PEER6] {
        let target = addr(ip, 7000)?;
        let (client, _server) = reaches(&world.pod, &world.peer, target)?;
        assert_eq!(flow(&world, client.local_addr()?, target)?.verdict, verdict::EXCLUDED);
    }
    // By way of an IPv6 socket too.
    let mapped = addr("::ffff:10.77.0.1", 7000)?;
    let listener = world.peer.run(|| Ok(TcpListener::bind(addr(PEER4, 7000)?)?))?;
    let client = world.pod.run(move || Ok(TcpStream::connect_timeout(&mapped, LIMIT)?))?;
    assert_eq!(listener.accept()?.1.port(), client.local_addr()?.port());
    for ip in ["10.77.1.1", "fd00:77::3", "fd00:78::1"] {
        captured_out(&world, addr(ip, 7000)?)?;
    }
    // All of one family is none of the other.
    let world = World::asking(asked(&[("exclude-outbound-cidrs", "::/0")])?)?;
    reaches(&world.pod, &world.peer, addr(PEER6, 7000)?)?;
    captured_out(&world, addr(PEER4, 7000)?)
}

#[test]
fn inbound_ports_pass_untouched() -> Result<()> {
    let world = World::asking(asked(&[("exclude-inbound-ports", "8080,9000-9001")])?)?;
    for (port, ip) in [(8080, POD4), (8080, POD6), (9000, POD4), (9001, POD6)] {
        let target = addr(ip, port)?;
        let (client, _server) = reaches(&world.peer, &world.pod, target)?;
        let flow = flow(&world, target, client.local_addr()?)?;
        assert_eq!((flow.verdict, flow.direction), (verdict::EXCLUDED, direction::INBOUND));
    }
    for port in [8079, 8081, 8999, 9002] {
        captured_in(&world, addr(POD4, port)?)?;
    }
    // Outbound has its own list.
    captured_out(&world, addr(PEER4, 8080)?)
}

#[test]
fn inbound_cidrs_are_of_who_dials_and_never_take_the_mesh_port() -> Result<()> {
    let world = World::asking(asked(&[("exclude-inbound-cidrs", "10.77.0.1,2001:db8::/32")])?)?;
    let target = addr(POD4, 8080)?;
    let (client, _server) = reaches(&world.peer, &world.pod, target)?;
    assert_eq!(flow(&world, target, client.local_addr()?)?.verdict, verdict::EXCLUDED);
    captured_in(&world, addr(POD6, 8080)?)?;

    let mesh = addr(POD4, Listener::Mesh.port())?;
    let _client = world.peer.run(move || Ok(TcpStream::connect_timeout(&mesh, LIMIT)?))?;
    assert_eq!(world.accept(Listener::Mesh)?.original_dst, mesh);
    Ok(())
}

#[test]
fn a_change_is_for_new_connections_and_loses_none() -> Result<()> {
    let world = World::new()?;
    let target = addr(PEER4, 7000)?;
    let mut before = world.pod.run(move || Ok(TcpStream::connect_timeout(&target, LIMIT)?))?;
    let held = world.accept(Listener::Outbound)?;

    let change = |annotations: &[(&str, &str)]| {
        let workload = workload_as(world.pod.path(), &[POD4, POD6], asked(annotations)?)?;
        world.agent.capture()?.update(&world.net, &workload)
    };
    change(&[("exclude-outbound-ports", "7000"), ("exclude-inbound-cidrs", "0.0.0.0/0")])?;
    let (mut past, mut server) = reaches(&world.pod, &world.peer, target)?;
    reaches(&world.peer, &world.pod, addr(POD4, 8080)?)?;
    // Another subnet in place of the first.
    change(&[("exclude-inbound-cidrs", "192.0.2.0/24"), ("exclude-outbound-cidrs", "10.77.0.0/16")])?;
    captured_in(&world, addr(POD4, 8080)?)?;
    reaches(&world.pod, &world.peer, addr(PEER4, 7001)?)?;
    change(&[])?;
    captured_out(&world, target)?;
    captured_in(&world, addr(POD4, 8080)?)?;
    for map in ["POLICIES", "EXCLUDED_CIDRS"] {
        let left = inspect::dump(&world.agent.config.bpf_dir, map)?.entries;
        ensure!(left.is_empty(), "{map}: {left:?}");
    }

    // What was open is as it was.
    before.write_all(b"before")?;
    let mut text = [0; 6];
    world.agent.rt.block_on(async {
        let mut stream = tokio::net::TcpStream::from_std(held.stream)?;
        tokio::io::AsyncReadExt::read_exact(&mut stream, &mut text).await
    })?;
    assert_eq!(&text, b"before");
    past.write_all(b"still!")?;
    server.read_exact(&mut text)?;
    assert_eq!(&text, b"still!");
    Ok(())
}

#[test]
fn maps_show_what_is_excluded_and_a_pod_that_leaves_takes_it_along() -> Result<()> {
    let annotations = [("exclude-outbound-ports", "7000-7001"), ("exclude-outbound-cidrs", "192.0.2.0/24")];
    let world = World::asking(asked(&annotations)?)?;
    let text = |map| {
        Ok::<_, anyhow::Error>(serde_json::to_string(&inspect::dump(&world.agent.config.bpf_dir, map)?)?)
    };
    let policies = text("POLICIES")?;
    ensure!(policies.contains("7000") && policies.contains("7001"), "{policies}");
    let cidrs = text("EXCLUDED_CIDRS")?;
    ensure!(cidrs.contains("192.0.2.0"), "{cidrs}");
    world.agent.un_enrol(&world.net)?;
    for map in ["POLICIES", "EXCLUDED_CIDRS", "PODS"] {
        ensure!(inspect::dump(&world.agent.config.bpf_dir, map)?.entries.is_empty(), "{map}");
    }
    Ok(())
}

#[test]
fn one_pods_wishes_are_not_anothers() -> Result<()> {
    let world = World::asking(asked(&[
        ("exclude-outbound-ports", "1-65535"),
        ("exclude-outbound-cidrs", "0.0.0.0/0"),
        ("exclude-inbound-cidrs", "0.0.0.0/0,::/0"),
    ])?)?;
    let (pod, peer) = crate::world::pair()?;
    let net = world.agent.enrol(&pod, &[POD4, POD6])?;
    let (out, into) = (addr(PEER4, 7000)?, addr(POD6, 7000)?);
    let _client = pod.run(move || Ok(TcpStream::connect_timeout(&out, LIMIT)?))?;
    assert_eq!(world.agent.accept(&net, Listener::Outbound)?.original_dst, out);
    let _client = peer.run(move || Ok(TcpStream::connect_timeout(&into, LIMIT)?))?;
    assert_eq!(world.agent.accept(&net, Listener::Inbound)?.original_dst, into);
    world.agent.un_enrol(&net)?;
    Ok(())
}
