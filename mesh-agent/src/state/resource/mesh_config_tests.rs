//! What is accepted and what is refused, by which field.
#![expect(clippy::unwrap_used, reason = "tests")]

use serde_json::json;

use super::*;

fn provider(settings: &Value) -> Arc<Provider> {
    Arc::clone(&check(settings).unwrap().providers[0])
}

#[test]
fn settings_are_read() {
    let nothing = check(&Value::Null).unwrap();
    assert!(nothing.providers.is_empty() && nothing.root_namespace.is_none());
    let read = check(&json!({
        "rootNamespace": "mesh-config",
        "trustDomainAliases": ["old", "older.example"],
        "pathNormalization": {"normalization": "DECODE_AND_MERGE_SLASHES"},
    }))
    .unwrap();
    assert_eq!(read.root_namespace.as_deref(), Some("mesh-config"));
    assert_eq!(read.trust_domain_aliases, ["old".into(), "older.example".into()]);
    assert_eq!(read.path_normalization, Some(PathNormalization::DecodeAndMergeSlashes));
    for (text, how) in [
        ("DEFAULT", PathNormalization::Base),
        ("BASE", PathNormalization::Base),
        ("NONE", PathNormalization::None),
        ("MERGE_SLASHES", PathNormalization::MergeSlashes),
    ] {
        let read = check(&json!({"pathNormalization": {"normalization": text}})).unwrap();
        assert_eq!(read.path_normalization, Some(how), "{text}");
    }
}

#[test]
fn authorizers_are_read_with_istios_defaults() {
    let grpc = json!({"service": "opa.auth.svc.cluster.local", "port": 9191});
    let read = provider(&json!({"extensionProviders": [{"name": "opa", "envoyExtAuthzGrpc": grpc}]}));
    let expected = Provider {
        name: "opa".into(),
        protocol: CheckProtocol::Grpc,
        host: "opa.auth.svc.cluster.local".into(),
        port: 9191,
        timeout: Duration::from_mins(10),
        fail_open: false,
        status_on_error: StatusCode::FORBIDDEN,
        body: None,
    };
    assert_eq!(*read, expected);
    let http = json!({
        "service": "auth/Ext.auth.svc.cluster.local", "port": 8000, "timeout": "0.5s", "failOpen": true,
        "statusOnError": "503", "pathPrefix": "/check",
        "includeRequestHeadersInCheck": ["X-Team", "x-a*", "*-id"],
        "includeAdditionalHeadersInCheck": {"x-mesh": "1"},
        "includeRequestBodyInCheck": {"maxRequestBytes": 1024, "allowPartialMessage": true, "packAsBytes": true},
        "headersToUpstreamOnAllow": ["x-user"], "headersToDownstreamOnAllow": ["set-cookie"],
        "headersToDownstreamOnDeny": ["x-reason"],
    });
    let read = provider(&json!({"extensionProviders": [{"name": "ext", "envoyExtAuthzHttp": http}]}));
    let text = |text: &str| TextMatch::parse(text).unwrap();
    let terms = HttpCheck {
        path_prefix: "/check".into(),
        request_headers: Box::new([text("x-team"), text("x-a*"), text("*-id")]),
        added_headers: Box::new([(HeaderName::from_static("x-mesh"), HeaderValue::from_static("1"))]),
        upstream_on_allow: Box::new([text("x-user")]),
        downstream_on_allow: Box::new([text("set-cookie")]),
        downstream_on_deny: Box::new([text("x-reason")]),
    };
    let expected = Provider {
        name: "ext".into(),
        protocol: CheckProtocol::Http(Box::new(terms)),
        host: "ext.auth.svc.cluster.local".into(),
        port: 8000,
        timeout: Duration::from_millis(500),
        fail_open: true,
        status_on_error: StatusCode::SERVICE_UNAVAILABLE,
        body: Some(BodyInCheck { most: 1024, partial: true, raw: true }),
    };
    assert_eq!(*read, expected);
    // The older name of a list, and a status that is a number.
    let http = json!({"service": "a", "port": 1, "includeHeadersInCheck": ["x-a"], "statusOnError": 500});
    let read = provider(&json!({"extensionProviders": [{"name": "a", "envoyExtAuthzHttp": http}]}));
    let CheckProtocol::Http(terms) = &read.protocol else { unreachable!("it is asked over HTTP") };
    assert_eq!((&*terms.request_headers, read.status_on_error.as_u16()), (&[text("x-a")][..], 500));
}

