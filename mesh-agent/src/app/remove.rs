//! `mesh-agent remove`: takes the agents off every node, in the order that lets them put everything back.
//!
//! Whoever uninstalls the mesh takes the agents' DaemonSet and their rights away together, and agents without rights cannot say
//! any more that their pods have left the mesh. So the DaemonSet goes first, and this returns once all of its pods have ended.
//! Never touches anything else. Shown by `cargo xtask test cluster` (`mesh.rs`).

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use k8s_openapi::api::apps::v1::DaemonSet;
use kube::{
    Api,
    api::{DeleteParams, Preconditions},
    runtime::{conditions::is_deleted, wait::await_condition},
};
use tokio::time::timeout;

use crate::{config::RemoveConfig, source::Cluster};

/// Deletes the DaemonSet and waits for the end of its pods. Nothing to do is no failure.
///
/// # Errors
/// The API server refuses it or cannot be asked, or pods are still there after `--timeout`.
pub fn remove_agents(config: &RemoveConfig) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let limit = Duration::from_secs(config.timeout);
        let done = timeout(limit, delete(config)).await;
        done.unwrap_or_else(|_| bail!("agents of {} are still there after {limit:?}", config.daemon_set))
    })
}

async fn delete(config: &RemoveConfig) -> Result<()> {
    let name = &config.daemon_set;
    let cluster = Cluster::around().context("asking the cluster that this runs in")?;
    let sets: Api<DaemonSet> = Api::namespaced(cluster.client(), &name.namespace);
    let found = sets.get_opt(&name.name).await.with_context(|| format!("reading the DaemonSet {name}"))?;
    let Some(uid) = found.and_then(|set| set.metadata.uid) else { return Ok(()) };
    let preconditions = Some(Preconditions { uid: Some(uid.clone()), resource_version: None });
    // In the foreground: it is there until the last of its pods has gone.
    let params = DeleteParams { preconditions, ..DeleteParams::foreground() };
    sets.delete(&name.name, &params).await.with_context(|| format!("deleting the DaemonSet {name}"))?;
    let gone = await_condition(sets, &name.name, is_deleted(&uid)).await;
    gone.map(drop).with_context(|| format!("waiting for the end of the agents of {name}"))
}
