//! What a route does to a request: seen by the client, counted, and in the log, by the name of the route.

use anyhow::{Result, ensure};

use crate::world::{World, counted, logged_times};

const ROUTES: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: far, namespace: default }
spec:
  hosts: [far]
  http:
    - match: [{ uri: { prefix: /slow } }]
      name: hasty
      timeout: 300ms
      route: [{ destination: { host: far } }]
    - match: [{ headers: { x-user: { exact: eve } } }]
      name: delayed
      fault: { delay: { percentage: { value: 100 }, fixedDelay: 200ms } }
      route: [{ destination: { host: far } }]
    - match: [{ uri: { prefix: /old } }]
      name: renamed
      rewrite: { uri: /new, authority: inner.example }
      headers:
        request: { set: { x-set: route }, add: { x-both: route }, remove: [x-secret] }
        response: { set: { x-answer: route }, remove: [x-pod] }
      route:
        - destination: { host: far }
          headers: { request: { add: { x-both: destination } }, response: { add: { x-answer: destination } } }
    - match: [{ uri: { exact: /admin/secret } }]
      name: closed
      directResponse: { status: 403, body: { string: no entry } }
    - match: [{ uri: { prefix: /team }, name: theirs, statPrefix: team }]
      delegate: { name: team, namespace: default }
    - match: [{ queryParams: { kind: { exact: plain } }, withoutHeaders: { x-not: {} }, name: asked, statPrefix: asked }]
      name: rest
      route: [{ destination: { host: far } }]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: team, namespace: default }
spec:
  http:
    - name: inner
      fault: { abort: { percentage: { value: 100 }, httpStatus: 418 } }
      route: [{ destination: { host: far } }]
";

#[tokio::test]
async fn what_a_route_does_is_seen_by_the_client_counted_and_logged() -> Result<()> {
    let Some(world) = World::new("routes").await? else { return Ok(()) };
    world.pair.apply("far.yaml", ROUTES).await?;
    for h2c in [false, true] {
        let get = |path: &str| {
            let request = world.client().get(world.far.url(path));
            if h2c { request.h2c() } else { request }
        };
        ensure!(get("/slow/30000").send().await?.status == 504);
        ensure!(get("/").header("x-user", "eve").send().await?.status == 200);
        let renamed = get("/old/thing?q=1").header("x-secret", "s").header("x-set", "app").send().await?;
        let echo = renamed.echo()?;
        ensure!(echo.target == "/new/thing?q=1" && echo.authority == "inner.example", "{echo:?}");
        ensure!(echo.headers["x-set"] == "route" && !echo.headers.contains_key("x-secret"), "{echo:?}");
        ensure!(
            echo.headers["x-both"].contains("route") && echo.headers["x-both"].contains("destination"),
            "{echo:?}"
        );
        ensure!(renamed.headers["x-answer"].contains("destination"), "{renamed:?}");
        ensure!(!renamed.headers.contains_key("x-pod"), "{renamed:?}");
        ensure!(renamed.echo()?.headers["x-envoy-original-path"] == "/old/thing?q=1", "{renamed:?}");
        // However a path is spelled, it is the same path, and the app gets it in that form.
        for spelled in ["/admin/secret", "/x/../admin/secret", "/%61dmin/./secret"] {
            let closed = get(spelled).send().await?;
            ensure!(closed.status == 403 && closed.headers["content-type"] == "text/plain", "{closed:?}");
        }
        ensure!(get("/a/../b%7e?kind=plain").send().await?.echo()?.target == "/b~?kind=plain");
        ensure!(get("/%zz?kind=plain").send().await?.status == 400);
        ensure!(get("/team/x").send().await?.status == 418);
        ensure!(get("/?kind=plain").send().await?.status == 200);
        for unmatched in [get("/?kind=other"), get("/?kind=plain").header("x-not", "1")] {
            ensure!(unmatched.send().await?.status == 404);
        }
    }
    for (status, flags, count) in [
        ("504", "UT", 2),
        ("200", "DI", 2),
        ("418", "FI", 2),
        ("404", "NR", 4),
        ("200", "-", 6),
        ("403", "-", 6),
        ("400", "DPE", 2),
    ] {
        world.requests(&[("response_code", status), ("response_flags", flags)], count).await?;
    }
    for (route, count) in [("team", 2), ("asked", 4)] {
        counted(&world.pair.agent_a, "mesh_route_requests_total", &[("route", route)], count).await?;
    }
    for (route, path, status, flags) in [
        ("hasty", "/slow/30000", "504", "UT"),
        ("delayed", "/", "200", "DI"),
        ("renamed", "/old/thing?q=1", "200", "-"),
        ("inner.theirs", "/team/x", "418", "FI"),
        ("rest.asked", "/?kind=plain", "200", "-"),
        ("-", "/?kind=other", "404", "NR"),
    ] {
        let line =
            [("route", route), ("path", path), ("status", status), ("flags", flags), ("reporter", "source")];
        logged_times(&world.pair.agent_a, &line, 2).await?;
    }
    world.finish().await
}
