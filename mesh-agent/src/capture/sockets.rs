//! Making the sockets a pod's capture needs: listeners, and sockets to dial with. Nothing here enters a namespace or
//! touches a map: the caller is where the socket shall be.
//!
//! Tested below on loopback, and with the kernel in the lab.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd},
    time::Duration,
};

use nix::libc;
use nix::sys::socket::{setsockopt, sockopt::IpBindAddressNoPort};
use socket2::{Domain, Protocol, SockAddr, Socket, TcpKeepalive, Type};
use tokio::net::TcpSocket;

/// Idle time before the first keepalive probe, the time between probes, and how many stay unanswered before a captured
/// connection is given up. (Those of ztunnel.)
const KEEPALIVE_TIME: Duration = Duration::from_mins(3);
/// See [`KEEPALIVE_TIME`].
const KEEPALIVE_INTERVAL: Duration = Duration::from_mins(3);
/// See [`KEEPALIVE_TIME`].
const KEEPALIVE_RETRIES: u32 = 9;

/// First of the addresses the agent dials apps from: 127.64.0.0/10, so that 127.0.0.1 stays the app's own.
const SOURCES: u32 = 0x7f40_0000;
/// How many such addresses: with 28,000 ports each, no app's connections exhaust them.
const SOURCE_COUNT: u32 = 1 << 22;

/// A listener-to-be on this port of every address, bound and not yet listening. What it accepts inherits no delay and
/// keepalive from it. IPv4 alone where the kernel has no IPv6.
pub(super) fn bind(port: u16) -> io::Result<Socket> {
    let (socket, any) = match stream(Domain::IPV6) {
        Ok(socket) => {
            socket.set_only_v6(false)?;
            (socket, IpAddr::V6(Ipv6Addr::UNSPECIFIED))
        }
        Err(error) if error.raw_os_error() == Some(nix::libc::EAFNOSUPPORT) => {
            (stream(Domain::IPV4)?, IpAddr::V4(Ipv4Addr::UNSPECIFIED))
        }
        Err(error) => return Err(error),
    };
    // Connections of an agent before us may still be about on this port; another listener still refuses us.
    socket.set_reuse_address(true)?;
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(KEEPALIVE_TIME)
            .with_interval(KEEPALIVE_INTERVAL)
            .with_retries(KEEPALIVE_RETRIES),
    )?;
    socket.bind(&SocketAddr::new(any, port).into())?;
    Ok(socket)
}

/// Has a bound socket listen, with the longest queue the system allows.
pub(super) fn listen(socket: &Socket) -> io::Result<()> {
    socket.listen(nix::libc::SOMAXCONN)
}

/// The next connection of a listener, and its other end; never waits.
pub(super) fn accept(listener: &TcpListener) -> io::Result<(TcpStream, SocketAddr)> {
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    #[expect(unsafe_code, reason = "no library in use gives both the flags and the address, in one call")]
    // SAFETY: the kernel writes an address of at most `length` bytes to where `address` points, both of which are there for
    // that; the descriptor is new and nobody else's.
    let (socket, address) = unsafe {
        SockAddr::try_init(|address, length| {
            let socket = libc::accept4(listener.as_raw_fd(), address.cast(), length, flags);
            if socket < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(socket)) }
        })
    }?;
    let address = address.as_socket().ok_or_else(|| io::Error::from(io::ErrorKind::ConnectionAborted))?;
    Ok((socket.into(), address))
}

/// A socket to dial this address with, not yet connected.
pub(super) fn dialler(to: SocketAddr) -> io::Result<Socket> {
    let socket = stream(Domain::for_address(to))?;
    socket.set_tcp_nodelay(true)?;
    Ok(socket)
}

/// A socket to dial this address with from this one, its port chosen.
pub(super) fn bound_dialler(from: IpAddr, to: SocketAddr) -> io::Result<Socket> {
    let socket = dialler(to)?;
    socket.bind(&SocketAddr::new(from, 0).into())?;
    Ok(socket)
}

/// A socket to dial an app in this pod with, from the `n`th of the addresses that only the pod itself can dial it from.
/// Two in a row are never the same: see [`app_source`].
pub(super) fn app_dialler(to: SocketAddr, n: u32) -> io::Result<Socket> {
    let socket = dialler(to)?;
    // The port is chosen at connect, when the other side is known: the same one can serve several.
    setsockopt(&socket, IpBindAddressNoPort, &true)?;
    socket.bind(&app_source(to, n).into())?;
    Ok(socket)
}

