//! Every kind of socket, and every way to open a connection with it, is captured alike: the agent knows what was
//! dialled, the app sees what it dialled, and bytes pass. What is no TCP to elsewhere is left alone.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd as _,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use lab::uring;
use mesh_agent::capture::Listener;
use mesh_common::{addr::Addr, decide};
use nix::{
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{setsockopt, sockopt},
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::world::{LIMIT, PEER4, PEER6, POD4, POD6, World, addr, join};

const PING: &[u8] = b"ping";
const PONG: &[u8] = b"pong";
/// Every bit of `net.ipv4.tcp_fastopen` that has data in a SYN taken without a cookie, by every listener.
const FAST_OPEN_ALWAYS: &str = "1543";

/// A socket before it dials.
type Prepare = fn(SocketAddr) -> Result<Socket>;
/// Opens the connection, and says [`PING`].
type Dial = fn(&Socket, SocketAddr) -> Result<()>;

/// Outside the pod, in all spellings: an address, and the one it is.
const OUTSIDE: [(&str, &str); 3] =
    [("192.0.2.10", "192.0.2.10"), ("2001:db8::10", "2001:db8::10"), ("::ffff:192.0.2.10", "192.0.2.10")];

fn tcp(to: SocketAddr) -> Result<Socket> {
    Ok(Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?)
}

fn multipath(to: SocketAddr) -> Result<Socket> {
    Ok(Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::MPTCP))?)
}

fn say(mut socket: &Socket) -> Result<()> {
    Ok(socket.write_all(PING)?)
}

fn blocking(socket: &Socket, to: SocketAddr) -> Result<()> {
    socket.connect(&to.into())?;
    say(socket)
}

fn non_blocking(socket: &Socket, to: SocketAddr) -> Result<()> {
    socket.set_nonblocking(true)?;
    if let Err(error) = socket.connect(&to.into()) {
        ensure!(error.raw_os_error() == Some(libc::EINPROGRESS), "{error}");
        let mut polled = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
        ensure!(poll(&mut polled, PollTimeout::try_from(LIMIT)?)? == 1, "never writable");
    }
    socket.set_nonblocking(false)?;
    if let Some(error) = socket.take_error()? {
        return Err(error.into());
    }
    say(socket)
}

fn by_io_uring(socket: &Socket, to: SocketAddr) -> Result<()> {
    uring::connect(socket, to)?;
    say(socket)
}

/// Connects and sends in one call.
fn fast_open(socket: &Socket, to: SocketAddr) -> Result<()> {
    ensure!(socket.send_to_with_flags(PING, &to.into(), libc::MSG_FASTOPEN)? == PING.len());
    Ok(())
}

/// `connect` returns at once, and the first bytes are what connects.
fn fast_open_connect(socket: &Socket, to: SocketAddr) -> Result<()> {
    setsockopt(socket, sockopt::TcpFastOpenConnect, &true)?;
    blocking(socket, to)
}

/// Dials outside in this way, and checks what everybody sees.
fn captured(
    world: &World,
    what: &str,
    to: (SocketAddr, SocketAddr),
    prepare: Prepare,
    dial: Dial,
) -> Result<()> {
    let (dials, canonical) = to;
    let app = world.pod.spawn(move || {
        let socket = prepare(dials)?;
        dial(&socket, dials)?;
        Ok(socket)
    });
    let captured = world.accept(Listener::Outbound).with_context(|| format!("{what} to {dials}"))?;
    let mut app = join(app).with_context(|| format!("{what} to {dials}"))?;
    assert_eq!(captured.original_dst, canonical, "{what} to {dials}");
    assert_eq!(app.peer_addr()?.as_socket(), Some(dials), "{what}: getpeername");
    let own = app.local_addr()?.as_socket().context("no address")?;
    assert_eq!(
        (captured.client.ip(), captured.client.port()),
        (own.ip().to_canonical(), own.port()),
        "{what}"
    );
    let mut agent = captured.stream;
    agent.set_nonblocking(false)?;
    answers(&mut agent)?;
    heard(&mut app).with_context(|| format!("{what} to {dials}"))
}

