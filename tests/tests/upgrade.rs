//! An agent is replaced by another while it serves: nothing is refused, nothing is reset, no answer is wrong, nothing is
//! counted twice or not at all; and a successor that fails changes nothing.

use std::{collections::BTreeMap, fs, os::unix::fs::MetadataExt as _, time::Duration};

use anyhow::{Context as _, Result, ensure};
use lab::{
    Agent, Cgroups, Pair, Pod, Process, Service, apps,
    apps::{Load, LoadKind, Loaded},
    bpf, cgroup, eventually, metric, require_root,
};
use mesh_agent::handover::{self, Place};
use nix::sys::signal::Signal;

const HTTP: u16 = 80;
const TCP: u16 = 7;
const GRPC: u16 = 90;

/// Time between two answers of a long connection, and between two short requests of one client.
const SLOW: Duration = Duration::from_millis(200);
const QUICK: Duration = Duration::from_millis(20);

/// How long an old agent may take to end once its last connection has.
const END: Duration = Duration::from_secs(10);

/// Two nodes; the server, which speaks everything, is on node b.
struct World {
    pair: Pair,
    server: Pod,
    service: Service,
}

impl World {
    async fn new(name: &str, flags: &[&str]) -> Result<Option<Self>> {
        if !require_root()? {
            return Ok(None);
        }
        let pair = Pair::with(name, flags).await?;
        let server = pair.b.pod("server").sa("server").label("app", "server").start().await?;
        server.serve(apps::http(8080)).await?;
        server.serve(apps::tcp_echo(7000)).await?;
        server.serve(apps::grpc(9090)).await?;
        server.enrolled().await?;
        let service = pair.lab.service("server").selector("app", "server");
        let service = service.port("http", HTTP, 8080).port("tcp", TCP, 7000).port("grpc", GRPC, 9090);
        let service = service.apply()?;
        pair.settled().await?;
        Ok(Some(Self { pair, server, service }))
    }

    async fn load(&self, kind: LoadKind, clients: u32, pause: Duration) -> Result<Load> {
        self.load_from(&self.pair.client, (kind, clients, pause)).await
    }

    async fn load_from(&self, pod: &Pod, (kind, clients, pause): (LoadKind, u32, Duration)) -> Result<Load> {
        let url = match kind {
            LoadKind::Requests | LoadKind::KeptAlive => self.service.url(HTTP, "/"),
            LoadKind::WebSocket => self.service.url(HTTP, "/ws"),
            LoadKind::Tcp => self.service.url(TCP, "/"),
            LoadKind::Grpc => self.service.url(GRPC, "/"),
        };
        pod.load(kind, &url, clients, pause).await
    }

    async fn loads(&self, of: &[(LoadKind, u32, Duration)]) -> Result<Vec<Load>> {
        let mut loads = Vec::new();
        for (kind, clients, pause) in of {
            loads.push(self.load(*kind, *clients, *pause).await?);
        }
        Ok(loads)
    }

    /// A metric as both agents tell it, each for its side.
    async fn counted(&self, name: &str, labels: &[(&str, &str)]) -> Result<[u64; 2]> {
        let of = |text: String, reporter| {
            let labels: Vec<_> = labels.iter().copied().chain([("reporter", reporter)]).collect();
            metric(&text, name, &labels) as u64
        };
        Ok([
            of(self.pair.agent_a.metrics().await?, "source"),
            of(self.pair.agent_b.metrics().await?, "destination"),
        ])
    }

    /// Waits until both agents have counted this.
    async fn counts(&self, name: &str, labels: &[(&str, &str)], expected: [u64; 2]) -> Result<()> {
        eventually("both agents to count all there was", async || {
            let counted = self.counted(name, labels).await?;
            ensure!(counted == expected, "{name} {labels:?}: {counted:?} and not {expected:?}");
            Ok(())
        })
        .await
    }

    /// Links and their programs, of the agent of node b.
    fn programs(&self) -> Result<BTreeMap<u32, u32>> {
        let cgroup = bpf::Target::Cgroup(cgroup::id(self.pair.b.cgroup())?);
        let netns = bpf::Target::Netns(fs::metadata(self.server.netns().path())?.ino());
        let ours = |link: &bpf::Link| [cgroup, netns].contains(&link.target);
        Ok(bpf::links()?.into_iter().filter(ours).map(|link| (link.id, link.program)).collect())
    }
}

