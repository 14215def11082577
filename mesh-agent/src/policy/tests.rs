//! `cases.txt`, case by case: policies as people write them, read and compiled as the agent does, and what they say.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::{fmt::Write as _, net::SocketAddr, sync::Arc};

use http::{HeaderMap, HeaderName, HeaderValue, Method};

use super::{
    authorization::{Bytes, Facts, Verdict, verdict},
    *,
};
use crate::{
    config::PathNormalization,
    identity::SpiffeId,
    report::Reporter,
    source::read_text,
    state::{
        compile::{Settings, compile},
        snapshot::{Mtls, MtlsMode, Provider, Snapshot, Workload},
    },
};

mod custom;
mod properties;

const CASES: &str = include_str!("tests/cases.txt");

/// Policies in one line each, of namespace `app`, for all of its pods: there is one.
fn compiled(policies: &[&str]) -> Snapshot {
    let mut text =
        "{apiVersion: v1, kind: Pod, metadata: {name: pod, namespace: app}, status: {podIP: 10.0.0.9}}\n"
            .to_owned();
    for (i, policy) in policies.iter().enumerate() {
        let (action, rules) = policy.split_once(' ').unwrap_or((policy, ""));
        let (dry_run, rules) = match rules.strip_prefix("dry-run") {
            Some(rules) => (true, rules),
            None => (false, rules),
        };
        let rules = rules.trim().replace("} {from", "}, {from").replace("} {to", "}, {to");
        let provider = if action == "CUSTOM" { "provider: {name: opa}, " } else { "" };
        let rules = if rules.is_empty() { String::new() } else { format!(", rules: [{rules}]") };
        writeln!(
            text,
            "---\n{{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {{name: p{i}, namespace: app, \
             annotations: {{istio.io/dry-run: '{dry_run}'}}}}, spec: {{{provider}action: {action}{rules}}}}}"
        )
        .unwrap();
    }
    let (objects, refused) = read_text(&text);
    assert_eq!(refused, [], "{text}");
    compile(&objects, None, &Settings::default()).0
}

/// Who asks for what.
struct Question {
    source: Option<SpiffeId>,
    client: SocketAddr,
    port: u16,
    request: Option<(Method, String)>,
    host: String,
    headers: HeaderMap,
    unread: bool,
    sni: Option<String>,
}

impl Question {
    fn read(text: &str) -> Self {
        let mut question = Self {
            source: None,
            client: "10.0.0.1:40000".parse().unwrap(),
            port: 8080,
            request: None,
            host: "app".to_owned(),
            headers: HeaderMap::new(),
            unread: false,
            sni: None,
        };
        let mut words = text.split_whitespace();
        while let Some(word) = words.next() {
            let mut next = || words.next().unwrap();
            match word {
                "from" => {
                    let (namespace, account) = next().split_once('/').unwrap();
                    let id = format!("spiffe://cluster.local/ns/{namespace}/sa/{account}");
                    question.source = Some(id.parse().unwrap());
                }
                "ip" => question.client = SocketAddr::new(next().parse().unwrap(), 40000),
                "port" => question.port = next().parse().unwrap(),
                "host" => next().clone_into(&mut question.host),
                "sni" => question.sni = Some(next().to_owned()),
                "opaque" => {}
                "unread" => question.unread = true,
                word => match word.split_once('=') {
                    Some((name, value)) => {
                        let name: HeaderName = name.parse().unwrap();
                        question.headers.append(name, HeaderValue::from_str(value).unwrap());
                    }
                    None => question.request = Some((word.parse().unwrap(), next().to_owned())),
                },
            }
        }
        question
    }

    fn ask(&self, snapshot: &Snapshot) -> String {
        let workload = Arc::clone(snapshot.workload_at("10.0.0.9".parse().unwrap()).unwrap());
        let asked = Asked {
            workload: &workload,
            destination: SocketAddr::new("10.0.0.9".parse().unwrap(), self.port),
            source: self.source.as_ref(),
            client: self.client,
            approved: &[],
        };
        let Some((method, target)) = &self.request else {
            let server_name = self.sni.as_deref();
            let bytes = if self.unread { Bytes::Unread } else { Bytes::Opaque { server_name } };
            return said(verdict(&workload.authorization, &Facts { asked: &asked, bytes }));
        };
        let path = target.split('?').next().unwrap_or_default();
        let path = match normalise(path, PathNormalization::Base) {
            Ok(path) if workload.authorization.reads_paths => path,
            Ok(_) => path.into(),
            Err(_) => return "malformed".to_owned(),
        };
        let head = Head { method, authority: &self.host, path: &path, headers: &self.headers, claims: None };
        said(verdict(&workload.authorization, &Facts { asked: &asked, bytes: Bytes::Request(&head) }))
    }
}

fn said(verdict: Verdict<'_>) -> String {
    match verdict {
        Verdict::Allowed => "allowed".to_owned(),
        Verdict::Denied(Some((policy, rule))) => format!("denied {}/{rule}", policy.name),
        Verdict::Denied(None) => "denied none".to_owned(),
        Verdict::Open => "open".to_owned(),
    }
}

