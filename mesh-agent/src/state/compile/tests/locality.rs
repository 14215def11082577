//! Where endpoints are, and in which levels and shares they are chosen for clients of node `here`.

use std::collections::BTreeMap;

use super::*;
use crate::state::snapshot::Locality;

const REST: &str = "
---
{apiVersion: v1, kind: Node, metadata: {name: here, labels: {topology.kubernetes.io/region: r1, topology.kubernetes.io/zone: z1, topology.istio.io/subzone: s1}}}
---
{apiVersion: v1, kind: Node, metadata: {name: beside, labels: {topology.kubernetes.io/region: r1, topology.kubernetes.io/zone: z1, topology.istio.io/subzone: s2}}}
---
{apiVersion: v1, kind: Node, metadata: {name: across, labels: {failure-domain.beta.kubernetes.io/region: r1, failure-domain.beta.kubernetes.io/zone: z2}}}
---
{apiVersion: v1, kind: Node, metadata: {name: far, labels: {topology.kubernetes.io/region: r2, topology.kubernetes.io/zone: z3}}}
---
{apiVersion: v1, kind: Node, metadata: {name: farther, labels: {topology.kubernetes.io/region: r3, topology.kubernetes.io/zone: z4}}}
";

/// A pod on each node, 10.0.0.1 to 5 in this order.
const NODES: [&str; 5] = ["here", "beside", "across", "far", "farther"];

fn here() -> Settings {
    Settings { node: Some("here".into()), ..Settings::default() }
}

fn on(node: &str, last: usize, metadata: &str) -> String {
    format!(
        "---\n{{apiVersion: v1, kind: Pod, metadata: {{name: p{last}, labels: {{app: a, version: v{}}}{metadata}}}, \
         spec: {{nodeName: {node}}}, status: {{podIP: 10.0.0.{last}}}}}\n",
        last % 2
    )
}

fn pods() -> String {
    NODES.iter().zip(1..).map(|(node, last)| on(node, last, "")).collect()
}

fn snapshot(text: &str) -> (Snapshot, Vec<Problem>) {
    let (objects, refused) = read_text(text);
    assert_eq!(refused, [], "{text}");
    compile(&objects, None, &here())
}

fn whole(snapshot: &Snapshot) -> Arc<Cluster> {
    Arc::clone(&snapshot.services[A].port_for("default", 80).unwrap().cluster)
}

/// The last numbers of the addresses in each group of each level, with the groups' shares where there are several.
fn levels(cluster: &Cluster) -> Vec<String> {
    shown(cluster, &cluster.spread.levels)
}

fn shown(cluster: &Cluster, levels: &[crate::state::snapshot::Level]) -> Vec<String> {
    let level = |level: &crate::state::snapshot::Level| {
        let several = level.groups.len() > 1;
        let groups = level.groups.iter().map(|group| {
            let all = (0..group.len(cluster.endpoints.len())).filter_map(|place| group.index(place));
            let last = |index: usize| match cluster.endpoints[index].address.ip() {
                std::net::IpAddr::V4(ip) => ip.octets()[3].to_string(),
                std::net::IpAddr::V6(_) => panic!("no such endpoints here"),
            };
            let members = all.map(last).collect::<Vec<_>>().join(" ");
            if several { format!("{}%: {members}", group.share) } else { members }
        });
        groups.collect::<Vec<_>>().join(", ")
    };
    levels.iter().map(level).collect()
}

const OUTLIERS: &str = "outlierDetection: {}";

/// The levels with this `localityLbSetting`, and with `outlierDetection`.
fn with(setting: &str) -> Vec<String> {
    let policy = format!("loadBalancer: {{localityLbSetting: {setting}}}, {OUTLIERS}");
    levels(&by_policy(&policy, ""))
}

fn by_policy(policy: &str, more: &str) -> Arc<Cluster> {
    let rule = istio("DestinationRule default/a", &format!("{{host: a, trafficPolicy: {{{policy}}}}}"));
    let (snapshot, problems) =
        snapshot(&(service("default", "a", "{port: 80}") + REST + &pods() + &rule + more));
    assert_eq!(problems, []);
    whole(&snapshot)
}

