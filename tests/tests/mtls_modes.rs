//! `PeerAuthentication`: where a pod asks for mutual TLS, plaintext is closed before the app sees a byte of it, counted and
//! logged, and cut where it was open; meshed clients notice nothing of modes that come and go.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::{
    Pair, Pod, Service, apps,
    apps::{Load, LoadKind, RawEnd},
    eventually, metric, peer, require_root,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const QUICK: Duration = Duration::from_millis(20);

/// A `PeerAuthentication` of this place, `NAMESPACE/NAME`.
fn peers(place: &str, spec: &str) -> String {
    let (namespace, name) = place.split_once('/').unwrap_or(("default", place));
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
         metadata: {{ name: {name}, namespace: {namespace} }}\nspec: {spec}\n"
    )
}

fn mode(mode: &str) -> String {
    format!("{{ mtls: {{ mode: {mode} }} }}")
}

/// What holds for the servers alone, by a selector.
fn of_servers(spec: &str) -> String {
    peers("servers", &format!("{{ selector: {{ matchLabels: {{ app: server }} }}, {spec} }}"))
}

/// A server on each node, which speaks HTTP on 8080 and echoes bytes on 7000 and 7001, and who is not in the mesh.
struct World {
    pair: Pair,
    stranger: Pod,
    far: Pod,
    near: Pod,
    services: [Service; 2],
}

impl World {
    async fn new(name: &str) -> Result<Option<Self>> {
        if !require_root()? {
            return Ok(None);
        }
        let pair = Pair::new(name).await?;
        let stranger = pair.a.pod("stranger").unenrolled().start().await?;
        let server = async |node: &lab::Node, name: &str| {
            let pod = node.pod(name).sa("server").label("app", "server").label("side", name).start().await?;
            pod.serve(apps::http(8080)).await?;
            for port in [7000, 7001] {
                pod.serve(apps::tcp_echo(port)).await?;
            }
            let service = pair.lab.service(name).selector("side", name);
            let service = service.port("http", 80, 8080).port("tcp", 70, 7000).port("tcp-other", 71, 7001);
            anyhow::Ok((pod, service.apply()?))
        };
        let (far, far_service) = server(&pair.b, "far").await?;
        let (near, near_service) = server(&pair.a, "near").await?;
        pair.settled().await?;
        for pod in [&far, &near] {
            pod.enrolled().await?;
        }
        Ok(Some(Self { pair, stranger, far, near, services: [far_service, near_service] }))
    }

    fn servers(&self) -> [&Pod; 2] {
        [&self.far, &self.near]
    }

    /// Waits until plaintext to this port of both servers is taken, or is not.
    async fn takes_plaintext(&self, port: u16, taken: bool) -> Result<()> {
        for server in self.servers() {
            eventually("plaintext is taken as the mode says", async || {
                let echoed = echoes(&self.stranger, server.at(port)).await;
                ensure!(echoed == taken, "{} {port}: {echoed}", server.name());
                Ok(())
            })
            .await?;
        }
        Ok(())
    }

    /// The meshed client comes through, both ways, to all ports.
    async fn mesh_comes_through(&self) -> Result<()> {
        for service in &self.services {
            let answer = self.pair.client.get(service.url(80, "/")).send().await?;
            ensure!(answer.status == 200, "{answer:?}");
            for port in [70, 71] {
                ensure!(echoes(&self.pair.client, service.at(port)).await, "{} {port}", service.name);
            }
        }
        for server in self.servers() {
            ensure!(echoes(&self.pair.client, server.at(7000)).await, "past the service");
        }
        Ok(())
    }

