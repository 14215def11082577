//! Flags of `mesh-agent`. Each has an environment variable `MESH_…`; every default is in `--help`.

mod ca;
mod certificates;
mod cni;
mod controller;
mod gateway;
mod limits;
mod overload;
mod source;

use std::{net::SocketAddr, num::NonZeroUsize, path::PathBuf, time::Duration};

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

pub use self::{
    ca::{CaFlags, CaSource},
    certificates::{CaConfig, CaStep, CertificateFlags},
    cni::{CniFlags, DaemonSetName},
    controller::{ControllerConfig, ServiceAccountName, TokenConfig, TokensOf},
    gateway::{GatewayConfig, GatewayPod},
    limits::HttpLimits,
    overload::OverloadMarks,
    source::SourceFlags,
};
pub use crate::state::snapshot::PathNormalization;
use crate::{
    admin::{Address, SOCKET_NAME},
    capture::{EbpfLog, PodTables, WhenAgentIsDown},
    ctl::Output,
    report::AccessLog,
    state::defaults::{ROOT_NAMESPACE, TRUST_DOMAIN},
};

/// Where an agent pins its maps and links, unless it is told otherwise.
pub const BPF_DIR: &str = "/sys/fs/bpf/mesh";

/// Where agents keep their run directories, one for each node.
pub const RUN_DIRS: &str = "/run/mesh";

/// Where certificate authorities keep their keys, unless told otherwise.
pub const STATE_DIR: &str = "/var/lib/mesh";

/// Service mesh without sidecars: the agent of one node.
#[derive(Debug, Parser)]
#[command(name = "mesh-agent", version, max_term_width = 110)]
pub struct Cli {
    /// What to run.
    #[command(subcommand)]
    pub role: Role,
    /// What to log on stderr, as a `tracing` filter, for example `info,mesh_agent::proxy=debug`
    #[arg(long, env = "MESH_LOG", default_value = "info", global = true)]
    pub log: String,
}

/// The roles.
#[derive(Debug, Subcommand)]
pub enum Role {
    /// Captures, secures and routes the traffic of this node's pods (one per node, as root); started beside one that runs,
    /// with the same node and directories, it takes over from it, and no connection is lost
    Node(Box<NodeConfig>),
    /// Takes what comes from outside the mesh, on the ports of the `Gateway`s that select its pod: ends TLS, routes each request by
    /// the `VirtualService`s bound to them, and sends it into the mesh as its own (in an ordinary pod, which is not enrolled, or in
    /// any network namespace; needs no root but for ports that take it)
    Gateway(Box<GatewayConfig>),
    /// Serves the certificate authority of a mesh: agents ask it for the certificates of their pods
    /// (`mesh-agent node --ca-address`), each only for pods that run on its own node
    Controller(Box<ControllerConfig>),
    /// Makes the token with which the agent of one node shows the controller who it is (run where the controller's
    /// `--state-dir` is)
    Token(TokenConfig),
    /// Removes every trace that an agent left in the kernel and on disk, its certificate authority excepted: that of one
    /// node where it is told which (by its name, pins or sockets), else of all; never anything of an agent that runs
    Clean(CleanConfig),
    /// The CNI plugin that the agent installs on its node (`mesh-agent node --cni-bin-dir`), run by the container runtime:
    /// configuration on stdin, parameters in `CNI_…` variables
    Cni,
    /// Asks one agent whether it is ready: exit code 0 if it is, 1 if not (for the probes of its container)
    Ready(ReadyConfig),
    /// Takes the agents of a cluster off their nodes before the mesh is uninstalled: deletes their DaemonSet, and waits until
    /// each has let its pods go (run in the cluster)
    Remove(RemoveConfig),
    /// Replaces the root of the embedded certificate authority, step by step, without a failed handshake: `prepare`,
    /// `switch`, `drop`
    Ca(CaConfig),
}

