//! The snapshot as JSON, for `/config_dump`: what the agent acts on, after all defaults.
//!
//! Promises to show every field that decides anything, and the same text for the same snapshot. Never shows a
//! secret: of the keys that a rule refers to, whether there are any. Tested in `dump/tests.rs`.

use std::{collections::BTreeMap, time::Duration};

use serde_json::{Value, json};

mod cluster;
mod gateway;
mod policies;
#[cfg(test)]
mod tests;

use self::cluster::cluster;
use crate::state::snapshot::{
    Abort, Action, Applied, AppliedTokens, Authentication, Authorization, Backend, CapturePolicy, CorsPolicy,
    Exclusions, Fault, HeaderMatch, HeaderOp, HttpRoute, Keys, Mirror, Mtls, PathRewrite, Percentage, Policy,
    Protocol, RequestMatch, RetryOn, RetryPolicy, Rewrite, RouteAction, Service, ServicePort, Snapshot,
    SniHost, StreamMatch, StreamRoute, StringMatch, TokenRule, Tokens, Visibility, WeightedBackend,
    WhenAgentIsDown, Workload,
};

/// The whole snapshot.
pub(super) fn config(snapshot: &Snapshot, problems: &[String]) -> Value {
    // A pod is in the snapshot once for each address.
    let workloads: BTreeMap<_, _> =
        snapshot.workloads.values().map(|w| ((&w.namespace, &w.name), workload(w))).collect();
    let services: BTreeMap<_, _> = snapshot.services.iter().map(|(host, s)| (host, service(s))).collect();
    let mut value = json!({
        "revision": snapshot.revision,
        "problems": problems.iter().cloned().chain(missing_keys(snapshot)).collect::<Vec<_>>(),
        "workloads": workloads.into_values().collect::<Vec<_>>(),
        "services": services.into_values().collect::<Vec<_>>(),
        "key_sets": key_sets(snapshot),
        "health_checks": policies::health_checks(snapshot),
        "guards": policies::guards(snapshot),
    });
    // Of a gateway's own process alone.
    if let Some(served) = &snapshot.gateway {
        value["gateway"] = gateway::gateway(served);
    }
    value
}

/// Key sets that are not there: that is no mistake in the configuration, and refuses all the same.
fn missing_keys(snapshot: &Snapshot) -> Vec<String> {
    let missing = key_sets(snapshot).into_iter().filter(|(_, keys)| keys.is_none());
    let message = |(uri, _)| {
        format!("the key set of {uri} has not been fetched yet: the tokens that need it are refused")
    };
    missing.map(message).collect()
}

/// Key sets that are fetched, each with the number of its keys; `null` before it was fetched.
fn key_sets(snapshot: &Snapshot) -> BTreeMap<&str, Option<usize>> {
    snapshot.key_sets.iter().map(|(uri, cell)| (&**uri, cell.get().map(|keys| keys.len()))).collect()
}

fn workload(w: &Workload) -> Value {
    let mut value = json!({
        "namespace": *w.namespace,
        "name": *w.name,
        "ips": w.ips,
        "node": w.node.as_deref(),
        "identity": w.identity.to_string(),
        "labels": w.labels.iter().map(|(k, v)| (k.to_string(), json!(**v))).collect::<serde_json::Map<_, _>>(),
        "enrolled": w.enrolled,
        "netns": w.netns,
        "capture": capture(&w.capture),
        "mtls": authentication(&w.authentication),
        "authorization": authorization(&w.authorization),
        "tokens": tokens(&w.authentication.tokens),
        "workload_name": *w.workload_name,
        "canonical_service": *w.canonical_service,
        "canonical_revision": *w.canonical_revision,
    });
    if let Some(view) = &w.view {
        value["view"] = json!(**view);
    }
    value
}

/// Whether a pod takes plaintext, on which ports it is otherwise, and who says so.
fn authentication(all: &Authentication) -> Value {
    let mode = |one: &Mtls| json!({ "mode": one.mode.word(), "by": one.by.as_deref() });
    let mut value = mode(&all.mtls);
    if !all.ports.is_empty() {
        let ports: BTreeMap<_, _> =
            all.ports.iter().map(|(port, one)| (port.to_string(), mode(one))).collect();
        value["ports"] = json!(ports);
    }
    value
}

