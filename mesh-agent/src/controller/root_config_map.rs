//! The mesh's roots where agents find them: a `ConfigMap` in the controller's own namespace, which their pods mount.
//!
//! Promises that it holds what the authority says now, within moments of a change; and that it is there again when somebody
//! takes it away. Roots are no secret. Tested in `authority_secret.rs`.

use std::{pin::pin, sync::Arc, time::Duration};

use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    runtime::{WatchStreamExt as _, watcher::watch_object},
};
use serde_json::json;

use crate::identity::{EmbeddedCa, ROOTS};

/// Its name, which agents' pods know.
pub const NAME: &str = "mesh-ca-root";

/// Pause before the API server is asked to take it again, after it has refused.
const AGAIN: Duration = Duration::from_secs(2);

/// Keeps it as it has to be. Ends never.
pub(crate) async fn publish(client: Client, ca: Arc<EmbeddedCa>) {
    let maps: Api<ConfigMap> = Api::default_namespaced(client);
    let mut roots = ca.other_roots_than("").await;
    loop {
        if let Err(error) = apply(&maps, &roots).await {
            tracing::warn!("ConfigMap {NAME} cannot be written: {error}; it is tried again");
            tokio::time::sleep(AGAIN).await;
            continue;
        }
        tokio::select! {
            other = ca.other_roots_than(&roots) => roots = other,
            () = until_changed(&maps, &roots) => {}
        }
    }
}

/// Until somebody else has changed it, or taken it away.
async fn until_changed(maps: &Api<ConfigMap>, roots: &str) {
    let mut seen = pin!(watch_object(maps.clone(), NAME).default_backoff());
    while let Some(news) = seen.next().await {
        match news {
            Ok(Some(map)) if holds(&map, roots) => {}
            Ok(_) => {
                tracing::warn!("ConfigMap {NAME} was changed or deleted by somebody else; it is put right");
                return;
            }
            Err(error) => tracing::warn!("ConfigMap {NAME} cannot be followed: {error}; it is tried again"),
        }
    }
}

fn holds(map: &ConfigMap, roots: &str) -> bool {
    map.data.as_ref().and_then(|data| data.get(ROOTS)).is_some_and(|held| held == roots)
}

async fn apply(maps: &Api<ConfigMap>, roots: &str) -> Result<(), kube::Error> {
    let map = json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": NAME, "labels": {"app.kubernetes.io/managed-by": "mesh-controller"}},
        "data": {ROOTS: roots},
    });
    maps.patch(NAME, &PatchParams::apply("mesh-controller").force(), &Patch::Apply(map)).await.map(|_| ())
}