/// The server's part: hears [`PING`] and says [`PONG`].
fn answers(server: &mut TcpStream) -> Result<()> {
    server.set_read_timeout(Some(LIMIT))?;
    let mut heard = [0; PING.len()];
    server.read_exact(&mut heard)?;
    ensure!(heard == PING, "{heard:?}");
    Ok(server.write_all(PONG)?)
}

fn heard(client: &mut Socket) -> Result<()> {
    client.set_read_timeout(Some(LIMIT))?;
    let mut heard = [0; PONG.len()];
    client.read_exact(&mut heard)?;
    ensure!(heard == PONG, "{heard:?}");
    Ok(())
}

/// To everywhere outside, and to an app of the pod over loopback, where nothing may be captured.
fn everywhere(world: &World, what: &str, prepare: Prepare, dial: Dial) -> Result<()> {
    for (dials, canonical) in OUTSIDE {
        captured(world, what, (addr(dials, 8080)?, addr(canonical, 8080)?), prepare, dial)?;
    }
    for own in ["127.0.0.1", "::1", "::ffff:127.0.0.1", POD4, POD6] {
        let (listener, to) = world.pod.run(move || {
            let listener = TcpListener::bind("[::]:0")?;
            let port = listener.local_addr()?.port();
            Ok((listener, addr(own, port)?))
        })?;
        let app = world.pod.spawn(move || {
            let mut socket = prepare(to)?;
            dial(&socket, to)?;
            assert_eq!(socket.peer_addr()?.as_socket(), Some(to));
            heard(&mut socket)?;
            Ok(socket.local_addr()?.as_socket())
        });
        let (mut server, client) = listener.accept()?;
        answers(&mut server).with_context(|| format!("{what} to {own}"))?;
        let own = join(app).with_context(|| format!("{what} to {own}"))?.context("no address")?;
        assert_eq!(
            (client.ip().to_canonical(), client.port()),
            (own.ip().to_canonical(), own.port()),
            "{what}"
        );
    }
    Ok(())
}

#[test]
fn blocking_and_non_blocking_connect() -> Result<()> {
    let world = World::new()?;
    everywhere(&world, "blocking", tcp, blocking)?;
    everywhere(&world, "non-blocking", tcp, non_blocking)
}

#[test]
fn io_uring() -> Result<()> {
    if let Some(error) = uring::missing() {
        eprintln!("skipped: this kernel gives us no io_uring: {error}");
        return Ok(());
    }
    everywhere(&World::new()?, "io_uring", tcp, by_io_uring)
}

#[test]
fn tcp_fast_open() -> Result<()> {
    let world = World::new()?;
    for with_data_in_the_syn in [false, true] {
        if with_data_in_the_syn {
            world.pod.sysctl("net.ipv4.tcp_fastopen", FAST_OPEN_ALWAYS)?;
        }
        everywhere(&world, "MSG_FASTOPEN", tcp, fast_open)?;
        everywhere(&world, "TCP_FASTOPEN_CONNECT", tcp, fast_open_connect)?;
    }
    let taken = world.pod.counter("TCPFastOpenPassive")?;
    ensure!(taken >= 6, "data in a SYN was taken {taken} times");
    Ok(())
}

/// Why there is no MPTCP here; `None` where there is.
fn no_multipath() -> Option<String> {
    Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP)).err().map(|error| error.to_string())
}

#[test]
fn mptcp_clients() -> Result<()> {
    if let Some(why) = no_multipath() {
        eprintln!("skipped: this kernel has no MPTCP: {why}");
        return Ok(());
    }
    let world = World::new()?;
    everywhere(&world, "MPTCP", multipath, blocking)?;
    everywhere(&world, "non-blocking MPTCP", multipath, non_blocking)?;
    world.pod.sysctl("net.ipv4.tcp_fastopen", FAST_OPEN_ALWAYS)?;
    everywhere(&world, "MPTCP with MSG_FASTOPEN", multipath, fast_open)?;
    if uring::missing().is_none() {
        everywhere(&world, "MPTCP by io_uring", multipath, by_io_uring)?;
    }
    Ok(())
}

