//! Fields of a `Gateway`: what is accepted, what is refused, and where the error points.
#![expect(clippy::unwrap_used, reason = "tests")]

use rustls::crypto::aws_lc_rs::cipher_suite as suites;
use serde_json::{Value, json};

use super::*;
use crate::state::snapshot::{ServerTlsMode, TlsVersion};

fn read(spec: &Value) -> Checked<Gateway> {
    check(&ObjectKey::new("Gateway", "edge", "in"), None, spec)
}

/// One server of this protocol with these fields on top.
fn server(protocol: &str, fields: &Value) -> Value {
    let mut server =
        json!({"port": {"number": 443, "name": "p", "protocol": protocol}, "hosts": ["a.example"]});
    for (name, value) in fields.as_object().unwrap() {
        server[name] = value.clone();
    }
    json!({"servers": [server]})
}

fn tls(protocol: &str, tls: &Value) -> Value {
    server(protocol, &json!({ "tls": tls }))
}

fn good(spec: &Value) -> Server {
    read(spec).unwrap_or_else(|error| panic!("{spec}: {error:?}")).servers.remove(0)
}

fn terms(spec: &Value) -> Terms {
    good(spec).serves.terms().unwrap().clone()
}

#[test]
fn each_protocol_is_served_as_it_says() {
    let nothing = json!({});
    for (protocol, expected) in [
        ("HTTP", Serves::Http { redirects: false }),
        ("HTTP2", Serves::Http { redirects: false }),
        ("grpc", Serves::Http { redirects: false }),
        ("TCP", Serves::Tcp),
    ] {
        assert_eq!(good(&server(protocol, &nothing)).serves, expected, "{protocol}");
    }
    assert_eq!(good(&tls("HTTP", &json!({"httpsRedirect": true}))).serves, Serves::Http { redirects: true });
    assert_eq!(good(&tls("HTTPS", &json!({"mode": "PASSTHROUGH"}))).serves, Serves::PassThrough);
    assert_eq!(good(&tls("TLS", &json!({"minProtocolVersion": "TLS_AUTO"}))).serves, Serves::PassThrough);
    let simple = json!({"mode": "SIMPLE", "credentialName": "c"});
    assert!(matches!(good(&tls("HTTPS", &simple)).serves, Serves::Https(_)));
    assert!(matches!(good(&tls("TLS", &simple)).serves, Serves::Tls(_)));
}

