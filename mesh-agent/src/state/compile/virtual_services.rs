//! Which `VirtualService` holds for a service.
//!
//! Inside the mesh one holds whole, without merging: an exact host before any wildcard, the longest wildcard before
//! shorter ones, and among equals the oldest (then by name, then by namespace). Tested in `tests.rs` beside it.

use std::collections::HashMap;

use super::{Problems, covers, resolve, services::Definitions};
use crate::state::resource::{ObjectKey, Objects, Resource, virtual_service::VirtualService};

/// Those that hold inside the mesh, by host.
pub(super) struct VirtualServices<'a> {
    exact: HashMap<String, &'a VirtualService>,
    /// Longest first.
    wildcards: Vec<(String, &'a VirtualService)>,
}

impl<'a> VirtualServices<'a> {
    /// Looks through all of them.
    pub fn index(objects: &'a Objects, services: &Definitions<'_>, problems: &mut Problems<'_>) -> Self {
        let mut all: Vec<&VirtualService> = objects
            .values()
            .filter_map(|object| match &object.resource {
                Resource::VirtualService(service) if service.mesh => Some(&**service),
                _ => None,
            })
            .collect();
        all.sort_by_key(|service| {
            (service.created.is_none(), &service.created, &service.name, &service.namespace)
        });
        let mut by_host: HashMap<String, &VirtualService> = HashMap::new();
        for service in all {
            let key = key_of(service);
            let mut used = false;
            for (i, host) in service.hosts.iter().enumerate() {
                let host = resolve(host, &service.namespace);
                used |= services.covered_by(&host).next().is_some();
                if let Some(other) = by_host.get(&host).map(|other| key_of(other)) {
                    let message =
                        format!("{host} is already routed by {other}, which comes first and holds whole");
                    problems.add(&key, &format!("spec.hosts[{i}]"), message);
                } else {
                    by_host.insert(host, service);
                }
            }
            if !used {
                problems.add(
                    &key,
                    "spec.hosts",
                    "no Service has any of these hosts, so its routes hold for nothing",
                );
            }
        }
        let (wildcards, exact): (Vec<_>, Vec<_>) =
            by_host.into_iter().partition(|(host, _)| host.starts_with('*'));
        let mut index = Self { exact: exact.into_iter().collect(), wildcards };
        index.wildcards.sort_by(|(a, _), (b, _)| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
        index
    }

    /// The one that holds for a service.
    pub fn find(&self, host: &str) -> Option<&'a VirtualService> {
        let wildcard =
            || self.wildcards.iter().find(|(pattern, _)| covers(pattern, host)).map(|(_, found)| *found);
        self.exact.get(host).copied().or_else(wildcard)
    }
}

/// The key of a `VirtualService`.
pub(super) fn key_of(service: &VirtualService) -> ObjectKey {
    ObjectKey::new("VirtualService", &service.namespace, &service.name)
}
