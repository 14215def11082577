//! Root inside a pod, with `NET_ADMIN`, gets nothing that is not its own: it stays captured, is nobody but itself, does
//! not reach the agent or what the kernel holds for it, and leaves the node's other pods alone.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context as _, Result, ensure};
use lab::{Agent, Pair, Pod, Service, apps, eventually, metric, require_root};
use serde_json::{Value, json};

/// Two nodes; on the first an attacker, its neighbour with an app, and a client; on the other a server.
struct World {
    pair: Pair,
    attacker: Pod,
    neighbour: Pod,
    server: Pod,
    /// The server's, which nothing routes: it answers through the mesh or not at all.
    service: Service,
}

impl World {
    async fn new(name: &str) -> Result<Self> {
        let pair = Pair::new(name).await?;
        let attacker = pair.a.pod("attacker").sa("attacker").start().await?;
        let neighbour = pair.a.pod("neighbour").sa("neighbour").label("app", "neighbour").start().await?;
        let server = pair.b.pod("server").sa("server").label("app", "server").start().await?;
        neighbour.serve(apps::http(8080)).await?;
        server.serve(apps::http(8080)).await?;
        let service = pair.lab.service("server").selector("app", "server").port("http", 80, 8080).apply()?;
        pair.settled().await?;
        for pod in [&attacker, &neighbour, &server] {
            pod.enrolled().await?;
        }
        Ok(Self { pair, attacker, neighbour, server, service })
    }

    fn vip(&self) -> String {
        self.service.at(80).to_string()
    }

    /// Requests of the attacker that its agent has answered for, as itself.
    async fn answered(&self) -> Result<u64> {
        let own =
            [("reporter", "source"), ("source_principal", "spiffe://cluster.local/ns/default/sa/attacker")];
        Ok(metric(&self.pair.agent_a.metrics().await?, "istio_requests_total", &own) as u64)
    }

    async fn refused(&self, agent: &Agent, pod: &str, kind: &str) -> Result<u64> {
        let labels = [("pod", pod), ("kind", kind)];
        Ok(metric(&agent.metrics().await?, "mesh_refused_total", &labels) as u64)
    }

    /// Another pod of the node is served, over and over, until `work` has ended: every answer right, none missing.
    async fn while_others_are_served<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let done = Arc::new(AtomicBool::new(false));
        let (stop, client, url) = (Arc::clone(&done), self.pair.client.clone(), self.service.url(80, "/"));
        let served = tokio::spawn(async move {
            let mut answers = 0;
            while !stop.load(Ordering::Relaxed) || answers == 0 {
                let tally = client.get(&url).many(20, 2, None).await?;
                let right = tally.pods.get("server").copied().unwrap_or_default();
                ensure!(right == 20 && tally.statuses.get(&200) == Some(&20), "after {answers}: {tally:?}");
                answers += right;
            }
            Ok(answers)
        });
        let worked = work.await;
        done.store(true, Ordering::Relaxed);
        let answers = served.await?.context("another pod of the node")?;
        println!("{answers} answers to another pod of the node meanwhile");
        worked
    }

    /// The attacker is captured as ever.
    async fn still_captured(&self) -> Result<()> {
        let before = self.answered().await?;
        let answer = self.attacker.http_get(&self.service.url(80, "/"), &[]).await?;
        ensure!(answer.status == 200 && answer.echo()?.pod == "server", "{answer:?}");
        eventually("the request is counted as the attacker's", async || {
            let now = self.answered().await?;
            ensure!(now == before + 1, "{now} requests, {before} before");
            Ok(())
        })
        .await
    }
}

#[tokio::test]
async fn no_option_of_a_socket_gets_around_the_agent() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("options").await?;
    let said = world.attacker.untrusted("options", &[&world.vip()]).await?;
    let said = said.as_object().context("answers by option")?;
    let good = said.values().filter(|answer| **answer == json!(200)).count() as u64;
    // A socket bound to an interface is not reached over loopback: the connection fails, and goes nowhere else.
    let bad: Vec<_> =
        said.iter().filter(|(_, answer)| **answer != json!(200)).map(|(name, _)| name).collect();
    ensure!(bad.iter().all(|name| *name == "SO_BINDTODEVICE"), "{said:?}");
    eventually("each was the agent's", async || {
        let answered = world.answered().await?;
        ensure!(answered == good, "{answered} of {good} ({said:?})");
        Ok(())
    })
    .await?;
    world.pair.finish().await
}

