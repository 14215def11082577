//! gRPC: every kind of call, deadlines, statuses in trailers, and no HTTP error where a gRPC client waits.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::{apps::CallKind, metric};

use crate::world::{GRPC, HTTP, HTTP2, World, logged_times};

const KINDS: [(CallKind, usize); 4] =
    [(CallKind::Unary, 1), (CallKind::ServerStream, 3), (CallKind::ClientStream, 1), (CallKind::Bidi, 3)];

#[tokio::test]
async fn calls_of_all_kinds_and_their_statuses() -> Result<()> {
    let Some(world) = World::new("grpc-kinds").await? else { return Ok(()) };
    for side in world.both() {
        let url = side.service.url(GRPC, "");
        for (kind, notes) in KINDS {
            let called = world.client().call(&url, kind).count(3).filling(100_000).send().await?;
            ensure!(called.code == "Ok" && called.notes.len() == notes, "{kind:?}: {called:?}");
            ensure!(called.notes.iter().all(|note| note.pod == side.name()), "{kind:?}");
            let failed = world.client().call(&url, kind).count(3).text("status/9").send().await?;
            ensure!(
                failed.code == "FailedPrecondition" && failed.notes.len() == notes,
                "{kind:?}: {failed:?}"
            );
        }
        let labels = [
            ("reporter", "source"),
            ("request_protocol", "grpc"),
            ("grpc_response_status", "9"),
            ("destination_workload", side.name()),
        ];
        let counted = metric(&world.pair.agent_a.metrics().await?, "istio_requests_total", &labels);
        ensure!((counted - 4.0).abs() < f64::EPSILON, "{counted} calls with status 9");
        for (kind, _) in KINDS {
            for status in ["0", "9"] {
                let line = [("path", kind.path()), ("protocol", "grpc"), ("grpc_status", status)];
                let line = [&line[..], &[("dst.workload", side.name()), ("reporter", "source")]].concat();
                let line = world.pair.agent_a.logged(&line).await?;
                ensure!(line["status"] == "200" && line["flags"] == "-", "{line:?}");
            }
        }
    }
    world.finish().await
}

#[tokio::test]
async fn deadlines_end_calls_that_nobody_else_ends() -> Result<()> {
    let Some(world) = World::new("grpc-deadline").await? else { return Ok(()) };
    for side in world.both() {
        let url = side.service.url(GRPC, "");
        let slow = world.client().call(&url, CallKind::Unary).text("sleep/30000");
        let late = slow.deadline(Duration::from_millis(200)).send().await?;
        ensure!(late.code == "DeadlineExceeded" && late.millis < 20_000, "{late:?}");
        let quick =
            world.client().call(&url, CallKind::Unary).deadline(Duration::from_secs(30)).send().await?;
        ensure!(quick.code == "Ok" && quick.notes[0].timeout == "30000m", "{quick:?}");
        // Who ended it: the mesh, or the client, which counts the same time.
        let ended = world.pair.agent_a.logged_as("the call that was ended", |line| {
            line.get("dst.workload").is_some_and(|name| name == side.name())
                && line["reporter"] == "source"
                && ["UT", "DC"].contains(&line["flags"].as_str())
        });
        let ended = ended.await?;
        ensure!(ended["path"] == "/lab.Notes/Unary", "{ended:?}");
        ensure!(ended["flags"] == "DC" || ended["grpc_status"] == "4", "{ended:?}");
        let cut = [("response_flags", &*ended["flags"]), ("destination_workload", side.name())];
        world.requests(&cut, 1).await?;
        let whole = [("grpc_response_status", "0"), ("destination_workload", side.name())];
        world.requests(&whole, 1).await?;
    }
    world.finish().await
}

#[tokio::test]
async fn what_the_mesh_refuses_is_a_grpc_status() -> Result<()> {
    let Some(world) = World::new("grpc-refused").await? else { return Ok(()) };
    let empty = world.pair.lab.service("empty").selector("app", "nobody").port("grpc", GRPC, 9000).apply()?;
    let routes = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: far, namespace: default }
spec:
  hosts: [far]
  http:
    - match: [{ headers: { x-abort: { exact: http } } }]
      fault: { abort: { percentage: { value: 100 }, httpStatus: 503 } }
      route: [{ destination: { host: far } }]
    - match: [{ headers: { x-abort: { exact: grpc } } }]
      fault: { abort: { percentage: { value: 100 }, grpcStatus: RESOURCE_EXHAUSTED } }
      route: [{ destination: { host: far } }]
    - match: [{ uri: { prefix: /lab.Notes/Unary } }]
      route: [{ destination: { host: far } }]
";
    world.pair.apply("far.yaml", routes).await?;
    let code = async |url: &str, kind, abort: &str| {
        let called = world.client().call(url, kind).header("x-abort", abort).send().await?;
        anyhow::Ok(called.code)
    };
    let far = world.far.service.url(GRPC, "");
    ensure!(code(&empty.url(GRPC, ""), CallKind::Unary, "").await? == "Unavailable");
    ensure!(code(&far, CallKind::Unary, "http").await? == "Unavailable");
    ensure!(code(&far, CallKind::Unary, "grpc").await? == "ResourceExhausted");
    ensure!(code(&far, CallKind::Unary, "").await? == "Ok");
    ensure!(code(&far, CallKind::Bidi, "").await? == "Unimplemented", "no route matches");
    for (status, flags, count) in
        [("14", "UH", 1), ("14", "FI", 1), ("8", "FI", 1), ("0", "-", 1), ("12", "NR", 1)]
    {
        let labels = [("grpc_response_status", status), ("response_flags", flags), ("response_code", "200")];
        world.requests(&labels, count).await?;
        let line = [("grpc_status", status), ("flags", flags), ("protocol", "grpc"), ("reporter", "source")];
        world.pair.agent_a.logged(&line).await?;
    }
    world.finish().await
}

#[tokio::test]
async fn grpc_web_passes_as_the_http_it_is() -> Result<()> {
    let Some(world) = World::new("grpc-web").await? else { return Ok(()) };
    for (side, port, version) in
        world.both().into_iter().flat_map(|side| [(side, HTTP, "HTTP/1.1"), (side, HTTP2, "HTTP/2.0")])
    {
        let request =
            world.client().get(side.service.url(port, "/lab.Notes/Unary")).method("POST").body_bytes(9);
        let request = if port == HTTP2 { request.h2c() } else { request };
        let answer =
            request.header("content-type", "application/grpc-web+proto").header("x-grpc-web", "1").send();
        let echo = answer.await?.echo()?;
        ensure!(
            echo.version == version && echo.headers["content-type"] == "application/grpc-web+proto",
            "{echo:?}"
        );
        ensure!(echo.body_bytes == 9 && echo.headers["x-grpc-web"] == "1", "{echo:?}");
        let labels = [("request_protocol", "http"), ("grpc_response_status", "")];
        let so_far = if port == HTTP2 { 2 } else { 1 };
        world.requests(&[&labels[..], &[("destination_workload", side.name())]].concat(), so_far).await?;
        let line =
            [("protocol", "http"), ("grpc_status", "-"), ("bytes_received", "9"), ("reporter", "source")];
        logged_times(
            &world.pair.agent_a,
            &[&line[..], &[("dst.workload", side.name())]].concat(),
            usize::try_from(so_far)?,
        )
        .await?;
    }
    world.finish().await
}
