//! `ServicePolicies` and what they come to.

use std::sync::atomic::Ordering::Relaxed;

use super::*;

/// A `ServicePolicy` of the namespace `default`; its first line is its name and, if any, when it was made.
fn policy(head: &str, spec: &str) -> String {
    let (name, created) = head.split_once(' ').unwrap_or((head, ""));
    let created = if created.is_empty() { String::new() } else { format!(", creationTimestamp: {created}") };
    format!(
        "---\n{{apiVersion: mesh.io/v1alpha1, kind: ServicePolicy, metadata: {{name: {name}{created}}}, spec: {spec}}}\n"
    )
}

/// Service `a` with ports 80 and 81, subsets v1 and v2 with a pod each, enrolled; and service `b`.
fn world() -> String {
    let enrolled = "---\n{apiVersion: v1, kind: Namespace, metadata: {name: default, \
                    labels: {mesh.io/dataplane-mode: node}}}\n";
    let pods: String = [("v1", "10.0.0.1"), ("v2", "10.0.0.2")]
        .map(|(version, ip)| {
            pod("default", "a", version, ip).replace("labels:", "annotations: {mesh.io/netns: /x}, labels:")
        })
        .concat();
    let subset = |name: &str| format!("{{name: {name}, labels: {{version: {name}}}}}");
    enrolled.to_owned()
        + &service("default", "a", "{name: http, port: 80, targetPort: 80}, {name: tcp, port: 81}")
        + &pods
        + &service("default", "b", "{port: 80}")
        + &pod("default", "b", "v1", "10.0.0.3")
            .replace("labels:", "annotations: {mesh.io/netns: /x}, labels:")
        + &istio(
            "DestinationRule default/a",
            &format!("{{host: a, subsets: [{}, {}]}}", subset("v1"), subset("v2")),
        )
        + &istio(
            "VirtualService default/a",
            "{hosts: [a], http: [{route: [{destination: {host: a, port: {number: 80}, subset: v1}}]}]}",
        )
}

fn backend(snapshot: &Snapshot) -> Arc<Cluster> {
    let RouteAction::Forward(backends) = &routes(snapshot, A, 80)[0].action else { panic!("no backends") };
    let Backend::Cluster(cluster) = &backends[0].backend else { panic!("no cluster") };
    Arc::clone(cluster)
}

fn whole(snapshot: &Snapshot, port: u16) -> Arc<Cluster> {
    Arc::clone(&snapshot.services[A].port_for("default", port).unwrap().cluster)
}

#[test]
fn an_address_has_one_check_in_all_clusters_and_keeps_what_is_known() {
    let text = world() + &policy("a", "{service: a, port: 80, healthCheck: {tcp: {}}}");
    let (before, problems) = build(&text);
    assert_problems(&problems, &[]);
    let known = |snapshot: &Snapshot| {
        let (subset, whole) = (backend(snapshot), whole(snapshot, 80));
        let checked = subset.endpoints[0].checked.clone().unwrap();
        assert!(Arc::ptr_eq(&checked, whole.endpoints[0].checked.as_ref().unwrap()));
        assert!(Arc::ptr_eq(subset.standby.checks.as_ref().unwrap(), whole.standby.checks.as_ref().unwrap()));
        assert!(subset.limits_connections && whole.limits_connections, "never direct");
        (checked, subset.standby.checks.clone().unwrap())
    };
    let (checked, usage) = known(&before);
    assert!(whole(&before, 81).standby.checks.is_none() && whole(&before, 81).endpoints[0].checked.is_none());
    let port = &before.checked[&(Arc::from(A), 80)];
    assert_eq!(port.endpoints().count(), 2);

    checked.set_unhealthy(true);
    let slower = text.replace("tcp: {}", "tcp: {}, interval: 30s");
    let (after, _) = build_on(&slower, Some(&before));
    let (still, still_used) = known(&after);
    assert!(Arc::ptr_eq(&still, &checked) && Arc::ptr_eq(&still_used, &usage));
    assert!(!after.checked[&(Arc::from(A), 80)].is_same(port), "the interval is another");
    let (again, _) = build_on(&slower, Some(&after));
    assert!(again.checked[&(Arc::from(A), 80)].is_same(&after.checked[&(Arc::from(A), 80)]));
    let (gone, _) = build_on(&world(), Some(&after));
    assert!(gone.checked.is_empty() && backend(&gone).endpoints[0].checked.is_none());
}

