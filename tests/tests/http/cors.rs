//! Browsers of other sites: preflights are answered by the mesh, responses say who may read them.

use anyhow::{Result, ensure};

use crate::world::{APP, World, logged_times};

const ROUTES: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: far, namespace: default }
spec:
  hosts: [far]
  http:
    - name: ignored
      match: [{ uri: { prefix: /ignore } }]
      corsPolicy: { allowOrigins: [{ exact: https://shop.example }], unmatchedPreflights: IGNORE }
      route: [{ destination: { host: far } }]
    - name: shop
      corsPolicy:
        allowOrigins: [{ exact: https://shop.example }, { regex: 'https://[a-z]+\\.shop\\.example' }]
        allowMethods: [GET, PUT]
        allowHeaders: [x-token]
        exposeHeaders: [x-lab-pod]
        maxAge: 24h
        allowCredentials: true
      route: [{ destination: { host: far } }]
";

/// What the mesh answers has a route and no endpoint, in figures and in the log.
async fn answers_are_told_of(world: &World) -> Result<()> {
    let answered = [("destination_service", "far.default.svc.cluster.local"), ("response_code", "200")];
    world
        .requests(&[answered, [("destination_workload", "unknown"), ("response_flags", "-")]].concat(), 3)
        .await?;
    world
        .requests(&[answered, [("destination_workload", "far"), ("response_flags", "-")]].concat(), 4)
        .await?;
    for (route, endpoint, count) in [("shop", "-", 2), ("ignored", "-", 1)] {
        let line = [("method", "OPTIONS"), ("status", "200"), ("reporter", "source")];
        let line = [&line[..], &[("route", route), ("endpoint", endpoint), ("tries", "0")]].concat();
        logged_times(&world.pair.agent_a, &line, count).await?;
    }
    let line = [("method", "OPTIONS"), ("route", "shop"), ("dst.workload", "far"), ("reporter", "source")];
    world.pair.agent_a.logged(&line).await.map(drop)
}

#[tokio::test]
async fn preflights_and_responses_of_allowed_origins_alone() -> Result<()> {
    let Some(world) = World::new("cors").await? else { return Ok(()) };
    world.pair.apply("far.yaml", ROUTES).await?;
    let preflight = async |path: &str, origin: &str| {
        let request = world.client().get(world.far.url(path)).method("OPTIONS").header("origin", origin);
        request.header("access-control-request-method", "PUT").send().await
    };
    for origin in ["https://shop.example", "https://eu.shop.example"] {
        let answer = preflight("/", origin).await?;
        ensure!(answer.status == 200 && answer.body_bytes == 0 && answer.pod().is_none(), "{answer:?}");
        for (name, value) in [
            ("access-control-allow-origin", origin),
            ("access-control-allow-methods", "GET,PUT"),
            ("access-control-allow-headers", "x-token"),
            ("access-control-max-age", "86400"),
            ("access-control-allow-credentials", "true"),
        ] {
            ensure!(answer.headers.get(name).is_some_and(|told| told == value), "{name}: {answer:?}");
        }
        let read = world.client().http_get(&world.far.url("/"), &[("origin", origin)]).await?;
        ensure!(
            read.headers["access-control-allow-origin"] == origin && read.pod() == Some("far"),
            "{read:?}"
        );
        ensure!(read.headers["access-control-expose-headers"] == "x-lab-pod", "{read:?}");
    }
    // Others: the app's to answer, or the mesh's without a word.
    let forwarded = preflight("/", "https://evil.example").await?;
    ensure!(forwarded.pod() == Some("far"), "{forwarded:?}");
    let ignored = preflight("/ignore", "https://evil.example").await?;
    ensure!(ignored.status == 200 && ignored.pod().is_none(), "{ignored:?}");
    let read = world.client().http_get(&world.far.url("/"), &[("origin", "https://evil.example")]).await?;
    for answer in [&forwarded, &ignored, &read] {
        ensure!(!answer.headers.contains_key("access-control-allow-origin"), "{answer:?}");
    }
    answers_are_told_of(&world).await?;
    let stats = world.far.pod.stats(APP).await?;
    ensure!(stats.paths["/"] == 4, "preflights of allowed origins never reach the app: {stats:?}");
    world.finish().await
}
