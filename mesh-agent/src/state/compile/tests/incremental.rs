//! Changes one by one: each gives what compiling everything would have given, and costs no more than it concerns.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

mod gateway;

use super::*;
use crate::state::{
    compile::GatewayPod,
    resource::Object,
    snapshot::{Endpoint, StreamRoute, Zones},
};

fn slice(name: &str, service: &str, endpoints: &str) -> String {
    format!(
        "---\n{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4, metadata: {{name: {name}, labels: \
         {{kubernetes.io/service-name: {service}}}}}, endpoints: [{endpoints}], ports: [{{name: http, port: 8080}}, \
         {{name: tcp-x, port: 9000}}]}}\n"
    )
}

fn backed(name: &str, number: u8, more: &str) -> String {
    format!(
        "---\n{{apiVersion: v1, kind: Service, metadata: {{name: {name}}}, spec: {{clusterIPs: [10.96.0.{number}], {more} ports: \
         [{{name: http, port: 80}}, {{name: tcp-x, port: 90}}]}}}}\n"
    )
}

/// Each line is one object, in all the forms that it may have.
fn forms() -> Vec<Vec<String>> {
    let versioned = |version: &str, ip: u8, more: &str| {
        format!(
            "---\n{{apiVersion: v1, kind: Pod, metadata: {{name: p{ip}, labels: {{app: a, version: {version}, \
             mesh.io/dataplane-mode: none}}{more}}}, spec: {{nodeName: n}}, status: {{podIP: 10.0.0.{ip}}}}}\n"
        )
    };
    let pods = (1..4).map(|ip| {
        let elsewhere = versioned("v1", ip, "").replace("app: a,", "app: a, istio-locality: r.y,");
        vec![
            elsewhere,
            versioned("v1", ip, ""),
            versioned("v2", ip, ", annotations: {mesh.io/weight: '3'}"),
            versioned("v1", ip, ", annotations: {mesh.io/weight: '2'}"),
        ]
    });
    let one = |ip: u8| format!("{{addresses: [10.0.0.{ip}]}}");
    let pod =
        |ip: u8| format!("{{addresses: [10.0.0.{ip}], targetRef: {{kind: Pod, name: p{ip}}}, zone: z{ip}}}");
    let slices = ["a", "b", "c", "nobodys"].into_iter().flat_map(|service| {
        [1, 2].map(|number| {
            let name = format!("{service}-{number}");
            let few: Vec<String> = (number..number + 2).map(one).collect();
            let pods: Vec<String> = (1..5).map(pod).collect();
            vec![
                slice(&name, service, &one(number)),
                slice(&name, service, &few.join(", ")),
                slice(&name, service, &pods.join(", ")),
                slice(
                    &name,
                    service,
                    "{addresses: [10.0.0.9], conditions: {ready: false}}, {addresses: [x]}",
                ),
                // It goes over to another service.
                slice(&name, "a", &pods[1..3].join(", ")),
            ]
        })
    });
    let services = [("a", 1), ("b", 2), ("c", 3)].map(|(name, number)| {
        vec![
            backed(name, number, ""),
            backed(name, number, "trafficDistribution: PreferClose,"),
            backed(name, number, "selector: {app: a},"),
            backed(name, number, "selector: {app: a},")
                .replace(&format!("clusterIPs: [10.96.0.{number}]"), "clusterIP: None"),
        ]
    });
    let rules = vec![
        istio(
            "DestinationRule default/a",
            "{host: a, trafficPolicy: {outlierDetection: {}}, subsets: [{name: v1, labels: {version: v1}}, \
             {name: v2, labels: {version: v2}, trafficPolicy: {loadBalancer: {consistentHash: {useSourceIp: true}}}}]}",
        ),
        istio(
            "DestinationRule default/a",
            "{host: a, exportTo: [other], subsets: [{name: v1, labels: {version: v1}}]}",
        ),
        istio(
            "DestinationRule default/a",
            "{host: a, workloadSelector: {matchLabels: {version: v2}}, trafficPolicy: {loadBalancer: {simple: RANDOM}}}",
        ),
        istio(
            "DestinationRule default/a",
            "{host: a, trafficPolicy: {loadBalancer: {zoneAwareLbSetting: {minClusterSize: 1}}}}",
        ),
    ];
    let to = |host: &str| format!("{{destination: {{host: {host}, port: {{number: 80}}}}}}");
    let routes = vec![
        istio(
            "VirtualService default/b",
            &format!(
                "{{hosts: [b], http: [{{route: [{}], mirror: {{host: c, port: {{number: 80}}}}}}]}}",
                to("a")
            ),
        ),
        istio(
            "VirtualService default/b",
            "{hosts: [b], http: [{match: [{uri: {prefix: /x}}], route: [{destination: {host: a, subset: v2, port: {number: 80}}}]}, \
             {route: [{destination: {host: b, port: {number: 80}}}]}], tcp: [{route: [{destination: {host: a, port: {number: 90}}}]}]}",
        ),
    ];
    let policy = |spec: &str| {
        format!(
            "---\n{{apiVersion: mesh.io/v1alpha1, kind: ServicePolicy, metadata: {{name: c}}, spec: {{service: c, {spec}}}}}\n"
        )
    };
    let policies = vec![
        policy("healthCheck: {tcp: {}}"),
        policy("fallbacks: [{to: [{host: b, port: 80}, {host: nowhere}]}]"),
        policy("rateLimits: [{name: all, requests: 5, per: 1s}]"),
    ];
    let node = "---\n{apiVersion: v1, kind: Node, metadata: {name: n, labels: {topology.kubernetes.io/region: r, \
                topology.kubernetes.io/zone: z}}}\n";
    let elsewhere = vec![crate::state::compile::tests::pod("other", "o", "v1", "10.0.1.1")];
    // Most changes are of slices, as they are in a mesh.
    let mut all: Vec<Vec<String>> = slices.collect();
    all.extend(all.clone());
    all.extend(pods);
    all.extend(services);
    all.extend([rules, routes, policies, vec![node.to_owned()], elsewhere]);
    all.extend(gateway::forms());
    all
}

