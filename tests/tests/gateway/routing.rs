//! Requests are routed by host, path and headers to subsets in the mesh; what nobody has is not found.

use anyhow::{Result, ensure};
use lab::{apps, eventually, metric, require_root};

use super::world::{APP, IDENTITY, World, bound, gateway, to_version};

const SERVERS: &str = "
  - port: { number: 8080, name: http, protocol: HTTP }
    hosts: [shop.example]
  - port: { number: 8081, name: moved, protocol: HTTP }
    hosts: [\"*\"]
    tls: { httpsRedirect: true }
";

const CALLS: &str = "
  - port: { number: 8082, name: grpc, protocol: GRPC }
    hosts: [\"*\"]
";

const SHOP: &str = "
  http:
  - match: [{ headers: { end-user: { exact: jason } } }]
    route: [{ destination: { host: shop, subset: v2 } }]
  - match: [{ uri: { prefix: /old } }]
    redirect: { uri: /new }
  - match: [{ uri: { prefix: /shop/ } }]
    rewrite: { uri: / }
    route: [{ destination: { host: shop, subset: v1 } }]
";

#[tokio::test]
async fn by_host_path_and_header_into_the_mesh() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let calls = bound("calls", "*", "  http:\n  - route: [{ destination: { host: calls } }]\n");
    let manifests = [
        &gateway(SERVERS),
        "\n---\n",
        &gateway(CALLS).replace("name: edge", "name: calls"),
        &bound("shop", "shop.example", SHOP),
        &calls.replace("[edge]", "[calls]"),
    ];
    let manifests = manifests.concat();
    let world = World::new("gwroutes", &manifests).await?;
    world.v1.serve(apps::grpc(9090)).await?;
    world.lab.service("calls").selector("version", "v1").port("grpc", 90, 9090).apply()?;
    world.settled().await?;
    let ask = |path: &str| world.client.get(world.url(8080, path)).header("host", "Shop.Example:8080");

    let answer = ask("/shop/1").send().await?;
    let echo = answer.echo()?;
    ensure!(
        echo.pod == "shop-v1" && echo.target == "/1" && echo.authority == "Shop.Example:8080",
        "{echo:?}"
    );
    // Who has dialled the app is the gateway, which is no pod of the mesh.
    ensure!(echo.peer.ip() == world.gateway.pod().ip(), "{echo:?}");
    ensure!(ask("/any").header("end-user", "jason").send().await?.pod() == Some(world.v2.name()));
    let over_h2 = ask("/shop/2").h2c().send().await?;
    ensure!(over_h2.version == "HTTP/2.0" && over_h2.pod() == Some("shop-v1"), "{over_h2:?}");
    let moved = ask("/old").send().await?;
    ensure!(
        (moved.status, &*moved.headers["location"]) == (301, "http://Shop.Example:8080/new"),
        "{moved:?}"
    );
    ensure!(ask("/none").send().await?.status == 404);
    let stranger = world.client.get(world.url(8080, "/shop")).header("host", "other.example").send().await?;
    ensure!(stranger.status == 404, "{stranger:?}");
    let told = world.client.get(world.url(8081, "/a?b=c")).header("host", "any.example").send().await?;
    ensure!((told.status, &*told.headers["location"]) == (301, "https://any.example/a?b=c"), "{told:?}");

    let called = world.client.grpc(&world.url(8082, ""), "count/3").await?;
    ensure!(called.pod.as_deref() == Some("shop-v1") && called.stream.len() == 3, "{called:?}");

    // It counts as what the gateway's pod asks of the shop, by mutual TLS.
    let labels = [
        ("reporter", "source"),
        ("source_workload", "edge"),
        ("destination_workload", "shop-v1"),
        ("connection_security_policy", "mutual_tls"),
        ("response_code", "200"),
        ("request_protocol", "http"),
    ];
    eventually("the requests in the gateway's metrics", async || {
        let metrics = world.gateway.metrics().await?;
        let counted = metric(&metrics, "istio_requests_total", &labels);
        ensure!((counted - 2.0).abs() < f64::EPSILON, "{counted}: {metrics}");
        Ok(())
    })
    .await?;
    ensure!(world.gateway.logged(&[("path", "/shop"), ("status", "404"), ("flags", "NR")]).len() == 1);
    let cert = world.gateway.meshctl(&["certs"]).await?;
    ensure!(cert.contains(&format!("spiffe://{IDENTITY}")), "{cert}");
    let status = world.gateway.meshctl(&["status"]).await?;
    ensure!(status.contains("gateway default/edge"), "{status}");
    world.finish().await
}

#[tokio::test]
async fn a_change_holds_for_kept_connections() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let manifests = gateway(SERVERS) + &bound("shop", "shop.example", &to_version("v1"));
    let world = World::new("gwkept", &manifests).await?;
    // One connection over which requests go before and after the change.
    let kept = tokio::spawn({
        let (client, url) = (world.client.clone(), world.url(8080, "/slow/1500"));
        let next = world.url(8080, "/");
        async move { client.curl(&["-H", "Host: shop.example", &url, &next]).await }
    });
    eventually("a request that is under way", async || {
        let stats = world.v1.stats(APP).await?;
        ensure!(stats.paths.contains_key("/slow/1500"), "{stats:?}");
        Ok(())
    })
    .await?;
    let changed = gateway(SERVERS) + &bound("shop", "shop.example", &to_version("v2"));
    world.apply("gateway.yaml", &changed).await?;
    let kept = kept.await??;
    let pods: Vec<&str> = kept
        .transfers
        .iter()
        .filter_map(|one| one.headers.get("x-lab-pod")?.first())
        .map(|pod| &**pod)
        .collect();
    ensure!(pods == ["shop-v1", "shop-v2"] && kept.transfers[1].connects == 0, "{kept:?}");
    world.finish().await
}

