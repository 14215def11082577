//! Policies with the action CUSTOM: an external authorizer is asked about what they match, over gRPC and HTTP, from the
//! pod that is asked and as the pod's own traffic; what it says is done, and without an answer nothing is let in, unless
//! it is said to fail open.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::{
    Pair, Pod, Process, Service,
    apps::{self, Answer, CallKind, Echo, LoadKind, Question, WANT},
    eventually, metric, require_root,
};

/// A pod with an HTTP app on 8080, gRPC on 9000 and an echo of bytes on 7000, and its service.
struct Side {
    pod: Pod,
    service: Service,
}

impl Side {
    fn url(&self, path: &str) -> String {
        self.service.url(80, path)
    }
}

/// Authorizers: in the mesh on node `a` and outside of it; pods that ask them on both nodes.
struct World {
    pair: Pair,
    /// Like the client, of another service account.
    other: Pod,
    /// Not in the mesh.
    stranger: Pod,
    /// On the other node than the authorizer, and on its own.
    sides: [Side; 2],
    meshed: Process,
    plain: Process,
}

/// Providers of the mesh-wide settings: over gRPC and HTTP, slow to give up or not, of either authorizer.
const SETTINGS: &str = r#"
apiVersion: v1
kind: ConfigMap
metadata: { name: mesh, namespace: istio-system }
data:
  mesh: |
    extensionProviders:
      - name: grpc
        envoyExtAuthzGrpc: { service: meshed.default.svc.cluster.local, port: 90 }
      - name: http
        envoyExtAuthzHttp:
          service: meshed.default.svc.cluster.local
          port: 90
          pathPrefix: /check
          includeRequestHeadersInCheck: [x-want, x-shown*]
          includeAdditionalHeadersInCheck: { x-mesh: one }
          headersToUpstreamOnAllow: [x-user]
          headersToDownstreamOnAllow: [x-told]
          headersToDownstreamOnDeny: [x-reason]
      - name: unmeshed
        envoyExtAuthzGrpc: { service: plain.default.svc.cluster.local, port: 90 }
      - name: hasty
        envoyExtAuthzGrpc: { service: meshed.default.svc.cluster.local, port: 90, timeout: 0.3s, statusOnError: "503" }
      - name: hasty-http
        envoyExtAuthzHttp: { service: meshed.default.svc.cluster.local, port: 90, timeout: 0.3s, includeRequestHeadersInCheck: [x-want] }
      - name: open
        envoyExtAuthzGrpc: { service: meshed.default.svc.cluster.local, port: 90, timeout: 0.3s, failOpen: true }
      - name: missing
        envoyExtAuthzGrpc: { service: missing.default.svc.cluster.local, port: 90 }
      - name: missing-open
        envoyExtAuthzHttp: { service: missing.default.svc.cluster.local, port: 90, failOpen: true }
      - name: whole
        envoyExtAuthzGrpc:
          service: meshed.default.svc.cluster.local
          port: 90
          includeRequestBodyInCheck: { maxRequestBytes: 100 }
      - name: part
        envoyExtAuthzHttp:
          service: meshed.default.svc.cluster.local
          port: 90
          includeRequestBodyInCheck: { maxRequestBytes: 100, allowPartialMessage: true }
"#;

impl World {
    async fn new(name: &str) -> Result<Self> {
        let pair = Pair::new(name).await?;
        let other = pair.a.pod("other").sa("other").start().await?;
        let stranger = pair.a.pod("stranger").unenrolled().start().await?;
        let meshed = pair.a.pod("meshed").sa("authorizer").label("app", "meshed").start().await?;
        let plain = pair.b.pod("plain").label("app", "plain").unenrolled().start().await?;
        for name in ["meshed", "plain"] {
            pair.lab.service(name).selector("app", name).port("authz", 90, 9191).apply()?;
        }
        let side = async |node: &lab::Node, name: &str| {
            let pod = node.pod(name).sa("server").label("app", "server").label("side", name).start().await?;
            pod.serve(apps::http(8080)).await?;
            pod.serve(apps::grpc(9000)).await?;
            pod.serve(apps::tcp_echo(7000)).await?;
            let service = pair.lab.service(name).selector("side", name).port("http", 80, 8080);
            let service = service.port("grpc", 91, 9000).port("tcp", 70, 7000).apply()?;
            anyhow::Ok(Side { pod, service })
        };
        let sides = [side(&pair.b, "far").await?, side(&pair.a, "near").await?];
        let (meshed_app, plain_app) =
            (meshed.serve(apps::authorizer(9191)).await?, plain.serve(apps::authorizer(9191)).await?);
        pair.apply("mesh.yaml", SETTINGS).await?;
        for pod in [&other, &meshed, &sides[0].pod, &sides[1].pod] {
            pod.enrolled().await?;
        }
        Ok(Self { pair, other, stranger, sides, meshed: meshed_app, plain: plain_app })
    }

