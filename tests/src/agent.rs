//! Agents: `mesh-agent node` processes, one per node.
//!
//! Promises: the agent runs in its node's network namespace and cgroup with directories of its own, and is ready
//! when [`AgentBuilder::start`] returns. Reading what it says asks the agent itself: `/metrics`, the admin socket,
//! `meshctl`. An agent that ends by itself fails [`crate::Lab::finish`].

mod cgroups;

use std::{
    collections::BTreeMap,
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use mesh_agent::capture::Mark;
use nix::sys::signal::Signal;
use serde_json::Value;

pub use self::cgroups::Cgroups;
use crate::{
    binary, eventually,
    fetch::{get_inside, get_unix},
    lab::{Role, World},
    node::Node,
    process::Process,
};

/// Where the agent serves `/metrics`, in its node's network namespace.
const METRICS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 15020);
/// Where it serves `/healthz/ready`.
const READINESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 15021);
/// How long `meshctl` and `mesh-agent clean` may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(30);
/// Lines of the access log that a failure shows.
const SHOWN_LINES: usize = 10;
/// How long an agent may take to end.
const GRACE: Duration = Duration::from_secs(20);

/// What an agent is to be started with, besides what its node settles.
#[derive(Debug, Clone)]
#[must_use = "an agent exists once it is started"]
pub struct AgentBuilder {
    node: Node,
    args: Vec<String>,
    env: Vec<(String, String)>,
    state_dir: Option<PathBuf>,
    config_dir: Option<PathBuf>,
    kubeconfig: Option<PathBuf>,
    cgroups: Cgroups,
    binary: Option<PathBuf>,
}

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    node: Node,
    process: Process,
    state_dir: PathBuf,
    /// What its successors are started with.
    builder: AgentBuilder,
}

impl AgentBuilder {
    pub(crate) fn new(node: Node) -> Self {
        Self {
            node,
            args: Vec::new(),
            env: Vec::new(),
            state_dir: None,
            config_dir: None,
            kubeconfig: None,
            cgroups: Cgroups::default(),
            binary: None,
        }
    }

    /// Adds a command-line argument.
    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Sets an environment variable.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Where the embedded CA lives. By default all agents of a lab share one directory, and so one root.
    pub fn state_dir(mut self, path: PathBuf) -> Self {
        self.state_dir = Some(path);
        self
    }

    /// Its directory of manifests. By default all agents of a lab read the lab's.
    pub fn config_dir(mut self, path: PathBuf) -> Self {
        self.config_dir = Some(path);
        self
    }

    /// A cluster in place of a directory.
    pub fn kubeconfig(mut self, path: &Path) -> Self {
        self.kubeconfig = Some(path.to_owned());
        self
    }

    /// Where its programs are attached.
    pub fn cgroups(mut self, cgroups: Cgroups) -> Self {
        self.cgroups = cgroups;
        self
    }

    /// Another `mesh-agent`, for example an older one.
    pub fn binary(mut self, path: PathBuf) -> Self {
        self.binary = Some(path);
        self
    }

    /// Starts the agent and waits until it is ready.
    pub async fn start(self) -> Result<Agent> {
        let agent = self.spawn()?;
        eventually("readiness of the agent", async || {
            if agent.process.status().is_some() {
                return Ok(());
            }
            let (status, body) = get_inside(agent.node.netns(), READINESS, "/healthz/ready").await?;
            ensure!(status.is_success(), "{status}: {body}");
            Ok(())
        })
        .await
        .with_context(|| agent.process.tail())?;
        if let Some(status) = agent.process.status() {
            bail!("{} ended at once ({status})\n{}", agent.process.label(), agent.process.tail());
        }
        Ok(agent)
    }

    /// Starts the agent and returns at once, for tests of agents that cannot become ready.
    pub fn spawn(self) -> Result<Agent> {
        let builder = self.clone();
        let Self { node, args, env, state_dir, config_dir, kubeconfig, .. } = self;
        let state_dir = state_dir.unwrap_or_else(|| node.world.dir.join("state"));
        let path = self.binary.map_or_else(|| binary("mesh-agent", "MESH_AGENT_BIN", "mesh-agent"), Ok)?;
        let mut command = self.cgroups.starts(&path);
        command.arg("node").args(["--node", node.name()]);
        match kubeconfig {
            Some(file) => command.arg("--kubeconfig").arg(file),
            None => command.arg("--config").arg(config_dir.unwrap_or_else(|| node.world.config_dir())),
        };
        command.arg("--state-dir").arg(&state_dir);
        command.arg("--run-dir").arg(run_dir(&node)?);
        self.cgroups.told(&mut command, &node);
        command.arg("--bpf-dir").arg(bpf_dir(&node));
        command.args(["--metrics", &METRICS.to_string(), "--readiness", &READINESS.to_string()]);
        command.args(args).envs(env);
        let process = node.spawn_as(command, Role::Agent)?;
        Ok(Agent { node, process, state_dir, builder })
    }
}

