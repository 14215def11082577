//! What is counted: payload bytes exact whoever closes first, and packets no socket hook sees.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{Arc, Barrier},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use mesh_agent::capture::Listener;
use mesh_common::{
    addr::Addr,
    flow::{FlowRecord, direction, verdict},
};
use tokio::sync::mpsc::Receiver;

use crate::world::{LIMIT, PEER4, PEER6, POD4, POD6, World, addr, join};

const REQUEST: usize = 100_003;
const RESPONSE: usize = 50_001;

/// One end's part in a conversation.
type Part = fn(TcpStream) -> Result<()>;

fn send(stream: &mut TcpStream, bytes: usize) -> Result<()> {
    Ok(stream.write_all(&vec![b'x'; bytes])?)
}

fn receive(stream: &mut TcpStream, bytes: usize) -> Result<()> {
    Ok(stream.read_exact(&mut vec![0; bytes])?)
}

fn receive_end(stream: &mut TcpStream) -> Result<()> {
    ensure!(stream.read(&mut [0; 1])? == 0, "more came than was said");
    Ok(())
}

/// Every order of closing: its name, what the client does, what the server does.
const ORDERS: [(&str, Part, Part); 6] = [
    (
        "the client closes first",
        |mut client| {
            send(&mut client, REQUEST)?;
            receive(&mut client, RESPONSE)
        },
        |mut server| {
            receive(&mut server, REQUEST)?;
            send(&mut server, RESPONSE)?;
            receive_end(&mut server)
        },
    ),
    (
        "the server closes first",
        |mut client| {
            send(&mut client, REQUEST)?;
            receive(&mut client, RESPONSE)?;
            receive_end(&mut client)
        },
        |mut server| {
            receive(&mut server, REQUEST)?;
            send(&mut server, RESPONSE)
        },
    ),
    (
        "the client half-closes and reads to the end",
        |mut client| {
            send(&mut client, REQUEST)?;
            client.shutdown(Shutdown::Write)?;
            receive(&mut client, RESPONSE)?;
            receive_end(&mut client)
        },
        |mut server| {
            receive(&mut server, REQUEST)?;
            receive_end(&mut server)?;
            send(&mut server, RESPONSE)
        },
    ),
    (
        "the client half-closes and does not wait for the end",
        |mut client| {
            send(&mut client, REQUEST)?;
            client.shutdown(Shutdown::Write)?;
            receive(&mut client, RESPONSE)
        },
        |mut server| {
            receive(&mut server, REQUEST)?;
            receive_end(&mut server)?;
            send(&mut server, RESPONSE)
        },
    ),
    (
        "the server half-closes and reads to the end",
        |mut client| {
            receive(&mut client, RESPONSE)?;
            receive_end(&mut client)?;
            send(&mut client, REQUEST)
        },
        |mut server| {
            send(&mut server, RESPONSE)?;
            server.shutdown(Shutdown::Write)?;
            receive(&mut server, REQUEST)?;
            receive_end(&mut server)
        },
    ),
    (
        "nobody says anything",
        |client| {
            drop(client);
            Ok(())
        },
        |mut server| receive_end(&mut server),
    ),
];

/// The report of the flow for which `wanted` holds.
fn report(
    world: &World,
    reports: &mut Receiver<FlowRecord>,
    wanted: impl Fn(&FlowRecord) -> bool,
) -> Result<FlowRecord> {
    world.agent.rt.block_on(async {
        tokio::time::timeout(LIMIT, async {
            loop {
                let record = reports.recv().await.context("no more reports")?;
                if wanted(&record) {
                    return Ok(record);
                }
            }
        })
        .await
        .context("no report")?
    })
}

