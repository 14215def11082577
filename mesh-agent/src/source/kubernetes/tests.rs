//! A cluster as it changes, served by an API server in this process. Every wait is for a receiver, never for a time.
#![expect(clippy::unwrap_used, reason = "tests")]

mod definitions;
pub(crate) mod fake;
mod resuming;
mod secrets;

use std::{net::IpAddr, sync::atomic::Ordering};

use serde_json::{Value, json};

use self::fake::Fake;
use super::{watch::Seen, *};
use crate::{
    source::Sandbox,
    state::{Problem, compile::Netns, snapshot::Snapshot},
};

const ISTIO: &str = "networking.istio.io";

/// Failures are tried again at once, as times go.
fn patience() -> Patience {
    let retry = Retry::new(Duration::from_millis(5), Duration::from_millis(50));
    Patience { retry, ..Patience::default() }
}

fn settings() -> Settings {
    Settings {
        node: Some("here".into()),
        netns: Netns::Node(std::path::Path::new("/run/pods").into()),
        ..Settings::default()
    }
}

async fn start(fake: &Fake) -> Source {
    follow(&fake.cluster(), settings(), &Sandboxes::default(), patience()).await.unwrap()
}

fn service(name: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"selector": {"app": name}, "ports": [{"name": "http", "port": 80}],
                 "fieldOfTheFuture": {"a": 1}},
    })
}

fn pod(name: &str, node: &str, ip: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "default", "labels": {"app": "a"}},
        "spec": {"nodeName": node, "containers": [{
            "name": "c", "readinessProbe": {"httpGet": {"path": "/ready", "port": 8080}, "fieldOfTheFuture": 1},
        }]},
        "status": {"phase": "Running", "podIP": ip},
    })
}

