//! The time a byte takes there and back on one connection.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use lab::bench::{Pinged, percentile};

#[derive(Debug, Args)]
pub struct Options {
    /// The server
    server: SocketAddr,
    /// For how long
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Stay on this core
    #[arg(long)]
    core: Option<usize>,
}

pub fn run(options: &Options) -> Result<Pinged> {
    crate::stay_on(options.core)?;
    let mut stream =
        TcpStream::connect(options.server).with_context(|| format!("connecting to {}", options.server))?;
    stream.set_nodelay(true)?;
    let until = Instant::now() + Duration::from_secs_f64(options.seconds);
    let mut took = Vec::new();
    loop {
        let sent = Instant::now();
        if sent >= until {
            break;
        }
        stream.write_all(&[0])?;
        stream.read_exact(&mut [0])?;
        took.push(sent.elapsed().as_secs_f64() * 1e6);
    }
    ensure!(!took.is_empty(), "no byte came back in {} s", options.seconds);
    let count = took.len() as u64;
    Ok(Pinged { count, p50_us: percentile(&took, 0.5), p99_us: percentile(&took, 0.99) })
}
