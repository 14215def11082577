//! `meshctl`: asks the agent of this node over its admin endpoint, reads the kernel's maps itself, and validates manifests
//! without either; in a cluster, has the node that is meant do the asking and reading (`cluster/`).
//!
//! Promises exit codes that scripts can use (0 done, 1 the request failed or something is wrong with manifests, 2 wrong usage, 3 no agent answers), errors
//! that say what to do, and to end quietly when its reader closes the pipe. Never changes the mesh. Tested in
//! `tests.rs` against a real admin endpoint.

mod certs;
mod check;
mod client;
mod cluster;
mod config;
mod endpoints;
mod flows;
mod maps;
mod output;
mod status;
#[cfg(test)]
mod tests;
mod validate;
mod words;

use std::{
    ffi::OsString,
    io::{self, Read as _, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand, ValueEnum};
use tokio::sync::oneshot;

pub(crate) use self::output::{Rows, or_dash, print};
use self::{
    client::Client,
    cluster::{Agent, Place},
};
use crate::{
    admin::{self, Address, SOCKET_NAME},
    config::{BPF_DIR, RUN_DIRS},
};

/// The flag that [`Cli::end_with_stdin`] is.
const END_WITH_STDIN: &str = "end-with-stdin";

/// Looks into the mesh: flows, configuration, certificates, and the kernel's maps of a node.
///
/// On a node it asks the agent there. Elsewhere it asks the agent of a node of a cluster, chosen by --pod or --node, and
/// needs to be allowed `create` and `get` on `pods/exec` in the mesh's namespace.
#[derive(Debug, Parser)]
#[command(name = "meshctl", version, arg_required_else_help = true, after_help = EXIT_CODES)]
pub struct Cli {
    /// Run directory of the agent, which holds its admin socket [default: the only one under /run/mesh]
    #[arg(long, global = true, env = "MESH_RUN_DIR", value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Admin endpoint of the agent, `unix:PATH` or loopback `IP:PORT` [default: admin.sock in the run directory]
    #[arg(long, global = true, env = "MESH_ADMIN", value_name = "ADDRESS")]
    admin: Option<Address>,
    /// Directory in bpffs where the agent pins its maps [default: the one noted in the run directory, else
    /// /sys/fs/bpf/mesh]
    #[arg(long, global = true, env = "MESH_BPF_DIR", value_name = "DIR")]
    bpf_dir: Option<PathBuf>,
    /// Form of the output
    #[arg(short, long, global = true, env = "MESH_OUTPUT", value_enum, default_value_t)]
    output: Output,
    /// End when standard input does: the connection is gone over which this was started
    #[arg(long = END_WITH_STDIN, global = true, hide = true)]
    end_with_stdin: bool,
    #[command(flatten)]
    place: Place,
    #[command(subcommand)]
    command: Command,
    /// What was said, without where.
    #[arg(skip)]
    said: Vec<String>,
}

const EXIT_CODES: &str = "Exit codes: 0 done; 1 the request failed; 2 wrong usage; 3 no agent answers.";

/// Form of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Table,
    /// For programs.
    Json,
    /// For both.
    Yaml,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Flows of this node's pods: pod, service, endpoint, identity, route, bytes, round-trip time, verdict
    #[command(after_help = "The oldest flow comes first. A flow that has ended is shown for 30 s more.")]
    Flows(flows::Args),
    /// BPF maps of the agent, read from the kernel: works without the agent
    Maps {
        #[command(subcommand)]
        command: maps::Command,
    },
    /// The configuration in force: workloads, routes of each service, endpoints, problems
    Config {
        #[command(subcommand)]
        part: Option<Part>,
    },
    /// Certificates in use and when they expire
    Certs,
    /// Whether the agent is ready, what it has, and which pods of this node it cannot enrol
    Status,
    /// What is wrong with manifests, offline: in each object, and between those that are given
    #[command(
        after_help = "Exit codes: 0 nothing is wrong, 1 something is, 2 wrong usage. What a part of a cluster cannot tell is \
                            not said: without any Service among them, manifests may name whichever they like."
    )]
    Validate(validate::Args),
    /// Whether everything is there that the mesh needs, each with what to do: kernel and agent of a node; in a cluster, what is
    /// installed, certificates, versions, `NetworkPolicies`, and each node
    #[command(after_help = "Exit code 0 only where nothing has failed. Warnings say what is lost.")]
    Check,
    /// Completions for a shell, to be read by it
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// A part of the configuration.
#[derive(Debug, Subcommand)]
enum Part {
    /// Each endpoint as the agent sees it now: cluster, address, locality, level (0 is chosen first), weight, health and
    /// ejection, what is in flight, latency (a moving average that goes up at once)
    Endpoints(endpoints::Args),
}

