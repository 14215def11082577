//! What the mesh-wide settings come to.

use super::*;
use crate::state::snapshot::PathNormalization;

fn mesh(namespace: &str, settings: &str) -> String {
    format!(
        "---\n{{apiVersion: v1, kind: ConfigMap, metadata: {{name: mesh, namespace: {namespace}}}, data: {{mesh: '{settings}'}}}}\n"
    )
}

fn custom(provider: &str) -> String {
    format!(
        "---\n{{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {{name: p, namespace: app}}, \
         spec: {{action: CUSTOM, provider: {{name: {provider}}}, rules: [{{}}]}}}}\n"
    )
}

const OPA: &str =
    "extensionProviders: [{name: opa, envoyExtAuthzGrpc: {service: opa.auth.svc.cluster.local, port: 91}}]";

#[test]
fn policies_find_their_authorizer() {
    let opa = service("auth", "opa", "{name: grpc, port: 91}");
    let text = [pod("app", "web", "v1", "10.0.0.1"), custom("opa"), opa, mesh("istio-system", OPA)].concat();
    let (snapshot, problems) = build(&text);
    assert_problems(&problems, &[]);
    let workload = snapshot.workload_at("10.0.0.1".parse().unwrap()).unwrap();
    let provider = workload.authorization.custom[0].provider.as_ref().unwrap();
    assert_eq!((&*provider.host, provider.port), ("opa.auth.svc.cluster.local", 91));
    assert!(workload.authorization.reads_paths && !workload.authorization.reads_bodies);
    // The same settings, the same pod; others, another.
    let (again, _) = build_on(&text, Some(&snapshot));
    let now = again.workload_at("10.0.0.1".parse().unwrap()).unwrap();
    assert!(Arc::ptr_eq(workload, now));
    let (changed, _) = build_on(&text.replace("port: 91}}]", "port: 91, failOpen: true}}]"), Some(&snapshot));
    assert!(!Arc::ptr_eq(workload, changed.workload_at("10.0.0.1".parse().unwrap()).unwrap()));
}

#[test]
fn authorizers_that_cannot_be_asked_are_problems() {
    let field = "ConfigMap istio-system/mesh: data.mesh.extensionProviders[0]";
    let (_, problems) = build(&mesh("istio-system", OPA));
    assert_problems(
        &problems,
        &[&format!("{field}: provider \"opa\" cannot be asked: there is no service opa.auth")],
    );
    let other = service("auth", "opa", "{name: grpc, port: 92}");
    let (_, problems) = build(&[mesh("istio-system", OPA), other].concat());
    assert_problems(
        &problems,
        &[&format!(
            "{field}: provider \"opa\" cannot be asked: service opa.auth.svc.cluster.local has no port 91"
        )],
    );
}

#[test]
fn settings_are_those_of_the_root_namespace() {
    let text = [
        pod("app", "web", "v1", "10.0.0.1"),
        mesh("app", "pathNormalization: {normalization: NONE}"),
        mesh("istio-system", "{rootNamespace: root, pathNormalization: {normalization: MERGE_SLASHES}}"),
        "---\n{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: all, namespace: root}}\n"
            .to_owned(),
    ]
    .concat();
    let (snapshot, problems) = build(&text);
    assert_problems(
        &problems,
        &["ConfigMap app/mesh: is passed over: mesh-wide settings are those of namespace"],
    );
    assert_eq!(snapshot.path_normalization, Some(PathNormalization::MergeSlashes));
    let workload = snapshot.workload_at("10.0.0.1".parse().unwrap()).unwrap();
    assert_eq!(workload.authorization.allow.len(), 1, "the root namespace is another");
    assert_eq!(build("").0.path_normalization, None);
}

#[test]
fn a_text_that_cannot_be_read_is_refused_by_name() {
    for (settings, message) in [
        ("enableTracing: true", "data.mesh.enableTracing: unknown field"),
        ("a: [", "data.mesh: not valid YAML"),
        ("--- {}\n--- {}", "data.mesh: is several"),
    ] {
        let object = serde_json::json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "mesh", "namespace": "istio-system"},
            "data": {"mesh": settings},
        });
        let (objects, problems) = read_text(&object.to_string());
        assert!(objects.is_empty());
        assert!(problems[0].to_string().contains(message), "{}", problems[0]);
    }
}
