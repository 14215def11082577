//! Coming, going, crashing, and two agents side by side.

use std::net::{TcpListener, TcpStream};

use anyhow::{Context as _, Result};
use mesh_agent::capture::{Capture, CaptureConfig, Listener};

use crate::world::{Agent, LIMIT, Ns, PEER4, POD4, POD6, World, addr, alone, pair, workload};

/// The pod and its neighbour reach each other as if there were no mesh.
fn untouched(pod: &Ns, peer: &Ns) -> Result<()> {
    for (from, to, ip) in [(pod, peer, PEER4), (peer, pod, POD4)] {
        let target = addr(ip, 7001)?;
        let listener = to.run(move || Ok(TcpListener::bind(target)?))?;
        let client = from.run(move || Ok(TcpStream::connect_timeout(&target, LIMIT)?))?;
        assert_eq!(listener.accept()?.1, client.local_addr()?);
        assert_eq!(client.peer_addr()?, target);
    }
    // And the three ports are free.
    pod.run(|| {
        for listener in Listener::ALL {
            TcpListener::bind(("0.0.0.0", listener.port())).with_context(|| format!("{listener:?}"))?;
        }
        Ok(())
    })
}

#[test]
fn un_enrolling_leaves_nothing() -> Result<()> {
    let mut world = World::new()?;
    let dst = addr("192.0.2.10", 80)?;
    let client = world.pod.run(move || Ok(TcpStream::connect_timeout(&dst, LIMIT)?))?;
    let captured = world.accept(Listener::Outbound)?;
    world.agent.un_enrol(&world.net)?;

    let ended = world.agent.rt.block_on(world.net.accept(Listener::Outbound));
    assert!(ended.is_err_and(|error| error.kind() == std::io::ErrorKind::NotConnected));
    untouched(&world.pod, &world.peer)?;
    assert!(world.agent.capture()?.enrolled().is_empty());
    assert_eq!(std::fs::read_dir(world.agent.config.bpf_dir.join("pods"))?.count(), 0);
    drop((client, captured));

    // It may come back.
    let again = world.agent.enrol(&world.pod, &[POD4])?;
    let _client = world.pod.run(move || Ok(TcpStream::connect_timeout(&dst, LIMIT)?))?;
    assert_eq!(world.agent.accept(&again, Listener::Outbound)?.original_dst, dst);
    world.agent.remove()?;
    untouched(&world.pod, &world.peer)
}

#[test]
fn two_agents_side_by_side() -> Result<()> {
    let (one, two) = (World::new()?, World::new()?);
    for (n, world) in [&one, &two].into_iter().enumerate() {
        let dst = addr("192.0.2.10", 80 + u16::try_from(n)?)?;
        let _client = world.pod.run(move || Ok(TcpStream::connect_timeout(&dst, LIMIT)?))?;
        assert_eq!(world.accept(Listener::Outbound)?.original_dst, dst);
    }
    // The end of one does not touch the other.
    let mut one = one;
    one.agent.remove()?;
    let dst = addr("192.0.2.10", 90)?;
    let _client = two.pod.run(move || Ok(TcpStream::connect_timeout(&dst, LIMIT)?))?;
    assert_eq!(two.accept(Listener::Outbound)?.original_dst, dst);
    Ok(())
}

#[test]
fn one_directory_serves_one_agent() -> Result<()> {
    let agent = Agent::new()?;
    let error = Capture::load(&agent.config).map(drop);
    assert!(error.is_err_and(|error| error.to_string().contains("another agent")));
    let error = mesh_agent::capture::clean(&agent.config.bpf_dir);
    assert!(error.is_err_and(|error| error.to_string().contains("another agent")));
    Ok(())
}

