//! Programs that the benchmarks run inside pods. Servers print one line of JSON once they listen and run until they are
//! ended; clients run for a time and print one object of JSON, or a sentence on standard error and exit 1.

mod answer;
mod ask;
mod bulk;
mod connect;
mod exchange;
mod handshake;
mod hold;
mod http;
mod pair;
mod ping;
mod relay;

use anyhow::{Context as _, Result};
use clap::{Args, Parser};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::Pid,
};

#[derive(Debug, Parser)]
#[command(name = "bench-app", about = "Programs that the benchmarks run inside pods")]
enum Command {
    /// TCP server that sends back what it gets, on as many ports as asked for
    Answer(answer::Options),
    /// TCP client that makes one short connection after the other: a byte there, a byte back
    Connect(connect::Options),
    /// TCP client that sends one byte back and forth on one connection
    Ping(ping::Options),
    /// TCP client that sends so many bytes back and forth on each of its connections
    Exchange(exchange::Options),
    /// TCP client that sends as much as it can on one connection
    Bulk(bulk::Options),
    /// HTTP/1.1 clients on kept connections
    Ask(ask::Options),
    /// Connections that are used once and then held
    Hold(hold::Options),
    /// TLS client that makes one full handshake after the other, with its certificate
    Handshake(handshake::Options),
    /// TCP relay behind `iptables -j REDIRECT`: asks the kernel where a connection was going, dials that and copies
    Relay(relay::Options),
    /// HTTP proxy at the client: HTTP/1.1 to HTTP/2 over mutual TLS
    PairOutbound(PairOutbound),
    /// HTTP proxy at the server: HTTP/2 over mutual TLS to HTTP/1.1
    PairInbound(pair::Options),
}

#[derive(Debug, Args)]
struct PairOutbound {
    #[command(flatten)]
    options: pair::Options,
    /// The name in the certificate of the other of the pair
    #[arg(long)]
    name: String,
}

fn main() -> Result<()> {
    match Command::parse() {
        Command::Answer(options) => answer::run(&options),
        Command::Connect(options) => print(&connect::run(&options)?),
        Command::Ping(options) => print(&ping::run(&options)?),
        Command::Exchange(options) => print(&exchange::run(&options)?),
        Command::Bulk(options) => print(&bulk::run(&options)?),
        Command::Ask(options) => print(&ask::run(&options)?),
        Command::Hold(options) => hold::run(&options),
        Command::Handshake(options) => print(&handshake::run(&options)?),
        Command::Relay(options) => relay::run(&options),
        Command::PairOutbound(PairOutbound { options, name }) => pair::outbound(&options, &name),
        Command::PairInbound(options) => pair::inbound(&options),
    }
}

/// Prints a client's answer.
fn print(answer: &impl serde::Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(answer)?);
    Ok(())
}

/// Says that a server listens.
fn announce() {
    println!("{}", serde_json::json!({ "listening": true }));
}

/// Keeps this process on one core: where the scheduler puts two that wait for each other decides how long they wait.
fn stay_on(core: Option<usize>) -> Result<()> {
    let Some(core) = core else { return Ok(()) };
    let mut cores = CpuSet::new();
    cores.set(core)?;
    sched_setaffinity(Pid::from_raw(0), &cores).with_context(|| format!("staying on core {core}"))
}

/// As many as this process may have at all.
fn allow_many_descriptors() -> Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most).context("raising the limit of open files")
}

/// As many threads as the machine has cores.
fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?)
}
