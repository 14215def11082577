//! `RequestAuthentication`: a token that is not to be believed is refused at the pod's node, whatever way the request comes;
//! one that is believed is taken out, told to the app as headers, and can be asked about by authorization policies; who has
//! none passes as nobody; and what carries no requests is untouched.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lab::{
    Issuer, Pair, Pod, Service,
    apps::{self, CallKind},
    eventually, metric, peer, require_root,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};

/// A pod that serves HTTP on 8080 and gRPC on 9000, and echoes bytes on 7000 and on 7001, which nothing
/// declares, no more than 7002, where it greets first, and 8081, which is HTTP.
struct Side {
    pod: Pod,
    service: Service,
}

struct World {
    pair: Pair,
    /// Not in the mesh.
    stranger: Pod,
    far: Side,
    near: Side,
    issuer: Issuer,
}

impl World {
    async fn new(name: &str) -> Result<Option<Self>> {
        Self::with(name, &[]).await
    }

    async fn with(name: &str, flags: &[&str]) -> Result<Option<Self>> {
        if !require_root()? {
            return Ok(None);
        }
        let pair = Pair::with(name, flags).await?;
        let stranger = pair.a.pod("stranger").unenrolled().start().await?;
        let side = async |node: &lab::Node, name: &str| {
            let pod = node.pod(name).sa("server").label("app", "server").label("side", name).start().await?;
            pod.serve(apps::http(8080)).await?;
            pod.serve(apps::grpc(9000)).await?;
            for port in [7000, 7001] {
                pod.serve(apps::tcp_echo(port)).await?;
            }
            pod.serve(apps::server_first(7002)).await?;
            pod.serve(apps::http(8081)).await?;
            let service = pair.lab.service(name).selector("side", name);
            let service = service.port("http", 80, 8080).port("grpc", 90, 9000).port("tcp", 70, 7000);
            anyhow::Ok(Side { pod, service: service.apply()? })
        };
        let (far, near) = (side(&pair.b, "far").await?, side(&pair.a, "near").await?);
        let world = Self { pair, stranger, far, near, issuer: Issuer::new()? };
        let rule = json!({
            "issuer": "https://issuer",
            "audiences": ["app"],
            "jwks": world.issuer.jwks(),
            "outputPayloadToHeader": "x-payload",
            "outputClaimToHeaders": [{ "header": "x-sub", "claim": "sub" }],
        });
        world.apply("RequestAuthentication", "tokens", &json!({ "jwtRules": [rule] })).await?;
        for pod in [&world.far.pod, &world.near.pod] {
            pod.enrolled().await?;
        }
        world.take_tokens().await?;
        Ok(Some(world))
    }

    fn sides(&self) -> [&Side; 2] {
        [&self.far, &self.near]
    }

    /// An object of Istio's security API for the servers, in force in both agents.
    async fn apply(&self, kind: &str, name: &str, spec: &Value) -> Result<()> {
        let mut spec = spec.clone();
        spec["selector"] = json!({ "matchLabels": { "app": "server" } });
        let object = json!({
            "apiVersion": "security.istio.io/v1",
            "kind": kind,
            "metadata": { "name": name, "namespace": "default" },
            "spec": spec,
        });
        self.pair.apply(&format!("{name}.yaml"), &object.to_string()).await
    }

    /// Pods follow the configuration one by one: waits until both look for tokens.
    async fn take_tokens(&self) -> Result<()> {
        for side in self.sides() {
            eventually("tokens are looked for", async || {
                let answer = send(&self.stranger, &url(side), Some("x")).await?;
                ensure!(answer.status == 401, "{answer:?}");
                Ok(())
            })
            .await?;
        }
        Ok(())
    }

    fn good(&self) -> Result<String> {
        self.issuer.token("alice", &json!({}))
    }
}

/// The app by the pod's own address.
fn url(side: &Side) -> String {
    format!("http://{}/status/200", side.pod.at(8080))
}

async fn send(from: &Pod, url: &str, token: Option<&str>) -> Result<apps::Answer> {
    let request = from.get(url);
    match token {
        Some(token) => request.header("authorization", &format!("Bearer {token}")).send().await,
        None => request.send().await,
    }
}

