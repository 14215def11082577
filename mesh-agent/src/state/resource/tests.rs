//! Which manifests are accepted, and what refusals say.
#![expect(clippy::unwrap_used, reason = "tests")]

mod definitions;
mod structural;

use serde_json::json;

use super::*;

#[test]
fn refusals_name_object_and_field() {
    let pod =
        |spec: Value| json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec});
    let table = [
        (json!(3), None, "", "not an object"),
        (json!({}), None, "apiVersion", "is required"),
        (json!({"apiVersion": "v1"}), None, "kind", "is required"),
        (json!({"apiVersion": "v1", "kind": ["Pod"]}), None, "kind", "must be a string"),
        (json!({"apiVersion": "v1", "kind": "Pod"}), None, "metadata.name", "is required"),
        (
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "A"}}),
            None,
            "metadata.name",
            "\"A\"",
        ),
        (
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "namespace": "x/y"}}),
            None,
            "metadata.namespace",
            "x/y",
        ),
        (pod(json!({"containers": 3})), Some("Pod default/a"), "spec.containers", "invalid type"),
        (
            pod(json!({"serviceAcountName": "a"})),
            Some("Pod default/a"),
            "spec.serviceAcountName",
            "unknown field",
        ),
        (
            pod(json!({"containers": [{"name": "a"}, {"name": "b", "prots": [{"x": 1}]}]})),
            Some("Pod default/a"),
            "spec.containers[1].prots",
            "unknown field",
        ),
        (pod(json!({"serviceAccountName": "a/b"})), Some("Pod default/a"), "spec.serviceAccountName", "a/b"),
        (
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a", "labels": {"v": 1}}}),
            Some("Namespace a"),
            "metadata.labels.v",
            "invalid type",
        ),
        (
            json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "a"}}),
            Some("Deployment default/a"),
            "",
            "kind Deployment (apiVersion apps/v1) is not one the mesh reads",
        ),
        (
            json!({"apiVersion": "security.istio.io/v1", "kind": "Telemetry", "metadata": {"name": "a"}}),
            Some("Telemetry default/a"),
            "",
            "not supported yet",
        ),
        (
            json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": {"name": "a"}}),
            Some("HTTPRoute default/a"),
            "",
            "not supported yet",
        ),
        (
            json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": {"name": "a"},
                   "spec": {"hosts": ["a"]}, "sepc": {}}),
            Some("VirtualService default/a"),
            "sepc",
            "unknown field",
        ),
    ];
    for (value, object, field, message) in table {
        let problem = read(&value, Origin::Manifest).unwrap_err().problem("f.yaml");
        assert_eq!(problem.object.as_deref(), object, "{value}");
        assert_eq!(problem.field.as_deref().unwrap_or_default(), field, "{value}");
        assert!(problem.message.contains(message), "{value}: {}", problem.message);
        assert_eq!(problem.file, "f.yaml");
    }
}

#[test]
fn all_kinds_of_the_directory_are_read() {
    let namespaced =
        |api: &str, kind: &str| json!({"apiVersion": api, "kind": kind, "metadata": {"name": "a"}});
    for kind in ["Namespace", "Node", "Pod", "Service", "ServiceAccount", "Secret", "ConfigMap"] {
        let (key, _) = read(&namespaced("v1", kind), Origin::Manifest).unwrap();
        let namespace = if ["Namespace", "Node"].contains(&kind) { "" } else { "default" };
        assert_eq!(key, ObjectKey::new(kind, namespace, "a"));
    }
    let mut slice = namespaced("discovery.k8s.io/v1", "EndpointSlice");
    slice["addressType"] = json!("IPv4");
    slice["endpoints"] = json!([]);
    assert!(read(&slice, Origin::Manifest).is_ok());
}

#[test]
fn istio_kinds_are_read_in_all_versions_with_what_clusters_add() {
    for version in ["v1alpha3", "v1beta1", "v1"] {
        let value = json!({
            "apiVersion": format!("networking.istio.io/{version}"),
            "kind": "VirtualService",
            "metadata": {"name": "a", "namespace": "shop", "creationTimestamp": "2024-05-01T00:00:00Z",
                         "resourceVersion": "7", "uid": "x", "managedFields": [{"manager": "kubectl"}]},
            "spec": {"hosts": ["a"], "exportTo": ["*"], "gateways": ["mesh", "shop/in"],
                     "http": [{"route": [{"destination": {"host": "a"}}]}]},
            "status": {"observedGeneration": 3},
        });
        let (key, resource) = read(&value, Origin::Manifest).unwrap();
        assert_eq!(key.to_string(), "VirtualService shop/a");
        let Resource::VirtualService(service) = resource else { panic!("{version}") };
        assert!(service.mesh && service.created.is_some());
    }
}

#[test]
fn unknown_status_of_a_newer_cluster_is_no_error() {
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "labels": null},
                     "spec": {"containers": [], "tolerations": []}, "status": {"phase": "Running", "novelty": 1}});
    assert!(read(&pod, Origin::Manifest).is_ok());
}

#[test]
fn a_field_that_only_a_newer_api_server_knows_is_passed_over_and_one_of_a_manifest_is_not() {
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"},
                         "spec": {"ports": [{"port": 80, "novelty": 1}]}});
    assert!(read(&service, Origin::ApiServer).is_ok());
    assert!(
        read(&service, Origin::Manifest).is_err_and(|refused| refused.error.field == "spec.ports[0].novelty")
    );
}