/// `mesh-agent node`.
#[derive(Debug, Clone, Args)]
pub struct NodeConfig {
    /// Where the configuration is from.
    #[command(flatten)]
    pub source: SourceFlags,
    /// Name of this node, as in the `spec.nodeName` of its pods
    #[arg(long, env = "MESH_NODE", default_value_t = hostname())]
    pub node: String,
    /// Trust domain of every identity: `spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/ACCOUNT`
    #[arg(long, env = "MESH_TRUST_DOMAIN", default_value = TRUST_DOMAIN)]
    pub trust_domain: String,
    /// Namespace whose `AuthorizationPolicy`s and `DestinationRule`s hold for the whole mesh
    #[arg(long, env = "MESH_ROOT_NAMESPACE", value_name = "NAMESPACE", default_value = ROOT_NAMESPACE)]
    pub root_namespace: String,
    /// How the paths of requests are brought into one form before routes and authorization policies are asked about them;
    /// the app is given the path in that form
    #[arg(long, env = "MESH_PATH_NORMALIZATION", value_enum, default_value_t = PathNormalization::Base)]
    pub path_normalization: PathNormalization,
    /// Where the embedded certificate authority is kept; agents given the same directory share it
    #[arg(long, env = "MESH_STATE_DIR", value_name = "DIR", default_value = STATE_DIR)]
    pub state_dir: PathBuf,
    /// Who certifies the pods.
    #[command(flatten)]
    pub ca: CaFlags,
    /// Sockets of this agent, mode 0700 [default: /run/mesh/NODE]
    #[arg(long, env = "MESH_RUN_DIR", value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Admin interface: `unix:PATH` or a loopback address [default: `unix:RUN_DIR/admin.sock`]
    #[arg(long, env = "MESH_ADMIN", value_name = "ADDRESS")]
    pub admin: Option<Address>,
    /// Where `/metrics` is served
    #[arg(long, env = "MESH_METRICS", value_name = "ADDRESS", default_value = "0.0.0.0:15020")]
    pub metrics: SocketAddr,
    /// Where `/healthz/ready` is served
    #[arg(long, env = "MESH_READINESS", value_name = "ADDRESS", default_value = "0.0.0.0:15021")]
    pub readiness: SocketAddr,
    /// Socket at which this process alone tells whether it is ready (`mesh-agent ready`): for probes of a container, while two
    /// agents share what the node has
    #[arg(long, env = "MESH_READY_SOCKET", value_name = "FILE")]
    pub ready_socket: Option<PathBuf>,
    /// cgroup2 directory that holds the pods and this agent [default: the cgroup2 mount found in mountinfo]
    #[arg(long, env = "MESH_CGROUP_ROOT", value_name = "DIR")]
    pub cgroup_root: Option<PathBuf>,
    /// Directory below it that holds the pods alone: their connections are captured there, before another tool's programs
    /// at the cgroup root run [default: `kubepods.slice` or `kubepods` where there is one, else the cgroup root]
    #[arg(long, env = "MESH_PODS_CGROUP", value_name = "DIR")]
    pub pods_cgroup: Option<PathBuf>,
    /// The kubelet's cgroup, from the cgroup root on: from there alone, probes that a pod declares reach it whatever policies
    /// say [default: `system.slice/kubelet.service` and other places where a service manager puts it]
    #[arg(long, env = "MESH_KUBELET_CGROUP", value_name = "PATH")]
    pub kubelet_cgroup: Option<PathBuf>,
    /// Directory in a mounted bpffs for this agent's pins
    #[arg(long, env = "MESH_BPF_DIR", value_name = "DIR", default_value = BPF_DIR)]
    pub bpf_dir: PathBuf,
    /// What the programs in the kernel log
    #[arg(long, env = "MESH_EBPF_LOG", value_enum, default_value_t = EbpfLog::Off)]
    pub ebpf_log: EbpfLog,
    /// What becomes of the connections of enrolled pods while there is no agent, where their annotation
    /// `mesh.io/when-agent-is-down` does not say: refused at once, or passed untouched
    #[arg(long, env = "MESH_WHEN_AGENT_IS_DOWN", value_enum, default_value_t = WhenAgentIsDown::Closed)]
    pub when_agent_is_down: WhenAgentIsDown,
    /// Whether connections between pods of this node, to ports declared to carry bytes, run from app to app without the
    /// agent where nothing asks for more (a pod says no with `mesh.io/direct: disabled`)
    #[arg(long, env = "MESH_DIRECT", value_name = "BOOL", default_value_t = true, action = ArgAction::Set)]
    pub direct: bool,
    /// Access log on stdout, one line per request or connection
    #[arg(long, env = "MESH_ACCESS_LOG", value_enum, default_value_t = AccessLogFormat::Text)]
    pub access_log: AccessLogFormat,
    /// How many endpoints have series of their own in `/metrics` (what is in flight, latency, whether ejected), of those that
    /// pods of this node use
    #[arg(long, env = "MESH_ENDPOINT_METRICS", value_name = "NUMBER", default_value_t = 1000)]
    pub endpoint_metrics: usize,
    /// How long SIGTERM waits for open connections, seconds
    #[arg(long, env = "MESH_DRAIN_DEADLINE", value_name = "SECONDS", default_value = "5", value_parser = seconds)]
    pub drain_deadline: Duration,
    /// Threads that carry connections [default: as many as there are cores]
    #[arg(long, env = "MESH_WORKERS", value_name = "NUMBER")]
    pub workers: Option<NonZeroUsize>,
    /// How often the network between two pods of this node is asked, with a connection, whether they may talk, seconds
    #[arg(long, env = "MESH_CARRIER_INTERVAL", value_name = "SECONDS", default_value = "30", value_parser = some_seconds)]
    pub carrier_interval: Duration,
    /// How much the kernel's tables of a pod hold.
    #[command(flatten)]
    pub tables: PodTables,
    /// How long connections may go on in this agent after another one, started with the same run directory, has taken
    /// over, seconds
    #[arg(long, env = "MESH_HANDOVER_DEADLINE", value_name = "SECONDS", default_value = "3600", value_parser = seconds)]
    pub handover_deadline: Duration,
    /// How long certificates last, and which are revoked.
    #[command(flatten)]
    pub certificates: CertificateFlags,
    /// What keeps pods from starting before they are enrolled.
    #[command(flatten)]
    pub cni: CniFlags,
    /// What apps may ask for over HTTP.
    #[command(flatten)]
    pub http: HttpLimits,
    /// When new work is refused for want of memory.
    #[command(flatten)]
    pub overload: OverloadMarks,
}