fn objects(text: &str) -> Vec<(ObjectKey, Arc<Object>)> {
    let (objects, problems) = read_text(text);
    assert_eq!(problems, [], "{text}");
    objects.into_iter().collect()
}

/// Every cluster, by what tells it from others.
fn clusters(snapshot: &Snapshot) -> BTreeMap<(String, Option<String>, bool), &Arc<Cluster>> {
    let key = |cluster: &Cluster| {
        let view = cluster.view.as_ref().map(ToString::to_string);
        (cluster.name.to_string(), view, cluster.standby.fallbacks.is_empty())
    };
    snapshot.clusters().map(|cluster| (key(cluster), cluster)).collect()
}

fn said_of(backend: &Backend) -> String {
    match backend {
        Backend::Cluster(cluster) => {
            format!("{} {:?} {}", cluster.name, cluster.view, cluster.standby.fallbacks.len())
        }
        Backend::Missing(why) => why.to_string(),
    }
}

fn said_of_routes(routes: &[Arc<HttpRoute>]) -> Vec<String> {
    let one = |route: &Arc<HttpRoute>| {
        let mut to: Vec<String> = route.mirrors.iter().map(|mirror| said_of(&mirror.backend)).collect();
        let RouteAction::Forward(all) = &route.action else { panic!("{route:?}") };
        to.extend(all.iter().map(|one| said_of(&one.backend)));
        format!("{} {} {:?} {to:?}", route.name, route.origin, route.matches)
    };
    routes.iter().map(one).collect()
}

fn said_of_streams(streams: &[Arc<StreamRoute>]) -> Vec<String> {
    let one = |route: &Arc<StreamRoute>| {
        let to: Vec<String> = route.backends.iter().map(|one| said_of(&one.backend)).collect();
        format!("{} {} {:?} {to:?}", route.name, route.origin, route.matches)
    };
    streams.iter().map(one).collect()
}