/// Every way in: through the service, past it, in both versions of HTTP, and in plaintext.
fn ways<'a>(world: &'a World, side: &Side) -> [(&'a Pod, String); 3] {
    let client = &world.pair.client;
    [(client, side.service.url(80, "/status/200")), (client, url(side)), (&world.stranger, url(side))]
}

#[tokio::test]
async fn tokens_are_held_against_their_rules_whatever_way_they_come() -> Result<()> {
    let Some(world) = World::new("jwt-tokens").await? else { return Ok(()) };
    let good = world.good()?;
    let changed = |changes: Value| world.issuer.token("alice", &changes);
    let parts: Vec<&str> = good.split('.').collect();
    let [header, payload, signature] = parts[..] else { anyhow::bail!("{good}") };
    let root = world.issuer.token("root", &json!({}))?;
    let root = root.split('.').nth(1).context("a payload")?.to_owned();
    // `{"alg":"none"}`
    let none = "eyJhbGciOiJub25lIn0";
    let table = [
        (None, 200, ""),
        (Some(good.clone()), 200, ""),
        (Some(changed(json!({ "exp": Issuer::in_seconds(-30)? }))?), 200, ""),
        (Some(changed(json!({ "exp": Issuer::in_seconds(-120)? }))?), 401, "Jwt is expired"),
        (Some(changed(json!({ "nbf": Issuer::in_seconds(3600)? }))?), 401, "Jwt not yet valid"),
        (Some(changed(json!({ "aud": ["other"] }))?), 403, "Audiences in Jwt are not allowed"),
        (Some(changed(json!({ "iss": "https://other" }))?), 401, "Jwt issuer is not configured"),
        (Some(Issuer::new()?.token("alice", &json!({}))?), 401, "Jwt verification fails"),
        (Some(format!("{header}.{root}.{signature}")), 401, "Jwt verification fails"),
        (Some(format!("{none}.{payload}.")), 401, "Jwt header [alg] is not supported"),
        (Some(format!("{none}.{payload}.{signature}")), 401, "Jwt header [alg] is not supported"),
        (Some("rubbish".to_owned()), 401, "Jwt is not in the form of Header.Payload.Signature"),
    ];
    for side in world.sides() {
        for (from, url) in ways(&world, side) {
            for (token, status, body) in &table {
                for h2 in [false, true] {
                    let request = from.get(&url);
                    let request = if h2 { request.h2c() } else { request };
                    let request = match token {
                        Some(token) => request.header("authorization", &format!("Bearer {token}")),
                        None => request,
                    };
                    let answer = request.send().await?;
                    let what = format!("{url} {token:?}: {answer:?}");
                    ensure!(answer.status == *status, "{what}");
                    ensure!(*status == 200 || answer.body.starts_with(body), "{what}");
                    let challenge = answer.headers.get("www-authenticate").cloned().unwrap_or_default();
                    let expected = "error=\"invalid_token\"";
                    ensure!((*status != 200) == challenge.ends_with(expected), "{what}");
                }
            }
        }
    }
    // Counted as Envoy does, and logged with the reason.
    for (agent, server) in [(&world.pair.agent_b, "far"), (&world.pair.agent_a, "near")] {
        let metrics = agent.metrics().await?;
        let labels = [
            ("reporter", "destination"),
            ("destination_workload", server),
            ("response_code", "401"),
            ("response_flags", "UAEX"),
        ];
        let counted = metric(&metrics, "istio_requests_total", &labels);
        ensure!(counted >= 48.0, "{server}: {counted}\n{metrics}");
        eventually("each refusal is logged", async || {
            let reason = "jwt_authn_access_denied{Jwt_is_expired}";
            let lines = agent.access_log();
            let is = |line: &&String| {
                line.contains(reason) && line.contains("status=401") && line.contains("reporter=destination")
            };
            let count = lines.iter().filter(is).count();
            ensure!(count >= 6, "{server}: {count} lines");
            Ok(())
        })
        .await?;
    }
    world.pair.finish().await
}

/// A payload that a client makes up: longer than what a request's id or a signature could hold by chance.
const FORGED: &str = "eyJmb3JnZWQiOnRydWV9";

#[tokio::test]
async fn the_app_sees_claims_as_headers_and_no_token() -> Result<()> {
    let Some(world) = World::new("jwt-headers").await? else { return Ok(()) };
    let good = world.good()?;
    let payload = good.split('.').nth(1).context("a payload")?;
    for side in world.sides() {
        for (from, url) in ways(&world, side) {
            let forged = |url: &str| from.get(url).header("x-sub", "root").header("x-payload", FORGED);
            let with_token = forged(&url).header("authorization", &format!("Bearer {good}")).send().await?;
            let in_query = forged(&format!("{url}?a=1&access_token={good}&b=2")).send().await?;
            for answer in [&with_token, &in_query] {
                let text = answer.body.clone();
                ensure!(answer.status == 200, "{url}: {answer:?}");
                ensure!(text.contains("alice") && text.contains(payload), "{url}: {text}");
                ensure!(
                    !text.contains("root") && !text.contains(&good) && !text.contains(FORGED),
                    "{url}: {text}"
                );
            }
            ensure!(in_query.body.contains("?a=1&b=2"), "{url}: {}", in_query.body);
            let without = forged(&url).send().await?;
            ensure!(without.status == 200, "{url}: {without:?}");
            ensure!(
                !without.body.contains("root") && !without.body.contains(FORGED),
                "{url}: {}",
                without.body
            );
        }
    }
    // Two of them: both have to be good.
    let url = url(&world.far);
    let bad = Issuer::new()?.token("alice", &json!({}))?;
    for (other, expected) in [(&good, 200), (&bad, 401)] {
        let request = world.stranger.get(format!("{url}?access_token={other}"));
        let answer = request.header("authorization", &format!("Bearer {good}")).send().await?;
        ensure!(answer.status == expected, "{answer:?}");
    }
    world.pair.finish().await
}

#[tokio::test]
async fn policies_ask_for_the_token_of_a_request() -> Result<()> {
    let Some(world) = World::new("jwt-policies").await? else { return Ok(()) };
    let (alice, bob) = (world.good()?, world.issuer.token("bob", &json!({ "groups": ["ops"] }))?);
    let deny_nobody =
        json!({ "action": "DENY", "rules": [{ "from": [{ "source": { "notRequestPrincipals": ["*"] } }] }] });
    let allow_alice = json!({
        "action": "ALLOW",
        "rules": [{ "from": [{ "source": { "requestPrincipals": ["https://issuer/alice"] } }] }],
    });
    let allow_ops = json!({
        "action": "ALLOW",
        "rules": [{ "when": [{ "key": "request.auth.claims[groups]", "values": ["ops"] }] }],
    });
    for (policy, statuses) in
        [(deny_nobody, [403, 200, 200]), (allow_alice, [403, 200, 403]), (allow_ops, [403, 403, 200])]
    {
        world.apply("AuthorizationPolicy", "policy", &policy).await?;
        for side in world.sides() {
            for (from, url) in ways(&world, side) {
                for (token, expected) in [None, Some(&*alice), Some(&*bob)].into_iter().zip(statuses) {
                    eventually("the policy is in force", async || {
                        let answer = send(from, &url, token).await?;
                        ensure!(answer.status == expected, "{policy} {url}: {answer:?}");
                        Ok(())
                    })
                    .await?;
                }
                // A bad token is refused for what it is, before policies are asked.
                let bad = send(from, &url, Some("a.b.c")).await?;
                ensure!(bad.status == 401, "{policy} {url}: {bad:?}");
            }
        }
    }
    world.pair.finish().await
}

#[tokio::test]
async fn grpc_calls_are_told_by_their_status() -> Result<()> {
    let Some(world) = World::new("jwt-grpc").await? else { return Ok(()) };
    let other = world.issuer.token("alice", &json!({ "aud": "other" }))?;
    for side in world.sides() {
        let direct = format!("http://{}", side.pod.at(9000));
        let base = side.service.url(90, "");
        for (from, base) in [(&world.pair.client, base.trim_end_matches('/')), (&world.stranger, &direct)] {
            for (token, code, message) in [
                (None, "Ok", ""),
                (Some(world.good()?), "Ok", ""),
                (Some("a.b.c".to_owned()), "Unauthenticated", "Jwt header is an invalid Base64url encoded"),
                (Some(other.clone()), "PermissionDenied", "Audiences in Jwt are not allowed"),
            ] {
                let call = from.call(base, CallKind::Unary).text("hello");
                let call = match &token {
                    Some(token) => call.header("authorization", &format!("Bearer {token}")),
                    None => call,
                };
                let called = call.send().await?;
                ensure!(called.code == code && called.message == message, "{base} {token:?}: {called:?}");
            }
        }
    }
    world.pair.finish().await
}

/// Bytes are no requests, and rules about tokens say nothing of them; on a port that is declared HTTP there are none.
#[tokio::test]
async fn plain_tcp_is_untouched() -> Result<()> {
    let Some(world) = World::new("jwt-tcp").await? else { return Ok(()) };
    for side in world.sides() {
        let service = side.service.at(70);
        for (from, to) in [
            (&world.pair.client, service),
            (&world.pair.client, side.pod.at(7000)),
            (&world.pair.client, side.pod.at(7001)),
            (&world.stranger, side.pod.at(7000)),
            (&world.stranger, side.pod.at(7001)),
        ] {
            let echoed = from.tcp(to, 100_000, &[]).await?;
            ensure!(echoed.intact && echoed.received == 100_000, "{to}: {echoed:?}");
        }
        let bytes = world.stranger.tcp(side.pod.at(8080), 1000, &[]).await;
        ensure!(
            bytes.is_err() || bytes.is_ok_and(|answer| !answer.intact),
            "bytes came through to a port for HTTP"
        );
    }
    world.pair.finish().await
}

/// Where nothing is declared whoever speaks first decides, and a client cannot wait until it is not looked at any more.
#[tokio::test]
async fn on_undeclared_ports_servers_may_greet_and_clients_cannot_wait_it_out() -> Result<()> {
    let Some(world) = World::with("jwt-silence", &["--detection-timeout=1"]).await? else { return Ok(()) };
    for side in world.sides() {
        let greeting = side.pod.at(7002);
        for from in [&world.pair.client, &world.stranger] {
            let answer = from.tcp(greeting, 100, &["--greeting"]).await?;
            ensure!(answer.greeting.is_some() && answer.intact, "{answer:?}");
        }
        let mut slow = peer::dial(&world.stranger, side.pod.at(8081))?;
        // Thrice the time after which nothing is expected of a client any more; the app itself has nothing to say.
        ensure!(
            timeout(Duration::from_secs(3), slow.read_u8()).await.is_err(),
            "the connection ended while nobody spoke"
        );
        slow.write_all(b"GET /slow HTTP/1.1\r\nhost: app\r\nx-sub: root\r\nconnection: close\r\n\r\n")
            .await?;
        let mut answer = String::new();
        slow.read_to_string(&mut answer).await?;
        ensure!(answer.starts_with("HTTP/1.1 200") && !answer.contains("root"), "{answer}");
    }
    world.pair.finish().await
}

/// A call under way is judged anew when rules change, with the token that it came with, as of when it came.
#[tokio::test]
async fn a_change_of_rules_cuts_what_they_would_refuse() -> Result<()> {
    let Some(world) = World::new("jwt-change").await? else { return Ok(()) };
    let good = world.good()?;
    let rules = |issuer: &Issuer, name: &str| json!({ "jwtRules": [{ "issuer": "https://issuer", "jwks": issuer.jwks(), "audiences": [name] }] });
    for side in world.sides() {
        let url = format!("http://{}/hold", side.pod.at(8080));
        let request = world.stranger.get(url).header("authorization", &format!("Bearer {good}"));
        let held = request.send();
        let change = async {
            eventually("the request is under way", async || {
                let answer = world.stranger.get(format!("http://{}/stats", side.pod.at(8080))).send().await?;
                let stats: apps::Stats = serde_json::from_str(&answer.body)?;
                ensure!(stats.held == 1, "{stats:?}");
                Ok(())
            })
            .await?;
            // The same issuer by the same key for the same audience: nothing is cut. Then by another key.
            world.apply("RequestAuthentication", "tokens", &rules(&world.issuer, "app")).await?;
            world.apply("RequestAuthentication", "tokens", &rules(&Issuer::new()?, "app")).await
        };
        let (answer, changed) = tokio::join!(held, change);
        changed?;
        let answer = answer?;
        ensure!(answer.status == 401 && answer.body == "Jwt verification fails", "{answer:?}");
        world.apply("RequestAuthentication", "tokens", &rules(&world.issuer, "app")).await?;
        eventually("the token is good again", async || {
            let answer = send(&world.stranger, &self::url(side), Some(&good)).await?;
            ensure!(answer.status == 200, "{answer:?}");
            Ok(())
        })
        .await?;
    }
    world.pair.finish().await
}
