//! Rate limits: enforced where the pod is, for whoever asks and however, exactly, and told in Envoy's words.

use anyhow::{Result, ensure};
use lab::{
    Pair, Pod, Service,
    apps::{self, CallKind},
    metric, require_root,
};

/// So many an hour: what comes back during a test is none.
fn policy(service: &str, burst: u32) -> String {
    format!(
        "apiVersion: mesh.io/v1alpha1\nkind: ServicePolicy\nmetadata: {{ name: {service}, namespace: default }}\n\
         spec:\n  service: {service}\n  rateLimits:\n    - {{ name: each, requests: 5, per: 1h, burst: {burst}, \
         sharedBy: IDENTITY, paths: [{{ prefix: /limited }}] }}\n"
    )
}

/// How many of ten requests, five at once, are let in; all others are told 429.
async fn let_in(client: &Pod, url: &str) -> Result<u64> {
    let tally = client.get(url).many(10, 5, None).await?;
    let [ok, refused] = [200, 429].map(|status| tally.statuses.get(&status).copied().unwrap_or_default());
    ensure!(ok + refused == 10 && tally.errors.is_empty(), "{tally:?}");
    Ok(ok)
}

struct World {
    pair: Pair,
    other: Pod,
    stranger: Pod,
    servers: [(Pod, Service); 2],
}

impl World {
    async fn new(name: &str) -> Result<Self> {
        let pair = Pair::new(name).await?;
        let other = pair.a.pod("other").sa("other").start().await?;
        let stranger = pair.a.pod("stranger").unenrolled().start().await?;
        let server = async |node: &lab::Node, name: &str| {
            let pod = node.pod(name).label("app", name).start().await?;
            pod.serve(apps::http(8080)).await?;
            pair.lab.apply(&format!("{name}.yaml"), &policy(name, 5))?;
            let service = pair.lab.service(name).selector("app", name).port("http", 80, 8080).apply()?;
            anyhow::Ok((pod, service))
        };
        let servers = [server(&pair.b, "far").await?, server(&pair.a, "near").await?];
        pair.settled().await?;
        for pod in [&other, &servers[0].0, &servers[1].0] {
            pod.enrolled().await?;
        }
        Ok(Self { pair, other, stranger, servers })
    }
}

#[tokio::test]
async fn each_identity_has_its_tokens_and_no_way_around() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("ratelimit").await?;
    let pair = &world.pair;
    for (pod, service) in &world.servers {
        let url = service.url(80, "/limited");
        let first = pair.client.get(&url).send().await?;
        let told = |name: &str| first.headers.get(name).map(String::as_str);
        ensure!(first.status == 200 && told("x-ratelimit-limit") == Some("5"), "{first:?}");
        ensure!(told("x-ratelimit-remaining") == Some("4"), "{first:?}");
        ensure!(let_in(&pair.client, &url).await? == 4, "{}", pod.name());
        // Past the service, by a longer way to the same path, at another path.
        let direct = format!("http://{}/limited/x", pod.at(8080));
        ensure!(let_in(&pair.client, &direct).await? == 0, "{} is asked past its service", pod.name());
        let dots = pair.client.get(service.url(80, "/free/../limited")).send().await?;
        ensure!(dots.status == 429, "{dots:?}");
        ensure!(let_in(&pair.client, &service.url(80, "/free")).await? == 10);
        // Others have their own; those in plaintext have one together.
        ensure!(let_in(&world.other, &url).await? == 5, "{}", pod.name());
        ensure!(let_in(&world.stranger, &direct).await? == 5, "{}", pod.name());
        ensure!(let_in(&world.stranger, &direct).await? == 0, "{}", pod.name());
    }
    world.pair.finish().await
}

