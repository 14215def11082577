//! Which `VirtualService` holds for a service.
//!
//! Inside the mesh one holds whole, without merging: an exact host before any wildcard, the longest wildcard before
//! shorter ones, and among equals the oldest (then by name, then by namespace). Which ones there are depends on the
//! client's namespace (`exportTo`). Tested in `tests.rs` beside it and by `tests/routing_cases.rs`.

use std::collections::BTreeSet;

use super::{
    Problems,
    delegates::{self, Rule},
    hosts::Hosts,
    resolve,
    services::Definitions,
};
use crate::state::{
    resource::{
        ObjectKey, Objects, Resource, of_kind,
        virtual_service::{RuleAction, VirtualService},
    },
    snapshot::Visibility,
};

/// One that holds inside the mesh, its delegates' rules in their places.
pub(super) struct Routed<'a> {
    /// The object.
    pub service: &'a VirtualService,
    /// Its HTTP rules; none of them delegates.
    pub http: Vec<Rule<'a>>,
    /// The hosts that its routes and mirrors lead to.
    pub leads_to: BTreeSet<String>,
}

/// Those that hold inside the mesh.
pub(super) struct VirtualServices<'a> {
    all: Vec<Routed<'a>>,
    /// Places in `all` by host, oldest first.
    by_host: Hosts<Vec<usize>>,
}

impl<'a> VirtualServices<'a> {
    /// Looks through all of them.
    pub fn index(objects: &'a Objects, services: &Definitions<'_>, problems: &mut Problems<'_>) -> Self {
        let mut all: Vec<&VirtualService> = of_kind(objects, "VirtualService")
            .filter_map(|(_, object)| match &object.resource {
                Resource::VirtualService(service) if service.mesh && !service.hosts.is_empty() => {
                    Some(&**service)
                }
                _ => None,
            })
            .collect();
        all.sort_by_key(|service| {
            (service.created.is_none(), &service.created, &service.name, &service.namespace)
        });
        delegates::report_unused(objects, problems);
        let mut index = Self { all: Vec::with_capacity(all.len()), by_host: Hosts::default() };
        for service in all {
            index.add(service, services, problems);
            let http = delegates::expand(objects, service, problems);
            report_mirrors(&http, problems);
            let leads_to = leads_to(service, &http);
            index.all.push(Routed { service, http, leads_to });
        }
        index
    }

    /// Takes the hosts of the next one in.
    fn add(&mut self, service: &VirtualService, services: &Definitions<'_>, problems: &mut Problems<'_>) {
        let key = key_of(service);
        let mut used = false;
        for (i, host) in service.hosts.iter().enumerate() {
            let host = resolve(host, &service.namespace);
            used |= services.covered_by(&host).next().is_some();
            let before = self.by_host.entry(host.clone());
            let hidden =
                before.iter().find(|other| hides(&self.all[**other].service.visible, &service.visible));
            if let Some(other) = hidden {
                let other = key_of(self.all[*other].service);
                let message =
                    format!("{host} is already routed by {other}, which comes first and holds whole");
                problems.conflict(&key, &format!("spec.hosts[{i}]"), message);
            }
            before.push(self.all.len());
        }
        // Gateways have hosts that are no Service's.
        if !used && service.gateways.iter().all(|gateway| gateway == "mesh") {
            let message = "no Service has any of these hosts, so its routes hold for nothing";
            problems.not_found(&key, "spec.hosts", "Service", message);
        }
    }

    /// The one that holds for a service; without a client's namespace, the one that everybody sees.
    pub fn find(&self, host: &str, client: Option<&str>) -> Option<&Routed<'a>> {
        self.candidates(host).find(|routed| match client {
            Some(client) => routed.service.visible.to(client),
            None => routed.service.visible == Visibility::Everywhere,
        })
    }

    /// All that may hold for a service, in their order.
    pub fn candidates(&self, host: &str) -> impl Iterator<Item = &Routed<'a>> {
        self.by_host.covering(host).flatten().map(|place| &self.all[*place])
    }
}

/// Whether nobody sees the later of two that would not see the earlier one.
fn hides(earlier: &Visibility, later: &Visibility) -> bool {
    match (earlier, later) {
        (Visibility::Everywhere, _) => true,
        (Visibility::Namespaces(_), Visibility::Everywhere) => false,
        (earlier, Visibility::Namespaces(named)) => named.iter().all(|client| earlier.to(client)),
    }
}

fn leads_to(service: &VirtualService, http: &[Rule<'_>]) -> BTreeSet<String> {
    let mut hosts = BTreeSet::new();
    for rule in http {
        if let RuleAction::Forward(destinations) = &rule.says.action {
            let own = destinations.iter().map(|to| resolve(&to.target.host, &rule.owner.namespace));
            hosts.extend(own);
        }
        let (owner, _) = rule.mirrored_by();
        let mirrors = rule.says.mirrors.iter().flatten();
        hosts.extend(mirrors.map(|mirror| resolve(&mirror.target.host, &owner.namespace)));
    }
    let streams = service.tls.iter().chain(&service.tcp).flat_map(|rule| &rule.route);
    hosts.extend(streams.map(|to| resolve(&to.target.host, &service.namespace)));
    hosts
}

/// Only a request that is sent on can be copied.
pub(super) fn report_mirrors(rules: &[Rule<'_>], problems: &mut Problems<'_>) {
    for rule in rules {
        let sent = matches!(rule.says.action, RuleAction::Forward(_));
        if let Some(mirror) = rule.says.mirrors.iter().flatten().next().filter(|_| !sent) {
            let (owner, index) = rule.mirrored_by();
            let message =
                "has no effect where the mesh answers itself: nothing is sent that could be mirrored";
            problems.add(&key_of(owner), &format!("spec.http[{index}].{}", mirror.field), message);
        }
    }
}

/// The key of a `VirtualService`.
pub(super) fn key_of(service: &VirtualService) -> ObjectKey {
    ObjectKey::new("VirtualService", &service.namespace, &service.name)
}
