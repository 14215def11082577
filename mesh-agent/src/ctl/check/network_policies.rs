//! `NetworkPolicies` that stand between pods of the mesh: the mesh's connections between nodes, and the one that it asks the
//! network with within a node, go from pod to pod, to port 15008.
//!
//! A pod that policies select takes, or opens, what any of them allows (Kubernetes: Network Policies). Whom a rule names is
//! not looked at: that is what the policy is for. Pure functions. Tested below.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        core::v1::Pod,
        networking::v1::{NetworkPolicy, NetworkPolicyPort, NetworkPolicySpec},
    },
    apimachinery::pkg::{apis::meta::v1::LabelSelector, util::intstr::IntOrString},
};

use super::Check;

/// Where connections of the mesh arrive in a pod.
const PORT: i32 = 15008;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Ingress,
    Egress,
}

impl Direction {
    const ALL: [(Self, &str); 2] = [(Self::Ingress, "Ingress"), (Self::Egress, "Egress")];

    /// Whether a policy is about this direction. Without types, it is about what comes in, and about what goes out where it
    /// has rules for it.
    fn is_of(self, spec: &NetworkPolicySpec) -> bool {
        match (&spec.policy_types, self) {
            (Some(types), _) => {
                Self::ALL.iter().any(|(one, name)| *one == self && types.iter().any(|has| has == name))
            }
            (None, Self::Ingress) => true,
            (None, Self::Egress) => spec.egress.is_some(),
        }
    }

    /// Whether any of its rules is for our port.
    fn lets_pass(self, spec: &NetworkPolicySpec) -> bool {
        let ingress = spec.ingress.iter().flatten().map(|rule| rule.ports.as_deref());
        let egress = spec.egress.iter().flatten().map(|rule| rule.ports.as_deref());
        match self {
            Self::Ingress => ingress.into_iter().any(has_port),
            Self::Egress => egress.into_iter().any(has_port),
        }
    }
}

/// Whether ports of a rule have ours. None at all are all.
fn has_port(ports: Option<&[NetworkPolicyPort]>) -> bool {
    let Some(ports) = ports.filter(|ports| !ports.is_empty()) else { return true };
    ports.iter().any(|port| {
        let tcp = port.protocol.as_deref().unwrap_or("TCP") == "TCP";
        tcp && match &port.port {
            None => true,
            Some(IntOrString::Int(first)) => (*first..=port.end_port.unwrap_or(*first)).contains(&PORT),
            // No container declares the mesh's port.
            Some(IntOrString::String(_)) => false,
        }
    })
}

fn selects(selector: &LabelSelector, labels: &BTreeMap<String, String>) -> bool {
    let wanted = selector.match_labels.iter().flatten().all(|(name, value)| labels.get(name) == Some(value));
    wanted
        && selector.match_expressions.iter().flatten().all(|one| {
            let value = labels.get(&one.key);
            let listed = value.is_some_and(|value| one.values.iter().flatten().any(|wanted| wanted == value));
            match one.operator.as_str() {
                "In" => listed,
                "NotIn" => !listed,
                "Exists" => value.is_some(),
                _ => value.is_none(),
            }
        })
}

/// What policies do to pods of the mesh.
pub(super) fn checks(policies: &[NetworkPolicy], pods: &[Pod]) -> Vec<Check> {
    let about = "NetworkPolicies";
    let shut = shut(policies, pods);
    if shut.is_empty() {
        let found = format!("{} let port {PORT} of {} enrolled pods pass", policies.len(), pods.len());
        return vec![Check::ok(about, found)];
    }
    let check = |((policy, direction), pods): (&(String, &str), &Vec<String>)| {
        let (rule, end) = if *direction == "Ingress" { ("ingress", "from") } else { ("egress", "to") };
        let more = pods.len() - 1;
        let others = if more == 0 { String::new() } else { format!(" and {more} more") };
        Check::failure(
            about,
            format!(
                "NetworkPolicy {policy} selects {}{others}, and no {rule} rule for it has TCP {PORT}: connections of the mesh fail",
                pods[0]
            ),
            format!(
                "add to spec.{rule}: {{\"{end}\": (as in its other rules), \"ports\": [{{\"protocol\": \"TCP\", \"port\": {PORT}}}]}}"
            ),
        )
    };
    shut.iter().map(check).collect()
}

