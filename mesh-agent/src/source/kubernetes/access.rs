//! Which cluster, and how its API server is spoken to.
//!
//! Promises that what is used is what was asked for or what is around this process: never a file in somebody's home directory.

use std::path::Path;

use anyhow::{Context as _, Result};
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};

/// Says where the API server is, in every pod of a cluster.
const SERVICE_HOST: &str = "KUBERNETES_SERVICE_HOST";
/// Where pods have the token of their service account.
const TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";

/// The API server of a cluster. Cheap to clone.
#[derive(Clone)]
pub struct Cluster(Client);

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster").finish_non_exhaustive()
    }
}

impl Cluster {
    /// What [`is_around`](Self::is_around) looks for, for people.
    pub const SIGNS: &str = "KUBERNETES_SERVICE_HOST with /var/run/secrets/kubernetes.io/serviceaccount/token (a pod of a cluster)";

    /// Whether this process runs in a pod of a cluster that may speak to its API server.
    pub fn is_around() -> bool {
        std::env::var_os(SERVICE_HOST).is_some() && Path::new(TOKEN).exists()
    }

    /// The one this process runs in. Its token is read anew as it changes.
    ///
    /// # Errors
    /// There is none around, or what the pod was given cannot be read.
    pub fn around() -> Result<Self> {
        let config = Config::incluster().context("the cluster this pod runs in")?;
        Self::of(config)
    }

    /// The one of the current context of a kubeconfig file.
    ///
    /// # Errors
    /// The file cannot be read, or names no cluster.
    pub async fn of_kubeconfig(path: &Path) -> Result<Self> {
        let about = || format!("--kubeconfig {}", path.display());
        let kubeconfig = Kubeconfig::read_from(path).with_context(about)?;
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await;
        Self::of(config.with_context(about)?).with_context(about)
    }

    /// By a configuration of the client.
    pub(super) fn of(config: Config) -> Result<Self> {
        let server = config.cluster_url.to_string();
        Client::try_from(config).map(Self).with_context(|| format!("the API server at {server}"))
    }

    /// The client that speaks to it.
    pub fn client(&self) -> Client {
        self.0.clone()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::source::kubernetes::tests::fake::Fake;

    /// As those of clouds do, which say who somebody is.
    #[tokio::test]
    async fn a_program_that_kubeconfig_names_is_asked_for_the_token() -> Result<()> {
        let (fake, dir) = (Fake::start().await, tempfile::tempdir()?);
        let token = json!({
            "apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": "of-the-program"},
        });
        let program = json!({
            "apiVersion": "client.authentication.k8s.io/v1", "command": "sh", "interactiveMode": "Never",
            "args": ["-c", "printf %s \"$TOLD\""], "env": [{"name": "TOLD", "value": token.to_string()}],
        });
        let with = |program: serde_json::Value| {
            json!({
                "apiVersion": "v1", "kind": "Config", "current-context": "c",
                "clusters": [{"name": "c", "cluster": {"server": fake.url()}}],
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                "users": [{"name": "u", "user": {"exec": program}}],
            })
        };
        let file = dir.path().join("config");
        std::fs::write(&file, with(program.clone()).to_string())?;
        let cluster = Cluster::of_kubeconfig(&file).await?;
        let _ = cluster.client().apiserver_version().await;
        assert_eq!(fake.authorization(), "Bearer of-the-program");
        // One that fails says so, and where it was named.
        let mut failing = program;
        failing["args"] = json!(["-c", "echo who are you >&2; exit 3"]);
        std::fs::write(&file, with(failing).to_string())?;
        let refused = Cluster::of_kubeconfig(&file).await.map_err(|error| format!("{error:#}"));
        assert!(refused.is_err_and(|said| said.contains("--kubeconfig") && said.contains("exec")));
        Ok(())
    }
}
