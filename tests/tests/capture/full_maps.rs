//! A full table of a pod never loses what is in it: what does not fit is refused at once, or is not recorded, and is
//! counted; nobody else is given what was meant for the agent.

use std::{
    io::{ErrorKind, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use mesh_agent::capture::{Captured, Listener, Losses, PodTables};
use mesh_common::decide;

use crate::world::{Agent, LIMIT, PEER4, POD4, POD6, World, addr, pair};

fn with_tables(tables: PodTables) -> Result<World> {
    let (pod, peer) = pair()?;
    let mut agent = Agent::new()?;
    agent.config.tables = tables;
    agent.crash([]);
    agent.restart()?;
    let net = agent.enrol(&pod, &[POD4, POD6])?;
    Ok(World { net, agent, pod, peer })
}

fn counted(losses: &mut Losses, reason: &str) -> Result<u64> {
    let since = losses.since()?;
    let one = since.iter().find(|(one, _)| one.word == reason).context("no such reason")?;
    Ok(one.1)
}

fn dial(world: &World, to: SocketAddr) -> Result<std::io::Result<TcpStream>> {
    world.pod.run(move || Ok(TcpStream::connect_timeout(&to, LIMIT)))
}

fn kind_of<T>(result: std::io::Result<T>) -> Option<ErrorKind> {
    result.err().map(|error| error.kind())
}

/// Tries until it works, for as long as an entry that was given up takes to go.
fn once<T>(mut attempt: impl FnMut() -> Result<std::io::Result<T>>) -> Result<T> {
    let deadline = Instant::now() + LIMIT;
    loop {
        match attempt()? {
            Ok(done) => return Ok(done),
            Err(error) => ensure!(Instant::now() < deadline, "still refused: {error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn an_original_destination_stays_as_long_as_its_connection() -> Result<()> {
    let world = with_tables(PodTables { max_captured_connections_per_pod: 4, ..PodTables::default() })?;
    let mut losses = world.agent.capture()?.losses()?;
    let (to, more) = (|n: u16| addr("192.0.2.10", 8000 + n), addr("192.0.2.10", 9000)?);
    let mut open = Vec::new();
    for n in 0..4 {
        open.push(dial(&world, to(n)?)?.context("within the table")?);
    }
    // Where the one too many would be sent, an app listens: it must not get it.
    let hashed = addr(POD4, decide::hash_port(&more.into(), decide::HASH_PORTS))?;
    let app = world.pod.run(move || Ok(TcpListener::bind(hashed)?))?;
    app.set_nonblocking(true)?;
    for _ in 0..100 {
        assert_eq!(kind_of(dial(&world, more)?), Some(ErrorKind::ConnectionRefused));
    }
    assert_eq!(kind_of(app.accept()), Some(ErrorKind::WouldBlock), "given to an app");
    assert_eq!(counted(&mut losses, "captured_connections_full")?, 100);
    // Read only now: none was evicted meanwhile.
    let held: Vec<Captured> = (0..4).map(|_| world.accept(Listener::Outbound)).collect::<Result<_>>()?;
    let mut seen: Vec<_> = held.iter().map(|captured| captured.original_dst).collect();
    seen.sort_unstable();
    assert_eq!(seen, (0..4).map(to).collect::<Result<Vec<_>>>()?);
    for client in &mut open {
        client.write_all(b"alive")?;
    }

    // Two ends make room: the agent's goes first, so that the app's has nothing to wait for.
    drop(held);
    drop(open);
    let _client = once(|| dial(&world, more))?;
    assert_eq!(world.accept(Listener::Outbound)?.original_dst, more);
    // The pod reaches itself again once the table has not been full for a while.
    let own = addr(POD4, 7500)?;
    let _listener = world.pod.run(move || Ok(TcpListener::bind(own)?))?;
    once(|| dial(&world, own))?;
    Ok(())
}

#[test]
fn an_app_is_never_told_a_client_that_is_not_its_own() -> Result<()> {
    let world = with_tables(PodTables { max_app_connections_per_pod: 2, ..PodTables::default() })?;
    let mut losses = world.agent.capture()?.losses()?;
    let target = addr(POD4, 9000)?;
    let app = world.pod.run(|| Ok(TcpListener::bind("0.0.0.0:9000")?))?;
    let client = addr("203.0.113.5", 4444)?;
    let dial_app = || world.agent.rt.block_on(world.net.dial_app(target, client));
    let mut open = Vec::new();
    for _ in 0..2 {
        let stream = dial_app()?;
        let (accepted, peer) = app.accept()?;
        assert_eq!(peer, client);
        open.push((stream, accepted));
    }
    for _ in 0..20 {
        assert_eq!(kind_of(dial_app()), Some(ErrorKind::ConnectionRefused));
    }
    app.set_nonblocking(true)?;
    assert_eq!(kind_of(app.accept()), Some(ErrorKind::WouldBlock), "the app was reached");
    assert_eq!(counted(&mut losses, "app_connections_full")?, 20);
    drop(open);
    let _stream = once(|| Ok(dial_app()))?;
    app.set_nonblocking(false)?;
    assert_eq!(app.accept()?.1, client);
    Ok(())
}

#[test]
fn flows_that_are_not_recorded_are_counted_and_still_reported_when_they_end() -> Result<()> {
    let world = with_tables(PodTables { max_flows_per_pod: 2, ..PodTables::default() })?;
    let mut losses = world.agent.capture()?.losses()?;
    let mut closed = world.agent.closed_flows()?;
    let target = addr(PEER4, 7000)?;
    let mut open = Vec::new();
    for _ in 0..4 {
        let client = dial(&world, target)??;
        let captured = world.accept(Listener::Outbound)?;
        assert_eq!(captured.original_dst, target, "the connection is not touched");
        open.push((client, captured));
    }
    // Neighbour discovery is flows too, of no socket.
    let flows = world.agent.capture()?.flows();
    assert_eq!(flows.iter().filter(|flow| flow.socket != 0).count(), 2);
    ensure!(counted(&mut losses, "flows_full")? >= 2);
    drop(open);
    for n in 0..4 {
        let ended = world
            .agent
            .rt
            .block_on(async { tokio::time::timeout(LIMIT, closed.recv()).await })?
            .with_context(|| format!("flow {n} was not reported"))?;
        assert_eq!(SocketAddr::from(ended.remote), target);
    }
    Ok(())
}
