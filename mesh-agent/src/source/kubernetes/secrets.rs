//! The Secrets that rules name, or a gateway has to show: each is watched by itself, for as long as it is named.
//!
//! Never lists Secrets: an agent may not be able to read what nobody has given to the mesh. Tested in `tests/secrets.rs`.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use kube::Api;
use tokio_util::task::AbortOnDropHandle;

use super::{
    kinds::SECRET,
    prune::Detail,
    start::Starter,
    watch::{Watch, WatchId},
};
use crate::state::{
    compile::{Change, Settings, named_secrets},
    resource::Objects,
};

/// Watches of Secrets.
pub(super) struct Secrets {
    starter: Starter,
    /// Whose Secrets they are.
    settings: Settings,
    running: HashMap<WatchId, AbortOnDropHandle<()>>,
}

/// What came of a change of rules.
pub(super) struct Followed {
    /// Watches that have begun.
    pub begun: BTreeSet<WatchId>,
    /// Watches that have ended.
    pub ended: BTreeSet<WatchId>,
}

impl Secrets {
    /// None yet.
    pub fn new(starter: Starter, settings: Settings) -> Self {
        Self { starter, settings, running: HashMap::new() }
    }

    /// Whether what this watch tells is of interest: one that was ended may have told something before.
    pub fn wants(&self, watch: &WatchId) -> bool {
        !matches!(watch, WatchId::Secret(..)) || self.running.contains_key(watch)
    }

    /// Whether a change may be one of which Secrets are named.
    pub fn may_depend_on(&self, change: &Change) -> bool {
        let (Change::Set(key, _) | Change::Gone(key)) = change;
        let of_gateway =
            || self.settings.is_own(key) || (self.settings.gateway.is_some() && &*key.kind == "Gateway");
        &*key.kind == "DestinationRule" || of_gateway()
    }

    /// Watches those that these objects name, and no others.
    pub fn follow(&mut self, objects: &Objects) -> Followed {
        let named = named_secrets(objects, &self.settings);
        let named: BTreeSet<WatchId> =
            named.into_iter().map(|(namespace, name)| WatchId::Secret(namespace, name)).collect();
        let ended: BTreeSet<WatchId> =
            self.running.keys().filter(|watch| !named.contains(watch)).cloned().collect();
        self.running.retain(|watch, _| named.contains(watch));
        let begun: BTreeSet<WatchId> =
            named.into_iter().filter(|watch| !self.running.contains_key(watch)).collect();
        for watch in &begun {
            if let WatchId::Secret(namespace, name) = watch {
                self.running.insert(watch.clone(), self.starter.start(self.watch(namespace, name)));
            }
        }
        Followed { begun, ended }
    }

    fn watch(&self, namespace: &Arc<str>, name: &Arc<str>) -> Watch {
        let version = SECRET.versions[0];
        Watch {
            id: WatchId::Secret(Arc::clone(namespace), Arc::clone(name)),
            kind: &SECRET,
            version,
            api: Api::namespaced_with(self.starter.client(), namespace, &SECRET.resource(version)),
            // Roles that name a Secret allow to list and watch it by this alone.
            fields: Some(format!("metadata.name={name}")),
            detail: Detail::Whole,
        }
    }
}
