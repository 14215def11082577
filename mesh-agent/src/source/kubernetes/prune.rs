//! What is kept of an object: what something may be compiled from, and nothing else.
//!
//! Promises that what is left out changes nothing that is compiled, so that an object of which only that has changed (a node's
//! heartbeat, the conditions of a pod) is the same as before. Of pods on other nodes even less is kept. Tested below.

use kube::core::{DynamicObject, ObjectMeta};
use serde_json::{Map, Value};

use super::kinds::Kind;

/// What `kubectl apply` writes down for itself.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// How much of an object is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Detail {
    /// A pod with its probes, which its own node's agent has to know.
    Whole,
    /// The same, and beside it what its status says.
    Described,
    /// Of a pod what makes it an endpoint and a client.
    Elsewhere,
}

/// The object as it is read: what is kept of it, in the version that was asked for.
pub(super) fn pruned(kind: &Kind, api_version: &str, detail: Detail, object: DynamicObject) -> Value {
    let mut fields = match object.data {
        Value::Object(fields) => fields,
        _ => Map::new(),
    };
    match kind.name {
        "Namespace" | "Node" => fields.clear(),
        "Pod" => pod(&mut fields, detail),
        "ConfigMap" => {
            keep(&mut fields, &["data"]);
            inner(&mut fields, "data", &["mesh"]);
        }
        "EndpointSlice" => keep(&mut fields, &["addressType", "endpoints", "ports"]),
        "Secret" => keep(&mut fields, &["data"]),
        // Services and those of resource definitions.
        _ => keep(&mut fields, &["spec"]),
    }
    // Metadata is made of names and texts, which are always JSON.
    let metadata = serde_json::to_value(metadata(kind, object.metadata)).unwrap_or_default();
    fields.insert("apiVersion".to_owned(), api_version.into());
    fields.insert("kind".to_owned(), kind.name.into());
    fields.insert("metadata".to_owned(), metadata);
    Value::Object(fields)
}

fn metadata(kind: &Kind, written: ObjectMeta) -> ObjectMeta {
    let ObjectMeta { name, namespace, labels, annotations, creation_timestamp, .. } = written;
    let kept = ObjectMeta { name, namespace, ..ObjectMeta::default() };
    let of_kind = |ours: fn(&str) -> bool| {
        let annotations = annotations.map(|mut all| {
            all.retain(|name, _| name != LAST_APPLIED && ours(name));
            all
        });
        annotations.filter(|all| !all.is_empty())
    };
    match kind.name {
        "Secret" | "ConfigMap" => kept,
        "Namespace" | "Node" | "EndpointSlice" => ObjectMeta { labels, ..kept },
        "Pod" => ObjectMeta {
            labels,
            uid: written.uid,
            annotations: of_kind(|name| name.contains("mesh.io/") || name.contains("istio.io/")),
            deletion_timestamp: written.deletion_timestamp,
            owner_references: written.owner_references,
            ..kept
        },
        _ => ObjectMeta { labels, annotations: of_kind(|_| true), creation_timestamp, ..kept },
    }
}

fn pod(fields: &mut Map<String, Value>, detail: Detail) {
    keep(fields, &["spec", "status"]);
    let spec = ["nodeName", "serviceAccountName", "hostNetwork", "containers", "initContainers"];
    inner(fields, "spec", &spec);
    let of_container: &[&str] = match detail {
        Detail::Whole | Detail::Described => &[
            "name",
            "ports",
            "restartPolicy",
            "livenessProbe",
            "readinessProbe",
            "startupProbe",
            "lifecycle",
        ],
        Detail::Elsewhere => &["name", "ports", "restartPolicy"],
    };
    for list in ["containers", "initContainers"] {
        let containers =
            fields.get_mut("spec").and_then(|spec| spec.get_mut(list)).and_then(Value::as_array_mut);
        for container in containers.into_iter().flatten().filter_map(Value::as_object_mut) {
            keep(container, of_container);
        }
    }
    inner(fields, "status", &["phase", "podIP", "podIPs", "conditions"]);
    let conditions = fields
        .get_mut("status")
        .and_then(|status| status.get_mut("conditions"))
        .and_then(Value::as_array_mut);
    if let Some(conditions) = conditions {
        conditions.retain(|condition| condition["type"] == "Ready");
        for condition in conditions.iter_mut().filter_map(Value::as_object_mut) {
            keep(condition, &["type", "status"]);
        }
    }
}

