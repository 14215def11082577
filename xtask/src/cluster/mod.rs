//! `cargo xtask cluster`: a real Kubernetes on this machine, with several nodes, from package registries alone.
//!
//! API server, controller manager, scheduler and etcd are processes of the machine; each node is a set of namespaces with
//! its own containerd, kubelet and kube-proxy; CoreDNS is a Deployment. `up` and `down` may be repeated, and `down`
//! proves that it left nothing. There is one cluster on a machine. Never needs a container registry, a daemon of the
//! machine, or systemd. How it is made is in `docs/cluster.md`; tested by the tests beside each module and by
//! `cargo xtask test cluster`.

mod build;
mod control_plane;
mod down;
pub mod images;
mod inside;
mod node;
mod pki;
pub mod state;
mod wait;

use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};

use self::state::{Node, Process, ProxyMode, Shape};
use crate::command::{kept, shown};
use crate::progress::{Progress, Reported};
use crate::setup::{self, Missing};
use crate::workspace;

/// What is done with the cluster.
#[derive(Debug, Args)]
pub struct Options {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Starts the cluster, unless it runs, and says how to use it; the first time builds Kubernetes
    Up(Wanted),
    /// Ends the cluster, and proves that nothing of it is left
    Down,
    /// Says what runs; exit code 1 when anything does not
    Status,
    /// Ends a component of the control plane, as if it had crashed
    Stop {
        /// Which
        #[arg(value_parser = control_plane::COMPONENTS)]
        component: String,
    },
    /// Starts a component of the control plane that was stopped
    Start {
        /// Which
        #[arg(value_parser = control_plane::COMPONENTS)]
        component: String,
    },
    /// Gives the images of an archive to every node
    LoadImage {
        /// OCI or Docker archives
        #[arg(required = true)]
        archives: Vec<PathBuf>,
    },
    /// Runs a command in all namespaces of a node
    Enter {
        /// The number of the node
        #[arg(value_parser = clap::value_parser!(u8).range(1..=9))]
        node: u8,
        /// The command; a shell when not given
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Runs kubectl as the cluster's administrator
    Kubectl {
        /// What kubectl is given
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Becomes the outermost process of a node
    #[command(hide = true)]
    Node { node: u8 },
    /// Becomes the first process of a node
    #[command(hide = true)]
    Inside { node: u8 },
}

/// The cluster that is wanted.
#[derive(Debug, Clone, Copy, Args)]
pub struct Wanted {
    /// How many nodes; 0: etcd and the API server alone
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(0..=9))]
    nodes: u8,
    /// How kube-proxy leads connections to services
    #[arg(long, value_enum, default_value_t = ProxyMode::Nftables)]
    proxy: ProxyMode,
}

impl Wanted {
    fn shape(self) -> Shape {
        Shape { nodes: self.nodes, proxy: self.proxy }
    }
}

/// Does it.
pub fn run(options: &Options) -> Result<()> {
    match &options.action {
        Action::Up(wanted) => {
            let mut progress = Progress::start();
            let result = up(&mut progress, *wanted);
            println!("\n{}", progress.table());
            result.map(|()| println!("\n{}", usage()))
        }
        Action::Down => {
            let mut progress = Progress::start();
            down(&mut progress)
        }
        Action::Status => status(),
        Action::LoadImage { archives } => {
            let mut progress = Progress::start();
            archives.iter().try_for_each(|archive| load(&mut progress, archive))
        }
        Action::Stop { component } => {
            state::running()?;
            control_plane::stop(component)
        }
        Action::Start { component } => {
            state::running()?;
            control_plane::start_again(component)
        }
        Action::Enter { node, command } => enter(Node(*node), command),
        Action::Kubectl { arguments } => {
            state::running()?;
            let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
            Err(control_plane::kubectl(&arguments).exec()).context("cannot start kubectl")
        }
        Action::Node { node } => node::become_node(Node(*node)),
        Action::Inside { node } => inside::run(Node(*node)),
    }
}

/// Starts the cluster unless it runs as it is wanted.
pub fn up(progress: &mut Progress, wanted: Wanted) -> Result<()> {
    require_root()?;
    state::not_anothers()?;
    let shape = wanted.shape();
    if let Some(begun) = state::begun() {
        if dead(begun).is_empty() && begun == shape {
            progress.skip("cluster", "it runs already");
            return Ok(());
        }
        if dead(begun).is_empty() {
            bail!("a cluster of another shape runs ({begun:?}): `cargo xtask cluster down` ends it");
        }
        down(progress)?;
    }
    build::prepare(progress)?;
    if shape.nodes > 0 {
        progress.step("images of pause and CoreDNS", images::prepare)?;
    }
    progress.step("keys, certificates, bridge", || {
        state::begin(shape)?;
        pki::make(shape)?;
        down::make_directories()?;
        node::make_bridge()
    })?;
    progress.step("etcd, API server ready", control_plane::start_api)?;
    if shape.nodes > 0 { start_nodes(progress, shape) } else { Ok(()) }
}