    async fn apply(&self, provider: &str, rules: &str) -> Result<()> {
        let yaml = format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
             metadata: {{ name: custom, namespace: default }}\nspec:\n  selector: {{ matchLabels: {{ app: server }} }}\n  \
             action: CUSTOM\n  provider: {{ name: {provider} }}\n  rules: {rules}\n"
        );
        self.pair.apply("custom.yaml", &yaml).await
    }

    /// Has this provider asked about what the rules match, at the pods of both sides.
    async fn ask(&self, provider: &str, rules: &str) -> Result<()> {
        self.apply(provider, rules).await?;
        // Pods follow the configuration one by one.
        for (agent, side) in [(&self.pair.agent_b, "far"), (&self.pair.agent_a, "near")] {
            agent
                .config("the policy is in force", |dump| {
                    let workloads = dump["workloads"].as_array().into_iter().flatten();
                    let custom = workloads
                        .filter(|pod| pod["name"] == side)
                        .map(|pod| &pod["authorization"]["custom"]);
                    let asked = custom.flat_map(|custom| custom.as_array().into_iter().flatten());
                    ensure!(
                        asked.map(|one| &one["provider"]).any(|name| *name == provider),
                        "not at {side} yet"
                    );
                    Ok(())
                })
                .await?;
        }
        Ok(())
    }

    fn client(&self) -> &Pod {
        &self.pair.client
    }

    /// What the authorizer in the mesh was asked about a path.
    fn asked(&self, path: &str) -> Vec<Question> {
        apps::questions(&self.meshed).into_iter().filter(|question| question.path.ends_with(path)).collect()
    }

    /// Questions that all agents have counted for a provider with this result.
    async fn counted(&self, provider: &str, result: &str) -> Result<f64> {
        let labels = [("provider", provider), ("result", result)];
        let mut sum = 0.0;
        for agent in [&self.pair.agent_a, &self.pair.agent_b] {
            sum += metric(&agent.metrics().await?, "mesh_external_authorization_total", &labels);
        }
        Ok(sum)
    }
}

async fn wanting(from: &Pod, url: &str, want: &str) -> Result<Answer> {
    from.http_get(url, &[(WANT, want), ("x-secret", "1"), ("x-shown-a", "a"), ("x-user", "forged")]).await
}

fn echo(answer: &Answer) -> Result<Echo> {
    Ok(serde_json::from_str(&answer.body)?)
}

/// All that either protocol has in common, at one base URL from one client.
async fn answers_are_done(from: &Pod, base: &str, over: &str) -> Result<()> {
    let told = |answer: &Answer, name: &str| answer.headers.get(name).cloned().unwrap_or_default();
    let at = |path: &str| format!("{base}{path}");
    let yes = wanting(from, &at("/asked/yes"), "allow").await?;
    ensure!(yes.status == 200 && told(&yes, "x-told").is_empty(), "{base} {over}: {yes:?}");
    ensure!(echo(&yes)?.headers["x-secret"] == "1", "{yes:?}");

    let no = wanting(from, &at("/asked/no"), "deny").await?;
    ensure!(no.status == 401 && no.body == "not you", "{base} {over}: {no:?}");
    ensure!(told(&no, "x-reason") == "because" && told(&no, "www-authenticate") == "Lab", "{no:?}");

    let bare = wanting(from, &at("/asked/no"), "bare-deny").await?;
    ensure!(bare.status == 403 && bare.body.is_empty(), "{base} {over}: {bare:?}");

    let changed = wanting(from, &at("/asked/changed"), "change").await?;
    let seen = echo(&changed)?;
    ensure!(changed.status == 200 && told(&changed, "x-told") == "yes", "{base} {over}: {changed:?}");
    ensure!(seen.headers["x-user"] == "joe" && !seen.headers.contains_key("x-secret"), "{seen:?}");

    let failed = wanting(from, &at("/asked/failed"), "fail").await?;
    ensure!(failed.status == 403, "{base} {over}: {failed:?}");
    // What no rule matches nobody is asked about.
    let open = wanting(from, &at("/open"), "deny").await?;
    ensure!(open.status == 200, "{base} {over}: {open:?}");
    Ok(())
}