#[test]
fn what_cannot_mean_what_it_says_is_refused_by_name() {
    let grpc = |change: Value| {
        let mut written = json!({"service": "a", "port": 1});
        written.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        json!({"extensionProviders": [{"name": "p", "envoyExtAuthzGrpc": written}]})
    };
    let http = |change: Value| {
        let mut written = json!({"service": "a", "port": 1});
        written.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        json!({"extensionProviders": [{"name": "p", "envoyExtAuthzHttp": written}]})
    };
    let one = json!({"name": "p", "envoyExtAuthzGrpc": {"service": "a", "port": 1}});
    let table = [
        (json!({"enableTracing": true}), "enableTracing", "unknown field"),
        (
            json!({"pathNormalization": {"normalization": "ALL"}}),
            "pathNormalization.normalization",
            "unknown variant",
        ),
        (json!({"trustDomainAliases": ["a/b"]}), "trustDomainAliases[0]", "not a name"),
        (
            json!({"localityLbSetting": {"distribute": [{"from": "a", "to": {"b": 50}}]}}),
            "localityLbSetting.distribute[0].to",
            "come to 50",
        ),
        (json!({"rootNamespace": "A"}), "rootNamespace", "not a name"),
        (json!({"extensionProviders": [one, one]}), "extensionProviders[1].name", "two providers"),
        (json!({"extensionProviders": [{"name": "p"}]}), "extensionProviders[0]", "needs one of"),
        (
            json!({"extensionProviders": [{"name": "p", "zipkin": {}}]}),
            "extensionProviders[0].zipkin",
            "unknown",
        ),
        (
            json!({"extensionProviders": [{"envoyExtAuthzGrpc": {"service": "a", "port": 1}}]}),
            "extensionProviders[0].name",
            "is required",
        ),
        (grpc(json!({"service": ""})), "extensionProviders[0].envoyExtAuthzGrpc.service", "is required"),
        (grpc(json!({"service": "a b"})), "extensionProviders[0].envoyExtAuthzGrpc.service", "not a name"),
        (grpc(json!({"port": 0})), "extensionProviders[0].envoyExtAuthzGrpc.port", "is required"),
        (grpc(json!({"port": 70000})), "extensionProviders[0].envoyExtAuthzGrpc.port", "65535"),
        (grpc(json!({"timeout": "0s"})), "extensionProviders[0].envoyExtAuthzGrpc.timeout", "1ms"),
        (grpc(json!({"timeout": "5"})), "extensionProviders[0].envoyExtAuthzGrpc.timeout", "not a duration"),
        (grpc(json!({"statusOnError": "x"})), "extensionProviders[0].envoyExtAuthzGrpc.statusOnError", "no"),
        (grpc(json!({"statusOnError": 100})), "extensionProviders[0].envoyExtAuthzGrpc.statusOnError", "no"),
        (grpc(json!({"pathPrefix": "/a"})), "extensionProviders[0].envoyExtAuthzGrpc.pathPrefix", "unknown"),
        (
            grpc(json!({"includeRequestBodyInCheck": {}})),
            "extensionProviders[0].envoyExtAuthzGrpc.includeRequestBodyInCheck.maxRequestBytes",
            "must be 1 to",
        ),
        (
            grpc(json!({"includeRequestBodyInCheck": {"maxRequestBytes": 100_000_000}})),
            "extensionProviders[0].envoyExtAuthzGrpc.includeRequestBodyInCheck.maxRequestBytes",
            "must be 1 to",
        ),
        (http(json!({"pathPrefix": "a"})), "extensionProviders[0].envoyExtAuthzHttp.pathPrefix", "beginning"),
        (
            http(json!({"pathPrefix": "/a?b"})),
            "extensionProviders[0].envoyExtAuthzHttp.pathPrefix",
            "beginning",
        ),
        (
            http(json!({"headersToUpstreamOnAllow": ["a", "*b*"]})),
            "extensionProviders[0].envoyExtAuthzHttp.headersToUpstreamOnAllow[1]",
            "one end",
        ),
        (
            http(json!({"headersToDownstreamOnDeny": ["*"]})),
            "extensionProviders[0].envoyExtAuthzHttp.headersToDownstreamOnDeny[0]",
            "one end",
        ),
        (
            http(json!({"includeHeadersInCheck": ["a"], "includeRequestHeadersInCheck": ["b"]})),
            "extensionProviders[0].envoyExtAuthzHttp.includeHeadersInCheck",
            "older name",
        ),
        (
            http(json!({"includeAdditionalHeadersInCheck": {"x": "a\nb"}})),
            "extensionProviders[0].envoyExtAuthzHttp.includeAdditionalHeadersInCheck.x",
            "no header value",
        ),
    ];
    for (settings, field, message) in table {
        let error = check(&settings).map(|_| ()).unwrap_err();
        assert_eq!(error.field, field, "{settings}: {}", error.message);
        assert!(error.message.contains(message), "{settings}: {}", error.message);
    }
}

#[test]
fn the_object_that_has_them_is_told_by_kind_name_and_key() {
    let object = json!({"data": {"mesh": "a: 1", "other": "b"}});
    let key = |kind, name| ObjectKey::new(kind, "istio-system", name);
    assert_eq!(text(&key("ConfigMap", "mesh"), &object), Some("a: 1"));
    assert_eq!(text(&key("ConfigMap", "other"), &object), None);
    assert_eq!(text(&key("Secret", "mesh"), &object), None);
    assert_eq!(text(&key("ConfigMap", "mesh"), &json!({"data": {}})), None);
}