/// `mesh-agent ready`.
#[derive(Debug, Clone, Args)]
pub struct ReadyConfig {
    /// The socket of the agent's `--ready-socket`
    #[arg(long, env = "MESH_READY_SOCKET", value_name = "FILE")]
    pub ready_socket: PathBuf,
}

/// `mesh-agent remove`.
#[derive(Debug, Clone, Args)]
pub struct RemoveConfig {
    /// The agents' DaemonSet
    #[arg(long, env = "MESH_DAEMON_SET", value_name = "NAMESPACE/NAME")]
    pub daemon_set: DaemonSetName,
    /// How long the agents may take, in seconds
    #[arg(long, env = "MESH_REMOVE_TIMEOUT", value_name = "SECONDS", default_value_t = 240)]
    pub timeout: u64,
}

/// `mesh-agent clean`.
#[derive(Debug, Clone, Args)]
pub struct CleanConfig {
    /// Remove nothing, but show what of ours is there, of running agents too: exit code 1 if there is anything, 0 if not
    #[arg(long)]
    pub check: bool,
    /// Form of what `--check` shows
    #[arg(short, long, env = "MESH_OUTPUT", value_enum, default_value_t, requires = "check")]
    pub output: Output,
    /// Name of the agent's node
    #[arg(long, env = "MESH_NODE")]
    pub node: Option<String>,
    /// Directory of the agent's pins [default: the one noted in the run directory, else /sys/fs/bpf/mesh]
    #[arg(long, env = "MESH_BPF_DIR", value_name = "DIR")]
    pub bpf_dir: Option<PathBuf>,
    /// Directory of the agent's sockets, removed when it holds nothing else [default: /run/mesh/NODE]
    #[arg(long, env = "MESH_RUN_DIR", value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
}