#[test]
fn endpoints_are_where_their_pods_and_nodes_say() {
    let labelled = on("here", 6, "").replace("app: a", "app: a, istio-locality: x.y.z");
    let (snapshot, problems) =
        snapshot(&(service("default", "a", "{port: 80}") + REST + &pods() + &labelled));
    assert_eq!(problems, []);
    let places: Vec<String> = whole(&snapshot).endpoints.iter().map(|one| one.locality.to_string()).collect();
    assert_eq!(places, ["r1/z1/s1", "r1/z1/s2", "r1/z2", "r2/z3", "r3/z4", "x/y/z"]);
}

#[test]
fn slices_say_where_endpoints_are_that_are_no_known_pods() {
    let slice = "---\n{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4, metadata: {name: one, \
                 labels: {kubernetes.io/service-name: a}}, ports: [{port: 80}], endpoints: [\
                 {addresses: [10.0.9.1], nodeName: far}, {addresses: [10.0.9.2], zone: z2}, \
                 {addresses: [10.0.9.3], zone: new}, {addresses: [10.0.9.4]}]}\n";
    let (snapshot, problems) = snapshot(&(service("default", "a", "{port: 80}") + REST + slice));
    assert_eq!(problems, []);
    let places: Vec<Locality> = whole(&snapshot).endpoints.iter().map(|one| one.locality.clone()).collect();
    // The region of a zone is that of any node there.
    assert_eq!(places, ["r2/z3", "r1/z2", "/new", ""].map(Locality::parse));
}

#[test]
fn failover_is_by_place_and_only_with_outlier_detection() {
    // Istio's mesh-wide default.
    assert_eq!(levels(&by_policy(OUTLIERS, "")), ["1", "2", "3", "4 5"]);
    assert_eq!(with("{}"), ["1", "2", "3", "4 5"]);
    assert_eq!(with("{failover: [{from: r1, to: r3}]}"), ["1", "2", "3", "5", "4"]);
    assert_eq!(with("{failover: [{from: r9, to: r3}]}"), ["1", "2", "3", "4 5"]);
    assert_eq!(with("{enabled: false}"), [""; 0]);
    let without = "loadBalancer: {localityLbSetting: {failover: [{from: r1, to: r3}]}}";
    assert_eq!(levels(&by_policy(without, "")), [""; 0], "nobody would know when");
    assert!(levels(&by_policy("", "")).is_empty());
}

#[test]
fn failover_is_by_labels_in_common_one_after_the_other() {
    let region = "topology.kubernetes.io/region";
    assert_eq!(with(&format!("{{failoverPriority: [{region}]}}")), ["1 2 3", "4 5"]);
    assert_eq!(with("{failoverPriority: [kubernetes.io/hostname]}"), ["1", "2 3 4 5"]);
    assert_eq!(with(&format!("{{failoverPriority: ['version=v0', {region}]}}")), ["2", "4", "1 3 5"]);
    assert_eq!(with(&format!("{{failoverPriority: ['{region}=r3', 'version=v1']}}")), ["5", "1 2 3 4"]);
    let both = "{failoverPriority: ['version=v0'], failover: [{from: r1, to: r2}]}";
    assert_eq!(with(both), ["2", "4", "1", "3", "5"]);
}

