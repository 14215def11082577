//! Which policies select which pods.

use super::*;
use crate::state::snapshot::{Applied, Clause, TextMatch, Workload};

fn policy(place: &str, spec: &str) -> String {
    let (namespace, name) = place.split_once('/').unwrap();
    format!(
        "---\n{{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, \
         metadata: {{name: {name}, namespace: {namespace}}}, spec: {spec}}}\n"
    )
}

/// The policies of a pod, in the order in which they are asked, with their ports.
fn policies(workload: &Workload) -> Vec<String> {
    let all = &workload.authorization;
    let name = |one: &Applied| {
        let ports = one.ports.as_ref().map_or(String::new(), |ports| format!(" {ports:?}"));
        format!("{} {}/{}{ports}", one.policy.action.word(), one.policy.namespace, one.policy.name)
    };
    [&all.custom, &all.deny, &all.allow].into_iter().flatten().map(name).collect()
}

fn of(snapshot: &Snapshot, ip: &str) -> Vec<String> {
    policies(snapshot.workload_at(ip.parse().unwrap()).unwrap())
}

#[test]
fn a_pod_has_those_policies_that_select_it() {
    let text = [
        pod("app", "web", "v1", "10.0.0.1"),
        pod("app", "web", "v2", "10.0.0.2"),
        pod("app", "db", "v1", "10.0.0.3"),
        pod("other", "web", "v1", "10.0.0.4"),
        policy("app/all", "{}"),
        policy("app/v1", "{action: DENY, rules: [{}], selector: {matchLabels: {version: v1, app: web}}}"),
        policy("istio-system/mesh", "{action: DENY, rules: [{}]}"),
        policy("istio-system/dbs", "{selector: {matchLabels: {app: db}}}"),
        policy("other/none", "{selector: {matchLabels: {app: mail}}}"),
    ]
    .concat();
    let (snapshot, problems) = build(&text);
    assert_problems(&problems, &[]);
    assert_eq!(of(&snapshot, "10.0.0.1"), ["DENY app/v1", "DENY istio-system/mesh", "ALLOW app/all"]);
    assert_eq!(of(&snapshot, "10.0.0.2"), ["DENY istio-system/mesh", "ALLOW app/all"]);
    assert_eq!(
        of(&snapshot, "10.0.0.3"),
        ["DENY istio-system/mesh", "ALLOW app/all", "ALLOW istio-system/dbs"]
    );
    assert_eq!(of(&snapshot, "10.0.0.4"), ["DENY istio-system/mesh"]);

    // Another root namespace, another mesh.
    let (objects, _) = read_text(&text);
    let settings = Settings { root_namespace: "app".into(), ..settings() };
    let (snapshot, _) = compile(&objects, None, &settings);
    assert_eq!(of(&snapshot, "10.0.0.4"), ["DENY app/v1", "ALLOW app/all"]);
}

#[test]
fn a_policy_for_a_service_is_about_its_pods_and_their_ports() {
    let text = [
        pod("app", "web", "v1", "10.0.0.1"),
        pod("app", "db", "v1", "10.0.0.3"),
        service("app", "web", "{name: a, port: 80, targetPort: 8080}, {name: b, port: 81}"),
        "---\n{apiVersion: v1, kind: Service, metadata: {name: bare, namespace: app}, spec: {ports: [{port: 1}]}}\n"
            .to_owned(),
        policy("app/web", "{targetRefs: [{kind: Service, name: web}]}"),
        policy("app/gone", "{targetRefs: [{kind: Service, name: gone}]}"),
        policy("app/bare", "{targetRefs: [{kind: Service, name: bare}]}"),
    ]
    .concat();
    let (snapshot, problems) = build(&text);
    assert_eq!(of(&snapshot, "10.0.0.1"), ["ALLOW app/web [81, 8080]"]);
    assert_eq!(of(&snapshot, "10.0.0.3"), [""; 0]);
    assert_problems(
        &problems,
        &[
            "AuthorizationPolicy app/bare: spec.targetRefs[0].name: Service app/bare has no selector",
            "AuthorizationPolicy app/gone: spec.targetRefs[0].name: there is no Service app/gone",
        ],
    );
}

#[test]
fn a_custom_policy_whose_provider_is_not_known_is_a_problem_and_refuses() {
    let custom = policy("app/ext", "{action: CUSTOM, provider: {name: opa}, rules: [{}]}");
    let (snapshot, problems) = build(&[pod("app", "web", "v1", "10.0.0.1"), custom].concat());
    assert_eq!(of(&snapshot, "10.0.0.1"), ["CUSTOM app/ext"]);
    assert_problems(
        &problems,
        &["AuthorizationPolicy app/ext: spec.provider.name: \"opa\" is none of the extensionProviders"],
    );
    let workload = snapshot.workload_at("10.0.0.1".parse().unwrap()).unwrap();
    assert_eq!(workload.authorization.custom[0].provider, None);
}

