//! What is shown of a route, a connection's route and a pod.

use std::{collections::HashMap, sync::Arc};

use http::{HeaderName, HeaderValue, StatusCode};

use super::*;
use crate::state::{
    compile::{GatewayPod, Settings, compile},
    snapshot::{
        Authentication, Balancing, BothHeaderOps, CapturePolicy, Cluster, ConnectionPool, HeaderOps, Idle,
        KeySet, RemoteKeys, Subnet, UnmatchedPreflights,
    },
};

fn anybody() -> CorsPolicy {
    CorsPolicy {
        allow_origins: vec![StringMatch::Exact("*".into())],
        allow_methods: Some(HeaderValue::from_static("GET")),
        allow_headers: None,
        expose_headers: None,
        max_age: None,
        allow_credentials: true,
        unmatched_preflights: UnmatchedPreflights::Forward,
    }
}

fn reviews() -> Cluster {
    Cluster {
        name: "outbound|9080|v2|reviews.default.svc.cluster.local".into(),
        host: "reviews.default.svc.cluster.local".into(),
        service: "reviews".into(),
        namespace: "default".into(),
        port: 9080,
        protocol: Some(Protocol::Http1),
        subset: Some("v2".into()),
        view: None,
        endpoints: Vec::new(),
        spread: Arc::default(),
        balancing: Balancing::RoundRobin,
        hash: None,
        outlier: None,
        connect_timeout: Duration::from_secs(10),
        pool: ConnectionPool {
            connections: Some(3),
            idle: Idle::After(Duration::from_secs(1)),
            ..ConnectionPool::UNLIMITED
        },
        tls: crate::state::snapshot::Origination::Plaintext,
        limits_connections: false,
        retry_budget: crate::state::defaults::RETRY_BUDGET,
        proxy_protocol: None,
        tunnel: None,
        headless: false,
        standby: crate::state::snapshot::Standby::default(),
        state: Arc::default(),
    }
}

fn route_of_everything() -> HttpRoute {
    let user = (HeaderName::from_static("end-user"), HeaderMatch::Value(StringMatch::Exact("jason".into())));
    let backend = |backend| WeightedBackend { weight: 50, headers: HeaderOps::default(), backend };
    HttpRoute {
        name: "jason".into(),
        origin: "VirtualService default/reviews".into(),
        matches: vec![RequestMatch { headers: vec![user], ..RequestMatch::default() }],
        action: RouteAction::Forward(vec![
            backend(Backend::Cluster(Arc::new(reviews()))),
            backend(Backend::Missing("subset v9 does not exist".into())),
        ]),
        fault: Fault {
            delay: Some((Percentage::WHOLE, Duration::from_secs(2))),
            abort: Some((Percentage(5_000), Abort::Http(StatusCode::IM_A_TEAPOT))),
            by_header: false,
        },
        headers: BothHeaderOps {
            request: HeaderOp {
                set: vec![(HeaderName::from_static("x-a"), HeaderValue::from_static("1"))],
                ..HeaderOp::default()
            },
            response: HeaderOp::default(),
        }
        .into(),
        rewrite: Rewrite { path: Some(PathRewrite::Uri("/v1".into())), authority: None },
        timeout: None,
        retries: RetryPolicy {
            attempts: 2,
            per_try_timeout: Some(Duration::from_millis(250)),
            on: RetryOn { server_error: true, status_codes: vec![404], grpc: vec![14], ..RetryOn::default() },
            backoff: Duration::from_millis(25),
            remote_localities: false,
            ignore_previous_hosts: true,
        },
        mirrors: vec![Mirror { percentage: Percentage(125_000), backend: Backend::Missing("no b".into()) }],
        cors: Some(anybody().into()),
        stat_name: Some("jason".into()),
    }
}