#[test]
fn labels_of_the_clients_own_pod_make_levels_for_each_client() {
    let region = "topology.kubernetes.io/region";
    let policy = |setting: &str| format!("loadBalancer: {{localityLbSetting: {setting}}}, {OUTLIERS}");
    let by_version = policy(&format!("{{failoverPriority: [version, {region}]}}"));
    let cluster = by_policy(&by_version, "");
    let of = |cluster: &Cluster, labels: &[(&str, &str)]| {
        let client = labels.iter().map(|(label, value)| ((*label).into(), (*value).into())).collect();
        let by_client = cluster.spread.by_client.as_ref().unwrap();
        shown(cluster, &by_client.layout(&client, &cluster.endpoints).levels)
    };
    assert_eq!(of(&cluster, &[("version", "v0"), ("app", "b")]), ["2", "4", "1 3 5"]);
    assert_eq!(of(&cluster, &[("version", "v1")]), ["1 3", "5", "2 4"]);
    assert_eq!(of(&cluster, &[("app", "a")]), [""; 0], "nobody is like who has no such label");
    assert!(levels(&cluster).is_empty() && cluster.limits_connections, "the kernel does not know of them");
    // Beside values that are the same for all, and places.
    let mixed =
        by_policy(&policy("{failoverPriority: ['app=a', version], failover: [{from: r1, to: r3}]}"), "");
    assert_eq!(of(&mixed, &[("version", "v1")]), ["1", "3", "5", "2", "4"]);
    // Where nobody would know when, or somebody else decides, nothing is asked of the client.
    let mesh = "---\n{apiVersion: v1, kind: ConfigMap, metadata: {name: mesh, namespace: istio-system}, \
                data: {mesh: 'localityLbSetting: {failoverPriority: [version]}'}}\n";
    let asks = |policy: &str, more: &str| by_policy(policy, more).spread.by_client.is_some();
    assert!(asks(OUTLIERS, mesh), "the mesh-wide setting may ask too");
    assert!(!asks("loadBalancer: {localityLbSetting: {failoverPriority: [version]}}", ""));
    assert!(!asks(&policy("{enabled: false, failoverPriority: [version]}"), ""));
    assert!(!asks(&policy("{failoverPriority: ['version=v1', kubernetes.io/hostname]}"), ""));
    assert!(!asks(&policy("{}"), mesh), "the rule's own says nothing of it");
}

#[test]
fn shares_are_for_clients_of_the_places_they_name() {
    let shares = "{distribute: [{from: r9/*, to: {r2: 100}}, {from: r1/z1/*, to: {r1/z1/*: 80, r2: 20}}, {from: '*', to: {r3: 100}}]}";
    assert_eq!(with(shares), ["80%: 1 2, 20%: 4"]);
    let without = format!("loadBalancer: {{localityLbSetting: {shares}}}");
    let cluster = by_policy(&without, "");
    assert_eq!(levels(&cluster), ["80%: 1 2, 20%: 4"], "shares need no outlier detection");
    assert!(cluster.limits_connections, "the kernel does not know of them");
    assert_eq!(with("{distribute: [{from: '*', to: {r9: 100}}]}"), [""], "nobody is there");
    assert_eq!(with("{distribute: [{from: '*', to: {r9: 50, r3: 50}}]}"), ["5"]);
    assert_eq!(with("{distribute: [{from: r9, to: {r3: 100}}]}"), [""; 0], "nothing for clients of here");
}

#[test]
fn a_rule_says_more_than_its_service_and_that_more_than_the_mesh() {
    let mesh = "---\n{apiVersion: v1, kind: ConfigMap, metadata: {name: mesh, namespace: istio-system}, \
                data: {mesh: 'localityLbSetting: {failover: [{from: r1, to: r3}]}'}}\n";
    assert_eq!(levels(&by_policy(OUTLIERS, mesh)), ["1", "2", "3", "5", "4"]);
    let rule =
        format!("loadBalancer: {{localityLbSetting: {{failover: [{{from: r1, to: r2}}]}}}}, {OUTLIERS}");
    assert_eq!(levels(&by_policy(&rule, mesh)), ["1", "2", "3", "4", "5"]);
    let near = |word: &str, more: &str| {
        let text = service("default", "a", "{port: 80}")
            .replace("selector", &format!("trafficDistribution: {word}, selector"));
        let (snapshot, problems) = snapshot(&(text + REST + &pods() + mesh + more));
        (levels(&whole(&snapshot)), problems)
    };
    assert_eq!(near("PreferClose", ""), (["1", "2", "3", "4 5"].map(str::to_owned).to_vec(), vec![]));
    assert_eq!(near("PreferSameZone", "").0, ["1", "2", "3", "4 5"]);
    assert_eq!(near("PreferSameNode", "").0, ["1", "2", "3", "4 5"]);
    let beside = on("here", 6, ", annotations: {mesh.io/weight: '2'}")
        .replace("app: a", "app: a, istio-locality: r1.z1.s2");
    assert_eq!(
        near("PreferSameNode", &beside).0[0],
        "1 6",
        "its node is this one, whatever it says of its place"
    );
    assert_problems(
        &near("PreferFar", "").1,
        &["Service default/a: spec.trafficDistribution: \"PreferFar\""],
    );
    let rule = istio("DestinationRule default/a", &format!("{{host: a, trafficPolicy: {{{rule}}}}}"));
    assert_eq!(near("PreferClose", &rule).0, ["1", "2", "3", "4", "5"]);
    let annotated = "---\n{apiVersion: v1, kind: Service, metadata: {name: a, annotations: \
                     {networking.istio.io/traffic-distribution: PreferClose}}, spec: {selector: {app: a}, ports: [{port: 80}]}}\n";
    assert_eq!(levels(&whole(&snapshot(&(annotated.to_owned() + REST + &pods())).0)), ["1", "2", "3", "4 5"]);
}