#[test]
fn mptcp_servers_and_mptcp_from_outside() -> Result<()> {
    if let Some(why) = no_multipath() {
        eprintln!("skipped: this kernel has no MPTCP: {why}");
        return Ok(());
    }
    let world = World::new()?;
    for (pod, peer, client) in [(POD4, PEER4, "203.0.113.5"), (POD6, PEER6, "2001:db8::5")] {
        let (to, client) = (addr(pod, 9000)?, addr(client, 4444)?);
        // The agent dials an app that listens for MPTCP.
        let server = world.pod.run(move || {
            let server = multipath(to)?;
            server.bind(&to.into())?;
            server.listen(8)?;
            Ok(server)
        })?;
        let _agent = world.agent.rt.block_on(world.net.dial_app(to, client))?;
        let (accepted, seen) = server.accept()?;
        assert_eq!((seen.as_socket(), accepted.peer_addr()?.as_socket()), (Some(client), Some(client)));
        // Somebody outside dials the pod with MPTCP.
        let outside = world.peer.run(move || {
            let socket = multipath(to)?;
            socket.connect(&to.into())?;
            Ok(socket)
        })?;
        let captured = world.accept(Listener::Inbound)?;
        assert_eq!((captured.original_dst, captured.client.ip().to_string()), (to, peer.to_owned()));
        drop(outside);
    }
    Ok(())
}

/// Binds first, to this address and port, and then dials.
fn bound(world: &World, own: &'static str, port: u16, dials: SocketAddr) -> Result<()> {
    let app = world.pod.spawn(move || {
        let socket = tcp(dials)?;
        socket.set_reuse_address(true)?;
        socket.bind(&addr(own, port)?.into())?;
        blocking(&socket, dials)?;
        Ok(socket)
    });
    let captured = world.accept(Listener::Outbound);
    // The app knows best what went wrong.
    let mut app = join(app).with_context(|| format!("from {own} {port} to {dials}"))?;
    let captured = captured.with_context(|| format!("from {own} {port} to {dials}"))?;
    let seen = app.local_addr()?.as_socket().context("no address")?;
    assert_eq!(
        (captured.original_dst, app.peer_addr()?.as_socket()),
        (dials, Some(dials)),
        "from {own} {port}"
    );
    assert_eq!(captured.client, seen, "from {own} {port}");
    ensure!(port == 0 || seen.port() == port, "{seen}, and bound to {port}");
    let unspecified = addr(own, 0)?.ip().is_unspecified();
    ensure!(unspecified || seen.ip() == addr(own, 0)?.ip(), "{seen}, and bound to {own}");
    let mut agent = captured.stream;
    agent.set_nonblocking(false)?;
    answers(&mut agent)?;
    heard(&mut app)
}

/// Waits until the kernel has a route to an address that was just given to the pod.
fn reaches_itself(world: &World, own: &'static str) -> Result<()> {
    world.pod.run(move || {
        let (own, began) = (addr(own, 9)?, std::time::Instant::now());
        // UDP is nobody's to capture, and connecting it looks for a route and sends nothing.
        while std::net::UdpSocket::bind((own.ip(), 0))?.connect(own).is_err() {
            ensure!(began.elapsed() < LIMIT, "no route to {own}");
            std::thread::yield_now();
        }
        Ok(())
    })
}

#[test]
fn bind_before_connect() -> Result<()> {
    const OTHER4: &str = "10.77.0.3";
    const OTHER6: &str = "fd00:77::3";
    let world = World::new()?;
    world.pod.ip(&format!("address add {OTHER4}/24 dev eth0"))?;
    world.pod.ip(&format!("address add {OTHER6}/64 dev eth0 nodad"))?;
    reaches_itself(&world, OTHER6)?;
    for (any, pod, other, outside) in
        [("0.0.0.0", POD4, OTHER4, "192.0.2.10"), ("::", POD6, OTHER6, "2001:db8::10")]
    {
        // Each address dials elsewhere: the same two ends may not be free again at once.
        for (own, at) in [any, pod, other].into_iter().zip(8080..) {
            let dials = addr(outside, at)?;
            for port in [0, 40_000, 5_000, 700] {
                bound(&world, own, port, dials)?;
            }
            // From the very port that this destination's connections are sent to.
            bound(&world, own, decide::hash_port(&Addr::from(dials), decide::HASH_PORTS), dials)?;
        }
    }
    Ok(())
}

