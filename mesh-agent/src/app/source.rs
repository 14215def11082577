//! Where a role's configuration is from, as its flags and surroundings say.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::NotStarted;
use crate::{
    config::SourceFlags,
    source::{self, Cluster, Sandboxes, Source},
    state::compile::{Netns, Settings},
};

/// Where the configuration is from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum From {
    /// A directory of manifests.
    Directory(PathBuf),
    /// The cluster of a kubeconfig file.
    Kubeconfig(PathBuf),
    /// The cluster this runs in.
    Around,
}

impl From {
    /// What the flags say, else what is around. `role` is for the message.
    ///
    /// # Errors
    /// There is nothing.
    pub fn find(flags: &SourceFlags, is_around: bool, role: &str) -> Result<Self, NotStarted> {
        match (&flags.config, &flags.kubeconfig) {
            (Some(dir), _) => Ok(Self::Directory(dir.clone())),
            (None, Some(file)) => Ok(Self::Kubeconfig(file.clone())),
            (None, None) if is_around => Ok(Self::Around),
            (None, None) => Err(NotStarted(format!(
                "nothing to configure the {role} from: looked for --config DIR, MESH_CONFIG, --kubeconfig FILE, \
                 MESH_KUBECONFIG, and {}",
                Cluster::SIGNS
            ))),
        }
    }

    /// The cluster, if it is one.
    pub async fn cluster(&self) -> Result<Option<Cluster>> {
        Ok(match self {
            Self::Directory(_) => None,
            Self::Kubeconfig(file) => Some(Cluster::of_kubeconfig(file).await?),
            Self::Around => Some(Cluster::around()?),
        })
    }

    /// Starts to follow it. `pods`: in a cluster, where links to pods' network namespaces are, and what is told of pods.
    pub async fn follow(
        &self,
        cluster: Option<&Cluster>,
        settings: Settings,
        pods: (&Path, &Sandboxes),
    ) -> Result<Source> {
        match (self, cluster) {
            (Self::Directory(dir), _) => source::directory(dir.clone(), settings).await,
            (_, Some(cluster)) => {
                let settings = Settings { netns: Netns::Node(pods.0.into()), ..settings };
                source::kubernetes(cluster, settings, pods.1).await
            }
            (_, None) => anyhow::bail!("no cluster to follow"),
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn flags_come_before_what_is_around_and_nothing_says_what_was_looked_for() {
        let dir = SourceFlags { config: Some("d".into()), kubeconfig: None };
        let file = SourceFlags { config: None, kubeconfig: Some("f".into()) };
        assert_eq!(From::find(&dir, true, "agent").unwrap(), From::Directory("d".into()));
        assert_eq!(From::find(&file, true, "agent").unwrap(), From::Kubeconfig("f".into()));
        assert_eq!(From::find(&SourceFlags::default(), true, "agent").unwrap(), From::Around);
        let refused = From::find(&SourceFlags::default(), false, "agent").unwrap_err().to_string();
        for looked_for in
            ["--config", "MESH_CONFIG", "--kubeconfig", "MESH_KUBECONFIG", "KUBERNETES_SERVICE_HOST"]
        {
            assert!(refused.contains(looked_for), "{refused}");
        }
    }
}