#[tokio::test]
async fn pods_of_its_own_node_are_reached_as_those_of_others_and_strangers_in_the_clear() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let rules = "
  http:
  - match: [{ uri: { prefix: /near } }]
    route: [{ destination: { host: near } }]
  - match: [{ uri: { prefix: /plain } }]
    route: [{ destination: { host: plain } }]
  - route: [{ destination: { host: shop, subset: v1 } }]
";
    let everywhere = "  - port: { number: 8080, name: http, protocol: HTTP }\n    hosts: [\"*\"]\n";
    let world = World::new("gwnear", &(gateway(everywhere) + &bound("shop", "*", rules))).await?;
    let node = world.lab.node("a").await?;
    let near = node.pod("near").label("app", "near").start().await?;
    let plain = node.pod("plain").label("app", "plain").unenrolled().start().await?;
    for pod in [&near, &plain] {
        pod.serve(apps::http(APP)).await?;
        world.lab.service(pod.name()).selector("app", pod.name()).port("http", 80, APP).apply()?;
    }
    near.enrolled().await?;
    world.settled().await?;
    for (path, security) in [("/near", "mutual_tls"), ("/plain", "none")] {
        let answer = world.client.get(world.url(8080, path)).send().await?;
        ensure!(answer.pod() == path.strip_prefix('/'), "{path}: {answer:?}");
        let logged = || world.gateway.logged(&[("path", path), ("security", security), ("status", "200")]);
        eventually("the request in the access log", async || {
            ensure!(logged().len() == 1, "{path} {security}");
            Ok(())
        })
        .await?;
    }
    // What changes its protocol on the way does so through a gateway too.
    let socket = world.client.websockets(&world.url(8080, "/ws").replace("http:", "ws:")).await?;
    ensure!(socket.binary_bytes == 1_000_000 && socket.pod.as_deref() == Some("shop-v1"), "{socket:?}");
    world.finish().await
}
