//! What a request asks for itself, as Envoy's users do: how long it may take, and when it is tried again. The app is told by
//! when it is expected to answer, and nothing else of it.

use anyhow::{Result, ensure};

use crate::world::{HTTP2, World, counted, logged_times};

#[tokio::test]
async fn a_request_says_how_long_it_may_take() -> Result<()> {
    let Some(world) = World::new("asked-time").await? else { return Ok(()) };
    for side in world.both() {
        let asked = ("x-envoy-upstream-rq-timeout-ms", "300");
        ensure!(world.client().http_get(&side.url("/slow/30000"), &[asked]).await?.status == 504);
        let nothing = world.client().http_get(&side.url("/"), &[]).await?.echo()?;
        ensure!(!nothing.headers.contains_key("x-envoy-expected-rq-timeout-ms"), "{nothing:?}");
        let asked = ("x-envoy-upstream-rq-timeout-ms", "20000");
        let echo = world.client().http_get(&side.url("/"), &[asked]).await?.echo()?;
        ensure!(!echo.headers.contains_key(asked.0), "{echo:?}");
        let expected: u64 = echo.headers["x-envoy-expected-rq-timeout-ms"].parse()?;
        ensure!((1..=20_000).contains(&expected), "{echo:?}");
        let workload = ("destination_workload", side.name());
        world.requests(&[("response_code", "504"), ("response_flags", "UT"), workload], 1).await?;
        let line =
            [("status", "504"), ("flags", "UT"), ("path", "/slow/30000"), ("dst.workload", side.name())];
        logged_times(&world.pair.agent_a, &[&line[..], &[("reporter", "source")]].concat(), 1).await?;
    }
    world.finish().await
}

const ROUTES: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: far, namespace: default }
spec:
  hosts: [far]
  http:
    - match: [{ uri: { prefix: /fail-first/2 } }]
      name: by-header
      headers: { request: { set: { x-envoy-retry-on: gateway-error, x-envoy-max-retries: \"2\" } } }
      retries: { attempts: 0 }
      route: [{ destination: { host: far } }]
    - name: never
      retries: { attempts: 0 }
      route: [{ destination: { host: far } }]
";

#[tokio::test]
async fn a_request_or_its_route_says_by_header_when_it_is_tried_again() -> Result<()> {
    let Some(world) = World::new("asked-retries").await? else { return Ok(()) };
    world.pair.apply("far.yaml", ROUTES).await?;
    let get = async |path: &str, headers: &[(&str, &str)]| {
        world.client().http_get(&world.far.url(path), headers).await
    };
    ensure!(get("/fail-first/1?none", &[]).await?.status == 503);
    let asked = [("x-envoy-retry-on", "nonsense,5xx")];
    let echo = get("/fail-first/1?one", &asked).await?.echo()?;
    ensure!(
        echo.headers["x-envoy-attempt-count"] == "2" && !echo.headers.contains_key(asked[0].0),
        "{echo:?}"
    );
    // For other failures than those asked for there is no second try.
    ensure!(get("/fail-first/1?other", &[("x-envoy-retry-on", "retriable-4xx")]).await?.status == 503);
    let codes = [("x-envoy-retriable-status-codes", "418,503")];
    ensure!(get("/fail-first/1?codes", &codes).await?.status == 200);
    // The route's own header operations ask as well.
    let echo = get("/fail-first/2?route", &[]).await?.echo()?;
    ensure!(echo.headers["x-envoy-attempt-count"] == "3", "{echo:?}");
    ensure!(!echo.headers.keys().any(|name| name.contains("retries") || name.contains("retry")), "{echo:?}");
    world.requests(&[("response_code", "200"), ("response_flags", "-")], 3).await?;
    world.requests(&[("response_code", "503")], 2).await?;
    for (path, status) in
        [("/fail-first/1?one", "200"), ("/fail-first/1?other", "503"), ("/fail-first/2?route", "200")]
    {
        let line = [("path", path), ("status", status), ("reporter", "source")];
        logged_times(&world.pair.agent_a, &line, 1).await?;
    }
    let retried = [("route", "by-header"), ("response_code", "200")];
    counted(&world.pair.agent_a, "mesh_route_requests_total", &retried, 1).await?;
    world.finish().await
}

#[tokio::test]
async fn a_grpc_server_is_told_the_time_that_is_left() -> Result<()> {
    let Some(world) = World::new("asked-grpc").await? else { return Ok(()) };
    let route = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: far, namespace: default }
spec:
  hosts: [far]
  http: [{ name: bounded, timeout: 7s, route: [{ destination: { host: far } }] }]
";
    world.pair.apply("far.yaml", route).await?;
    let call = world.client().get(world.far.service.url(HTTP2, "/")).h2c();
    let echo =
        call.header("content-type", "application/grpc").header("grpc-timeout", "1H").send().await?.echo()?;
    let left: u64 = echo.headers["grpc-timeout"].trim_end_matches('m').parse()?;
    ensure!((1..=7_000).contains(&left), "{echo:?}");
    world.requests(&[("request_protocol", "grpc"), ("response_code", "200")], 1).await?;
    logged_times(&world.pair.agent_a, &[("route", "bounded"), ("reporter", "source")], 1).await?;
    world.finish().await
}