impl Agent {
    /// The node it serves.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Its process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Its directory of sockets.
    pub fn run_dir(&self) -> PathBuf {
        self.node.run_dir()
    }

    /// Where its embedded CA lives, shared by all agents of the lab unless told otherwise.
    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// Its directory of pins.
    pub fn bpf_dir(&self) -> PathBuf {
        bpf_dir(&self.node)
    }

    /// What it serves at `/metrics`.
    pub async fn metrics(&self) -> Result<String> {
        let (status, body) = get_inside(self.node.netns(), METRICS, "/metrics").await?;
        ensure!(status.is_success(), "/metrics answered {status}: {body}");
        Ok(body)
    }

    /// Whether `/healthz/ready` says yes, and what it says.
    pub async fn readiness(&self) -> Result<(bool, String)> {
        let (status, body) = get_inside(self.node.netns(), READINESS, "/healthz/ready").await?;
        Ok((status.is_success(), body))
    }

    /// What its admin socket answers at `path`.
    pub async fn admin(&self, path: &str) -> Result<String> {
        let (status, body) = get_unix(&self.run_dir().join("admin.sock"), path).await?;
        ensure!(status.is_success(), "admin {path} answered {status}: {body}");
        Ok(body)
    }

    /// Its `/config_dump`.
    pub async fn config_dump(&self) -> Result<Value> {
        serde_json::from_str(&self.admin("/config_dump").await?).context("/config_dump is no JSON")
    }

    /// The revision of the configuration in force.
    pub async fn revision(&self) -> Result<u64> {
        let dump = self.config_dump().await?;
        dump["revision"].as_u64().context("/config_dump has no revision")
    }

    /// Waits until a revision newer than `seen` is in force. Take `seen` before the change.
    pub async fn revision_after(&self, seen: u64) -> Result<u64> {
        eventually("a new revision of the configuration", async || {
            let now = self.revision().await?;
            ensure!(now > seen, "{} still has revision {now}", self.process.label());
            Ok(now)
        })
        .await
    }

    /// Waits until the configuration in force is as `expected` wants it; it says what it misses.
    pub async fn config(&self, what: &str, expected: impl Fn(&Value) -> Result<()>) -> Result<()> {
        eventually(what, async || expected(&self.config_dump().await?)).await
    }

    /// Its access log: the lines of its standard output so far.
    pub fn access_log(&self) -> Vec<String> {
        self.process.stdout().lines().map(str::to_owned).collect()
    }

    /// Waits for a line of the access log in which each of these keys has this value, and returns it, its values
    /// without quotes. It is an error if there are several when the first is seen.
    pub async fn logged(&self, expected: &[(&str, &str)]) -> Result<BTreeMap<String, String>> {
        let wanted = |line: &BTreeMap<String, String>| {
            expected.iter().all(|(key, value)| line.get(*key).is_some_and(|found| found == value))
        };
        self.logged_as("a line of the access log", wanted).await.with_context(|| format!("{expected:?}"))
    }

    /// As [`Agent::logged`], for a line that `wanted` recognizes.
    pub async fn logged_as(
        &self,
        what: &str,
        wanted: impl Fn(&BTreeMap<String, String>) -> bool,
    ) -> Result<BTreeMap<String, String>> {
        eventually(what, async || {
            let lines = self.access_log();
            let mut found: Vec<_> =
                lines.iter().map(|line| fields(line)).filter(|line| wanted(line)).collect();
            ensure!(found.len() <= 1, "{} lines: {found:#?}", found.len());
            let last = &lines[lines.len().saturating_sub(SHOWN_LINES)..];
            found.pop().with_context(|| format!("no such line; the last are\n{}", last.join("\n")))
        })
        .await
    }

