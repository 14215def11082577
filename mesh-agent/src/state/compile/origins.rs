//! Where the pods of each workload are, for rules that prefer a client's own zone (`zoneAwareLbSetting`).
//!
//! Those of a workload are who sends the same requests: Envoy's local cluster. Only ready pods count, as with endpoints. Nothing
//! is counted where no rule asks for it. Tested in `tests/locality.rs`.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use super::{
    Problems, Settings,
    locality::Localities,
    pod_changes::PodChange,
    workloads::{PodEntry, Pods, running, workload_name},
};
use crate::state::{
    resource::{Object, ObjectKey, Objects, Resource, in_namespace, of_kind},
    snapshot::{Origin, SharedMap},
};

/// Namespace and name of a workload.
pub(super) type Key = (Arc<str>, Arc<str>);

/// Whether any rule asks for it.
pub(super) fn are_asked_for(objects: &Objects) -> bool {
    of_kind(objects, "DestinationRule").any(
        |(_, object)| matches!(&object.resource, Resource::DestinationRule(rule) if rule.prefers_zones()),
    )
}

/// Those of all workloads.
pub(super) fn of_all(pods: &Pods<'_>, localities: &Localities<'_>) -> SharedMap<Key, Arc<Origin>> {
    let entries = pods.by_namespace.values().flat_map(|pods| pods.values());
    count(entries, localities, |_| true).into_iter().map(|(key, origin)| (key, Arc::new(origin))).collect()
}

/// Counts anew those of the workloads that these pods are or were of.
pub(super) fn follow(
    origins: &mut SharedMap<Key, Arc<Origin>>,
    (objects, settings): (&Objects, &Settings),
    changes: &[PodChange],
    localities: &Localities<'_>,
) {
    let key = |change: &PodChange, object: Option<&Arc<Object>>| match &object?.resource {
        Resource::Pod(pod) => Some(key_of(&change.key, &pod.metadata)),
        _ => None,
    };
    let both =
        |change: &PodChange| [&change.before, &change.after].map(|object| key(change, object.as_ref()));
    let changed: BTreeSet<Key> = changes.iter().flat_map(both).flatten().collect();
    let namespaces: BTreeSet<&Arc<str>> = changed.iter().map(|(namespace, _)| namespace).collect();
    // What is wrong with a pod was found when it was compiled.
    let mut known = Problems::new(objects);
    for namespace in namespaces {
        let pods =
            in_namespace(objects, "Pod", namespace).filter_map(|(key, object)| match &object.resource {
                Resource::Pod(pod) => running(key, pod, settings, &mut known),
                _ => None,
            });
        let pods: Vec<PodEntry<'_>> = pods.collect();
        let mut counted = count(pods.iter(), localities, |key| changed.contains(key));
        for key in changed.iter().filter(|(of, _)| of == namespace) {
            match counted.remove(key) {
                Some(origin) if origins.get(key).is_some_and(|known| **known == origin) => {}
                Some(origin) => drop(origins.insert(key.clone(), Arc::new(origin))),
                None => drop(origins.remove(key)),
            }
        }
    }
}

fn count<'p, 'a: 'p>(
    pods: impl Iterator<Item = &'p PodEntry<'a>>,
    localities: &Localities<'_>,
    is_wanted: impl Fn(&Key) -> bool,
) -> HashMap<Key, Origin> {
    let mut counted: HashMap<Key, Origin> = HashMap::new();
    for entry in pods.filter(|entry| entry.ready()) {
        let key = key_of(entry.key, &entry.pod.metadata);
        if is_wanted(&key) {
            counted.entry(key).or_default().add(&localities.of_pod(entry));
        }
    }
    counted
}

fn key_of(key: &ObjectKey, meta: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta) -> Key {
    (Arc::clone(&key.namespace), workload_name(meta, &key.name).into())
}