/// Why a command failed; each has its exit code.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The agent or the kernel answered with an error.
    #[error("{0}")]
    Request(String),
    /// Nobody answers.
    #[error("{0}")]
    Unreachable(String),
    /// It cannot be told whom to ask.
    #[error("{0}")]
    Usage(String),
    /// The `meshctl` that ran in the agent's container has failed, and has said why.
    #[error("meshctl on the agent's node ended with exit code {0}")]
    Elsewhere(u8),
    /// Our output cannot be written.
    #[error("writing the output: {0}")]
    Output(#[from] io::Error),
}

impl Failure {
    /// The exit code, as documented on top.
    pub fn code(&self) -> u8 {
        match self {
            // Who closes our output has read enough: `meshctl flows | head` is no failure.
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => 0,
            Self::Request(_) | Self::Output(_) => 1,
            Self::Usage(_) => 2,
            Self::Unreachable(_) => 3,
            Self::Elsewhere(code) => *code,
        }
    }
}

/// The whole process: parses the command line, runs the command, prints what failed.
pub fn main() -> ExitCode {
    let cli = match Cli::read(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    let mut out = io::stdout().lock();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(run(cli, &mut out)),
        Err(error) => Err(Failure::Request(format!("starting: {error}"))),
    };
    let Err(failure) = result.and_then(|()| Ok(out.flush()?)) else { return ExitCode::SUCCESS };
    if failure.code() != 0 && !matches!(failure, Failure::Elsewhere(_)) {
        // With standard error closed there is nobody left to tell.
        let _ = writeln!(io::stderr(), "meshctl: {failure}");
    }
    ExitCode::from(failure.code())
}

impl Cli {
    /// Reads a command line; the first word is the program's name.
    ///
    /// # Errors
    /// It is wrong, or asks for help.
    pub fn read<W: Into<OsString> + Clone>(words: impl IntoIterator<Item = W>) -> Result<Self, clap::Error> {
        let matches = Self::command().try_get_matches_from(words)?;
        let cli = Self::from_arg_matches(&matches)?;
        let mut without = vec!["run_dir", "admin", "bpf_dir", "end_with_stdin"];
        without.extend(Place::WHERE);
        // For flows it says which of them, too.
        without.retain(|name| *name != "pod" || !matches!(cli.command, Command::Flows(_)));
        let said = words::again(&Self::command(), &matches, &without);
        Ok(Self { said, ..cli })
    }

    /// Whether the agent of this machine is meant, and not one of a cluster.
    fn is_local(&self) -> bool {
        if self.run_dir.is_some() || self.admin.is_some() || self.bpf_dir.is_some() {
            return true;
        }
        // Flows of a pod are of this node where this is one.
        let names_pod = self.place.pod.is_some() && !matches!(self.command, Command::Flows(_));
        let is_node = !run_dirs(Path::new(RUN_DIRS)).is_empty() || Path::new(BPF_DIR).exists();
        !self.place.is_of_a_cluster() && !names_pod && (is_node || !cluster::is_known())
    }
}