#[tokio::test]
async fn a_listener_serves_nobody_who_dials_it() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("listeners").await?;
    let stranger = world.pair.b.pod("stranger").unenrolled().start().await?;
    let own = [15001, 15006, 15008].map(|port| world.attacker.at(port).to_string());
    let loopback = [15001, 15006, 15008].map(|port| format!("127.0.0.1:{port}"));
    let others = [15001, 15006, 15008].map(|port| world.neighbour.at(port).to_string());
    let far = [15001, 15006, 15008].map(|port| world.server.at(port).to_string());
    let targets: Vec<&str> =
        [&own, &loopback, &others, &far].into_iter().flatten().map(String::as_str).collect();
    for (from, targets) in [(&world.attacker, &targets[..]), (&stranger, &targets[6..])] {
        let said = from.untrusted("dial", targets).await?;
        let answers: Vec<_> = said.as_object().context("answers by target")?.iter().collect();
        ensure!(answers.len() == targets.len(), "{said}");
        // 15008 says in TLS that this is no TLS.
        let served = |target: &str, answer: &Value| match answer.as_str() {
            Some("closed" | "ConnectionResetError" | "ConnectionRefusedError") => false,
            Some("bytes") => !target.ends_with(":15008"),
            _ => true,
        };
        ensure!(!answers.iter().any(|(target, answer)| served(target, answer)), "{}: {said}", from.name());
    }
    let (a, b) = (&world.pair.agent_a, &world.pair.agent_b);
    eventually("every dial is counted as what it was", async || {
        // Its own 15001 and 15006 at two addresses, and three ports each of two other pods.
        let illegal = world.refused(a, "attacker", "illegal_destination").await?;
        ensure!(illegal == 4 + 6, "{illegal} of the attacker's");
        let tls = world.refused(a, "attacker", "tls_failure").await?;
        ensure!(tls == 2, "{tls} of its own 15008");
        for (agent, pod) in [(a, "neighbour"), (b, "server")] {
            let refused = world.refused(agent, pod, "illegal_destination").await?;
            ensure!(refused == 2, "{refused} of the stranger's at {pod}");
        }
        Ok(())
    })
    .await?;
    world.still_captured().await?;
    world.pair.finish().await
}

/// What an app's `accept` and the mesh say of who called.
#[tokio::test]
async fn nobody_is_seen_at_an_address_or_by_a_header_that_is_not_its_own() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("borrowed").await?;
    let near = world.pair.lab.service("near").selector("app", "neighbour").port("http", 80, 8080).apply()?;
    world.pair.settled().await?;
    let client = world.pair.client.ip().to_string();
    let targets = [near.at(80), world.neighbour.at(8080), world.service.at(80), world.server.at(8080)]
        .map(|at| at.to_string());
    for source in ["127.0.0.1", "127.9.9.9", &client, "10.99.99.99"] {
        for target in &targets {
            let said = world.attacker.untrusted("borrow", &[source, target]).await?;
            // As without a mesh: from loopback nothing leaves the pod.
            if source.starts_with("127.") {
                ensure!(said["answer"] == "OSError", "bound to {source}, {target} answered: {said}");
                continue;
            }
            let peer = said["answer"]["echo"]["peer"].as_str().unwrap_or_default();
            let peer: std::net::SocketAddr =
                peer.parse().with_context(|| format!("{source} to {target}: {said}"))?;
            let seen: IpAddr = peer.ip().to_canonical();
            ensure!(seen == world.attacker.ip(), "bound to {source}, {target} saw {seen}");
        }
    }
    // The mesh's own headers say what the mesh says.
    let url = near.url(80, "/");
    let answer = world
        .attacker
        .get(&url)
        .header("mesh-port", "8081")
        .header("mesh-app-protocol", "h2")
        .header("x-envoy-attempt-count", "77")
        .header("x-forwarded-client-cert", "URI=spiffe://cluster.local/ns/default/sa/client")
        .send()
        .await?;
    let headers = answer.echo()?.headers;
    let certificate = headers.get("x-forwarded-client-cert").map(String::as_str).unwrap_or_default();
    ensure!(certificate.ends_with("URI=spiffe://cluster.local/ns/default/sa/attacker"), "{headers:?}");
    ensure!(headers.get("x-envoy-attempt-count").map(String::as_str) == Some("1"), "{headers:?}");
    ensure!(!headers.keys().any(|name| name.starts_with("mesh-")), "{headers:?}");
    // Packets that lie of where they come from open nothing.
    let before = world.server.stats(8080).await?.connections;
    for target in [world.server.at(8080), world.server.at(15008), world.neighbour.at(8080)] {
        world.attacker.untrusted("forged", &[&client, &target.to_string(), "50"]).await?;
    }
    ensure!(world.server.stats(8080).await?.connections == before, "a forged connection came to be");
    for agent in [&world.pair.agent_a, &world.pair.agent_b] {
        let metrics = agent.metrics().await?;
        for name in ["istio_requests_total", "istio_tcp_connections_opened_total"] {
            let borrowed = metric(&metrics, name, &[("source_workload", "client")]);
            ensure!(borrowed == 0.0, "{name} counts what the client never did: {metrics}");
        }
    }
    world.pair.finish().await
}