fn keep(fields: &mut Map<String, Value>, names: &[&str]) {
    fields.retain(|name, _| names.contains(&name.as_str()));
}

fn inner(fields: &mut Map<String, Value>, name: &str, names: &[&str]) {
    if let Some(Value::Object(within)) = fields.get_mut(name) {
        keep(within, names);
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::json;

    use super::{
        super::kinds::{BUILT_IN, DEFINED, POD},
        *,
    };

    fn of(kind: &Kind, detail: Detail, object: Value) -> Value {
        let object = serde_json::from_value(object).unwrap();
        pruned(kind, &kind.resource(kind.versions[0]).api_version, detail, object)
    }

    fn busy_pod() -> Value {
        json!({
            "metadata": {
                "name": "a", "namespace": "b", "uid": "u", "resourceVersion": "7", "generation": 3,
                "labels": {"app": "a"}, "finalizers": ["f"], "creationTimestamp": "2026-01-01T00:00:00Z",
                "annotations": {LAST_APPLIED: "{}", "mesh.io/egress": "restricted", "other.example/x": "y"},
                "managedFields": [{"manager": "kubelet", "operation": "Update"}],
                "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "a", "uid": "r", "controller": true}],
            },
            "spec": {
                "nodeName": "n", "serviceAccountName": "s", "volumes": [{"name": "v"}], "schedulerName": "d",
                "containers": [{
                    "name": "c", "image": "i", "env": [{"name": "E", "value": "1"}], "ports": [{"containerPort": 80}],
                    "livenessProbe": {"httpGet": {"path": "/", "port": 80}},
                }],
            },
            "status": {
                "phase": "Running", "podIP": "10.0.0.1", "hostIP": "192.0.2.1", "startTime": "2026-01-01T00:00:00Z",
                "conditions": [
                    {"type": "Initialized", "status": "True"},
                    {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"},
                ],
                "containerStatuses": [{"name": "c", "ready": true, "restartCount": 0, "image": "i", "imageID": "i"}],
            },
        })
    }

    #[test]
    fn of_a_pod_is_kept_what_is_compiled() {
        let kept = of(&POD, Detail::Whole, busy_pod());
        assert_eq!(
            kept,
            json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {
                    "name": "a", "namespace": "b", "uid": "u", "labels": {"app": "a"},
                    "annotations": {"mesh.io/egress": "restricted"},
                    "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "a", "uid": "r", "controller": true}],
                },
                "spec": {
                    "nodeName": "n", "serviceAccountName": "s",
                    "containers": [{
                        "name": "c", "ports": [{"containerPort": 80}], "livenessProbe": {"httpGet": {"path": "/", "port": 80}},
                    }],
                },
                "status": {"phase": "Running", "podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]},
            })
        );
        let elsewhere = of(&POD, Detail::Elsewhere, busy_pod());
        assert_eq!(elsewhere["spec"]["containers"], json!([{"name": "c", "ports": [{"containerPort": 80}]}]));
    }

    #[test]
    fn what_others_write_down_makes_no_other_object() {
        let node = &BUILT_IN[1];
        let beat = |time: &str| {
            json!({
                "metadata": {"name": "n", "resourceVersion": time, "labels": {"topology.kubernetes.io/zone": "z"}},
                "spec": {"podCIDR": "10.0.0.0/24"},
                "status": {"conditions": [{"type": "Ready", "status": "True", "lastHeartbeatTime": time}]},
            })
        };
        assert_eq!(of(node, Detail::Whole, beat("1")), of(node, Detail::Whole, beat("2")));
        let rule = &DEFINED[0];
        let written = |status: Value| {
            json!({
                "metadata": {"name": "v", "namespace": "b", "creationTimestamp": "2026-01-01T00:00:00Z"},
                "spec": {"hosts": ["a"]}, "status": status,
            })
        };
        let kept = of(rule, Detail::Whole, written(json!({"observedGeneration": 1})));
        assert_eq!(kept, of(rule, Detail::Whole, written(json!({}))));
        assert_eq!(kept["metadata"]["creationTimestamp"], "2026-01-01T00:00:00Z", "the oldest holds");
    }
}