#[test]
fn cluster_local_is_the_meshs_own_trust_domain() {
    let rule = "{rules: [{from: [{source: {principals: [cluster.local/ns/a/sa/x, other/ns/a/sa/x]}}]}]}";
    let (objects, _) = read_text(&[pod("app", "web", "v1", "10.0.0.1"), policy("app/p", rule)].concat());
    let settings = Settings { trust_domain: "corp".into(), ..settings() };
    let (snapshot, _) = compile(&objects, None, &settings);
    let workload = snapshot.workload_at("10.0.0.1".parse().unwrap()).unwrap();
    let text = format!("{:?}", workload.authorization.allow);
    assert!(text.contains("corp/ns/a/sa/x") && text.contains("other/ns/a/sa/x"), "{text}");
    assert!(!text.contains("cluster.local"), "{text}");
}

/// A mesh that has had other names: policies that name one of them name it.
#[test]
fn aliases_of_the_trust_domain_stand_for_it() {
    let principals = "[old/ns/a/sa/x, 'cluster.local/ns/b/*', '*-mesh/ns/c/sa/x', 'foreign/ns/a/sa/x', '*/ns/d/sa/x', '*']";
    let rule = format!("{{rules: [{{from: [{{source: {{principals: {principals}}}}}]}}]}}");
    let mesh = "---\n{apiVersion: v1, kind: ConfigMap, metadata: {name: mesh, namespace: istio-system}, \
                data: {mesh: 'trustDomainAliases: [old, my-mesh]'}}\n";
    let text = [pod("app", "web", "v1", "10.0.0.1"), policy("app/p", &rule), mesh.to_owned()].concat();
    let (objects, _) = read_text(&text);
    let settings = Settings { trust_domain: "corp".into(), ..settings() };
    let (snapshot, problems) = compile(&objects, None, &settings);
    assert_problems(&problems, &[]);
    let workload = snapshot.workload_at("10.0.0.1".parse().unwrap()).unwrap();
    let rules = &workload.authorization.allow[0].policy.rules;
    let Clause::Principal(listed) = &rules[0].from[0][0] else { panic!("{rules:?}") };
    let expected = [
        "corp/ns/a/sa/x",
        "old/ns/a/sa/x",
        "my-mesh/ns/a/sa/x",
        "corp/ns/b/*",
        "old/ns/b/*",
        "my-mesh/ns/b/*",
        "corp/ns/c/sa/x",
        "old/ns/c/sa/x",
        "my-mesh/ns/c/sa/x",
        "*-mesh/ns/c/sa/x",
        "foreign/ns/a/sa/x",
        "*/ns/d/sa/x",
        "*",
    ];
    assert_eq!(*listed.any_of, expected.map(|text| TextMatch::parse(text).unwrap()));
}

#[test]
fn a_policy_for_what_is_not_there_is_a_problem_and_holds_for_the_rest() {
    let gateway = "{group: gateway.networking.k8s.io, kind: Gateway, name: g}";
    let text = [
        pod("app", "web", "v1", "10.0.0.1"),
        service("app", "web", "{name: a, port: 80, targetPort: 8080}"),
        policy("app/both", &format!("{{targetRefs: [{{kind: Service, name: web}}, {gateway}]}}")),
        policy("app/gateway", &format!("{{action: DENY, rules: [{{}}], targetRefs: [{gateway}]}}")),
    ]
    .concat();
    let (snapshot, problems) = build(&text);
    assert_eq!(of(&snapshot, "10.0.0.1"), ["ALLOW app/both [8080]"]);
    assert_problems(
        &problems,
        &[
            "AuthorizationPolicy app/both: spec.targetRefs[1]: Gateway g is not there",
            "AuthorizationPolicy app/gateway: spec.targetRefs[0]: Gateway g is not there",
        ],
    );
}

/// Pods that the same policies select share what is made of them, and keep it while nothing changes.
#[test]
fn what_is_made_of_policies_is_shared_and_kept() {
    let text =
        [pod("app", "web", "v1", "10.0.0.1"), pod("app", "web", "v2", "10.0.0.2"), policy("app/all", "{}")]
            .concat();
    let (first, _) = build(&text);
    let at = |snapshot: &Snapshot, ip: &str| Arc::clone(snapshot.workload_at(ip.parse().unwrap()).unwrap());
    assert!(Arc::ptr_eq(&at(&first, "10.0.0.1").authorization, &at(&first, "10.0.0.2").authorization));
    let (second, _) = build_on(&text, Some(&first));
    assert!(Arc::ptr_eq(&at(&first, "10.0.0.1"), &at(&second, "10.0.0.1")));
    let (third, _) = build_on(&[text, policy("app/more", "{}")].concat(), Some(&second));
    assert!(!Arc::ptr_eq(&at(&second, "10.0.0.1"), &at(&third, "10.0.0.1")));
}
