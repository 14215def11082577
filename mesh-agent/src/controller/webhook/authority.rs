//! Whom the API server believes when it asks the webhook: the mesh's roots, as `caBundle` of the `ValidatingWebhookConfiguration`.
//!
//! Promises that it holds what the authority says now, within moments of a change, and is put right when somebody else changes
//! it; nothing else of the configuration is written, and none is made: that is the installation's. The leader's work. Tested in
//! `tests.rs`, against an API server in this process.

use std::{pin::pin, sync::Arc, time::Duration};

use futures_util::StreamExt as _;
use k8s_openapi::{ByteString, api::admissionregistration::v1::ValidatingWebhookConfiguration};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    runtime::{WatchStreamExt as _, watcher::watch_object},
};
use serde_json::{Value, json};

use crate::identity::EmbeddedCa;

/// Pause before the API server is asked to take it again, after it has refused.
const AGAIN: Duration = Duration::from_secs(2);

/// Keeps the roots in the configuration of this name, for as long as it is asked to.
pub(crate) async fn keep_believed(client: Client, name: &str, ca: &Arc<EmbeddedCa>) {
    let configurations: Api<ValidatingWebhookConfiguration> = Api::all(client);
    let mut seen = pin!(watch_object(configurations.clone(), name).default_backoff());
    let mut roots = ca.other_roots_than("").await;
    let (mut now, mut failing) = (None, false);
    loop {
        let mut refused = false;
        if let Some(patch) = now.as_ref().and_then(|now| correction(now, &roots)) {
            let patched = configurations.patch(name, &PatchParams::default(), &Patch::Strategic(patch)).await;
            match patched {
                Ok(patched) => {
                    tracing::info!(
                        "ValidatingWebhookConfiguration {name}: its caBundle has the mesh's roots"
                    );
                    now = Some(patched);
                }
                Err(error) => {
                    refused = true;
                    tracing::warn!(
                        "ValidatingWebhookConfiguration {name}: its caBundle cannot be written: {error}; it is tried again"
                    );
                }
            }
        }
        tokio::select! {
            other = ca.other_roots_than(&roots) => roots = other,
            told = seen.next() => match told {
                Some(Ok(told)) => (now, failing) = (told, false),
                Some(Err(error)) if !failing => {
                    failing = true;
                    tracing::warn!("ValidatingWebhookConfiguration {name} cannot be followed: {error}; it is tried again");
                }
                Some(Err(_)) => {}
                None => return,
            },
            () = tokio::time::sleep(AGAIN), if refused => {}
        }
    }
}

/// What makes all its webhooks believe these roots; `None` where they do.
fn correction(now: &ValidatingWebhookConfiguration, roots: &str) -> Option<Value> {
    let webhooks = now.webhooks.iter().flatten();
    let wrong = webhooks.filter(|webhook| {
        let held = webhook.client_config.ca_bundle.as_ref();
        held.is_none_or(|ByteString(held)| held != roots.as_bytes())
    });
    let bundle = ByteString(roots.as_bytes().to_vec());
    let right: Vec<Value> =
        wrong.map(|webhook| json!({"name": webhook.name, "clientConfig": {"caBundle": bundle}})).collect();
    (!right.is_empty()).then(|| json!({ "webhooks": right }))
}