    /// The memory it holds now.
    pub fn rss_bytes(&self) -> Result<u64> {
        self.process.rss_bytes()
    }

    /// The most memory it ever held.
    pub fn peak_rss_bytes(&self) -> Result<u64> {
        self.process.peak_rss_bytes()
    }

    /// The processor time it has used so far.
    pub fn cpu_time(&self) -> Result<Duration> {
        self.process.cpu_time()
    }

    /// Its own log: the lines of its standard error so far.
    pub fn log(&self) -> Vec<String> {
        self.process.stderr().lines().map(str::to_owned).collect()
    }

    /// Runs `meshctl` against it, which is told its run directory alone, and returns standard output.
    pub async fn meshctl(&self, args: &[&str]) -> Result<String> {
        let mut command = Command::new(binary("meshctl", "MESHCTL_BIN", "mesh-agent")?);
        command.arg("--run-dir").arg(self.run_dir()).args(args);
        run(&self.node, command).await
    }

    /// `meshctl config endpoints` of the clusters whose names contain this.
    pub async fn endpoints(&self, cluster: &str) -> Result<Vec<Value>> {
        let shown = self.meshctl(&["config", "endpoints", cluster, "-o", "json"]).await?;
        serde_json::from_str(&shown).with_context(|| format!("meshctl config endpoints is no JSON: {shown}"))
    }

    /// Runs `mesh-agent ca` on its state directory, and returns what it says.
    pub async fn ca(&self, args: &[&str]) -> Result<String> {
        let mut command = Command::new(binary("mesh-agent", "MESH_AGENT_BIN", "mesh-agent")?);
        command.arg("ca").args(args).arg("--state-dir").arg(&self.state_dir);
        run(&self.node, command).await
    }

    /// The certificates it has or believes, with this role (`root`, `signing`, `workload`): serial numbers by identity.
    pub async fn certificates(&self, role: &str) -> Result<BTreeMap<String, String>> {
        let all: Value = serde_json::from_str(&self.admin("/certs").await?)?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let all = all.as_array().into_iter().flatten().filter(|one| one["role"] == role);
        Ok(all.map(|one| (text(&one["identity"]), text(&one["serial"]))).collect())
    }

    /// `meshctl status -o json`.
    pub async fn status(&self) -> Result<Value> {
        let text = self.meshctl(&["status", "-o", "json"]).await?;
        serde_json::from_str(&text).with_context(|| format!("meshctl status is no JSON: {text}"))
    }

    /// `meshctl flows -o json`.
    pub async fn flows(&self) -> Result<Value> {
        let text = self.meshctl(&["flows", "-o", "json"]).await?;
        serde_json::from_str(&text).with_context(|| format!("meshctl flows is no JSON: {text}"))
    }

    /// Starts another agent as this one was started, which takes over from it, and returns the process that still holds
    /// the connections that were open. From here on this is the successor.
    pub async fn upgrade(&mut self) -> Result<Process> {
        let successor = self.successor().spawn()?;
        eventually("a successor that has taken over", async || {
            let process = &successor.process;
            ensure!(process.status().is_none(), "the successor ended\n{}", process.tail());
            let taken = process.stderr().contains("agent started");
            ensure!(taken, "it does not serve yet\n{}", process.tail());
            Ok(())
        })
        .await?;
        let before = std::mem::replace(self, successor);
        self.node.world.no_longer_an_agent(&before.process);
        Ok(before.process)
    }

    /// An agent to be started as this one was, to take over from it.
    pub fn successor(&self) -> AgentBuilder {
        self.builder.clone()
    }

    /// Stops it with SIGTERM. It is an error if it has ended already.
    pub async fn stop(self) -> Result<ExitStatus> {
        if let Some(status) = self.process.status() {
            bail!("{} had ended by itself ({status})\n{}", self.process.label(), self.process.tail());
        }
        self.node.world.forget(&self.process);
        self.process.stop(GRACE).await
    }

    /// Kills it, as a crash would. What it pinned stays, until another agent starts or [`Node::clean`].
    pub async fn kill(self) -> Result<()> {
        self.node.world.forget(&self.process);
        self.process.signal(Signal::SIGKILL)?;
        self.process.wait(GRACE).await.map(|_| ())
    }

    /// Waits for it to end by itself, where that is what the test is about.
    pub async fn ends(self) -> Result<(ExitStatus, String)> {
        let status = self.process.wait(GRACE).await?;
        self.node.world.forget(&self.process);
        Ok((status, self.process.stderr()))
    }
}

