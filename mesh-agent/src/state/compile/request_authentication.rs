//! Which `RequestAuthentication`s hold for a pod: all that select it, together.
//!
//! Those of the root namespace select pods of the whole mesh, the others those of their own. Cells of key sets that are
//! fetched are carried over from the snapshot before. Tested in `tests/request_authentication.rs`.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use k8s_openapi::api::core::v1::Pod;

use super::{
    Problems, Settings,
    authorization::{ports_behind, service},
    endpoints::{port_number, selects, target_port},
    protocol,
};
use crate::state::{
    resource::{
        ObjectKey, Objects, Resource, authorization_policy::Scope, of_kind,
        request_authentication::RequestAuthentication, service::Service,
    },
    snapshot::{AppliedTokens, Keys, Protocol, RemoteKeys, Snapshot, TokenRule, Tokens},
};

/// All of them, with what selects pods.
pub(super) struct TokenRules<'a> {
    /// By namespace; those of the root namespace under `None`.
    by_namespace: HashMap<Option<&'a str>, Vec<Entry<'a>>>,
    /// Services by namespace, where there are any rules.
    services: HashMap<&'a str, Vec<&'a Service>>,
    /// Key sets that have to be fetched, by their URI.
    pub key_sets: HashMap<Arc<str>, Arc<RemoteKeys>>,
    none: Arc<Tokens>,
}

struct Entry<'a> {
    written: &'a RequestAuthentication,
    rules: Arc<[TokenRule]>,
    /// The Services that it is for; empty: it selects by labels.
    services: Vec<&'a Service>,
}

impl<'a> TokenRules<'a> {
    /// Looks through all of them.
    pub fn index(
        objects: &'a Objects,
        previous: Option<&Snapshot>,
        settings: &Settings,
        problems: &mut Problems<'_>,
    ) -> Self {
        let mut index = Self {
            by_namespace: HashMap::new(),
            services: HashMap::new(),
            key_sets: HashMap::new(),
            none: Arc::default(),
        };
        for (key, object) in of_kind(objects, "RequestAuthentication") {
            let Resource::RequestAuthentication(written) = &object.resource else { continue };
            for field in &written.passed_over {
                problems.add(key, &format!("spec.{}", field.field), &*field.message);
            }
            let services = match &written.scope {
                Scope::Labels(_) => Vec::new(),
                Scope::Services(names) => behind(objects, key, names, problems),
            };
            let rules = index.with_cells(written, previous);
            let by_labels = matches!(written.scope, Scope::Labels(_));
            let whole_mesh = by_labels && key.namespace == settings.root_namespace;
            let namespace = (!whole_mesh).then_some(&*key.namespace);
            index.by_namespace.entry(namespace).or_default().push(Entry { written, rules, services });
        }
        if !index.by_namespace.is_empty() {
            for (key, object) in of_kind(objects, "Service") {
                let Resource::Service(service) = &object.resource else { continue };
                index.services.entry(&key.namespace).or_default().push(service);
            }
        }
        index
    }

    /// The rules, with the cells of their key sets that there were before.
    fn with_cells(
        &mut self,
        written: &RequestAuthentication,
        previous: Option<&Snapshot>,
    ) -> Arc<[TokenRule]> {
        let mut rules = Vec::from(&*written.rules);
        for rule in &mut rules {
            let Keys::Remote(cell) = &mut rule.keys else { continue };
            let uri = Arc::clone(&cell.uri);
            let before = previous.and_then(|previous| previous.key_sets.get(&uri));
            let known = self.key_sets.entry(uri);
            *cell = Arc::clone(known.or_insert_with(|| kept(cell, before)));
        }
        rules.into()
    }

    /// What holds for a pod.
    pub fn of(&self, key: &ObjectKey, pod: &Pod) -> Arc<Tokens> {
        let mut applied = Vec::new();
        for namespace in [None, Some(&*key.namespace)] {
            for entry in self.by_namespace.get(&namespace).into_iter().flatten() {
                applied.extend(entry.applied(pod));
            }
        }
        if applied.is_empty() {
            return Arc::clone(&self.none);
        }
        let services = self.services.get(&*key.namespace).into_iter().flatten();
        Arc::new(Tokens { rules: applied.into(), declared: declared(services.copied(), pod) })
    }
}

impl Entry<'_> {
    /// Its rules, where it selects the pod.
    fn applied(&self, pod: &Pod) -> Option<AppliedTokens> {
        let applied = |ports| {
            let (name, rules) = (Arc::clone(&self.written.name), Arc::clone(&self.rules));
            (!rules.is_empty()).then_some(AppliedTokens { name, rules, ports })
        };
        if let Scope::Labels(labels) = &self.written.scope {
            return selects(labels, pod.metadata.labels.as_ref()).then(|| applied(None)).flatten();
        }
        let mut ports: Vec<u16> = Vec::new();
        let mut selected = false;
        for service in self.services.iter().filter(|service| is_behind(service, pod)) {
            selected = true;
            ports.extend(ports_behind(service, pod));
        }
        ports.sort_unstable();
        ports.dedup();
        selected.then(|| applied(Some(ports.into()))).flatten()
    }
}

/// The cell that there was before; where it was fetched otherwise, a new one with what is in it.
fn kept(new: &Arc<RemoteKeys>, before: Option<&Arc<RemoteKeys>>) -> Arc<RemoteKeys> {
    match before {
        Some(before) if before.timeout == new.timeout => Arc::clone(before),
        before => {
            if let Some(keys) = before.and_then(|before| before.get()) {
                new.set(keys);
            }
            Arc::clone(new)
        }
    }
}

fn behind<'a>(
    objects: &'a Objects,
    key: &ObjectKey,
    names: &[String],
    problems: &mut Problems<'_>,
) -> Vec<&'a Service> {
    let mut services = Vec::new();
    for (i, name) in names.iter().enumerate() {
        match service(objects, key, name) {
            Ok((_, service)) => services.push(service),
            Err(message) => {
                problems.not_found(key, &format!("spec.targetRefs[{i}].name"), "Service", message);
            }
        }
    }
    services
}

/// Whether a Service leads to the pod.
fn is_behind(service: &Service, pod: &Pod) -> bool {
    !service.selector.is_empty() && selects(&service.selector, pod.metadata.labels.as_ref())
}

/// What Services declare of the pod's ports: bytes only where none of them says that it is HTTP.
fn declared<'a>(services: impl Iterator<Item = &'a Service>, pod: &Pod) -> Box<[(u16, Protocol)]> {
    let mut declared: BTreeMap<u16, Protocol> = BTreeMap::new();
    for service in services.filter(|service| is_behind(service, pod)) {
        for port in service.ports.iter().filter(|port| port.is_tcp) {
            let (Some(number), Some(target)) = (port_number(port.number), target_port(port, pod)) else {
                continue;
            };
            let said = protocol::declared(port.app_protocol.as_deref(), Some(&port.name), number);
            let Some(said) = said else { continue };
            let before = declared.entry(target).or_insert(said);
            if *before == Protocol::Opaque {
                *before = said;
            }
        }
    }
    declared.into_iter().collect()
}