#[test]
fn a_crash_fails_closed_and_the_next_agent_takes_over() -> Result<()> {
    let World { net, mut agent, pod, peer } = World::new()?;
    agent.crash([net]);
    let (out, into) = (addr(PEER4, 7000)?, addr(POD4, 7000)?);
    // Both would be served if they got through.
    let listeners =
        (peer.run(move || Ok(TcpListener::bind(out)?))?, pod.run(move || Ok(TcpListener::bind(into)?))?);
    let refused = |result: std::io::Result<TcpStream>| {
        Ok(result.map(drop).map_err(|error| error.kind()) == Err(std::io::ErrorKind::ConnectionRefused))
    };
    assert!(pod.run(move || refused(TcpStream::connect_timeout(&out, LIMIT)))?, "out, in the clear");
    assert!(peer.run(move || refused(TcpStream::connect_timeout(&into, LIMIT)))?, "in, in the clear");

    agent.restart()?;
    let net = agent.enrol(&pod, &[POD4, POD6])?;
    let _client = pod.run(move || Ok(TcpStream::connect_timeout(&out, LIMIT)?))?;
    assert_eq!(agent.accept(&net, Listener::Outbound)?.original_dst, out);
    agent.crash([net]);
    mesh_agent::capture::clean(&agent.config.bpf_dir)?;
    assert!(!agent.config.bpf_dir.exists());
    drop(listeners);
    untouched(&pod, &peer)
}

#[test]
fn a_pod_that_uses_our_port_is_refused_alone() -> Result<()> {
    let world = World::new()?;
    let (squatter, neighbour) = pair()?;
    let taken = squatter.run(|| Ok(TcpListener::bind("127.0.0.1:15006")?))?;
    let error = alone(|| world.agent.enrol(&squatter, &[POD4]).map(drop));
    let error = error.map_err(|error| format!("{error:#}"));
    assert!(
        error.as_ref().is_err_and(|text| text.contains("default/pod") && text.contains("15006")),
        "{error:?}"
    );
    alone(|| drop(taken));
    untouched(&squatter, &neighbour)?;
    assert_eq!(world.agent.capture()?.enrolled().len(), 1);
    Ok(())
}

#[test]
fn one_namespace_is_one_pod() -> Result<()> {
    let world = World::new()?;
    let error = world.agent.enrol(&world.pod, &[POD4]).map(drop).map_err(|error| format!("{error:#}"));
    assert!(error.is_err_and(|text| text.contains("which is enrolled")));
    // The one that is enrolled has not lost anything.
    let dst = addr("192.0.2.10", 80)?;
    let _client = world.pod.run(move || Ok(TcpStream::connect_timeout(&dst, LIMIT)?))?;
    assert_eq!(world.accept(Listener::Outbound)?.original_dst, dst);
    Ok(())
}

#[test]
fn a_namespace_that_is_gone_disturbs_nobody() -> Result<()> {
    let world = World::new()?;
    let (gone, neighbour) = pair()?;
    let path = gone.path();
    let net = world.agent.enrol(&gone, &[POD4])?;
    gone.vanish()?;
    drop(neighbour);
    assert!(!path.exists());
    world.agent.un_enrol(&net)?;

    let _inside = world.agent.rt.enter();
    let error = world.agent.capture()?.enrol(workload(path, &[POD4])?).map(drop);
    assert!(error.map_err(|error| format!("{error:#}")).is_err_and(|text| text.contains("/run/netns/")));
    assert_eq!(world.agent.capture()?.enrolled().len(), 1);
    Ok(())
}

#[test]
fn the_hooks_are_proved_to_fire() -> Result<()> {
    let mut agent = Agent::new()?;
    agent.capture()?.prove()?;
    // A cgroup this process is not in.
    let elsewhere = agent.config.cgroup_root.clone().context("named")?.with_extension("elsewhere");
    std::fs::create_dir(&elsewhere)?;
    agent.remove()?;
    let config = CaptureConfig { cgroup_root: Some(elsewhere.clone()), ..agent.config.clone() };
    let proved = {
        let _inside = agent.rt.enter();
        let capture = Capture::load(&config)?;
        let proved = capture.prove();
        capture.remove()?;
        proved
    };
    std::fs::remove_dir(&elsewhere)?;
    assert!(proved.is_err_and(|error| error.to_string().contains("--cgroup-root")));
    Ok(())
}