#[tokio::test]
async fn requests_are_permitted_by_what_an_authorizer_says() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("ext-authz").await?;
    for over in ["grpc", "http"] {
        world.ask(over, "[{ to: [{ operation: { paths: ['/asked/*', '/ws', '/lab.Notes/*'] } }] }]").await?;
        for side in &world.sides {
            let direct = format!("http://{}", side.pod.at(8080));
            let base = side.url("/");
            answers_are_done(world.client(), base.trim_end_matches('/'), over).await?;
            // Past the service, and in plaintext from outside of the mesh.
            answers_are_done(world.client(), &direct, over).await?;
            answers_are_done(&world.stranger, &direct, over).await?;
            let h2 = world.client().get(side.url("/asked/yes")).header(WANT, "deny").h2c().send().await?;
            ensure!(h2.status == 401, "{h2:?}");
            // An app of gRPC is answered as one.
            let url = side.service.url(91, "/");
            let called = world.client().call(&url, CallKind::Unary).header(WANT, "deny").send().await?;
            ensure!(called.code == "Unauthenticated" && called.message == "not you", "{called:?}");
            ensure!(world.client().call(&url, CallKind::Unary).send().await?.code == "Ok");
            // What may become something else is asked about too.
            let spoken = world.client().websocket(&side.url("/ws"), false, &["one"]).await?;
            ensure!(spoken.status == 101 && spoken.messages == ["one"], "{spoken:?}");
            ensure!(
                side.pod.stats(8080).await?.paths.keys().all(|path| path != "/asked/no"),
                "it came through"
            );
        }
        ensure!(world.counted(over, "denied").await? >= 12.0 && world.counted(over, "error").await? >= 6.0);
        ensure!(world.counted(over, "allowed").await? >= 12.0 && world.asked("/open").is_empty());
    }
    questions_tell_who_asks_whom(&world)?;
    // The authorizer's own agent has seen the mesh on both ways.
    let metrics = world.pair.agent_a.metrics().await?;
    let labels = [
        ("reporter", "destination"),
        ("destination_workload", "meshed"),
        ("connection_security_policy", "mutual_tls"),
        ("source_principal", "spiffe://cluster.local/ns/default/sa/server"),
    ];
    ensure!(metric(&metrics, "istio_requests_total", &labels) > 20.0, "{metrics}");
    for agent in [&world.pair.agent_a, &world.pair.agent_b] {
        for (status, error) in
            [("status=401", "ext_authz_denied: provider"), ("status=403", "ext_authz_error: provider")]
        {
            eventually("a line of the access log", async || {
                let wanted = [status, "flags=UAEX", error];
                let found =
                    agent.access_log().iter().any(|line| wanted.iter().all(|part| line.contains(part)));
                ensure!(found, "{wanted:?} is not logged");
                Ok(())
            })
            .await?;
        }
    }
    world.pair.finish().await
}

fn questions_tell_who_asks_whom(world: &World) -> Result<()> {
    let (client, server) =
        ("spiffe://cluster.local/ns/default/sa/client", "spiffe://cluster.local/ns/default/sa/server");
    let all = world.asked("/asked/yes");
    let (grpc, http): (Vec<_>, Vec<_>) = all.into_iter().partition(|question| question.over == "grpc");
    ensure!(grpc.len() >= 8 && http.len() >= 8, "{} {}", grpc.len(), http.len());
    for question in grpc.iter().chain(&http) {
        // From the pod that is asked, as itself, whichever node the authorizer is on.
        ensure!(question.caller.contains(&format!("URI={server}")), "{question:?}");
        ensure!(question.method == "GET" && question.headers.contains_key(WANT), "{question:?}");
    }
    for question in &grpc {
        let from = if question.client_ip == world.stranger.ip().to_string() { "" } else { client };
        ensure!(question.client == from && question.server == server, "{question:?}");
        ensure!(question.headers[":path"] == "/asked/yes" && question.path == "/asked/yes", "{question:?}");
        // The proof of who asks is the mesh's word.
        let proof = question.headers.get("x-forwarded-client-cert").cloned().unwrap_or_default();
        ensure!(proof.contains(from) && proof.is_empty() == from.is_empty(), "{question:?}");
    }
    for question in &http {
        ensure!(question.path == "/check/asked/yes" && question.headers["x-mesh"] == "one", "{question:?}");
        ensure!(!question.headers.contains_key("x-secret"), "{question:?}");
    }
    ensure!(http.iter().any(|question| question.headers.contains_key("x-shown-a")), "{http:?}");
    Ok(())
}

