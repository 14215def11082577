//! Where everything of the cluster is, what it is called, and what runs of it.
//!
//! There is one cluster on a machine: its names and addresses are fixed, and the bridge between its nodes carries the
//! directory of the checkout that it belongs to. Never starts or ends anything itself. Tested below, and by
//! `cargo xtask test cluster`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::workspace;

/// The bridge between the nodes; what belongs to node 1 is called `mesh-k8s-n1`: network namespace, link, cgroup.
pub const NAME: &str = "mesh-k8s";
/// Of the nodes' network: `.1` is the control plane, `.11` node 1.
const NODES: &str = "172.30.0";
/// Node 1 hands out the addresses of `10.244.1.0/24` to its pods.
const PODS: &str = "10.244";
/// The addresses of services, as most clusters have them.
pub const SERVICES: &str = "10.96.0.0/16";
/// The service of the API server, the first address of [`SERVICES`].
pub const API_SERVICE: &str = "10.96.0.1";
/// The service of the cluster's DNS.
pub const DNS: &str = "10.96.0.10";
/// Where the API server listens.
pub const API_PORT: u16 = 6443;
/// Where etcd listens, on loopback: away from the ports of one that the machine may have.
pub const ETCD_PORT: u16 = 23790;

/// How kube-proxy leads connections to services to their endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ProxyMode {
    /// Sets and maps of nftables
    Nftables,
    /// Chains of iptables
    Iptables,
}

impl ProxyMode {
    /// What kube-proxy calls it.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        }
    }
}

/// What a cluster was asked to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// How many nodes, up to 9; without any, etcd and the API server are all there is.
    pub nodes: u8,
    /// The mode of their kube-proxies.
    pub proxy: ProxyMode,
}

impl Shape {
    fn text(self) -> String {
        format!("{} {}", self.nodes, self.proxy.word())
    }

    fn read(text: &str) -> Option<Self> {
        let (nodes, proxy) = text.trim().split_once(' ')?;
        Some(Self { nodes: nodes.parse().ok()?, proxy: ProxyMode::from_str(proxy, false).ok()? })
    }

    /// Its nodes, in order.
    pub fn all_nodes(self) -> impl Iterator<Item = Node> {
        (1..=self.nodes).map(Node)
    }
}

/// A node, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node(pub u8);

impl Node {
    /// Its name in Kubernetes, and its host name.
    pub fn name(self) -> String {
        format!("node{}", self.0)
    }

    /// What its network namespace, its link and its cgroups are called on the machine.
    pub fn mark(self) -> String {
        format!("{NAME}-n{}", self.0)
    }

    /// Its address on the bridge.
    pub fn address(self) -> String {
        format!("{NODES}.1{}", self.0)
    }

    /// The addresses of its pods.
    pub fn pods(self) -> String {
        format!("{PODS}.{}.0/24", self.0)
    }

    /// Its zone, for routing by locality.
    pub fn zone(self) -> String {
        format!("zone{}", self.0)
    }

    /// Where its files are.
    pub fn dir(self) -> PathBuf {
        dir().join(self.name())
    }
}

/// The machine's address on the bridge, where the API server is.
pub fn control_plane() -> String {
    format!("{NODES}.1")
}

/// The network of the nodes.
pub fn node_network() -> String {
    format!("{NODES}.0/24")
}

/// The addresses of all pods.
pub fn pod_network() -> String {
    format!("{PODS}.0.0/16")
}

/// All state of the running cluster; `down` removes it.
pub fn dir() -> PathBuf {
    workspace::target_dir().join("cluster")
}

/// Keys and certificates.
pub fn pki() -> PathBuf {
    dir().join("pki")
}

/// How an administrator reaches the cluster.
pub fn kubeconfig() -> PathBuf {
    dir().join("admin.kubeconfig")
}

/// The output of a process of the control plane or of a node.
pub fn log(name: &str) -> PathBuf {
    dir().join("log").join(format!("{name}.log"))
}

/// What was built for the cluster, and stays when it ends.
pub fn tools() -> PathBuf {
    workspace::tools_dir().join("kubernetes")
}

/// A program of Kubernetes.
pub fn program(name: &str) -> PathBuf {
    tools().join("bin").join(name)
}

/// Images that every node has from the start.
pub fn images() -> PathBuf {
    tools().join("images")
}

/// This program, as it was when the cluster was started: cargo may build another in its place meanwhile.
pub fn own_program() -> PathBuf {
    dir().join("xtask")
}

