//! `counted-agent`: `mesh-agent node`, whose allocations can be counted from outside.
//!
//! Promises: the agent itself, from the same library, on an allocator that counts; whoever connects to the socket
//! that `MESH_COUNTS` names is told how many allocations there have been so far, and how many bytes are allocated now, and
//! nothing else about the agent differs. Never: a part of what is shipped. Used by `lab::counted`.

use std::{alloc::System, io::Write as _, os::unix::net::UnixListener, process::ExitCode, thread};

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use mesh_agent::{
    app,
    config::{Cli, Role},
};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

#[global_allocator]
static COUNTING: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

fn run() -> Result<()> {
    let cli = Cli::parse();
    let path = std::env::var_os("MESH_COUNTS").context("MESH_COUNTS names no socket")?;
    let listener = UnixListener::bind(&path).with_context(|| format!("listening at {}", path.display()))?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let stats = COUNTING.stats();
            let allocations = stats.allocations + stats.reallocations;
            let held = stats.bytes_allocated.saturating_sub(stats.bytes_deallocated);
            let told = [allocations as u64, held as u64].map(u64::to_be_bytes);
            // Somebody who does not wait for the answer has no use for it.
            let _ = (&stream).write_all(told.as_flattened());
        }
    });
    let Role::Node(config) = cli.role else { bail!("only the role `node` is counted") };
    app::node(*config, &cli.log)
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("counted-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}
