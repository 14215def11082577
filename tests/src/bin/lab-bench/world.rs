//! What the benchmarks of TCP have in common: a node with a server and a client, and how they are run.

use std::{
    net::SocketAddr,
    process::Command,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use lab::{
    Agent, Lab, Node, PATIENCE, Pod, Process, bench::Connected, binary, cgroup, eventually_within,
    servers::nobody,
};
use serde::de::DeserializeOwned;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{figures::Figure, rounds::Plan};

/// The ports of the server: closed connections hold on to ports of the client, as many to each of these.
pub const PORT: u16 = 7000;
pub const PORTS: u16 = 16;
/// Connections that are open at a time.
pub const WORKERS: u16 = 16;
/// How much longer than it was told a client may take.
const GRACE: Duration = Duration::from_secs(30);
/// How long thousands of connections may take to be there.
const HOLDING: Duration = Duration::from_mins(2);

/// Figures that several suites have.
pub const RATE: &str = "connections";
pub const CPU: &str = "CPU of all, per connection";

/// A node with a server, and a client on the same node.
#[derive(Debug)]
pub struct Site {
    pub node: Node,
    pub server: Pod,
    pub client: Pod,
}

impl Site {
    /// The server is not enrolled; the client as asked for.
    pub async fn new(lab: &Lab, node: &str, enrolled: bool) -> Result<Self> {
        let node = lab.node(node).await?;
        let server = node.pod("server").unenrolled().start().await?;
        let client = node.pod("client");
        let client = if enrolled { client } else { client.unenrolled() }.start().await?;
        let (port, ports) = (PORT.to_string(), PORTS.to_string());
        serve(&server, "server", bench_app(&["answer", "--port", &port, "--ports", &ports])?).await?;
        Ok(Self { node, server, client })
    }

    /// An agent as everything is measured with: no log of single connections, as its alternatives have none.
    pub async fn agent(&self) -> Result<Agent> {
        self.node.agent().arg("--access-log=off").start().await
    }

    /// Short connections of a pod to the server, and what they cost everything on the node.
    pub async fn connect(&self, plan: &Plan, client: &Pod) -> Result<(Connected, Vec<Figure>)> {
        let before = cgroup::cpu_time(self.node.cgroup())?;
        let (server, seconds) = (self.server.ip().to_string(), plan.seconds.to_string());
        let (port, ports, workers) = (PORT.to_string(), PORTS.to_string(), WORKERS.to_string());
        let args = ["--port", &port, "--ports", &ports, "--workers", &workers, "--seconds", &seconds];
        let done: Connected = ask(plan, client, &[&["connect", &server][..], &args].concat()).await?;
        ensure!(done.connections > 0, "no connection was made");
        let used = cgroup::cpu_time(self.node.cgroup())?.saturating_sub(before);
        let figures = vec![
            Figure::new(RATE, "1/s", done.connections as f64 / done.seconds),
            Figure::new(CPU, "µs", each(used, done.connections)),
        ];
        Ok((done, figures))
    }
}

/// A time's share of each of so many, in microseconds.
pub fn each(time: Duration, count: u64) -> f64 {
    time.as_secs_f64() * 1e6 / count as f64
}

/// For the server of single bytes: not the client's, which is the first, where there is another.
pub fn other_core() -> Result<usize> {
    Ok(std::thread::available_parallelism()?.get().min(2) - 1)
}

/// The program of the benchmarks, with these arguments.
pub fn bench_app(args: &[&str]) -> Result<Command> {
    let mut command = Command::new(binary("bench-app", "MESH_BENCH_APP", "lab")?);
    command.args(args);
    Ok(command)
}

/// Starts a server of `bench-app`, in a cgroup of its own below the pod's, and waits until it listens.
pub async fn serve(pod: &Pod, cgroup: &str, command: Command) -> Result<Process> {
    started(pod, cgroup, command, PATIENCE).await
}

/// The same for `bench-app hold`, which is as far once all its connections are there.
pub async fn hold(pod: &Pod, at: SocketAddr, connections: u32, args: &[&str]) -> Result<Process> {
    let (at, connections) = (at.to_string(), connections.to_string());
    let command = bench_app(&[&["hold", &*at, "--connections", &connections], args].concat())?;
    started(pod, "hold", command, HOLDING).await
}

async fn started(pod: &Pod, cgroup: &str, command: Command, limit: Duration) -> Result<Process> {
    let process = pod.spawn_apart(cgroup, command)?;
    eventually_within(limit, "a program that listens, or holds what it should", async || {
        ensure!(process.status().is_none(), "{} has ended\n{}", process.label(), process.tail());
        ensure!(process.stdout().contains("listening"), "{} does not listen yet", process.label());
        Ok(())
    })
    .await?;
    Ok(process)
}

/// Runs a client of `bench-app` in the pod and reads what it says.
pub async fn ask<T: DeserializeOwned>(plan: &Plan, pod: &Pod, args: &[&str]) -> Result<T> {
    let limit = Duration::from_secs_f64(plan.seconds) + GRACE;
    let output = pod.run_within(limit, bench_app(args)?).await?;
    ensure!(output.status.success(), "{} in {}: {}", args[0], pod.name(), output.stderr.trim_end());
    serde_json::from_str(&output.stdout).with_context(|| format!("not an answer: {}", output.stdout))
}

/// Has every TCP connection of the pod but those of the user `nobody` go to this port of its own.
pub async fn redirect(pod: &Pod, port: &str) -> Result<()> {
    // By its user a relay's own connections are told from the app's.
    let user = nobody()?.uid.to_string();
    let mut iptables = Command::new("iptables");
    iptables.args(["-w", "-t", "nat", "-A", "OUTPUT", "-p", "tcp"]);
    iptables.args(["-m", "owner", "!", "--uid-owner", &user]);
    iptables.args(["-j", "REDIRECT", "--to-ports", port]);
    let output = pod.run(iptables).await.context("running iptables (package iptables)")?;
    ensure!(output.status.success(), "iptables: {}", output.stderr);
    Ok(())
}

/// When the agent has compiled its configuration, each time that it has.
pub fn compiled(agent: &Agent) -> Result<Vec<SystemTime>> {
    let lines = agent.log();
    let lines = lines.iter().filter(|line| line.contains("configuration compiled"));
    lines
        .map(|line| {
            let stamp = line.split_whitespace().next().unwrap_or_default();
            let at = OffsetDateTime::parse(stamp, &Rfc3339);
            Ok(SystemTime::from(at.with_context(|| format!("no time begins {line:?}"))?))
        })
        .collect()
}

/// Ends agents, which must succeed, and finds nothing left of them or the lab.
pub async fn finish(lab: Lab, agents: impl IntoIterator<Item = Agent>) -> Result<()> {
    for agent in agents {
        let name = agent.node().name().to_owned();
        let status = agent.stop().await?;
        ensure!(status.success(), "the agent of node {name} ended with {status}");
    }
    lab.finish().await
}
