//! `workloadSelector` of a `DestinationRule`: for the pods of its namespace that it selects, and nobody else.

use super::*;

/// Service `a` in `default`, and clients in `default`, `shop` and the root namespace.
fn world() -> String {
    service("default", "a", "{port: 80}")
        + &pod("default", "a", "v1", "10.0.0.1")
        + &pod("default", "web", "v1", "10.0.9.1")
        + &pod("shop", "web", "v1", "10.0.9.2")
        + &pod("shop", "web", "v2", "10.0.9.3")
        + &pod("shop", "mail", "v1", "10.0.9.4")
        + &pod("istio-system", "web", "v1", "10.0.9.5")
}

/// A rule about `a`, for pods with these labels where there are any, that has so many milliseconds to connect.
fn rule(head: &str, labels: Option<&str>, timeout: u32, more: &str) -> String {
    let selector = labels.map(|labels| format!("workloadSelector: {{matchLabels: {{{labels}}}}}, "));
    let pool = format!("connectionPool: {{tcp: {{connectTimeout: {timeout}ms}}}}");
    let spec =
        format!("{{host: {A}, {}trafficPolicy: {{{pool}}}{more}}}", selector.as_deref().unwrap_or_default());
    istio(&format!("DestinationRule {head}"), &spec)
}

fn seen_by(snapshot: &Snapshot, last: u8) -> &Arc<Cluster> {
    let client = &snapshot.workloads[&IpAddr::from([10, 0, 9, last])];
    &snapshot.services[A].port_for(client.view(), 80).unwrap().cluster
}

/// What each of the clients has to connect in, in milliseconds.
fn timeouts(snapshot: &Snapshot) -> [u128; 5] {
    [1, 2, 3, 4, 5].map(|last| seen_by(snapshot, last).connect_timeout.as_millis())
}

const NONE: u128 = 10_000;

#[test]
fn it_is_for_those_that_it_selects_in_its_own_namespace() {
    let web = Some("app: web");
    let table: [(String, [u128; 5]); 9] = [
        (rule("shop/r", web, 1, ""), [NONE, 1, 1, NONE, NONE]),
        (rule("shop/r", Some("app: web, version: v2"), 1, ""), [NONE, NONE, 1, NONE, NONE]),
        (rule("shop/r", Some(""), 1, ""), [NONE, 1, 1, 1, NONE]),
        (rule("shop/r", Some("app: nobody"), 1, ""), [NONE; 5]),
        // Before those without, however old those are; and in their place where it does not select.
        (
            rule("shop/a 2020-01-01T00:00:00Z", None, 1, "") + &rule("shop/r", Some("version: v2"), 2, ""),
            [NONE, 1, 2, 1, NONE],
        ),
        // Of the service's namespace: for its own pods alone, exported or not.
        (rule("default/r", web, 1, "") + &rule("default/s", None, 2, ""), [1, 2, 2, 2, 2]),
        // Of the root namespace.
        (rule("istio-system/r", web, 1, ", exportTo: ['*']"), [NONE, NONE, NONE, NONE, 1]),
        // The oldest of those that select a pod.
        (
            rule("shop/n 2021-01-01T00:00:00Z", Some("version: v2"), 1, "")
                + &rule("shop/o 2020-01-01T00:00:00Z", web, 2, ""),
            [NONE, 2, 2, NONE, NONE],
        ),
        // Those that select the same are one, and nobody else's are among them.
        (
            rule("shop/a", web, 1, "") + &rule("shop/b", web, 2, "") + &rule("shop/c", None, 3, ""),
            [NONE, 1, 1, 3, NONE],
        ),
    ];
    for (rules, expected) in table {
        let (snapshot, problems) = build(&(world() + &rules));
        assert_eq!(problems, [], "{rules}");
        assert_eq!(timeouts(&snapshot), expected, "{rules}");
    }
}

