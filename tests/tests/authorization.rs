//! Who may do what at a pod: `AuthorizationPolicy` holds for every way in, across nodes and within one, through services
//! and past them, in plaintext too; requests are told 403, bytes are cut off, and a change holds for the next request and
//! cuts what is open and would be refused.

#[path = "authorization/bypasses.rs"]
mod bypasses;
#[path = "authorization/cut.rs"]
mod cut;

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::{
    Pair, Pod, Service,
    apps::{self, CallKind, RawEnd},
    eventually, metric, peer, require_root,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

const DENIED: &str = "RBAC: access denied";

/// The rules of a policy of namespace `default`, for pods `app: server`.
fn policy(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{ name: {name}, namespace: default }}\n\
         spec:\n  selector: {{ matchLabels: {{ app: server }} }}\n{spec}\n"
    )
}

/// A pod with an HTTP app on 8080 and an echo of bytes on 7000, and services that lead to it alone.
struct Side {
    pod: Pod,
    http: Service,
    tcp: Service,
}

struct World {
    pair: Pair,
    /// Like the client, of another service account.
    other: Pod,
    /// Not in the mesh.
    stranger: Pod,
    far: Side,
    near: Side,
}

impl World {
    async fn new(name: &str) -> Result<Self> {
        Self::with(name, &[]).await
    }

    async fn with(name: &str, flags: &[&str]) -> Result<Self> {
        let pair = Pair::with(name, flags).await?;
        let other = pair.a.pod("other").sa("other").start().await?;
        let stranger = pair.a.pod("stranger").unenrolled().start().await?;
        let side = async |node: &lab::Node, name: &str| {
            let pod = node.pod(name).sa("server").label("app", "server").label("side", name).start().await?;
            pod.serve(apps::http(8080)).await?;
            pod.serve(apps::tcp_echo(7000)).await?;
            let service = |kind: &str, port, target| {
                pair.lab
                    .service(&format!("{name}-{kind}"))
                    .selector("side", name)
                    .port(kind, port, target)
                    .apply()
            };
            let (http, tcp) = (service("http", 80, 8080)?, service("tcp", 70, 7000)?);
            anyhow::Ok(Side { pod, http, tcp })
        };
        let (far, near) = (side(&pair.b, "far").await?, side(&pair.a, "near").await?);
        pair.settled().await?;
        for pod in [&other, &far.pod, &near.pod] {
            pod.enrolled().await?;
        }
        Ok(Self { pair, other, stranger, far, near })
    }

    fn sides(&self) -> [&Side; 2] {
        [&self.far, &self.near]
    }

    /// The policy in force in both agents, at each pod it selects: pods follow the configuration one by one.
    async fn apply(&self, name: &str, spec: &str) -> Result<()> {
        self.pair.apply(&format!("{name}.yaml"), &policy(name, spec)).await
    }
}

async fn status(from: &Pod, url: &str) -> Result<(u16, String)> {
    let answer = from.http_get(url, &[]).await?;
    Ok((answer.status, answer.body))
}

/// Whether bytes come back whole; a connection that is refused may fail in any way.
async fn echoes(from: &Pod, to: std::net::SocketAddr) -> bool {
    from.tcp(to, 1000, &[]).await.is_ok_and(|answer| answer.intact && answer.received == 1000)
}

