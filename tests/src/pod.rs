//! A pod: a network namespace with the pod's addresses, a cgroup, and a manifest.
//!
//! Promises: processes started here are in the pod's network namespace and cgroup from their first instruction; the
//! manifest says what the API server would say of a running pod. Tested in `tests/lab.rs`.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};

use mesh_agent::capture::inspect;
use mesh_common::maps;

use crate::{
    agent::bpf_dir,
    eventually,
    lab::{Role, lock},
    manifest,
    net::{self, Addresses, Netns},
    node::Node,
    process::Process,
};

/// How long [`Pod::run`] lets a command run.
const RUN_LIMIT: Duration = Duration::from_mins(1);
/// The ports the agent listens on inside an enrolled pod.
const AGENT_PORTS: [u16; 3] = [15001, 15006, 15008];

/// What a pod is to be. Enrolled by its namespace's label unless it says otherwise.
#[derive(Debug)]
#[must_use = "a pod exists once it is started"]
pub struct PodBuilder {
    node: Node,
    name: String,
    namespace: String,
    service_account: String,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
}

/// A pod of a lab. Clones are the same pod.
#[derive(Debug, Clone)]
pub struct Pod {
    pub(crate) node: Node,
    pub(crate) inner: Arc<PodInner>,
}

#[derive(Debug)]
pub(crate) struct PodInner {
    pub(crate) name: String,
    pub(crate) namespace: String,
    number: u8,
    pub(crate) addresses: Addresses,
    pub(crate) netns: Netns,
    pub(crate) cgroup: PathBuf,
}

/// What a command did.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

impl PodBuilder {
    pub(crate) fn new(node: Node, name: &str) -> Self {
        Self {
            node,
            name: name.to_owned(),
            namespace: "default".to_owned(),
            service_account: "default".to_owned(),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
        }
    }

    /// Its namespace (`default`). A namespace not written yet is written, enrolled.
    pub fn ns(mut self, namespace: &str) -> Self {
        namespace.clone_into(&mut self.namespace);
        self
    }

    /// Its service account (`default`), and so its identity.
    pub fn sa(mut self, service_account: &str) -> Self {
        service_account.clone_into(&mut self.service_account);
        self
    }

    /// Adds a label.
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Adds labels.
    pub fn labels<'a>(mut self, labels: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        self.labels.extend(labels.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())));
        self
    }

    /// Adds an annotation.
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Keeps it out of the mesh, whatever its namespace says.
    pub fn unenrolled(self) -> Self {
        self.label(manifest::ENROLMENT, "none")
    }

    /// Makes the pod: network namespace, cgroup, manifest. Nothing runs in it yet.
    pub async fn start(self) -> Result<Pod> {
        tokio::task::spawn_blocking(move || self.create()).await?
    }

    fn create(self) -> Result<Pod> {
        let Self { node, name, namespace, service_account, labels, mut annotations } = self;
        let number = node.next_pod()?;
        let full = format!("{}-{}-{namespace}-{name}", node.world.unique, node.name());
        let inner = Arc::new(PodInner {
            number,
            addresses: Addresses::of_pod(node.inner.number, number),
            netns: Netns::create(&full).context("a pod's name is unique on its node")?,
            cgroup: node.inner.cgroup.join("kubepods").join(format!("{namespace}-{name}")),
            name,
            namespace,
        });
        lock(&node.inner.pods).push(Arc::clone(&inner));
        fs::create_dir(&inner.cgroup).context("making the cgroup of a pod")?;
        net::join_pod(&node.inner.netns, &inner.netns, node.inner.number, number)?;
        let netns = inner.netns.path().to_string_lossy().into_owned();
        annotations.entry(manifest::NETNS.to_owned()).or_insert(netns);
        node.world.ensure_namespace(&inner.namespace)?;
        let written = manifest::Pod {
            name: &inner.name,
            namespace: &inner.namespace,
            service_account: &service_account,
            node: node.name(),
            node_ip: node.addresses().v4,
            addresses: inner.addresses,
            labels: &labels,
            annotations: &annotations,
        };
        node.world.apply_object(&inner.file(), &written.object())?;
        Ok(Pod { node, inner })
    }
}

impl PodInner {
    fn file(&self) -> String {
        format!("pod-{}-{}.yaml", self.namespace, self.name)
    }
}