#[test]
fn bound_to_an_interface() -> Result<()> {
    fn to_eth0(to: SocketAddr) -> Result<Socket> {
        let socket = tcp(to)?;
        socket.bind_device(Some(b"eth0"))?;
        Ok(socket)
    }
    let world = World::new()?;
    for (dials, canonical) in OUTSIDE {
        let to = (addr(dials, 8080)?, addr(canonical, 8080)?);
        captured(&world, "bound to eth0", to, to_eth0, blocking)?;
    }
    Ok(())
}

/// The kernel may pick, as the source port, the very port that the connection is sent to: then TCP would connect the
/// socket to itself, and the app would hear its own words as an answer.
#[test]
fn source_ports_from_a_wider_range() -> Result<()> {
    let world = World::new()?;
    let to = (addr("192.0.2.10", 8080)?, addr("192.0.2.10", 8080)?);
    let sent_to = decide::hash_port(&Addr::from(to.0), decide::HASH_PORTS);
    // The kernel begins with the lowest.
    world.pod.sysctl("net.ipv4.ip_local_port_range", &format!("{sent_to} {}", sent_to + 1))?;
    world.pod.run(move || {
        let refused = TcpStream::connect(to.0).map_err(|error| error.raw_os_error());
        ensure!(matches!(refused, Err(Some(libc::EHOSTUNREACH))), "{refused:?}");
        Ok(())
    })?;
    // Once is enough for the kernel side to know.
    world.pod.sysctl("net.ipv4.ip_local_port_range", &format!("{sent_to} {}", sent_to + 7))?;
    for n in 0..4 {
        captured(&world, &format!("connection {n}"), to, tcp, blocking)?;
    }
    Ok(())
}

/// An app may listen on a port that connections of the pod are sent to, and is not mistaken for the agent.
#[test]
fn a_listener_on_a_port_that_connections_are_sent_to() -> Result<()> {
    let world = World::new()?;
    let dials = addr("192.0.2.10", 8080)?;
    let port = decide::hash_port(&Addr::from(dials), decide::HASH_PORTS);
    let _open = world.pod.run(move || Ok(TcpStream::connect_timeout(&dials, LIMIT)?))?;
    let _captured = world.accept(Listener::Outbound)?;
    let app = world.pod.run(move || Ok(TcpListener::bind(("0.0.0.0", port))?))?;
    let client = addr("203.0.113.5", 4444)?;
    let _agent = world.agent.rt.block_on(world.net.dial_app(addr(POD4, port)?, client))?;
    assert_eq!(app.accept()?.1, client);
    let _again = world.pod.run(move || Ok(TcpStream::connect_timeout(&dials, LIMIT)?))?;
    assert_eq!(world.accept(Listener::Outbound)?.original_dst, dials);
    Ok(())
}

#[test]
fn datagrams_are_left_alone() -> Result<()> {
    let world = World::new()?;
    for (pod, peer) in [(POD4, PEER4), (POD6, PEER6)] {
        for port in [443, 5353] {
            let (here, there) = (addr(pod, port)?, addr(peer, port)?);
            let outside = world.peer.run(move || udp(there))?;
            for connected in [false, true] {
                let inside = world.pod.run(move || udp(addr(pod, 0)?))?;
                if connected {
                    inside.connect(there)?;
                    ensure!(inside.peer_addr()? == there);
                    inside.send(PING)?;
                } else {
                    inside.send_to(PING, there)?;
                }
                let mut bytes = [0; 16];
                let (length, from) = outside.recv_from(&mut bytes)?;
                ensure!(&bytes[..length] == PING && from == inside.local_addr()?, "{from}");
                outside.send_to(PONG, from)?;
                let (length, from) = inside.recv_from(&mut bytes)?;
                ensure!(&bytes[..length] == PONG && from == there, "{from}");
            }
            // And what comes from outside to an app.
            let inside = world.pod.run(move || udp(here))?;
            outside.send_to(PING, here)?;
            let (length, from) = inside.recv_from(&mut [0; 16])?;
            ensure!(length == PING.len() && from == there, "{from}");
        }
    }
    Ok(())
}

fn udp(at: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind(at)?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    Ok(socket)
}
