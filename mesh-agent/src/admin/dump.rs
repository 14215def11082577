//! The snapshot as JSON, for `/config_dump`: what the agent acts on, after all defaults.
//!
//! Promises to show every field that decides anything, and the same text for the same snapshot. Never shows a
//! secret: a snapshot holds none. Tested in `tests.rs`.

use std::{collections::BTreeMap, time::Duration};

use serde_json::{Value, json};

use crate::state::snapshot::{
    Abort, Backend, Cluster, Fault, HeaderMatch, HeaderOp, HttpRoute, PathRewrite, Protocol, RequestMatch,
    RetryOn, RetryPolicy, Rewrite, RouteAction, Service, ServicePort, Snapshot, StringMatch, Workload,
};

/// The whole snapshot.
pub(super) fn config(snapshot: &Snapshot, problems: &[String]) -> Value {
    // A pod is in the snapshot once for each address.
    let workloads: BTreeMap<_, _> =
        snapshot.workloads.values().map(|w| ((&w.namespace, &w.name), workload(w))).collect();
    let services: BTreeMap<_, _> = snapshot.services.iter().map(|(host, s)| (host, service(s))).collect();
    json!({
        "revision": snapshot.revision,
        "problems": problems,
        "workloads": workloads.into_values().collect::<Vec<_>>(),
        "services": services.into_values().collect::<Vec<_>>(),
    })
}

fn workload(w: &Workload) -> Value {
    json!({
        "namespace": *w.namespace,
        "name": *w.name,
        "ips": w.ips,
        "node": w.node.as_deref(),
        "identity": w.identity.to_string(),
        "labels": w.labels.iter().map(|(k, v)| (k.to_string(), json!(**v))).collect::<serde_json::Map<_, _>>(),
        "enrolled": w.enrolled,
        "netns": w.netns,
        "workload_name": *w.workload_name,
        "canonical_service": *w.canonical_service,
        "canonical_revision": *w.canonical_revision,
    })
}

fn service(s: &Service) -> Value {
    json!({
        "host": *s.host,
        "name": *s.name,
        "namespace": *s.namespace,
        "vips": s.vips,
        "ports": s.ports.iter().map(port).collect::<Vec<_>>(),
    })
}

fn port(p: &ServicePort) -> Value {
    json!({
        "port": p.port,
        "protocol": p.protocol.map(protocol),
        "cluster": cluster(&p.cluster),
        "routes": p.routes.iter().map(|r| route(r)).collect::<Vec<_>>(),
    })
}

fn protocol(p: Protocol) -> &'static str {
    match p {
        Protocol::Http1 => "http1",
        Protocol::Http2 => "http2",
        Protocol::Opaque => "opaque",
    }
}

fn cluster(c: &Cluster) -> Value {
    let endpoints = c.endpoints.iter().map(|e| {
        json!({
            "address": e.address,
            "workload": e.workload.as_ref().map(|w| format!("{}/{}", w.namespace, w.name)),
            "in_flight": e.state.in_flight.load(std::sync::atomic::Ordering::Relaxed),
        })
    });
    json!({
        "name": *c.name,
        "balancing": format!("{:?}", c.balancing),
        "connect_timeout_ms": ms(c.connect_timeout),
        "endpoints": endpoints.collect::<Vec<_>>(),
    })
}

fn ms(duration: Duration) -> u64 {
    duration.as_millis() as u64
}

fn route(r: &HttpRoute) -> Value {
    json!({
        "name": *r.name,
        "origin": *r.origin,
        "match": r.matches.iter().map(request_match).collect::<Vec<_>>(),
        "action": action(&r.action),
        "fault": fault(&r.fault),
        "request_headers": header_op(&r.headers.request),
        "response_headers": header_op(&r.headers.response),
        "rewrite": rewrite(&r.rewrite),
        "timeout_ms": r.timeout.map(ms),
        "retries": retries(&r.retries),
    })
}

fn string_match(m: &StringMatch) -> Value {
    match m {
        StringMatch::Exact(text) => json!({ "exact": text }),
        StringMatch::Prefix(text) => json!({ "prefix": text }),
        StringMatch::Regex(regex) => json!({ "regex": regex.as_str() }),
    }
}

