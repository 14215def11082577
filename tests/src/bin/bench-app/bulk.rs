//! The client of the benchmarks of bulk: sends as fast as it goes on one connection, and hears at the end how much of it
//! has arrived.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use lab::bench::Sent;

use crate::answer::TAKE;

const CHUNK: usize = 256 << 10;

#[derive(Debug, Args)]
pub struct Options {
    /// The server: `answer`
    server: SocketAddr,
    /// For how long
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
}

pub fn run(options: &Options) -> Result<Sent> {
    let server = options.server;
    let mut stream = TcpStream::connect(server).with_context(|| format!("connecting to {server}"))?;
    let (chunk, started, mut bytes) = (vec![TAKE; CHUNK], Instant::now(), 0_u64);
    while started.elapsed() < Duration::from_secs_f64(options.seconds) {
        stream.write_all(&chunk)?;
        bytes += CHUNK as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut arrived = [0; 8];
    stream.read_exact(&mut arrived).context("hearing what has arrived")?;
    let arrived = u64::from_be_bytes(arrived);
    ensure!(arrived == bytes, "{arrived} bytes of {bytes} have arrived");
    Ok(Sent { bytes, seconds: started.elapsed().as_secs_f64() })
}
