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
};
use crate::state::{
    defaults,
    resource::{
        ObjectKey, Objects, Resource,
        authorization_policy::{AuthorizationPolicy, Scope},
    },
    snapshot::{Action, Applied, Authorization, Policy},
};

/// All policies, by what selects pods.
pub(super) struct Authorizations<'a> {
    policies: Vec<Arc<Policy>>,
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
    pub fn index(objects: &'a Objects, settings: &Settings, problems: &mut Problems<'_>) -> Self {
        let mut index = Self {
            policies: Vec::new(),
            selectors: HashMap::new(),
            services: HashMap::new(),
            made: HashMap::new(),
        };
        for (key, object) in objects {
            let Resource::AuthorizationPolicy(written) = &object.resource else { continue };
            report(key, written, problems);
            let place = index.policies.len();
            index.policies.push(if *settings.trust_domain == *defaults::TRUST_DOMAIN {
                Arc::clone(&written.policy)
            } else {
                Arc::new(written.policy.in_trust_domain(&settings.trust_domain))
            });
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
                policy: Arc::clone(&policies[*place]),
                ports: ports.clone(),
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

fn report(key: &ObjectKey, written: &AuthorizationPolicy, problems: &mut Problems<'_>) {
    if written.policy.action == Action::Custom {
        let provider = written.provider.as_deref().unwrap_or_default();
        let message = format!(
            "the provider {provider:?} is not asked, for external authorization is not supported yet: what the rules \
             match is refused"
        );
        problems.add(key, "spec.action", message);
    }
}