fn request_match(m: &RequestMatch) -> Value {
    let optional = |m: &Option<StringMatch>| m.as_ref().map(string_match);
    let headers = |list: &[(http::HeaderName, HeaderMatch)]| -> Vec<Value> {
        let one = |(name, m): &(http::HeaderName, HeaderMatch)| match m {
            HeaderMatch::Present => json!({ "name": name.as_str(), "present": true }),
            HeaderMatch::Value(m) => json!({ "name": name.as_str(), "value": string_match(m) }),
        };
        list.iter().map(one).collect()
    };
    let query = m.query_params.iter().map(|(name, m)| json!({ "name": name, "value": string_match(m) }));
    let mut value = json!({
        "uri": optional(&m.uri),
        "ignore_uri_case": m.ignore_uri_case,
        "scheme": optional(&m.scheme),
        "method": optional(&m.method),
        "authority": optional(&m.authority),
        "headers": headers(&m.headers),
        "without_headers": headers(&m.without_headers),
        "query_params": query.collect::<Vec<_>>(),
        "port": m.port,
        "source_labels": m.source_labels,
        "source_namespace": m.source_namespace,
    });
    // Most conditions are absent, and none decides anything then.
    if let Some(object) = value.as_object_mut() {
        object.retain(|_, v| !v.is_null() && *v != json!([]) && *v != json!(false));
    }
    value
}

fn action(action: &RouteAction) -> Value {
    match action {
        RouteAction::Forward(backends) => {
            let one = backends.iter().map(|b| {
                let mut value = json!({
                    "weight": b.weight,
                    "request_headers": header_op(&b.headers.request),
                    "response_headers": header_op(&b.headers.response),
                });
                match &b.backend {
                    Backend::Cluster(c) => value["cluster"] = cluster(c),
                    Backend::Missing(why) => value["missing"] = json!(**why),
                }
                value
            });
            json!({ "forward": one.collect::<Vec<_>>() })
        }
        RouteAction::Redirect(r) => json!({ "redirect": {
            "uri": r.uri,
            "authority": r.authority,
            "port": r.port.map(|port| format!("{port:?}")),
            "scheme": r.scheme,
            "status": r.status.as_u16(),
        }}),
        RouteAction::Direct { status, body } => {
            json!({ "direct": { "status": status.as_u16(), "body_bytes": body.len() } })
        }
    }
}

fn fault(f: &Fault) -> Value {
    let percent = |share: crate::state::snapshot::Percentage| f64::from(share.0) / 100.0;
    let abort = |a: Abort| match a {
        Abort::Http(status) => json!({ "http_status": status.as_u16() }),
        Abort::Grpc(code) => json!({ "grpc_status": code }),
    };
    json!({
        "delay": f.delay.map(|(share, time)| json!({ "percent": percent(share), "ms": ms(time) })),
        "abort": f.abort.map(|(share, a)| json!({ "percent": percent(share), "with": abort(a) })),
    })
}

fn header_op(op: &HeaderOp) -> Value {
    let pairs = |list: &[(http::HeaderName, http::HeaderValue)]| -> Vec<Value> {
        list.iter().map(|(name, v)| json!([name.as_str(), String::from_utf8_lossy(v.as_bytes())])).collect()
    };
    if op.set.is_empty() && op.add.is_empty() && op.remove.is_empty() && op.authority.is_none() {
        return Value::Null;
    }
    json!({
        "set": pairs(&op.set),
        "add": pairs(&op.add),
        "remove": op.remove.iter().map(http::HeaderName::as_str).collect::<Vec<_>>(),
        "authority": op.authority.as_ref().map(http::uri::Authority::as_str),
    })
}

fn rewrite(r: &Rewrite) -> Value {
    let path = r.path.as_ref().map(|path| match path {
        PathRewrite::Uri(uri) => json!({ "uri": uri }),
        PathRewrite::Regex(regex, with) => json!({ "regex": regex.as_str(), "with": with }),
    });
    json!({ "path": path, "authority": r.authority.as_ref().map(http::uri::Authority::as_str) })
}

fn retries(r: &RetryPolicy) -> Value {
    json!({
        "attempts": r.attempts,
        "per_try_timeout_ms": r.per_try_timeout.map(ms),
        "backoff_ms": ms(r.backoff),
        "on": on(&r.on),
    })
}