/// Writes down what is being started, before anything is.
pub fn begin(shape: Shape) -> Result<()> {
    for dir in [dir().join("log"), dir().join("pid"), pki()] {
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    fs::copy("/proc/self/exe", own_program())
        .context("cannot copy this program to where the nodes find it")?;
    let file = dir().join("shape");
    fs::write(&file, shape.text()).with_context(|| format!("cannot write {}", file.display()))
}

/// What was started from this checkout, whether it still runs or not.
pub fn begun() -> Option<Shape> {
    Shape::read(&fs::read_to_string(dir().join("shape")).ok()?)
}

/// The same, or an error that says how to start one.
pub fn running() -> Result<Shape> {
    match begun() {
        Some(shape) => Ok(shape),
        None => bail!("no cluster was started from here: `cargo xtask cluster up` starts one"),
    }
}

/// The directory of the checkout that the bridge's cluster belongs to; `None` without a bridge.
pub fn owner() -> Option<String> {
    let alias = fs::read_to_string(format!("/sys/class/net/{NAME}/ifalias")).ok()?;
    Some(alias.trim_end().to_owned())
}

/// An error where the machine's cluster is that of another checkout.
pub fn not_anothers() -> Result<()> {
    match owner() {
        Some(owner) if Path::new(&owner) != dir() => {
            bail!("the cluster in {owner} has this machine; end it there with `cargo xtask cluster down`")
        }
        _ => Ok(()),
    }
}

/// A process that was started for the cluster: its pid, and when it started, so that a pid used again is not mistaken
/// for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    /// Its pid.
    pub pid: u32,
    start: u64,
}

impl Process {
    /// The process that has this pid now.
    pub fn now(pid: u32) -> Option<Self> {
        Some(Self { pid, start: started(pid)? })
    }

    /// Whether it still runs.
    pub fn lives(self) -> bool {
        started(self.pid) == Some(self.start)
    }

    fn read(text: &str) -> Option<Self> {
        let (pid, start) = text.trim().split_once(' ')?;
        Some(Self { pid: pid.parse().ok()?, start: start.parse().ok()? })
    }
}

/// Writes a process down under its name.
pub fn remember(name: &str, process: Process) -> Result<()> {
    let file = dir().join("pid").join(name);
    fs::write(&file, format!("{} {}", process.pid, process.start))
        .with_context(|| format!("cannot write {}", file.display()))
}

/// The process that was written down under this name.
pub fn remembered(name: &str) -> Option<Process> {
    Process::read(&fs::read_to_string(dir().join("pid").join(name)).ok()?)
}

/// All that were written down, by name.
pub fn processes() -> Vec<(String, Process)> {
    let entries = fs::read_dir(dir().join("pid")).into_iter().flatten().filter_map(std::io::Result::ok);
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut all: Vec<_> = names.filter_map(|name| Some((name.clone(), remembered(&name)?))).collect();
    all.sort_by(|(a, _), (b, _)| a.cmp(b));
    all
}

/// In clock ticks since boot; `None` where the process has ended, also while nobody has asked how.
fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // After the name in parentheses, which may hold anything: the state, and 19 fields on the start (proc(5)).
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_has_its_names_and_addresses() {
        let node = Node(2);
        assert_eq!((node.name().as_str(), node.mark().as_str()), ("node2", "mesh-k8s-n2"));
        assert_eq!((node.address().as_str(), node.pods().as_str()), ("172.30.0.12", "10.244.2.0/24"));
        assert!(Node(9).mark().len() <= 15, "the kernel's limit for names of links");
    }

    #[test]
    fn a_shape_is_read_as_it_was_written() {
        let shape = Shape { nodes: 3, proxy: ProxyMode::Iptables };
        assert_eq!(Shape::read(&shape.text()), Some(shape));
        assert_eq!(Shape::read("2 ipvs"), None);
        assert_eq!(Shape::read(""), None);
        assert_eq!(shape.all_nodes().map(|node| node.0).collect::<Vec<_>>(), [1, 2, 3]);
    }

    #[test]
    fn a_process_is_more_than_its_pid() {
        let own = Process::now(std::process::id());
        assert!(own.is_some_and(Process::lives));
        assert!(!own.is_some_and(|own| Process { start: own.start + 1, ..own }.lives()));
        assert_eq!(Process::now(4_194_999), None, "beyond the largest pid");
        assert_eq!(Process::read("12 34"), Some(Process { pid: 12, start: 34 }));
    }
}
