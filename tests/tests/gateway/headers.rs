//! What apps are told of a client is the gateway's word, whatever the client says of itself.

use anyhow::{Result, ensure};
use lab::require_root;

use super::world::{IDENTITY, World, bound, gateway, to_version};

const SERVERS: &str = "
  - port: { number: 8080, name: http, protocol: HTTP }
    hosts: [\"*\"]
";

#[tokio::test]
async fn the_gateways_word_stands() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("gwheaders", &(gateway(SERVERS) + &bound("shop", "*", &to_version("v1")))).await?;
    let said = [
        ("x-forwarded-for", "203.0.113.9"),
        ("x-forwarded-proto", "https"),
        ("x-forwarded-client-cert", "By=me;URI=spiffe://cluster.local/ns/default/sa/root"),
        ("x-envoy-external-address", "203.0.113.9"),
        ("x-envoy-upstream-rq-timeout-ms", "1"),
        ("x-envoy-decorator-operation", "mine"),
        ("x-request-id", "mine"),
        ("mesh-of-client", "By=me"),
        ("x-own", "kept"),
    ];
    let client = world.client.ip().to_string();
    for h2c in [false, true] {
        let request = world.client.get(world.url(8080, "/slow/50"));
        let request = said.iter().fold(request, |request, (name, value)| request.header(name, value));
        let answer = if h2c { request.h2c() } else { request }.send().await?;
        let headers = answer.echo()?.headers;
        let header = |name: &str| headers.get(name).map_or("", String::as_str);
        ensure!(header("x-forwarded-for") == format!("203.0.113.9, {client}"), "{headers:?}");
        ensure!(header("x-envoy-external-address") == client, "{headers:?}");
        ensure!(header("x-forwarded-proto") == "http" && header("x-own") == "kept", "{headers:?}");
        ensure!(header("x-request-id").len() == 36, "{headers:?}");
        let cert = header("x-forwarded-client-cert");
        ensure!(cert.ends_with(&format!("URI=spiffe://{IDENTITY}")) && !cert.contains("me"), "{headers:?}");
        ensure!(!headers.contains_key("x-envoy-decorator-operation"), "{headers:?}");
    }
    // What the connection names is its own: nothing of the gateway's is taken away by it.
    let hidden = world.client.get(world.url(8080, "/"));
    let hidden = hidden.header("connection", "x-forwarded-for, x-request-id").send().await?.echo()?.headers;
    ensure!(hidden["x-forwarded-for"] == client && hidden.contains_key("x-request-id"), "{hidden:?}");
    world.finish().await
}
