//! Flags of `mesh-agent controller` and `mesh-agent token`.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{ArgAction, Args, ValueEnum, value_parser};

use super::{STATE_DIR, SourceFlags, some_seconds};
use crate::state::{
    defaults::{ROOT_NAMESPACE, TRUST_DOMAIN},
    snapshot::Subnet,
};

/// The name under which agents know the controller (Istio's is `istiod.istio-system.svc`).
const SERVER_NAME: &str = "mesh-controller.mesh-system.svc";
/// The service account of the mesh's agents.
const AGENT_ACCOUNT: &str = "mesh-system/mesh-agent";
/// Whom tokens are for, as Istio's agents have it.
const AUDIENCE: &str = "istio-ca";

/// `mesh-agent controller`.
#[derive(Debug, Clone, Args)]
pub struct ControllerConfig {
    /// Where the configuration is from, as for the agents: it says which pods run on which node.
    #[command(flatten)]
    pub source: SourceFlags,
    /// Trust domain of every identity: `spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/ACCOUNT`
    #[arg(long, env = "MESH_TRUST_DOMAIN", default_value = TRUST_DOMAIN)]
    pub trust_domain: String,
    /// Namespace whose policies hold for the whole mesh
    #[arg(long, env = "MESH_ROOT_NAMESPACE", value_name = "NAMESPACE", default_value = ROOT_NAMESPACE)]
    pub root_namespace: String,
    /// Where the authority's key and certificate are kept (made there if there are none), and the key of tokens
    #[arg(long, env = "MESH_STATE_DIR", value_name = "DIR", default_value = STATE_DIR)]
    pub state_dir: PathBuf,
    /// Directory of an authority from elsewhere, instead of the one in the state directory, in Istio's `cacerts` layout:
    /// `ca-cert.pem`, `ca-key.pem`, `root-cert.pem`, `cert-chain.pem`
    #[arg(long, env = "MESH_CA_CERTS", value_name = "DIR")]
    pub ca_certs: Option<PathBuf>,
    /// Secret of the controller's own namespace in which the authority is kept, in the same layout: made there if there is none,
    /// so that all replicas are one authority. The roots are published beside it, as `ConfigMap` mesh-ca-root
    #[arg(long, env = "MESH_CA_SECRET", value_name = "NAME", conflicts_with = "ca_certs")]
    pub ca_secret: Option<String>,
    /// Where the certificate service is served, over TLS
    #[arg(long, env = "MESH_CONTROLLER_LISTEN", value_name = "ADDRESS", default_value = "0.0.0.0:15012")]
    pub listen: SocketAddr,
    /// Where `/healthz/ready` is served
    #[arg(long, env = "MESH_READINESS", value_name = "ADDRESS", default_value = "0.0.0.0:15021")]
    pub readiness: SocketAddr,
    /// Where the webhook that validates is served, over TLS, at `/validate` [default: nowhere]
    #[arg(long, env = "MESH_WEBHOOK_LISTEN", value_name = "ADDRESS")]
    pub webhook_listen: Option<SocketAddr>,
    /// `ValidatingWebhookConfiguration` whose `caBundle` the leader of the replicas keeps at the mesh's roots
    #[arg(long, env = "MESH_WEBHOOK_CONFIGURATION", value_name = "NAME", requires = "webhook_listen")]
    pub webhook_configuration: Option<String>,
    /// Whether the leader of the replicas says in the status of each object of the mesh's kinds what has become of it
    #[arg(long, env = "MESH_WRITE_STATUS", value_name = "BOOL", default_value_t = false, action = ArgAction::Set)]
    pub write_status: bool,
    /// Name of this replica in the Lease mesh-controller, which the one has that leads [default: the host's name]
    #[arg(long, env = "MESH_POD_NAME", value_name = "NAME")]
    pub pod_name: Option<String>,
    /// Names and addresses in the server certificate, which the authority issues itself
    #[arg(long, env = "MESH_CONTROLLER_SERVER_NAMES", value_name = "NAME", value_delimiter = ',', default_value = SERVER_NAME)]
    pub server_names: Vec<String>,
    /// Service accounts of agents, NAMESPACE/NAME: they alone may ask for identities of others
    #[arg(long, env = "MESH_AGENT_ACCOUNTS", value_name = "ACCOUNT", value_delimiter = ',', default_value = AGENT_ACCOUNT)]
    pub agent_accounts: Vec<ServiceAccountName>,
    /// Service accounts of gateways, NAMESPACE/NAME: they are told the key sets of token issuers, as agents are
    #[arg(long, env = "MESH_GATEWAY_ACCOUNTS", value_name = "ACCOUNT", value_delimiter = ',')]
    pub gateway_accounts: Vec<ServiceAccountName>,
    /// Whose tokens show who calls
    #[arg(long, env = "MESH_TOKENS", value_enum, default_value_t = TokensOf::Controller)]
    pub tokens: TokensOf,
    /// Audience that tokens have to be for
    #[arg(long, env = "MESH_TOKEN_AUDIENCE", value_name = "NAME", default_value = AUDIENCE)]
    pub token_audience: String,
    /// How long certificates are valid that are asked for without a time, seconds
    #[arg(long, env = "MESH_CERTIFICATE_LIFETIME", value_name = "SECONDS", default_value = "86400", value_parser = some_seconds)]
    pub certificate_lifetime: Duration,
    /// The longest time that may be asked for, seconds
    #[arg(long, env = "MESH_MAX_CERTIFICATE_LIFETIME", value_name = "SECONDS", default_value = "86400", value_parser = some_seconds)]
    pub max_certificate_lifetime: Duration,
    /// Networks that key sets (`jwksUri`) may be fetched from although they are private, loopback or link-local
    #[arg(long, env = "MESH_JWKS_ALLOW", value_name = "CIDR", value_delimiter = ',', value_parser = subnet)]
    pub jwks_allow: Vec<Subnet>,
    /// PEM certificates that servers of key sets may chain to, beside the system's
    #[arg(long, env = "MESH_JWKS_CA", value_name = "FILE")]
    pub jwks_ca: Option<PathBuf>,
    /// Requests a second that one caller may make for long
    #[arg(long, env = "MESH_CA_REQUESTS_PER_SECOND", value_name = "COUNT", default_value_t = 20,
          value_parser = value_parser!(u32).range(1..))]
    pub requests_per_second: u32,
    /// Requests that one caller may make at once, as a node does that starts with many pods
    #[arg(long, env = "MESH_CA_REQUEST_BURST", value_name = "COUNT", default_value_t = 500,
          value_parser = value_parser!(u32).range(1..))]
    pub request_burst: u32,
}

