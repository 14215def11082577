//! Settings of the whole mesh: the `ConfigMap` `mesh` of the root namespace.
//!
//! What it does not say is as flags of the agent say. Tested in `tests/mesh_config.rs`.

use std::{borrow::Cow, sync::Arc};

use super::{Problems, Settings, resolve, services::Definitions};
use crate::state::{
    resource::{ObjectKey, Objects, Resource, locality::LocalitySetting, of_kind},
    snapshot::{PathNormalization, Provider},
};

/// What the mesh-wide settings come to.
#[derive(Debug, Default)]
pub(super) struct MeshSettings {
    /// The object that says so.
    key: Option<ObjectKey>,
    /// Trust domains that policies may name for the mesh's own.
    pub trust_domain_aliases: Vec<Arc<str>>,
    /// External authorizers, with the full names of their services.
    pub providers: Vec<Arc<Provider>>,
    /// What becomes of paths, if it says.
    pub path_normalization: Option<PathNormalization>,
    /// Where traffic goes by place, where no rule says.
    pub locality: Option<Arc<LocalitySetting>>,
}

impl MeshSettings {
    /// Reads them, and the settings of the compilation as they are with them.
    pub fn find<'s>(
        objects: &Objects,
        settings: &'s Settings,
        problems: &mut Problems<'_>,
    ) -> (Self, Cow<'s, Settings>) {
        let (mut found, mut with) = (Self::default(), Cow::Borrowed(settings));
        for (key, object) in of_kind(objects, "ConfigMap") {
            let Resource::MeshConfig(written) = &object.resource else { continue };
            if key.namespace != settings.root_namespace {
                let root = &settings.root_namespace;
                let message = format!("is passed over: mesh-wide settings are those of namespace {root}");
                problems.add(key, "", message);
                continue;
            }
            if let Some(root) = &written.root_namespace {
                with.to_mut().root_namespace = Arc::clone(root);
            }
            let providers = written.providers.iter().map(|provider| {
                let host = resolve(&provider.host, &key.namespace).into();
                Arc::new(Provider { host, ..Provider::clone(provider) })
            });
            found = Self {
                key: Some(key.clone()),
                trust_domain_aliases: written.trust_domain_aliases.clone(),
                providers: providers.collect(),
                path_normalization: written.path_normalization,
                locality: written.locality.clone(),
            };
        }
        (found, with)
    }

    /// Tells of authorizers that cannot be asked now.
    pub fn check(&self, definitions: &Definitions<'_>, problems: &mut Problems<'_>) {
        let Some(key) = &self.key else { return };
        for (i, provider) in self.providers.iter().enumerate() {
            let Provider { name, host, port, .. } = &**provider;
            let missing = match definitions.get(host) {
                None => format!("there is no service {host}"),
                Some(service) if service.port(*port).is_none() => {
                    format!("service {host} has no port {port}")
                }
                Some(_) => continue,
            };
            let message = format!("provider {name:?} cannot be asked: {missing}");
            problems.not_found(key, &format!("data.mesh.extensionProviders[{i}]"), "Service", message);
        }
    }
}