#[tokio::test]
async fn requests_are_permitted_by_who_asks_and_for_what() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("authz-http").await?;
    world
        .apply(
            "readers",
            "  rules:\n  - from: [{ source: { principals: [cluster.local/ns/default/sa/client] } }]\n    \
             to: [{ operation: { methods: [GET], paths: ['/status/*', '/ws', '/public*'] } }]",
        )
        .await?;
    let client = &world.pair.client;
    for side in world.sides() {
        // Through the service, and past it.
        for base in [side.http.url(80, ""), format!("http://{}", side.pod.at(8080))] {
            let base = base.trim_end_matches('/');
            for (path, expected) in [
                ("/status/200", 200),
                ("/status/200?x=/admin", 200),
                ("/admin", 403),
                ("/status", 403),
                ("/status/../admin", 403),
                ("/status/%2e%2e/admin", 403),
            ] {
                let (status, body) = status(client, &format!("{base}{path}")).await?;
                ensure!(status == expected, "{base}{path}: {status} {body}");
                ensure!(status == 200 || body == DENIED, "{base}{path}: {body}");
            }
            let posted = client.get(format!("{base}/status/200")).method("POST").send().await?;
            ensure!(posted.status == 403 && posted.body == DENIED, "{posted:?}");
            let h2 = client.get(format!("{base}/status/200")).h2c().send().await?;
            ensure!(h2.status == 200, "{h2:?}");
            // What was permitted as a request may become something else.
            let spoken = client.websocket(&format!("{base}/ws"), false, &["one"]).await?;
            ensure!(spoken.status == 101 && spoken.messages == ["one"], "{base}: {spoken:?}");
        }
        let url = |path: &str| side.http.url(80, path);
        let (told, body) = status(&world.other, &url("/status/200")).await?;
        ensure!(told == 403 && body == DENIED, "{told} {body}");
        let upgraded = world.other.upgrade(&url("/ws"), "websocket", 10).await?;
        ensure!(upgraded.status == 403, "{upgraded:?}");
        // Past the service it is a connection, in which no request would be permitted.
        let direct = format!("http://{}/status/200", side.pod.at(8080));
        ensure!(world.other.http_get(&direct, &[]).await.is_err(), "another account came through");
        // The app is given the path that was judged.
        let raw = client.raw(side.http.at(80));
        let raw =
            raw.send("GET /x/../public/%61 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").run().await?;
        ensure!(raw.statuses() == [200] && raw.text().contains("\"/public/a\""), "{}", raw.text());
        // In plaintext nobody is anybody, whatever a header says.
        let forged = [("x-forwarded-client-cert", "URI=spiffe://cluster.local/ns/default/sa/client")];
        ensure!(world.stranger.http_get(&direct, &forged).await.is_err(), "plaintext came through");
        // What is no HTTP could be anything.
        for from in [client, &world.stranger] {
            let raw = from
                .raw(side.pod.at(8080))
                .send("\0garbage\r\n")
                .limit(Duration::from_secs(30))
                .run()
                .await?;
            ensure!(raw.received.0.is_empty() && raw.end != RawEnd::Open, "{raw:?}");
        }
        ensure!(
            side.pod.stats(8080).await?.paths.keys().all(|path| !path.starts_with("/admin")),
            "it came through"
        );
    }
    let (a, b) = (world.pair.agent_a.metrics().await?, world.pair.agent_b.metrics().await?);
    let labels = [("reporter", "destination"), ("response_code", "403"), ("response_flags", "-")];
    for (metrics, workload) in [(&a, "near"), (&b, "far")] {
        let labels = [&labels[..], &[("destination_workload", workload)]].concat();
        ensure!(metric(metrics, "istio_requests_total", &labels) > 10.0, "{workload}\n{metrics}");
    }
    let line = world.pair.agent_b.access_log().into_iter().find(|line| line.contains("rbac_access_denied"));
    ensure!(
        line.is_some_and(|line| line.contains("rbac_access_denied_matched_policy[none]")),
        "nothing logged"
    );
    world.pair.finish().await
}

#[tokio::test]
async fn connections_are_permitted_by_who_dials_which_port() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("authz-tcp").await?;
    world
        .apply(
            "clients",
            "  rules:\n  - from: [{ source: { principals: ['*/sa/client'] } }]\n    \
             to: [{ operation: { ports: ['7000'] } }]",
        )
        .await?;
    let client = &world.pair.client;
    for side in world.sides() {
        for to in [side.tcp.at(70), side.pod.at(7000)] {
            ensure!(echoes(client, to).await, "{to}");
            ensure!(!echoes(&world.other, to).await, "{to}");
        }
        ensure!(!echoes(&world.stranger, side.pod.at(7000)).await, "plaintext");
        let (status, body) = status(client, &side.http.url(80, "/")).await?;
        ensure!(status == 403 && body == DENIED, "another port: {status} {body}");
    }
    let refused = [("side", "destination"), ("kind", "denied"), ("pod", "far")];
    let metrics = world.pair.agent_b.metrics().await?;
    ensure!(metric(&metrics, "mesh_refused_total", &refused) >= 3.0, "{metrics}");
    let logged = world.pair.agent_b.access_log();
    let denied = |line: &&String| line.contains("kind=denied") && line.contains("flags=DENY");
    ensure!(
        logged.iter().find(denied).is_some_and(|line| line.contains("matched_policy[none]")),
        "{logged:#?}"
    );

    // A rule about requests holds against bytes, whatever it asks of requests.
    let deny = "  action: DENY\n  rules: [{ to: [{ operation: { methods: [DELETE], ports: ['7000'] } }] }]";
    world.apply("no-deletes", deny).await?;
    for side in world.sides() {
        eventually("the connection is refused", async || {
            ensure!(!echoes(client, side.tcp.at(70)).await, "it passes");
            Ok(())
        })
        .await?;
    }
    world.pair.finish().await
}

