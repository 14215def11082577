//! The client of the benchmarks of opaque TCP: so many bytes there and the same back, again and again, on each of its
//! connections; a thread each, with blocking sockets.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use lab::bench::Asked;

/// What is sent: no protocol begins so.
const BYTE: u8 = 0;

#[derive(Debug, Args)]
pub struct Options {
    /// The server
    server: SocketAddr,
    /// Bytes there, and back
    #[arg(long, default_value_t = 1024)]
    bytes: usize,
    /// Connections
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// For how long
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
}

pub fn run(options: &Options) -> Result<Asked> {
    let started = Instant::now();
    let until = started + Duration::from_secs_f64(options.seconds);
    let took = thread::scope(|scope| {
        let workers: Vec<_> =
            (0..options.connections).map(|_| scope.spawn(move || work(options, until))).collect();
        let mut all = Vec::new();
        for worker in workers {
            all.extend(worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        anyhow::Ok(all)
    })?;
    ensure!(!took.is_empty(), "nothing came back in {} s", options.seconds);
    Ok(Asked::new(&took, started.elapsed().as_secs_f64()))
}

fn work(options: &Options, until: Instant) -> Result<Vec<f64>> {
    let server = options.server;
    let mut stream = TcpStream::connect(server).with_context(|| format!("connecting to {server}"))?;
    stream.set_nodelay(true)?;
    let (there, mut back, mut took) = (vec![BYTE; options.bytes], vec![1; options.bytes], Vec::new());
    loop {
        let sent = Instant::now();
        if sent >= until {
            return Ok(took);
        }
        stream.write_all(&there)?;
        stream.read_exact(&mut back)?;
        took.push(sent.elapsed().as_secs_f64() * 1e6);
    }
}