fn slice(service: &str, endpoints: &[(&str, &str)]) -> Value {
    let endpoint = |(pod, ip): &(&str, &str)| json!({"addresses": [ip], "conditions": {"ready": true}, "targetRef": {"kind": "Pod", "name": pod}});
    let endpoints: Vec<Value> = endpoints.iter().map(endpoint).collect();
    json!({
        "metadata": {"name": format!("{service}-1"), "namespace": "default",
                     "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4", "ports": [{"name": "http", "port": 8080}], "endpoints": endpoints,
    })
}

fn put_service(fake: &Fake, name: &str) {
    fake.put("", "services", service(name));
}

fn names(snapshot: &Snapshot) -> Vec<String> {
    let mut names: Vec<String> = snapshot.services.values().map(|service| service.name.to_string()).collect();
    names.sort();
    names
}

fn endpoints(snapshot: &Snapshot, name: &str) -> Vec<String> {
    let service = snapshot.services.values().find(|service| &*service.name == name);
    let endpoints = service.into_iter().flat_map(|service| &service.ports[0].cluster.endpoints);
    endpoints.map(|endpoint| endpoint.address.to_string()).collect()
}

/// How many routes of the rule the first service has: without it there is one, of another name.
fn named_routes(snapshot: &Snapshot) -> usize {
    let service = snapshot.services.values().next();
    service
        .map_or(0, |service| service.ports[0].routes.iter().filter(|route| route.name.ends_with('r')).count())
}

async fn until_names(source: &mut Source, expected: &[&str]) {
    source.snapshots.wait_for(|snapshot| names(snapshot) == expected).await.unwrap();
}

async fn until_problem(source: &mut Source, text: &str) -> Problem {
    let has =
        |problems: &std::sync::Arc<[Problem]>| problems.iter().any(|one| one.to_string().contains(text));
    let problems = source.problems.wait_for(has).await.unwrap();
    problems.iter().find(|problem| problem.to_string().contains(text)).unwrap().clone()
}

#[tokio::test]
async fn the_first_snapshot_has_everything_however_many_pages_it_takes() {
    let fake = Fake::start().await;
    fake.pages_of(2);
    for name in ["a", "b", "c", "d", "e"] {
        put_service(&fake, name);
    }
    fake.put("", "pods", pod("a-1", "here", "10.0.0.1"));
    fake.put("", "pods", pod("a-2", "there", "10.0.0.2"));
    fake.put("discovery.k8s.io", "endpointslices", slice("a", &[("a-1", "10.0.0.1"), ("a-2", "10.0.0.2")]));
    let source = start(&fake).await;
    let snapshot = source.snapshots.borrow().clone();
    assert_eq!(snapshot.revision, 1, "one compilation for all there is");
    assert_eq!(names(&snapshot), ["a", "b", "c", "d", "e"]);
    assert_eq!(endpoints(&snapshot, "a"), ["10.0.0.1:8080", "10.0.0.2:8080"]);
    let pages = fake.asked("/api/v1/services?");
    assert!(pages.iter().any(|asked| asked.contains("continue=4")), "{pages:?}");
    assert_eq!(source.problems.borrow().len(), 0, "{:?}", source.problems.borrow());
}

#[tokio::test]
async fn pods_of_this_node_are_known_in_full_and_others_as_far_as_they_are_used() {
    let fake = Fake::start().await;
    fake.put(
        "",
        "namespaces",
        json!({"metadata": {"name": "default", "labels": {"mesh.io/dataplane-mode": "node"}}}),
    );
    fake.put("", "pods", pod("own", "here", "10.0.0.1"));
    let mut other = pod("other", "there", "10.0.0.2");
    other["metadata"]["annotations"] = json!({"mesh.io/enrolled": "true"});
    fake.put("", "pods", other);
    fake.put("", "pods", pod("unscheduled", "", ""));
    let mut ended = pod("ended", "there", "10.0.0.3");
    ended["status"]["phase"] = "Succeeded".into();
    fake.put("", "pods", ended);
    let mut source = start(&fake).await;
    let of = |snapshot: &Snapshot, ip: &str| snapshot.workloads.get(&ip.parse::<IpAddr>().unwrap()).cloned();
    let snapshot = source.snapshots.borrow_and_update().clone();
    let (own, other) = (of(&snapshot, "10.0.0.1").unwrap(), of(&snapshot, "10.0.0.2").unwrap());
    assert!(own.enrolled && other.enrolled && snapshot.workloads.len() == 2);
    assert_eq!((own.capture.probes.len(), other.capture.probes.len()), (1, 0));
    assert!(own.netns.as_deref().is_some_and(|path| path.starts_with("/run/pods/")) && other.netns.is_none());
    let lists = fake.asked("GET /api/v1/pods?");
    let asks =
        |selector: &str| lists.iter().any(|asked| asked.contains(&format!("fieldSelector={selector}&")));
    assert!(
        asks("spec.nodeName=here")
            && asks("spec.nodeName!=here,spec.nodeName!=,status.phase!=Succeeded,status.phase!=Failed"),
        "{lists:?}"
    );
    // It gets its place, by way of the other watch.
    fake.put("", "pods", pod("unscheduled", "here", "10.0.0.4"));
    source.snapshots.wait_for(|snapshot| of(snapshot, "10.0.0.4").is_some()).await.unwrap();
    let mut ended = pod("other", "there", "10.0.0.2");
    ended["status"]["phase"] = "Failed".into();
    fake.put("", "pods", ended);
    source.snapshots.wait_for(|snapshot| of(snapshot, "10.0.0.2").is_none()).await.unwrap();
}

#[tokio::test]
async fn a_pod_has_the_addresses_that_the_network_plugin_told_until_the_api_server_knows_them() {
    let fake = Fake::start().await;
    let starting = |name: &str, status: Value| {
        let mut pod = pod(name, "here", "");
        pod["metadata"]["uid"] = format!("uid-of-{name}").into();
        pod["status"] = status;
        pod
    };
    fake.put("", "pods", starting("one", json!({"phase": "Pending"})));
    let sandboxes = Sandboxes::default();
    let mut source = follow(&fake.cluster(), settings(), &sandboxes, patience()).await.unwrap();
    let told = |ip: &str| Sandbox { netns: "/run/netns/one".into(), ips: vec![ip.parse().unwrap()] };
    let addresses = |snapshot: &Snapshot| {
        let mut all: Vec<String> = snapshot.workloads.keys().map(ToString::to_string).collect();
        all.sort();
        all
    };
    assert_eq!(addresses(&source.snapshots.borrow()), [""; 0]);
    // It is told of a pod that is known, and of one before it is.
    sandboxes.insert("uid-of-one", told("10.0.0.1"));
    source.snapshots.wait_for(|snapshot| addresses(snapshot) == ["10.0.0.1"]).await.unwrap();
    sandboxes.insert("uid-of-two", told("10.0.0.2"));
    fake.put("", "pods", starting("two", json!({})));
    source.snapshots.wait_for(|snapshot| addresses(snapshot) == ["10.0.0.1", "10.0.0.2"]).await.unwrap();
    fake.put("", "pods", starting("two", json!({"podIP": "10.0.0.9"})));
    source.snapshots.wait_for(|snapshot| addresses(snapshot) == ["10.0.0.1", "10.0.0.9"]).await.unwrap();
    sandboxes.remove("uid-of-one");
    source.snapshots.wait_for(|snapshot| addresses(snapshot) == ["10.0.0.9"]).await.unwrap();
}

#[tokio::test]
async fn what_happens_arrives_and_what_changes_nothing_compiles_nothing() {
    let fake = Fake::start().await;
    put_service(&fake, "a");
    let node = |beat: &str| {
        json!({"metadata": {"name": "here", "labels": {"topology.kubernetes.io/zone": "z"}},
               "status": {"conditions": [{"type": "Ready", "lastHeartbeatTime": beat}]}})
    };
    fake.put("", "nodes", node("1"));
    let mut source = start(&fake).await;
    put_service(&fake, "b");
    until_names(&mut source, &["a", "b"]).await;
    fake.delete("", "services", "default", "a");
    until_names(&mut source, &["b"]).await;
    let compiled = source.counts.compiled.load(Ordering::Relaxed);
    let taken = source.counts.reads.load(Ordering::Relaxed);
    fake.put("", "nodes", node("2"));
    let mut again = service("b");
    again["status"] = json!({"loadBalancer": {}});
    fake.put("", "services", again);
    // Told by the same watch as the service that did not change, and after it.
    put_service(&fake, "c");
    until_names(&mut source, &["b", "c"]).await;
    let taken = source.counts.reads.load(Ordering::Relaxed) - taken;
    let compiled = source.counts.compiled.load(Ordering::Relaxed) - compiled;
    assert_eq!(
        compiled, 1,
        "of {taken} times that something was taken over only the one with the new service"
    );
}

#[tokio::test]
async fn a_refused_object_is_named_and_keeps_its_last_good_state() {
    let fake = Fake::start().await;
    fake.define(ISTIO, "virtualservices", &["v1"]);
    put_service(&fake, "a");
    let rule = |weight: i32| {
        json!({"metadata": {"name": "v", "namespace": "default"},
               "spec": {"hosts": ["a"], "http": [{"name": "r", "route": [{"destination": {"host": "a"}, "weight": weight}]}]}})
    };
    fake.put(ISTIO, "virtualservices", rule(100));
    let mut source = start(&fake).await;
    assert_eq!(named_routes(&source.snapshots.borrow()), 1);
    fake.put(ISTIO, "virtualservices", rule(-1));
    let problem = until_problem(&mut source, "weight").await;
    let text = problem.to_string();
    assert!(text.starts_with("VirtualService default/v: spec.http[0].route[0].weight: "), "{text}");
    assert_eq!(named_routes(&source.snapshots.borrow()), 1);
    fake.put(ISTIO, "virtualservices", rule(1));
    source.problems.wait_for(|problems| problems.is_empty()).await.unwrap();
}

#[tokio::test]
async fn mesh_wide_settings_are_read_from_their_one_config_map() {
    let fake = Fake::start().await;
    let settings = |namespace: &str, text: &str| json!({"metadata": {"name": "mesh", "namespace": namespace}, "data": {"mesh": text, "meshNetworks": "networks: {}"}});
    let root = crate::state::defaults::ROOT_NAMESPACE;
    fake.put("", "configmaps", settings("elsewhere", "notASetting: 1"));
    fake.put("", "configmaps", settings(root, "pathNormalization: {normalization: MERGE_SLASHES}"));
    let mut source = start(&fake).await;
    assert!(source.snapshots.borrow().path_normalization.is_some() && source.problems.borrow().is_empty());
    let asked = fake.asked("configmaps");
    let one = format!("GET /api/v1/namespaces/{root}/configmaps?");
    let all = asked
        .iter()
        .all(|asked| asked.starts_with(&one) && asked.contains("fieldSelector=metadata.name=mesh"));
    assert!(all && !asked.is_empty(), "{asked:?}");
    fake.put("", "configmaps", settings(root, "notASetting: 1"));
    let problem = until_problem(&mut source, "notASetting").await.to_string();
    assert!(problem.starts_with(&format!("ConfigMap {root}/mesh: data.mesh")), "{problem}");
}

#[tokio::test]
async fn what_is_ready_at_once_is_compiled_at_once() {
    let fake = Fake::start().await;
    let (told, news) = mpsc::channel(NEWS);
    let (_again, asked) = channel::channel(());
    let starter = Starter::new(fake.cluster().client(), told.clone(), asked, patience().retry);
    let mut follower = Follower {
        in_force: InForce::new(settings()),
        mirror: Mirror::default(),
        secrets: Secrets::new(starter, settings()),
        sandboxes: Sandboxes::default().watch(),
        failing: BTreeMap::new(),
        news,
        waiting: BTreeSet::new(),
        _tasks: Vec::new(),
    };
    let set = |name: &str| {
        let mut value = service(name);
        (value["apiVersion"], value["kind"]) = ("v1".into(), "Service".into());
        let (key, resource) =
            crate::state::resource::read(&value, crate::state::resource::Origin::ApiServer).unwrap();
        let seen = Seen { key, uid: 1, hash: 1, read: Ok(resource), stand_in: None, said: None };
        Told { watch: WatchId::All("services"), what: What::Set(Box::new(seen)) }
    };
    for name in ["b", "c"] {
        told.send(set(name)).await.unwrap();
    }
    let changes = follower.hear_all(set("a")).unwrap();
    assert_eq!(changes.len(), 3);
    assert!(follower.news.is_empty());
}
