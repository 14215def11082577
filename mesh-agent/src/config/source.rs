//! Flags that say where the configuration is from: a directory, or a cluster.

use std::path::PathBuf;

use clap::Args;

/// Where the configuration is from. With neither flag: from the cluster in one of whose pods this runs.
#[derive(Debug, Clone, Default, Args)]
pub struct SourceFlags {
    /// Directory of YAML manifests (Kubernetes and Istio objects), watched for changes [default: the cluster in one of whose
    /// pods this runs]
    #[arg(long, env = "MESH_CONFIG", value_name = "DIR", conflicts_with = "kubeconfig")]
    pub config: Option<PathBuf>,
    /// Kubeconfig file: its current context is the cluster whose objects are the configuration
    #[arg(long, env = "MESH_KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::super::Cli;

    #[test]
    fn a_directory_and_a_cluster_are_not_both() {
        for role in ["node", "controller"] {
            let both = ["mesh-agent", role, "--config", "d", "--kubeconfig", "f"];
            let refused = Cli::try_parse_from(both).err().map(|error| error.kind());
            assert_eq!(refused, Some(clap::error::ErrorKind::ArgumentConflict), "{role}");
            for one in [["--config", "d"], ["--kubeconfig", "f"]] {
                assert!(Cli::try_parse_from([&["mesh-agent", role], &one[..]].concat()).is_ok(), "{role}");
            }
        }
    }
}
