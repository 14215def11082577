//! The client of the TCP benchmarks: each worker is a thread that makes one connection after the other.
//!
//! Blocking sockets: no system call but those of the connection itself. A worker goes through the server's ports in turn,
//! so that the pod does not run out of ports of its own while closed connections still hold theirs.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use lab::bench::Connected;

/// What is sent: no protocol begins so.
const BYTE: [u8; 1] = [0];

#[derive(Debug, Args)]
pub struct Options {
    /// The server
    server: IpAddr,
    /// The first port of the server
    #[arg(long)]
    port: u16,
    /// How many ports it has, one after the other
    #[arg(long, default_value_t = 1)]
    ports: u16,
    /// Connections that are open at a time
    #[arg(long, default_value_t = 1)]
    workers: u16,
    /// For how long
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
}

pub fn run(options: &Options) -> Result<Connected> {
    ensure!(options.ports > 0, "a server has at least one port");
    let started = Instant::now();
    let until = started + Duration::from_secs_f64(options.seconds);
    let connections = thread::scope(|scope| {
        let workers: Vec<_> =
            (0..options.workers).map(|worker| scope.spawn(move || work(options, worker, until))).collect();
        let done = workers
            .into_iter()
            .map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        done.sum::<Result<u64>>()
    })?;
    Ok(Connected { connections, seconds: started.elapsed().as_secs_f64() })
}

fn work(options: &Options, worker: u16, until: Instant) -> Result<u64> {
    let mut done = 0;
    let mut port = worker % options.ports;
    while Instant::now() < until {
        let server = SocketAddr::new(options.server, options.port + port);
        once(server).with_context(|| format!("connection {done} of worker {worker}, to {server}"))?;
        port = (port + 1) % options.ports;
        done += 1;
    }
    Ok(done)
}

fn once(server: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect(server)?;
    stream.write_all(&BYTE)?;
    let mut back = [1];
    stream.read_exact(&mut back)?;
    ensure!(back == BYTE, "another byte came back");
    Ok(())
}