/// Nodes, and what only a cluster with nodes has.
fn start_nodes(progress: &mut Progress, shape: Shape) -> Result<()> {
    progress.step("nodes begun", || {
        control_plane::declare_nodes(shape)?;
        shape.all_nodes().try_for_each(|node| node::begin(node, shape))
    })?;
    progress.step("controller manager, scheduler ready", control_plane::start_controllers)?;
    let nodes: Vec<_> = shape.all_nodes().map(Node::name).collect();
    progress.step("nodes ready", || {
        control_plane::await_kubectl(
            &["wait", "--for=condition=Ready", "node", "--all", "--timeout=180s"],
            &nodes,
        )
    })?;
    progress.step("CoreDNS ready", || {
        let text = include_str!("../../../tests/cluster/config/coredns.yaml")
            .replace("@DNS@", state::DNS)
            .replace("@COREDNS@", images::COREDNS);
        control_plane::apply(&state::dir().join("coredns.yaml"), &text)?;
        let rollout =
            ["rollout", "status", "deployment/coredns", "--namespace=kube-system", "--timeout=180s"];
        control_plane::await_kubectl(&rollout, &nodes)
    })
}

/// An error where a cluster was started from here: somebody needs one that nobody else writes to.
pub fn none_begun() -> Result<()> {
    if state::begun().is_some() {
        bail!(
            "a cluster was started from here, and this needs one of its own: `cargo xtask cluster down` ends it"
        );
    }
    Ok(())
}

/// Starts etcd and an API server alone, with the mesh's definitions and nothing else in it.
pub fn up_api_server(progress: &mut Progress) -> Result<()> {
    up(progress, Wanted { nodes: 0, proxy: ProxyMode::Nftables })?;
    progress.step("definitions of the mesh's kinds", || {
        let crds = workspace::root().join("deploy/chart/crds").display().to_string();
        kept(control_plane::kubectl(&["apply", "--server-side", "--filename", &crds]))?;
        kept(control_plane::kubectl(&[
            "wait",
            "--for=condition=Established",
            "crd",
            "--all",
            "--timeout=180s",
        ]))
    })
}

/// How the API server is reached, and the processes that it is made of.
pub fn api_server() -> (PathBuf, Vec<u32>) {
    let processes = control_plane::components(0).iter().filter_map(|name| state::remembered(name));
    (state::kubeconfig(), processes.map(|process| process.pid).collect())
}

/// Ends the cluster.
pub fn down(progress: &mut Progress) -> Result<()> {
    require_root()?;
    progress.step("cluster down", || {
        down::run()?;
        println!(
            "    looked for: namespaces, links, cgroups, processes, mounts, directories; nothing is left"
        );
        Ok(())
    })
}

/// Gives the images of an archive to every node.
pub fn load(progress: &mut Progress, archive: &std::path::Path) -> Result<()> {
    let shape = state::running()?;
    progress.step(&format!("load {}", archive.display()), || images::load(shape, archive))
}

/// How a person uses the cluster.
fn usage() -> String {
    format!(
        "export KUBECONFIG={}\nexport PATH={}:$PATH\nor: cargo xtask cluster kubectl get pods --all-namespaces\n\
         logs are in {}",
        state::kubeconfig().display(),
        state::tools().join("bin").display(),
        state::dir().join("log").display()
    )
}

fn status() -> Result<()> {
    let Some(shape) = state::begun() else {
        if let Some(owner) = state::owner() {
            println!("no cluster of this checkout; the machine's is in {owner}");
        } else {
            println!("no cluster: `cargo xtask cluster up` starts one");
        }
        return Err(Reported.into());
    };
    for name in names(shape) {
        let process = state::remembered(&name);
        let how = if process.is_some_and(Process::lives) { "runs" } else { "DOES NOT RUN" };
        let pid = process.map_or_else(|| "-".to_owned(), |process| process.pid.to_string());
        println!("{name:24} process {pid:>7}  {how}");
    }
    println!("kube-proxy in {} mode\n", shape.proxy.word());
    let asked = shown(&mut control_plane::kubectl(&["get", "nodes", "--request-timeout=5s"]));
    println!("\n{}", usage());
    if asked.is_err() || !dead(shape).is_empty() { Err(Reported.into()) } else { Ok(()) }
}

/// The processes of the cluster that should live and do not.
fn dead(shape: Shape) -> Vec<String> {
    names(shape).into_iter().filter(|name| !state::remembered(name).is_some_and(Process::lives)).collect()
}

/// The processes of a cluster that are written down: a node is known by its outermost.
fn names(shape: Shape) -> Vec<String> {
    let components = control_plane::components(shape.nodes).iter().map(|&name| name.to_owned());
    components.chain(shape.all_nodes().map(Node::name)).collect()
}

fn enter(node: Node, command: &[String]) -> Result<()> {
    state::running()?;
    let (program, arguments) = match command.split_first() {
        Some((program, arguments)) => (program.as_str(), arguments),
        None => ("sh", [].as_slice()),
    };
    Err(node::enter(node, program)?.args(arguments).exec()).context("cannot start nsenter")
}

fn require_root() -> Result<()> {
    if setup::is_root() {
        return Ok(());
    }
    Err(Missing("a cluster is made of namespaces, cgroups and mounts: run it as root".into()).into())
}

/// What tests that are given a cluster find it by.
pub fn environment(tests: &mut Command) {
    tests.env("MESH_CLUSTER_XTASK", state::own_program());
    tests.env("MESH_CLUSTER_KUBECTL", state::program("kubectl"));
    tests.env("MESH_CLUSTER_CLIENT", images::CLIENT);
    tests.env("KUBECONFIG", state::kubeconfig());
}
