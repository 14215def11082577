//! Flags of `mesh-agent gateway`.

use std::{fmt, net::SocketAddr, num::NonZeroUsize, path::PathBuf, str::FromStr, time::Duration};

use clap::Args;

use super::{
    AccessLogFormat, CaFlags, CertificateFlags, HttpLimits, OverloadMarks, PathNormalization, RUN_DIRS,
    STATE_DIR, SourceFlags, seconds,
};
use crate::{
    admin::{Address, SOCKET_NAME},
    state::defaults::{ROOT_NAMESPACE, TRUST_DOMAIN},
};

/// `mesh-agent gateway`.
#[derive(Debug, Clone, Args)]
pub struct GatewayConfig {
    /// Where the configuration is from.
    #[command(flatten)]
    pub source: SourceFlags,
    /// The pod that this gateway is: its labels are those that `Gateway`s select, its service account is its identity, and its
    /// policies hold for what comes in. The configuration has to have it
    #[arg(long, env = "MESH_POD", value_name = "NAMESPACE/NAME")]
    pub pod: GatewayPod,
    /// Name of the node it runs on, which says where it is for rules that prefer what is near [default: the pod's own
    /// `spec.nodeName`]
    #[arg(long, env = "MESH_NODE")]
    pub node: Option<String>,
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
    /// Who certifies the gateway.
    #[command(flatten)]
    pub ca: CaFlags,
    /// Sockets of this gateway, mode 0700 [default: /run/mesh/NAMESPACE.NAME of its pod]
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
    /// Socket at which this process alone tells whether it is ready (`mesh-agent ready`)
    #[arg(long, env = "MESH_READY_SOCKET", value_name = "FILE")]
    pub ready_socket: Option<PathBuf>,
    /// Access log on stdout, one line per request or connection
    #[arg(long, env = "MESH_ACCESS_LOG", value_enum, default_value_t = AccessLogFormat::Text)]
    pub access_log: AccessLogFormat,
    /// How many endpoints have series of their own in `/metrics` (what is in flight, latency, whether ejected)
    #[arg(long, env = "MESH_ENDPOINT_METRICS", value_name = "NUMBER", default_value_t = 1000)]
    pub endpoint_metrics: usize,
    /// How long what is open has to end after SIGTERM, and where a port is closed, seconds
    #[arg(long, env = "MESH_DRAIN_DEADLINE", value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    pub drain_deadline: Duration,
    /// Threads that carry connections [default: as many as there are cores]
    #[arg(long, env = "MESH_WORKERS", value_name = "NUMBER")]
    pub workers: Option<NonZeroUsize>,
    /// How long certificates last, and which are revoked.
    #[command(flatten)]
    pub certificates: CertificateFlags,
    /// What clients may ask for over HTTP.
    #[command(flatten)]
    pub http: HttpLimits,
    /// When new work is refused for want of memory.
    #[command(flatten)]
    pub overload: OverloadMarks,
}

impl GatewayConfig {
    /// Directory of this gateway's sockets.
    pub fn run_dir(&self) -> PathBuf {
        let own = || PathBuf::from(RUN_DIRS).join(format!("{}.{}", self.pod.namespace, self.pod.name));
        self.run_dir.clone().unwrap_or_else(own)
    }

    /// Where the admin interface listens.
    pub fn admin(&self) -> Address {
        self.admin.clone().unwrap_or_else(|| Address::Unix(self.run_dir().join(SOCKET_NAME)))
    }

    /// Ports on which the process itself is asked about.
    pub fn own_ports(&self) -> Vec<u16> {
        let admin = match self.admin() {
            Address::Tcp(address) => Some(address.port()),
            Address::Unix(_) => None,
        };
        [self.metrics.port(), self.readiness.port()].into_iter().chain(admin).collect()
    }
}

/// A gateway's pod as its flag names it: `NAMESPACE/NAME`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayPod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl FromStr for GatewayPod {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                Ok(Self { namespace: namespace.to_owned(), name: name.to_owned() })
            }
            _ => Err(format!("{text:?} is not NAMESPACE/NAME of a pod")),
        }
    }
}

impl fmt::Display for GatewayPod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}
