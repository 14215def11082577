//! A pass between two pods of one node goes only where the network between them would carry a connection: what a
//! NetworkPolicy drops on the veths is refused by the agent, also for who gives itself the other's address.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lab::{Agent, Lab, Node, Pod, Service, apps, eventually, metric, require_root};

/// One node; two clients and a server with a service.
struct World {
    lab: Lab,
    node: Node,
    agent: Agent,
    client: Pod,
    other: Pod,
    server: Pod,
    service: Service,
}

impl World {
    async fn new(name: &str) -> Result<Self> {
        let lab = Lab::new(name).await?;
        let node = lab.node("a").await?;
        let client = node.pod("client").sa("client").start().await?;
        let other = node.pod("other").sa("client").start().await?;
        let server = node.pod("server").sa("client").label("app", "server").start().await?;
        server.serve(apps::http(8080)).await?;
        let service = lab.service("server").selector("app", "server").port("http", 80, 8080).apply()?;
        let agent = node.agent().arg("--carrier-interval=1").start().await?;
        for pod in [&client, &other, &server] {
            pod.enrolled().await?;
        }
        // Whoever is refused by the network is told so each time.
        node.netns().sysctl("net/ipv4/icmp_ratelimit", "0")?;
        Ok(Self { lab, node, agent, client, other, server, service })
    }

    /// What a network plugin does of a policy: nothing passes from the client to the server any more.
    fn policy(&self, verb: &str, action: &str) -> Result<()> {
        let rule = format!("rule {verb} from {} to {} {action}", self.client.ip(), self.server.ip());
        self.node.netns().ip(&[rule])
    }

    async fn status(&self, pod: &Pod) -> Result<u16> {
        Ok(pod.http_get(&self.service.url(80, "/"), &[]).await?.status)
    }
}

#[tokio::test]
async fn what_the_network_refuses_the_pass_refuses() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("policy").await?;
    world.policy("add", "prohibit")?;
    ensure!(world.status(&world.client).await? == 503);
    let line = world.agent.logged(&[("status", "503"), ("reporter", "source")]).await?;
    ensure!(line["error"].contains("NetworkPolicy") && line["flags"].contains("UF"), "{line:?}");
    // Bytes too, and by the pod's own address.
    let dialled = world.client.tcp(world.server.at(8080), 10, &[]).await;
    ensure!(dialled.is_err() || dialled.is_ok_and(|answer| !answer.intact), "passed");
    ensure!(
        metric(&world.agent.metrics().await?, "mesh_refused_total", &[("kind", "connect_failure")]) > 0.0
    );
    ensure!(world.server.stats(8080).await?.connections == 0, "something came to the app");
    // It is about this client alone.
    ensure!(world.status(&world.other).await? == 200);
    // Giving itself the server's address helps nobody, though both have the same identity.
    let server = world.server.ip();
    world.client.netns().ip(&[format!("address add {server}/32 dev lo")])?;
    let said = world.client.untrusted("dial", &[&world.service.at(80).to_string()]).await;
    ensure!(said.as_ref().is_ok_and(|said| !said.to_string().contains("200")), "{said:?}");
    world.client.netns().ip(&[format!("address del {server}/32 dev lo")])?;
    // And the end of the policy is felt at once.
    world.policy("del", "prohibit")?;
    ensure!(world.status(&world.client).await? == 200);
    world.lab.finish().await
}

#[tokio::test]
async fn a_policy_that_comes_later_is_felt() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("later").await?;
    let rule = world.service.host();
    world.lab.apply(
        "rule.yaml",
        &format!(
            "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: server, namespace: default}}\n\
             spec: {{host: {rule}, trafficPolicy: {{connectionPool: {{tcp: {{connectTimeout: 0.5s}}}}}}}}\n"
        ),
    )?;
    world
        .agent
        .config("the time to connect", |dump| {
            ensure!(dump.to_string().contains("500"), "not yet");
            Ok(())
        })
        .await?;
    let began = Instant::now();
    ensure!(world.status(&world.client).await? == 200);
    let first = began.elapsed();
    let began = Instant::now();
    ensure!(world.status(&world.client).await? == 200);
    println!(
        "the first pass took {first:?}, the second {:?}, both with the start of a client",
        began.elapsed()
    );
    world.policy("add", "prohibit")?;
    eventually("the pass is refused", async || {
        let status = world.status(&world.client).await?;
        ensure!(status == 503, "{status}");
        Ok(())
    })
    .await?;
    world.policy("del", "prohibit")?;
    world.policy("add", "blackhole")?;
    // Nothing answers: it is the route's time to connect that ends.
    let began = Instant::now();
    ensure!(world.status(&world.client).await? == 503);
    ensure!(began.elapsed() < Duration::from_secs(8), "waited {:?}", began.elapsed());
    ensure!(world.status(&world.other).await? == 200);
    world.policy("del", "blackhole")?;
    eventually("it passes again", async || {
        let status = world.status(&world.client).await.context("asking")?;
        ensure!(status == 200, "{status}");
        Ok(())
    })
    .await?;
    world.lab.finish().await
}