#[test]
fn the_policy_of_a_port_comes_first_and_then_the_older() {
    let interval = |snapshot: &Snapshot, port: u16| {
        snapshot.checked.get(&(Arc::from(A), port)).map(|port| port.check.interval.as_secs())
    };
    let check = |seconds: u8| format!("healthCheck: {{tcp: {{}}, interval: {seconds}s}}");
    let text = world()
        + &policy("any '2024-01-01T00:00:00Z'", &format!("{{service: a, {}}}", check(1)))
        + &policy("younger '2024-01-03T00:00:00Z'", &format!("{{service: a, port: 80, {}}}", check(2)))
        + &policy("older '2024-01-02T00:00:00Z'", &format!("{{service: a, port: 80, {}}}", check(3)))
        // Says nothing of checks.
        + &policy("oldest '2020-01-01T00:00:00Z'", "{service: a, port: 80, adaptiveConcurrency: {}}");
    let (snapshot, problems) = build(&text);
    assert_problems(&problems, &[]);
    assert_eq!((interval(&snapshot, 80), interval(&snapshot, 81)), (Some(3), Some(1)));
    assert!(snapshot.guards.contains_key(&"10.0.0.1:80".parse().unwrap()));
}

#[test]
fn fallbacks_lead_to_subsets_and_services_and_never_on_from_there() {
    let text = world()
        + &policy(
            "a",
            "{service: a, port: 80, fallbacks: [{subset: v1, to: [{subset: v2}, {host: b}]}, \
             {subset: v2, to: [{subset: v1}]}, {to: [{host: b}]}]}",
        );
    let (snapshot, problems) = build(&text);
    assert_problems(&problems, &[]);
    let (v1, whole_service) = (backend(&snapshot), whole(&snapshot, 80));
    let names = |cluster: &Cluster| {
        cluster.standby.fallbacks.iter().map(|fallback| fallback.name.to_string()).collect::<Vec<_>>()
    };
    let v2 = format!("outbound|80|v2|{A}");
    let b = "outbound|80||b.default.svc.cluster.local".to_owned();
    assert_eq!(names(&v1), [v2, b.clone()]);
    assert_eq!(names(&whole_service), [b]);
    assert!(v1.standby.fallbacks.iter().all(|fallback| fallback.standby.fallbacks.is_empty()));
    assert_eq!(addresses(&v1.standby.fallbacks[0]), ["10.0.0.2:80"]);
    // One that only others lead to keeps its state too.
    v1.standby.fallbacks[0].state.next.store(7, Relaxed);
    let (again, _) = build_on(&text, Some(&snapshot));
    assert_eq!(backend(&again).standby.fallbacks[0].state.next.load(Relaxed), 7);
}

#[test]
fn what_leads_nowhere_is_a_problem() {
    let table = [
        ("{service: nobody, adaptiveConcurrency: {}}", "spec.service: no Service has the host nobody."),
        (
            "{service: a, port: 82, adaptiveConcurrency: {}}",
            "spec.port: Service default/a has no TCP port 82",
        ),
        ("{service: a, port: 81, adaptiveConcurrency: {}}", "spec.adaptiveConcurrency: holds for nothing"),
        (
            "{service: a, port: 81, rateLimits: [{requests: 1, per: 1s}]}",
            "spec.rateLimits: holds for nothing",
        ),
        (
            "{service: a, fallbacks: [{to: [{host: c}]}]}",
            "spec.fallbacks[0].to[0].host: no Service has the host",
        ),
        ("{service: a, port: 80, fallbacks: [{to: [{host: b, port: 1}]}]}", "spec.fallbacks[0].to[0].port"),
        ("{service: a, port: 80, fallbacks: [{to: [{subset: v9}]}]}", "spec.fallbacks[0].to[0].subset"),
    ];
    for (spec, expected) in table {
        let (_, problems) = build(&(world() + &policy("a", spec)));
        assert_problems(&problems, &[expected]);
    }
}

#[test]
fn limits_are_kept_by_name_and_concurrency_by_address() {
    let limits = |limits: &str, rest: &str| {
        world() + &policy("a", &format!("{{service: a, port: 80, rateLimits: [{limits}]{rest}}}"))
    };
    let app = "10.0.0.1:80".parse().unwrap();
    let (before, problems) = build(&limits(
        "{name: x, requests: 1, per: 1s}, {name: y, requests: 2, per: 1s}",
        ", adaptiveConcurrency: {}",
    ));
    assert_problems(&problems, &[]);
    assert_eq!(before.guards.len(), 2, "only the port's pods");
    let (after, _) = build_on(
        &limits(
            "{name: y, requests: 20, per: 1s}, {name: z, requests: 1, per: 1s}",
            ", adaptiveConcurrency: {maxConcurrency: 9}",
        ),
        Some(&before),
    );
    let (old, new) = (&before.guards[&app], &after.guards[&app]);
    assert!(Arc::ptr_eq(&old.limits[1].buckets, &new.limits[0].buckets));
    assert_eq!(new.limits[0].rule.requests, 20);
    assert!(!Arc::ptr_eq(&old.limits[0].buckets, &new.limits[1].buckets));
    let (old, new) = (old.concurrency.as_ref().unwrap(), new.concurrency.as_ref().unwrap());
    assert!(Arc::ptr_eq(&old.state, &new.state) && new.rule.max == 9);
    let (bare, _) = build_on(&world(), Some(&after));
    assert!(bare.guards.is_empty());
}
