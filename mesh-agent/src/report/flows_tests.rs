//! Records joined with a small mesh.

use std::collections::HashMap;

use mesh_common::flow::FlowRecord;

use super::*;
use crate::{
    report::{FlowFacts, RequestProtocol, samples},
    state::snapshot::{Service, Visibility},
};

const SECOND: u64 = 1_000_000_000;

fn snapshot() -> Snapshot {
    let vip = IpAddr::from([10, 96, 0, 9]);
    let service = Arc::new(Service {
        host: "reviews.default.svc.cluster.local".into(),
        name: "reviews".into(),
        namespace: "default".into(),
        vips: vec![vip],
        headless: false,
        visible: Visibility::Everywhere,
        ports: Vec::new(),
        views: HashMap::new(),
    });
    let pods = [samples::workload("productpage", 1), samples::workload("reviews", 2)];
    Snapshot {
        revision: 1,
        workloads: pods.into_iter().map(|pod| (pod.ips[0], pod)).collect(),
        services: [(service.host.clone(), service.clone())].into(),
        vips: [(vip, service)].into(),
        ..Snapshot::default()
    }
}

fn record() -> FlowRecord {
    FlowRecord {
        netns: 4711,
        socket: 99,
        start_ns: 100 * SECOND,
        last_seen_ns: 103 * SECOND,
        tx_bytes: 120,
        rx_bytes: 5_000_000_000,
        srtt_us: 250,
        local: Addr::v4([10, 244, 0, 1], 40_000),
        remote: Addr::v4([10, 96, 0, 9], 9080),
        direction: direction::OUTBOUND,
        verdict: verdict::CAPTURED,
        protocol: 6,
        tcp_state: 1,
        ..FlowRecord::default()
    }
}

fn view(record: &FlowRecord, facts: FindFacts<'_>) -> FlowView {
    let clock = Clock {
        monotonic_ns: 104 * SECOND,
        wall: SystemTime::UNIX_EPOCH + Duration::from_millis(1_000_000_500),
    };
    join(record, &Context { snapshot: &snapshot(), pod_of: &|_| None, facts, endpoint: &|_| None, clock })
}

#[test]
fn an_outbound_flow_is_joined_by_the_apps_own_address() {
    let facts: FindFacts<'_> = &|pod, key| {
        let FlowKey::Outbound(client, dialled) = key else { return None };
        (&*pod.name == "productpage-1" && client.port() == 40_000 && dialled == socket_addr(record().remote))
            .then(|| FlowFacts {
                endpoint: Some(SocketAddr::from(([10, 244, 0, 2], 9080))),
                peer: Some(samples::identity("reviews")),
                route: Some("jason".into()),
                protocol: Some(RequestProtocol::Http),
                flag: Some("-"),
                mutual_tls: true,
                ..FlowFacts::default()
            })
    };
    let view = view(&record(), facts);
    assert_eq!(view.pod.as_deref(), Some("productpage-1"));
    assert_eq!(view.service.as_deref(), Some("reviews.default.svc.cluster.local"));
    assert_eq!(view.endpoint, Some(SocketAddr::from(([10, 244, 0, 2], 9080))));
    assert_eq!(view.peer_pod.as_deref(), Some("default/reviews-1"));
    assert_eq!(view.peer_identity.as_deref(), Some("spiffe://cluster.local/ns/default/sa/reviews"));
    assert_eq!((&*view.protocol, &*view.transport), ("http", "tcp"));
    assert_eq!((view.route.as_deref(), view.flag), (Some("jason"), None));
    assert_eq!((view.security, view.verdict), (Protection::MutualTls, Verdict::Captured));
    assert_eq!((view.tx_bytes, view.rx_bytes, view.srtt_us), (120, 5_000_000_000, 250));
    assert_eq!((&*view.state, view.duration_ms, view.age_ms), ("established", 4000, 1000));
    assert_eq!(view.start, "1970-01-12T13:46:36.500Z");
}

#[test]
fn an_inbound_flow_is_joined_by_the_client_and_has_no_service_of_its_own() {
    let record = FlowRecord {
        local: Addr::v4([10, 244, 0, 2], 9080),
        remote: Addr::v4([10, 244, 0, 1], 41_000),
        direction: direction::INBOUND,
        end_ns: 102 * SECOND,
        last_seen_ns: 101 * SECOND,
        ..record()
    };
    let facts: FindFacts<'_> =
        &|_, key| matches!(key, FlowKey::Inbound(client) if client.port() == 41_000).then(FlowFacts::default);
    let view = view(&record, facts);
    assert_eq!(view.pod.as_deref(), Some("reviews-1"));
    assert_eq!((view.service, view.endpoint, view.peer_identity), (None, None, None));
    assert_eq!(view.peer_pod.as_deref(), Some("default/productpage-1"));
    assert_eq!(view.security, Protection::None);
    assert_eq!((&*view.state, view.duration_ms, view.age_ms), ("closed", 2000, 2000));
}

