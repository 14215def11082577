//! Fallbacks: where no endpoint of a subset or service can serve, another does, and it ends where the list ends.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::{
    Pair, Pod,
    apps::{self, CallKind, LoadKind},
    eventually, metric, require_root,
};

/// All requests are for v1; the second subset leads back to the first.
const RULES: &str = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: web, namespace: default }
spec:
  host: web
  subsets: [{ name: v1, labels: { version: v1 } }, { name: v2, labels: { version: v2 } }]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: web, namespace: default }
spec:
  hosts: [web]
  http: [{ retries: { attempts: 0 }, route: [{ destination: { host: web, subset: v1 } }] }]
";

/// v2 stands in for v1, and `more` after it.
fn policy(more: &str) -> String {
    format!(
        "apiVersion: mesh.io/v1alpha1\nkind: ServicePolicy\nmetadata: {{ name: web, namespace: default }}\n\
         spec:\n  service: web\n  port: 80\n  healthCheck: {{ http: {{ path: /healthz }}, interval: 200ms }}\n  \
         fallbacks:\n    - {{ subset: v1, to: [{{ subset: v2 }}{more}] }}\n    - {{ subset: v2, to: [{{ subset: v1 }}] }}\n"
    )
}

async fn server(pair: &Pair, name: &str, app: &str, version: &str, near: bool) -> Result<Pod> {
    let node = if near { &pair.a } else { &pair.b };
    let pod = node.pod(name).label("app", app).label("version", version).start().await?;
    pod.serve(apps::http(8080)).await?;
    pod.serve(apps::tcp_echo(7000)).await?;
    Ok(pod)
}

