//! The exact exposition text, and the exact lines of the access log.

use std::{
    io::Write,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use crate::{
    error::{Error, Kind},
    report::{
        AccessLog, Peer, Reporter, RequestOutcome, RequestProtocol, Security, Side, TcpLabels, samples,
    },
    state::snapshot::Cluster,
};

const ENDS: &str = r#"reporter="source",source_workload="productpage",source_canonical_service="productpage",source_canonical_revision="v1",source_workload_namespace="default",source_principal="spiffe://cluster.local/ns/default/sa/productpage",source_app="productpage",source_version="v1",source_cluster="Kubernetes",destination_workload="reviews",destination_canonical_service="reviews",destination_canonical_revision="v1",destination_workload_namespace="default",destination_principal="spiffe://cluster.local/ns/default/sa/reviews",destination_app="reviews",destination_version="v1",destination_cluster="Kubernetes",destination_service="reviews.default.svc.cluster.local",destination_service_name="reviews",destination_service_namespace="default""#;

fn peer(name: &str, host: u8) -> Peer {
    Peer { workload: Some(samples::workload(name, host)), identity: Some(samples::identity(name)) }
}

fn at(host: u8, port: u16) -> SocketAddr {
    SocketAddr::from(([10, 244, 0, host], port))
}

/// What a good request's outcome borrows.
struct Request {
    source: Peer,
    destination: Peer,
    cluster: Arc<Cluster>,
}

impl Request {
    fn new() -> Self {
        Self {
            source: peer("productpage", 1),
            destination: peer("reviews", 2),
            cluster: samples::cluster("reviews"),
        }
    }

    fn outcome(&self) -> RequestOutcome<'_> {
        RequestOutcome {
            side: Side::Source,
            source: &self.source,
            destination: &self.destination,
            cluster: Some(&self.cluster),
            protocol: RequestProtocol::Http,
            security: Security::MutualTls,
            status: 200,
            grpc_status: None,
            error: None,
            delay_injected: false,
            gave_up: None,
            method: "GET",
            authority: "reviews:9080",
            path: "/reviews/0",
            request_id: Some("7"),
            stat_name: None,
            route: "default",
            endpoint: Some(at(2, 9080)),
            client: at(1, 40_000),
            original_dst: SocketAddr::from(([10, 96, 0, 9], 9080)),
            tries: 1,
            request_bytes: 0,
            response_bytes: 358,
            duration: Duration::from_millis(7),
        }
    }
}

/// The samples of one metric, in order.
fn samples_of(reporter: &Reporter, name: &str) -> Vec<String> {
    let text = reporter.exposition();
    let mut lines: Vec<_> = text.lines().filter(|line| line.starts_with(name)).map(str::to_owned).collect();
    lines.sort();
    lines
}

#[test]
fn a_request_has_istios_labels_and_buckets() {
    let reporter = Reporter::default();
    for _ in 0..3 {
        reporter.request(&Request::new().outcome());
    }
    let labels = format!(
        r#"{ENDS},request_protocol="http",response_flags="-",connection_security_policy="mutual_tls",response_code="200",grpc_response_status="""#
    );
    assert_eq!(
        samples_of(&reporter, "istio_requests_total"),
        [format!("istio_requests_total{{{labels}}} 3")]
    );
    let name = "istio_request_duration_milliseconds";
    assert_eq!(samples_of(&reporter, &format!("{name}_sum")), [format!("{name}_sum{{{labels}}} 21.0")]);
    assert_eq!(samples_of(&reporter, &format!("{name}_count")), [format!("{name}_count{{{labels}}} 3")]);
    let text = reporter.exposition();
    let bucket = |le: &str| format!("{name}_bucket{{le=\"{le}\",{labels}}} ");
    let bounds = [
        "0.5",
        "1.0",
        "5.0",
        "10.0",
        "25.0",
        "50.0",
        "100.0",
        "250.0",
        "500.0",
        "1000.0",
        "2500.0",
        "5000.0",
        "10000.0",
        "30000.0",
        "60000.0",
        "300000.0",
        "600000.0",
        "1800000.0",
        "3600000.0",
        "+Inf",
    ];
    for (n, le) in bounds.iter().enumerate() {
        let count = if n < 3 { 0 } else { 3 };
        assert!(text.contains(&format!("{}{count}\n", bucket(le))), "{le}: {text}");
    }
    assert_eq!(text.matches(&format!("{name}_bucket")).count(), bounds.len());
    assert!(text.ends_with("# EOF\n"));
    assert!(text.contains("# TYPE istio_requests counter\n"));
    assert!(text.contains("# TYPE istio_request_duration_milliseconds histogram\n"));
}