#[tokio::test]
async fn a_refusal_is_told_counted_and_logged_and_a_change_gives_what_is_due() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("ratelimittold").await?;
    let pair = &world.pair;
    for ((_, service), agent) in world.servers.iter().zip([&pair.agent_b, &pair.agent_a]) {
        let url = service.url(80, "/limited");
        ensure!(let_in(&pair.client, &url).await? == 5);
        let refused = pair.client.get(service.url(80, "/limited/told")).send().await?;
        ensure!(refused.status == 429 && refused.body == "local_rate_limited", "{refused:?}");
        let told = |name: &str| refused.headers.get(name).map(String::as_str).unwrap_or_default();
        ensure!(told("x-envoy-ratelimited") == "true" && told("x-ratelimit-remaining") == "0", "{refused:?}");
        // A token comes every 720 seconds, and little of that is over.
        let wait: u64 = told("retry-after").parse()?;
        ensure!((400..=720).contains(&wait), "{refused:?}");
        let host = service.host();
        let metrics = agent.metrics().await?;
        let limited = [("service", &*host), ("limit", "each")];
        let flagged = [
            ("reporter", "destination"),
            ("response_flags", "RL"),
            ("response_code", "429"),
            ("destination_service", &*host),
        ];
        let counted = (
            metric(&metrics, "mesh_rate_limited_requests_total", &limited),
            metric(&metrics, "istio_requests_total", &flagged),
        );
        ensure!(counted == (6.0, 6.0), "{counted:?} in\n{metrics}");
        let line = agent.logged(&[("path", "/limited/told"), ("reporter", "destination")]).await?;
        ensure!(line.get("flags").is_some_and(|flags| flags == "RL"), "{line:?}");
        ensure!(line.get("error").is_some_and(|error| error.contains("sa/client")), "{line:?}");

        // Two more fit into the bucket from now on; what was taken stays taken.
        pair.apply(&format!("{}.yaml", service.name), &policy(&service.name, 7)).await?;
        ensure!(let_in(&pair.client, &url).await? == 2, "{}", service.name);
    }
    world.pair.finish().await
}

/// gRPC has no 429: as Envoy by default, `UNAVAILABLE`, in the head of an answer that has nothing else, with what the limit
/// has to tell. And what a later limit refuses takes nothing of an earlier one.
#[tokio::test]
async fn calls_are_told_by_their_status_and_limits_are_all_or_nothing() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("ratelimitgrpc").await?;
    let limits = "
apiVersion: mesh.io/v1alpha1
kind: ServicePolicy
metadata: { name: notes, namespace: default }
spec:
  service: notes
  rateLimits:
    - { name: all, requests: 6, per: 1h }
    - { name: each, requests: 2, per: 1h, sharedBy: IDENTITY, paths: [{ prefix: /lab.Notes/ }] }
";
    // To be asked too much is no sign against a pod.
    let rule = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: notes, namespace: default }
spec: { host: notes, trafficPolicy: { outlierDetection: { consecutive5xxErrors: 3, maxEjectionPercent: 100 } } }
";
    let other = pair.a.pod("other").sa("other").start().await?;
    for (node, name, agent) in [(&pair.b, "far", &pair.agent_b), (&pair.a, "near", &pair.agent_a)] {
        let server = node.pod(name).label("app", name).start().await?;
        server.serve(apps::grpc(50051)).await?;
        let service = pair.lab.service(name).selector("app", name).port("grpc", 80, 50051).apply()?;
        pair.lab.apply("rule.yaml", &rule.replace("notes", name))?;
        pair.apply("limits.yaml", &limits.replace("notes", name)).await?;
        server.enrolled().await?;
        other.enrolled().await?;
        let url = service.url(80, "");
        let call = async |pod: &Pod| pod.call(&url, CallKind::Unary).send().await;
        for _ in 0..2 {
            let called = call(&pair.client).await?;
            ensure!(called.code == "Ok", "{called:?}");
        }
        for _ in 0..10 {
            let called = call(&pair.client).await?;
            ensure!(called.code == "Unavailable" && called.message == "local_rate_limited", "{called:?}");
            let told = |name: &str| called.metadata.get(name).map(String::as_str).unwrap_or_default();
            ensure!(told("x-envoy-ratelimited") == "true" && told("x-ratelimit-limit") == "2", "{called:?}");
            let wait: u64 = told("retry-after").parse()?;
            ensure!((1_000..=1_800).contains(&wait), "{called:?}");
        }
        let labels = [("reporter", "destination"), ("grpc_response_status", "14"), ("response_flags", "RL")];
        let of_server = [&labels[..], &[("destination_workload", name)]].concat();
        let counted = metric(&agent.metrics().await?, "istio_requests_total", &of_server);
        ensure!((counted - 10.0).abs() < 0.5, "{counted}");
        let ejections = metric(&pair.agent_a.metrics().await?, "mesh_endpoint_ejections_total", &[]);
        ensure!(ejections < 0.5, "{name} was ejected");
        // Four of the six that all share are left, whatever was refused.
        for _ in 0..2 {
            let called = call(&other).await?;
            ensure!(called.code == "Ok", "{called:?}");
        }
        let health = pair.client.grpc(&url, "count/1").await?;
        ensure!(health.check == "SERVING" && health.ended == "Ok", "{health:?}");
        let refused = pair.client.grpc(&url, "count/1").await?;
        ensure!(refused.check == "Unavailable", "{refused:?}");
    }
    pair.finish().await
}