/// Waits until this status alone comes, and from this pod alone.
async fn answers(pair: &Pair, url: &str, status: u16, pod: Option<&str>) -> Result<()> {
    eventually("who serves", async || {
        let tally = pair.client.get(url).many(10, 1, None).await?;
        ensure!(tally.statuses.get(&status) == Some(&10), "{tally:?}");
        let pods: Vec<_> = tally.pods.keys().map(String::as_str).filter(|pod| !pod.is_empty()).collect();
        ensure!(pods == pod.into_iter().collect::<Vec<_>>(), "{tally:?}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn who_can_serves_in_the_order_of_the_list() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("fallback").await?;
    let first = server(&pair, "first", "web", "v1", false).await?;
    let second = server(&pair, "second", "web", "v2", true).await?;
    let backup = server(&pair, "backup", "backup", "v1", false).await?;
    let service = |name: &str| pair.lab.service(name).selector("app", name).port("http", 80, 8080);
    let web = service("web").apply()?;
    service("backup").apply()?;
    pair.lab.apply("rules.yaml", RULES)?;
    pair.apply("policy.yaml", &policy(", { host: backup }")).await?;
    for pod in [&first, &second, &backup] {
        pod.enrolled().await?;
    }
    let url = web.url(80, "/");
    answers(&pair, &url, 200, Some("first")).await?;
    first.set_sick(8080, true).await?;
    answers(&pair, &url, 200, Some("second")).await?;
    pair.client.get(web.url(80, "/by-second")).send().await?;
    let line = pair.agent_a.logged(&[("path", "/by-second"), ("reporter", "source")]).await?;
    let cluster = "outbound|80|v2|web.default.svc.cluster.local";
    ensure!(line.get("cluster").is_some_and(|found| found == cluster), "{line:?}");
    let labels = [("cluster", "outbound|80|v1|web.default.svc.cluster.local"), ("to", cluster)];
    let counted = metric(&pair.agent_a.metrics().await?, "mesh_fallbacks_total", &labels);
    ensure!(counted >= 11.0, "{counted}");

    second.set_sick(8080, true).await?;
    answers(&pair, &url, 200, Some("backup")).await?;
    pair.client.get(web.url(80, "/by-backup")).send().await?;
    let line = pair.agent_a.logged(&[("path", "/by-backup"), ("reporter", "source")]).await?;
    let service = line.get("dst.service").map(String::as_str);
    ensure!(service == Some("backup.default.svc.cluster.local"), "{line:?}");

    // Without the third nobody is left, and the second's own fallback is none of the first's.
    pair.apply("policy.yaml", &policy("")).await?;
    answers(&pair, &url, 503, None).await?;
    first.set_sick(8080, false).await?;
    answers(&pair, &url, 200, Some("first")).await?;
    pair.finish().await
}

#[tokio::test]
async fn a_service_without_endpoints_is_served_by_another_requests_and_bytes() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("fallbackempty").await?;
    let backup = server(&pair, "backup", "backup", "v1", false).await?;
    let service = |name: &str| {
        pair.lab.service(name).selector("app", name).port("http", 80, 8080).port("tcp", 81, 7000)
    };
    let web = service("web").apply()?;
    service("backup").apply()?;
    pair.settled().await?;
    backup.enrolled().await?;
    let url = web.url(80, "/");
    answers(&pair, &url, 503, None).await?;
    let policy = "
apiVersion: mesh.io/v1alpha1
kind: ServicePolicy
metadata: { name: web, namespace: default }
spec: { service: web, fallbacks: [{ to: [{ host: backup.default.svc.cluster.local }] }] }
";
    pair.apply("policy.yaml", policy).await?;
    answers(&pair, &url, 200, Some("backup")).await?;
    let echo = pair.client.tcp(web.at(81), 100_000, &[]).await?;
    ensure!(echo.intact && echo.received == 100_000, "{echo:?}");
    pair.finish().await
}

/// What goes on for long goes to who serves when it begins, and stays there; what begins later goes to who serves then.
#[tokio::test]
async fn calls_and_websockets_fall_back_too_and_stay_where_they_are() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("fallbackcalls").await?;
    let backup = server(&pair, "backup", "backup", "v1", false).await?;
    backup.serve(apps::grpc(50051)).await?;
    let service = |name: &str| {
        let ports = pair.lab.service(name).selector("app", name);
        ports.port("http", 80, 8080).port("grpc", 90, 50051)
    };
    let web = service("web").apply()?;
    service("backup").apply()?;
    let policy = "
apiVersion: mesh.io/v1alpha1
kind: ServicePolicy
metadata: { name: web, namespace: default }
spec: { service: web, fallbacks: [{ to: [{ host: backup }] }] }
";
    pair.apply("policy.yaml", policy).await?;
    backup.enrolled().await?;
    let (calls, sockets) = (web.url(90, ""), web.url(80, "/ws"));
    for kind in [CallKind::Unary, CallKind::ServerStream, CallKind::ClientStream, CallKind::Bidi] {
        let called = pair.client.call(&calls, kind).count(3).text("note").send().await?;
        ensure!(called.code == "Ok" && called.notes.iter().all(|note| note.pod == "backup"), "{called:?}");
    }
    for h2c in [false, true] {
        let spoken = pair.client.websocket(&sockets, h2c, &["one", "zwei"]).await?;
        ensure!(spoken.messages == ["one", "zwei"] && spoken.pod.as_deref() == Some("backup"), "{spoken:?}");
    }
    let pause = Duration::from_millis(5);
    let held = [
        pair.client.load(LoadKind::Grpc, &calls, 2, pause).await?,
        pair.client.load(LoadKind::WebSocket, &sockets, 2, pause).await?,
    ];

    // The service has an endpoint of its own again.
    let first = server(&pair, "first", "web", "v1", true).await?;
    first.serve(apps::grpc(50051)).await?;
    first.enrolled().await?;
    answers(&pair, &web.url(80, "/"), 200, Some("first")).await?;
    let called = pair.client.call(&calls, CallKind::Bidi).count(2).send().await?;
    ensure!(called.notes.iter().all(|note| note.pod == "first") && called.notes.len() == 2, "{called:?}");
    let spoken = pair.client.websocket(&sockets, true, &["one"]).await?;
    ensure!(spoken.pod.as_deref() == Some("first"), "{spoken:?}");
    for load in held {
        load.goes_on(5).await?;
        let loaded = load.finish().await?;
        ensure!(loaded.errors.is_empty() && loaded.opened == 2, "{loaded:?}");
    }

    // Nobody is left: a call is told so by a gRPC status.
    pair.lab.delete("policy.yaml")?;
    first.remove().await?;
    pair.settled().await?;
    eventually("nobody serves", async || {
        let called = pair.client.call(&calls, CallKind::Unary).send().await?;
        ensure!(called.code == "Unavailable", "{called:?}");
        Ok(())
    })
    .await?;
    pair.finish().await
}
