//! Which authorization policies select a pod.
//!
//! Policies are looked up by the labels they select (`selectors.rs`), so that a pod costs what its own policies cost, however
//! many there are; pods that the same policies select share what is made of them. Tested in `tests/authorization.rs`.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use k8s_openapi::api::core::v1::Pod;

use super::{
    Problems, Settings,
    endpoints::target_port,
    mesh_config::MeshSettings,
    selectors::{Labels, Selectors},
};
use crate::state::{
    defaults,
    resource::{
        ObjectKey, Objects, Resource,
        authorization_policy::{AuthorizationPolicy, Scope},
        of_kind,
        service::Service,
    },
    snapshot::{Applied, Authorization, Policy, Provider},
};

/// All policies, by what selects pods.
pub(super) struct Authorizations<'a> {
    policies: Vec<Compiled>,
    /// By namespace; those of the root namespace under `None`.
    selectors: HashMap<Option<&'a str>, Selectors<'a, usize>>,
    /// Of each namespace, those that are for a Service.
    services: HashMap<&'a str, Selectors<'a, (usize, &'a Service)>>,
    /// What has been made of a set of policies.
    made: HashMap<Vec<Selected>, Arc<Authorization>>,
}

/// The place of a policy that selects a pod, and the ports that it is about.
type Selected = (usize, Option<Box<[u16]>>);

/// A policy, and who is asked where it is a CUSTOM one.
type Compiled = (Arc<Policy>, Option<Arc<Provider>>);

/// What is to be filed, by namespace.
type Unfiled<'a, N, T> = HashMap<N, Vec<(&'a Labels, T)>>;

impl<'a> Authorizations<'a> {
    /// Looks through all policies.
    pub fn index(
        objects: &'a Objects,
        settings: &Settings,
        mesh: &MeshSettings,
        problems: &mut Problems<'_>,
    ) -> Self {
        let mut policies = Vec::new();
        let mut selectors: Unfiled<'a, _, usize> = HashMap::new();
        let mut services: Unfiled<'a, _, (usize, &Service)> = HashMap::new();
        for (key, object) in of_kind(objects, "AuthorizationPolicy") {
            let Resource::AuthorizationPolicy(written) = &object.resource else { continue };
            for field in &written.passed_over {
                problems.add(key, &format!("spec.{}", field.field), &*field.message);
            }
            let place = policies.len();
            let aliases = &mesh.trust_domain_aliases;
            let policy = if *settings.trust_domain == *defaults::TRUST_DOMAIN && aliases.is_empty() {
                Arc::clone(&written.policy)
            } else {
                Arc::new(written.policy.in_trust_domains(&settings.trust_domain, aliases))
            };
            policies.push((policy, provider(key, written, mesh, problems)));
            match &written.scope {
                Scope::Labels(labels) => {
                    let whole_mesh = key.namespace == settings.root_namespace;
                    let namespace = (!whole_mesh).then_some(&*key.namespace);
                    selectors.entry(namespace).or_default().push((labels, place));
                }
                Scope::Services(names) => {
                    let services = services.entry(&*key.namespace).or_default();
                    for (i, name) in names.iter().enumerate() {
                        match service(objects, key, name) {
                            Ok((selector, service)) => services.push((selector, (place, service))),
                            Err(message) => {
                                let field = format!("spec.targetRefs[{i}].name");
                                problems.not_found(key, &field, "Service", message);
                            }
                        }
                    }
                }
            }
        }
        let selectors = selectors.into_iter().map(|(of, all)| (of, Selectors::new(all))).collect();
        let services = services.into_iter().map(|(of, all)| (of, Selectors::new(all))).collect();
        Self { policies, selectors, services, made: HashMap::new() }
    }

    /// What holds for a pod.
    pub fn of(&mut self, key: &ObjectKey, pod: &Pod) -> Arc<Authorization> {
        let empty = BTreeMap::new();
        let labels = pod.metadata.labels.as_ref().unwrap_or(&empty);
        let mut selected: BTreeMap<usize, Option<Box<[u16]>>> = BTreeMap::new();
        for namespace in [None, Some(&*key.namespace)] {
            let found = self.selectors.get(&namespace).into_iter().flat_map(|those| those.of(labels));
            selected.extend(found.map(|place| (place, None)));
        }
        let services = self.services.get(&*key.namespace);
        for (place, service) in services.into_iter().flat_map(|those| those.of(labels)) {
            let before = selected.entry(place).or_insert_with(|| Some(Box::default()));
            let mut all = before.take().unwrap_or_default().into_vec();
            all.extend(ports_behind(service, pod));
            all.sort_unstable();
            all.dedup();
            *before = Some(all.into());
        }
        let policies = &self.policies;
        let made = self.made.entry(selected.into_iter().collect());
        let made = made.or_insert_with_key(|selected| {
            let applied = selected.iter().map(|(place, ports)| Applied {
                policy: Arc::clone(&policies[*place].0),
                ports: ports.clone(),
                provider: policies[*place].1.clone(),
            });
            Arc::new(Authorization::new(&applied.collect::<Vec<_>>()))
        });
        Arc::clone(made)
    }
}

/// The Service that a policy is for.
pub(super) fn service<'a>(
    objects: &'a Objects,
    policy: &ObjectKey,
    name: &str,
) -> Result<(&'a Labels, &'a Service), String> {
    let key = ObjectKey::new("Service", &policy.namespace, name);
    let Some(Resource::Service(service)) = objects.get(&key).map(|object| &object.resource) else {
        return Err(format!("there is no {key}, so the policy holds for nothing"));
    };
    if service.selector.is_empty() {
        return Err(format!(
            "{key} has no selector, so its pods are not known and the policy holds for none"
        ));
    }
    Ok((&service.selector, service))
}

/// The ports of a pod that a service of its leads to, whether or not the pod is ready.
pub(super) fn ports_behind(service: &Service, pod: &Pod) -> Vec<u16> {
    let ports = service.ports.iter().filter(|port| port.is_tcp);
    ports.filter_map(|port| target_port(port, pod)).collect()
}

/// Who is asked what a CUSTOM policy matches.
fn provider(
    key: &ObjectKey,
    written: &AuthorizationPolicy,
    mesh: &MeshSettings,
    problems: &mut Problems<'_>,
) -> Option<Arc<Provider>> {
    let name = written.provider.as_deref()?;
    let found = mesh.providers.iter().find(|provider| *provider.name == *name);
    if found.is_none() {
        let message = format!(
            "{name:?} is none of the extensionProviders of the mesh-wide settings: what the rules match is refused"
        );
        problems.not_found(key, "spec.provider.name", "ConfigMap", message);
    }
    found.cloned()
}
