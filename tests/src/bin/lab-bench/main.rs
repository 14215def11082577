//! `lab-bench`: measures the mesh and its alternatives, side by side on this machine; run by `cargo xtask bench`.
//!
//! Promises: what is compared takes turns, round after round, in one run; a ratio is one of medians; rounds in which the
//! machine had other work are discarded by the rule in `rounds.rs`; a failed connection or request fails the run. Load
//! stays inside network namespaces that the run has made, and nothing of them is left when it ends. Never: asserts how
//! fast anything is. Tested by `tests/benchmarks.rs`.

mod authorization;
mod capture;
mod connections;
mod enrolment;
mod figures;
mod goals;
mod grpc;
mod http;
mod idle;
mod kubernetes;
mod load;
mod memory;
mod meter;
mod neighbour;
mod peers;
mod profile;
mod report;
mod rounds;
mod same_node;
mod scale;
mod tcp;
mod unenrolled;
mod world;

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Parser, ValueEnum};

use crate::{figures::Outcome, rounds::Plan};

/// What is measured unless somebody says otherwise.
const ROUNDS: usize = 7;
const SECONDS: f64 = 5.0;
/// And with `--quick`.
const QUICK_SECONDS: f64 = 1.0;
const NO_API_SERVER: &str =
    "it is measured at an API server: `cargo xtask bench` starts one, --kubeconfig names one";

#[derive(Debug, Parser)]
#[command(name = "lab-bench", about = "Measures the mesh and its alternatives on this machine (root)")]
struct Cli {
    /// What to measure; everything unless named
    suites: Vec<Suite>,
    /// How often each is measured in turn [default: 7; with --quick 1]
    #[arg(long)]
    rounds: Option<usize>,
    /// How long each measurement takes [default: 5; with --quick 1]
    #[arg(long)]
    seconds: Option<f64>,
    /// Whether it works at all: one short round in a small world, no figures to rely on
    #[arg(long)]
    quick: bool,
    /// Say that the agents are those of `cargo xtask dist` (`MESH_AGENT_BIN` names them)
    #[arg(long)]
    dist: bool,
    /// Where NAME.json goes, one for each suite
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Also write what is in DIR, of this and earlier runs, as Markdown to this file, with charts in `benchmarks` beside it
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// The API server that `kubernetes` is measured at; without one it is left out
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// A process that this API server is made of
    #[arg(long = "server", value_name = "PID", requires = "kubeconfig")]
    servers: Vec<u32>,
    /// In place of measuring: put the load of the one suite named on the mesh, and what `perf script` says of the agents into
    /// this file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["report", "rounds"])]
    profile: Option<PathBuf>,
    /// In place of measuring: put the load of each suite named on the mesh, for agents that count what they do
    #[arg(long, conflicts_with_all = ["report", "rounds", "profile"])]
    train: bool,
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

impl Suite {
    fn name(self) -> &'static str {
        match self {
            Self::Capture => "capture",
            Self::Unenrolled => "unenrolled",
            Self::Enrolment => "enrolment",
            Self::Http => "http",
            Self::Connections => "connections",
            Self::Tcp => "tcp",
            Self::SameNode => "same-node",
            Self::Grpc => "grpc",
            Self::Memory => "memory",
            Self::Idle => "idle",
            Self::Neighbour => "neighbour",
            Self::Scale => "scale",
            Self::Authorization => "authorization",
            Self::Kubernetes => "kubernetes",
        }
    }

    async fn run(self, plan: &Plan, given: Option<&kubernetes::Given>) -> Result<figures::Measured> {
        match self {
            Self::Capture => capture::run(plan).await,
            Self::Unenrolled => unenrolled::run(plan).await,
            Self::Enrolment => enrolment::run(plan).await,
            Self::Http => http::run(plan).await,
            Self::Connections => connections::run(plan).await,
            Self::Tcp => tcp::run(plan).await,
            Self::SameNode => same_node::run(plan).await,
            Self::Grpc => grpc::run(plan).await,
            Self::Memory => memory::run(plan).await,
            Self::Idle => idle::run(plan).await,
            Self::Neighbour => neighbour::run(plan).await,
            Self::Scale => scale::run(plan).await,
            Self::Authorization => authorization::run(plan),
            Self::Kubernetes => kubernetes::run(plan, given.context(NO_API_SERVER)?).await,
        }
    }
}

impl Cli {
    fn plan(&self) -> Result<Plan> {
        let rounds = self.rounds.unwrap_or(if self.quick { 1 } else { ROUNDS });
        let seconds = self.seconds.unwrap_or(if self.quick { QUICK_SECONDS } else { SECONDS });
        ensure!((1..=100).contains(&rounds), "--rounds is a number from 1 to 100");
        ensure!((0.1..=60.0).contains(&seconds), "--seconds is a number from 0.1 to 60");
        Ok(Plan { rounds, seconds, quick: self.quick, dist: self.dist })
    }

    fn suites(&self) -> Vec<Suite> {
        if !self.suites.is_empty() {
            return self.suites.clone();
        }
        let can_run = |suite: &Suite| *suite != Suite::Kubernetes || self.kubeconfig.is_some();
        Suite::value_variants().iter().copied().filter(can_run).collect()
    }

    fn given(&self) -> Option<kubernetes::Given> {
        let kubeconfig = self.kubeconfig.clone()?;
        Some(kubernetes::Given { kubeconfig, processes: self.servers.clone() })
    }
}

async fn run(cli: &Cli) -> Result<()> {
    ensure!(lab::require_root()?, "run it as root");
    let plan = cli.plan()?;
    std::fs::create_dir_all(&cli.out).with_context(|| format!("making {}", cli.out.display()))?;
    if let Some(file) = &cli.profile {
        let [suite] = &*cli.suites else { bail!("--profile takes one suite") };
        return profile::run(*suite, &plan, file).await;
    }
    if cli.train {
        for suite in &cli.suites {
            println!("{}: {} s on the mesh", suite.name(), plan.seconds);
            profile::train(*suite, &plan).await.with_context(|| format!("the load of {}", suite.name()))?;
        }
        return Ok(());
    }
    for suite in cli.suites() {
        let name = suite.name();
        println!("{name}: {} rounds of {} s", plan.rounds, plan.seconds);
        let measured =
            suite.run(&plan, cli.given().as_ref()).await.with_context(|| format!("measuring {name}"))?;
        let outcome = Outcome::new(name, &plan, measured)?;
        println!("\n{}", report::table(&outcome));
        report::keep(&outcome, &cli.out)?;
    }
    if let Some(path) = &cli.report {
        let names: Vec<_> = Suite::value_variants().iter().map(|suite| suite.name()).collect();
        report::write(&report::kept(&cli.out, &names)?, path)?;
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Result<()> {
    run(&Cli::parse()).await
}