#[tokio::test]
async fn ports_of_the_mesh_cannot_be_shared_or_used_again() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("ports").await?;
    let own = world.attacker.ip().to_string();
    let said = world.attacker.untrusted("squat", &[&own]).await?;
    ensure!(said["taken"] == json!([]), "{said}");
    let said = world.attacker.untrusted("replay", &[&own, &world.vip(), "50"]).await?;
    ensure!(said["bytes"] == 0 && said["dials"].as_u64() > Some(50), "{said}");
    let said = world.attacker.untrusted("listen_on_hash", &[&world.vip(), "30"]).await?;
    ensure!(said["good"] == 30 && said["strangers"] == 0, "{said}");
    world.still_captured().await?;
    world.pair.finish().await
}

#[tokio::test]
async fn what_the_kernel_holds_for_the_agent_is_out_of_reach() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("kernel").await?;
    let said = world.attacker.untrusted("bpf", &[]).await?;
    let errors = said.as_object().context("errors by call")?;
    ensure!(
        errors.len() == 7 && errors.values().all(|error| *error == json!(1)),
        "not all are EPERM: {said}"
    );
    let steps =
        ["tc qdisc add dev eth0 clsact", "tc filter del dev eth0 ingress", "tc qdisc del dev eth0 clsact"];
    let said = world.attacker.untrusted("network", &steps).await?;
    ensure!(said.as_object().is_some_and(|said| said.values().all(|code| *code == json!(0))), "{said}");
    world.still_captured().await?;
    let programs = lab::bpf::tcx_programs(&world.attacker.netns().path())?;
    ensure!(programs == [("eth0".to_owned(), 2)], "{programs:?}");
    // Whoever is not root does not come near the agent's socket.
    let socket = world.pair.agent_a.run_dir().join("admin.sock");
    let mut curl = std::process::Command::new("setpriv");
    curl.args(["--reuid=65534", "--regid=65534", "--clear-groups", "curl", "-sS", "--unix-socket"]);
    let said = world
        .attacker
        .run({
            curl.arg(socket).arg("http://admin/config_dump");
            curl
        })
        .await?;
    ensure!(!said.status.success() && said.stdout.is_empty(), "{said:?}");
    let node = world.pair.a.addresses().v4;
    let said = world.attacker.untrusted("dial", &[&format!("{node}:15000"), "127.0.0.1:15000"]).await?;
    ensure!(said.as_object().is_some_and(|said| said.values().all(Value::is_string)), "{said}");
    world.pair.finish().await
}

/// Destroying the agent's sockets inside the pod cuts off the pod, and nobody else.
#[tokio::test]
async fn closing_the_agents_listeners_is_no_way_out() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("sockets").await?;
    let kill = "ss -K -tln sport = :15001";
    world.while_others_are_served(async { world.attacker.untrusted("network", &[kill]).await }).await?;
    if world.attacker.listens(15001) {
        println!("skipped: this kernel destroys no sockets (CONFIG_INET_DIAG_DESTROY)");
        return world.pair.finish().await;
    }
    let said = world.attacker.untrusted("dial", &[&world.vip(), &world.server.at(8080).to_string()]).await?;
    ensure!(
        said.as_object().is_some_and(|said| said.values().all(|one| one == "ConnectionRefusedError")),
        "{said}"
    );
    eventually("the operator is told", async || {
        let status = world.pair.agent_a.status().await?.to_string();
        ensure!(status.contains("closed from inside the pod"), "{status}");
        Ok(())
    })
    .await?;
    let log = world.pair.agent_a.log();
    let told = log.iter().filter(|line| line.contains("closed from inside the pod")).count();
    ensure!(told == 1, "{told} lines: {log:#?}");
    world.pair.finish().await
}

#[tokio::test]
async fn a_flood_leaves_others_alone() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("flood").await?;
    let vip = world.vip();
    let args = [vip.as_str(), "10000"];
    let flood = async {
        tokio::try_join!(world.attacker.untrusted("flood", &args), world.attacker.untrusted("flood", &args))
    };
    let (one, two) = world.while_others_are_served(flood).await?;
    let connected = [one, two].iter().filter_map(|said| said["connected"].as_u64()).sum::<u64>();
    ensure!(connected > 19_000, "{connected} of 20,000 connected");
    world.still_captured().await?;
    world.pair.finish().await
}

/// Sockets in repair mode connect without a packet, so that a table of original destinations is soon full.
#[tokio::test]
async fn a_full_table_is_the_pods_own_affair() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("full").await?;
    let (ip, vip) = (world.service.ip().to_string(), world.vip());
    let args = [ip.as_str(), "4", "17000", &vip];
    let said = world.while_others_are_served(world.attacker.untrusted("hold", &args)).await?;
    ensure!(said["kept"] == 68_000 && said["during"] == "ConnectionRefusedError", "{said}");
    eventually("the pod is served again", async || world.still_captured().await).await?;
    world.pair.finish().await
}
