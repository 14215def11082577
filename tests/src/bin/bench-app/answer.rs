//! The server of the TCP benchmarks: sends back what it gets, until the client ends. A client that begins with [`TAKE`] has
//! its bytes taken and nothing sent back but, once it has ended, their number.

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
/// The first byte of bulk.
pub const TAKE: u8 = 1;
/// For what is only taken.
const SINK_BUFFER: usize = 256 << 10;

#[derive(Debug, Args)]
pub struct Options {
    /// The first port to listen on
    #[arg(long)]
    port: u16,
    /// How many ports, one after the other
    #[arg(long, default_value_t = 1)]
    ports: u16,
    /// Stay on this core
    #[arg(long)]
    core: Option<usize>,
}

pub fn run(options: &Options) -> Result<()> {
    crate::allow_many_descriptors()?;
    crate::stay_on(options.core)?;
    crate::runtime()?.block_on(async {
        let mut listeners = JoinSet::new();
        for port in options.port..options.port + options.ports {
            listeners.spawn(serve(listen(port)?));
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

async fn serve(listener: TcpListener) -> Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(answer(stream));
    }
}

/// Reads on after the first bytes, and says how many there were in all: 8 bytes, big endian.
async fn take(mut stream: TcpStream, mut bytes: u64) -> std::io::Result<()> {
    let mut buffer = vec![0; SINK_BUFFER];
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
    let (mut buffer, mut first) = ([0; BUFFER], true);
    loop {
        match stream.read(&mut buffer).await? {
            0 => return Ok(()),
            n if first && buffer[0] == TAKE => return take(stream, n as u64).await,
            n => stream.write_all(&buffer[..n]).await?,
        }
        first = false;
    }
}