#[test]
fn tls_that_ends_is_read_whole() {
    let plain = Terms {
        mode: ServerTlsMode::Simple,
        credential: Some("c".to_owned()),
        files: Vec::new(),
        names: Vec::new(),
        least: TlsVersion::V1_2,
        most: TlsVersion::V1_3,
        ciphers: Vec::new(),
    };
    assert_eq!(terms(&tls("HTTPS", &json!({"mode": "SIMPLE", "credentialName": "c"}))), plain);
    let full = json!({
        "mode": "MUTUAL", "serverCertificate": "a.pem", "privateKey": "b.pem", "caCertificates": "c.pem",
        "caCrl": "d.pem", "subjectAltNames": ["b.example"], "minProtocolVersion": "TLSV1_2",
        "maxProtocolVersion": "TLSV1_3", "cipherSuites": ["ECDHE-RSA-AES128-GCM-SHA256"],
    });
    let expected = Terms {
        mode: ServerTlsMode::Mutual,
        credential: None,
        files: [
            ("serverCertificate", "a.pem"),
            ("privateKey", "b.pem"),
            ("caCertificates", "c.pem"),
            ("caCrl", "d.pem"),
        ]
        .map(|(field, path)| (field, path.into()))
        .to_vec(),
        names: vec!["b.example".into()],
        ciphers: vec![
            suites::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
            suites::TLS13_AES_256_GCM_SHA384,
            suites::TLS13_AES_128_GCM_SHA256,
            suites::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        ..plain.clone()
    };
    assert_eq!(terms(&tls("HTTPS", &full)), expected);
    let files: Vec<Arc<str>> = read(&tls("TLS", &full)).unwrap().files().cloned().collect();
    assert_eq!(files.join(" "), "a.pem b.pem c.pem d.pem");
    for (mode, expected) in
        [("OPTIONAL_MUTUAL", ServerTlsMode::OptionalMutual), ("MUTUAL", ServerTlsMode::Mutual)]
    {
        let read = terms(&tls("HTTPS", &json!({"mode": mode, "credentialName": "c"})));
        assert_eq!((read.mode, read.asks_clients()), (expected, true), "{mode}");
    }
    let own = json!({"mode": "ISTIO_MUTUAL", "subjectAltNames": ["spiffe://a/ns/b/sa/c"]});
    let read = terms(&tls("TLS", &own));
    assert_eq!((read.mode, read.asks_clients(), read.names.len()), (ServerTlsMode::IstioMutual, false, 1));
    let only13 = json!({"mode": "SIMPLE", "credentialName": "c", "minProtocolVersion": "TLSV1_3"});
    assert_eq!(terms(&tls("TLS", &only13)).least, TlsVersion::V1_3);
}

#[test]
fn hosts_may_be_for_one_namespace() {
    let hosts = json!({"hosts": ["A.example", "*", "./b.example", "*/c.example", "shop/*.d.example"]});
    let read = good(&server("HTTP", &hosts)).hosts;
    let read: Vec<_> = read.iter().map(|host| (host.namespace.as_deref(), &*host.name)).collect();
    let expected = [
        (None, "a.example"),
        (None, "*"),
        (Some("edge"), "b.example"),
        (None, "c.example"),
        (Some("shop"), "*.d.example"),
    ];
    assert_eq!(read, expected);
}

fn refused(table: Vec<(Value, &str, &str)>) {
    for (spec, field, message) in table {
        let error = read(&spec).unwrap_err();
        let field = field.strip_prefix('/').map_or_else(|| format!("servers[0].{field}"), str::to_owned);
        assert_eq!(error.field, field, "{spec}: {}", error.message);
        assert!(error.message.contains(message), "{spec}: {}", error.message);
    }
}

#[test]
fn bad_servers_name_their_field() {
    let port = |port: Value| server("HTTP", &json!({ "port": port }));
    let hosts = |hosts: Value| server("HTTP", &json!({ "hosts": hosts }));
    let twice = server("HTTP", &json!({}))["servers"][0].clone();
    refused(vec![
        (json!({}), "/servers", "at least one server"),
        (json!({"servers": [twice, twice]}), "/servers[1].port.name", "duplicate name p"),
        (json!({"servers": [twice], "select": {}}), "/select", "unknown field"),
        (port(json!({"number": 80, "protocol": "HTTP"})), "port.name", "is required"),
        (port(json!({"number": 0, "name": "p", "protocol": "HTTP"})), "port.number", "nonzero"),
        (port(json!({"number": 80, "name": "p"})), "port.protocol", "invalid protocol"),
        (port(json!({"number": 80, "name": "p", "protocol": "SMTP"})), "port.protocol", "invalid protocol"),
        (
            port(json!({"number": 80, "name": "p", "protocol": "HTTP", "targetPort": 8080})),
            "port.targetPort",
            "not supported yet",
        ),
        (server("GRPC-WEB", &json!({})), "port.protocol", "GRPC-WEB is not supported yet"),
        (server("MONGO", &json!({})), "port.protocol", "not supported yet"),
        (server("HTTP", &json!({"bind": "10.0.0.1"})), "bind", "not supported yet"),
        (server("HTTP", &json!({"defaultEndpoint": "127.0.0.1:80"})), "defaultEndpoint", "not supported yet"),
        (hosts(json!([])), "hosts", "at least one host"),
        (hosts(json!(["a.*.b"])), "hosts[0]", "not a domain name"),
        (hosts(json!(["a", "A"])), "hosts[1]", "there already"),
        (hosts(json!(["/a"])), "hosts[0]", "invalid namespace"),
        (hosts(json!(["a/"])), "hosts[0]", "not a domain name"),
        (hosts(json!(["~/*"])), "hosts[0]", "invalid namespace"),
        (hosts(json!(["a.b/*"])), "hosts[0]", "invalid namespace"),
    ]);
}

#[test]
fn bad_tls_names_its_field() {
    let simple = |field: &str, value: Value| {
        let mut written = json!({"mode": "SIMPLE", "credentialName": "c"});
        written[field] = value;
        tls("HTTPS", &written)
    };
    let files = |mode: &str, names: &[&str]| {
        let mut written = json!({ "mode": mode });
        for name in names {
            written[*name] = json!("a.pem");
        }
        tls("HTTPS", &written)
    };
    let mut table = vec![
        (server("HTTPS", &json!({})), "tls", "must have TLS settings"),
        (server("TLS", &json!({})), "tls", "must have TLS settings"),
        (tls("TCP", &json!({"mode": "SIMPLE"})), "tls", "means nothing"),
        (tls("HTTP", &json!({"mode": "SIMPLE"})), "tls.mode", "only httpsRedirect"),
        (
            tls("HTTP", &json!({"httpsRedirect": true, "credentialName": "c"})),
            "tls.credentialName",
            "only httpsRedirect",
        ),
        (simple("httpsRedirect", json!(true)), "tls.httpsRedirect", "plain HTTP port"),
        (tls("TLS", &json!({"mode": "AUTO_PASSTHROUGH"})), "tls.mode", "not supported yet"),
        (tls("TLS", &json!({"mode": "simple"})), "tls.mode", "unknown variant"),
        (tls("TLS", &json!({"credentialName": "c"})), "tls.credentialName", "PASSTHROUGH"),
        (tls("TLS", &json!({"cipherSuites": ["x"]})), "tls.cipherSuites", "PASSTHROUGH"),
        (simple("minProtocolVersion", json!("TLSV1_1")), "tls.minProtocolVersion", "before 1.2"),
        (simple("maxProtocolVersion", json!("TLSV1_0")), "tls.maxProtocolVersion", "before 1.2"),
        (simple("cipherSuites", json!(["AES128-SHA"])), "tls.cipherSuites[0]", "is not spoken"),
        (
            simple("cipherSuites", json!(["ECDHE-RSA-AES128-GCM-SHA256", "ECDHE-RSA-AES128-GCM-SHA256"])),
            "tls.cipherSuites[1]",
            "there already",
        ),
        (simple("subjectAltNames", json!(["a"])), "tls.subjectAltNames", "SIMPLE"),
        (simple("privateKey", json!("a.pem")), "tls.privateKey", "one of the two"),
        (simple("credentialName", json!("kubernetes://a/b")), "tls.credentialName", "is not a name"),
        (files("SIMPLE", &[]), "tls.credentialName", "is required"),
        (files("SIMPLE", &["serverCertificate"]), "tls.privateKey", "is required"),
        (files("MUTUAL", &["serverCertificate", "privateKey"]), "tls.caCertificates", "is required"),
        (files("OPTIONAL_MUTUAL", &["caCertificates"]), "tls.serverCertificate", "is required"),
        (files("SIMPLE", &["serverCertificate", "privateKey", "caCrl"]), "tls.caCrl", "SIMPLE"),
        (files("ISTIO_MUTUAL", &["privateKey"]), "tls.privateKey", "own certificate"),
        (
            tls("TLS", &json!({"mode": "ISTIO_MUTUAL", "credentialName": "c"})),
            "tls.credentialName",
            "own certificate",
        ),
        (
            tls("TLS", &json!({"mode": "ISTIO_MUTUAL", "maxProtocolVersion": "TLSV1_2"})),
            "tls.maxProtocolVersion",
            "TLS 1.3 alone",
        ),
        (
            tls("TLS", &json!({"mode": "ISTIO_MUTUAL", "cipherSuites": ["ECDHE-RSA-AES128-GCM-SHA256"]})),
            "tls.cipherSuites",
            "its own",
        ),
        (
            tls(
                "TLS",
                &json!({"mode": "SIMPLE", "credentialName": "c", "minProtocolVersion": "TLSV1_3",
                               "maxProtocolVersion": "TLSV1_2"}),
            ),
            "tls.minProtocolVersion",
            "no version is left",
        ),
    ];
    for field in [
        "credentialNames",
        "caCertCredentialName",
        "tlsCertificates",
        "verifyCertificateSpki",
        "verifyCertificateHash",
        "ecdhCurves",
    ] {
        let name: &'static str = Box::leak(format!("tls.{field}").into_boxed_str());
        table.push((simple(field, json!(["x"])), name, "not supported yet"));
    }
    refused(table);
}
