//! What an app of an enrolled pod dials.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
};

use anyhow::Result;
use mesh_agent::capture::Listener;

use crate::world::{LIMIT, Ns, PEER4, PEER6, POD4, POD6, World, addr, join, pair};

/// Dials from the pod and checks what both sides see.
fn captured(dials: SocketAddr, canonical: SocketAddr, own: &str) -> Result<()> {
    let world = World::new()?;
    let app = world.pod.run(move || Ok(TcpStream::connect_timeout(&dials, LIMIT)?))?;
    let captured = world.accept(Listener::Outbound)?;
    assert_eq!(captured.original_dst, canonical);
    assert_eq!(app.peer_addr()?, dials, "the app's getpeername");
    assert_eq!(
        app.local_addr()?.ip().to_canonical(),
        own.parse::<std::net::IpAddr>()?,
        "the app's getsockname"
    );
    assert_eq!(captured.client.port(), app.local_addr()?.port());
    assert_eq!(captured.client.ip(), app.local_addr()?.ip().to_canonical());
    assert!(captured.stream.nodelay()?);
    Ok(())
}

#[test]
fn ipv4() -> Result<()> {
    captured(addr("192.0.2.10", 8080)?, addr("192.0.2.10", 8080)?, POD4)
}

#[test]
fn ipv6() -> Result<()> {
    captured(addr("2001:db8::10", 8080)?, addr("2001:db8::10", 8080)?, POD6)
}

#[test]
fn ipv4_on_an_ipv6_socket() -> Result<()> {
    captured(addr("::ffff:192.0.2.10", 8080)?, addr("192.0.2.10", 8080)?, POD4)
}

#[test]
fn a_client_that_is_gone_already_still_has_a_destination() -> Result<()> {
    let world = World::new()?;
    for n in 0..50 {
        let dst = addr("192.0.2.10", 8000 + n)?;
        world.pod.run(move || {
            let mut app = TcpStream::connect_timeout(&dst, LIMIT)?;
            Ok(app.write_all(b"bye")?)
        })?;
        let captured = world.accept(Listener::Outbound)?;
        assert_eq!(captured.original_dst, dst);
        let text = world.agent.rt.block_on(async {
            let mut text = String::new();
            let mut stream = tokio::net::TcpStream::from_std(captured.stream)?;
            tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut text).await.map(|_| text)
        })?;
        assert_eq!(text, "bye");
    }
    Ok(())
}

#[test]
fn one_source_port_to_many_destinations() -> Result<()> {
    let world = World::new()?;
    let app = world.pod.run(|| {
        let mut open = Vec::new();
        for n in 0..20 {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
            socket.set_reuse_address(true)?;
            socket.bind(&addr(POD4, 40_000)?.into())?;
            socket.connect(&addr("192.0.2.10", 9000 + n)?.into())?;
            open.push(socket);
        }
        Ok(open)
    })?;
    let mut seen = Vec::new();
    for _ in &app {
        let captured = world.accept(Listener::Outbound)?;
        assert_eq!(captured.client.port(), 40_000);
        seen.push(captured.original_dst.port());
    }
    seen.sort_unstable();
    assert_eq!(seen, (9000..9020).collect::<Vec<_>>());
    Ok(())
}

#[test]
fn a_socket_used_again_is_seen_anew() -> Result<()> {
    let mut world = World::new()?;
    let dst = addr("192.0.2.10", 80)?;
    let (socket, bound) = world.pod.run(move || {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        let bound = TcpListener::bind("127.0.0.1:0")?;
        let nobody = addr("127.0.0.1", 1)?;
        assert!(socket.connect(&nobody.into()).is_err());
        socket.connect(&dst.into())?;
        assert_eq!(socket.peer_addr()?.as_socket(), Some(dst));
        let again = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        Ok((again, bound))
    })?;
    assert_eq!(world.accept(Listener::Outbound)?.original_dst, dst);
    world.agent.crash([world.net]);
    // Captured and refused; then to loopback, where its first destination must be forgotten.
    assert!(socket.connect_timeout(&dst.into(), LIMIT).is_err());
    let own = bound.local_addr()?;
    // A connect that was refused while nobody waited for it is reported once more, as aborted (connect(2)).
    if socket.connect(&own.into()).is_err() {
        socket.connect(&own.into())?;
    }
    assert_eq!(socket.peer_addr()?.as_socket(), Some(own));
    Ok(())
}

#[test]
fn the_pod_itself_and_loopback_are_left_alone() -> Result<()> {
    let world = World::new()?;
    for ip in [POD4, POD6, "127.0.0.1", "::1", "0.0.0.0"] {
        let (client, accepted) = world.pod.run(move || {
            let listener = TcpListener::bind(addr(if ip == "0.0.0.0" { "127.0.0.1" } else { ip }, 9000)?)?;
            let client = TcpStream::connect_timeout(&SocketAddr::new(ip.parse()?, 9000), LIMIT)?;
            Ok((client, listener.accept()?.1))
        })?;
        assert_eq!(accepted, client.local_addr()?, "{ip}");
    }
    Ok(())
}

#[test]
fn the_agents_own_dialling_leaves_the_pod() -> Result<()> {
    let world = World::new()?;
    for (pod, peer) in [(POD4, PEER4), (POD6, PEER6)] {
        let target = addr(peer, 7000)?;
        let listener = world.peer.run(move || Ok(TcpListener::bind(target)?))?;
        let stream = world.agent.rt.block_on(world.net.dial(target))?;
        let (_, from) = listener.accept()?;
        assert_eq!(from, stream.local_addr()?);
        assert_eq!(from.ip().to_string(), pod);
        assert!(stream.nodelay()?);
    }
    Ok(())
}

#[test]
fn the_outbound_port_itself_serves_nobody() -> Result<()> {
    let world = World::new()?;
    let app = world.pod.spawn(|| {
        for ip in [POD4, POD6, "127.0.0.1"] {
            let mut app = TcpStream::connect_timeout(&addr(ip, 15001)?, LIMIT)?;
            app.set_read_timeout(Some(LIMIT))?;
            assert_eq!(app.read(&mut [0; 1])?, 0, "{ip}: closed, not served");
        }
        // This one is, so that the test knows all before were not.
        Ok(TcpStream::connect_timeout(&addr("192.0.2.10", 80)?, LIMIT)?)
    });
    assert_eq!(world.accept(Listener::Outbound)?.original_dst, addr("192.0.2.10", 80)?);
    join(app).map(drop)
}

#[test]
fn a_pod_that_is_not_enrolled_is_left_alone() -> Result<()> {
    let world = World::new()?;
    let (other, neighbour): (Ns, Ns) = pair()?;
    let target = addr(PEER4, 7000)?;
    let listener = neighbour.run(move || Ok(TcpListener::bind(target)?))?;
    let client = other.run(move || Ok(TcpStream::connect_timeout(&target, LIMIT)?))?;
    assert_eq!(listener.accept()?.1, client.local_addr()?);
    assert_eq!(client.peer_addr()?, target);
    drop(world);
    Ok(())
}