#[test]
fn hints_count_where_all_have_them_and_some_are_for_here() {
    let slice = |hints: [&str; 3]| {
        let endpoints: Vec<String> = hints
            .iter()
            .zip(1..)
            .map(|(hints, last)| format!("{{addresses: [10.0.9.{last}]{hints}}}"))
            .collect();
        let slice = format!(
            "---\n{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4, metadata: {{name: one, \
             labels: {{kubernetes.io/service-name: a}}}}, ports: [{{port: 80}}], endpoints: [{}]}}\n",
            endpoints.join(", ")
        );
        levels(&whole(&snapshot(&(service("default", "a", "{port: 80}") + REST + &slice)).0))
    };
    let (own, other) = (", hints: {forZones: [{name: z1}]}", ", hints: {forZones: [{name: z2}]}");
    let node = ", hints: {forNodes: [{name: here}], forZones: [{name: z1}]}";
    assert_eq!(slice([own, other, own]), ["1 3", "2"]);
    assert_eq!(slice([own, other, node]), ["3", "1", "2"]);
    assert_eq!(slice([own, other, ""]), [""; 0], "one has none");
    assert_eq!(slice([other, other, other]), [""; 0], "none is for here");
}

#[test]
fn weights_are_the_pods_own_and_bad_ones_are_refused() {
    let pods = on("here", 1, ", annotations: {mesh.io/weight: '3'}") + &on("far", 2, "");
    let (snapshot, _) = snapshot(&(service("default", "a", "{port: 80}") + REST + &pods));
    let cluster = whole(&snapshot);
    assert_eq!(cluster.endpoints.iter().map(|one| one.weight).collect::<Vec<_>>(), [3, 1]);
    assert_eq!(levels(&cluster), ["1 2"]);
    assert!(cluster.spread.levels[0].groups[0].weights.is_some() && cluster.limits_connections);
    for bad in ["0", "-1", "10001", "much"] {
        let (_, refused) = read_text(&on("here", 1, &format!(", annotations: {{mesh.io/weight: '{bad}'}}")));
        assert_problems(&refused, &["metadata.annotations.mesh.io/weight: "]);
    }
}