/// Runs each order with the flow at the client (outbound, to the agent) and at the server (inbound, from the agent).
fn exact(dst: SocketAddr, app: SocketAddr, client: SocketAddr) -> Result<()> {
    let world = World::new()?;
    let mut reports = world.agent.closed_flows()?;
    for (name, client_part, server_part) in ORDERS {
        let (sent, received) = if name == "nobody says anything" { (0, 0) } else { (REQUEST, RESPONSE) };

        let clients = world.pod.spawn(move || client_part(TcpStream::connect_timeout(&dst, LIMIT)?));
        let captured = world.accept(Listener::Outbound)?;
        let local = captured.client;
        server_part(blocking(captured.stream)?).context(name)?;
        join(clients).context(name)?;
        let flow = report(&world, &mut reports, |flow| flow.direction == direction::OUTBOUND)?;
        assert_eq!(
            (flow.tx_bytes, flow.rx_bytes),
            (sent as u64, received as u64),
            "client, {name}: {flow:?}"
        );
        assert_eq!((flow.local, flow.remote), (Addr::from(local), Addr::from(dst)), "{name}");
        assert_eq!(flow.verdict, verdict::CAPTURED);
        assert!(flow.end_ns >= flow.start_ns && flow.start_ns > 0);

        let listener = world.pod.run(move || Ok(TcpListener::bind(app)?))?;
        let servers = std::thread::spawn(move || server_part(listener.accept()?.0));
        let stream = world.agent.rt.block_on(world.net.dial_app(app, client))?;
        client_part(blocking(stream.into_std()?)?).context(name)?;
        join(servers).context(name)?;
        let flow = report(&world, &mut reports, |flow| flow.direction == direction::INBOUND)?;
        assert_eq!(
            (flow.tx_bytes, flow.rx_bytes),
            (received as u64, sent as u64),
            "server, {name}: {flow:?}"
        );
        assert_eq!((flow.local, flow.remote), (Addr::from(app), Addr::from(client)), "{name}");
        assert_eq!(flow.verdict, verdict::CAPTURED);
    }
    Ok(())
}

fn blocking(stream: TcpStream) -> Result<TcpStream> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(LIMIT))?;
    Ok(stream)
}

#[test]
fn bytes_are_exact_in_every_closing_order_over_ipv4() -> Result<()> {
    exact(addr("192.0.2.10", 80)?, addr(POD4, 9000)?, addr("203.0.113.5", 4444)?)
}

#[test]
fn bytes_are_exact_in_every_closing_order_over_ipv6() -> Result<()> {
    exact(addr("2001:db8::10", 80)?, addr(POD6, 9000)?, addr("2001:db8::5", 4444)?)
}

#[test]
fn bytes_are_exact_when_both_close_at_once() -> Result<()> {
    let world = World::new()?;
    let mut reports = world.agent.closed_flows()?;
    let dst = addr("192.0.2.10", 80)?;
    for n in 0..200 {
        let barrier = Arc::new(Barrier::new(2));
        let at_client = Arc::clone(&barrier);
        let client = world.pod.spawn(move || {
            let mut client = TcpStream::connect_timeout(&dst, LIMIT)?;
            send(&mut client, 11)?;
            receive(&mut client, 7)?;
            at_client.wait();
            client.shutdown(Shutdown::Write)?;
            receive_end(&mut client)
        });
        let mut server = blocking(world.accept(Listener::Outbound)?.stream)?;
        receive(&mut server, 11)?;
        send(&mut server, 7)?;
        barrier.wait();
        server.shutdown(Shutdown::Write)?;
        receive_end(&mut server)?;
        join(client)?;
        let flow = report(&world, &mut reports, |_| true)?;
        assert_eq!((flow.tx_bytes, flow.rx_bytes), (11, 7), "{n}: {flow:?}");
    }
    Ok(())
}

#[test]
fn a_reset_connection_is_counted_to_its_end() -> Result<()> {
    let world = World::new()?;
    let mut reports = world.agent.closed_flows()?;
    let dst = addr("192.0.2.10", 80)?;
    let client = world.pod.spawn(move || {
        let mut client = TcpStream::connect_timeout(&dst, LIMIT)?;
        send(&mut client, REQUEST)?;
        receive(&mut client, RESPONSE)?;
        ensure!(client.read(&mut [0; 1]).is_err(), "not reset");
        Ok(())
    });
    let mut server = blocking(world.accept(Listener::Outbound)?.stream)?;
    receive(&mut server, REQUEST)?;
    send(&mut server, RESPONSE)?;
    // The client has all of it before the reset.
    let all_acknowledged = socket2::SockRef::from(&server);
    all_acknowledged.set_linger(Some(Duration::ZERO))?;
    drop(server);
    join(client)?;
    let flow = report(&world, &mut reports, |_| true)?;
    assert_eq!((flow.tx_bytes, flow.rx_bytes), (REQUEST as u64, RESPONSE as u64), "{flow:?}");
    Ok(())
}