/// Whose tokens a pod believes, and whether their keys are there: without them its tokens are refused.
fn tokens(all: &Tokens) -> Value {
    let rule = |rule: &TokenRule| {
        json!({
            "issuer": rule.issuer,
            "audiences": rule.audiences,
            "keys": rule.keys.get().map(|keys| keys.len()),
            "keys_from": match &rule.keys {
                Keys::Inline(_) => None,
                Keys::Remote(remote) => Some(&*remote.uri),
            },
        })
    };
    let one = |one: &AppliedTokens| {
        let rules: Vec<_> = one.rules.iter().map(rule).collect();
        json!({ "by": *one.name, "ports": one.ports, "rules": rules })
    };
    all.rules.iter().map(one).collect()
}

/// The policies that select a pod, by what they do; each as `NAMESPACE/NAME`, with its ports where it has its own.
fn authorization(all: &Authorization) -> Value {
    let names = |applied: &[Applied]| {
        let name = |one: &Applied| {
            let Policy { namespace, name, action, rules, .. } = &*one.policy;
            let mut value = json!({
                "policy": format!("{namespace}/{name}"),
                "action": action.word(),
                "rules": rules.len(),
                "ports": one.ports,
            });
            if *action == Action::Custom {
                value["provider"] = json!(one.provider.as_ref().map(|provider| &*provider.name));
            }
            value
        };
        applied.iter().map(name).collect::<Vec<_>>()
    };
    json!({
        "custom": names(&all.custom),
        "deny": names(&all.deny),
        "allow": names(&all.allow),
        "not_enforced": names(&all.noted),
    })
}

fn capture(asked: &CapturePolicy) -> Value {
    let exclusions = |one: &Exclusions| {
        let ports: Vec<_> = one.ports.iter().map(ToString::to_string).collect();
        let cidrs: Vec<_> = one.cidrs.iter().map(ToString::to_string).collect();
        json!({ "ports": ports, "cidrs": cidrs })
    };
    json!({
        "exclude_outbound": exclusions(&asked.exclude_outbound),
        "exclude_inbound": exclusions(&asked.exclude_inbound),
        "when_agent_is_down": asked.when_agent_is_down.map(WhenAgentIsDown::word),
    })
}

fn service(s: &Service) -> Value {
    let mut value = json!({
        "host": *s.host,
        "name": *s.name,
        "namespace": *s.namespace,
        "vips": s.vips,
        "ports": s.ports.iter().map(port).collect::<Vec<_>>(),
    });
    // Most services are the same for everybody, and visible to all.
    if let Visibility::Namespaces(namespaces) = &s.visible {
        value["visible_to"] = json!(namespaces.iter().map(|one| &**one).collect::<Vec<_>>());
    }
    if !s.views.is_empty() {
        let views: BTreeMap<&str, Vec<Value>> =
            s.views.iter().map(|(client, ports)| (&**client, ports.iter().map(port).collect())).collect();
        value["views"] = json!(views);
    }
    value
}

fn port(p: &ServicePort) -> Value {
    json!({
        "port": p.port,
        "protocol": p.protocol.map(protocol),
        "cluster": cluster(&p.cluster),
        "routes": p.routes.iter().map(|r| route(r)).collect::<Vec<_>>(),
        "streams": p.streams.iter().map(|r| stream(r)).collect::<Vec<_>>(),
    })
}

fn protocol(p: Protocol) -> &'static str {
    match p {
        Protocol::Http1 => "http1",
        Protocol::Http2 => "http2",
        Protocol::Opaque => "opaque",
    }
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
        "mirrors": r.mirrors.iter().map(mirror).collect::<Vec<_>>(),
        "cors": r.cors.as_deref().map(cors),
        "stat_name": r.stat_name.as_deref(),
    })
}

fn mirror(m: &Mirror) -> Value {
    let mut value = json!({ "percent": percent(m.percentage) });
    backend(&mut value, &m.backend);
    value
}

