//! A policy that cannot be read refuses, unless there is a good state of it.

use super::*;

fn pod(name: &str, ip: &str) -> String {
    format!(
        "---\n{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, labels: {{app: {name}}}}}, status: {{podIP: {ip}}}}}\n"
    )
}

fn policy(spec: &str) -> String {
    format!(
        "---\n{{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {{name: p}}, spec: {spec}}}\n"
    )
}

/// How many policies deny at the two pods, and how many allow.
fn asked(snapshot: &Snapshot) -> [(usize, usize); 2] {
    ["10.0.0.1", "10.0.0.2"].map(|ip| {
        let all = &snapshot.workload_at(ip.parse().unwrap()).unwrap().authorization;
        (all.deny.len(), all.allow.len())
    })
}

async fn until_asked(source: &mut Source, expected: [(usize, usize); 2]) {
    source.snapshots.wait_for(|snapshot| asked(snapshot) == expected).await.unwrap();
}

const NOTHING: [(usize, usize); 2] = [(0, 0), (0, 0)];
const WEB: &str = "selector: {matchLabels: {app: web}}";

#[tokio::test]
async fn a_policy_that_cannot_be_read_refuses_at_the_pods_it_selects() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "pods.yaml", &[pod("web", "10.0.0.1"), pod("db", "10.0.0.2")].concat());
    put(dir.path(), "p.yaml", &policy(&format!("{{{WEB}, action: DENY, rules: [{{bad: 1}}]}}")));
    let mut source = start(dir.path()).await;
    assert_eq!(asked(&source.snapshots.borrow()), [(1, 0), (0, 0)]);
    until_problem(&mut source, "spec.rules[0].bad").await;
    // As it is changed, though it stays broken.
    put(dir.path(), "p.yaml", &policy("{rules: [{bad: 1}]}"));
    until_asked(&mut source, [(0, 1), (0, 1)]).await;
    // Of what is only audited nothing is refused.
    put(dir.path(), "p.yaml", &policy("{action: AUDIT, rules: [{bad: 1}]}"));
    until_asked(&mut source, NOTHING).await;
    put(dir.path(), "p.yaml", &policy(&format!("{{{WEB}, action: DENY, rules: [{{}}]}}")));
    until_asked(&mut source, [(1, 0), (0, 0)]).await;
    until_no_problem(&mut source).await;
    // The last good state stays, whatever the broken one selects.
    put(dir.path(), "p.yaml", &policy("{action: DENY, rules: [{bad: 1}]}"));
    until_problem(&mut source, "spec.rules[0].bad").await;
    assert_eq!(asked(&source.snapshots.borrow()), [(1, 0), (0, 0)]);
    fs::remove_file(dir.path().join("p.yaml")).unwrap();
    until_asked(&mut source, NOTHING).await;
}

#[tokio::test]
async fn a_good_policy_in_another_file_takes_the_place_of_what_cannot_be_read() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "pods.yaml", &[pod("web", "10.0.0.1"), pod("db", "10.0.0.2")].concat());
    put(dir.path(), "a.yaml", &policy("{action: DENY, rules: 1}"));
    put(dir.path(), "b.yaml", &policy(&format!("{{{WEB}, rules: [{{}}]}}")));
    let source = start(dir.path()).await;
    assert_eq!(asked(&source.snapshots.borrow()), [(0, 1), (0, 0)]);
    assert!(!source.problems.borrow().is_empty());
}