#[test]
fn what_nobody_knows_is_absent() {
    let stranger = FlowRecord {
        local: Addr::v6([0xfd; 16], 53),
        remote: Addr::v6([0xfe; 16], 5353),
        direction: 9,
        verdict: 9,
        protocol: 47,
        ..record()
    };
    let unknown = view(&stranger, &|_, _| None);
    assert_eq!((unknown.pod, unknown.namespace, unknown.peer_pod), (None, None, None));
    assert_eq!((unknown.direction, unknown.verdict), (Direction::Unknown, Verdict::Unknown));
    assert_eq!((&*unknown.transport, &*unknown.state), ("47", "open"));
    // Captured, but its facts are gone: not a word on how the bytes travelled.
    assert_eq!(view(&record(), &|_, _| None).security, Protection::Unknown);
    // Left alone: the agent never carried it, whatever it knows of another connection from that address.
    let direct =
        FlowRecord { verdict: verdict::BYPASSED, remote: Addr::v4([10, 244, 0, 2], 9080), ..record() };
    let direct = view(&direct, &|_, _| Some(FlowFacts { mutual_tls: true, ..FlowFacts::default() }));
    assert_eq!((direct.security, &*direct.protocol), (Protection::None, "tcp"));
    assert_eq!(direct.endpoint, Some(SocketAddr::from(([10, 244, 0, 2], 9080))));
}

#[test]
fn a_pods_namespace_names_it_before_its_address_does() {
    let other = samples::workload("ratings", 3);
    let record = FlowRecord { local: Addr::v4([127, 0, 0, 1], 4), ..record() };
    let clock = Clock { monotonic_ns: 0, wall: SystemTime::UNIX_EPOCH };
    let context = Context {
        snapshot: &snapshot(),
        pod_of: &|netns| (netns == 4711).then(|| other.clone()),
        facts: &|_, _| None,
        endpoint: &|_| None,
        clock,
    };
    let view = join(&record, &context);
    assert_eq!(view.pod.as_deref(), Some("ratings-1"));
    // A record younger than the clock is no reason to panic.
    assert_eq!((view.duration_ms, view.age_ms), (0, 0));
}

#[test]
fn a_view_survives_json() -> Result<(), serde_json::Error> {
    let view = view(&record(), &|_, _| None);
    let text = serde_json::to_string(&view)?;
    assert!(text.contains(r#""direction":"outbound""#) && text.contains(r#""security":"unknown""#));
    assert_eq!(serde_json::from_str::<FlowView>(&text)?, view);
    Ok(())
}

#[test]
fn a_direct_flow_is_known_from_the_kernel_alone() {
    let record = FlowRecord { verdict: verdict::DIRECT, endpoint: 7, ..record() };
    let clock = Clock { monotonic_ns: 104 * SECOND, wall: SystemTime::UNIX_EPOCH };
    let at = SocketAddr::from(([10, 244, 0, 2], 9080));
    let context = Context {
        snapshot: &snapshot(),
        pod_of: &|_| None,
        // Of another connection of that address.
        facts: &|_, _| {
            Some(FlowFacts { route: Some("other".into()), mutual_tls: true, ..FlowFacts::default() })
        },
        endpoint: &|number| (number == 7).then_some(at),
        clock,
    };
    let out = join(&record, &context);
    assert_eq!((out.verdict, out.security), (Verdict::Direct, Protection::None));
    assert_eq!((out.endpoint, out.route, &*out.protocol), (Some(at), None, "tcp"));
    assert_eq!(out.service.as_deref(), Some("reviews.default.svc.cluster.local"));
    assert_eq!(out.peer_pod.as_deref(), Some("default/reviews-1"));
    assert_eq!(out.peer_identity.as_deref(), Some("spiffe://cluster.local/ns/default/sa/reviews"));
    let (local, remote) = (Addr::from(at), record.local);
    let into = FlowRecord { direction: direction::INBOUND, local, remote, endpoint: 0, ..record };
    let into = join(&into, &context);
    assert_eq!(into.peer_identity.as_deref(), Some("spiffe://cluster.local/ns/default/sa/productpage"));
    assert_eq!((into.security, into.peer_pod.as_deref()), (Protection::None, Some("default/productpage-1")));
}
