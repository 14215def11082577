//! Listening sockets, and how addresses are told.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use socket2::{Domain, Socket, Type};
use tokio::net::{TcpListener, UdpSocket};

/// As many as the kernel lets wait.
const BACKLOG: i32 = 4096;

/// A TCP listener; `[::]` takes IPv4 too. Says so on standard output.
pub fn tcp(address: SocketAddr) -> Result<TcpListener> {
    let socket = bound(address, Type::STREAM)?;
    socket.listen(BACKLOG)?;
    let listener = TcpListener::from_std(socket.into())?;
    announce(listener.local_addr()?);
    Ok(listener)
}

/// A UDP socket; `[::]` takes IPv4 too. Says so on standard output.
pub fn udp(address: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::from_std(bound(address, Type::DGRAM)?.into())?;
    announce(socket.local_addr()?);
    Ok(socket)
}

fn bound(address: SocketAddr, kind: Type) -> Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(kind == Type::STREAM)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into()).with_context(|| format!("listening on {address}"))?;
    Ok(socket)
}

fn announce(address: SocketAddr) {
    println!("{}", serde_json::json!({ "listening": address.to_string() }));
}

/// An IPv4 address that came in over an IPv6 socket, as IPv4.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
