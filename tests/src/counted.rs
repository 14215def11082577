//! Agents whose allocations are counted.
//!
//! Promises: the program `counted-agent`, on one worker thread, for how often threads wake one another is chance, and without
//! an access log. What is counted is the agent's whole process. Tested by `tests/cost_of_a_request.rs` and
//! `tests/memory_of_idle_connections.rs`.

use std::{io::Read as _, os::unix::net::UnixStream, path::PathBuf};

use anyhow::{Context as _, Result};
use tempfile::TempDir;

use crate::{Agent, Node, binary};

/// An agent that is counted.
#[derive(Debug)]
pub struct Counted {
    /// The agent.
    pub agent: Agent,
    counts: PathBuf,
}

/// What has been allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allocated {
    /// How often so far, growing and shrinking included.
    pub times: u64,
    /// What is allocated now, as it was asked for, in bytes.
    pub bytes: u64,
}

impl Counted {
    /// Starts one on the node; its socket is in `dir`.
    pub async fn start(node: &Node, dir: &TempDir) -> Result<Self> {
        let counts = dir.path().join(node.name());
        let agent = node.agent().binary(binary("counted-agent", "MESH_COUNTED_AGENT", "lab")?);
        let agent = agent.env("TOKIO_WORKER_THREADS", "1").env("MESH_COUNTS", &counts.to_string_lossy());
        Ok(Self { agent: agent.arg("--access-log=off").start().await?, counts })
    }

    /// As of now.
    pub fn allocated(&self) -> Result<Allocated> {
        let mut told = [0; 16];
        UnixStream::connect(&self.counts)?.read_exact(&mut told).context("reading what is allocated")?;
        // Two numbers: it fits.
        let [times, bytes] = [0, 8].map(|at| {
            let number = told[at..].first_chunk().copied().unwrap_or_default();
            u64::from_be_bytes(number)
        });
        Ok(Allocated { times, bytes })
    }
}
