//! What arrives at an enrolled pod.

use std::{
    io::Read as _,
    net::{SocketAddr, TcpListener, TcpStream},
};

use anyhow::Result;
use mesh_agent::capture::Listener;

use crate::world::{LIMIT, PEER4, PEER6, POD4, POD6, World, addr, join};

#[test]
fn plaintext_comes_to_the_agent_whoever_listens() -> Result<()> {
    let world = World::new()?;
    // One port with an app behind it, one without.
    let app = world.pod.run(|| Ok(TcpListener::bind("[::]:8080")?))?;
    app.set_nonblocking(true)?;
    for (pod, peer) in [(POD4, PEER4), (POD6, PEER6)] {
        for port in [8080, 8081] {
            let dst = addr(pod, port)?;
            let client = world.peer.run(move || Ok(TcpStream::connect_timeout(&dst, LIMIT)?))?;
            let captured = world.accept(Listener::Inbound)?;
            assert_eq!(captured.original_dst, dst);
            assert_eq!(captured.client, client.local_addr()?);
            assert_eq!(captured.client.ip().to_string(), peer);
        }
    }
    assert!(app.accept().is_err(), "the app was reached past the agent");
    Ok(())
}

#[test]
fn port_15008_comes_to_the_mesh_listener() -> Result<()> {
    let world = World::new()?;
    for pod in [POD4, POD6] {
        let dst = addr(pod, 15008)?;
        let client = world.peer.run(move || Ok(TcpStream::connect_timeout(&dst, LIMIT)?))?;
        let captured = world.accept(Listener::Mesh)?;
        assert_eq!((captured.original_dst, captured.client), (dst, client.local_addr()?));
    }
    Ok(())
}

#[test]
fn the_agents_plaintext_ports_serve_nobody() -> Result<()> {
    let world = World::new()?;
    let dialled = world.peer.spawn(|| {
        for port in [15001, 15006] {
            let mut client = TcpStream::connect_timeout(&addr(POD4, port)?, LIMIT)?;
            client.set_read_timeout(Some(LIMIT))?;
            assert_eq!(client.read(&mut [0; 1])?, 0, "{port}: closed, not served");
        }
        Ok(TcpStream::connect_timeout(&addr(POD4, 80)?, LIMIT)?)
    });
    assert_eq!(world.accept(Listener::Inbound)?.original_dst, addr(POD4, 80)?);
    join(dialled).map(drop)
}

/// The agent dials the app for a client; the app has to see that client.
fn app_sees(bind: &str, dials: &str, client: &str, sees: &str) -> Result<()> {
    let world = World::new()?;
    let (bind, client): (SocketAddr, SocketAddr) = (bind.parse()?, client.parse()?);
    let sees: SocketAddr = sees.parse()?;
    let app = world.pod.run(move || Ok(TcpListener::bind(bind)?))?;
    let stream = world.agent.rt.block_on(world.net.dial_app(addr(dials, bind.port())?, client))?;
    let (accepted, peer) = app.accept()?;
    assert_eq!(peer, sees, "accept");
    assert_eq!(accepted.peer_addr()?, sees, "getpeername");
    assert_eq!(accepted.local_addr()?.ip().to_canonical().to_string(), dials, "getsockname");
    let from = stream.local_addr()?.ip();
    assert!(from.is_loopback() || from.to_string() == dials, "only the pod itself has {from}");
    assert_eq!(stream.peer_addr()?.ip().to_string(), dials, "the agent sees the plain truth");
    Ok(())
}

#[test]
fn an_app_sees_its_client_over_ipv4() -> Result<()> {
    app_sees("0.0.0.0:9000", POD4, "203.0.113.5:4444", "203.0.113.5:4444")
}

#[test]
fn an_app_on_both_families_sees_its_client_mapped() -> Result<()> {
    app_sees("[::]:9000", POD4, "203.0.113.5:4444", "[::ffff:203.0.113.5]:4444")
}

#[test]
fn an_app_sees_its_client_over_ipv6() -> Result<()> {
    app_sees("[::]:9000", POD6, "[2001:db8::5]:4444", "[2001:db8::5]:4444")
}

#[test]
fn an_app_on_the_pods_address_alone_is_found() -> Result<()> {
    app_sees("10.77.0.2:9000", POD4, "203.0.113.5:4444", "203.0.113.5:4444")
}

#[test]
fn apps_are_dialled_from_many_addresses() -> Result<()> {
    let world = World::new()?;
    let app = world.pod.run(|| Ok(TcpListener::bind("0.0.0.0:9000")?))?;
    let mut sources = std::collections::HashSet::new();
    let mut open = Vec::new();
    for _ in 0..20 {
        let client = addr("203.0.113.5", 4444)?;
        let stream = world.agent.rt.block_on(world.net.dial_app(addr(POD4, 9000)?, client))?;
        sources.insert(stream.local_addr()?.ip());
        open.push((stream, app.accept()?));
    }
    assert_eq!(sources.len(), 20);
    Ok(())
}
