//! What an agent needs to know of the cluster it is a part of, each with its flag: its DaemonSet, and where the node's container
//! runtime has its CNI plugins.

use std::{fmt, path::PathBuf, str::FromStr};

use clap::Args;

/// Where container runtimes keep their configurations and programs of plugins, unless they are told otherwise.
const CONFIGURATIONS: &str = "/etc/cni/net.d";

/// Namespaces whose pods are never held back: without them nothing else comes up.
const NEVER: [&str; 3] = ["kube-system", "kube-public", "kube-node-lease"];

/// What runs this agent, and the CNI plugin that keeps pods from starting before they are enrolled.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "In a cluster")]
pub struct CniFlags {
    /// The DaemonSet that this agent is of: while it is there, an agent that is told to stop leaves what it has in the kernel to
    /// the next one; without it, it takes everything with it [default: none]
    #[arg(long, env = "MESH_DAEMON_SET", value_name = "NAMESPACE/NAME")]
    pub daemon_set: Option<DaemonSetName>,
    /// Key of a taint that this node was registered with, to be taken away once this agent is ready, so that nothing is scheduled
    /// before (for example `mesh.io/agent-not-ready`); none is ever added [default: none]
    #[arg(long, env = "MESH_STARTUP_TAINT", value_name = "KEY")]
    pub startup_taint: Option<String>,
    /// Where the container runtime looks for programs of CNI plugins (`/opt/cni/bin`): the agent installs its plugin, so that
    /// no pod starts before it is enrolled, and removes it when it is removed itself [default: no plugin]
    #[arg(long, env = "MESH_CNI_BIN_DIR", value_name = "DIR")]
    pub cni_bin_dir: Option<PathBuf>,
    /// Where the container runtime looks for CNI configurations: the plugin is put at the end of the chain that the runtime
    /// uses
    #[arg(long, env = "MESH_CNI_CONF_DIR", value_name = "DIR", default_value = CONFIGURATIONS)]
    pub cni_conf_dir: PathBuf,
    /// Namespaces whose pods start without waiting for the agent, besides those that are not enrolled; the agent's own has to
    /// be one of them
    #[arg(long, env = "MESH_CNI_NEVER", value_name = "NAMESPACES", value_delimiter = ',', default_values = NEVER)]
    pub cni_never: Vec<String>,
}

/// A DaemonSet as flags name it: `NAMESPACE/NAME`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DaemonSetName {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl FromStr for DaemonSetName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                Ok(Self { namespace: namespace.to_owned(), name: name.to_owned() })
            }
            _ => Err(format!("{text:?} is not NAMESPACE/NAME of a DaemonSet")),
        }
    }
}

impl fmt::Display for DaemonSetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::DaemonSetName;

    #[test]
    fn a_daemon_set_has_a_namespace_and_a_name() {
        let name = "mesh-system/mesh-agent".parse::<DaemonSetName>().map(|name| name.to_string());
        assert_eq!(name, Ok("mesh-system/mesh-agent".to_owned()));
        for bad in ["", "a", "/a", "a/", "a/b/c"] {
            assert!(bad.parse::<DaemonSetName>().is_err(), "{bad}");
        }
    }
}