#[tokio::test]
async fn grpc_clients_are_told_by_their_status() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("authz-grpc").await?;
    let deny = "  action: DENY\n  rules: [{ to: [{ operation: { paths: ['/lab.Notes/Unary'] } }] }]";
    for side in world.sides() {
        side.pod.serve(apps::grpc(9000)).await?;
    }
    world.apply("no-unary", deny).await?;
    for name in ["far", "near"] {
        let service = world.pair.lab.service(&format!("{name}-grpc")).selector("side", name);
        let service = service.port("grpc", 90, 9000).apply()?;
        world.pair.settled().await?;
        let url = service.url(90, "/");
        let called = world.pair.client.call(&url, CallKind::Unary).send().await?;
        ensure!(called.code == "PermissionDenied" && called.message == DENIED, "{name}: {called:?}");
        let called = world.pair.client.call(&url, CallKind::ServerStream).count(2).send().await?;
        ensure!(called.code == "Ok" && called.notes.len() == 2, "{name}: {called:?}");
    }
    world.pair.finish().await
}

#[tokio::test]
async fn what_is_only_tried_is_counted_and_passes() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("authz-dry").await?;
    let yaml = policy("tried", "  action: DENY\n  rules: [{ to: [{ operation: { paths: ['/admin*'] } }] }]");
    let yaml = yaml
        .replace("namespace: default }", "namespace: default, annotations: { istio.io/dry-run: 'true' } }");
    world.pair.apply("tried.yaml", &yaml).await?;
    for side in world.sides() {
        for path in ["/admin", "/"] {
            let (status, _) = status(&world.pair.client, &side.http.url(80, path)).await?;
            ensure!(status == 200, "{path}: {status}");
        }
    }
    let labels = [("action", "DENY"), ("result", "denied"), ("policy", "default/tried")];
    for agent in [&world.pair.agent_a, &world.pair.agent_b] {
        let metrics = agent.metrics().await?;
        let counted = metric(&metrics, "mesh_policy_dry_run_total", &labels);
        ensure!((counted - 1.0).abs() < f64::EPSILON, "{counted}\n{metrics}");
        let line = agent.logged(&[("event", "policy"), ("policy", "default/tried")]).await?;
        ensure!(line["result"] == "denied" && line["action"] == "DENY", "{line:?}");
        ensure!(line["src.identity"].ends_with("/sa/client"), "{line:?}");
    }
    world.pair.finish().await
}

/// Asks for a path on an open connection.
async fn ask(stream: &mut TcpStream, path: &str) -> Result<String> {
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()).await?;
    let mut answer = Vec::new();
    let mut part = [0; 4096];
    loop {
        let text = String::from_utf8_lossy(&answer).into_owned();
        let length = text.split("content-length: ").nth(1).and_then(|rest| rest.split("\r\n").next());
        if let (Some((_, body)), Some(length)) = (text.split_once("\r\n\r\n"), length)
            && body.len() >= length.parse()?
        {
            return Ok(text);
        }
        let read = stream.read(&mut part).await?;
        ensure!(read > 0, "closed after {text:?}");
        answer.extend_from_slice(&part[..read]);
    }
}

