//! What the mesh answers in the place of an app: direct responses, redirects, injected aborts. HTTP clients get them as
//! written, gRPC clients as a status and never as an HTTP error.

use anyhow::{Result, ensure};
use lab::apps::CallKind;

use crate::world::{GRPC, HTTP, World};

const ROUTES: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: far, namespace: default }
spec:
  hosts: [far]
  http:
    - match: [{ headers: { x-local: { exact: direct } } }]
      name: closed
      directResponse: { status: 503, body: { string: \"closed; 100 % sure\" } }
      headers: { response: { set: { x-why: holidays } } }
    - match: [{ headers: { x-local: { exact: redirect } } }]
      name: moved
      redirect: { uri: /elsewhere, authority: else.example, redirectCode: 308 }
    - match: [{ headers: { x-local: { exact: forbidden } } }]
      name: forbidden
      fault: { abort: { percentage: { value: 100 }, httpStatus: 403 } }
      route: [{ destination: { host: far } }]
    - route: [{ destination: { host: far } }]
";

#[tokio::test]
async fn http_clients_get_them_as_written() -> Result<()> {
    let Some(world) = World::new("local").await? else { return Ok(()) };
    world.pair.apply("far.yaml", ROUTES).await?;
    for h2c in [false, true] {
        let get = |local: &str| {
            let request = world.client().get(world.far.url("/")).header("x-local", local);
            if h2c { request.h2c() } else { request }
        };
        let direct = get("direct").send().await?;
        ensure!(direct.status == 503 && direct.body == "closed; 100 % sure", "{direct:?}");
        ensure!(direct.headers["x-why"] == "holidays", "{direct:?}");
        let moved = get("redirect").send().await?;
        ensure!(
            moved.status == 308 && moved.headers["location"] == "http://else.example/elsewhere",
            "{moved:?}"
        );
        let forbidden = get("forbidden").send().await?;
        ensure!(forbidden.status == 403, "{forbidden:?}");
    }
    for (route, status, flags) in [("closed", "503", "-"), ("moved", "308", "-"), ("forbidden", "403", "FI")]
    {
        world.requests(&[("response_code", status), ("response_flags", flags)], 2).await?;
        let line = [("route", route), ("status", status), ("flags", flags), ("tries", "0")];
        crate::world::logged_times(&world.pair.agent_a, &line, 2).await?;
    }
    world.finish().await
}

#[tokio::test]
async fn grpc_clients_get_them_as_a_status() -> Result<()> {
    let Some(world) = World::new("local-grpc").await? else { return Ok(()) };
    world.pair.apply("far.yaml", ROUTES).await?;
    let url = world.far.service.url(GRPC, "");
    for (local, code, number, route) in [
        ("direct", "Unavailable", "14", "closed"),
        ("redirect", "Unknown", "2", "moved"),
        ("forbidden", "PermissionDenied", "7", "forbidden"),
        ("", "Ok", "0", "far.default"),
    ] {
        let called = world.client().call(&url, CallKind::Unary).header("x-local", local).send().await?;
        ensure!(called.code == code, "{local}: {called:?}");
        if local == "direct" {
            ensure!(called.message == "closed; 100 % sure", "{called:?}");
        }
        world.requests(&[("response_code", "200"), ("grpc_response_status", number)], 1).await?;
        let line = [("grpc_status", number), ("status", "200"), ("reporter", "source")];
        let line = world.pair.agent_a.logged(&line).await?;
        ensure!(local.is_empty() || line["route"] == route, "{line:?}");
    }
    // The same request over HTTP is none of gRPC's.
    ensure!(world.client().get(world.far.service.url(HTTP, "/")).send().await?.status == 200);
    world.finish().await
}
