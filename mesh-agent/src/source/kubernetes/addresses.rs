//! Addresses of pods that the API server does not know yet: the network plugin told of them, while it waits for the pod to be
//! enrolled.
//!
//! What the API server knows is never replaced. Tested in `tests.rs`.

use std::sync::Arc;

use k8s_openapi::api::core::v1::PodIP;

use crate::{
    source::ByUid,
    state::{
        compile::Change,
        resource::{Object, ObjectKey, Resource},
    },
};

/// Completes what becomes of pods.
pub(super) fn complete(changes: &mut [Change], told: &ByUid) {
    for change in changes {
        if let Change::Set(_, object) = change
            && let Some(with) = with_addresses(object, told)
        {
            *object = with;
        }
    }
}

/// What becomes of these pods by what was told of them, or is told no more.
pub(super) fn changes<'o>(
    pods: impl Iterator<Item = (&'o ObjectKey, &'o Arc<Object>)>,
    told: &ByUid,
) -> Vec<Change> {
    let waiting = pods.filter(|(_, object)| uid_without_address(object).is_some());
    let set = |(key, object): (&ObjectKey, &Arc<Object>)| {
        Change::Set(key.clone(), with_addresses(object, told).unwrap_or_else(|| Arc::clone(object)))
    };
    waiting.map(set).collect()
}

/// The UID of a pod that has no address yet and is to have one of its own.
fn uid_without_address(object: &Object) -> Option<&str> {
    let Resource::Pod(pod) = &object.resource else { return None };
    let status = pod.status.as_ref();
    let is_known = status.is_some_and(|status| {
        status.pod_ip.is_some() || status.pod_ips.as_ref().is_some_and(|ips| !ips.is_empty())
    });
    let of_the_node = pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false);
    pod.metadata.uid.as_deref().filter(|_| !is_known && !of_the_node)
}

fn with_addresses(object: &Object, told: &ByUid) -> Option<Arc<Object>> {
    let sandbox = told.get(uid_without_address(object)?).filter(|sandbox| !sandbox.ips.is_empty())?;
    let Resource::Pod(pod) = &object.resource else { return None };
    let mut pod = pod.clone();
    let ips = sandbox.ips.iter().map(|ip| PodIP { ip: ip.to_string() });
    pod.status.get_or_insert_default().pod_ips = Some(ips.collect());
    Some(Arc::new(Object { file: Arc::clone(&object.file), resource: Resource::Pod(pod) }))
}
