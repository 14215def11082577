//! Flags of `mesh-agent`. Each has an environment variable `MESH_…`; every default is in `--help`.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::{
    admin::{Address, SOCKET_NAME},
    capture::EbpfLog,
    report::AccessLog,
};

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
    /// Captures, secures and routes the traffic of this node's pods (one per node, as root)
    Node(Box<NodeConfig>),
    /// Removes every trace that an agent left in the kernel and on disk, its certificate authority excepted
    Clean(CleanConfig),
}

/// `mesh-agent node`.
#[derive(Debug, Clone, Args)]
pub struct NodeConfig {
    /// Directory of YAML manifests (Kubernetes and Istio objects), watched for changes
    #[arg(long, env = "MESH_CONFIG", value_name = "DIR")]
    pub config: Option<PathBuf>,
    /// Name of this node, as in the `spec.nodeName` of its pods
    #[arg(long, env = "MESH_NODE", default_value_t = hostname())]
    pub node: String,
    /// Trust domain of every identity: `spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/ACCOUNT`
    #[arg(long, env = "MESH_TRUST_DOMAIN", default_value = "cluster.local")]
    pub trust_domain: String,
    /// Where the embedded certificate authority is kept; agents given the same directory share it
    #[arg(long, env = "MESH_STATE_DIR", value_name = "DIR", default_value = "/var/lib/mesh")]
    pub state_dir: PathBuf,
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
    /// cgroup2 directory that holds the pods [default: the cgroup2 mount found in mountinfo]
    #[arg(long, env = "MESH_CGROUP_ROOT", value_name = "DIR")]
    pub cgroup_root: Option<PathBuf>,
    /// Directory in a mounted bpffs for this agent's pins
    #[arg(long, env = "MESH_BPF_DIR", value_name = "DIR", default_value = "/sys/fs/bpf/mesh")]
    pub bpf_dir: PathBuf,
    /// What the programs in the kernel log
    #[arg(long, env = "MESH_EBPF_LOG", value_enum, default_value_t = EbpfLog::Off)]
    pub ebpf_log: EbpfLog,
    /// Access log on stdout, one line per request or connection
    #[arg(long, env = "MESH_ACCESS_LOG", value_enum, default_value_t = AccessLogFormat::Text)]
    pub access_log: AccessLogFormat,
    /// How long SIGTERM waits for open connections, seconds
    #[arg(long, env = "MESH_DRAIN_DEADLINE", value_name = "SECONDS", default_value = "5", value_parser = seconds)]
    pub drain_deadline: Duration,
}

/// `mesh-agent clean`.
#[derive(Debug, Clone, Args)]
pub struct CleanConfig {
    /// Directory of the agent's pins
    #[arg(long, env = "MESH_BPF_DIR", value_name = "DIR", default_value = "/sys/fs/bpf/mesh")]
    pub bpf_dir: PathBuf,
    /// Directory of the agent's sockets
    #[arg(long, env = "MESH_RUN_DIR", value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
}

impl NodeConfig {
    /// Directory of this agent's sockets.
    pub fn run_dir(&self) -> PathBuf {
        self.run_dir.clone().unwrap_or_else(|| PathBuf::from("/run/mesh").join(&self.node))
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
    text.parse().map(Duration::from_secs).map_err(|error| format!("not a number of seconds: {error}"))
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
}
