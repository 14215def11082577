//! Single steps of a request's path, one at a time: `cargo bench -p mesh-agent`, for whoever changes one of them. What the
//! whole path costs, beside what others cost, says `cargo xtask bench`.
//!
//! The kernel's tables are read only as root, and passed over for others.

use std::{
    fmt::Write as _,
    hint::black_box,
    io::{Cursor, Read as _, Write as _},
    sync::Arc,
};

use aya::maps::HashMap;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use http::{HeaderMap, HeaderName, HeaderValue, Request, request::Parts};
use mesh_agent::{
    balance,
    identity::{Authority, SpiffeId, WorkloadIdentity},
    route,
    source::read_text,
    state::{
        compile::{Settings, compile},
        snapshot::{Backend, HeaderOp, RouteAction, ServicePort, Snapshot, Workload},
    },
};
use rustls::{ClientConnection, Connection, ServerConnection};

/// A client, and Services with so many rules, or so many endpoints.
fn snapshot(rules: usize, endpoints: usize) -> Snapshot {
    let mut text = String::from(
        "{apiVersion: v1, kind: Pod, metadata: {name: client}, status: {podIP: 10.0.0.1}}\n---\n\
         {apiVersion: v1, kind: Service, metadata: {name: web}, spec: {clusterIP: 10.96.0.1, clusterIPs: [10.96.0.1], \
         selector: {app: web}, ports: [{name: http, port: 80}]}}\n",
    );
    for endpoint in 0..endpoints {
        let (high, low) = (endpoint / 256, endpoint % 256);
        let _ = write!(
            text,
            "---\n{{apiVersion: v1, kind: Pod, metadata: {{name: web-{endpoint}, labels: {{app: web}}}}, status: {{podIP: \
             10.1.{high}.{low}}}}}\n"
        );
    }
    text += "---\n{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: web}, spec: {hosts: [web], http: [";
    // None of them holds but the last.
    for rule in 0..rules {
        let _ = write!(
            text,
            "{{match: [{{uri: {{prefix: /never/{rule}}}}}, {{headers: {{x-user: {{exact: user-{rule}}}}}}}], route: \
             [{{destination: {{host: web}}}}]}}, "
        );
    }
    text += "{route: [{destination: {host: web}}]}]}}\n";
    let (objects, problems) = read_text(&text);
    assert!(problems.is_empty(), "{problems:?}");
    let (snapshot, problems) = compile(&objects, None, &Settings::default());
    assert!(problems.is_empty(), "{problems:?}");
    snapshot
}

fn web(snapshot: &Snapshot) -> &ServicePort {
    let service = snapshot.services.get("web.default.svc.cluster.local");
    let port = service.and_then(|service| service.port_for("default", 80));
    port.unwrap_or_else(|| unreachable!("the Service was compiled"))
}

fn client(snapshot: &Snapshot) -> &Arc<Workload> {
    let client = snapshot.workload_at([10, 0, 0, 1].into());
    client.unwrap_or_else(|| unreachable!("the pod was compiled"))
}

fn request() -> Parts {
    let request = Request::get("/items/7?size=large")
        .header("host", "web")
        .header("user-agent", "bench")
        .header("accept", "*/*")
        .header("x-user", "somebody")
        .body(());
    request.unwrap_or_else(|_| unreachable!("it is a request")).into_parts().0
}

fn route_match(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("route match, by rules before the one that holds");
    for rules in [0, 10, 100] {
        let (snapshot, request) = (snapshot(rules, 1), request());
        let (port, client) = (web(&snapshot), client(&snapshot));
        group.bench_function(BenchmarkId::from_parameter(rules), |bencher| {
            bencher.iter(|| route::find(&port.routes, black_box(&request), 80, client).is_some());
        });
    }
    group.finish();
}

fn balancing(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("balance, by endpoints");
    for endpoints in [1, 10, 1000, 10_000] {
        let snapshot = snapshot(0, endpoints);
        let port = web(&snapshot);
        let RouteAction::Forward(backends) = &port.routes[0].action else { unreachable!("it forwards") };
        let Backend::Cluster(cluster) = &backends[0].backend else { unreachable!("it is there") };
        group.bench_function(BenchmarkId::from_parameter(endpoints), |bencher| {
            bencher.iter(|| balance::choose(black_box(cluster), &balance::Wish::default()).is_some());
        });
    }
    group.finish();
}