async fn all_go_on(loads: &[Load]) -> Result<()> {
    for load in loads {
        load.goes_on(2).await?;
    }
    Ok(())
}

/// What each load has seen in all; only right answers are accepted.
async fn all_end(loads: Vec<Load>) -> Result<Vec<Loaded>> {
    let mut all = Vec::new();
    for load in loads {
        let what = format!("{load:?}");
        let seen = load.finish().await?;
        ensure!(seen.errors.is_empty() && seen.least > 0, "{what}: {seen:?}");
        all.push(seen);
    }
    Ok(all)
}

async fn ends_well(old: Process) -> Result<()> {
    let status = old.wait(END).await?;
    ensure!(status.success(), "{} ended with {status}\n{}", old.label(), old.tail());
    Ok(())
}

#[tokio::test]
async fn ten_upgrades_in_a_row_lose_nothing() -> Result<()> {
    let Some(mut world) = World::new("upgrade", &[]).await? else { return Ok(()) };
    let kinds = [
        (LoadKind::Requests, 4, QUICK),
        (LoadKind::KeptAlive, 4, QUICK),
        (LoadKind::Tcp, 100, SLOW),
        (LoadKind::Grpc, 20, SLOW),
        (LoadKind::WebSocket, 1, QUICK),
    ];
    let loads = world.loads(&kinds).await?;
    all_go_on(&loads).await?;
    let programs = world.programs()?;
    let mut before = Vec::new();
    // The server's agent, whose clients are other agents too.
    for round in 0..10 {
        before.push(world.pair.agent_b.upgrade().await?);
        all_go_on(&loads).await.with_context(|| format!("upgrade {round}"))?;
    }
    let now = world.programs()?;
    let replaced = now.iter().all(|(link, program)| programs[link] != *program);
    ensure!(now.keys().eq(programs.keys()) && replaced, "before: {programs:?}, now: {now:?}");

    // The client's.
    let text = world.pair.agent_a.metrics().await?;
    before.push(world.pair.agent_a.upgrade().await?);
    all_go_on(&loads).await.context("upgrade of the client's agent")?;
    let requests = [("reporter", "source"), ("request_protocol", "http")];
    let [then, now] = [text, world.pair.agent_a.metrics().await?]
        .map(|text| metric(&text, "istio_requests_total", &requests));
    ensure!(now > then && then > 0.0, "{now} after {then}");
    known_flows(&world).await?;

    let seen = all_end(loads).await?;
    for old in before {
        ends_well(old).await?;
    }
    all_is_counted_once(&world, seen).await?;
    world.pair.finish().await
}

/// Client and server on one node: one agent carries both ends, and asks the network, with a connection each second, whether
/// they may talk.
#[tokio::test]
async fn ten_upgrades_lose_nothing_between_pods_of_one_node() -> Result<()> {
    let Some(mut world) = World::new("upgrade-near", &["--carrier-interval=1"]).await? else { return Ok(()) };
    let near = world.pair.b.pod("near").sa("near").start().await?;
    near.enrolled().await?;
    world.pair.settled().await?;
    let kinds = [
        (LoadKind::Requests, 2, QUICK),
        (LoadKind::KeptAlive, 4, QUICK),
        (LoadKind::Tcp, 20, SLOW),
        (LoadKind::Grpc, 4, SLOW),
        (LoadKind::WebSocket, 1, QUICK),
    ];
    let mut loads = Vec::new();
    for kind in kinds {
        loads.push(world.load_from(&near, kind).await?);
    }
    let mut before = Vec::new();
    for round in 0..10 {
        before.push(world.pair.agent_b.upgrade().await?);
        all_go_on(&loads).await.with_context(|| format!("upgrade {round}"))?;
    }
    let seen = all_end(loads).await?;
    for old in before {
        ends_well(old).await?;
    }
    ensure!((seen[2].opened, seen[3].opened, seen[4].opened) == (20, 4, 1), "opened again: {seen:?}");
    // One agent after the other keeps a connection of HTTP/1.1, and says so when it does no longer.
    ensure!(seen[1].opened <= 4 * 11, "{seen:?}");
    let answers = seen[0].answers + seen[1].answers;
    let labels = [("response_code", "200"), ("request_protocol", "http"), ("destination_workload", "server")];
    eventually("the agent to count both sides of all there was", async || {
        let text = world.pair.agent_b.metrics().await?;
        for reporter in ["source", "destination"] {
            let labels: Vec<_> = labels.into_iter().chain([("reporter", reporter)]).collect();
            let counted = metric(&text, "istio_requests_total", &labels) as u64;
            ensure!(counted == answers, "{reporter}: {counted} and not {answers}");
        }
        let refused = metric(&text, "mesh_refused_total", &[]);
        ensure!(refused == 0.0, "{refused} were refused");
        Ok(())
    })
    .await?;
    world.pair.finish().await
}