/// IPv4 has as many loopback addresses as anybody may want. IPv6 has one: the address that is dialled is the other,
/// which makes 56,000 connections at once to one port of the app (with 28,000 source ports each).
fn app_source(to: SocketAddr, n: u32) -> SocketAddr {
    let ip = match to.ip() {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::from(SOURCES + n % SOURCE_COUNT)),
        IpAddr::V6(ip) if n % 2 == 1 && !ip.is_unicast_link_local() => IpAddr::V6(ip),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
    };
    SocketAddr::new(ip, 0)
}

/// How many bytes written to a TCP socket its peer has not acknowledged (`SIOCOUTQ`, tcp(7)), those not sent yet included;
/// `None` where the kernel does not say.
pub fn unacknowledged(socket: &impl AsFd) -> Option<u32> {
    let mut bytes: libc::c_int = 0;
    #[expect(unsafe_code, reason = "no library in use asks a socket for it")]
    // SAFETY: the descriptor is open while it is borrowed, and of a socket the kernel writes one int to where we point.
    let failed = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if failed == 0 { u32::try_from(bytes).ok() } else { None }
}

/// The socket for tokio to connect.
pub(super) fn into_tokio(socket: Socket) -> TcpSocket {
    TcpSocket::from_std_stream(socket.into())
}

fn stream(domain: Domain) -> io::Result<Socket> {
    Socket::new(domain, Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_the_pods_own_and_many() -> Result<(), std::net::AddrParseError> {
        let of = |to: &str, n| Ok(app_source(to.parse()?, n).ip().to_string());
        assert_eq!(of("10.0.0.1:80", 0)?, "127.64.0.0");
        assert_eq!(of("10.0.0.1:80", SOURCE_COUNT - 1)?, "127.127.255.255");
        assert_eq!(of("10.0.0.1:80", SOURCE_COUNT)?, of("10.0.0.1:80", 0)?);
        assert_eq!([of("[fd00::2]:80", 6)?, of("[fd00::2]:80", 7)?], ["::1", "fd00::2"]);
        assert_eq!(of("[fe80::2]:80", 7)?, "::1");
        Ok(())
    }

    #[test]
    fn a_listener_serves_both_families_and_hands_its_options_on() -> io::Result<()> {
        let listener = bind(0)?;
        listen(&listener)?;
        let port = listener.local_addr()?.as_socket().map_or(0, |addr| addr.port());
        let client = std::net::TcpStream::connect(("127.0.0.1", port))?;
        listener.set_nonblocking(false)?;
        let (accepted, peer) = listener.accept()?;
        assert_eq!(peer.as_socket().map(|addr| addr.port()), Some(client.local_addr()?.port()));
        assert!(accepted.tcp_nodelay()?);
        assert!(accepted.keepalive()?);
        assert_eq!(accepted.tcp_keepalive_time()?, KEEPALIVE_TIME);
        Ok(())
    }

    #[test]
    fn what_the_peer_has_not_acknowledged_falls_as_it_reads() -> io::Result<()> {
        use std::io::{Read as _, Write as _};
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0))?;
        let mut writer = std::net::TcpStream::connect(listener.local_addr()?)?;
        let (mut reader, _) = listener.accept()?;
        assert_eq!(unacknowledged(&writer), Some(0));
        writer.set_nonblocking(true)?;
        let mut written = 0;
        while let Ok(count) = writer.write(&[0; 1 << 14]) {
            written += count;
        }
        let waits = unacknowledged(&writer);
        assert!(waits > Some(0), "{waits:?}");
        reader.read_exact(&mut vec![0; written])?;
        while unacknowledged(&writer) == waits {
            std::thread::yield_now();
        }
        assert_eq!(unacknowledged(&std::fs::File::open("/dev/null")?), None);
        Ok(())
    }

    #[test]
    fn a_port_in_use_is_refused() -> io::Result<()> {
        let taken = std::net::TcpListener::bind(("127.0.0.1", 0))?;
        let error = bind(taken.local_addr()?.port()).and_then(|socket| listen(&socket));
        assert_eq!(error.map_err(|error| error.kind()), Err(io::ErrorKind::AddrInUse));
        Ok(())
    }
}