/// All that a snapshot says, but for what is remembered.
fn said(snapshot: &Snapshot) -> BTreeMap<String, String> {
    let mut said = BTreeMap::new();
    for (key, cluster) in clusters(snapshot) {
        let Cluster { endpoints, spread, balancing, hash, outlier, limits_connections, standby, .. } =
            &**cluster;
        let endpoint = |one: &Arc<Endpoint>| {
            let workload = one.workload.as_ref().map(|workload| (&workload.name, &workload.labels));
            format!("{} {workload:?} {} {} {}", one.address, one.locality, one.weight, one.checked.is_some())
        };
        let endpoints: Vec<String> = endpoints.iter().map(endpoint).collect();
        let group = |group: &crate::state::snapshot::Group| {
            format!("{} {:?} {:?}", group.share, group.members, group.weights)
        };
        let levels = spread.levels.iter().map(|level| level.groups.iter().map(group).collect::<Vec<_>>());
        let levels: Vec<_> = levels.collect();
        let fallbacks: Vec<_> = standby.fallbacks.iter().map(|one| &one.name).collect();
        let zones =
            spread.zones.iter().flat_map(Zones::iter).map(|(zone, one)| format!("{zone} {}", group(one)));
        let zones: Vec<String> = zones.collect();
        said.insert(
            format!("{key:?}"),
            format!(
                "{endpoints:?} {levels:?} {zones:?} {:?} {balancing:?} {:?} {outlier:?} {limits_connections} {} {fallbacks:?}",
                spread.warmup,
                hash.is_some(),
                standby.checks.is_some()
            ),
        );
    }
    for (host, service) in snapshot.services.iter() {
        let mut views: BTreeMap<&str, &[ServicePort]> = [("", &service.ports[..])].into();
        views.extend(service.views.iter().map(|(client, ports)| (&**client, &ports[..])));
        for (client, port) in
            views.iter().flat_map(|(client, ports)| ports.iter().map(move |port| (client, port)))
        {
            let (routes, streams) = (said_of_routes(&port.routes), said_of_streams(&port.streams));
            let all: Vec<String> =
                routes.into_iter().chain(streams).chain([port.cluster.name.to_string()]).collect();
            said.insert(format!("{host} {client} {}", port.port), format!("{all:?} {:?}", service.vips));
        }
    }
    gateway::say(snapshot, &mut said);
    said.extend(snapshot.vips.iter().map(|(ip, service)| (ip.to_string(), service.host.to_string())));
    said.extend(snapshot.inbound.iter().map(|(at, cluster)| (at.to_string(), cluster.name.to_string())));
    said.extend(snapshot.headless.iter().map(|(at, host)| (format!("headless {at}"), host.to_string())));
    said.extend(snapshot.workloads.iter().map(|(ip, pod)| (format!("pod {ip}"), format!("{pod:?}"))));
    said.extend(
        snapshot.checked.iter().map(|(key, port)| (format!("check {key:?}"), port.cluster.name.to_string())),
    );
    said.extend(snapshot.origins.iter().map(|(key, origin)| (format!("origin {key:?}"), origin.sorted())));
    said.extend(snapshot.guards.keys().map(|at| (format!("guard {at}"), String::new())));
    said
}

/// Which endpoints, and which of those that have left, are the same for balancing as in the snapshot before.
fn remembered(before: &Snapshot, after: &Snapshot) -> BTreeSet<String> {
    let (before, mut kept) = (clusters(before), BTreeSet::new());
    for (key, cluster) in clusters(after) {
        let Some(was) = before.get(&key) else { continue };
        if Arc::ptr_eq(&was.state, &cluster.state) {
            kept.insert(format!("{key:?}"));
        }
        let all = |cluster: &Cluster| -> Vec<Arc<Endpoint>> {
            cluster.endpoints.iter().chain(&cluster.spread.leaving).cloned().collect()
        };
        for now in all(cluster) {
            if all(was).iter().any(|one| Arc::ptr_eq(&one.state, &now.state)) {
                kept.insert(format!("{key:?} {}", now.address));
            }
        }
        kept.extend(cluster.spread.leaving.iter().map(|one| format!("{key:?} leaving {}", one.address)));
    }
    kept
}