/// Runs one command and writes what it found to `out`.
///
/// # Errors
/// See [`Failure`].
pub async fn run(cli: Cli, out: &mut dyn Write) -> Result<(), Failure> {
    let needs_agent = !matches!(cli.command, Command::Completions { .. });
    if needs_agent && !cli.is_local() {
        return cluster::run(&cli, out).await;
    }
    if !cli.end_with_stdin {
        return here(cli, out).await;
    }
    tokio::select! {
        done = here(cli, out) => done,
        () = stdin_ended() => Ok(()),
    }
}

/// Waits for the end of standard input, on a thread that nothing waits for.
async fn stdin_ended() {
    let (sender, ended) = oneshot::channel::<()>();
    std::thread::spawn(move || {
        let mut byte = [0; 64];
        while io::stdin().lock().read(&mut byte).is_ok_and(|length| length > 0) {}
        drop(sender);
    });
    // The sender goes without a word.
    let _ = ended.await;
}

/// Runs one command on this machine.
async fn here(cli: Cli, out: &mut dyn Write) -> Result<(), Failure> {
    let client = || Ok::<_, Failure>(Client::new(admin_address(&cli)?));
    match &cli.command {
        Command::Flows(args) => flows::run(&client()?, args, &cli.place, cli.output, out).await,
        Command::Maps { command } => maps::run(command, &bpf_dir(&cli)?, cli.output, out),
        Command::Config { part: None } => config::run(&client()?, cli.output, out).await,
        Command::Config { part: Some(Part::Endpoints(args)) } => {
            endpoints::run(&client()?, args, cli.output, out).await
        }
        Command::Certs => certs::run(&client()?, cli.output, out).await,
        Command::Check => check::here(&cli, out).await,
        Command::Status => status::run(&client()?, cli.output, out).await,
        Command::Validate(args) => validate::run(args, cli.output, out),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "meshctl", &mut script);
            Ok(out.write_all(&script)?)
        }
    }
}

fn admin_address(cli: &Cli) -> Result<Address, Failure> {
    if let Some(address) = &cli.admin {
        return Ok(address.clone());
    }
    let dir = cli.run_dir.clone().map_or_else(|| only_run_dir(Path::new(RUN_DIRS)), Ok)?;
    Ok(Address::Unix(dir.join(SOCKET_NAME)))
}

/// Where the pins are: as told, else as the agent has noted. Works without the agent.
fn bpf_dir(cli: &Cli) -> Result<PathBuf, Failure> {
    if let Some(dir) = &cli.bpf_dir {
        return Ok(dir.clone());
    }
    let run_dir = match &cli.run_dir {
        Some(dir) => Some(dir.clone()),
        None if run_dirs(Path::new(RUN_DIRS)).is_empty() => None,
        None => Some(only_run_dir(Path::new(RUN_DIRS))?),
    };
    Ok(run_dir.and_then(|dir| admin::noted_bpf_dir(&dir)).unwrap_or_else(|| PathBuf::from(BPF_DIR)))
}

/// The directories under `parent` that have an admin socket.
fn run_dirs(parent: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
    let mut dirs: Vec<_> =
        entries.map(|entry| entry.path()).filter(|dir| dir.join(SOCKET_NAME).exists()).collect();
    dirs.sort();
    dirs
}

/// The one run directory under `parent` that has an admin socket.
fn only_run_dir(parent: &Path) -> Result<PathBuf, Failure> {
    match run_dirs(parent).as_slice() {
        [] => Err(Failure::Unreachable(format!(
            "no agent has an admin socket under {}: is one running on this node? Else name its --run-dir or --admin",
            parent.display()
        ))),
        [dir] => Ok(dir.clone()),
        several => {
            let names: Vec<_> = several.iter().map(|dir| dir.display().to_string()).collect();
            Err(Failure::Usage(format!(
                "several agents run here; choose one with --run-dir: {}",
                names.join(", ")
            )))
        }
    }
}