/// The words of `retryOn`.
fn on(conditions: &RetryOn) -> Vec<String> {
    let named = [
        (conditions.server_error, "5xx"),
        (conditions.gateway_error, "gateway-error"),
        (conditions.reset, "reset"),
        (conditions.connect_failure, "connect-failure"),
        (conditions.refused_stream, "refused-stream"),
        (conditions.retriable_4xx, "retriable-4xx"),
    ];
    let words = named.iter().filter(|(set, _)| *set).map(|(_, word)| (*word).to_owned());
    let codes = conditions.status_codes.iter().map(ToString::to_string);
    words.chain(codes).chain(conditions.grpc.iter().map(|code| format!("grpc-{code}"))).collect()
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, sync::Arc};

    use http::{HeaderName, HeaderValue, StatusCode};

    use super::*;
    use crate::state::snapshot::{Balancing, HeaderOps, Percentage, WeightedBackend};

    fn route_of_everything() -> HttpRoute {
        let target = Cluster {
            name: "outbound|9080|v2|reviews.default.svc.cluster.local".into(),
            host: "reviews.default.svc.cluster.local".into(),
            service: "reviews".into(),
            namespace: "default".into(),
            port: 9080,
            protocol: Some(Protocol::Http1),
            subset: Some("v2".into()),
            endpoints: Vec::new(),
            balancing: Balancing::RoundRobin,
            connect_timeout: Duration::from_secs(10),
            state: Arc::default(),
        };
        let user =
            (HeaderName::from_static("end-user"), HeaderMatch::Value(StringMatch::Exact("jason".into())));
        let backend = |backend| WeightedBackend { weight: 50, headers: HeaderOps::default(), backend };
        HttpRoute {
            name: "jason".into(),
            origin: "VirtualService default/reviews".into(),
            matches: vec![RequestMatch { headers: vec![user], ..RequestMatch::default() }],
            action: RouteAction::Forward(vec![
                backend(Backend::Cluster(Arc::new(target))),
                backend(Backend::Missing("subset v9 does not exist".into())),
            ]),
            fault: Fault {
                delay: Some((Percentage(10_000), Duration::from_secs(2))),
                abort: Some((Percentage(50), Abort::Http(StatusCode::IM_A_TEAPOT))),
            },
            headers: HeaderOps {
                request: HeaderOp {
                    set: vec![(HeaderName::from_static("x-a"), HeaderValue::from_static("1"))],
                    ..HeaderOp::default()
                },
                response: HeaderOp::default(),
            },
            rewrite: Rewrite { path: Some(PathRewrite::Uri("/v1".into())), authority: None },
            timeout: None,
            retries: RetryPolicy {
                attempts: 2,
                per_try_timeout: Some(Duration::from_millis(250)),
                on: RetryOn {
                    server_error: true,
                    status_codes: vec![404],
                    grpc: vec![14],
                    ..RetryOn::default()
                },
                backoff: Duration::from_millis(25),
            },
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
                }},
                {"weight": 50, "request_headers": null, "response_headers": null,
                    "missing": "subset v9 does not exist"},
            ]},
            "fault": {
                "delay": {"percent": 100.0, "ms": 2000},
                "abort": {"percent": 0.5, "with": {"http_status": 418}},
            },
            "request_headers": {"set": [["x-a", "1"]], "add": [], "remove": [], "authority": null},
            "response_headers": null,
            "rewrite": {"path": {"uri": "/v1"}, "authority": null},
            "timeout_ms": null,
            "retries": {
                "attempts": 2, "per_try_timeout_ms": 250, "backoff_ms": 25, "on": ["5xx", "404", "grpc-14"],
            },
        });
        assert_eq!(route(&route_of_everything()), expected);
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
                enrolled: false,
                netns: None,
                workload_name: name.into(),
                canonical_service: name.into(),
                canonical_revision: "latest".into(),
            });
            workloads.extend(ips.into_iter().map(|ip: std::net::IpAddr| (ip, pod.clone())));
        }
        let dump = config(&Snapshot { workloads, ..Snapshot::default() }, &[]);
        let names: Vec<_> = dump["workloads"].as_array().into_iter().flatten().map(|w| &w["name"]).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(dump["workloads"][0]["identity"], "spiffe://t/ns/default/sa/a");
    }
}