/// Whatever leads to an endpoint leads to the same one, and what is found by address is what is found by name.
fn assert_whole(snapshot: &Snapshot) {
    for cluster in snapshot.clusters() {
        let same =
            snapshot.clusters().filter(|other| other.name == cluster.name && other.view == cluster.view);
        for other in same {
            assert!(Arc::ptr_eq(&other.state, &cluster.state), "{}", cluster.name);
            let states = |cluster: &Cluster| -> Vec<_> {
                cluster.endpoints.iter().map(|one| Arc::as_ptr(&one.state)).collect()
            };
            assert_eq!(states(other), states(cluster), "{}", cluster.name);
        }
    }
    for service in snapshot.vips.values() {
        assert!(Arc::ptr_eq(service, &snapshot.services[&service.host]));
    }
    let mut clusters = snapshot.inbound.values().chain(snapshot.checked.values().map(|port| &port.cluster));
    assert!(clusters.all(|cluster| snapshot.clusters().any(|other| Arc::ptr_eq(other, cluster))));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn changes_one_by_one_are_what_compiling_everything_is(
        steps in proptest::collection::vec(
            (proptest::collection::vec((any::<prop::sample::Index>(), 0_usize..6), 1..4), any::<prop::sample::Index>()),
            1..40,
        )
    ) {
        let forms = forms();
        let gateway = Some(GatewayPod { namespace: "other".into(), name: "o-v1".into() });
        let settings = Settings { node: Some("n".into()), gateway, ..Settings::default() };
        let mut compiled = Compiled::new(settings.clone());
        let mut whole: Option<Snapshot> = None;
        // All there is, and then what changes.
        let all: String = forms.iter().map(|forms| forms[0].clone()).collect::<BTreeSet<String>>().into_iter().collect();
        let first: Vec<Change> = objects(&all).into_iter().map(|(key, object)| Change::Set(key, object)).collect();
        let steps = steps.into_iter().map(|(step, used)| {
            let change = |(which, form): (prop::sample::Index, usize)| {
                let forms = &forms[which.index(forms.len())];
                let (key, object) = objects(&forms[form % forms.len()]).remove(0);
                if form == 5 { Change::Gone(key) } else { Change::Set(key, object) }
            };
            (step.into_iter().map(change).collect(), Some(used))
        });
        for (changes, used) in [(first, None)].into_iter().chain(steps) {
            let before = Arc::clone(compiled.snapshot());
            compiled.apply(changes);
            let (afresh, problems) = compile(compiled.objects(), None, &settings);
            prop_assert_eq!(said(compiled.snapshot()), said(&afresh));
            let found: Vec<Problem> = compiled.problems().iter().cloned().collect();
            prop_assert_eq!(found, problems);
            assert_whole(compiled.snapshot());
            let (next, _) = compile(compiled.objects(), whole.as_ref(), &settings);
            if let Some(whole) = &whole {
                prop_assert_eq!(remembered(&before, compiled.snapshot()), remembered(whole, &next));
            }
            prop_assert_eq!(compiled.snapshot().revision, before.revision + 1);
            // A request to some endpoint is under way from now on, in both.
            let keys: Vec<_> = clusters(&next).into_keys().collect();
            if let Some(used) = used.filter(|_| !keys.is_empty()) {
                let key = &keys[used.index(keys.len())];
                for snapshot in [compiled.snapshot(), &next] {
                    if let Some(endpoint) = clusters(snapshot)[key].endpoints.first() {
                        endpoint.state.in_flight.store(1, Ordering::Relaxed);
                    }
                }
            }
            whole = Some(next);
        }
    }
}

/// A mesh of so many services with ten endpoints each, every tenth with routes of its own.
fn mesh(services: usize) -> Compiled {
    let mut text = String::new();
    for number in 0..services {
        let (high, low) = (number / 250, number % 250);
        let endpoints: Vec<String> =
            (0..10).map(|i| format!("{{addresses: [11.{i}.{high}.{low}]}}")).collect();
        let name = format!("s{number}");
        text += &backed(&name, 0, "").replace("10.96.0.0", &format!("10.96.{high}.{low}"));
        text += &slice(&format!("{name}-1"), &name, &endpoints.join(", "));
        if number % 10 == 0 {
            text += &istio(
                &format!("VirtualService default/{name}"),
                &format!(
                    "{{hosts: [{name}], http: [{{route: [{{destination: {{host: {name}, port: {{number: 80}}}}}}]}}]}}"
                ),
            );
        }
    }
    let mut compiled = Compiled::new(settings());
    compiled.apply(objects(&text).into_iter().map(|(key, object)| Change::Set(key, object)).collect());
    assert_eq!(*compiled.problems(), BTreeSet::new());
    compiled
}