#[tokio::test]
async fn without_an_answer_nothing_is_let_in_unless_it_fails_open() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("ext-authz-none").await?;
    let ask = async |provider: &str, want: &str, expected: u16| {
        world.ask(provider, "[{}]").await?;
        for side in &world.sides {
            let answer = wanting(world.client(), &side.url("/"), want).await?;
            ensure!(answer.status == expected, "{provider} {want}: {answer:?}");
        }
        anyhow::Ok(())
    };
    ask("hasty", "hang", 503).await?;
    ask("hasty", "fail", 503).await?;
    ask("hasty-http", "hang", 403).await?;
    ask("open", "hang", 200).await?;
    ask("open", "fail", 200).await?;
    ask("open", "deny", 401).await?;
    ask("missing", "allow", 403).await?;
    ask("missing-open", "deny", 200).await?;
    ensure!(
        world.counted("hasty", "error").await? >= 4.0 && world.counted("open", "failed_open").await? >= 4.0
    );
    // The time that a route gives a request is the authorizer's too.
    let impatient = ["near", "far"].map(|host| {
        format!(
            "---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{ name: {host} }}\n\
             spec: {{ hosts: [{host}], http: [{{ timeout: 0.5s, route: [{{ destination: {{ host: {host} }} }}] }}] }}\n"
        )
    });
    world.pair.apply("impatient.yaml", &impatient.concat()).await?;
    ask("grpc", "hang", 504).await?;
    world.pair.lab.delete("impatient.yaml")?;
    // An authorizer outside of the mesh is asked in plaintext, which tells nothing of who asks.
    ask("unmeshed", "allow", 200).await?;
    ask("unmeshed", "deny", 401).await?;
    let asked = apps::questions(&world.plain);
    ensure!(asked.len() >= 4 && asked.iter().all(|question| question.caller.is_empty()), "{asked:?}");
    // From the pods themselves, never from a node.
    let pods = world.sides.each_ref().map(|side| side.pod.ip().to_string());
    ensure!(asked.iter().all(|question| pods.contains(&question.peer)), "{asked:?}");
    ensure!(pods.iter().all(|pod| asked.iter().any(|question| question.peer == *pod)), "{asked:?}");
    // Nobody listens there any more.
    world.meshed.stop(Duration::from_secs(5)).await?;
    ask("hasty", "allow", 503).await?;
    ask("grpc", "allow", 403).await?;
    ask("http", "allow", 403).await?;
    ask("open", "deny", 200).await?;
    // Nobody knows whom this means.
    world.apply("nobody", "[{}]").await?;
    for side in &world.sides {
        eventually("what nobody can be asked about to be refused", async || {
            let answer = wanting(world.client(), &side.url("/"), "allow").await?;
            ensure!(answer.status == 403 && answer.body == "RBAC: access denied", "{answer:?}");
            Ok(())
        })
        .await?;
    }
    world.pair.finish().await
}

#[tokio::test]
async fn bodies_are_shown_as_far_as_that_is_asked_for_and_reach_the_app_whole() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("ext-authz-body").await?;
    for (provider, bytes, expected, shown) in [
        ("whole", 0, 200, 0),
        ("whole", 100, 200, 100),
        ("whole", 101, 413, 0),
        ("part", 50, 200, 50),
        ("part", 200_000, 200, 100),
        ("grpc", 200_000, 200, 0),
    ] {
        world.ask(provider, "[{}]").await?;
        for side in &world.sides {
            for h2 in [false, true] {
                let path = format!("/{provider}/{bytes}/{}/{h2}", side.pod.name());
                let post = world.client().get(side.url(&path)).method("POST").body_bytes(bytes);
                let post = if h2 { post.h2c() } else { post };
                let answer = post.send().await?;
                ensure!(answer.status == expected, "{path}: {answer:?}");
                let asked = world.asked(&path);
                ensure!(asked.len() == usize::from(expected == 200), "{path}: {asked:?}");
                ensure!(asked.iter().all(|question| question.body.len() == shown), "{path}: {asked:?}");
                ensure!(expected != 200 || echo(&answer)?.body_bytes == bytes, "{path}: {answer:?}");
                let partial =
                    asked.first().and_then(|one| one.headers.get("x-envoy-auth-partial-body").cloned());
                let said = (provider != "grpc").then(|| (bytes > 100).to_string());
                ensure!(expected != 200 || partial == said, "{path}: {partial:?}");
            }
        }
    }
    // Whoever waits for a 100 before it sends gets one.
    world.ask("whole", "[{}]").await?;
    let request = "POST /expects HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n";
    for (from, to) in
        [(world.client(), world.sides[0].service.at(80)), (&world.stranger, world.sides[0].pod.at(8080))]
    {
        let raw = from.raw(to).send(request).expect("HTTP/1.1 100").send("hello").run().await?;
        ensure!(raw.statuses().last() == Some(&200), "{}", raw.text());
    }
    ensure!(world.asked("/expects").iter().all(|question| question.body == "hello"));
    world.pair.finish().await
}

