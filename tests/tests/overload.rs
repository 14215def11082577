//! Near its memory limit the agent sheds new work by each pod's share, keeps what is established, and is never killed.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use lab::{
    Agent, Lab, Node, Pod, Process, Service,
    apps::{self, LoadKind},
    binary,
    cgroup::MemoryLimit,
    eventually, metric, require_root,
};

/// What the agent of the clients' node may use, bytes.
const LIMIT: u64 = 192 << 20;

/// Requests of the greedy pod at a time, each with a body that is kept for a retry while the app lets it wait: together
/// they would take more than there is.
const AT_ONCE: u64 = 2000;
const BODY: u64 = 60_000;
/// All of them, if nobody ends it.
const COUNT: u64 = 20_000;

const HTTP: u16 = 80;
const TCP: u16 = 90;
const APP: u16 = 8080;
const ECHO: u16 = 9090;

struct World {
    lab: Lab,
    agent: Agent,
    far_agent: Agent,
    limit: Option<MemoryLimit>,
    greedy: Pod,
    modest: Pod,
    server: Pod,
    service: Service,
}

/// Within the cgroup's limit where there can be one, else told its limit.
async fn limited(lab: &Lab, node: &Node) -> Result<(Agent, Option<MemoryLimit>)> {
    let limit = MemoryLimit::new(lab.unique(), &node.agent_cgroup(), LIMIT)?;
    let agent = node.agent();
    let agent = match &limit {
        Some(limit) => {
            let script = std::env::temp_dir().join(lab.unique()).join("limited-agent");
            limit.script(&script, &binary("mesh-agent", "MESH_AGENT_BIN", "mesh-agent")?)?;
            agent.binary(script)
        }
        None => agent.arg(format!("--memory-limit={LIMIT}")),
    };
    Ok((agent.start().await?, limit))
}

impl World {
    async fn new() -> Result<Self> {
        let lab = Lab::new("overload").await?;
        let (a, b) = (lab.node("a").await?, lab.node("b").await?);
        let greedy = a.pod("greedy").sa("greedy").start().await?;
        let modest = a.pod("modest").sa("modest").start().await?;
        let server = b.pod("server").sa("server").label("app", "server").start().await?;
        server.serve(apps::http(APP)).await?;
        server.serve(apps::tcp_echo(ECHO)).await?;
        let service = lab.service("server").selector("app", "server");
        let service = service.port("http", HTTP, APP).port("tcp", TCP, ECHO).apply()?;
        let (agent, limit) = limited(&lab, &a).await?;
        let far_agent = b.agent().start().await?;
        for pod in [&greedy, &modest, &server] {
            pod.enrolled().await?;
        }
        Ok(Self { lab, agent, far_agent, limit, greedy, modest, server, service })
    }

    /// Requests that are not answered until the app is told to.
    fn flood(&self) -> Result<Process> {
        let mut command = Command::new(binary("lab-app", "MESH_LAB_APP", "lab")?);
        command.args(["many", &self.service.url(HTTP, "/hold"), "--method", "POST", "--timeout-ms", "60000"]);
        for (flag, number) in [("--body-bytes", BODY), ("--at-once", AT_ONCE), ("--count", COUNT)] {
            command.args([flag, &number.to_string()]);
        }
        self.greedy.spawn(command)
    }

    async fn level(&self) -> Result<f64> {
        Ok(metric(&self.agent.metrics().await?, "mesh_overload_level", &[]))
    }

    /// What was refused the greedy pod: requests, and connections.
    async fn shed(&self, pod: &str) -> Result<(f64, f64)> {
        let metrics = self.agent.metrics().await?;
        let requests = [("source_workload", pod), ("response_code", "503"), ("response_flags", "OM")];
        let connections = [("kind", "overload"), ("pod", pod), ("side", "source")];
        let connections = metric(&metrics, "mesh_refused_total", &connections);
        Ok((metric(&metrics, "istio_requests_total", &requests), connections))
    }

    fn logged(&self, what: &str) -> bool {
        self.agent.log().iter().any(|line| line.contains(what))
    }
}

/// What operators are told while it lasts.
async fn is_told(world: &World) -> Result<()> {
    let status = world.agent.status().await?;
    let overload = &status["overload"];
    ensure!(overload["memory_limit_bytes"] == LIMIT, "{overload}");
    ensure!(overload["level"] == "high" && overload["shed"][0] == "default/greedy", "{overload}");
    ensure!(overload["shed"].as_array().is_some_and(|shed| shed.len() == 1), "{overload}");
    let metrics = world.agent.metrics().await?;
    let limit = metric(&metrics, "mesh_memory_limit_bytes", &[]);
    ensure!((limit - LIMIT as f64).abs() < f64::EPSILON, "{limit}");
    let [used, promised] =
        ["mesh_memory_bytes", "mesh_memory_promised_bytes"].map(|name| metric(&metrics, name, &[]));
    ensure!(used > 0.0 && used <= LIMIT as f64, "{used}");
    ensure!(used + promised > 0.75 * LIMIT as f64, "{used} and {promised}");
    ensure!(world.logged("near the memory limit"), "{:#?}", world.agent.log());
    let lines = world.agent.access_log();
    let has = |parts: &[&str]| lines.iter().any(|line| parts.iter().all(|part| line.contains(part)));
    let request = ["event=request", "src.workload=greedy", "status=503", "flags=OM"];
    ensure!(has(&request), "no line of a shed request");
    let connection = ["event=refused", "kind=overload", "pod=greedy", "flags=OM"];
    ensure!(has(&connection), "no line of a shed connection");
    ensure!(!has(&["pod=modest", "kind=overload"]) && !has(&["src.workload=modest", "flags=OM"]));
    Ok(())
}