#[test]
fn flags_statuses_and_unknown_ends_are_told() {
    let reporter = Reporter::default();
    let error = Error::new(Kind::Timeout, "no answer within 2s");
    let good = Request::new();
    reporter.request(&RequestOutcome {
        status: 504,
        error: Some(&error),
        delay_injected: true,
        ..good.outcome()
    });
    reporter.request(&RequestOutcome {
        side: Side::Destination,
        source: &Peer::default(),
        cluster: None,
        protocol: RequestProtocol::Grpc,
        security: Security::None,
        grpc_status: Some(14),
        delay_injected: true,
        ..good.outcome()
    });
    reporter.request(&RequestOutcome { grpc_status: Some(4_000_000), ..good.outcome() });
    let text = samples_of(&reporter, "istio_requests_total").join("\n");
    assert!(
        text.contains(
            r#"response_flags="DI,UT",connection_security_policy="mutual_tls",response_code="504""#
        )
    );
    assert!(text.contains(
        r#"reporter="destination",source_workload="unknown",source_canonical_service="unknown",source_canonical_revision="unknown",source_workload_namespace="unknown",source_principal="unknown",source_app="unknown",source_version="unknown",source_cluster="unknown""#
    ));
    assert!(text.contains(
        r#"destination_service="unknown",destination_service_name="unknown",destination_service_namespace="unknown",request_protocol="grpc",response_flags="DI",connection_security_policy="none",response_code="200",grpc_response_status="14""#
    ));
    assert!(text.contains(r#"grpc_response_status="unknown""#));
}

#[test]
fn the_memory_of_a_thread_never_mixes_registries_or_workloads() {
    let (first, second) = (Reporter::default(), Reporter::default());
    let good = Request::new();
    first.request(&good.outcome());
    second.request(&good.outcome());
    // Each call makes its workloads anew: were an address used again, the wrong series would be counted.
    for n in 0..200_u16 {
        let name = format!("app-{n}");
        let other = peer(&name, 3);
        second.request(&RequestOutcome { destination: &other, ..good.outcome() });
    }
    assert_eq!(samples_of(&first, "istio_requests_total").len(), 1);
    let lines = samples_of(&second, "istio_requests_total");
    assert_eq!(lines.len(), 201);
    assert!(lines.iter().all(|line| line.ends_with(" 1")));
}

fn connection(reporter: &Arc<Reporter>) -> crate::report::ConnectionGuard {
    reporter.connection(TcpLabels {
        side: Side::Source,
        source: peer("productpage", 1),
        destination: peer("reviews", 2),
        cluster: Some(samples::cluster("reviews")),
        security: Security::MutualTls,
        client: at(1, 40_000),
        original_dst: SocketAddr::from(([10, 96, 0, 9], 9080)),
        endpoint: Some(at(2, 9080)),
    })
}

#[test]
fn opaque_connections_are_counted_by_guards() {
    let reporter = Arc::new(Reporter::default());
    let guard = connection(&reporter);
    guard.moved(10, 1000);
    guard.moved(5, 0);
    drop(connection(&reporter));
    connection(&reporter).closed(Some(&Error::new(Kind::ConnectFailure, "10.244.0.2:9080 refused")));
    let labels = |flags| {
        format!(
            r#"{{{ENDS},request_protocol="tcp",response_flags="{flags}",connection_security_policy="mutual_tls"}}"#
        )
    };
    let line = |name: &str, flags, value: u64| format!("istio_tcp_{name}_total{} {value}", labels(flags));
    let of = |name: &str| samples_of(&reporter, &format!("istio_tcp_{name}_total"));
    assert_eq!(of("connections_opened"), [line("connections_opened", "-", 3)]);
    assert_eq!(of("connections_failed"), [line("connections_failed", "UF", 1)]);
    assert_eq!(
        of("connections_closed"),
        [line("connections_closed", "-", 1), line("connections_closed", "UF", 1)]
    );
    // Istio's words: received from the client, sent to the client.
    assert_eq!(of("received_bytes"), [line("received_bytes", "-", 15)]);
    assert_eq!(of("sent_bytes"), [line("sent_bytes", "-", 1000)]);
    guard.closed(None);
    assert_eq!(of("connections_closed")[0], line("connections_closed", "-", 2));
}

#[test]
fn what_others_know_is_set_and_forgotten() {
    let reporter = Reporter::default();
    reporter.set_config(7, 2);
    reporter.set_pods(3, 1);
    let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_001);
    reporter.set_certificates(&[(samples::identity("a"), at), (samples::identity("b"), at)]);
    reporter.set_certificates(&[(samples::identity("b"), at)]);
    let root = |name: &str| crate::report::AuthorityExpiry { role: "root", name: name.to_owned(), at };
    reporter.set_trust(vec![root("CN=old"), root("CN=new")], 3, 1);
    reporter.set_trust(vec![root("CN=new")], 2, 1);
    let error = Error::new(Kind::Denied, "no");
    let reviews = samples::workload("reviews", 2);
    reporter.refused(Side::Destination, &reviews, ([127, 0, 0, 1], 1).into(), None, &error);
    let text = reporter.exposition();
    for line in [
        "mesh_config_revision 7",
        "mesh_config_problems 2",
        "mesh_enrolled_pods 3",
        "mesh_enrolment_failures 1",
        "mesh_access_log_dropped_total 0",
        "mesh_certificates_expiry_seconds{identity=\"spiffe://cluster.local/ns/default/sa/b\"} 1800000001",
        "mesh_authority_certificates_expiry_seconds{role=\"root\",name=\"CN=new\"} 1800000001",
        "mesh_revoked_certificates 2",
        "mesh_certificate_problems 1",
        "mesh_refused_total{side=\"destination\",kind=\"denied\",pod=\"reviews-1\",pod_namespace=\"default\"} 1",
        concat!("istio_build{component=\"mesh-agent\",tag=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
    ] {
        assert!(text.contains(&format!("{line}\n")), "{line} is missing in\n{text}");
    }
    assert!(!text.contains("sa/a\"") && !text.contains("CN=old"));
}

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Sink {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }
}

#[test]
fn one_line_per_event_with_everything_in_it() -> std::io::Result<()> {
    let sink = Sink::default();
    let reporter = Arc::new(Reporter::with_log_to(AccessLog::Text, Box::new(sink.clone()))?);
    let error = Error::new(Kind::ConnectFailure, "dialling 10.244.0.2:9080: refused");
    reporter.request(&RequestOutcome {
        path: "/r?x=\"1\"\nstatus=200",
        status: 503,
        error: Some(&error),
        tries: 3,
        ..Request::new().outcome()
    });
    let guard = connection(&reporter);
    guard.moved(3, 4);
    guard.closed(None);
    reporter.refused(Side::Source, &samples::workload("reviews", 2), at(2, 9), Some(at(3, 80)), &error);
    assert!(reporter.flush(Duration::from_secs(10)));
    let text = sink.text();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 3);
    let (time, rest) = lines[0].split_once(' ').unwrap_or_default();
    assert!(time.starts_with("time=20") && time.ends_with('Z'), "{time}");
    assert_eq!(
        rest,
        concat!(
            "event=request reporter=source src.addr=10.244.0.1:40000 src.workload=productpage-1 ",
            "src.namespace=default src.identity=spiffe://cluster.local/ns/default/sa/productpage ",
            "dst.addr=10.96.0.9:9080 dst.workload=reviews-1 dst.namespace=default ",
            "dst.identity=spiffe://cluster.local/ns/default/sa/reviews ",
            "dst.service=reviews.default.svc.cluster.local ",
            "cluster=outbound|9080||reviews.default.svc.cluster.local endpoint=10.244.0.2:9080 protocol=http ",
            "method=GET authority=reviews:9080 path=\"/r?x=\\\"1\\\"\\u000astatus=200\" request_id=7 route=default status=503 ",
            "grpc_status=- flags=UF tries=3 bytes_received=0 bytes_sent=358 duration_ms=7.000 ",
            "security=mutual_tls error=\"dialling 10.244.0.2:9080: refused\"",
        )
    );
    assert!(lines[1].contains(" event=connection ") && lines[1].contains(" bytes_received=3 bytes_sent=4 "));
    assert!(lines[2].contains(&format!(" dst.addr={} ", at(3, 80))));
    assert!(lines[2].contains(" event=refused ") && lines[2].contains(" kind=connect_failure "));
    Ok(())
}

#[test]
fn json_lines_have_the_same_keys() -> anyhow::Result<()> {
    let sink = Sink::default();
    let reporter = Reporter::with_log_to(AccessLog::Json, Box::new(sink.clone()))?;
    reporter.request(&RequestOutcome { endpoint: None, ..Request::new().outcome() });
    assert!(reporter.flush(Duration::from_secs(10)));
    let line: serde_json::Value = serde_json::from_str(sink.text().trim_end())?;
    assert_eq!(line["src.workload"], "productpage-1");
    assert_eq!(line["status"], 200);
    assert!(line["endpoint"].is_null() && line["error"].is_null());
    Ok(())
}
