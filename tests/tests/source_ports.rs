//! A pod's connections do not run out of ports, and none is taken for another, however many there are: those that its
//! apps open to many destinations, and those that the agent opens to one of its apps. With SYN cookies too. Apart from the
//! other tests of capture: so many connections take all of the machine.

#[path = "capture/world.rs"]
#[allow(dead_code, reason = "the world of the other tests of capture, of which these need a part")]
mod world;

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    sync::Arc,
};

use anyhow::{Context as _, Result, ensure};
use lab::Parking;
use mesh_agent::capture::{Listener, PodNet};
use tokio::task::JoinSet;

use crate::world::{LIMIT, POD4, POD6, World, addr, join};

/// Connections that are open at the same time.
const LIVE: usize = 40_000;
/// Connections that end as soon as they have had their answer.
const QUICK: usize = 100_000;
/// Whom they go to, each with as many as any other.
const DESTINATIONS: usize = 400;
/// Threads of an app.
const THREADS: usize = 4;
/// Connections of the agent to one app at the same time, by family: IPv6 has one loopback address of 28,232 ports.
const TO_ONE_APP: [(&str, usize); 2] = [(POD4, 8_000), (POD6, 32_000)];
fn destination(n: usize) -> Result<SocketAddr> {
    let host = u8::try_from(n / 2 % (DESTINATIONS / 2))?;
    let ip = if n.is_multiple_of(2) {
        IpAddr::V4(Ipv4Addr::new(192, 0, 2, host))
    } else {
        IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, host.into()))
    };
    Ok(SocketAddr::new(ip, 8080))
}

/// Opens connections, one after the other, and hears from each where it went.
fn dial(range: std::ops::Range<usize>, mut keep: Option<Parking>) -> Result<Option<Parking>> {
    for n in range {
        let to = destination(n)?;
        let mut stream = TcpStream::connect_timeout(&to, LIMIT).with_context(|| format!("{n}: {to}"))?;
        stream.set_read_timeout(Some(LIMIT))?;
        let wanted = to.to_string();
        let mut heard = vec![0; wanted.len()];
        stream.read_exact(&mut heard).with_context(|| format!("{n}: {to}"))?;
        ensure!(heard == wanted.as_bytes(), "{n}: {to} was {}", String::from_utf8_lossy(&heard));
        if let Some(parking) = &mut keep {
            parking.park(stream)?;
        }
    }
    Ok(keep)
}

/// The agent: tells every connection what it was meant for. Keeps the first `live` of them.
async fn tell(net: Arc<PodNet>, live: usize, all: usize) -> Result<Parking> {
    let mut parking = Parking::default();
    for n in 0..all {
        let captured = net.accept(Listener::Outbound).await?;
        let stream = captured.stream;
        (&stream).write_all(captured.original_dst.to_string().as_bytes())?;
        if n < live {
            parking.park(stream)?;
        }
    }
    Ok(parking)
}

/// The app's part, on several threads in the pod.
fn dial_all(world: &World, count: usize, keep: bool) -> Result<Vec<Option<Parking>>> {
    let share = count / THREADS;
    let threads: Vec<_> = (0..THREADS)
        .map(|thread| {
            let keep = keep.then(Parking::default);
            world.pod.spawn(move || dial(thread * share..(thread + 1) * share, keep))
        })
        .collect();
    threads.into_iter().map(join).collect()
}

#[test]
fn forty_thousand_live_and_a_hundred_thousand_quick_connections_each_reach_their_own() -> Result<()> {
    let world = World::new()?;
    let agent = world.agent.rt.spawn(tell(Arc::clone(&world.net), LIVE, LIVE + QUICK));
    let live = dial_all(&world, LIVE, true)?;
    dial_all(&world, QUICK, false)?;
    let at_the_agent = world.agent.rt.block_on(agent)??;
    // None of the live ones has been closed meanwhile.
    let listed = world.pod.run(|| Ok(std::fs::read_to_string("/proc/thread-self/net/sockstat")?))?;
    let in_use = listed.split("TCP: inuse ").nth(1).and_then(|rest| rest.split(' ').next());
    let in_use: usize = in_use.with_context(|| format!("no sockets in {listed}"))?.parse()?;
    ensure!(in_use >= LIVE / 2, "{listed}");
    drop((live, at_the_agent));
    Ok(())
}

