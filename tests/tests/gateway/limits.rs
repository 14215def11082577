//! Who is slow or silent at a gateway is given up; who only looks whether somebody listens is no refusal.

use anyhow::{Result, ensure};
use lab::{eventually, peer, pki::Authority, require_root};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::world::{World, bound, gateway, leaf, secret, to_version};

const SERVERS: &str = "
  - port: { number: 8080, name: http, protocol: HTTP }
    hosts: [a.example]
  - port: { number: 8443, name: https, protocol: HTTPS }
    hosts: [a.example]
    tls: { mode: SIMPLE, credentialName: a }
";

#[tokio::test]
async fn the_slow_are_given_up_and_lookers_are_no_refusal() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let root = Authority::root("servers")?;
    let manifests = gateway(SERVERS)
        + &bound("a", "a.example", &to_version("v1"))
        + &secret("a", &leaf(&root, "a.example", None)?, None);
    let flags = ["--request-head-timeout", "1", "--idle-timeout", "1", "--max-request-headers", "20"];
    let world = World::with("gwlimits", &manifests, &flags).await?;
    let at = |port| world.gateway.pod().at(port);
    for port in [8080, 8443] {
        drop(peer::dial(&world.client, at(port))?);
    }
    // Says nothing, says a part, says what is no TLS: each is closed by the gateway.
    let said: [(u16, &[u8]); 5] = [
        (8080, b""),
        (8080, b"GET / HTTP/1.1\r\nHost: a.ex"),
        (8443, b""),
        (8443, b"\x16\x03\x01\x02\x00\x01"),
        (8443, b"GET / HTTP/1.1\r\n\r\n"),
    ];
    for (port, bytes) in said {
        let mut client = peer::dial(&world.client, at(port))?;
        client.write_all(bytes).await?;
        // Closed or reset, it ends.
        let _ = client.read_to_end(&mut Vec::new()).await;
    }
    let many = (0..30)
        .fold(world.client.get(world.url(8080, "/")).header("host", "a.example"), |request, n| {
            request.header(&format!("x-{n}"), "1")
        });
    let refused = many.send().await?;
    ensure!(refused.status == 431, "{refused:?}");
    let ok = world.client.get(world.url(8080, "/")).header("host", "a.example").send().await?;
    ensure!(ok.status == 200, "{ok:?}");
    eventually("the refusals in the access log", async || {
        let lines = world.gateway.logged(&[("event", "refused")]);
        let has = |why: &str| lines.iter().filter(|line| line.contains(why)).count();
        ensure!(has("no ClientHello within 1s") == 2 && has("is no TLS") == 1, "{lines:#?}");
        ensure!(lines.len() == 3, "{lines:#?}");
        Ok(())
    })
    .await?;
    world.finish().await
}