#[test]
fn a_refused_connection_is_a_failed_flow() -> Result<()> {
    let world = World::new()?;
    let mut reports = world.agent.closed_flows()?;
    // The pod's own address, where nobody listens: left alone, and refused.
    let dst = addr(POD4, 9)?;
    world.pod.run(move || {
        ensure!(TcpStream::connect_timeout(&dst, LIMIT).is_err());
        Ok(())
    })?;
    let flow = report(&world, &mut reports, |_| true)?;
    assert_eq!((flow.verdict, flow.tx_bytes, flow.rx_bytes), (verdict::FAILED, 0, 0));
    assert_eq!(flow.remote, Addr::from(dst));
    Ok(())
}

/// Reads the tables until one flow is as wanted: the kernel gives no sign when a table changes.
fn live(world: &World, wanted: impl Fn(&FlowRecord) -> bool) -> Result<FlowRecord> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let flows = world.agent.capture()?.flows();
        if let Some(flow) = flows.iter().find(|flow| wanted(flow)) {
            return Ok(*flow);
        }
        ensure!(Instant::now() < deadline, "no such flow among {flows:#?}");
        std::thread::yield_now();
    }
}

#[test]
fn an_open_download_is_seen_to_grow() -> Result<()> {
    let world = World::new()?;
    let dst = addr("192.0.2.10", 80)?;
    let client = world.pod.spawn(move || {
        let mut client = TcpStream::connect_timeout(&dst, LIMIT)?;
        std::io::copy(&mut client, &mut std::io::sink())?;
        Ok(())
    });
    let mut server = blocking(world.accept(Listener::Outbound)?.stream)?;
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let serving = std::thread::spawn(move || -> Result<()> {
        while matches!(stopped.try_recv(), Err(std::sync::mpsc::TryRecvError::Empty)) {
            send(&mut server, 1000)?;
        }
        Ok(())
    });
    let first = live(&world, |flow| flow.rx_bytes > 0)?;
    let later = live(&world, |flow| flow.rx_bytes > first.rx_bytes)?;
    assert_eq!((first.end_ns, later.end_ns, later.verdict), (0, 0, verdict::CAPTURED));
    drop(stop);
    join(serving)?;
    join(client)
}

#[test]
fn datagrams_are_counted_as_packets() -> Result<()> {
    const IP4_UDP: u64 = 28;
    const IP6_UDP: u64 = 48;
    let world = World::new()?;
    for (pod, peer, headers) in [(POD4, PEER4, IP4_UDP), (POD6, PEER6, IP6_UDP)] {
        let (from, to) = (addr(pod, 5000)?, addr(peer, 5001)?);
        let far = world.peer.run(move || Ok(UdpSocket::bind(to)?))?;
        let near = world.pod.run(move || Ok(UdpSocket::bind(from)?))?;
        far.set_read_timeout(Some(LIMIT))?;
        near.set_read_timeout(Some(LIMIT))?;
        for size in [100, 200, 300] {
            near.send_to(&vec![0; size], to)?;
            far.recv_from(&mut [0; 500])?;
        }
        far.send_to(&[0; 50], from)?;
        near.recv_from(&mut [0; 500])?;
        let flow = live(&world, |flow| flow.protocol == 17 && flow.remote == Addr::from(to))?;
        assert_eq!((flow.tx_bytes, flow.tx_packets), (600 + 3 * headers, 3));
        assert_eq!((flow.rx_bytes, flow.rx_packets), (50 + headers, 1));
        assert_eq!((flow.local, flow.direction), (Addr::from(from), direction::OUTBOUND));
        assert_eq!(flow.socket, 0);
    }
    Ok(())
}

#[test]
fn connections_with_a_socket_are_not_counted_as_packets() -> Result<()> {
    let world = World::new()?;
    let target = addr(PEER4, 7000)?;
    let listener = world.peer.run(move || Ok(TcpListener::bind(target)?))?;
    let stream = world.agent.rt.block_on(world.net.dial(target))?;
    let mut server = listener.accept()?.0;
    send(&mut server, 1000)?;
    receive(&mut blocking(stream.into_std()?)?, 1000)?;
    let flows = world.agent.capture()?.flows();
    assert!(flows.iter().all(|flow| flow.protocol != 6), "the agent's own dialling is no flow: {flows:?}");
    Ok(())
}
