use std::{collections::BTreeMap, time::Duration};

use super::*;
use crate::{
    identity::SpiffeId,
    state::{
        defaults,
        snapshot::{
            Action, Applied, Authentication, Authorization, Balancing, CapturePolicy, Cluster, Mtls,
            MtlsMode, Policy, Protocol, StreamRoute,
        },
    },
};

/// What is wanted of a configuration that is the first.
fn wanted(snapshot: &Snapshot, local: &Local) -> HashMap<DirectRoute, Arc<DirectSet>> {
    let mut followed = Followed::default();
    followed.follow(again(local), snapshot);
    followed.wanted
}

/// The very same pods.
fn again(local: &Local) -> Local {
    let mut same = Local::default();
    local.by_cookie.iter().for_each(|(cookie, pod)| same.add(*cookie, pod));
    same
}

const CLIENT: u64 = 1;
const SERVER: u64 = 2;
const ELSEWHERE: &str = "10.0.1.1";

fn workload(name: &str, ip: &str, no_direct: bool) -> Arc<Workload> {
    let text = Arc::<str>::from;
    Arc::new(Workload {
        namespace: text("default"),
        name: text(name),
        ips: ip.parse().into_iter().collect(),
        node: None,
        identity: SpiffeId {
            trust_domain: text("cluster.local"),
            namespace: text("default"),
            service_account: text(name),
        },
        labels: BTreeMap::new(),
        view: None,
        enrolled: true,
        netns: None,
        announced: false,
        capture: CapturePolicy { no_direct, ..CapturePolicy::default() },
        authorization: Arc::default(),
        authentication: Authentication::default(),
        workload_name: text(name),
        canonical_service: text(name),
        canonical_revision: text("latest"),
    })
}

/// A client and a server on this node, each with a say of its own.
fn local(client_refuses: bool, server_refuses: bool) -> Local {
    let mut local = Local::default();
    local.add(CLIENT, &workload("client", "10.0.0.1", client_refuses));
    local.add(SERVER, &workload("server", "10.0.0.2", server_refuses));
    local
}

#[derive(Default)]
struct Port {
    protocol: Option<Protocol>,
    routed: bool,
    limited: bool,
    endpoints: &'static [&'static str],
}

const OPAQUE: Port = Port {
    protocol: Some(Protocol::Opaque),
    routed: false,
    limited: false,
    endpoints: &["10.0.0.2:80", "10.0.1.1:80"],
};

fn snapshot(port: &Port) -> Snapshot {
    let host: Arc<str> = "s.default.svc.cluster.local".into();
    let endpoint = |address: &&str| {
        let address: Option<SocketAddr> = address.parse().ok();
        let workload = address.map(|address| workload("server", &address.ip().to_string(), false));
        address.map(|address| Arc::new(Endpoint::alone(address, workload)))
    };
    let cluster = Cluster {
        name: "outbound|70||s".into(),
        host: Arc::clone(&host),
        service: "s".into(),
        namespace: "default".into(),
        port: 70,
        protocol: port.protocol,
        subset: None,
        view: None,
        endpoints: port.endpoints.iter().filter_map(endpoint).collect(),
        spread: Arc::default(),
        balancing: Balancing::Random,
        hash: None,
        outlier: None,
        connect_timeout: Duration::from_secs(10),
        pool: crate::state::snapshot::ConnectionPool::UNLIMITED,
        tls: crate::state::snapshot::Origination::Plaintext,
        limits_connections: port.limited,
        retry_budget: defaults::RETRY_BUDGET,
        proxy_protocol: None,
        tunnel: None,
        headless: false,
        standby: crate::state::snapshot::Standby::default(),
        state: Arc::default(),
    };
    let stream = || {
        let (name, origin) = ("r".into(), "VirtualService default/r".into());
        Arc::new(StreamRoute { name, origin, matches: Vec::new(), backends: Vec::new() })
    };
    let service = Arc::new(Service {
        host: Arc::clone(&host),
        name: "s".into(),
        namespace: "default".into(),
        vips: ["10.96.0.1", "fd00::1"].iter().filter_map(|ip| ip.parse().ok()).collect(),
        headless: false,
        visible: crate::state::snapshot::Visibility::Everywhere,
        ports: vec![ServicePort {
            port: 70,
            protocol: port.protocol,
            routes: Arc::new([]),
            streams: if port.routed { Arc::new([stream()]) } else { Arc::new([]) },
            cluster: Arc::new(cluster),
        }],
        views: HashMap::new(),
    });
    let vips = service.vips.iter().map(|ip| (*ip, Arc::clone(&service))).collect();
    Snapshot { services: [(host, service)].into(), vips, ..Snapshot::default() }
}

fn open() -> OpenDirect {
    let at = |ip: [u8; 4], port| SocketAddr::from((ip, port));
    let (dialled, endpoint) = (at([10, 96, 0, 1], 70), at([10, 0, 0, 2], 80));
    OpenDirect { client: CLIENT, server: SERVER, dialled, endpoint }
}

#[test]
fn endpoints_of_other_nodes_have_their_share_and_addresses_of_another_family_none() {
    let wanted = wanted(&snapshot(&OPAQUE), &local(false, false));
    // The server may dial its own service too; the kernel sends nobody to itself.
    assert_eq!(wanted.len(), 2, "{wanted:?}");
    let set = &wanted[&(CLIENT, open().dialled)];
    assert_eq!(set.balancing, Balancing::Random);
    let seen: Vec<_> = set.endpoints.iter().map(|e| (e.netns, e.direct, e.weight)).collect();
    assert_eq!(seen, [(Some(SERVER), true, 1), (None, false, 1)]);
    assert!(set.endpoints[1].address.to_string().starts_with(ELSEWHERE));
}

