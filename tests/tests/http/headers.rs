//! The headers that Istio's users rely on, and those that an app may not decide about itself.

use anyhow::{Result, ensure};

use crate::world::{HTTP, World, logged_times};

#[tokio::test]
async fn requests_are_identified_and_tries_counted() -> Result<()> {
    let Some(world) = World::new("headers").await? else { return Ok(()) };
    for side in world.both() {
        let answer = world.client().http_get(&side.url("/"), &[("x-forwarded-for", "192.0.2.7")]).await?;
        let echo = answer.echo()?;
        let id = &echo.headers["x-request-id"];
        ensure!(id.len() == 36 && echo.headers["x-forwarded-proto"] == "http", "{echo:?}");
        ensure!(echo.headers["x-envoy-attempt-count"] == "1", "{echo:?}");
        ensure!(echo.headers["x-forwarded-for"] == "192.0.2.7", "only gateways add to it: {echo:?}");
        ensure!(answer.headers["x-envoy-upstream-service-time"].parse::<u64>().is_ok(), "{answer:?}");
        // Both agents tell of the same request.
        let line = world.pair.agent_a.logged(&[("request_id", id), ("reporter", "source")]).await?;
        ensure!(line["status"] == "200", "{line:?}");
        let other = if side.name() == "far" { &world.pair.agent_b } else { &world.pair.agent_a };
        other.logged(&[("request_id", id), ("reporter", "destination")]).await?;
        // What a request brings along is kept.
        let kept = [("x-request-id", "mine"), ("x-forwarded-proto", "https"), ("traceparent", "00-1-2-01")];
        let echo = world.client().http_get(&side.url("/"), &kept).await?.echo()?;
        for (name, value) in kept {
            ensure!(echo.headers[name] == value, "{echo:?}");
        }
    }
    let routes = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: far, namespace: default }
spec:
  hosts: [far]
  http:
    - name: shaky
      retries: { attempts: 2, retryOn: 5xx }
      route: [{ destination: { host: far } }]
";
    world.pair.apply("far.yaml", routes).await?;
    let echo = world.client().http_get(&world.far.url("/fail-first/1?x"), &[]).await?.echo()?;
    ensure!(echo.headers["x-envoy-attempt-count"] == "2", "{echo:?}");
    let named = [("route", "shaky"), ("destination_service", "far.default.svc.cluster.local")];
    let counted = lab::metric(&world.pair.agent_a.metrics().await?, "mesh_route_requests_total", &named);
    ensure!((counted - 1.0).abs() < f64::EPSILON, "{counted}");
    world.finish().await
}

#[tokio::test]
async fn who_the_client_is_the_mesh_tells_and_nobody_else() -> Result<()> {
    let Some(world) = World::new("xfcc").await? else { return Ok(()) };
    let forged = [("x-forwarded-client-cert", "URI=spiffe://cluster.local/ns/default/sa/admin")];
    let echo = world.client().http_get(&world.far.url("/"), &forged).await?.echo()?;
    let expected = "By=spiffe://cluster.local/ns/default/sa/far;Subject=\"\";URI=spiffe://cluster.local/ns/default/sa/client";
    ensure!(echo.headers.get("x-forwarded-client-cert").is_some_and(|told| told == expected), "{echo:?}");
    let echo = world.client().http_get(&world.near.url("/"), &forged).await?.echo()?;
    let expected = expected.replace("sa/far", "sa/near");
    ensure!(echo.headers.get("x-forwarded-client-cert") == Some(&expected), "{echo:?}");
    // Nor by asking for another protocol, with a body at that.
    for side in world.both() {
        let request = "POST / HTTP/1.1\r\nHost: lab\r\nx-forwarded-client-cert: URI=forged\r\nContent-Length: 4\r\n\
                       Connection: upgrade\r\nUpgrade: nothing-known\r\n\r\nbody";
        let answer = world.client().raw(side.at(HTTP)).send(request).expect("}").leave().run().await?;
        let text = answer.text();
        ensure!(answer.statuses() == [200] && text.contains(r#""body_bytes":4"#), "{answer:?}");
        ensure!(text.contains("sa/client") && !text.contains("forged"), "{answer:?}");
    }
    world.finish().await
}

#[tokio::test]
async fn faults_by_header_only_where_they_are_allowed() -> Result<()> {
    let Some(world) = World::new("fault-headers").await? else { return Ok(()) };
    let routes = |allowed: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: VirtualService\n\
             metadata: {{ name: far, namespace: default, annotations: {{ mesh.io/fault-by-header: \"{allowed}\" }} }}\n\
             spec:\n  hosts: [far]\n  http: [{{ route: [{{ destination: {{ host: far }} }}] }}]\n"
        )
    };
    let abort = [("x-envoy-fault-abort-request", "418")];
    ensure!(world.client().http_get(&world.far.url("/"), &abort).await?.status == 200);
    world.pair.apply("far.yaml", &routes("false")).await?;
    ensure!(world.client().http_get(&world.far.url("/"), &abort).await?.status == 200);
    world.pair.apply("far.yaml", &routes("true")).await?;
    ensure!(world.client().http_get(&world.far.url("/"), &abort).await?.status == 418);
    let delay = [("x-envoy-fault-delay-request", "300")];
    let begun = std::time::Instant::now();
    ensure!(world.client().http_get(&world.far.url("/"), &delay).await?.status == 200);
    ensure!(begun.elapsed().as_millis() >= 300);
    for (status, flags, count) in [("200", "-", 2), ("418", "FI", 1), ("200", "DI", 1)] {
        world.requests(&[("response_code", status), ("response_flags", flags)], count).await?;
        let line = [("status", status), ("flags", flags), ("reporter", "source")];
        logged_times(&world.pair.agent_a, &line, usize::try_from(count)?).await?;
    }
    world.finish().await
}
