//! Who looks at services: the pods of a namespace, and apart from the others those that rules of it select
//! (`workloadSelector` of a `DestinationRule`).
//!
//! Pods that the same rules select are one kind of client, however many they are: what is compiled grows with the kinds that
//! there are pods of. Tested in `tests/workload_selector.rs`.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{endpoints::selects, selectors::Labels, workloads::Pods};
use crate::state::resource::{Objects, Resource, of_kind};

/// What the rules of each namespace select clients by.
pub(super) struct Selections<'a> {
    by_namespace: BTreeMap<&'a str, BTreeSet<&'a Labels>>,
}

impl<'a> Selections<'a> {
    /// Looks through all rules.
    pub fn index(objects: &'a Objects) -> Self {
        let mut by_namespace: BTreeMap<&str, BTreeSet<&Labels>> = BTreeMap::new();
        for (key, object) in of_kind(objects, "DestinationRule") {
            let Resource::DestinationRule(rule) = &object.resource else { continue };
            if let Some(selector) = &rule.selector {
                by_namespace.entry(&key.namespace).or_default().insert(selector);
            }
        }
        Self { by_namespace }
    }

    /// Those that select a pod.
    fn of(&self, namespace: &str, labels: Option<&Labels>) -> Vec<&'a Labels> {
        let all = self.by_namespace.get(namespace).into_iter().flatten().copied();
        all.filter(|selector| selects(selector, labels)).collect()
    }

    /// The name of what a pod sees, where any selects it: `shop/app=ratings`.
    pub fn view(&self, namespace: &str, labels: Option<&Labels>) -> Option<Arc<str>> {
        let selected = self.of(namespace, labels);
        (!selected.is_empty()).then(|| name(namespace, &selected).into())
    }
}

fn name(namespace: &str, selected: &[&Labels]) -> String {
    let one = |labels: &&Labels| {
        let pairs = labels.iter().map(|(label, value)| format!("{label}={value}"));
        if labels.is_empty() { "*".to_owned() } else { pairs.collect::<Vec<_>>().join(",") }
    };
    format!("{namespace}/{}", selected.iter().map(one).collect::<Vec<_>>().join("+"))
}

/// The pods of a namespace, or those of them that the same rules select.
#[derive(Debug, Clone, Copy)]
pub(super) struct Client<'c> {
    /// Where they are.
    pub namespace: &'c str,
    /// What they are called: the namespace, or what [`Selections::view`] says.
    pub name: &'c str,
    /// What selects them.
    selected: &'c [&'c Labels],
}

impl Client<'_> {
    /// Whether rules with this selector, of its namespace, are for it.
    pub fn is_selected(&self, selector: &Labels) -> bool {
        self.selected.contains(&selector)
    }
}

/// The kinds of clients that rules select, and that there are pods of.
pub(super) struct Clients<'a> {
    selected: BTreeMap<String, (&'a str, Vec<&'a Labels>)>,
}

impl<'a> Clients<'a> {
    /// Looks through the pods of namespaces whose rules select any.
    pub fn index(selections: &Selections<'a>, pods: &Pods<'a>) -> Self {
        let mut selected = BTreeMap::new();
        for namespace in selections.by_namespace.keys() {
            for pod in pods.by_namespace.get(namespace).into_iter().flat_map(BTreeMap::values) {
                let by = selections.of(namespace, pod.labels());
                if !by.is_empty() {
                    selected.insert(name(namespace, &by), (*namespace, by));
                }
            }
        }
        Self { selected }
    }

    /// Those that rules select.
    pub fn selected(&self) -> impl Iterator<Item = Client<'_>> {
        self.selected.iter().map(|(name, (namespace, selected))| Client { namespace, name, selected })
    }

    /// The clients of this name.
    pub fn named<'c>(&'c self, name: &'c str) -> Client<'c> {
        match self.selected.get(name) {
            Some((namespace, selected)) => Client { namespace, name, selected },
            None => Client { namespace: name, name, selected: &[] },
        }
    }
}