    /// The metrics of the agents, each with the server on its node.
    async fn metrics(&self) -> Result<[(String, &'static str); 2]> {
        let (a, b) = (self.pair.agent_a.metrics().await?, self.pair.agent_b.metrics().await?);
        Ok([(b, "far"), (a, "near")])
    }
}

/// Whether bytes come back whole; a connection that is refused may fail in any way.
async fn echoes(from: &Pod, to: std::net::SocketAddr) -> bool {
    from.tcp(to, 1000, &[]).await.is_ok_and(|answer| answer.intact && answer.received == 1000)
}

#[tokio::test]
async fn permissive_takes_both_and_metrics_tell_them_apart() -> Result<()> {
    let Some(world) = World::new("mtls-permissive").await? else { return Ok(()) };
    // The default, what says so, and what this side reads in the same way.
    for spec in [None, Some("PERMISSIVE"), Some("DISABLE"), Some("UNSET")] {
        if let Some(spec) = spec {
            world.pair.apply("peers.yaml", &peers("all", &mode(spec))).await?;
        }
        world.takes_plaintext(7000, true).await?;
        world.mesh_comes_through().await?;
    }
    for (metrics, server) in world.metrics().await? {
        let counted = |name: &str, security: &str| {
            let labels = [
                ("reporter", "destination"),
                ("destination_workload", server),
                ("connection_security_policy", security),
            ];
            metric(&metrics, name, &labels)
        };
        ensure!(counted("istio_requests_total", "mutual_tls") >= 4.0, "{server}\n{metrics}");
        ensure!(counted("istio_requests_total", "none") == 0.0, "{server}\n{metrics}");
        for security in ["mutual_tls", "none"] {
            let opened = counted("istio_tcp_connections_opened_total", security);
            ensure!(opened >= 4.0, "{server} {security}: {opened}\n{metrics}");
        }
        ensure!(metric(&metrics, "mesh_refused_total", &[]) == 0.0, "{metrics}");
    }
    world.pair.finish().await
}

#[tokio::test]
async fn strict_refuses_plaintext_before_the_app_sees_a_byte() -> Result<()> {
    let Some(world) = World::new("mtls-strict").await? else { return Ok(()) };
    // An open connection, through which bytes have gone.
    let mut open = peer::dial(&world.stranger, world.far.at(7000))?;
    let mut back = [0; 4];
    open.write_all(b"ping").await?;
    open.read_exact(&mut back).await?;

    world.pair.apply("peers.yaml", &of_servers("mtls: { mode: STRICT }")).await?;
    world.takes_plaintext(7000, false).await?;
    let ended = tokio::time::timeout(lab::PATIENCE, open.read(&mut back)).await?;
    ensure!(!ended.as_ref().is_ok_and(|read| *read > 0), "the open connection goes on: {ended:?}");
    for server in world.servers() {
        let before = server.stats(8080).await?;
        let raw = world.stranger.raw(server.at(8080)).send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
        let raw = raw.limit(lab::PATIENCE).run().await?;
        ensure!(raw.received.0.is_empty() && raw.end != RawEnd::Open, "{raw:?}");
        ensure!(server.stats(8080).await?.paths == before.paths, "the app was asked");
    }
    world.mesh_comes_through().await?;
    for (metrics, server) in world.metrics().await? {
        let labels = [("side", "destination"), ("kind", "plaintext"), ("pod", server)];
        ensure!(metric(&metrics, "mesh_refused_total", &labels) >= 2.0, "{server}\n{metrics}");
        ensure!(metric(&metrics, "mesh_refused_total", &[("kind", "denied")]) == 0.0, "{metrics}");
        ensure!(metric(&metrics, "istio_tcp_connections_failed_total", &[]) == 0.0, "{metrics}");
    }
    let (cut, _) = &world.metrics().await?[0];
    let labels =
        [("reporter", "destination"), ("response_flags", "NR"), ("connection_security_policy", "none")];
    ensure!(metric(cut, "istio_tcp_connections_closed_total", &labels) >= 1.0, "{cut}");
    let (client, dialled) = (world.stranger.ip().to_string(), world.far.at(8080).to_string());
    let line = world
        .pair
        .agent_b
        .logged_as("the refusal of a plaintext request", |line| {
            line["event"] == "refused" && line["dst.addr"] == dialled && line["src.addr"].starts_with(&client)
        })
        .await?;
    ensure!(line["kind"] == "plaintext" && line["flags"] == "NR", "{line:?}");
    ensure!(line["error"].contains("PeerAuthentication default/servers"), "{line:?}");
    world.pair.finish().await
}

#[tokio::test]
async fn the_narrowest_mode_holds_for_each_port() -> Result<()> {
    let Some(world) = World::new("mtls-ports").await? else { return Ok(()) };
    world.pair.apply("mesh.yaml", &peers("istio-system/mesh", &mode("STRICT"))).await?;
    world.takes_plaintext(7000, false).await?;
    // The namespace says otherwise, then its servers, and one of their ports again.
    world.pair.apply("namespace.yaml", &peers("default/all", &mode("PERMISSIVE"))).await?;
    world.takes_plaintext(7000, true).await?;
    let spec = "mtls: { mode: STRICT }, portLevelMtls: { 7001: { mode: DISABLE } }";
    world.pair.apply("servers.yaml", &of_servers(spec)).await?;
    world.takes_plaintext(7000, false).await?;
    world.takes_plaintext(7001, true).await?;
    world.mesh_comes_through().await?;

    // What cannot be read changes nothing, and is named.
    world.pair.apply("servers.yaml", &peers("servers", "{ portLevelMtls: { 7000: {} } }")).await?;
    let problems = world.pair.agent_b.config_dump().await?["problems"].to_string();
    ensure!(problems.contains("spec.portLevelMtls"), "{problems}");
    world.takes_plaintext(7000, false).await?;
    world.takes_plaintext(7001, true).await?;
    world.pair.finish().await
}

#[tokio::test]
async fn modes_come_and_go_under_load_and_meshed_clients_notice_nothing() -> Result<()> {
    let Some(world) = World::new("mtls-load").await? else { return Ok(()) };
    let mut loads: Vec<Load> = Vec::new();
    for service in &world.services {
        for (kind, port, path) in
            [(LoadKind::Requests, 80, "/"), (LoadKind::KeptAlive, 80, "/"), (LoadKind::WebSocket, 80, "/ws")]
        {
            loads.push(world.pair.client.load(kind, &service.url(port, path), 2, QUICK).await?);
        }
    }
    // Bytes too, which within the node take the agent only where they are asked to.
    loads.push(world.pair.client.load(LoadKind::Tcp, &world.services[0].url(70, "/"), 2, QUICK).await?);
    for round in 0..3 {
        for (word, plaintext) in [("STRICT", false), ("PERMISSIVE", true)] {
            world.pair.apply("peers.yaml", &peers("istio-system/mesh", &mode(word))).await?;
            world.takes_plaintext(7000, plaintext).await?;
            for load in &loads {
                load.goes_on(2).await.map_err(|error| error.context(format!("round {round}, {word}")))?;
            }
        }
    }
    for load in loads {
        let seen = load.finish().await?;
        ensure!(seen.errors.is_empty() && seen.least > 0, "{seen:?}");
    }
    world.pair.finish().await
}
