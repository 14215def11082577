//! Who is asked by CUSTOM policies about what, and what their answers leave to the others.

use super::*;

/// The mesh-wide settings with an authorizer of each protocol.
const SETTINGS: &str = "{apiVersion: v1, kind: ConfigMap, metadata: {name: mesh, namespace: istio-system}, data: {mesh: \
    'extensionProviders: [{name: opa, envoyExtAuthzGrpc: {service: opa.auth, port: 1}}, \
    {name: web, envoyExtAuthzHttp: {service: web.auth, port: 1}}]'}}\n";

/// As [`super::compiled`], with authorizers that are known; a CUSTOM policy is written `CUSTOM PROVIDER {rule}`.
fn with_authorizers(policies: &[&str]) -> Snapshot {
    let pod = "---\n{apiVersion: v1, kind: Pod, metadata: {name: pod, namespace: app}, status: {podIP: 10.0.0.9}}\n";
    let mut text = format!("{SETTINGS}{pod}");
    for (i, policy) in policies.iter().enumerate() {
        let (action, rest) = policy.split_once(' ').unwrap();
        let (provider, rules) = match action {
            "CUSTOM" => rest.split_once(' ').unwrap(),
            _ => ("", rest),
        };
        let provider =
            if provider.is_empty() { String::new() } else { format!("provider: {{name: {provider}}}, ") };
        writeln!(
            text,
            "---\n{{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {{name: p{i}, namespace: app}}, \
             spec: {{{provider}action: {action}, rules: [{rules}]}}}}"
        )
        .unwrap();
    }
    let (objects, refused) = read_text(&text);
    assert_eq!(refused, [], "{text}");
    compile(&objects, None, &Settings::default()).0
}

/// Who is asked one after the other, each saying yes, and what is said in the end.
fn asked(snapshot: &Snapshot, question: &str) -> String {
    let question = Question::read(question);
    let workload = snapshot.workload_at("10.0.0.9".parse().unwrap()).unwrap();
    let (mut approved, mut names) = (Vec::new(), Vec::new());
    let (method, path) = question.request.clone().unwrap_or_default();
    let head = Head {
        method: &method,
        authority: &question.host,
        path: &path,
        headers: &question.headers,
        claims: None,
    };
    let (open, bytes) = match (&question.request, question.unread) {
        (Some(_), _) => (Open::Request(head), Bytes::Request(&head)),
        (None, true) => (Open::Connection, Bytes::Unread),
        (None, false) => (Open::Opaque(None), Bytes::Opaque { server_name: None }),
    };
    loop {
        let asked = Asked {
            workload,
            destination: SocketAddr::new("10.0.0.9".parse().unwrap(), question.port),
            source: question.source.as_ref(),
            client: question.client,
            approved: &approved,
        };
        let Some(provider) = authorizer(&asked, open) else {
            let verdict = said(verdict(&workload.authorization, &Facts { asked: &asked, bytes }));
            return [names.join(" "), verdict].join(" ").trim().to_owned();
        };
        names.push(provider.name.to_string());
        let provider = Arc::clone(provider);
        approved.push(provider);
    }
}