#[test]
fn a_route_is_shown_with_all_that_decides() {
    let expected = json!({
        "name": "jason",
        "origin": "VirtualService default/reviews",
        "match": [{"headers": [{"name": "end-user", "value": {"exact": "jason"}}]}],
        "action": {"forward": [
            {"weight": 50, "request_headers": null, "response_headers": null, "cluster": {
                "name": "outbound|9080|v2|reviews.default.svc.cluster.local",
                "balancing": "RoundRobin", "connect_timeout_ms": 10_000, "endpoints": [],
                "connection_pool": {
                    "max_connections": 3, "keepalive": null, "max_duration_ms": null, "tcp_idle_ms": null,
                    "max_pending": null, "max_requests": null, "max_requests_per_connection": null, "max_retries": null,
                    "http_idle_ms": 1000, "max_streams": null, "h2_upgrade": false, "use_client_protocol": false,
                    "http2_keep_alive": null,
                },
                "outlier_detection": null, "tls": "plaintext", "levels": [], "levels_by_client": null, "warmup": null,
                "backend_utilization": null, "tunnel": null,
                "view": null, "retry_budget": {"percent": 20.0, "min": 10, "interval_ms": null},
                "proxy_protocol": null,
            }},
            {"weight": 50, "request_headers": null, "response_headers": null,
                "missing": "subset v9 does not exist"},
        ]},
        "fault": {
            "delay": {"percent": 100.0, "ms": 2000},
            "abort": {"percent": 0.5, "with": {"http_status": 418}},
            "by_header": false,
        },
        "request_headers": {"set": [["x-a", "1"]], "add": [], "remove": [], "authority": null},
        "response_headers": null,
        "rewrite": {"path": {"uri": "/v1"}, "authority": null},
        "timeout_ms": null,
        "retries": {
            "attempts": 2, "per_try_timeout_ms": 250, "backoff_ms": 25, "on": ["5xx", "404", "grpc-14"],
            "remote_localities": false, "ignore_previous_hosts": true,
        },
        "mirrors": [{"percent": 12.5, "missing": "no b"}],
        "cors": {
            "allow_origins": [{"exact": "*"}], "allow_methods": "GET", "allow_headers": null,
            "expose_headers": null, "max_age": null, "allow_credentials": true,
            "unmatched_preflights": "Forward",
        },
        "stat_name": "jason",
    });
    assert_eq!(route(&route_of_everything()), expected);
}

#[test]
fn a_stream_route_is_shown_with_all_that_decides() {
    let m = StreamMatch {
        sni_hosts: vec![SniHost::Exact("a.example".into()), SniHost::Below(".b.example".into())],
        destination_subnets: Subnet::parse("10.0.0.0/8").into_iter().collect(),
        source_subnet: Subnet::parse("::1"),
        ..StreamMatch::default()
    };
    let backend = Backend::Missing("no b".into());
    let shown = stream(&StreamRoute {
        name: "tls[0]".into(),
        origin: "VirtualService default/a".into(),
        matches: vec![m],
        backends: vec![WeightedBackend { weight: 1, headers: HeaderOps::default(), backend }],
    });
    let expected = json!({
        "name": "tls[0]",
        "origin": "VirtualService default/a",
        "match": [{
            "sni_hosts": ["a.example", "*.b.example"],
            "destination_subnets": ["10.0.0.0/8"],
            "source_subnet": "::1/128",
        }],
        "forward": [{"weight": 1, "request_headers": null, "response_headers": null, "missing": "no b"}],
    });
    assert_eq!(shown, expected);
}

#[test]
fn a_pod_of_two_addresses_is_shown_once_and_order_is_fixed() {
    let mut workloads = HashMap::new();
    for (name, last) in [("b", 1), ("a", 3)] {
        let ips = vec![[10, 0, 0, last].into(), [10, 0, 0, last + 1].into()];
        let pod = Arc::new(Workload {
            namespace: "default".into(),
            name: name.into(),
            ips: ips.clone(),
            node: None,
            identity: crate::identity::SpiffeId {
                trust_domain: "t".into(),
                namespace: "default".into(),
                service_account: name.into(),
            },
            labels: BTreeMap::new(),
            view: None,
            enrolled: false,
            netns: None,
            announced: false,
            capture: CapturePolicy::default(),
            authorization: Arc::default(),
            authentication: Authentication::default(),
            workload_name: name.into(),
            canonical_service: name.into(),
            canonical_revision: "latest".into(),
        });
        workloads.extend(ips.into_iter().map(|ip: std::net::IpAddr| (ip, pod.clone())));
    }
    let dump = config(&Snapshot { workloads: workloads.into_iter().collect(), ..Snapshot::default() }, &[]);
    let names: Vec<_> = dump["workloads"].as_array().into_iter().flatten().map(|w| &w["name"]).collect();
    assert_eq!(names, ["a", "b"]);
    assert_eq!(dump["workloads"][0]["identity"], "spiffe://t/ns/default/sa/a");
}

