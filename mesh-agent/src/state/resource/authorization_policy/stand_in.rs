//! What holds in the place of a policy that cannot be read.
//!
//! A policy that is passed over is a door left open. Promises that where there never was a good state of it, it refuses
//! whatever it may have been written to refuse, for the pods that it selects as far as that can be read, else for all pods
//! of its namespace: an ALLOW policy allows nothing, a DENY or CUSTOM policy refuses everything. One that would refuse
//! nothing in any case (AUDIT, dry run, for gateways alone) is left out. Tested below and in `source/tests.rs`.

use std::{collections::BTreeMap, sync::Arc};

use serde_json::Value;

use super::{AuthorizationPolicy, DRY_RUN, Scope};
use crate::state::{
    resource::ObjectKey,
    snapshot::{Action, Policy, Rule},
};

/// `object` is the policy as it is written.
pub fn stand_in(key: &ObjectKey, object: &Value) -> Option<AuthorizationPolicy> {
    let ours = object["apiVersion"].as_str().is_some_and(|version| version.starts_with("security.istio.io/"));
    if !ours || &*key.kind != "AuthorizationPolicy" || object["metadata"]["annotations"][DRY_RUN] == "true" {
        return None;
    }
    let spec = &object["spec"];
    let action = match &spec["action"] {
        Value::Null => Action::Allow,
        Value::String(action) if action == "ALLOW" => Action::Allow,
        Value::String(action) if action == "AUDIT" => return None,
        _ => Action::Deny,
    };
    let rules: Box<[Rule]> =
        if action == Action::Allow { Box::default() } else { Box::new([Rule::default()]) };
    let (namespace, name) = (Arc::clone(&key.namespace), Arc::clone(&key.name));
    let policy = Arc::new(Policy { namespace, name, action, dry_run: false, rules });
    let (provider, passed_over) = (None, Vec::new());
    Some(AuthorizationPolicy { policy, scope: scope(spec)?, provider, passed_over, stand_in: true })
}

/// As much of it as can be read; `None` where it is for none of the pods.
fn scope(spec: &Value) -> Option<Scope> {
    let everything = || Scope::Labels(BTreeMap::new());
    let targets: Vec<&Value> = match (&spec["targetRef"], &spec["targetRefs"]) {
        (Value::Null, Value::Array(several)) => several.iter().collect(),
        (Value::Null, Value::Null) => Vec::new(),
        (one @ Value::Object(_), Value::Null) => vec![one],
        _ => return Some(everything()),
    };
    if targets.is_empty() {
        let Value::Object(labels) = &spec["selector"]["matchLabels"] else { return Some(everything()) };
        let text = |(name, value): (&String, &Value)| Some((name.clone(), value.as_str()?.to_owned()));
        return Some(labels.iter().map(text).collect::<Option<_>>().map_or_else(everything, Scope::Labels));
    }
    let mut services = Vec::new();
    for target in targets {
        match (target["kind"].as_str(), target["name"].as_str()) {
            (Some("Gateway" | "GatewayClass" | "ServiceEntry"), _) => {}
            (Some("Service"), Some(name)) => services.push(name.to_owned()),
            _ => return Some(everything()),
        }
    }
    (!services.is_empty()).then_some(Scope::Services(services))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(spec: &Value) -> Option<(Action, usize, Scope)> {
        let key = ObjectKey::new("AuthorizationPolicy", "app", "p");
        let object =
            json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "spec": spec});
        let made = stand_in(&key, &object)?;
        assert!(made.stand_in && !made.policy.dry_run);
        Some((made.policy.action, made.policy.rules.len(), made.scope))
    }

    #[test]
    fn what_cannot_be_read_refuses_what_it_may_have_been_written_to_refuse() {
        let labels = |pairs: &[(&str, &str)]| {
            let pairs = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
            Scope::Labels(pairs.collect())
        };
        let selector = json!({"matchLabels": {"app": "web"}});
        let gateway = json!({"kind": "Gateway", "name": "g"});
        let service = json!({"kind": "Service", "name": "s"});
        let table = [
            (json!({"rules": [{"bad": 1}]}), Some((Action::Allow, 0, labels(&[])))),
            (json!({"rule": 1, "selector": selector}), Some((Action::Allow, 0, labels(&[("app", "web")])))),
            (json!({"action": "DENY", "rules": 1}), Some((Action::Deny, 1, labels(&[])))),
            (
                json!({"action": "FORBID", "selector": selector}),
                Some((Action::Deny, 1, labels(&[("app", "web")]))),
            ),
            (json!({"action": 3}), Some((Action::Deny, 1, labels(&[])))),
            (json!({"action": "CUSTOM", "rules": [{}]}), Some((Action::Deny, 1, labels(&[])))),
            (json!({"action": "AUDIT", "rules": 1}), None),
            (json!({"selector": {"matchLabels": {"app": 1}}}), Some((Action::Allow, 0, labels(&[])))),
            (json!({"targetRefs": [gateway], "rules": 1}), None),
            (
                json!({"targetRefs": [gateway, service], "rules": 1}),
                Some((Action::Allow, 0, Scope::Services(vec!["s".into()]))),
            ),
            (json!({"targetRefs": [{"kind": "Pod"}]}), Some((Action::Allow, 0, labels(&[])))),
            (json!("text"), Some((Action::Allow, 0, labels(&[])))),
        ];
        for (spec, expected) in table {
            assert_eq!(read(&spec), expected, "{spec}");
        }
    }

    #[test]
    fn policies_of_others_and_those_only_tried_have_none() {
        let key = ObjectKey::new("AuthorizationPolicy", "app", "p");
        let tried =
            json!({"apiVersion": "security.istio.io/v1", "metadata": {"annotations": {DRY_RUN: "true"}}});
        let other = json!({"apiVersion": "networking.istio.io/v1"});
        let service = ObjectKey::new("Service", "app", "p");
        let ours = json!({"apiVersion": "security.istio.io/v1"});
        assert!(stand_in(&key, &tried).is_none() && stand_in(&key, &other).is_none());
        assert!(stand_in(&service, &ours).is_none());
        assert_eq!(&*stand_in(&key, &ours).unwrap().policy.name, "p");
    }
}
