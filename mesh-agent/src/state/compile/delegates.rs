//! `delegate`: the rules of a root and of those it delegates to, as one list.
//!
//! A delegate that is not there, or a rule of it that the root's matches do not cover, is left out, and a problem says
//! so. Tested in `tests/delegates.rs` beside it.

use std::{borrow::Cow, sync::Arc};

use http::HeaderName;

use super::{Problems, virtual_services::key_of};
use crate::state::{
    resource::{
        ObjectKey, Objects, Resource, of_kind,
        virtual_service::{HttpRule, RuleAction, RuleMatch, VirtualService},
    },
    snapshot::{HeaderMatch, RequestMatch, StringMatch},
};

/// A rule that does not delegate any more.
pub(super) struct Rule<'a> {
    /// Who wrote what it does: hosts without dots are in its namespace.
    pub owner: &'a VirtualService,
    /// Its place in the owner's list.
    pub index: usize,
    /// Who delegated, if anybody.
    pub root: Option<(&'a VirtualService, usize)>,
    /// What it says.
    pub says: Cow<'a, HttpRule>,
}

impl<'a> Rule<'a> {
    /// Who wrote its mirrors, and at which place: the root, where the delegate says nothing of them.
    pub fn mirrored_by(&self) -> (&'a VirtualService, usize) {
        let own = self.owner.http.get(self.index).is_some_and(|rule| rule.mirrors.is_some());
        self.root.filter(|_| !own).unwrap_or((self.owner, self.index))
    }

    /// What logs call it.
    pub fn name(&self) -> String {
        let place = || match self.root {
            Some((_, root)) => format!("http[{root}].http[{}]", self.index),
            None => format!("http[{}]", self.index),
        };
        self.says.name.clone().unwrap_or_else(place)
    }

    /// The object or objects it is from.
    pub fn origin(&self) -> String {
        match self.root {
            Some((root, _)) => format!("{}, delegated by {}", key_of(self.owner), key_of(root)),
            None => key_of(self.owner).to_string(),
        }
    }

    /// Whether requests may ask for faults by header.
    pub fn fault_by_header(&self) -> bool {
        self.owner.fault_by_header || self.root.is_some_and(|(root, _)| root.fault_by_header)
    }
}

/// The rules of a `VirtualService`, each delegating one replaced by those of its delegate.
pub(super) fn expand<'a>(
    objects: &'a Objects,
    root: &'a VirtualService,
    problems: &mut Problems<'_>,
) -> Vec<Rule<'a>> {
    let mut rules = Vec::with_capacity(root.http.len());
    for (index, rule) in root.http.iter().enumerate() {
        let RuleAction::Delegate { namespace, name } = &rule.action else {
            rules.push(Rule { owner: root, index, root: None, says: Cow::Borrowed(rule) });
            continue;
        };
        let owner = match delegate(objects, root, namespace, name) {
            Ok(owner) => owner,
            Err(why) => {
                let message = format!("{why}; the rule is left out");
                let field = format!("spec.http[{index}].delegate");
                problems.not_found(&key_of(root), &field, "VirtualService", message);
                continue;
            }
        };
        for (inner, delegated) in owner.http.iter().enumerate() {
            if let Some(merged) = merge(rule, delegated) {
                let root = Some((root, index));
                rules.push(Rule { owner, index: inner, root, says: Cow::Owned(merged) });
            } else {
                let message = format!(
                    "is not covered by the match of {} spec.http[{index}], which delegates to it; the rule is left out",
                    key_of(root)
                );
                problems.add(&key_of(owner), &format!("spec.http[{inner}].match"), message);
            }
        }
    }
    rules
}

/// The delegate of this name, or why it is none.
fn delegate<'a>(
    objects: &'a Objects,
    root: &VirtualService,
    namespace: &str,
    name: &str,
) -> Result<&'a VirtualService, String> {
    let key = ObjectKey::new("VirtualService", namespace, name);
    let Some(Resource::VirtualService(found)) = objects.get(&key).map(|object| &object.resource) else {
        return Err(format!("there is no {key}"));
    };
    if !found.hosts.is_empty() {
        return Err(format!("{key} has hosts of its own, and is no delegate"));
    }
    if !found.visible.to(&root.namespace) {
        return Err(format!("{key} is not exported to the namespace {}", root.namespace));
    }
    Ok(found)
}

/// The delegate's rule with the root's matches, and with what it leaves open; `None` when the root does not cover it.
fn merge(root: &HttpRule, delegate: &HttpRule) -> Option<HttpRule> {
    let name = match (&root.name, &delegate.name) {
        (Some(root), Some(delegate)) => Some(format!("{root}-{delegate}")),
        (root, delegate) => delegate.clone().or_else(|| root.clone()),
    };
    Some(HttpRule {
        name,
        matches: matches(&root.matches, &delegate.matches)?,
        action: delegate.action.clone(),
        fault: delegate.fault.clone().or_else(|| root.fault.clone()),
        headers: delegate.headers.clone().or_else(|| root.headers.clone()),
        rewrite: delegate.rewrite.clone().or_else(|| root.rewrite.clone()),
        timeout: delegate.timeout.or(root.timeout),
        retries: delegate.retries.clone().or_else(|| root.retries.clone()),
        mirrors: delegate.mirrors.clone().or_else(|| root.mirrors.clone()),
        cors: delegate.cors.clone().or_else(|| root.cors.clone()),
    })
}