/// Both agents tell everything that all agents of their node have seen.
async fn all_is_counted_once(world: &World, seen: Vec<Loaded>) -> Result<()> {
    let [quick, kept, tcp, grpc, socket]: [Loaded; 5] =
        seen.try_into().map_err(|seen| anyhow::anyhow!("{seen:?}"))?;
    ensure!((tcp.opened, grpc.opened) == (100, 20), "{tcp:?} {grpc:?}");
    // Kept by the client's agent, until that one was replaced.
    ensure!(kept.opened == 8, "{kept:?}");
    let server = ("destination_workload", "server");
    let http = [("response_code", "200"), ("request_protocol", "http"), server];
    world.counts("istio_requests_total", &http, [quick.answers + kept.answers; 2]).await?;
    let calls = [("request_protocol", "grpc"), ("grpc_response_status", "0")];
    world.counts("istio_requests_total", &calls, [20; 2]).await?;
    // The WebSocket is bytes to the server's agent.
    world.counts("istio_tcp_connections_opened_total", &[server], [100, 101]).await?;
    world.counts("istio_tcp_connections_closed_total", &[server], [100, 101]).await?;
    for agent in [&world.pair.agent_a, &world.pair.agent_b] {
        ensure!(metric(&agent.metrics().await?, "mesh_refused_total", &[]) == 0.0, "something was refused");
    }
    // Each connection of an app is a flow, reported once, by one agent or another. (What has no connection, such as ICMP, is
    // one as well, and ends when it has been silent for a minute.)
    let opened: u64 = [quick, kept, tcp, grpc, socket].iter().map(|load| load.opened).sum();
    let tcp = [("transport", "tcp")];
    eventually("every flow to be reported once", async || {
        let closed = metric(&world.pair.agent_a.metrics().await?, "mesh_flows_closed_total", &tcp) as u64;
        ensure!(closed == opened, "{closed} flows of {opened}");
        Ok(())
    })
    .await
}

/// Of the connections that older agents hold, the ones that serve know whose they are.
async fn known_flows(world: &World) -> Result<()> {
    for (agent, pod, peer) in
        [(&world.pair.agent_a, "client", "server"), (&world.pair.agent_b, "server", "client")]
    {
        let flows = agent.flows().await?;
        let open = flows.as_array().context("meshctl flows gives a list")?.iter();
        let open = open.filter(|flow| flow["pod"] == pod && flow["state"] == "established");
        let identity = format!("spiffe://cluster.local/ns/default/sa/{peer}");
        let known = open.filter(|flow| flow["peer_identity"] == identity).count();
        ensure!(known >= 100, "of the open flows of {pod} only {known} are known");
    }
    Ok(())
}

/// The process ends by itself, and badly; what it says.
async fn fails(successor: Agent) -> Result<String> {
    let (status, said) = successor.ends().await?;
    ensure!(!status.success(), "it did not fail: {said}");
    Ok(said)
}

/// A successor finds other maps than it would make.
async fn other_layouts_are_refused(agent: &Agent) -> Result<()> {
    let maps = agent.bpf_dir().join("maps");
    let [pods, counters, aside] = ["PODS", "COUNTERS", "aside"].map(|name| maps.join(name));
    for (from, to) in [(&pods, &aside), (&counters, &pods)] {
        fs::rename(from, to)?;
    }
    let said = fails(agent.successor().spawn()?).await?;
    for (from, to) in [(&pods, &counters), (&aside, &pods)] {
        fs::rename(from, to)?;
    }
    ensure!(said.contains("laid out in another way"), "{said}");
    Ok(())
}

