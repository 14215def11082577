//! Envoy as a pair of proxies: HTTP in, HTTP/2 over mutual TLS between the two, HTTP out; or bytes throughout.

use std::{net::SocketAddr, path::PathBuf, process::Command};

use anyhow::Result;
use lab::{clients::tool, servers::as_nobody};
use serde_json::{Value, json};

use super::{
    Traffic,
    room::{NAME, Room},
};

const TYPES: &str = "type.googleapis.com/envoy.extensions";

/// Where `cargo xtask bench` puts it.
pub fn program() -> Result<PathBuf> {
    tool("tools/bin/envoy")
}

/// Takes what the client sends and sends it on over mutual TLS.
pub fn outbound(room: &Room, traffic: Traffic, listen: SocketAddr, peer: SocketAddr) -> Result<Command> {
    let mut next = cluster(peer, traffic != Traffic::Bytes);
    let mut tls = common_tls(room, traffic);
    tls["validation_context"]["match_typed_subject_alt_names"] =
        json!([{ "san_type": "DNS", "matcher": { "exact": NAME } }]);
    next["transport_socket"] =
        transport("UpstreamTlsContext", json!({ "sni": NAME, "common_tls_context": tls }));
    start(room, &listener(traffic, listen, None), &next)
}

/// Takes mutual TLS and sends it on to the app.
pub fn inbound(room: &Room, traffic: Traffic, listen: SocketAddr, app: SocketAddr) -> Result<Command> {
    let tls = json!({ "require_client_certificate": true, "common_tls_context": common_tls(room, traffic) });
    let listener = listener(traffic, listen, Some(transport("DownstreamTlsContext", tls)));
    start(room, &listener, &cluster(app, traffic == Traffic::Grpc))
}

fn address(of: SocketAddr) -> Value {
    json!({ "socket_address": { "address": of.ip().to_string(), "port_value": of.port() } })
}

fn cluster(next: SocketAddr, http2: bool) -> Value {
    let endpoint = json!({ "endpoint": { "address": address(next) } });
    let mut cluster = json!({
        "name": "next",
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": { "cluster_name": "next", "endpoints": [{ "lb_endpoints": [endpoint] }] },
        // Its circuit breakers would be the limit, at 1,024 of each.
        "circuit_breakers": { "thresholds": [{
            "max_connections": 100_000, "max_pending_requests": 100_000, "max_requests": 100_000,
        }]},
    });
    if http2 {
        cluster["typed_extension_protocol_options"] = json!({ "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": format!("{TYPES}.upstreams.http.v3.HttpProtocolOptions"),
            "explicit_http_config": { "http2_protocol_options": {} },
        }});
    }
    cluster
}

fn common_tls(room: &Room, traffic: Traffic) -> Value {
    let protocols: &[&str] = if traffic == Traffic::Bytes { &[] } else { &["h2"] };
    let file = |name: &str| json!({ "filename": room.path().join(name) });
    json!({
        "tls_params": { "tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3" },
        "tls_certificates": [{ "certificate_chain": file("cert.pem"), "private_key": file("key.pem") }],
        "validation_context": { "trusted_ca": file("ca.pem") },
        "alpn_protocols": protocols,
    })
}

fn transport(kind: &str, mut context: Value) -> Value {
    context["@type"] = json!(format!("{TYPES}.transport_sockets.tls.v3.{kind}"));
    json!({ "name": "envoy.transport_sockets.tls", "typed_config": context })
}

fn listener(traffic: Traffic, at: SocketAddr, tls: Option<Value>) -> Value {
    let mut chain = json!({ "filters": [if traffic == Traffic::Bytes { bytes() } else { http() }] });
    if let Some(tls) = tls {
        chain["transport_socket"] = tls;
    }
    json!({ "name": "in", "address": address(at), "filter_chains": [chain] })
}

fn bytes() -> Value {
    json!({ "name": "envoy.filters.network.tcp_proxy", "typed_config": {
        "@type": format!("{TYPES}.filters.network.tcp_proxy.v3.TcpProxy"),
        "stat_prefix": "bench",
        "cluster": "next",
    }})
}

fn http() -> Value {
    let manager = json!({
        "@type": format!("{TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": "bench",
        "route_config": { "virtual_hosts": [{
            "name": "all",
            "domains": ["*"],
            "routes": [{ "match": { "prefix": "/" }, "route": { "cluster": "next" } }],
        }]},
        "http_filters": [{
            "name": "envoy.filters.http.router",
            "typed_config": { "@type": format!("{TYPES}.filters.http.router.v3.Router") },
        }],
    });
    json!({ "name": "envoy.filters.network.http_connection_manager", "typed_config": manager })
}

fn start(room: &Room, listener: &Value, cluster: &Value) -> Result<Command> {
    let config = json!({ "static_resources": { "listeners": [listener], "clusters": [cluster] } });
    room.write("envoy.json", &config.to_string())?;
    let mut command = as_nobody(program()?);
    command.arg("-c").arg(room.path().join("envoy.json")).args([
        "--disable-hot-restart",
        "--log-level",
        "error",
    ]);
    command.args(["--concurrency", &std::thread::available_parallelism()?.to_string()]);
    Ok(command)
}
