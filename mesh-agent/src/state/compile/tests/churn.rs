//! Endpoints that come and go while requests are on their way.

use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicBool, AtomicUsize},
};

use arc_swap::ArcSwap;

use super::*;
use crate::{
    balance::{Wish, choose},
    state::resource::{Object, Resource},
};

const CHANGES: usize = 1_000;
const CLIENTS: u64 = 3;

/// Slices of a service, one endpoint in each; of them all but this one are ready.
fn at(change: usize, all: &Objects) -> Objects {
    let mut objects = all.clone();
    for (number, (key, object)) in all.iter().filter(|(key, _)| &*key.kind == "EndpointSlice").enumerate() {
        let Resource::EndpointSlice(slice) = &object.resource else { continue };
        let mut slice = (**slice).clone();
        for endpoint in &mut slice.endpoints {
            endpoint.ready = number != change % 10;
        }
        let resource = Resource::EndpointSlice(Box::new(slice));
        objects.insert(key.clone(), Arc::new(Object { file: "slices".into(), resource }));
    }
    objects
}

fn all() -> Objects {
    let slice = |number: usize| {
        format!(
            "---\n{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4, metadata: {{name: s{number}, \
             labels: {{kubernetes.io/service-name: a}}}}, ports: [{{port: 80}}], endpoints: [{{addresses: [10.0.0.{number}]}}]}}\n"
        )
    };
    let text = service("default", "a", "{port: 80}") + &(0..10).map(slice).collect::<String>();
    read_text(&text).0
}

fn whole(snapshot: &Snapshot) -> &Arc<Cluster> {
    &snapshot.services[A].port_for("default", 80).unwrap().cluster
}

/// A thousand changes, each in force before the next one: every request finds an endpoint that is ready in the configuration
/// which it goes by, and what is in flight comes to nothing in the end, whatever has come and gone meanwhile.
#[test]
fn no_request_is_without_an_endpoint_in_a_thousand_changes() {
    let all = all();
    let (first, problems) = compile(&at(0, &all), None, &settings());
    assert_eq!(problems, []);
    let (in_force, done) = (ArcSwap::from_pointee(first), AtomicBool::new(false));
    let (chosen, failed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let mut states: BTreeSet<usize> = BTreeSet::new();
    let mut last_seen = Vec::new();
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (in_force, done, chosen, failed) = (&in_force, &done, &chosen, &failed);
            scope.spawn(move || {
                fastrand::seed(client);
                let mut open = Vec::new();
                while !done.load(Ordering::Relaxed) {
                    let snapshot = in_force.load_full();
                    let cluster = whole(&snapshot);
                    match choose(cluster, &Wish::default()) {
                        Some(one) if cluster.endpoints.iter().any(|e| Arc::ptr_eq(e, &one.endpoint)) => {
                            chosen.fetch_add(1, Ordering::Relaxed);
                            open.push(one);
                        }
                        _ => drop(failed.fetch_add(1, Ordering::Relaxed)),
                    }
                    // Some stay open over many changes.
                    if open.len() > 50 {
                        open.swap_remove(fastrand::usize(..open.len())).answered();
                    }
                }
            });
        }
        for change in 1..=CHANGES {
            let before = in_force.load_full();
            let (next, _) = compile(&at(change, &all), Some(&before), &settings());
            assert_eq!(whole(&next).endpoints.len(), 9);
            for endpoint in &whole(&next).endpoints {
                let kept = whole(&before).endpoints.iter().find(|other| other.address == endpoint.address);
                assert!(kept.is_none_or(|kept| Arc::ptr_eq(&kept.state, &endpoint.state)), "{change}");
                if states.insert(Arc::as_ptr(&endpoint.state).addr()) {
                    last_seen.push(Arc::clone(&endpoint.state));
                }
            }
            in_force.store(Arc::new(next));
        }
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!(failed.load(Ordering::Relaxed), 0);
    assert!(chosen.load(Ordering::Relaxed) > CHANGES, "the clients had no time: {chosen:?}");
    assert!(last_seen.iter().all(|state| state.in_flight.load(Ordering::Relaxed) == 0));
}

/// Which conditions of an endpoint have it take new requests.
#[test]
fn a_terminating_endpoint_gets_nothing_new() {
    let table = [
        ("{ready: true, serving: true, terminating: false}", true),
        ("{}", true),
        ("{ready: false, serving: true, terminating: true}", false),
        ("{ready: false, serving: false, terminating: true}", false),
        ("{ready: false, serving: false, terminating: false}", false),
        // A Service with publishNotReadyAddresses: the endpoint is said to be ready, and that is what counts.
        ("{ready: true, serving: false, terminating: true}", true),
    ];
    for (conditions, ready) in table {
        let text = service("default", "a", "{port: 80}")
            + &format!(
                "---\n{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4, metadata: {{name: s, \
                 labels: {{kubernetes.io/service-name: a}}}}, ports: [{{port: 80}}], \
                 endpoints: [{{addresses: [10.0.0.1], conditions: {conditions}}}]}}\n"
            );
        assert_eq!(whole(&build(&text).0).endpoints.len(), usize::from(ready), "{conditions}");
    }
    let terminating = |unready: bool| {
        let text = service("default", "a", "{port: 80}")
            .replace("selector", &format!("publishNotReadyAddresses: {unready}, selector"));
        let pod = pod("default", "a", "v1", "10.0.0.1").replace(
            "namespace: default, ",
            "namespace: default, deletionTimestamp: '2024-01-01T00:00:00Z', ",
        );
        whole(&build(&(text + &pod)).0).endpoints.len()
    };
    assert_eq!((terminating(false), terminating(true)), (0, 1));
}