fn header_work(criterion: &mut Criterion) {
    let name = |name: &'static str| HeaderName::from_static(name);
    let operations = HeaderOp {
        set: vec![(name("x-set"), HeaderValue::from_static("value"))],
        add: vec![(name("x-add"), HeaderValue::from_static("value"))],
        remove: vec![name("user-agent")],
        authority: None,
    };
    let headers: HeaderMap = request().headers;
    criterion.bench_function("header operations of a response", |bencher| {
        bencher.iter_batched_ref(
            || headers.clone(),
            |headers| route::apply_response(headers, black_box(&operations)),
            criterion::BatchSize::SmallInput,
        );
    });
}

fn identity(name: &str) -> SpiffeId {
    let id = format!("spiffe://cluster.local/ns/default/sa/{name}").parse();
    id.unwrap_or_else(|_| unreachable!("it is an identity"))
}

/// What two agents say to each other, on one thread.
struct Tls {
    client: Connection,
    server: Connection,
    wire: Vec<u8>,
    read: Vec<u8>,
}

impl Tls {
    fn new(from: &WorkloadIdentity, to: &WorkloadIdentity, expected: SpiffeId) -> anyhow::Result<Self> {
        let client = from.client_config(&[expected], &[b"mesh-h2", b"h2"])?;
        let name = rustls::pki_types::ServerName::try_from("10.1.0.0")?;
        let client = Connection::Client(ClientConnection::new(client, name)?);
        let server = Connection::Server(ServerConnection::new(to.server_config()?)?);
        let mut tls = Self { client, server, wire: Vec::new(), read: vec![0; 1 << 20] };
        while tls.client.is_handshaking() || tls.server.is_handshaking() {
            carry(&mut tls.client, &mut tls.server, &mut tls.wire)?;
            carry(&mut tls.server, &mut tls.client, &mut tls.wire)?;
        }
        Ok(tls)
    }

    /// Encrypted, carried over, decrypted. How much has arrived.
    fn send(&mut self, bytes: &[u8]) -> anyhow::Result<usize> {
        self.client.writer().write_all(bytes)?;
        carry(&mut self.client, &mut self.server, &mut self.wire)?;
        Ok(self.server.reader().read(&mut self.read)?)
    }
}

fn carry(from: &mut Connection, to: &mut Connection, wire: &mut Vec<u8>) -> anyhow::Result<()> {
    wire.clear();
    while from.wants_write() {
        from.write_tls(wire)?;
    }
    let mut wire = Cursor::new(&*wire);
    while to.read_tls(&mut wire)? > 0 {
        to.process_new_packets()?;
    }
    Ok(())
}

fn tls(criterion: &mut Criterion) {
    let made: anyhow::Result<Tls> = (|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let authority = Arc::new(Authority::in_memory("cluster.local")?);
        let from = runtime.block_on(authority.identity(&identity("client")))?;
        let to = runtime.block_on(authority.identity(&identity("server")))?;
        Tls::new(&from, &to, identity("server"))
    })();
    let mut tls = match made {
        Ok(tls) => tls,
        Err(error) => return eprintln!("passed over: no TLS between two identities: {error:#}"),
    };
    let mut group = criterion.benchmark_group("TLS records, sealed and opened, by bytes");
    for bytes in [100, 1024, 16 << 10] {
        let sent = vec![7; bytes];
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_function(BenchmarkId::from_parameter(bytes), |bencher| {
            bencher.iter(|| assert!(tls.send(black_box(&sent)).is_ok_and(|read| read == bytes)));
        });
    }
    group.finish();
}

fn map_reads(criterion: &mut Criterion) {
    const ENTRIES: u32 = 10_000;
    let made: anyhow::Result<HashMap<_, u64, [u64; 16]>> = (|| {
        let mut map = HashMap::create(ENTRIES, 0)?;
        for key in 0..u64::from(ENTRIES) {
            map.insert(key, [key; 16], 0)?;
        }
        Ok(map)
    })();
    let map = match made {
        Ok(map) => map,
        Err(error) => return eprintln!("passed over: no map of the kernel's, which takes root: {error:#}"),
    };
    let mut key = 0;
    criterion.bench_function("a kernel map, one entry", |bencher| {
        bencher.iter(|| {
            key = (key + 7919) % u64::from(ENTRIES);
            assert!(map.get(&key, 0).is_ok_and(|value| value[0] == key));
        });
    });
    criterion.bench_function("a kernel map, all 10,000 entries one by one", |bencher| {
        bencher.iter(|| assert_eq!(map.iter().filter_map(Result::ok).count(), ENTRIES as usize));
    });
}

criterion_group!(path, route_match, balancing, header_work, tls, map_reads);
criterion_main!(path);