/// Policies that keep pods from the mesh, with the direction, and the pods.
fn shut<'a>(policies: &[NetworkPolicy], pods: &[Pod]) -> BTreeMap<(String, &'a str), Vec<String>> {
    let mut shut: BTreeMap<_, Vec<String>> = BTreeMap::new();
    for pod in pods {
        let (namespace, labels) = (&pod.metadata.namespace, pod.metadata.labels.clone().unwrap_or_default());
        for (direction, name) in Direction::ALL {
            let of_pod: Vec<_> = policies
                .iter()
                .filter(|policy| policy.metadata.namespace == *namespace)
                .filter_map(|policy| Some((policy, policy.spec.as_ref()?)))
                .filter(|(_, spec)| {
                    let selector = spec.pod_selector.clone().unwrap_or_default();
                    direction.is_of(spec) && selects(&selector, &labels)
                })
                .collect();
            if of_pod.iter().any(|(_, spec)| direction.lets_pass(spec)) {
                continue;
            }
            // Any of them would do; the first is named.
            if let Some((policy, _)) = of_pod.first() {
                let named = |name: Option<&String>| {
                    format!(
                        "{}/{}",
                        namespace.as_deref().unwrap_or("default"),
                        name.map_or("", String::as_str)
                    )
                };
                let key = (named(policy.metadata.name.as_ref()), name);
                shut.entry(key).or_default().push(named(pod.metadata.name.as_ref()));
            }
        }
    }
    shut
}

#[cfg(test)]
mod tests {
    use anyhow::Result;
    use serde_json::{Value, json};

    use super::{super::Verdict, *};

    fn found(specs: &[Value]) -> Result<Vec<Check>> {
        let policy = |(i, spec): (usize, &Value)| {
            serde_json::from_value(
                json!({"metadata": {"name": format!("p{i}"), "namespace": "shop"}, "spec": spec}),
            )
        };
        let policies = specs.iter().enumerate().map(policy).collect::<Result<Vec<_>, _>>()?;
        let pod = |name: &str, app: &str| {
            serde_json::from_value(
                json!({"metadata": {"name": name, "namespace": "shop", "labels": {"app": app}}}),
            )
        };
        Ok(checks(&policies, &[pod("web-1", "web")?, pod("web-2", "web")?, pod("db", "db")?]))
    }

    #[test]
    fn a_policy_that_shuts_the_mesh_out_is_named_with_its_pods() -> Result<()> {
        let all = json!({});
        let port = |port: Value| json!({"podSelector": {}, "ingress": [{"ports": [port]}]});
        for (specs, shut) in [
            (vec![], 0),
            (vec![json!({"podSelector": all, "policyTypes": ["Ingress"]})], 1),
            (vec![json!({"podSelector": all, "ingress": [{}]})], 0),
            (vec![port(json!({"port": 8080}))], 1),
            (vec![port(json!({"port": 15008}))], 0),
            (vec![port(json!({"port": 15008, "protocol": "UDP"}))], 1),
            (vec![port(json!({"port": 15000, "endPort": 15010}))], 0),
            (vec![port(json!({"protocol": "TCP"}))], 0),
            (vec![port(json!({"port": "http"}))], 1),
            // What one of them allows is allowed.
            (vec![port(json!({"port": 8080})), port(json!({"port": 15008}))], 0),
            (vec![json!({"podSelector": {"matchLabels": {"app": "none"}}})], 0),
            (vec![json!({"podSelector": all, "policyTypes": ["Ingress", "Egress"]})], 2),
            (vec![json!({"podSelector": all, "ingress": [{}], "egress": [{"ports": [{"port": 53}]}]})], 1),
        ] {
            let checks = found(&specs)?;
            let failed = checks.iter().filter(|check| check.verdict == Verdict::Failure).count();
            assert_eq!(failed, shut, "{specs:?}");
        }
        let checks = found(&[
            json!({"podSelector": {"matchExpressions": [{"key": "app", "operator": "In", "values": ["web"]}]}}),
        ])?;
        assert_eq!(checks.len(), 1);
        assert!(
            checks[0]
                .found
                .starts_with("NetworkPolicy shop/p0 selects shop/web-1 and 1 more, and no ingress rule")
        );
        assert!(checks[0].remedy.as_ref().is_some_and(|remedy| remedy.contains("15008")));
        Ok(())
    }

    #[test]
    fn selectors_are_kubernetes() -> Result<()> {
        let labels = BTreeMap::from([("app".to_owned(), "web".to_owned())]);
        for (selector, is) in [
            (json!({}), true),
            (json!({"matchLabels": {"app": "web"}}), true),
            (json!({"matchLabels": {"app": "db"}}), false),
            (json!({"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["db"]}]}), true),
            (json!({"matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["db"]}]}), true),
            (json!({"matchExpressions": [{"key": "app", "operator": "Exists"}]}), true),
            (json!({"matchExpressions": [{"key": "app", "operator": "DoesNotExist"}]}), false),
            (json!({"matchExpressions": [{"key": "tier", "operator": "In", "values": ["web"]}]}), false),
        ] {
            assert_eq!(selects(&serde_json::from_value(selector.clone())?, &labels), is, "{selector}");
        }
        Ok(())
    }
}
