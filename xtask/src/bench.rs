//! `cargo xtask bench`: set-up and release builds, then the benchmarks of the lab.
//!
//! The benchmarks themselves are the program `lab-bench` of the package `lab`; what is measured, and how, is told there and
//! in what it prints. Figures go to `target/bench/NAME.json`, and with `--report` to `docs/benchmarks.md`.

pub mod peers;

use std::ffi::OsString;

use anyhow::Result;
use clap::{Args, ValueEnum};

use crate::build_ebpf;
use crate::cluster;
use crate::command::shown;
use crate::dist;
use crate::progress::Progress;
use crate::setup::{self, Missing};
use crate::test::mount_bpffs;
use crate::workspace;

/// What measures, and what is measured.
const PROGRAMS: [&str; 4] = ["mesh-agent", "lab-bench", "bench-app", "lab-app"];

/// What is measured, and how much of it.
#[derive(Debug, Args)]
#[command(after_help = "The machine should have nothing else to do: rounds in which it has are discarded.")]
pub struct Options {
    /// What to measure; everything unless named
    suites: Vec<Suite>,
    /// How often each is measured in turn [default: 7]
    #[arg(long)]
    rounds: Option<usize>,
    /// How long each measurement takes [default: 5]
    #[arg(long)]
    seconds: Option<f64>,
    /// Whether it works at all: one short round in a small world, no figures to rely on
    #[arg(long)]
    quick: bool,
    /// Also write docs/benchmarks.md, from what is in target/bench of this and earlier runs
    #[arg(long, conflicts_with = "quick")]
    report: bool,
    /// Measure the agent that is shipped, built as `cargo xtask dist` does, in place of a plain release build
    #[arg(long)]
    dist: bool,
    #[command(flatten)]
    ebpf: build_ebpf::Options,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Suite {
    /// Connections per second and CPU per connection: no capture, the mesh's, iptables REDIRECT
    Capture,
    /// What the hooks cost pods that are not enrolled
    Unenrolled,
    /// The time from a pod's manifest to its enrolment on a full node
    Enrolment,
    /// HTTP between two nodes over mutual TLS: none, the mesh, a bare pair, nginx, haproxy, Envoy
    Http,
    /// New connections between two nodes, and full handshakes: none, the mesh, nginx, Envoy
    Connections,
    /// Opaque TCP between two nodes over mutual TLS: none, the mesh, haproxy, Envoy
    Tcp,
    /// Two pods of one node: HTTP, direct connections, and bytes through the agent
    SameNode,
    /// gRPC's unary calls on one connection: none, the mesh, Envoy
    Grpc,
    /// What an agent holds: idle, for each idle connection, for each idle tunnel; and Envoy
    Memory,
    /// Busy connections beside ten thousand idle ones
    Idle,
    /// One pod's latency beside another's bulk
    Neighbour,
    /// Ten thousand Services against ten: lookup and route, memory, a change
    Scale,
    /// What authorization policies cost a request, and what compiling them costs, by how many there are
    Authorization,
    /// Ten thousand Services of an API server: the start of an agent, its memory, a change
    Kubernetes,
}

/// Builds what is missing and runs the benchmarks.
pub fn run(options: &Options) -> Result<()> {
    if !setup::is_root() {
        let text =
            "the benchmarks make network namespaces and cgroups and load eBPF programs: run them as root";
        return Err(Missing(text.into()).into());
    }
    let mut progress = Progress::start();
    setup::packages(&mut progress, &setup::BUILD, "the build")?;
    setup::packages(&mut progress, &setup::LAB, "the lab")?;
    if options.measures(Suite::Capture) {
        setup::packages(&mut progress, &setup::IPTABLES, "the benchmark of capture")?;
    }
    if Suite::value_variants().iter().any(|suite| suite.has_peers() && options.measures(*suite)) {
        setup::packages(&mut progress, &setup::IPTABLES, "what is compared with capture")?;
        peers::prepare(&mut progress)?;
    }
    build_ebpf::build(&mut progress, &options.ebpf)?;
    progress.step("build programs, optimised (minutes, the first time)", || {
        let packages = ["build", "--release", "--locked", "--package", "mesh-agent", "--package", "lab"];
        // Those alone: each is optimised as a whole, for minutes.
        let programs = PROGRAMS.iter().flat_map(|program| ["--bin", program]);
        shown(workspace::cargo().args(packages).args(programs))
    })?;
    if options.dist {
        dist::build(&mut progress, &dist::Options::default())?;
    }
    let others: Vec<_> = options.wanted().into_iter().filter(|suite| *suite != Suite::Kubernetes).collect();
    let mut result = Ok(());
    if !others.is_empty() {
        result = progress.step("benchmarks", || measure(options, &others, Vec::new()));
    }
    if options.measures(Suite::Kubernetes) {
        result = result.and_then(|()| at_an_api_server(options, &mut progress));
    }
    println!("\n{}", progress.table());
    result
}

/// What needs an API server has one of its own, which is not there while anything else is measured.
fn at_an_api_server(options: &Options, progress: &mut Progress) -> Result<()> {
    cluster::none_begun()?;
    let started = cluster::up_api_server(progress);
    if let Err(error) = &started
        && error.is::<Missing>()
        && options.suites.is_empty()
    {
        progress.skip("benchmark of an API server", &format!("{error:#}"));
        return Ok(());
    }
    let measured = started.and_then(|()| {
        let (kubeconfig, processes) = cluster::api_server();
        let mut arguments = vec!["--kubeconfig".into(), kubeconfig.into()];
        arguments.extend(processes.iter().map(|pid| format!("--server={pid}").into()));
        progress.step("benchmark of an API server", || measure(options, &[Suite::Kubernetes], arguments))
    });
    let ended = cluster::down(progress);
    measured.and(ended)
}

fn measure(options: &Options, suites: &[Suite], more: Vec<OsString>) -> Result<()> {
    mount_bpffs()?;
    let mut bench = workspace::command(workspace::release_program("lab-bench"));
    bench.args(options.arguments(suites)).args(more);
    if options.dist {
        bench.env("MESH_AGENT_BIN", dist::program_path("mesh-agent"));
    }
    shown(&mut bench)
}

impl Suite {
    /// Whether it compares the mesh with proxies that have to be had first, or needs their load.
    fn has_peers(self) -> bool {
        let without =
            [Self::Capture, Self::Unenrolled, Self::Enrolment, Self::Authorization, Self::Kubernetes];
        !without.contains(&self)
    }
}

impl Options {
    fn measures(&self, suite: Suite) -> bool {
        self.suites.is_empty() || self.suites.contains(&suite)
    }

