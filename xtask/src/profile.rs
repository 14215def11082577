//! `cargo xtask profile`: a flame graph of the agents under the load of a benchmark.
//!
//! Samples are perf's, by a clock and not by kernel probes (`tests/src/bin/lab-bench/profile.rs` takes them), of the release
//! build as it is: stacks are unwound without frame pointers. inferno, which is installed below `target/tools`, folds and draws
//! them. The graph is `target/profile/SUITE.svg`, for a browser; beside it are the folded stacks.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};

use crate::bench::peers;
use crate::build_ebpf;
use crate::command::shown;
use crate::progress::Progress;
use crate::setup::{self, Missing, Tool};
use crate::test::mount_bpffs;
use crate::workspace;

/// Folds what perf says, and draws it.
const INFERNO: Tool =
    Tool { name: "inferno", program: "inferno-flamegraph", version: "0.12.8", takes: "a minute" };
/// Installed with it.
const COLLAPSE: &str = "inferno-collapse-perf";

/// Whose load, and for how long.
#[derive(Debug, Args)]
pub struct Options {
    /// The load: that of the benchmark of this name, on the mesh alone
    #[arg(default_value = "http")]
    suite: Load,
    /// How long samples are taken
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    #[command(flatten)]
    ebpf: build_ebpf::Options,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Load {
    /// Requests between two nodes, on kept connections
    Http,
    /// Requests between two nodes, each on a connection of its own
    Connections,
    /// Exchanges of 1 KiB of opaque TCP between two nodes
    Tcp,
    /// Bulk between two nodes
    Neighbour,
    /// gRPC's unary calls between two nodes, on one connection
    Grpc,
    /// Requests between two pods of one node
    SameNode,
}

/// Builds what is missing, takes samples, and draws them.
pub fn run(options: &Options) -> Result<()> {
    if !setup::is_root() {
        let text =
            "profiles are taken in the lab, which makes network namespaces and loads eBPF: run it as root";
        return Err(Missing(text.into()).into());
    }
    let mut progress = Progress::start();
    setup::packages(&mut progress, &setup::BUILD, "the build")?;
    setup::packages(&mut progress, &setup::LAB, "the lab")?;
    setup::packages(&mut progress, &setup::PERF, "profiles")?;
    peers::load(&mut progress)?;
    // Its programs do not tell their version.
    if !peers::is_there(INFERNO.program, INFERNO.version) {
        let features = ["--no-default-features", "--features", "cli,nameattr"];
        INFERNO.install(&mut progress, &features, None)?;
        peers::remember(INFERNO.program, INFERNO.version)?;
    }
    build_ebpf::build(&mut progress, &options.ebpf)?;
    progress.step("build programs, optimised (minutes, the first time)", || {
        let packages =
            ["build", "--release", "--locked", "--package", "mesh-agent", "--package", "lab", "--bins"];
        shown(workspace::cargo().args(packages))
    })?;
    let name = options.suite.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
    let dir = workspace::target_dir().join("profile");
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let samples = dir.join(format!("{name}.txt"));
    progress.step("samples of the agents under load", || {
        mount_bpffs()?;
        let mut bench = workspace::command(workspace::release_program("lab-bench"));
        bench.arg(&name).arg("--seconds").arg(options.seconds.to_string());
        bench.arg("--out").arg(&dir).arg("--profile").arg(&samples);
        shown(&mut bench)
    })?;
    let graph = progress.step("flame graph", || draw(&samples, &format!("mesh-agent: {name}")))?;
    println!("\n{}\n\n{}", progress.table(), graph.display());
    Ok(())
}

/// Folds samples and draws them; they are many megabytes, and go.
fn draw(samples: &Path, title: &str) -> Result<PathBuf> {
    let (folded, graph) = (samples.with_extension("folded"), samples.with_extension("svg"));
    let into = |path: &Path| File::create(path).with_context(|| format!("cannot write {}", path.display()));
    let program = |name: &str| workspace::command(INFERNO.path().with_file_name(name));
    shown(program(COLLAPSE).arg(samples).stdout(into(&folded)?))?;
    shown(program(INFERNO.program).args(["--title", title]).arg(&folded).stdout(into(&graph)?))?;
    fs::remove_file(samples).with_context(|| format!("cannot remove {}", samples.display()))?;
    Ok(graph)
}