#[tokio::test]
async fn a_change_holds_for_the_next_request_of_open_connections() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("authz-change").await?;
    let deny = |path: &str| {
        format!("  action: DENY\n  rules: [{{ to: [{{ operation: {{ paths: ['{path}'] }} }}] }}]")
    };
    world.apply("deny", &deny("/first")).await?;
    for side in world.sides() {
        let deny_now = async |path: &str, other: &str| {
            world.apply("deny", &deny(path)).await?;
            let url = |path| side.http.url(80, path);
            eventually("the policy is in force", async || {
                let (no, _) = status(&world.pair.client, &url(path)).await?;
                let (yes, _) = status(&world.pair.client, &url(other)).await?;
                ensure!((no, yes) == (403, 200), "{no} {yes}");
                Ok(())
            })
            .await
        };
        deny_now("/first", "/second").await?;
        // In plaintext, past every agent but the destination's.
        let mut plain = peer::dial(&world.stranger, side.pod.at(8080))?;
        ensure!(ask(&mut plain, "/first").await?.starts_with("HTTP/1.1 403"), "denied from the beginning");
        ensure!(ask(&mut plain, "/second").await?.starts_with("HTTP/1.1 200"), "the connection goes on");
        // Through the mesh: the first answer is held until the policy has changed.
        let raw = world.pair.client.raw(side.http.at(80)).limit(Duration::from_secs(50));
        let request = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n");
        let last = "GET /second HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
        let raw = raw.send(request("/hold")).expect("HTTP/1.1 200").send(last);
        let changed = async {
            eventually("the request is held", async || {
                ensure!(side.pod.stats(8080).await?.held == 1, "not yet");
                Ok(())
            })
            .await?;
            deny_now("/second", "/first").await?;
            side.pod.release(8080).await
        };
        let (answer, released) = tokio::join!(raw.run(), changed);
        let (answer, released) = (answer?, released?);
        ensure!(released == 1 && answer.statuses() == [200, 403], "{released} {}", answer.text());
        ensure!(ask(&mut plain, "/second").await?.starts_with("HTTP/1.1 403"), "the old policy holds");
        ensure!(ask(&mut plain, "/first").await?.starts_with("HTTP/1.1 200"), "the old policy holds");
    }
    world.pair.finish().await
}

#[tokio::test]
async fn policies_of_the_root_namespace_and_those_that_nobody_answers_for() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("authz-root").await?;
    let mesh_wide = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
                     metadata: { name: mesh, namespace: istio-system }\n\
                     spec: { action: DENY, rules: [{ to: [{ operation: { paths: ['/mesh'] } }] }] }\n";
    world.pair.apply("mesh.yaml", mesh_wide).await?;
    let custom = "  action: CUSTOM\n  provider: { name: nobody }\n  rules: [{ to: [{ operation: { paths: ['/ext*'] } }] }]";
    world.apply("ext", custom).await?;
    for side in world.sides() {
        eventually("both policies are in force", async || {
            for (path, expected) in [("/mesh", 403), ("/ext/1", 403), ("/", 200)] {
                let (status, _) = status(&world.pair.client, &side.http.url(80, path)).await?;
                ensure!(status == expected, "{path}: {status}");
            }
            Ok(())
        })
        .await?;
    }
    let problems = world.pair.agent_a.config_dump().await?["problems"].to_string();
    ensure!(problems.contains("nobody") && problems.contains("extensionProviders"), "{problems}");
    world.pair.finish().await
}

/// An upgrade is a GET in HTTP/1.1, and a CONNECT that asks for a protocol in HTTP/2 (RFC 8441): rules about GET hold for
/// both.
#[tokio::test]
async fn an_extended_connect_is_judged_as_the_get_that_it_is() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("authz-extended").await?;
    let rules = |action: &str, method: &str| {
        format!("  action: {action}\n  rules: [{{ to: [{{ operation: {{ methods: [{method}] }} }}] }}]")
    };
    for (action, method, permitted) in
        [("DENY", "GET", false), ("ALLOW", "POST", false), ("DENY", "CONNECT", true), ("ALLOW", "GET", true)]
    {
        world.apply("methods", &rules(action, method)).await?;
        for side in world.sides() {
            let url = side.http.url(80, "/ws");
            for (h2c, switched) in [(true, 200), (false, 101)] {
                let spoken = world.pair.client.websocket(&url, h2c, &["one"]).await?;
                let expected = if permitted { switched } else { 403 };
                let what = format!("{action} {method}: {url} h2c={h2c}: {spoken:?}");
                ensure!(spoken.status == expected, "{what}");
                ensure!(spoken.messages.len() == usize::from(permitted), "{what}");
            }
        }
    }
    let refused = [("status", "403"), ("path", "/ws"), ("reporter", "source")];
    eventually("each refusal is logged", async || {
        let log = world.pair.agent_a.access_log();
        let lines = log.iter().map(|line| lab::fields(line));
        let is = |line: &std::collections::BTreeMap<String, String>| {
            refused.iter().all(|(key, value)| line.get(*key).is_some_and(|found| found == value))
        };
        let count = lines.filter(is).count();
        ensure!(count == 8, "{count} lines");
        Ok(())
    })
    .await?;
    world.pair.finish().await
}
