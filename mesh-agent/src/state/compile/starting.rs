//! Pods of a cluster that have a node and no address yet: they wait for their enrolment to start, and their agent for their
//! certificates, before the API server knows where they are.
//!
//! Only for who certifies agents (`Settings::node` is none): an agent is told by the network plugin. Tested in
//! `tests/starting.rs`.

use std::sync::Arc;

use super::{
    Netns, Problems, Settings,
    pod_changes::PodChange,
    workloads::{PodEntry, host_network, identity, running, wants_mesh},
};
use crate::state::{
    resource::{ObjectKey, Objects, Resource, of_kind},
    snapshot::{SharedMap, Starting},
};

/// By namespace and name.
type Pods = SharedMap<(Arc<str>, Arc<str>), Arc<Starting>>;

/// All of them.
pub(super) fn of_all(objects: &Objects, settings: &Settings) -> Pods {
    if !are_asked_for(settings) {
        return Pods::default();
    }
    let all = of_kind(objects, "Pod").filter_map(|(key, _)| Some((name(key), of(key, objects, settings)?)));
    all.collect()
}

/// After a change of these pods.
pub(super) fn follow(starting: &mut Pods, (objects, settings): (&Objects, &Settings), changes: &[PodChange]) {
    if !are_asked_for(settings) {
        return;
    }
    for PodChange { key, .. } in changes {
        let name = name(key);
        match of(key, objects, settings) {
            Some(now) if starting.get(&name) == Some(&now) => {}
            Some(now) => drop(starting.insert(name, now)),
            None if starting.contains_key(&name) => drop(starting.remove(&name)),
            None => {}
        }
    }
}

fn are_asked_for(settings: &Settings) -> bool {
    settings.node.is_none() && settings.gateway.is_none() && matches!(settings.netns, Netns::Node(_))
}

fn name(key: &ObjectKey) -> (Arc<str>, Arc<str>) {
    (Arc::clone(&key.namespace), Arc::clone(&key.name))
}

fn of(key: &ObjectKey, objects: &Objects, settings: &Settings) -> Option<Arc<Starting>> {
    let Resource::Pod(pod) = &objects.get(key)?.resource else { return None };
    // What is wrong with a pod is found when it is compiled.
    let mut known = Problems::new(objects);
    let entry: PodEntry<'_> = running(key, pod, settings, &mut known)?;
    let waits = entry.ips.is_empty() && !host_network(pod) && wants_mesh(&entry, objects, &mut known);
    let node = entry.node().filter(|_| waits)?.into();
    Some(Arc::new(Starting { node, identity: identity(&entry, settings) }))
}
