//! Which authorization policies select a pod.
//!
//! Policies are looked up by a label of their selector, so that a pod costs what its own policies cost, however many
//! there are; pods that the same policies select share what is made of them. Tested in `tests/authorization.rs`.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use k8s_openapi::api::core::v1::{Pod, Service};

use super::{
    Problems, Settings,
    endpoints::{is_tcp, selects, target_port},
    mesh_config::MeshSettings,
};
use crate::state::{
    defaults,
    resource::{
        ObjectKey, Objects, Resource,
        authorization_policy::{AuthorizationPolicy, Scope},
    },
    snapshot::{Applied, Authorization, Policy, Provider},
};

/// All policies, by what selects pods.
pub(super) struct Authorizations<'a> {
    policies: Vec<Compiled>,
    /// By namespace; those of the root namespace under `None`.
    selectors: HashMap<Option<&'a str>, Selectors<'a>>,
    /// Of each namespace, those that are for a Service.
    services: HashMap<&'a str, Vec<(usize, &'a Service)>>,
    /// What has been made of a set of policies.
    made: HashMap<Vec<Selected>, Arc<Authorization>>,
}

type Labels = BTreeMap<String, String>;

/// The place of a policy that selects a pod, and the ports that it is about.
type Selected = (usize, Option<Box<[u16]>>);

/// A policy, and who is asked where it is a CUSTOM one.
type Compiled = (Arc<Policy>, Option<Arc<Provider>>);

/// The selectors of one namespace, with the places of their policies.
#[derive(Default)]
struct Selectors<'a> {
    /// Those that select every pod.
    all: Vec<usize>,
    /// The others, by one of the labels that they ask for.
    by_label: HashMap<(&'a str, &'a str), Vec<(usize, &'a Labels)>>,
}

impl<'a> Authorizations<'a> {
    /// Looks through all policies.
    pub fn index(
        objects: &'a Objects,
        settings: &Settings,
        mesh: &MeshSettings,
        problems: &mut Problems<'_>,
    ) -> Self {
        let mut index = Self {
            policies: Vec::new(),
            selectors: HashMap::new(),
            services: HashMap::new(),
            made: HashMap::new(),
        };
        for (key, object) in objects {
            let Resource::AuthorizationPolicy(written) = &object.resource else { continue };
            for field in &written.passed_over {
                problems.add(key, &format!("spec.{}", field.field), &*field.message);
            }
            let place = index.policies.len();
            let aliases = &mesh.trust_domain_aliases;
            let policy = if *settings.trust_domain == *defaults::TRUST_DOMAIN && aliases.is_empty() {
                Arc::clone(&written.policy)
            } else {
                Arc::new(written.policy.in_trust_domains(&settings.trust_domain, aliases))
            };
            index.policies.push((policy, provider(key, written, mesh, problems)));
            match &written.scope {
                Scope::Labels(labels) => {
                    let whole_mesh = key.namespace == settings.root_namespace;
                    let namespace = (!whole_mesh).then_some(&*key.namespace);
                    let selectors = index.selectors.entry(namespace).or_default();
                    match labels.iter().next() {
                        None => selectors.all.push(place),
                        Some((name, value)) => {
                            let those = selectors.by_label.entry((name, value)).or_default();
                            those.push((place, labels));
                        }
                    }
                }
                Scope::Services(names) => {
                    let services = index.services.entry(&key.namespace).or_default();
                    for (i, name) in names.iter().enumerate() {
                        match service(objects, key, name) {
                            Ok(service) => services.push((place, service)),
                            Err(message) => {
                                problems.add(key, &format!("spec.targetRefs[{i}].name"), message);
                            }
                        }
                    }
                }
            }
        }
        index
    }

    /// What holds for a pod.
    pub fn of(&mut self, key: &ObjectKey, pod: &Pod) -> Arc<Authorization> {
        let empty = BTreeMap::new();
        let labels = pod.metadata.labels.as_ref().unwrap_or(&empty);
        let mut selected: BTreeMap<usize, Option<Box<[u16]>>> = BTreeMap::new();
        for selectors in
            [None, Some(&*key.namespace)].into_iter().filter_map(|from| self.selectors.get(&from))
        {
            let by_label =
                labels.iter().filter_map(|(name, value)| selectors.by_label.get(&(&**name, &**value)));
            let by_label = by_label.flatten().filter(|(_, wanted)| selects(wanted, Some(labels)));
            selected.extend(selectors.all.iter().map(|place| (*place, None)));
            selected.extend(by_label.map(|(place, _)| (*place, None)));
        }
        for (place, service) in self.services.get(&*key.namespace).into_iter().flatten() {
            if let Some(ports) = ports_behind(service, pod) {
                let before = selected.entry(*place).or_insert_with(|| Some(Box::default()));
                let mut all = before.take().unwrap_or_default().into_vec();
                all.extend(ports);
                all.sort_unstable();
                all.dedup();
                *before = Some(all.into());
            }
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
fn service<'a>(objects: &'a Objects, policy: &ObjectKey, name: &str) -> Result<&'a Service, String> {
    let key = ObjectKey::new("Service", &policy.namespace, name);
    let Some(Resource::Service(service)) = objects.get(&key).map(|object| &object.resource) else {
        return Err(format!("there is no {key}, so the policy holds for nothing"));
    };
    let selector = service.spec.as_ref().and_then(|spec| spec.selector.as_ref());
    if selector.is_none_or(BTreeMap::is_empty) {
        return Err(format!(
            "{key} has no selector, so its pods are not known and the policy holds for none"
        ));
    }
    Ok(service)
}

/// The ports of a pod that a service leads to, whether or not the pod is ready; `None` where it is none of its pods.
fn ports_behind(service: &Service, pod: &Pod) -> Option<Vec<u16>> {
    let spec = service.spec.as_ref()?;
    selects(spec.selector.as_ref()?, pod.metadata.labels.as_ref()).then_some(())?;
    let ports = spec.ports.iter().flatten().filter(|port| is_tcp(port.protocol.as_deref()));
    Some(ports.filter_map(|port| target_port(port, pod)).collect())
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
        problems.add(key, "spec.provider.name", message);
    }
    found.cloned()
}