/// Whether bytes come back whole; a connection that is refused may fail in any way.
async fn echoes(from: &Pod, to: std::net::SocketAddr) -> bool {
    from.tcp(to, 1000, &[]).await.is_ok_and(|answer| answer.intact && answer.received == 1000)
}

#[tokio::test]
async fn connections_are_permitted_over_grpc_and_by_rules_about_connections_alone() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("ext-authz-tcp").await?;
    let ports = "[{ to: [{ operation: { ports: ['7000'] } }] }]";
    let requests = "[{ to: [{ operation: { ports: ['7000'], paths: ['/never'] } }] }]";
    for (provider, rules, client, other) in [
        ("grpc", ports, true, false),
        ("http", ports, false, false),
        ("grpc", requests, false, false),
        ("missing", ports, false, false),
        ("missing-open", ports, false, false),
        ("grpc", "[{ to: [{ operation: { ports: ['1'] } }] }]", true, true),
    ] {
        world.ask(provider, rules).await?;
        for side in &world.sides {
            for to in [side.service.at(70), side.pod.at(7000)] {
                eventually("the rules are in force", async || {
                    let seen = (echoes(world.client(), to).await, echoes(&world.other, to).await);
                    ensure!(seen == (client, other), "{provider} {rules} {to}: {seen:?}");
                    Ok(())
                })
                .await?;
            }
        }
    }
    let asked = apps::questions(&world.meshed);
    ensure!(asked.iter().any(|question| question.client.ends_with("/sa/client")), "{asked:?}");
    ensure!(asked.iter().all(|question| question.method.is_empty() && question.over == "grpc"), "{asked:?}");
    let refused = [("side", "destination"), ("kind", "external_denied")];
    for agent in [&world.pair.agent_a, &world.pair.agent_b] {
        let metrics = agent.metrics().await?;
        ensure!(metric(&metrics, "mesh_refused_total", &refused) >= 1.0, "{metrics}");
        let logged = agent.access_log();
        let denied = |line: &String| line.contains("kind=external_denied") && line.contains("flags=UAEX");
        ensure!(logged.iter().any(denied), "{logged:#?}");
    }
    world.pair.finish().await
}

/// What an authorizer has permitted goes on while it is the one to be asked, and is cut when another is.
#[tokio::test]
async fn another_authorizer_cuts_what_it_has_not_permitted() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("ext-authz-cut").await?;
    let rules = "[{ to: [{ operation: { ports: ['7000'] } }] }, \
                 { to: [{ operation: { ports: ['8080'], paths: ['/ws'] } }] }]";
    world.ask("grpc", rules).await?;
    let mut open = Vec::new();
    for side in &world.sides {
        let all = [(LoadKind::Tcp, side.service.url(70, "/")), (LoadKind::WebSocket, side.url("/ws"))];
        for (kind, url) in all {
            open.push(world.client().load(kind, &url, 1, Duration::from_millis(20)).await?);
        }
    }
    for load in &open {
        load.goes_on(2).await?;
    }
    let asked = apps::questions(&world.meshed).len();
    let patient = "name: grpc\n        envoyExtAuthzGrpc: { timeout: 5s,";
    let settings = SETTINGS.replace("name: grpc\n        envoyExtAuthzGrpc: {", patient);
    ensure!(settings != SETTINGS, "nothing was changed");
    world.pair.apply("mesh.yaml", &settings).await?;
    world.ask("grpc", &rules.replace("'/ws'", "'/ws', '/more'")).await?;
    for load in &open {
        load.goes_on(2).await?;
    }
    ensure!(apps::questions(&world.meshed).len() == asked, "somebody was asked again");
    world.ask("unmeshed", rules).await?;
    for load in open {
        eventually("what another has permitted to be cut", async || {
            ensure!(!load.seen()?.errors.is_empty(), "it goes on");
            Ok(())
        })
        .await?;
        load.finish().await?;
    }
    world.pair.finish().await
}