impl Pod {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Its namespace.
    pub fn namespace(&self) -> &str {
        &self.inner.namespace
    }

    /// The node it is on.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Its IPv4 address.
    pub fn ip(&self) -> IpAddr {
        self.inner.addresses.v4.into()
    }

    /// Its IPv6 address.
    pub fn ip6(&self) -> IpAddr {
        self.inner.addresses.v6.into()
    }

    /// Its IPv4 address with a port.
    pub fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip(), port)
    }

    /// Its IPv6 address with a port.
    pub fn at6(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip6(), port)
    }

    /// Its network namespace.
    pub fn netns(&self) -> &Netns {
        &self.inner.netns
    }

    /// Its cgroup.
    pub fn cgroup(&self) -> &Path {
        &self.inner.cgroup
    }

    /// A network namespace of a guest of this pod, whose processes are this pod's.
    pub(crate) fn with_guest(&self, name: &str, addresses: Addresses) -> Result<Self> {
        let Self { node, inner } = self;
        let guest = Arc::new(PodInner {
            name: name.to_owned(),
            namespace: inner.namespace.clone(),
            number: inner.number,
            addresses,
            netns: Netns::create(&format!("{}-{name}", inner.netns.name()))?,
            cgroup: inner.cgroup.clone(),
        });
        lock(&node.inner.pods).push(Arc::clone(&guest));
        Ok(Self { node: node.clone(), inner: guest })
    }

    /// What runs on the node itself, in its network namespace and this cgroup of it (`system.slice/kubelet.service`): clients
    /// run there as they do in a pod. No manifest tells of it.
    pub fn on_host(node: &Node, cgroup: &str) -> Result<Self> {
        let (v4, v6) = (node.addresses().v4, node.addresses().v6);
        let host = Arc::new(PodInner {
            name: cgroup.replace('/', "-"),
            namespace: "host".to_owned(),
            number: 0,
            addresses: Addresses { v4, v6 },
            netns: node.netns().clone(),
            cgroup: node.cgroup().join(cgroup),
        });
        fs::create_dir_all(&host.cgroup).context("making a cgroup of a node's")?;
        Ok(Self { node: node.clone(), inner: host })
    }

    /// Starts a process in the pod. It lives until it ends, is stopped, or the lab goes.
    pub fn spawn(&self, command: Command) -> Result<Process> {
        let Self { node, inner } = self;
        let label = format!("{}/{}", inner.namespace, inner.name);
        node.world.spawn(command, &inner.netns.path(), &inner.cgroup, &label, Role::App)
    }

    /// Starts a process in a cgroup of its own below the pod's, whose processor time [`crate::cgroup::cpu_time`] tells
    /// apart from that of the pod's other processes.
    pub fn spawn_apart(&self, name: &str, command: Command) -> Result<Process> {
        let Self { node, inner } = self;
        let cgroup = inner.cgroup.join(name);
        fs::create_dir_all(&cgroup).context("making a cgroup below a pod's")?;
        let label = format!("{}/{}", inner.namespace, inner.name);
        node.world.spawn(command, &inner.netns.path(), &cgroup, &label, Role::App)
    }

    /// Runs a command in the pod to its end, for a minute at most.
    pub async fn run(&self, command: Command) -> Result<Output> {
        self.run_within(RUN_LIMIT, command).await
    }

    /// Runs a command in the pod to its end; it is ended after `limit`, and that is an error.
    pub async fn run_within(&self, limit: Duration, command: Command) -> Result<Output> {
        let process = self.spawn(command)?;
        let waited = process.wait(limit).await;
        if waited.is_err() {
            process.stop(Duration::ZERO).await?;
        }
        self.node.world.forget(&process);
        Ok(Output { status: waited?, stdout: process.stdout(), stderr: process.stderr() })
    }

    /// Waits until an agent listens in the pod on its three ports and the kernel captures for it.
    pub async fn enrolled(&self) -> Result<()> {
        let pins = bpf_dir(&self.node);
        eventually("the agent's listeners in the pod", async || {
            let missing: Vec<u16> = AGENT_PORTS.into_iter().filter(|port| !self.listens(*port)).collect();
            ensure!(missing.is_empty(), "{}: nobody listens on {missing:?}", self.inner.name);
            let pods = inspect::dump(&pins, maps::PODS)?;
            let captured = serde_json::to_string(&pods)?.contains(&self.ip().to_string());
            ensure!(captured, "{}: the kernel does not capture for it yet", self.inner.name);
            Ok(())
        })
        .await
    }

    /// Waits until no agent listens in the pod any more.
    pub async fn not_enrolled(&self) -> Result<()> {
        eventually("the agent's leaving of the pod", async || {
            match AGENT_PORTS.into_iter().find(|port| self.listens(*port)) {
                Some(port) => bail!("{}: somebody listens on {port}", self.inner.name),
                None => Ok(()),
            }
        })
        .await
    }

    /// Whether any socket in the pod listens on this TCP port, by the kernel's own table.
    pub fn listens(&self, port: u16) -> bool {
        let tables = self.inner.netns.inside(|| {
            let read = |family| fs::read_to_string(format!("/proc/thread-self/net/{family}"));
            Ok([read("tcp")?, read("tcp6").unwrap_or_default()])
        });
        tables.is_ok_and(|tables| tables.iter().any(|table| has_listener(table, port)))
    }

    /// Changes an annotation in its manifest, as `kubectl annotate` does; `None` takes it away.
    pub fn annotate(&self, key: &str, value: Option<&str>) -> Result<()> {
        self.change_metadata("annotations", key, value)
    }

    /// Gives its manifest other containers, as a pod made anew would have.
    pub fn set_containers(&self, containers: serde_json::Value) -> Result<()> {
        self.change(|object| {
            object["spec"]["containers"] = containers;
            Ok(())
        })
    }

    /// Enrols it by its label, or keeps it out, whatever its namespace says.
    pub fn enrol(&self, enrolled: bool) -> Result<()> {
        self.change_metadata("labels", manifest::ENROLMENT, Some(if enrolled { "node" } else { "none" }))
    }

    fn change_metadata(&self, field: &str, key: &str, value: Option<&str>) -> Result<()> {
        self.change(|object| {
            let entries = object["metadata"][field].as_object_mut();
            let entries = entries.with_context(|| format!("a pod without {field}"))?;
            match value {
                Some(value) => drop(entries.insert(key.to_owned(), value.into())),
                None => drop(entries.remove(key)),
            }
            Ok(())
        })
    }

    fn change(&self, change: impl FnOnce(&mut serde_json::Value) -> Result<()>) -> Result<()> {
        let file = self.inner.file();
        let path = self.node.world.config_dir().join(&file);
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let mut object: serde_json::Value = serde_json::from_str(&text)?;
        change(&mut object)?;
        self.node.world.apply_object(&file, &object)
    }

    /// The pod goes as the API server would have it: the manifest first, then processes, network and cgroup.
    pub async fn remove(self) -> Result<()> {
        self.node.world.delete(&self.inner.file())?;
        self.vanish().await
    }

    /// Processes, network and cgroup go at once; the manifest stays behind and is wrong from now on.
    pub async fn vanish(self) -> Result<()> {
        tokio::task::spawn_blocking(move || {
            let Self { node, inner } = &self;
            let mut problems = node.world.stop_in(&inner.cgroup);
            node.inner.netns.ip(&[format!("link del pod{}", inner.number)])?;
            inner.netns.remove()?;
            problems
                .extend(crate::cgroup::remove_tree(&inner.cgroup).err().map(|error| format!("{error:#}")));
            ensure!(problems.is_empty(), "removing pod {}: {}", inner.name, problems.join("; "));
            Ok(())
        })
        .await?
    }
}

/// Whether `/proc/net/tcp` or `tcp6` has a socket in state LISTEN (0A) on the port.
fn has_listener(table: &str, port: u16) -> bool {
    let end = format!(":{port:04X}");
    table.lines().skip(1).any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        fields.next().is_some_and(|local| local.ends_with(&end)) && fields.nth(1) == Some("0A")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_listening_socket_listens() {
        let table = "  sl  local_address rem_address   st tx_queue\n\
                     0: 00000000:3A99 00000000:0000 0A 00000000:00000000\n\
                     1: 0100007F:3A9E 0100007F:D431 01 00000000:00000000\n";
        assert!(has_listener(table, 15001));
        assert!(!has_listener(table, 15006));
    }
}