/// It was never out of memory: the same process, which nobody was killed beside.
fn lives(world: &World, pid: i32) -> Result<()> {
    let process = world.agent.process();
    ensure!(process.pid() == pid && process.status().is_none(), "the agent has ended\n{}", process.tail());
    let resident = world.agent.peak_rss_bytes()?;
    ensure!(resident <= LIMIT, "{} MiB were resident", resident >> 20);
    let Some(limit) = &world.limit else { return Ok(()) };
    ensure!(limit.killed()? == 0, "somebody was killed for want of memory");
    eprintln!("peak: {} MiB resident, {} MiB charged", resident >> 20, limit.peak()? >> 20);
    Ok(())
}

/// Nothing is refused any more once those who are held are answered, and those who come after them.
async fn is_over(world: &World) -> Result<()> {
    eventually("the pressure is over", async || {
        world.server.release(APP).await?;
        let level = world.level().await?;
        ensure!(level.abs() < f64::EPSILON, "{level} at {} MiB", world.agent.rss_bytes()? >> 20);
        Ok(())
    })
    .await
}

#[tokio::test]
async fn the_greedy_pod_is_shed_and_the_modest_one_is_served() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new().await?;
    let (pid, memory) = (world.agent.process().pid(), world.agent.rss_bytes()?);
    let url = world.service.url(HTTP, "");
    let stream = world.service.url(TCP, "");
    let pause = Duration::from_millis(50);
    let established = world.modest.load(LoadKind::Tcp, &stream, 2, pause).await?;
    let kept = world.modest.load(LoadKind::KeptAlive, &url, 1, pause).await?;
    let greedy_stream = world.greedy.load(LoadKind::Tcp, &stream, 1, pause).await?;
    let greedy_kept = world.greedy.load(LoadKind::KeptAlive, &url, 1, pause).await?;

    let began = Instant::now();
    let flood = world.flood()?;
    eventually("requests and connections of the greedy pod are shed", async || {
        let shed = world.shed("greedy").await?;
        ensure!(shed.0 > 0.0 && shed.1 > 0.0, "{shed:?} at {} MiB", world.agent.rss_bytes()? >> 20);
        Ok(())
    })
    .await?;
    eprintln!("{} MiB before, shedding {:?} after the flood began", memory >> 20, began.elapsed());
    eventually("operators are told", async || is_told(&world).await).await?;
    let before = world.shed("greedy").await?;
    // New connections of the modest pod, in both versions, and requests on the one that it has.
    let fresh = world.modest.load(LoadKind::Requests, &url, 2, pause).await?;
    for load in [&fresh, &kept, &established, &greedy_stream] {
        load.goes_on(8).await?;
    }
    eventually("the greedy pod is shed meanwhile", async || {
        let shed = world.shed("greedy").await?;
        ensure!(shed.0 + shed.1 > before.0 + before.1, "{shed:?}, before: {before:?}");
        Ok(())
    })
    .await?;
    let refused = greedy_kept.seen()?;
    ensure!(!refused.errors.is_empty(), "{refused:?}");
    lives(&world, pid)?;

    let ended = Instant::now();
    let held = world.server.release(APP).await?;
    is_over(&world).await?;
    eprintln!("{held} were held; over after {:?} at {} MiB", ended.elapsed(), world.agent.rss_bytes()? >> 20);
    ensure!(world.logged("memory pressure is over"), "{:#?}", world.agent.log());
    // What was under way has ended as it should.
    eventually("all who were held are answered", async || {
        let labels = [("source_workload", "greedy"), ("response_code", "200"), ("response_flags", "-")];
        let served = metric(&world.agent.metrics().await?, "istio_requests_total", &labels);
        ensure!(held > 0 && served >= held as f64, "{served} of {held}");
        Ok(())
    })
    .await?;
    flood.stop(Duration::from_secs(5)).await?;
    is_over(&world).await?;
    let again = world.greedy.get(world.service.url(HTTP, "/")).many(40, 4, None).await?;
    ensure!(again.statuses.get(&200) == Some(&40), "{again:?}");
    for load in [fresh, kept, established, greedy_stream] {
        let seen = load.finish().await?;
        ensure!(seen.errors.is_empty(), "{seen:?}");
    }
    drop(greedy_kept.finish().await?);
    ensure!(world.shed("modest").await? == (0.0, 0.0), "the modest pod was shed");
    lives(&world, pid)?;
    world.finish().await
}

impl World {
    async fn finish(self) -> Result<()> {
        for agent in [self.agent, self.far_agent] {
            let status = agent.stop().await?;
            ensure!(status.success(), "an agent ended with {status}");
        }
        self.lab.finish().await.context("the lab")
    }
}
