//! The lab: nodes and pods as network namespaces, real processes as apps, real agents, the real kernel.
//!
//! A test builds a world, starts what it needs, asserts on what clients saw, and finishes:
//!
//! ```no_run
//! # async fn example() -> anyhow::Result<()> {
//! use lab::{Lab, apps};
//!
//! let lab = Lab::new("greeting").await?;
//! let (a, b) = (lab.node("a").await?, lab.node("b").await?);
//! let server = b.pod("server").label("app", "server").start().await?;
//! let client = a.pod("client").start().await?;
//! server.serve(apps::http(8080)).await?;
//! let service = lab.service("greeting").selector("app", "server").port("http", 80, 8080).apply()?;
//! let (agent_a, agent_b) = (a.agent().start().await?, b.agent().start().await?);
//! let answer = client.get(service.url(80, "/")).send().await?;
//! assert_eq!(answer.status, 200);
//! lab.finish().await
//! # }
//! ```
//!
//! Promises: every name is unique to the lab, so that tests run in parallel; processes are ended by their own pid;
//! [`Lab::finish`] fails if the agents or the lab left anything behind. Never: changes the network, cgroups or
//! sysctls of the machine outside of what it made (bpffs is mounted at `/sys/fs/bpf` if it was not, and stays).
//!
//! Needs root. See [`require_root`]. With `MESH_LAB_KEEP=1`, the directory with the output of all processes stays
//! where a test does not reach [`Lab::finish`].

mod agent;

pub mod apps;
pub mod bench;
pub mod bookinfo;
pub mod bpf;
pub mod cgroup;
pub mod clients;
pub mod cluster;
mod controller;
mod counted;
mod eventually;
mod fetch;
pub mod foreign;
mod gateway;
mod guest;
mod hello;
mod issuer;
mod lab;
mod manifest;
pub mod net;
mod node;
mod own;
mod pair;
mod parking;
pub mod peer;
pub mod pki;
mod pod;
mod process;
pub mod residue;
pub mod servers;
mod service;
pub mod system_calls;
mod tap;
mod untrusted;
pub mod uring;
pub mod wire;

pub use agent::{Agent, AgentBuilder, Cgroups, fields};
pub use controller::Controller;
pub use counted::{Allocated, Counted};
pub use eventually::{PATIENCE, eventually, eventually_within};
pub use gateway::Gateway;
pub use guest::{Behind, Guest};
pub use hello::client_hello;
pub use issuer::Issuer;
pub use lab::{Lab, unique};
pub use node::Node;
pub use pair::{Pair, metric};
pub use parking::Parking;
pub use pod::{Output, Pod, PodBuilder};
pub use process::Process;
pub use service::{Service, ServiceBuilder};
pub use tap::{Recording, Tap};
pub use wire::Segment;

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};

/// Whether the lab can run. Without root a test says so and returns, unless `MESH_REQUIRE_LAB=1` is set: then this
/// is an error, so that a run that must not skip cannot skip unnoticed.
pub fn require_root() -> Result<bool> {
    if nix::unistd::geteuid().is_root() {
        return Ok(true);
    }
    skip("the lab needs root (network namespaces, cgroups, eBPF)")
}

/// Says why a test does not run, unless it must.
fn skip(why: &str) -> Result<bool> {
    if std::env::var_os("MESH_REQUIRE_LAB").is_some_and(|value| value == "1") {
        bail!("{why}, and MESH_REQUIRE_LAB=1 forbids to skip");
    }
    eprintln!("skipped: {why}");
    Ok(false)
}

/// A binary of the workspace: from the variable, else beside this executable or one directory up (where cargo puts
/// binaries as seen from a test).
pub fn binary(name: &str, variable: &str, package: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        return Ok(path.into());
    }
    let executable = std::env::current_exe().context("finding this executable")?;
    executable
        .ancestors()
        .skip(1)
        .take(2)
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
        .with_context(|| {
            format!(
                "no {name} near {}: run `cargo build -p {package}`, or set {variable}",
                executable.display()
            )
        })
}