fn subnet(text: &str) -> Result<Subnet, String> {
    Subnet::parse(text).ok_or_else(|| format!("{text:?} is not a network such as 10.0.0.0/8"))
}

/// Whose tokens show who calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TokensOf {
    /// Those made by `mesh-agent token` with the key in the state directory.
    Controller,
    /// Service account tokens of Kubernetes, which the API server of the cluster is asked about (`TokenReview`).
    Kubernetes,
}

/// `mesh-agent token`.
#[derive(Debug, Clone, Args)]
pub struct TokenConfig {
    /// Node whose agent it is for, as in the `spec.nodeName` of its pods
    #[arg(long, env = "MESH_NODE")]
    pub node: String,
    /// The controller's state directory, which holds the key that signs tokens (made there if there is none)
    #[arg(long, env = "MESH_STATE_DIR", value_name = "DIR", default_value = STATE_DIR)]
    pub state_dir: PathBuf,
    /// Trust domain of the mesh
    #[arg(long, env = "MESH_TRUST_DOMAIN", default_value = TRUST_DOMAIN)]
    pub trust_domain: String,
    /// Service account of the agent, NAMESPACE/NAME
    #[arg(long, value_name = "ACCOUNT", default_value = AGENT_ACCOUNT)]
    pub service_account: ServiceAccountName,
    /// Whom the token is for
    #[arg(long, env = "MESH_TOKEN_AUDIENCE", value_name = "NAME", default_value = AUDIENCE)]
    pub audience: String,
    /// How long it is good, seconds; a newer one of the node, once used, ends it earlier
    #[arg(long, value_name = "SECONDS", default_value = "86400", value_parser = some_seconds)]
    pub duration: Duration,
    /// Where to put it, mode 0600, in place of what is there [default: standard output]
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// A service account as flags name it: `NAMESPACE/NAME`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ServiceAccountName {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl std::str::FromStr for ServiceAccountName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            Some((namespace, name)) if is_name(namespace) && is_name(name) => {
                Ok(Self { namespace: namespace.to_owned(), name: name.to_owned() })
            }
            _ => Err(format!("{text:?} is not NAMESPACE/NAME of a service account")),
        }
    }
}

/// The characters of Kubernetes' names.
fn is_name(part: &str) -> bool {
    !part.is_empty()
        && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.'))
}

impl std::fmt::Display for ServiceAccountName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_are_namespace_and_name() {
        let account = "mesh-system/mesh-agent".parse::<ServiceAccountName>();
        assert_eq!(account.map(|account| account.to_string()), Ok(AGENT_ACCOUNT.to_owned()));
        for bad in ["", "a", "/a", "a/", "a/b/c", "a/B", "a b/c"] {
            assert!(bad.parse::<ServiceAccountName>().is_err(), "{bad}");
        }
    }
}