impl Node {
    /// Where its agent has its sockets.
    pub fn run_dir(&self) -> PathBuf {
        self.world.dir.join("run").join(self.name())
    }

    /// Where its agent has its pins.
    pub fn bpf_dir(&self) -> PathBuf {
        bpf_dir(self)
    }

    /// Runs `mesh-agent clean`, as a person would after a crash: told the agent's run directory alone.
    pub async fn clean(&self) -> Result<String> {
        let mut command = Command::new(binary("mesh-agent", "MESH_AGENT_BIN", "mesh-agent")?);
        command.arg("clean").arg("--run-dir").arg(run_dir(self)?);
        run(self, command).await
    }

    /// What `mesh-agent clean --check` finds of its agent, as JSON; the exit code has to go with it.
    pub async fn residue(&self) -> Result<Vec<Value>> {
        let mut command = Command::new(binary("mesh-agent", "MESH_AGENT_BIN", "mesh-agent")?);
        command.args(["clean", "--check", "-o", "json", "--node", self.name()]);
        command.arg("--run-dir").arg(run_dir(self)?).arg("--bpf-dir").arg(bpf_dir(self));
        let (status, said) = outcome(self, command).await?;
        let found: Vec<Value> = serde_json::from_str(&said).with_context(|| format!("{status}: {said}"))?;
        let expected = i32::from(!found.is_empty());
        ensure!(status.code() == Some(expected), "{status} with {} things: {said}", found.len());
        Ok(found)
    }
}

pub(crate) async fn run(node: &Node, command: Command) -> Result<String> {
    let (status, said) = outcome(node, command).await?;
    ensure!(status.success(), "it ended with {status}\n{said}");
    Ok(said)
}

/// Exit status and standard output; what a failed command says on standard error too.
async fn outcome(node: &Node, command: Command) -> Result<(ExitStatus, String)> {
    let process = node.spawn(command)?;
    let waited = process.wait(COMMAND_LIMIT).await;
    if waited.is_err() {
        process.stop(Duration::ZERO).await?;
    }
    node.world.forget(&process);
    let status = waited?;
    let failed = if status.success() { String::new() } else { process.stderr() };
    Ok((status, process.stdout() + &failed))
}

/// Keys and values of a line of the access log, in either form; quoted values without their quotes.
pub fn fields(line: &str) -> BTreeMap<String, String> {
    if let Ok(Value::Object(object)) = serde_json::from_str(line) {
        let plain = |value: Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        return object.into_iter().map(|(key, value)| (key, plain(value))).collect();
    }
    let (mut fields, mut rest) = (BTreeMap::new(), line);
    while let Some((key, after)) = rest.trim_start().split_once('=') {
        let mut values = serde_json::Deserializer::from_str(after).into_iter::<String>();
        let value = match values.next() {
            Some(Ok(value)) if after.starts_with('"') => {
                rest = &after[values.byte_offset()..];
                value
            }
            _ => {
                let (value, more) = after.split_once(' ').unwrap_or((after, ""));
                rest = more;
                value.to_owned()
            }
        };
        fields.insert(key.to_owned(), value);
    }
    fields
}

impl World {
    /// The mark of the agent of this node, on what it has in the kernel.
    pub(crate) fn mark(&self, node: &str) -> Mark {
        Mark::of(node, &self.bpf_dir(node))
    }

    fn bpf_dir(&self, node: &str) -> PathBuf {
        PathBuf::from(format!("/sys/fs/bpf/{}-{node}", self.unique))
    }
}

fn run_dir(node: &Node) -> Result<PathBuf> {
    let parent = node.world.dir.join("run");
    fs::create_dir_all(&parent).with_context(|| format!("making {}", parent.display()))?;
    Ok(node.run_dir())
}

pub(crate) fn bpf_dir(node: &Node) -> PathBuf {
    node.world.bpf_dir(node.name())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_a_line_are_read() {
        let text = fields(r#"time=now path="/a b=\"c\"" status=200 route=-"#);
        let json = fields(r#"{"time":"now","path":"/a b=\"c\"","status":200,"route":"-"}"#);
        assert_eq!(text, json);
        assert_eq!((text["path"].as_str(), text.len()), (r#"/a b="c""#, 4));
        assert!(fields("no line of the log").is_empty());
    }
}