    fn wanted(&self) -> Vec<Suite> {
        Suite::value_variants().iter().copied().filter(|suite| self.measures(*suite)).collect()
    }

    /// The same of these suites, as `lab-bench` takes it.
    fn arguments(&self, suites: &[Suite]) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = Vec::new();
        let names = suites.iter().filter_map(ValueEnum::to_possible_value);
        arguments.extend(names.map(|name| name.get_name().into()));
        arguments.extend(self.rounds.map(|rounds| format!("--rounds={rounds}").into()));
        arguments.extend(self.seconds.map(|seconds| format!("--seconds={seconds}").into()));
        arguments.extend(self.quick.then(|| "--quick".into()));
        arguments.extend(self.dist.then(|| "--dist".into()));
        arguments.extend(["--out".into(), workspace::target_dir().join("bench").into()]);
        if self.report {
            arguments.extend(["--report".into(), workspace::root().join("docs/benchmarks.md").into()]);
        }
        arguments
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_for_is_handed_on() {
        let options = Options {
            suites: vec![Suite::Capture],
            rounds: Some(3),
            seconds: Some(0.5),
            quick: false,
            report: true,
            dist: true,
            ebpf: build_ebpf::Options::default(),
        };
        let arguments = options.arguments(&options.wanted());
        let text: Vec<_> = arguments.iter().map(|argument| argument.to_string_lossy()).collect();
        assert_eq!(text[..4], ["capture", "--rounds=3", "--seconds=0.5", "--dist"]);
        assert!(text.last().is_some_and(|last| last.ends_with("docs/benchmarks.md")), "{text:?}");
        assert!(options.measures(Suite::Capture) && !options.measures(Suite::Enrolment));
    }
}
