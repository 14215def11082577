//! Envoy as a pair of proxies: HTTP/1.1 in, HTTP/2 over mutual TLS between the two, HTTP/1.1 out.

use std::{net::SocketAddr, path::PathBuf, process::Command};

use anyhow::Result;
use lab::{clients::tool, servers::as_nobody};
use serde_json::{Value, json};

use super::room::{NAME, Room};

const TYPES: &str = "type.googleapis.com/envoy.extensions";

/// Where `cargo xtask bench` puts it.
pub fn program() -> Result<PathBuf> {
    tool("tools/bin/envoy")
}

/// Takes HTTP/1.1 and sends it on over mutual TLS.
pub fn outbound(room: &Room, listen: SocketAddr, peer: SocketAddr) -> Result<Command> {
    let mut next = cluster(peer);
    let protocol = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
    next["typed_extension_protocol_options"] = json!({ protocol: {
        "@type": format!("{TYPES}.upstreams.http.v3.HttpProtocolOptions"),
        "explicit_http_config": { "http2_protocol_options": {} },
    }});
    let mut tls = common_tls(room);
    tls["validation_context"]["match_typed_subject_alt_names"] =
        json!([{ "san_type": "DNS", "matcher": { "exact": NAME } }]);
    next["transport_socket"] =
        transport("UpstreamTlsContext", json!({ "sni": NAME, "common_tls_context": tls }));
    start(room, &listener(listen, None), &next)
}

/// Takes mutual TLS and sends it on to the app.
pub fn inbound(room: &Room, listen: SocketAddr, app: SocketAddr) -> Result<Command> {
    let tls = json!({ "require_client_certificate": true, "common_tls_context": common_tls(room) });
    start(room, &listener(listen, Some(transport("DownstreamTlsContext", tls))), &cluster(app))
}

fn address(of: SocketAddr) -> Value {
    json!({ "socket_address": { "address": of.ip().to_string(), "port_value": of.port() } })
}

fn cluster(next: SocketAddr) -> Value {
    let endpoint = json!({ "endpoint": { "address": address(next) } });
    json!({
        "name": "next",
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": { "cluster_name": "next", "endpoints": [{ "lb_endpoints": [endpoint] }] },
    })
}

fn common_tls(room: &Room) -> Value {
    let file = |name: &str| json!({ "filename": room.path().join(name) });
    json!({
        "tls_params": { "tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3" },
        "tls_certificates": [{ "certificate_chain": file("cert.pem"), "private_key": file("key.pem") }],
        "validation_context": { "trusted_ca": file("ca.pem") },
        "alpn_protocols": ["h2"],
    })
}

fn transport(kind: &str, mut context: Value) -> Value {
    context["@type"] = json!(format!("{TYPES}.transport_sockets.tls.v3.{kind}"));
    json!({ "name": "envoy.transport_sockets.tls", "typed_config": context })
}

fn listener(at: SocketAddr, tls: Option<Value>) -> Value {
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
    let filter = json!({ "name": "envoy.filters.network.http_connection_manager", "typed_config": manager });
    let mut chain = json!({ "filters": [filter] });
    if let Some(tls) = tls {
        chain["transport_socket"] = tls;
    }
    json!({ "name": "in", "address": address(at), "filter_chains": [chain] })
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