/// The app's part: accepts this many, and keeps each whose client is the one expected.
fn accept_all(listener: &TcpListener, count: usize, client: IpAddr) -> Result<Parking> {
    let mut parking = Parking::default();
    let mut seen = vec![false; count];
    for _ in 0..count {
        let (stream, peer) = listener.accept()?;
        ensure!(peer.ip().to_canonical() == client, "{peer} is not {client}");
        // Its port is the number of the connection, from 1024.
        let n = usize::from(peer.port()).checked_sub(1024).filter(|n| *n < count);
        let n = n.with_context(|| format!("nobody has {peer}"))?;
        ensure!(!std::mem::replace(&mut seen[n], true), "{peer} came twice");
        parking.park(stream)?;
    }
    Ok(parking)
}

/// The agent's part: dials for one client after the other, several at a time.
async fn dial_app(net: Arc<PodNet>, to: SocketAddr, client: IpAddr, count: usize) -> Result<Parking> {
    let mut parking = Parking::default();
    let mut dialling = JoinSet::new();
    for n in 0..count {
        let (net, client) = (Arc::clone(&net), SocketAddr::new(client, u16::try_from(1024 + n)?));
        dialling.spawn(async move { net.dial_app(to, client).await });
        if dialling.len() == 64
            && let Some(stream) = dialling.join_next().await
        {
            parking.park(stream??.into_std()?)?;
        }
    }
    while let Some(stream) = dialling.join_next().await {
        parking.park(stream??.into_std()?)?;
    }
    Ok(parking)
}

#[test]
fn forty_thousand_connections_of_the_agent_to_one_app_each_show_their_own_client() -> Result<()> {
    let world = World::new()?;
    let mut open = Vec::new();
    for (own, count) in TO_ONE_APP {
        let to = addr(own, 9000)?;
        let client: IpAddr = if to.is_ipv4() { [203, 0, 113, 5].into() } else { "2001:db8::5".parse()? };
        let listener = world.pod.run(move || Ok(TcpListener::bind(to)?))?;
        let app = std::thread::spawn(move || accept_all(&listener, count, client));
        let agent = dial_app(Arc::clone(&world.net), to, client, count);
        open.push(world.agent.rt.block_on(agent).with_context(|| format!("{count} to {to}"))?);
        open.push(join(app)?);
    }
    Ok(())
}

#[test]
fn syn_cookies() -> Result<()> {
    const EACH: usize = 200;
    let world = World::new()?;
    // Always, not only when the queue is full.
    world.pod.sysctl("net.ipv4.tcp_syncookies", "2")?;
    let agent = world.agent.rt.spawn(tell(Arc::clone(&world.net), 0, EACH));
    dial_all(&world, EACH, false)?;
    world.agent.rt.block_on(agent)??;
    for own in [POD4, POD6] {
        let to = addr(own, 9000)?;
        let client: IpAddr = "2001:db8::5".parse()?;
        let client = if to.is_ipv4() { [203, 0, 113, 5].into() } else { client };
        let listener = world.pod.run(move || Ok(TcpListener::bind(to)?))?;
        let app = std::thread::spawn(move || accept_all(&listener, EACH, client));
        world.agent.rt.block_on(dial_app(Arc::clone(&world.net), to, client, EACH))?;
        join(app)?;
        let dialled = world.peer.run(move || Ok(TcpStream::connect_timeout(&to, LIMIT)?))?;
        let captured = world.accept(Listener::Inbound)?;
        assert_eq!((captured.original_dst, captured.client), (to, dialled.local_addr()?));
    }
    let cookies = world.pod.counter("SyncookiesRecv")?;
    ensure!(cookies as usize >= 3 * EACH + 2, "{cookies} cookies came back");
    Ok(())
}
