//! What changes of pods come to: who they are now, and whose endpoints have to be looked at again.
//!
//! Never guesses: where a change concerns other pods too (an address that several have, the first or last pod of a namespace,
//! or of those that rules select), it says so, and everything is compiled. Tested in `tests/incremental.rs`.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::IpAddr,
    sync::Arc,
};

use super::{
    Policies, Problems, Settings,
    clients::Selections,
    mesh_config::MeshSettings,
    selectors::Labels,
    workloads::{PodEntry, of_entry, running},
};
use crate::state::{
    resource::{Object, ObjectKey, Objects, Resource, in_namespace},
    snapshot::{SharedMap, Snapshot, Workload},
};

/// A pod that has come, gone, or is otherwise than before.
pub(super) struct PodChange {
    /// Which one.
    pub key: ObjectKey,
    /// What it was.
    pub before: Option<Arc<Object>>,
    /// What it is.
    pub after: Option<Arc<Object>>,
}

/// What changes of pods are followed by.
pub(super) struct PodChanges<'p> {
    /// All objects, as they are now.
    pub objects: &'p Objects,
    /// The snapshot before.
    pub before: &'p Snapshot,
    /// Addresses that several pods have.
    pub shared: &'p HashSet<IpAddr>,
    /// Settings of the compilation.
    pub settings: &'p Settings,
    /// Mesh-wide settings.
    pub mesh: &'p MeshSettings,
}

/// Pods that are other endpoints than they were, or none any more.
#[derive(Default)]
pub(super) struct ChangedPods<'p> {
    /// By namespace and name, with the labels they had and have.
    pub pods: BTreeMap<(&'p str, &'p str), Vec<Option<&'p Labels>>>,
    /// The addresses they had and have.
    pub ips: HashSet<IpAddr>,
    /// Their namespaces, by the names that problems have for them.
    pub namespaces: BTreeSet<String>,
}

impl<'p> PodChanges<'p> {
    /// Enters who the pods are now; `None` where others are concerned.
    pub fn follow(
        &self,
        changes: &'p [PodChange],
        workloads: &mut SharedMap<IpAddr, Arc<Workload>>,
        problems: &mut Problems<'_>,
    ) -> Option<ChangedPods<'p>> {
        // What is wrong with policies, and was wrong with the pods, was found when they were compiled.
        let mut known = Problems::new(self.objects);
        let mut policies =
            Policies::index(self.objects, Some(self.before), (self.settings, self.mesh), &mut known);
        let mut changed = ChangedPods::default();
        let mut entries = Vec::with_capacity(changes.len());
        for change in changes {
            let before = self.entry(&change.key, change.before.as_ref(), &mut known);
            let after = self.entry(&change.key, change.after.as_ref(), problems);
            self.leaves_views(changes, &change.key, [before.as_ref(), after.as_ref()], &policies.selections)?;
            for ip in before.iter().flat_map(|entry| &entry.ips) {
                self.take_away(&change.key, *ip, workloads)?;
            }
            changed.namespaces.insert(ObjectKey::new("Namespace", "", &change.key.namespace).to_string());
            entries.push((before, after));
        }
        for (change, (before, after)) in changes.iter().zip(entries) {
            let workload = after.as_ref().and_then(|entry| {
                of_entry(entry, (self.objects, Some(self.before)), self.settings, &mut policies, problems)
            });
            for ip in after.iter().flat_map(|entry| &entry.ips) {
                let Some(workload) = &workload else { continue };
                if self.shared.contains(ip) || workloads.insert(*ip, Arc::clone(workload)).is_some() {
                    return None;
                }
            }
            if !self.is_as_before(before.as_ref(), after.as_ref(), workload.as_ref()) {
                let both = || before.iter().chain(&after);
                changed.ips.extend(both().flat_map(|entry| &entry.ips));
                let name = (&*change.key.namespace, &*change.key.name);
                changed.pods.insert(name, both().map(PodEntry::labels).collect());
            }
        }
        // A namespace may be told of by any of its pods.
        problems
            .found
            .iter()
            .all(|problem| !is_of(problem.object.as_deref(), &changed.namespaces))
            .then_some(changed)
    }

    fn entry(
        &self,
        key: &'p ObjectKey,
        object: Option<&'p Arc<Object>>,
        problems: &mut Problems<'_>,
    ) -> Option<PodEntry<'p>> {
        let Resource::Pod(pod) = &object?.resource else { return None };
        running(key, pod, self.settings, problems)
    }

    /// Who looks from a namespace, and as whom, depends on which pods there are in it: `None` where no other pod, one that stays
    /// as it is, looks as this one did or does.
    fn leaves_views(
        &self,
        changes: &[PodChange],
        key: &ObjectKey,
        entries: [Option<&PodEntry<'_>>; 2],
        selections: &Selections<'_>,
    ) -> Option<()> {
        let view = |entry: &PodEntry<'_>| selections.view(&key.namespace, entry.labels());
        let [was, is] = entries.map(|entry| entry.map(view));
        if was == is {
            return Some(());
        }
        let mut known = Problems::new(self.objects);
        let others = in_namespace(self.objects, "Pod", &key.namespace)
            .filter(|(other, _)| changes.iter().all(|change| change.key != **other));
        let others = others.filter_map(|(other, object)| match &object.resource {
            Resource::Pod(pod) => running(other, pod, self.settings, &mut known),
            _ => None,
        });
        let others: HashSet<Option<Arc<str>>> = others.map(|entry| view(&entry)).collect();
        let stays = |view: Option<Arc<str>>| match view {
            None => !others.is_empty(),
            view => others.contains(&view),
        };
        [was, is].into_iter().flatten().all(stays).then_some(())
    }

    fn take_away(
        &self,
        key: &ObjectKey,
        ip: IpAddr,
        workloads: &mut SharedMap<IpAddr, Arc<Workload>>,
    ) -> Option<()> {
        if self.shared.contains(&ip) {
            return None;
        }
        // One of the host network has none.
        if workloads.get(&ip).is_some_and(|pod| pod.namespace == key.namespace && pod.name == key.name) {
            workloads.remove(&ip);
        }
        Some(())
    }

    /// Whether it is the same endpoint of the same services as it was.
    fn is_as_before(
        &self,
        before: Option<&PodEntry<'_>>,
        after: Option<&PodEntry<'_>>,
        workload: Option<&Arc<Workload>>,
    ) -> bool {
        let (Some(before), Some(after)) = (before, after) else { return before.is_none() && after.is_none() };
        let was = after.ips.first().and_then(|ip| self.before.workloads.get(ip));
        before.ips == after.ips
            && before.labels() == after.labels()
            && before.weight() == after.weight()
            && before.ready() == after.ready()
            && before.pod.spec == after.pod.spec
            && workload.is_none_or(|now| was.is_some_and(|was| Arc::ptr_eq(was, now)))
    }
}

fn is_of(object: Option<&str>, names: &BTreeSet<String>) -> bool {
    object.is_some_and(|object| names.contains(object))
}