/// What is not the very same as before: services, routes, clusters, endpoints, by identity.
fn made_anew(before: &Snapshot, after: &Snapshot) -> [usize; 4] {
    fn new<'s, T: 's>(
        before: impl Iterator<Item = &'s Arc<T>>,
        after: impl Iterator<Item = &'s Arc<T>>,
    ) -> usize {
        let known: BTreeSet<*const T> = before.map(Arc::as_ptr).collect();
        let now: BTreeSet<*const T> = after.map(Arc::as_ptr).collect();
        now.difference(&known).count()
    }
    fn of_routes(snapshot: &Snapshot) -> impl Iterator<Item = &Arc<HttpRoute>> {
        snapshot.services.values().flat_map(|service| &service.ports).flat_map(|port| port.routes.iter())
    }
    fn of_endpoints(snapshot: &Snapshot) -> impl Iterator<Item = &Arc<Endpoint>> {
        snapshot.clusters().flat_map(|cluster| &cluster.endpoints)
    }
    [
        new(before.services.values(), after.services.values()),
        new(of_routes(before), of_routes(after)),
        new(before.clusters(), after.clusters()),
        new(of_endpoints(before), of_endpoints(after)),
    ]
}

/// Counted, not timed: of a thousand services only the one is made anew whose endpoints have changed.
#[test]
fn a_change_of_one_endpoint_makes_anew_what_leads_to_it() {
    let mut compiled = mesh(1_000);
    for number in [1, 500, 999] {
        let before = Arc::clone(compiled.snapshot());
        let name = format!("s{number}");
        let moved = slice(
            &format!("{name}-1"),
            &name,
            &format!("{{addresses: [11.0.{}.{}]}}, {{addresses: [12.0.0.1]}}", number / 250, number % 250),
        );
        let changes = objects(&moved).into_iter().map(|(key, object)| Change::Set(key, object));
        compiled.apply(changes.collect());
        // Two ports, each with its default route, its cluster, and the endpoint that is new; the old one stays what it was.
        assert_eq!(made_anew(&before, compiled.snapshot()), [1, 2, 2, 2], "{name}");
        assert!(compiled.snapshot().workloads.is_same(&before.workloads));
        let changed = compiled.snapshot().services.changes(&before.services, Arc::ptr_eq);
        assert_eq!(changed.len(), 1);
    }
}

/// A cluster is new too where only what it falls back to has changed; whoever looks by its addresses finds the new one.
#[test]
fn what_falls_back_to_a_changed_service_is_found_by_address() {
    let policy = "---\n{apiVersion: mesh.io/v1alpha1, kind: ServicePolicy, metadata: {name: c}, spec: {service: c, \
                  fallbacks: [{to: [{host: a, port: 80}]}]}}\n";
    let at = |name: &str, ip: &str| slice(&format!("{name}-1"), name, &format!("{{addresses: [{ip}]}}"));
    let set = |text: &str| objects(text).into_iter().map(|(key, object)| Change::Set(key, object)).collect();
    let mut compiled = Compiled::new(settings());
    let all = backed("a", 1, "") + &backed("c", 3, "") + &at("a", "10.0.0.1") + &at("c", "10.0.0.3") + policy;
    compiled.apply(set(&all));
    compiled.apply(set(&at("a", "10.0.0.2")));
    assert_whole(compiled.snapshot());
    let cluster = &compiled.snapshot().inbound[&"10.0.0.3:8080".parse().unwrap()];
    assert_eq!(addresses(&cluster.standby.fallbacks[0]), ["10.0.0.2:8080"]);
}