#[test]
fn key_sets_that_are_not_there_are_problems() {
    let (uri, timeout) = ("https://issuer/keys", Duration::from_secs(5));
    let cell = Arc::new(RemoteKeys::new(uri, timeout));
    let key_sets = HashMap::from([(Arc::clone(&cell.uri), Arc::clone(&cell))]);
    let snapshot = Snapshot { key_sets, ..Snapshot::default() };
    let dump = config(&snapshot, &["first".to_owned()]);
    let missing =
        format!("the key set of {uri} has not been fetched yet: the tokens that need it are refused");
    assert_eq!(dump["problems"], json!(["first", missing]));
    assert_eq!(dump["key_sets"], json!({ uri: null }));
    let x = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc";
    let keys = KeySet::parse(&json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "x": x}]}).to_string());
    assert!(keys.is_ok_and(|keys| {
        cell.set(Arc::new(keys));
        true
    }));
    let dump = config(&snapshot, &[]);
    assert_eq!((&dump["problems"], &dump["key_sets"]), (&json!([]), &json!({ uri: 1 })));
}

#[test]
fn a_gateway_is_shown_by_ports_and_hosts_and_never_its_key() {
    let text = "
{apiVersion: v1, kind: Pod, metadata: {name: in, namespace: edge}, status: {podIP: 10.0.0.1}}
---
{apiVersion: networking.istio.io/v1, kind: Gateway, metadata: {name: g, namespace: edge}, spec: {servers: [
  {port: {number: 80, name: http, protocol: HTTP}, hosts: [b.example, '*.example', a.example], tls: {httpsRedirect: true}},
  {port: {number: 443, name: https, protocol: HTTPS}, hosts: ['*'], tls: {mode: MUTUAL, credentialName: none, subjectAltNames: [c]}},
  {port: {number: 444, name: tls, protocol: TLS}, hosts: [a.example], tls: {mode: PASSTHROUGH}},
  {port: {number: 90, name: tcp, protocol: TCP}, hosts: ['*']}]}}
---
{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: v, namespace: edge}, spec: {gateways: [g],
  hosts: [a.example], http: [{redirect: {uri: /}}], tcp: [{route: [{destination: {host: none}}]}]}}
";
    let (objects, refused) = crate::source::read_text(text);
    assert_eq!(refused, []);
    let pod = GatewayPod { namespace: "edge".into(), name: "in".into() };
    let settings = Settings { gateway: Some(pod), ..Settings::default() };
    let dump = config(&compile(&objects, None, &settings).0, &[])["gateway"].clone();
    assert_eq!(
        (&dump["workload"], &dump["identity"]),
        (&json!("edge/in"), &json!("spiffe://cluster.local/ns/edge/sa/default"))
    );
    let numbers: Vec<_> =
        dump["ports"].as_array().into_iter().flatten().map(|port| (&port["port"], &port["serves"])).collect();
    let expected = [(80, "http"), (90, "tcp"), (443, "tls"), (444, "tls")]
        .map(|(port, serves)| (json!(port), json!(serves)));
    assert_eq!(numbers, expected.iter().map(|(port, serves)| (port, serves)).collect::<Vec<_>>());
    let hosts = dump["ports"][0]["virtual_hosts"].as_array().cloned().unwrap_or_default();
    let hosts: Vec<_> =
        hosts.iter().map(|host| (&host["domain"], host["routes"].as_array().map(Vec::len))).collect();
    let domains =
        [(json!("a.example"), Some(1)), (json!("b.example"), Some(0)), (json!("*.example"), Some(0))];
    assert_eq!(hosts, domains.iter().map(|(domain, routes)| (domain, *routes)).collect::<Vec<_>>());
    assert_eq!(dump["ports"][1]["streams"][0]["origin"], "VirtualService edge/v");
    let expected = json!({
        "host": "*", "origin": "Gateway edge/g: spec.servers[1]",
        "tls": {
            "mode": "Mutual", "broken": "there is no Secret edge/none", "subject_alt_names": ["c"],
            "asks_what_is_revoked": false, "versions": ["TLSV1_2", "TLSV1_3"], "cipher_suites": [],
        },
        "virtual_hosts": dump["ports"][2]["servers"][0]["virtual_hosts"],
    });
    assert_eq!(dump["ports"][2]["servers"], json!([expected]));
    assert_eq!(dump["ports"][3]["servers"][0]["passes"], true);
    assert!(config(&Snapshot::default(), &[]).get("gateway").is_none());
}