/// Policies, and the cases below them with the line of each.
type Block = (Vec<&'static str>, Vec<(usize, &'static str)>);

/// All blocks of the file.
fn blocks() -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    for (i, line) in CASES.lines().enumerate() {
        if line.starts_with('#') || line.is_empty() {
            continue;
        }
        if line.starts_with(' ') {
            blocks.last_mut().unwrap().1.push((i + 1, line));
            continue;
        }
        match blocks.last_mut() {
            Some((policies, cases)) if cases.is_empty() => policies.push(line),
            _ => blocks.push((vec![line], Vec::new())),
        }
    }
    blocks
}

#[test]
fn policies_say_what_the_cases_say() {
    let (mut wrong, mut count) = (String::new(), 0);
    for (policies, cases) in blocks() {
        let policies = if policies == ["none"] { Vec::new() } else { policies };
        let snapshot = compiled(&policies);
        for (line, case) in cases {
            let (question, expected) = case.split_once("->").unwrap_or_else(|| panic!("line {line}"));
            let said = Question::read(question).ask(&snapshot);
            if said != expected.trim() {
                writeln!(wrong, "line {line}: {}: {said}, not {}", question.trim(), expected.trim()).unwrap();
            }
            count += 1;
        }
    }
    assert!(wrong.is_empty(), "\n{wrong}");
    assert!(count >= 200, "{count} cases");
}

/// What is permitted before the bytes are known is permitted as whatever they turn out to be.
#[test]
fn unread_bytes_pass_only_where_everything_would() {
    let requests = ["GET /", "POST /admin", "GET /public/secret", "x-team=red DELETE /users/7/orders"];
    let others = ["opaque", "opaque sni db.example.com"];
    for (policies, _) in blocks() {
        let policies = if policies == ["none"] { Vec::new() } else { policies };
        let snapshot = compiled(&policies);
        for source in ["", "from a/x", "from b/x", "from app/x"] {
            for place in ["ip 10.1.0.1 port 8080", "ip 10.2.0.1 port 9090"] {
                let ask = |what: &str| Question::read(&format!("{source} {place} {what}")).ask(&snapshot);
                let (unread, opaque) = (ask("unread"), ask("opaque"));
                for what in requests.iter().chain(&others) {
                    let said = ask(what);
                    assert!(
                        unread != "allowed" || said == "allowed",
                        "{policies:?} {source} {place} {what}: {said}"
                    );
                    assert!(
                        !unread.starts_with("denied") || said.starts_with("denied"),
                        "{policies:?} {source} {place} {what}"
                    );
                    let request = requests.contains(what);
                    assert!(
                        opaque != "allowed" || !request || said == "allowed",
                        "{policies:?} {source} {place} {what}"
                    );
                }
            }
        }
    }
}

#[test]
fn refusals_name_policy_and_rule_as_envoy_does() {
    let reporter = Reporter::default();
    let snapshot = compiled(&[
        "ALLOW {to: [{operation: {methods: [GET]}}]}",
        "DENY {to: [{operation: {ports: ['1']}}]}",
    ]);
    let workload = snapshot.workload_at("10.0.0.9".parse().unwrap()).unwrap();
    let asked = |port| Asked {
        workload,
        destination: SocketAddr::new("10.0.0.9".parse().unwrap(), port),
        source: None,
        client: "10.0.0.1:1".parse().unwrap(),
        approved: &[],
    };
    let refusal = |error: Error| (error.kind, error.detail);
    assert_eq!(
        connection(&asked(1), &reporter).map_err(refusal).err(),
        Some((Kind::Denied, "rbac_access_denied_matched_policy[ns[app]-policy[p1]-rule[0]]".to_owned()))
    );
    assert!(matches!(connection(&asked(2), &reporter), Ok(Ruling::BytesDecide)));
    assert_eq!(
        opaque(&asked(2), None, &reporter).map_err(refusal).err(),
        Some((Kind::Denied, "rbac_access_denied_matched_policy[none]".to_owned()))
    );
    let (method, headers) = (Method::GET, HeaderMap::new());
    let head = Head { method: &method, authority: "app", path: "/", headers: &headers, claims: None };
    assert!(request(&asked(2), &head, &reporter).is_ok());
}