#[test]
fn subsets_are_there_for_those_that_are_selected() {
    let subset = |name: &str| format!(", subsets: [{{name: {name}, labels: {{version: v1}}}}]");
    let route =
        "{hosts: [a.default.svc.cluster.local], http: [{route: [{destination: {host: a, subset: own}}]}]}";
    let rules = rule("shop/r", Some("app: web"), 1, &subset("own"))
        + &rule("shop/s", Some("app: web"), 2, &subset("too"))
        + &rule("default/t", None, 3, &subset("all"))
        + &istio("VirtualService default/a", route);
    let (snapshot, problems) = build(&(world() + &rules));
    let leads = |last: u8| {
        let client = &snapshot.workloads[&IpAddr::from([10, 0, 9, last])];
        let port = snapshot.services[A].port_for(client.view(), 80).unwrap();
        let RouteAction::Forward(backends) = &port.routes[0].action else { panic!("a route") };
        matches!(&backends[0].backend, Backend::Cluster(cluster) if cluster.subset.as_deref() == Some("own"))
    };
    assert_eq!([1, 2, 3, 4, 5].map(leads), [false, true, true, false, false]);
    assert_problems(&problems, &["subset \"own\""]);
}

#[test]
fn those_that_are_selected_alike_share_a_view_that_remembers_its_own() {
    let text = world() + &rule("shop/r", Some("app: web"), 1, "");
    let (first, _) = build(&text);
    assert!(Arc::ptr_eq(seen_by(&first, 2), seen_by(&first, 3)));
    assert_eq!(seen_by(&first, 2).view.as_deref(), Some("shop/app=web"));
    assert_eq!(first.services[A].views.len(), 1, "nobody else sees anything else");
    seen_by(&first, 2).state.active.store(5, Ordering::Relaxed);
    let (second, _) = build_on(&(text + &pod("default", "a", "v2", "10.0.0.2")), Some(&first));
    assert_eq!(seen_by(&second, 3).endpoints.len(), 2);
    assert_eq!(seen_by(&second, 3).state.active.load(Ordering::Relaxed), 5);
    assert_eq!(seen_by(&second, 4).state.active.load(Ordering::Relaxed), 0);
}

/// Pods that come, go and change their labels after everything was compiled see what they would have seen from the first.
#[test]
fn pods_that_come_later_are_selected_too() {
    let rules = service("default", "a", "{port: 80}")
        + &pod("default", "a", "v1", "10.0.0.1")
        + &rule("shop/r", Some("app: web"), 1, "")
        + &rule("shop/s", Some("version: v2"), 2, "");
    let set = |text: &str| -> Vec<Change> {
        read_text(text).0.into_iter().map(|(key, object)| Change::Set(key, object)).collect()
    };
    let mut compiled = Compiled::new(settings());
    compiled.apply(set(&rules));
    // Two at once in an empty namespace; one more of a kind that is there; another kind.
    let two = pod("shop", "web", "v1", "10.0.9.1") + &pod("shop", "web", "v3", "10.0.9.2");
    let steps = [two, pod("shop", "web", "v4", "10.0.9.3"), pod("shop", "web", "v2", "10.0.9.4")];
    let mut text = rules;
    for step in steps {
        compiled.apply(set(&step));
        text += &step;
        let (whole, _) = build(&text);
        let of = |snapshot: &Snapshot| -> Vec<_> {
            let pods = (1..5).filter_map(|last| snapshot.workloads.get(&IpAddr::from([10, 0, 9, last])));
            pods.map(|pod| {
                let cluster = &snapshot.services[A].port_for(pod.view(), 80).unwrap().cluster;
                (pod.view.clone(), cluster.view.clone(), cluster.connect_timeout)
            })
            .collect()
        };
        assert_eq!(of(compiled.snapshot()), of(&whole), "{text}");
        assert!(of(&whole).iter().all(|(pod, cluster, _)| pod.is_some() && pod == cluster));
    }
}
