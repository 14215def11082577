//! Istio's `AuthorizationPolicy`, checked.
//!
//! Promises that a policy which is accepted says what it means: a field that is not known, a list that is empty, a value
//! that can match nothing are refused by name, for what is passed over in a policy is a door left open. Tested by the
//! tables in `tests.rs`; what policies decide, in `policy/tests`.

mod condition;
mod rule;
mod stand_in;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, sync::Arc};

use serde::Deserialize;

use self::rule::{Owner, WireRule};
pub use self::stand_in::stand_in;
use super::{
    ObjectKey, dns_name,
    field::{Checked, FieldError, entry, item, under},
};
use crate::state::snapshot::{Action, Policy};

/// Annotation that has a policy tried and not enforced.
const DRY_RUN: &str = "istio.io/dry-run";

/// Most entries of `targetRefs` (Istio).
const MOST_TARGETS: usize = 16;

/// An `AuthorizationPolicy`.
#[derive(Debug)]
pub struct AuthorizationPolicy {
    /// What it says.
    pub policy: Arc<Policy>,
    /// Which workloads it is about.
    pub scope: Scope,
    /// `provider.name` of a `CUSTOM` one.
    pub provider: Option<String>,
    /// Targets that are not there in this mesh: their fields, and what that means.
    pub passed_over: Vec<FieldError>,
    /// Whether it stands in the place of a policy that cannot be read.
    pub stand_in: bool,
}

