//! What a gateway serves, in the dump. Of certificates and keys, whether there are any. Tested in `tests.rs`.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{route, stream};
use crate::state::snapshot::{
    Gateway, GatewayPort, Served, ServerTls, StreamRoute, TlsAction, TlsServer, TlsVersion, VirtualHost,
    VirtualHosts,
};

pub(super) fn gateway(gateway: &Gateway) -> Value {
    json!({
        "workload": format!("{}/{}", gateway.workload.namespace, gateway.workload.name),
        "identity": gateway.workload.identity.to_string(),
        "ports": gateway.ports.iter().map(|one| port(one)).collect::<Vec<_>>(),
    })
}

fn port(port: &GatewayPort) -> Value {
    let mut value = match &port.serves {
        Served::Http(hosts) => json!({ "serves": "http", "virtual_hosts": virtual_hosts(hosts) }),
        Served::Tcp(routes) => json!({ "serves": "tcp", "streams": streams(routes) }),
        Served::Tls(all) => {
            let servers = all.entries().map(|(host, server)| tls_server(&host, server));
            json!({ "serves": "tls", "servers": servers.collect::<Vec<_>>() })
        }
    };
    value["port"] = json!(port.number);
    value
}

fn tls_server(host: &str, server: &TlsServer) -> Value {
    let mut value = match &server.action {
        TlsAction::PassThrough(routes) => json!({ "passes": true, "streams": streams(routes) }),
        TlsAction::Stream(ends, routes) => json!({ "tls": tls(ends), "streams": streams(routes) }),
        TlsAction::Http(ends, hosts) => json!({ "tls": tls(ends), "virtual_hosts": virtual_hosts(hosts) }),
    };
    value["host"] = json!(host);
    value["origin"] = json!(*server.origin);
    value
}

fn tls(tls: &ServerTls) -> Value {
    let version = |version: TlsVersion| match version {
        TlsVersion::V1_2 => "TLSV1_2",
        TlsVersion::V1_3 => "TLSV1_3",
    };
    let terms = &tls.terms;
    json!({
        "mode": format!("{:?}", terms.mode),
        "broken": tls.read.as_ref().err().map(|why| &**why),
        "subject_alt_names": terms.names.iter().map(|name| &**name).collect::<Vec<_>>(),
        "asks_what_is_revoked": terms.revoked.is_some(),
        "versions": [version(terms.least), version(terms.most)],
        "cipher_suites": terms.ciphers.iter().map(|one| format!("{:?}", one.suite())).collect::<Vec<_>>(),
    })
}

fn virtual_hosts(hosts: &VirtualHosts) -> Vec<Value> {
    let one = |host: &VirtualHost| {
        json!({
            "domain": *host.domain,
            "origin": *host.origin,
            "https_redirect": host.https_redirect,
            "routes": host.routes.iter().map(|one| route(one)).collect::<Vec<_>>(),
        })
    };
    hosts.entries().map(|(_, host)| one(host)).collect()
}

fn streams(routes: &[Arc<StreamRoute>]) -> Vec<Value> {
    routes.iter().map(|one| stream(one)).collect()
}
