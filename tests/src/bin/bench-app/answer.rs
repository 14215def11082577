//! The server of the TCP benchmarks: sends back what it gets, until the client ends; or takes it, and says at the end how
//! much that was.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context as _, Result};
use clap::Args;
use socket2::{Domain, Socket, Type};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

/// As many as the kernel lets wait.
const BACKLOG: i32 = 4096;
/// The clients send single bytes, or a kibibyte.
const BUFFER: usize = 1024;
/// Of a server that only takes.
const SINK_BUFFER: usize = 256 << 10;

#[derive(Debug, Args)]
pub struct Options {
    /// The first port to listen on
    #[arg(long)]
    port: u16,
    /// How many ports, one after the other
    #[arg(long, default_value_t = 1)]
    ports: u16,
    /// Take it and send nothing back but, once the client has ended, the number of bytes (8 bytes, big endian)
    #[arg(long)]
    sink: bool,
    /// Stay on this core
    #[arg(long)]
    core: Option<usize>,
}

pub fn run(options: &Options) -> Result<()> {
    crate::stay_on(options.core)?;
    crate::runtime()?.block_on(async {
        let mut listeners = JoinSet::new();
        for port in options.port..options.port + options.ports {
            listeners.spawn(serve(listen(port)?, options.sink));
        }
        crate::announce();
        listeners.join_next().await.context("no port to listen on")??
    })
}

/// A listener on all IPv4 addresses.
pub fn listen(port: u16) -> Result<TcpListener> {
    let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port);
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into()).with_context(|| format!("listening on {address}"))?;
    socket.listen(BACKLOG)?;
    Ok(TcpListener::from_std(socket.into())?)
}

async fn serve(listener: TcpListener, sink: bool) -> Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(async move { if sink { take(stream).await } else { answer(stream).await } });
    }
}

async fn take(mut stream: TcpStream) -> std::io::Result<()> {
    let (mut buffer, mut bytes) = (vec![0; SINK_BUFFER], 0_u64);
    loop {
        match stream.read(&mut buffer).await? {
            0 => break,
            n => bytes += n as u64,
        }
    }
    stream.write_all(&bytes.to_be_bytes()).await?;
    stream.shutdown().await
}

/// A client that breaks off says so itself.
async fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = [0; BUFFER];
    loop {
        match stream.read(&mut buffer).await? {
            0 => return Ok(()),
            n => stream.write_all(&buffer[..n]).await?,
        }
    }
}