/// Which workloads a policy is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// Pods of its namespace (in the root namespace: of all) that carry all these labels; none: all of them.
    Labels(BTreeMap<String, String>),
    /// Pods behind these Services of its namespace.
    Services(Vec<String>),
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Wire {
    /// Pods of its namespace that it is for; none: all. In the root namespace: of the whole mesh.
    selector: Option<WireSelector>,
    /// Deprecated in favour of `targetRefs`.
    target_ref: Option<WireTarget>,
    /// Services or gateways that it is for, in place of a selector.
    target_refs: Option<Vec<WireTarget>>,
    /// What is done where a rule holds; `ALLOW` by default. Nothing else is allowed to a pod with an `ALLOW` policy.
    action: Option<WireAction>,
    /// Who is asked where the action is `CUSTOM`.
    provider: Option<WireProvider>,
    /// It holds for what one of these matches; none: for nothing. An empty rule matches everything.
    rules: Option<Vec<Option<WireRule>>>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct WireSelector {
    match_labels: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct WireTarget {
    group: Option<String>,
    kind: String,
    name: String,
    namespace: Option<String>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireProvider {
    name: Option<String>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum WireAction {
    Allow,
    Deny,
    Audit,
    Custom,
}

/// Reads the annotation.
pub(super) fn dry_run(annotations: &BTreeMap<String, String>) -> Checked<bool> {
    match annotations.get(DRY_RUN).map(String::as_str) {
        None | Some("false") => Ok(false),
        Some("true") => Ok(true),
        Some(other) => Err(entry("annotations", DRY_RUN)(FieldError::new(
            "",
            format!("{other:?} is neither \"true\" nor \"false\""),
        ))),
    }
}

/// What its `spec` may be, for its resource definition.
#[cfg(test)]
pub(super) fn schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
    generator.subschema_for::<Wire>()
}

/// Checks the `spec` of an `AuthorizationPolicy`.
pub(super) fn check(
    key: &ObjectKey,
    dry_run: bool,
    spec: &serde_json::Value,
) -> Checked<AuthorizationPolicy> {
    let nothing = serde_json::Value::Object(serde_json::Map::new());
    let spec = if spec.is_null() { &nothing } else { spec };
    let Wire { selector, target_ref, target_refs, action, provider, rules } =
        super::field::deserialize(spec)?;
    let (scope, passed_over) = scope(&key.namespace, selector, target_ref, target_refs)?;
    let action = match action {
        None | Some(WireAction::Allow) => Action::Allow,
        Some(WireAction::Deny) => Action::Deny,
        Some(WireAction::Audit) => Action::Audit,
        Some(WireAction::Custom) => Action::Custom,
    };
    let provider = provider_of(action, provider)?;
    if rules.is_none() && matches!(action, Action::Deny | Action::Custom) {
        let message = format!(
            "a {} policy without rules matches nothing; the rule {{}} matches everything",
            action.word()
        );
        return Err(FieldError::new("rules", message));
    }
    if action == Action::Custom && dry_run {
        return Err(FieldError::new("action", "a CUSTOM policy cannot be tried with istio.io/dry-run"));
    }
    let owner = Owner { namespace: &key.namespace };
    let mut checked = Vec::new();
    for (i, rule) in rules.unwrap_or_default().into_iter().enumerate() {
        let rule = rule.ok_or_else(|| FieldError::new("", "is null; the rule {} matches everything"));
        checked.push(rule.and_then(|rule| rule.check(owner)).map_err(item("rules", i))?);
    }
    let (namespace, name) = (Arc::clone(&key.namespace), Arc::clone(&key.name));
    let policy = Arc::new(Policy { namespace, name, action, dry_run, rules: checked.into() });
    Ok(AuthorizationPolicy { policy, scope, provider, passed_over, stand_in: false })
}

fn provider_of(action: Action, provider: Option<WireProvider>) -> Checked<Option<String>> {
    match (action, provider) {
        (Action::Custom, provider) => match provider.and_then(|provider| provider.name) {
            Some(name) if !name.is_empty() => Ok(Some(name)),
            _ => Err(FieldError::new("provider.name", "is required where the action is CUSTOM")),
        },
        (_, Some(_)) => Err(FieldError::new("provider", "is for the action CUSTOM alone")),
        (_, None) => Ok(None),
    }
}

/// Which workloads are meant.
pub(super) fn scope(
    namespace: &str,
    selector: Option<WireSelector>,
    one: Option<WireTarget>,
    several: Option<Vec<WireTarget>>,
) -> Checked<(Scope, Vec<FieldError>)> {
    let targets = match (one, several) {
        (Some(_), Some(_)) => {
            return Err(FieldError::new("targetRefs", "only one of targetRef and targetRefs may be given"));
        }
        (Some(one), None) => vec![(under("targetRef")(FieldError::new("", "")), one)],
        (None, several) => {
            let at = |i| item("targetRefs", i)(FieldError::new("", ""));
            several.unwrap_or_default().into_iter().enumerate().map(|(i, one)| (at(i), one)).collect()
        }
    };
    if selector.is_some() && !targets.is_empty() {
        return Err(FieldError::new("targetRefs", "only one of selector and targetRefs may be given"));
    }
    if targets.len() > MOST_TARGETS {
        return Err(FieldError::new("targetRefs", format!("has more than {MOST_TARGETS} entries")));
    }
    if targets.is_empty() {
        return Ok((Scope::Labels(labels_of(selector)?), Vec::new()));
    }
    let (mut services, mut passed_over) = (Vec::new(), Vec::new());
    for (at, target) in targets {
        match target.check(namespace).map_err(under(&at.field))? {
            Target::Service(name) => services.push(name),
            Target::NotHere(why) => passed_over.push(FieldError::new(at.field, why)),
        }
    }
    Ok((Scope::Services(services), passed_over))
}

/// What one of `targetRefs` comes to.
enum Target {
    Service(String),
    /// There is none of its kind in this mesh yet, so that the policy holds for nothing of it.
    NotHere(String),
}

/// The labels that pods have to carry; none: all pods.
pub(super) fn labels_of(selector: Option<WireSelector>) -> Checked<BTreeMap<String, String>> {
    let labels = selector.map(WireSelector::check).transpose().map_err(under("selector"))?;
    Ok(labels.unwrap_or_default())
}

impl WireSelector {
    /// The labels that it asks for.
    pub(super) fn check(self) -> Checked<BTreeMap<String, String>> {
        let labels = self.match_labels.unwrap_or_default();
        for (label, value) in &labels {
            check_label(label, value).map_err(entry("matchLabels", label))?;
        }
        Ok(labels)
    }
}

fn check_label(label: &str, value: &str) -> Checked<()> {
    if label.is_empty() {
        return Err(FieldError::new("", "a label needs a name"));
    }
    if label.contains('*') || value.contains('*') {
        return Err(FieldError::new("", "wildcards are not supported in labels"));
    }
    Ok(())
}

impl WireTarget {
    fn check(self, namespace: &str) -> Checked<Target> {
        let group = self.group.as_deref().unwrap_or_default();
        match (group, &*self.kind) {
            ("" | "core", "Service") => {}
            ("gateway.networking.k8s.io", "Gateway" | "GatewayClass")
            | ("networking.istio.io", "ServiceEntry") => {
                return Ok(Target::NotHere(format!(
                    "{} {} is not there: the mesh has none yet, and for it the policy holds for nothing",
                    self.kind, self.name
                )));
            }
            _ => {
                let message =
                    format!("{group:?} {:?} is nothing a policy can be for: only a Service is", self.kind);
                return Err(FieldError::new("kind", message));
            }
        }
        if self.namespace.as_deref().is_some_and(|theirs| !theirs.is_empty() && theirs != namespace) {
            return Err(FieldError::new("namespace", "a policy is for what is in its own namespace"));
        }
        dns_name(&self.name).map_err(under("name"))?;
        Ok(Target::Service(self.name))
    }
}