impl CleanConfig {
    /// Whether it is about one agent, and not about all.
    pub fn names_one(&self) -> bool {
        self.node.is_some() || self.bpf_dir.is_some() || self.run_dir.is_some()
    }

    /// Directory of the sockets of the one agent.
    pub fn run_dir(&self) -> PathBuf {
        run_dir(self.run_dir.as_ref(), &self.node.clone().unwrap_or_else(hostname))
    }
}

fn run_dir(given: Option<&PathBuf>, node: &str) -> PathBuf {
    given.cloned().unwrap_or_else(|| PathBuf::from(RUN_DIRS).join(node))
}

impl NodeConfig {
    /// Directory of this agent's sockets.
    pub fn run_dir(&self) -> PathBuf {
        run_dir(self.run_dir.as_ref(), &self.node)
    }

    /// Where the admin interface listens.
    pub fn admin(&self) -> Address {
        self.admin.clone().unwrap_or_else(|| Address::Unix(self.run_dir().join(SOCKET_NAME)))
    }
}

/// Formats of the access log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AccessLogFormat {
    /// None.
    Off,
    /// `key=value` pairs.
    Text,
    /// One JSON object a line.
    Json,
}

impl From<AccessLogFormat> for AccessLog {
    fn from(format: AccessLogFormat) -> Self {
        match format {
            AccessLogFormat::Off => Self::Off,
            AccessLogFormat::Text => Self::Text,
            AccessLogFormat::Json => Self::Json,
        }
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number: f64 = text.parse().map_err(|error| format!("not a number of seconds: {error}"))?;
    Duration::try_from_secs_f64(number).map_err(|error| format!("not a number of seconds: {error}"))
}

fn some_seconds(text: &str) -> Result<Duration, String> {
    let time = seconds(text)?;
    if time.is_zero() { Err("must be more than 0".to_owned()) } else { Ok(time) }
}

fn hostname() -> String {
    nix::unistd::gethostname()
        .ok()
        .and_then(|name| name.into_string().ok())
        .unwrap_or_else(|| "localhost".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn times_are_seconds_and_parts_of_them() {
        assert_eq!(seconds("0.25"), Ok(Duration::from_millis(250)));
        assert_eq!(seconds("3600"), Ok(Duration::from_hours(1)));
        for bad in ["", "-1", "1s", "NaN", "1e300"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn cleaning_looks_where_the_agent_of_the_same_node_would_have_been() {
        let run_dir = |arguments: &[&str]| match Cli::try_parse_from(arguments).map(|cli| cli.role) {
            Ok(Role::Node(node)) => Some(node.run_dir()),
            Ok(Role::Clean(clean)) => Some(clean.run_dir()),
            Ok(
                Role::Ca(_)
                | Role::Cni
                | Role::Controller(_)
                | Role::Gateway(_)
                | Role::Ready(_)
                | Role::Remove(_)
                | Role::Token(_),
            )
            | Err(_) => None,
        };
        for flags in [&[][..], &["--node", "a"], &["--run-dir", "/run/elsewhere"]] {
            let [node, clean] =
                ["node", "clean"].map(|role| run_dir(&[&["mesh-agent", role], flags].concat()));
            assert!(node.is_some() && node == clean, "{flags:?}: {node:?} {clean:?}");
        }
        assert_eq!(run_dir(&["mesh-agent", "clean", "--node", "a"]), Some("/run/mesh/a".into()));
    }
}