/// The mode is asked before the policies, of plaintext alone.
#[test]
fn plaintext_is_refused_where_mutual_tls_is_asked_for_whatever_policies_say() {
    let reporter = Reporter::default();
    let snapshot = compiled(&["DENY {to: [{operation: {methods: [GET]}}]}"]);
    let strict = Mtls { mode: MtlsMode::Strict, by: Some("app/strict".into()) };
    let mut workload = Workload::clone(snapshot.workload_at("10.0.0.9".parse().unwrap()).unwrap());
    workload.authentication.ports = Box::new([(80, strict)]);
    let id = "spiffe://cluster.local/ns/app/sa/x".parse().unwrap();
    let (method, headers) = (Method::GET, HeaderMap::new());
    let head = Head { method: &method, authority: "app", path: "/", headers: &headers, claims: None };
    for (port, source, expected) in
        [(80, None, Kind::Plaintext), (80, Some(&id), Kind::Denied), (81, None, Kind::Denied)]
    {
        let destination = SocketAddr::new("10.0.0.9".parse().unwrap(), port);
        let client = "10.0.0.1:1".parse().unwrap();
        let asked = Asked { workload: &workload, destination, source, client, approved: &[] };
        let refused = request(&asked, &head, &reporter).unwrap_err();
        assert_eq!(refused.kind, expected, "{port} {source:?}");
        assert_eq!(connection(&asked, &reporter).is_err(), expected == Kind::Plaintext);
        if expected == Kind::Plaintext {
            assert!(refused.detail.contains("PeerAuthentication app/strict"), "{}", refused.detail);
        }
    }
}

/// What is open would be refused now, or not, as it would be if it came now.
#[test]
fn what_is_open_is_judged_by_what_is_known_of_it() {
    let client = "10.0.0.1:1".parse().unwrap();
    let head = Question::read("GET /a");
    let (method, _) = head.request.clone().unwrap();
    let head = Head { method: &method, authority: "app", path: "/a", headers: &head.headers, claims: None };
    let opaque = Open::Opaque(Some("db.example.com"));
    // Policies, and whether a connection, one that is read, bytes with a name and a request go on.
    for (policies, expected) in [
        (&[][..], [true; 4]),
        (&["DENY {to: [{operation: {ports: ['80']}}]}"], [false; 4]),
        (&["DENY {to: [{operation: {paths: [/a]}}]}"], [false, true, false, false]),
        (&["DENY {to: [{operation: {paths: [/b]}}]}"], [false, true, false, true]),
        (&["ALLOW {to: [{operation: {paths: [/a]}}]}"], [false, true, false, true]),
        (&["ALLOW {when: [{key: connection.sni, values: [db.example.com]}]}"], [false, true, true, false]),
        (&["DENY dry-run {}"], [true; 4]),
    ] {
        let snapshot = compiled(policies);
        let workload = snapshot.workload_at("10.0.0.9".parse().unwrap()).unwrap();
        let destination = "10.0.0.9:80".parse().unwrap();
        let asked = Asked { workload, destination, source: None, client, approved: &[] };
        let all = [Open::Connection, Open::Requests, opaque, Open::Request(head)];
        assert_eq!(all.map(|open| stands(&asked, open).is_ok()), expected, "{policies:?}");
    }
}

#[test]
fn what_is_tried_or_audited_is_counted_and_passes() {
    let reporter = Reporter::default();
    let policies = [
        "DENY dry-run {to: [{operation: {methods: [GET]}}]}",
        "ALLOW dry-run {to: [{operation: {methods: [GET]}}]}",
        "AUDIT {}",
    ];
    let snapshot = compiled(&policies);
    let workload = snapshot.workload_at("10.0.0.9".parse().unwrap()).unwrap();
    let asked = Asked {
        workload,
        destination: "10.0.0.9:80".parse().unwrap(),
        source: None,
        client: "10.0.0.1:1".parse().unwrap(),
        approved: &[],
    };
    let headers = HeaderMap::new();
    for method in [Method::GET, Method::POST] {
        let head = Head { method: &method, authority: "app", path: "/", headers: &headers, claims: None };
        assert!(request(&asked, &head, &reporter).is_ok());
    }
    // Nothing is known of what is in it but that it is audited.
    assert!(matches!(connection(&asked, &reporter), Ok(Ruling::Permitted(_))));
    let text = reporter.exposition();
    for (action, result, policy, count) in [
        ("DENY", "denied", "app/p0", 1),
        ("ALLOW", "allowed", "app/p1", 1),
        ("ALLOW", "denied", "none", 1),
        ("AUDIT", "audited", "app/p2", 3),
    ] {
        let line = format!(
            "mesh_policy_dry_run_total{{action=\"{action}\",result=\"{result}\",policy=\"{policy}\"}} {count}\n"
        );
        assert!(text.contains(&line), "{line} is missing in\n{text}");
    }
}

#[test]
fn the_meshs_own_ports_are_refused_at_enrolled_pods_only() {
    let snapshot = compiled(&[]);
    let workload = snapshot.workload_at("10.0.0.9".parse().unwrap()).unwrap();
    let asked = |port| {
        let at = SocketAddr::from(([10, 0, 0, 9], port));
        Asked { workload, destination: at, source: None, client: at, approved: &[] }
    };
    for port in MESH_PORTS {
        let asked = asked(port);
        assert_eq!(inbound(&asked).map_err(|e| e.kind).err(), Some(Kind::IllegalDestination));
        assert!(outbound(None, asked.destination).is_ok());
    }
    assert!(inbound(&asked(9080)).is_ok());
}