#[tokio::test]
async fn a_successor_that_fails_leaves_the_old_one_serving() -> Result<()> {
    let Some(mut world) = World::new("nosuccessor", &[]).await? else { return Ok(()) };
    let loads = world.loads(&[(LoadKind::Requests, 2, QUICK), (LoadKind::Tcp, 5, QUICK)]).await?;
    let (agent, programs) = (&world.pair.agent_b, world.programs()?);
    fails(agent.successor().arg("--no-such-flag").spawn()?).await?;
    fails(agent.successor().config_dir("/nowhere".into()).spawn()?).await?;
    let said = fails(agent.successor().cgroups(Cgroups::At("/proc".into())).spawn()?).await?;
    ensure!(said.contains("--cgroup-root"), "{said}");

    other_layouts_are_refused(agent).await?;

    // One of another node, and one that is offered everything and then is no more, as if it had been killed.
    let socket = agent.run_dir().join("handover.sock");
    ensure!(fs::metadata(&socket)?.mode() & 0o777 == 0o600, "others may speak to the agent");
    let call = |node: &'static str| {
        let (socket, bpf_dir) = (socket.clone(), agent.bpf_dir());
        tokio::task::spawn_blocking(move || handover::call(&socket, Place { node: node.to_owned(), bpf_dir }))
    };
    let refused = call("elsewhere").await?.map(|_| ()).map_err(|error| error.to_string());
    ensure!(refused.as_ref().is_err_and(|text| text.contains("serves node b")), "{refused:?}");
    let Some((succession, offered)) = call("b").await?? else { anyhow::bail!("nobody hands over") };
    ensure!(offered.pods.len() == 1 && offered.pods[0].name == "server", "{offered:?}");
    // Meanwhile it serves, and follows the configuration.
    all_go_on(&loads).await?;
    world.pair.settled().await?;
    drop((succession, offered));
    eventually("the old agent to go on", async || {
        ensure!(agent.process().stderr().contains("this agent goes on"), "{}", agent.process().tail());
        Ok(())
    })
    .await?;
    all_go_on(&loads).await?;
    ensure!(world.programs()? == programs, "its programs were replaced");

    // And the next one succeeds.
    let old = world.pair.agent_b.upgrade().await?;
    all_go_on(&loads).await?;
    all_end(loads).await?;
    ends_well(old).await?;
    world.pair.finish().await
}

#[tokio::test]
async fn an_old_agent_ends_at_its_deadline_or_when_it_is_told_twice() -> Result<()> {
    let Some(mut world) = World::new("oldagent", &["--handover-deadline=1"]).await? else { return Ok(()) };
    let load = world.load(LoadKind::Tcp, 1, QUICK).await?;
    let old = world.pair.agent_b.upgrade().await?;
    ends_well(old).await?;
    let cut = load.process().clone();
    eventually("the connection to be cut", async || {
        ensure!(!load.seen()?.errors.is_empty(), "{:?}", load.seen()?);
        Ok(())
    })
    .await?;
    ensure!(cut.wait(END).await?.success(), "{}", cut.tail());
    world.pair.finish().await?;

    let Some(mut world) = World::new("toldtwice", &[]).await? else { return Ok(()) };
    let load = world.load(LoadKind::Tcp, 1, QUICK).await?;
    let old = world.pair.agent_b.upgrade().await?;
    old.signal(Signal::SIGTERM)?;
    eventually("the old agent to hear it", async || {
        ensure!(old.stderr().contains("told once more"), "{}", old.tail());
        Ok(())
    })
    .await?;
    load.goes_on(2).await?;
    old.signal(Signal::SIGTERM)?;
    ends_well(old).await?;
    let answer = world.pair.client.get(world.service.url(HTTP, "/")).send().await?;
    ensure!(answer.status == 200, "{answer:?}");
    let seen = load.finish().await?;
    ensure!(!seen.errors.is_empty(), "the connection outlived its agent: {seen:?}");
    world.pair.finish().await
}