#[test]
fn authorizers_are_asked_about_what_their_policies_match_and_before_the_others() {
    let table: &[(&[&str], &str, &str)] = &[
        (&["CUSTOM opa {to: [{operation: {paths: [/x]}}]}"], "GET /x", "opa allowed"),
        (&["CUSTOM opa {to: [{operation: {paths: [/x]}}]}"], "GET /y", "allowed"),
        (&["CUSTOM opa {to: [{operation: {paths: [/x]}}]}"], "unread", "open"),
        // A yes leaves the rest to the others.
        (&["CUSTOM opa {}", "DENY {to: [{operation: {paths: [/x]}}]}"], "GET /x", "opa denied p1/0"),
        (&["CUSTOM opa {}", "ALLOW {to: [{operation: {paths: [/x]}}]}"], "GET /y", "opa denied none"),
        (&["DENY {}", "CUSTOM opa {}"], "GET /", "opa denied p0/0"),
        // Each once.
        (&["CUSTOM opa {}", "CUSTOM opa {}", "CUSTOM web {}"], "GET /", "opa web allowed"),
        // Nobody is asked about bytes that may still be requests, unless there is nobody to ask.
        (&["CUSTOM opa {from: [{source: {namespaces: [a]}}]}"], "from a/x unread", "open"),
        (&["CUSTOM opa {from: [{source: {namespaces: [a]}}]}"], "from b/x unread", "allowed"),
        (&["CUSTOM gone {from: [{source: {namespaces: [a]}}]}"], "from a/x unread", "denied p0/0"),
        // What is no request: over gRPC alone, and by rules that ask for nothing of requests.
        (&["CUSTOM opa {from: [{source: {namespaces: [a]}}]}"], "from a/x opaque", "opa allowed"),
        (&["CUSTOM opa {from: [{source: {namespaces: [a]}}]}"], "from b/x opaque", "allowed"),
        (&["CUSTOM web {from: [{source: {namespaces: [a]}}]}"], "from a/x opaque", "denied p0/0"),
        (&["CUSTOM opa {to: [{operation: {paths: [/x]}}]}"], "opaque", "denied p0/0"),
        (&["CUSTOM opa {to: [{operation: {ports: ['1'], paths: [/x]}}]}"], "opaque", "allowed"),
        (
            &["CUSTOM opa {to: [{operation: {paths: [/x]}}]}, {from: [{source: {namespaces: [a]}}]}"],
            "from a/x opaque",
            "opa allowed",
        ),
        // Somebody who is not known can say nothing.
        (&["CUSTOM gone {}"], "GET /", "denied p0/0"),
        (&["CUSTOM opa {}", "CUSTOM gone {to: [{operation: {paths: [/x]}}]}"], "GET /x", "opa denied p1/0"),
        (&["CUSTOM opa {}", "CUSTOM gone {to: [{operation: {paths: [/x]}}]}"], "GET /y", "opa allowed"),
    ];
    for (policies, question, expected) in table {
        let snapshot = with_authorizers(policies);
        assert_eq!(asked(&snapshot, question), *expected, "{policies:?} {question}");
    }
}

/// A yes stands as long as it is the same authorizer who is to be asked.
#[test]
fn what_an_authorizer_has_permitted_stands_until_another_is_to_be_asked() {
    let snapshot = with_authorizers(&["CUSTOM opa {to: [{operation: {paths: [/x]}}]}"]);
    let workload = snapshot.workload_at("10.0.0.9".parse().unwrap()).unwrap();
    let opa = workload.authorization.custom[0].provider.clone().unwrap();
    let slower = Provider { timeout: std::time::Duration::from_secs(1), ..Provider::clone(&opa) };
    let elsewhere = Provider { host: "other".into(), ..Provider::clone(&opa) };
    let other = Provider { name: "other".into(), ..Provider::clone(&opa) };
    let (method, headers) = (Method::GET, HeaderMap::new());
    for (approved, path, stands_on) in [
        (vec![], "/x", false),
        (vec![], "/y", true),
        (vec![Arc::clone(&opa)], "/x", true),
        (vec![Arc::new(slower)], "/x", true),
        (vec![Arc::new(elsewhere)], "/x", false),
        (vec![Arc::new(other)], "/x", false),
    ] {
        let (destination, client) = ("10.0.0.9:80".parse().unwrap(), "10.0.0.1:1".parse().unwrap());
        let asked = Asked { workload, destination, source: None, client, approved: &approved };
        let head = Head { method: &method, authority: "app", path, headers: &headers, claims: None };
        assert_eq!(stands(&asked, Open::Request(head)).is_ok(), stands_on, "{approved:?} {path}");
        // What passed unread nobody was asked about.
        assert!(stands(&asked, Open::Connection).is_err() && stands(&asked, Open::Requests).is_ok());
    }
}