fn cors(c: &CorsPolicy) -> Value {
    let text = |value: &Option<http::HeaderValue>| {
        value.as_ref().map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
    };
    json!({
        "allow_origins": c.allow_origins.iter().map(string_match).collect::<Vec<_>>(),
        "allow_methods": text(&c.allow_methods),
        "allow_headers": text(&c.allow_headers),
        "expose_headers": text(&c.expose_headers),
        "max_age": text(&c.max_age),
        "allow_credentials": c.allow_credentials,
        "unmatched_preflights": format!("{:?}", c.unmatched_preflights),
    })
}

fn stream(r: &StreamRoute) -> Value {
    json!({
        "name": *r.name,
        "origin": *r.origin,
        "match": r.matches.iter().map(stream_match).collect::<Vec<_>>(),
        "forward": r.backends.iter().map(weighted).collect::<Vec<_>>(),
    })
}

fn stream_match(m: &StreamMatch) -> Value {
    let sni = m.sni_hosts.iter().map(|host| match host {
        SniHost::Any => "*".to_owned(),
        SniHost::Exact(name) => name.clone(),
        SniHost::Below(suffix) => format!("*{suffix}"),
    });
    set_only(json!({
        "sni_hosts": sni.collect::<Vec<_>>(),
        "destination_subnets": m.destination_subnets.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "port": m.port,
        "source_labels": m.source_labels,
        "source_namespace": m.source_namespace,
        "source_subnet": m.source_subnet.map(|subnet| subnet.to_string()),
    }))
}

/// Most conditions are absent, and none decides anything then.
fn set_only(mut value: Value) -> Value {
    if let Some(object) = value.as_object_mut() {
        object.retain(|_, v| !v.is_null() && *v != json!([]) && *v != json!(false));
    }
    value
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
    set_only(json!({
        "name": m.name.as_deref(),
        "stat_prefix": m.stat_prefix.as_deref(),
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
    }))
}

fn action(action: &RouteAction) -> Value {
    match action {
        RouteAction::Forward(backends) => {
            json!({ "forward": backends.iter().map(weighted).collect::<Vec<_>>() })
        }
        RouteAction::Redirect(r) => json!({ "redirect": {
            "uri": r.uri,
            "prefix": r.prefix,
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

fn weighted(b: &WeightedBackend) -> Value {
    let mut value = json!({
        "weight": b.weight,
        "request_headers": header_op(&b.headers.request),
        "response_headers": header_op(&b.headers.response),
    });
    backend(&mut value, &b.backend);
    value
}

fn backend(value: &mut Value, backend: &Backend) {
    match backend {
        Backend::Cluster(c) => value["cluster"] = cluster(c),
        Backend::Missing(why) => value["missing"] = json!(**why),
    }
}

fn percent(share: Percentage) -> f64 {
    f64::from(share.0) / f64::from(Percentage::PERCENT)
}

fn fault(f: &Fault) -> Value {
    let abort = |a: Abort| match a {
        Abort::Http(status) => json!({ "http_status": status.as_u16() }),
        Abort::Grpc(code) => json!({ "grpc_status": code }),
    };
    json!({
        "delay": f.delay.map(|(share, time)| json!({ "percent": percent(share), "ms": ms(time) })),
        "abort": f.abort.map(|(share, a)| json!({ "percent": percent(share), "with": abort(a) })),
        "by_header": f.by_header,
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
        "remote_localities": r.remote_localities,
        "ignore_previous_hosts": r.ignore_previous_hosts,
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
        (conditions.retriable_headers, "retriable-headers"),
        (conditions.envoy_ratelimited, "envoy-ratelimited"),
        (conditions.reset_before_request, "reset-before-request"),
    ];
    let words = named.iter().filter(|(set, _)| *set).map(|(_, word)| (*word).to_owned());
    let codes = conditions.status_codes.iter().map(ToString::to_string);
    words.chain(codes).chain(conditions.grpc.iter().map(|code| format!("grpc-{code}"))).collect()
}