#[test]
fn ways_to_choose() {
    let simple = |word: &str| format!("loadBalancer: {{simple: {word}}}");
    let annotation = "annotations: {mesh.io/load-balancer: PEAK_EWMA}";
    let chosen = |service_annotated: bool, rule_annotated: bool, policy: &str| {
        let mut text = service("default", "a", "{port: 80}");
        if service_annotated {
            text = text.replace("namespace: default}", &format!("namespace: default, {annotation}}}"));
        }
        let mut rule =
            istio("DestinationRule default/a", &format!("{{host: a, trafficPolicy: {{{policy}}}}}"));
        if rule_annotated {
            rule = rule.replace("namespace: default}", &format!("namespace: default, {annotation}}}"));
        }
        let cluster = whole(&snapshot(&(text + &rule)).0);
        (cluster.balancing, cluster.limits_connections)
    };
    let table = [
        (false, false, String::new(), Balancing::LeastRequest, false),
        (true, false, String::new(), Balancing::PeakEwma, true),
        (false, true, String::new(), Balancing::PeakEwma, true),
        (false, true, simple("LEAST_REQUEST"), Balancing::PeakEwma, true),
        (true, false, simple("LEAST_REQUEST"), Balancing::LeastRequest, false),
        (true, false, simple("ROUND_ROBIN"), Balancing::RoundRobin, false),
        (false, false, simple("PASSTHROUGH"), Balancing::Passthrough, true),
        (false, false, "loadBalancer: {warmupDurationSecs: 3s}".to_owned(), Balancing::LeastRequest, true),
    ];
    for (service, rule, policy, balancing, agent) in table {
        assert_eq!(chosen(service, rule, &policy), (balancing, agent), "{service} {rule} {policy}");
    }
    let rule = istio("DestinationRule default/a", "{host: a}");
    let other = rule
        .replace("namespace: default}", "namespace: default, annotations: {mesh.io/load-balancer: BEST}}");
    assert_problems(
        &read_text(&other).1,
        &["metadata.annotations.mesh.io/load-balancer: \"BEST\" is not PEAK_EWMA"],
    );
    let both =
        istio("DestinationRule default/a", "{host: a, trafficPolicy: {loadBalancer: {simple: RANDOM}}}");
    let both = both.replace("namespace: default}", &format!("namespace: default, {annotation}}}"));
    assert_problems(
        &read_text(&both).1,
        &["metadata.annotations.mesh.io/load-balancer: says otherwise than"],
    );
    let service = service("default", "a", "{port: 80}");
    let other = service
        .replace("namespace: default}", "namespace: default, annotations: {mesh.io/load-balancer: BEST}}");
    assert_problems(
        &snapshot(&other).1,
        &["Service default/a: metadata.annotations.mesh.io/load-balancer: \"BEST\""],
    );
}

#[test]
fn who_comes_back_while_it_is_not_done_is_known_again() {
    let base = service("default", "a", "{port: 80}") + REST;
    let (all, one) = (base.clone() + &pods(), base + &on("here", 1, ""));
    let read = |text: &str| read_text(text).0;
    let (first, _) = compile(&read(&all), None, &here());
    let cluster = whole(&first);
    cluster.endpoints[1].state.in_flight.store(2, Ordering::Relaxed);
    cluster.endpoints[2].state.health.eject(tokio::time::Instant::now());
    let (second, _) = compile(&read(&one), Some(&first), &here());
    assert_eq!(whole(&second).endpoints.len(), 1);
    let leaving: Vec<_> = whole(&second).spread.leaving.iter().map(|one| one.address).collect();
    assert_eq!(leaving, [cluster.endpoints[1].address, cluster.endpoints[2].address]);
    let (third, _) = compile(&read(&all), Some(&second), &here());
    for (index, known) in [true, true, true, false, false].into_iter().enumerate() {
        let same = Arc::ptr_eq(&whole(&third).endpoints[index].state, &cluster.endpoints[index].state);
        assert_eq!(same, known, "{index}");
    }
    assert!(whole(&third).spread.leaving.is_empty());
}

#[tokio::test(start_paused = true)]
async fn who_left_while_it_was_ejected_is_known_for_five_minutes() {
    let base = service("default", "a", "{port: 80}") + REST;
    let (all, one) = (base.clone() + &pods(), base + &on("here", 1, ""));
    let read = |text: &str| read_text(text).0;
    let (first, _) = compile(&read(&all), None, &here());
    let ejected = Arc::clone(&whole(&first).endpoints[2]);
    ejected.state.health.eject(tokio::time::Instant::now());
    let (mut before, _) = compile(&read(&one), Some(&first), &here());
    for (minutes, known) in [(4, true), (2, false)] {
        tokio::time::advance(std::time::Duration::from_mins(minutes)).await;
        (before, _) = compile(&read(&one), Some(&before), &here());
        assert_eq!(whole(&before).spread.leaving.len(), usize::from(known), "{minutes}");
        let (back, _) = compile(&read(&all), Some(&before), &here());
        assert_eq!(Arc::ptr_eq(&whole(&back).endpoints[2].state, &ejected.state), known, "{minutes}");
    }
}