#[test]
fn what_needs_the_agent_is_not_wanted_and_ends_what_is_open() {
    let table = [
        (OPAQUE, local(false, false), None),
        (Port { protocol: None, ..OPAQUE }, local(false, false), Some(Because::NotDeclared)),
        (Port { protocol: Some(Protocol::Http1), ..OPAQUE }, local(false, false), Some(Because::NotDeclared)),
        (Port { routed: true, ..OPAQUE }, local(false, false), Some(Because::Routed)),
        (Port { limited: true, ..OPAQUE }, local(false, false), Some(Because::Limited)),
        (OPAQUE, local(true, false), Some(Because::Asked)),
        (OPAQUE, local(false, true), Some(Because::Asked)),
    ];
    for (port, local, because) in table {
        let snapshot = snapshot(&port);
        let wanted = wanted(&snapshot, &local).contains_key(&(CLIENT, open().dialled));
        assert_eq!(wanted, because.is_none(), "{because:?}");
        assert_eq!(forbidden(&snapshot, &local, &open()), because);
    }
}

#[test]
fn a_pod_whose_policies_are_asked_takes_the_agent() {
    for (action, dry_run) in [
        (Action::Allow, false),
        (Action::Deny, false),
        (Action::Custom, false),
        (Action::Audit, false),
        (Action::Deny, true),
    ] {
        let policy =
            Policy { namespace: "default".into(), name: "p".into(), action, dry_run, rules: Box::default() };
        let applied = [Applied { policy: Arc::new(policy), ports: None, provider: None }];
        let server = Workload {
            authorization: Arc::new(Authorization::new(&applied)),
            ..Workload::clone(&workload("server", "10.0.0.2", false))
        };
        let mut local = Local::default();
        local.add(CLIENT, &workload("client", "10.0.0.1", false));
        local.add(SERVER, &Arc::new(server));
        let snapshot = snapshot(&OPAQUE);
        assert!(!wanted(&snapshot, &local).contains_key(&(CLIENT, open().dialled)), "{action:?}");
        assert_eq!(forbidden(&snapshot, &local, &open()), Some(Because::Judged), "{action:?}");
    }
}

#[test]
fn a_port_that_takes_mutual_tls_alone_takes_the_agent() {
    let strict = Mtls { mode: MtlsMode::Strict, by: None };
    let whole = Authentication { mtls: strict.clone(), ..Authentication::default() };
    let ports =
        |port| Authentication { ports: Box::new([(port, strict.clone())]), ..Authentication::default() };
    for (authentication, because) in
        [(whole, Some(Because::Strict)), (ports(80), Some(Because::Strict)), (ports(81), None)]
    {
        let server = Workload { authentication, ..Workload::clone(&workload("server", "10.0.0.2", false)) };
        let mut local = Local::default();
        local.add(CLIENT, &workload("client", "10.0.0.1", false));
        local.add(SERVER, &Arc::new(server));
        let snapshot = snapshot(&OPAQUE);
        assert_eq!(wanted(&snapshot, &local).contains_key(&(CLIENT, open().dialled)), because.is_none());
        assert_eq!(forbidden(&snapshot, &local, &open()), because);
    }
}

#[test]
fn what_is_gone_forbids_nothing_and_is_not_chosen() {
    // No endpoint of this node; no service; no pods.
    let gone = Port { endpoints: &["10.0.1.1:80"], ..OPAQUE };
    let none = Snapshot::default();
    let both = local(false, false);
    for (snapshot, local) in
        [(&snapshot(&gone), &both), (&none, &both), (&snapshot(&OPAQUE), &Local::default())]
    {
        assert!(wanted(snapshot, local).is_empty());
        assert_eq!(forbidden(snapshot, local, &open()), None);
    }
}

#[test]
fn the_meshs_own_ports_are_nobodys() {
    let port = Port { endpoints: &["10.0.0.2:15008"], ..OPAQUE };
    assert!(wanted(&snapshot(&port), &local(false, false)).is_empty());
}

/// Only what changed is looked at, and what is wanted is what it would be if everything were.
#[test]
fn changes_are_followed_one_by_one() {
    let held = local(false, false);
    let both = || again(&held);
    let (open, routed) = (snapshot(&OPAQUE), snapshot(&Port { routed: true, ..OPAQUE }));
    let mut followed = Followed::default();
    for (snapshot, local) in [
        (&open, both()),
        (&routed, both()),
        (&open, both()),
        (&Snapshot::default(), both()),
        (&open, local(true, false)),
        (&open, both()),
    ] {
        let expected = wanted(snapshot, &local);
        followed.follow(local, snapshot);
        assert_eq!(followed.wanted, expected);
    }
    // The address goes from one service to another, which needs the agent.
    let mut moved = Snapshot { vips: open.vips.clone(), ..Snapshot::default() };
    let (host, service) = routed.services.iter().next().unwrap_or_else(|| unreachable!());
    moved.services.insert(format!("other.{host}").into(), Arc::clone(service));
    followed.follow(both(), &moved);
    assert_eq!(followed.wanted, HashMap::new());
}