/// Every match of the delegate with each of the root's that covers it; `None` when one is covered by none.
fn matches(root: &[RuleMatch], delegate: &[RuleMatch]) -> Option<Vec<RuleMatch>> {
    if root.is_empty() || delegate.is_empty() {
        return Some(if root.is_empty() { delegate.to_vec() } else { root.to_vec() });
    }
    let mut merged = Vec::new();
    for inner in delegate {
        let before = merged.len();
        merged.extend(root.iter().filter_map(|outer| both(outer, inner)));
        if merged.len() == before {
            return None;
        }
    }
    Some(merged)
}

/// One match that asks for what both ask for; `None` when the inner one is not a part of the outer.
fn both(outer: &RuleMatch, inner: &RuleMatch) -> Option<RuleMatch> {
    let (o, i) = (&outer.request, &inner.request);
    let open = outer.gateways.is_empty() || inner.gateways.is_empty();
    let fits = (open || inner.gateways.iter().all(|gateway| outer.gateways.contains(gateway)))
        && o.ignore_uri_case == i.ignore_uri_case
        && (o.port.is_none() || i.port.is_none() || o.port == i.port)
        && (o.source_namespace.is_none()
            || i.source_namespace.is_none()
            || o.source_namespace == i.source_namespace);
    if !fits {
        return None;
    }
    let from = if inner.gateways.is_empty() { outer } else { inner };
    let mut source_labels = o.source_labels.clone();
    add(&mut source_labels, &i.source_labels, |outer, inner| outer == inner)?;
    let request = RequestMatch {
        name: match (&o.name, &i.name) {
            (Some(outer), Some(inner)) => Some(format!("{outer}-{inner}").into()),
            (outer, inner) => inner.clone().or_else(|| outer.clone()),
        },
        stat_prefix: i.stat_prefix.clone().or_else(|| o.stat_prefix.clone()),
        uri: string(o.uri.as_ref(), i.uri.as_ref())?,
        ignore_uri_case: i.ignore_uri_case,
        scheme: string(o.scheme.as_ref(), i.scheme.as_ref())?,
        method: string(o.method.as_ref(), i.method.as_ref())?,
        authority: string(o.authority.as_ref(), i.authority.as_ref())?,
        headers: headers(&o.headers, &i.headers)?,
        // Excluded by either is excluded by both together.
        without_headers: [&o.without_headers[..], &i.without_headers].concat(),
        query_params: {
            let mut params = o.query_params.clone();
            add(&mut params, &i.query_params, is_part)?;
            params
        },
        port: i.port.or(o.port),
        source_labels,
        source_namespace: i.source_namespace.clone().or_else(|| o.source_namespace.clone()),
    };
    Some(RuleMatch { mesh: from.mesh, gateways: from.gateways.clone(), request })
}

/// The narrower of two; `None` when the inner one is not a part of the outer.
#[expect(clippy::option_option, reason = "nothing asked for is not the same as nothing possible")]
fn string(outer: Option<&StringMatch>, inner: Option<&StringMatch>) -> Option<Option<StringMatch>> {
    match (outer, inner) {
        (Some(outer), Some(inner)) if !is_part(outer, inner) => None,
        (outer, inner) => Some(inner.or(outer).cloned()),
    }
}

/// Whether what one match takes, another takes too. Nobody can tell of regular expressions, so they never are.
fn is_part(outer: &StringMatch, inner: &StringMatch) -> bool {
    match (outer, inner) {
        (StringMatch::Exact(outer), StringMatch::Exact(inner)) => outer == inner,
        (StringMatch::Prefix(outer), StringMatch::Exact(inner) | StringMatch::Prefix(inner)) => {
            inner.starts_with(outer.as_str())
        }
        _ => false,
    }
}

fn headers(
    outer: &[(HeaderName, HeaderMatch)],
    inner: &[(HeaderName, HeaderMatch)],
) -> Option<Vec<(HeaderName, HeaderMatch)>> {
    let mut merged = outer.to_vec();
    let fits = |outer: &HeaderMatch, inner: &HeaderMatch| match (outer, inner) {
        (HeaderMatch::Value(outer), HeaderMatch::Value(inner)) => is_part(outer, inner),
        (HeaderMatch::Present, _) => true,
        (HeaderMatch::Value(_), HeaderMatch::Present) => false,
    };
    add(&mut merged, inner, fits)?;
    Some(merged)
}

/// Adds the inner conditions to the outer ones, in the place of those of the same name.
fn add<K: PartialEq + Clone, V: Clone>(
    outer: &mut Vec<(K, V)>,
    inner: &[(K, V)],
    fits: impl Fn(&V, &V) -> bool,
) -> Option<()> {
    for (name, value) in inner {
        match outer.iter_mut().find(|(other, _)| other == name) {
            Some((_, other)) if fits(other, value) => other.clone_from(value),
            Some(_) => return None,
            None => outer.push((name.clone(), value.clone())),
        }
    }
    Some(())
}

/// Reports delegates that nobody delegates to.
pub(super) fn report_unused(objects: &Objects, problems: &mut Problems<'_>) {
    let services = || {
        of_kind(objects, "VirtualService").filter_map(|(_, object)| match &object.resource {
            Resource::VirtualService(service) => Some(service),
            _ => None,
        })
    };
    let mut used: Vec<(&Arc<str>, &Arc<str>)> = Vec::new();
    for rule in services().flat_map(|service| &service.http) {
        if let RuleAction::Delegate { namespace, name } = &rule.action {
            used.push((namespace, name));
        }
    }
    used.sort();
    for service in services().filter(|service| service.hosts.is_empty()) {
        if used.binary_search(&(&service.namespace, &service.name)).is_err() {
            let message =
                "it has no hosts and no VirtualService delegates to it, so its routes hold for nothing";
            problems.add(&key_of(service), "spec.hosts", message);
        }
    }
}