/// The zones of the first level, with the last numbers of their endpoints' addresses.
fn zones(cluster: &Cluster) -> Vec<String> {
    let zones = cluster.spread.zones.iter().flat_map(crate::state::snapshot::Zones::iter);
    let zone = |(zone, group): &(Locality, crate::state::snapshot::Group)| {
        let places = (0..group.len(0)).filter_map(|place| group.index(place));
        let last = places.map(|index| cluster.endpoints[index].address.ip().to_string());
        let last: Vec<String> = last.map(|ip| ip.rsplit('.').next().unwrap().to_owned()).collect();
        format!("{zone}: {}", last.join(" "))
    };
    zones.map(zone).collect()
}

#[test]
fn zones_of_the_region_are_one_level_and_other_regions_stand_in() {
    let zone_aware = |setting: &str| format!("loadBalancer: {{zoneAwareLbSetting: {setting}}}");
    // No outlier detection is needed for the region to come first.
    let cluster = by_policy(&zone_aware("{}"), "");
    assert_eq!(levels(&cluster), ["1 2 3", "4 5"]);
    assert_eq!(zones(&cluster), ["r1/z1: 1 2", "r1/z2: 3"]);
    assert!(cluster.limits_connections, "the kernel does not know of them");
    let failover = by_policy(&zone_aware("{failover: [{from: r1, to: r3}]}"), "");
    assert_eq!(levels(&failover), ["1 2 3", "5", "4"]);
    // Labels first, and the region within what has them in common.
    let priority = by_policy(&zone_aware("{failoverPriority: ['version=v1']}"), "");
    assert_eq!(levels(&priority), ["1 3", "5", "2", "4"]);
    assert_eq!(zones(&priority), ["r1/z1: 1", "r1/z2: 3"]);
    let of_client = by_policy(&zone_aware("{failoverPriority: [version]}"), "");
    let labels = BTreeMap::from([("version".into(), "v1".into())]);
    let layout = of_client.spread.by_client.as_ref().unwrap().layout(&labels, &of_client.endpoints);
    assert!(layout.zones.is_some() && of_client.spread.asks_for_origin());
    assert_eq!(shown(&of_client, &layout.levels), ["1 3", "5", "2", "4"]);
    // Whoever is told not to, or has a key to keep.
    assert_eq!(zones(&by_policy(&zone_aware("{enabled: false}"), "")), [""; 0]);
    let hashes = "loadBalancer: {consistentHash: {useSourceIp: true}, zoneAwareLbSetting: {}}";
    assert_eq!(zones(&by_policy(hashes, "")), [""; 0]);
    // A rule that says nothing of zones goes by the mesh-wide setting, and one that does not.
    let mesh = "---\n{apiVersion: v1, kind: ConfigMap, metadata: {name: mesh, namespace: istio-system}, \
                data: {mesh: 'localityLbSetting: {failover: [{from: r1, to: r3}]}'}}\n";
    let outliers = format!("{}, {OUTLIERS}", zone_aware("{}"));
    assert_eq!(levels(&by_policy(&outliers, mesh)), ["1 2 3", "4 5"]);
}

#[test]
fn where_the_pods_of_a_workload_are_is_counted_where_a_rule_asks() {
    let rule = "{host: a, subsets: [{name: v1, labels: {version: v1}, trafficPolicy: {portLevelSettings: \
                [{port: {number: 80}, loadBalancer: {zoneAwareLbSetting: {}}}]}}]}";
    let base = service("default", "a", "{port: 80}") + REST;
    let of_web = |text: String| {
        text.replace("name: p", "name: web-77-")
            .replace("labels: {app: a", "labels: {app: web, pod-template-hash: '77'")
    };
    let clients = of_web(on("here", 6, "") + &on("beside", 7, "") + &on("far", 8, ""));
    let unready = of_web(on("far", 9, ""))
        .replace("status: {", "status: {conditions: [{type: Ready, status: 'False'}], ");
    let text = base + &clients + &unready;
    assert!(snapshot(&text).0.origins.is_empty(), "nobody asks");
    let (snapshot, problems) = snapshot(&(text + &istio("DestinationRule default/a", rule)));
    assert_eq!(problems, []);
    let origin = snapshot.origins.get(&("default".into(), "web".into())).map(|origin| origin.sorted());
    assert_eq!(origin.as_deref(), Some("r1/z1: 2, r2/z3: 1"));
}
