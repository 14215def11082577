//! A small world for one test: a pod and a neighbour in network namespaces of their own, joined by a veth, below a
//! cgroup of this process. Everything is taken away when the test ends; what an agent has left in a namespace, in the
//! cgroup or in bpffs by then fails the test. Names are those of a lab, so that the residue check of the whole machine
//! and `cargo xtask clean` know them.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, PoisonError, RwLock, Weak},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use lab::{residue, unique};
use mesh_agent::{
    capture::{Capture, CaptureConfig, Captured, EbpfLog, Listener, PodNet, PodTables},
    identity::SpiffeId,
    state::snapshot::{Authentication, CapturePolicy, WhenAgentIsDown, Workload},
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns},
};
use tokio::runtime::Runtime;

/// For what happens at once when it happens at all.
pub const LIMIT: Duration = Duration::from_secs(20);

pub const POD4: &str = "10.77.0.2";
pub const POD6: &str = "fd00:77::2";
pub const PEER4: &str = "10.77.0.1";
pub const PEER6: &str = "fd00:77::1";

/// Fails the test that ends with something left behind; one that has failed already is told about it.
fn judge(left: &[String]) {
    if thread::panicking() {
        for line in left {
            eprintln!("{line}");
        }
    } else {
        assert!(left.is_empty(), "{}", left.join("\n"));
    }
}

/// Tells of an error at once: a test that returns it and leaves something behind for that reason fails by what it left.
fn told<T>(result: Result<T>) -> Result<T> {
    result.inspect_err(|error| eprintln!("before anything was left behind: {error:?}"))
}

/// A child holds what this process has open, the listeners of an agent too, until the kernel is through with its
/// `exec`. Held shared while a child runs, and alone by whoever must know that what it closes is closed.
static CHILDREN: RwLock<()> = RwLock::new(());

fn run(command: &str) -> Result<()> {
    let mut words = command.split_whitespace();
    let program = words.next().context("empty command")?;
    let _child = CHILDREN.read().unwrap_or_else(PoisonError::into_inner);
    let output = Command::new(program).args(words).output().with_context(|| command.to_owned())?;
    ensure!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Does `work` while no child runs: what it closes is closed when it returns.
pub fn alone<T>(work: impl FnOnce() -> T) -> T {
    let _no_child = CHILDREN.write().unwrap_or_else(PoisonError::into_inner);
    work()
}

/// A network namespace, gone when dropped. Agents have left it by then.
pub struct Ns {
    name: String,
}

impl Ns {
    pub fn new(what: &str) -> Result<Self> {
        let ns = Self { name: unique(what)? };
        run(&format!("ip netns add {}", ns.name))?;
        run(&format!("ip -n {} link set lo up", ns.name))?;
        Ok(ns)
    }

    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    pub fn ip(&self, arguments: &str) -> Result<()> {
        run(&format!("ip -n {} {arguments}", self.name))
    }

    /// Goes at once, with whatever agents have in it.
    pub fn vanish(self) -> Result<()> {
        let ns = std::mem::ManuallyDrop::new(self);
        run(&format!("ip netns delete {}", ns.name))
    }

    /// Runs `f` on a thread of its own inside the namespace.
    pub fn spawn<T: Send + 'static>(
        &self,
        f: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> thread::JoinHandle<Result<T>> {
        let path = self.path();
        thread::spawn(move || {
            setns(fs::File::open(&path)?, CloneFlags::CLONE_NEWNET)?;
            f()
        })
    }

    /// Sets a value of the namespace's own.
    pub fn sysctl(&self, name: &'static str, value: &str) -> Result<()> {
        let value = value.to_owned();
        self.run(move || fs::write(format!("/proc/sys/{}", name.replace('.', "/")), value).context(name))
    }

    /// One of the namespace's counters of TCP.
    pub fn counter(&self, name: &'static str) -> Result<u64> {
        let text = self.run(|| Ok(fs::read_to_string("/proc/thread-self/net/netstat")?))?;
        let mut lines = text.lines();
        while let (Some(names), Some(values)) = (lines.next(), lines.next()) {
            let found = names.split(' ').zip(values.split(' ')).find(|(found, _)| *found == name);
            if let Some((_, value)) = found {
                return Ok(value.parse()?);
            }
        }
        Err(anyhow!("no counter {name}"))
    }

    /// As [`Ns::spawn`], and waits.
    pub fn run<T: Send + 'static>(&self, f: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
        join(self.spawn(f))
    }
}

impl Drop for Ns {
    fn drop(&mut self) {
        let path = self.path();
        let mut left = residue::wait_until_none(|| residue::in_netns(&path));
        left.extend(run(&format!("ip netns delete {}", self.name)).err().map(|error| format!("{error:#}")));
        judge(&left);
    }
}

pub fn join<T>(thread: thread::JoinHandle<Result<T>>) -> Result<T> {
    told(thread.join().map_err(|_| anyhow!("a thread of the test has panicked"))?)
}

/// The cgroup all tests of this process share: the agent and the apps are this process.
pub struct Cgroup {
    pub root: PathBuf,
    home: PathBuf,
}

static CGROUP: Mutex<Weak<Cgroup>> = Mutex::new(Weak::new());

impl Cgroup {
    fn shared() -> Result<Arc<Self>> {
        let mut shared = CGROUP.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cgroup) = shared.upgrade() {
            return Ok(cgroup);
        }
        let cgroup = Arc::new(Self::new()?);
        *shared = Arc::downgrade(&cgroup);
        Ok(cgroup)
    }

    fn new() -> Result<Self> {
        let mounts = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new);
        let hierarchy = mounts.into_iter().find(|path| path.join("cgroup.controllers").exists());
        let hierarchy = hierarchy.context("no cgroup2 hierarchy")?;
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).context("no cgroup of our own")?;
        let root = hierarchy.join(unique("cg")?);
        fs::create_dir(&root)?;
        let cgroup = Self { root, home: hierarchy.join(own) };
        fs::write(cgroup.root.join("cgroup.procs"), "0")?;
        Ok(cgroup)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Its last agent is gone.
        let mut left = residue::wait_until_none(|| residue::in_cgroup(&self.root));
        // Under the lock, so that no test enters what is being taken away; and no child of another test, which makes its
        // namespaces before it needs an agent, is still in it.
        let shared = CGROUP.lock().unwrap_or_else(PoisonError::into_inner);
        let moved = alone(|| {
            fs::write(self.home.join("cgroup.procs"), "0").and_then(|()| fs::remove_dir(&self.root))
        });
        left.extend(moved.err().map(|error| format!("{}: {error}", self.root.display())));
        drop(shared);
        judge(&left);
    }
}

fn bpffs() -> Result<&'static Path> {
    static MOUNTING: Mutex<()> = Mutex::new(());
    let _one = MOUNTING.lock().unwrap_or_else(PoisonError::into_inner);
    let path = Path::new("/sys/fs/bpf");
    if !fs::read_to_string("/proc/self/mounts")?.lines().any(|line| line.contains(" /sys/fs/bpf bpf ")) {
        mount(Some("bpf"), path, Some("bpf"), MsFlags::empty(), None::<&str>)?;
    }
    Ok(path)
}

/// An agent, without pods yet.
pub struct Agent {
    capture: Option<Capture>,
    pub config: CaptureConfig,
    pub rt: Runtime,
    _cgroup: Arc<Cgroup>,
}

impl Agent {
    pub fn new() -> Result<Self> {
        let cgroup = Cgroup::shared()?;
        let root = cgroup.root.clone();
        let config = CaptureConfig {
            cgroup_root: Some(root),
            pods_cgroup: None,
            kubelet_cgroup: None,
            node: "node".to_owned(),
            bpf_dir: bpffs()?.join(unique("bpf")?),
            ebpf_log: EbpfLog::Off,
            when_agent_is_down: WhenAgentIsDown::Closed,
            tables: PodTables::default(),
        };
        Self::with(config, cgroup)
    }

    fn with(config: CaptureConfig, cgroup: Arc<Cgroup>) -> Result<Self> {
        let rt = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let capture = {
            let _inside = rt.enter();
            Capture::load(&config)?
        };
        Ok(Self { capture: Some(capture), config, rt, _cgroup: cgroup })
    }

    pub fn capture(&self) -> Result<&Capture> {
        self.capture.as_ref().context("the agent has crashed")
    }

    pub fn closed_flows(&self) -> Result<tokio::sync::mpsc::Receiver<mesh_common::flow::FlowRecord>> {
        let _inside = self.rt.enter();
        self.capture()?.closed_flows()
    }

    pub fn enrol(&self, pod: &Ns, ips: &[&str]) -> Result<Arc<PodNet>> {
        self.enrol_as(pod, ips, CapturePolicy::default())
    }

    /// As [`Agent::enrol`], for a pod whose annotations ask for something.
    pub fn enrol_as(&self, pod: &Ns, ips: &[&str], asked: CapturePolicy) -> Result<Arc<PodNet>> {
        told(workload_as(pod.path(), ips, asked).and_then(|workload| self.enrol_workload(workload)))
    }

    /// As [`Agent::enrol`], whatever the pod is.
    pub fn enrol_workload(&self, workload: Arc<Workload>) -> Result<Arc<PodNet>> {
        let _inside = self.rt.enter();
        self.capture()?.enrol(workload)
    }

    /// The next captured connection.
    pub fn accept(&self, pod: &Arc<PodNet>, listener: Listener) -> Result<Captured> {
        let accepted = self.rt.block_on(async { tokio::time::timeout(LIMIT, pod.accept(listener)).await });
        told(accepted.map_err(Into::into).and_then(|accepted| Ok(accepted?)))
    }

    /// Ends as a crash does: nothing is taken away, and every socket of its pods is closed. To be called with all that
    /// is held of its pods.
    pub fn crash(&mut self, pods: impl IntoIterator<Item = Arc<PodNet>>) {
        alone(|| {
            self.capture = None;
            pods.into_iter().for_each(drop);
        });
    }

    /// Starts again, with what the last one left.
    pub fn restart(&mut self) -> Result<()> {
        let _inside = self.rt.enter();
        self.capture = Some(Capture::load(&self.config)?);
        Ok(())
    }

    /// Lets a pod go; its listeners are closed when this returns.
    pub fn un_enrol(&self, pod: &PodNet) -> Result<()> {
        told(alone(|| self.capture()?.un_enrol(pod)))
    }

    /// Takes everything away and sees that nothing is left.
    pub fn remove(&mut self) -> Result<()> {
        if let Some(capture) = self.capture.take() {
            told(alone(|| capture.remove()))?;
        }
        ensure!(!self.config.bpf_dir.exists(), "{} is left", self.config.bpf_dir.display());
        Ok(())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.capture = None;
        let cleaned = mesh_agent::capture::clean(&self.config.bpf_dir);
        let mut left: Vec<_> = cleaned.err().map(|error| format!("{error:#}")).into_iter().collect();
        left.extend(
            self.config.bpf_dir.exists().then(|| format!("{} is left", self.config.bpf_dir.display())),
        );
        judge(&left);
    }
}

pub fn workload(netns: PathBuf, ips: &[&str]) -> Result<Arc<Workload>> {
    workload_as(netns, ips, CapturePolicy::default())
}

pub fn workload_as(netns: PathBuf, ips: &[&str], capture: CapturePolicy) -> Result<Arc<Workload>> {
    let name: Arc<str> = "pod".into();
    Ok(Arc::new(Workload {
        namespace: "default".into(),
        name: Arc::clone(&name),
        ips: ips.iter().map(|ip| ip.parse::<IpAddr>()).collect::<Result<_, _>>()?,
        node: None,
        identity: SpiffeId {
            trust_domain: "cluster.local".into(),
            namespace: "default".into(),
            service_account: "default".into(),
        },
        labels: BTreeMap::new(),
        view: None,
        enrolled: true,
        announced: false,
        netns: Some(netns),
        capture,
        authorization: Arc::default(),
        authentication: Authentication::default(),
        workload_name: Arc::clone(&name),
        canonical_service: name,
        canonical_revision: "latest".into(),
    }))
}

/// A pod and its neighbour on one link, both with a default route to the other.
pub fn pair() -> Result<(Ns, Ns)> {
    let (pod, peer) = (Ns::new("p")?, Ns::new("n")?);
    run(&format!("ip link add eth0 netns {} type veth peer name eth0 netns {}", pod.name, peer.name))?;
    for (ns, own4, own6, other4, other6) in
        [(&pod, POD4, POD6, PEER4, PEER6), (&peer, PEER4, PEER6, POD4, POD6)]
    {
        ns.ip(&format!("address add {own4}/24 dev eth0"))?;
        ns.ip(&format!("address add {own6}/64 dev eth0 nodad"))?;
        ns.ip("link set eth0 up")?;
        ns.ip(&format!("route add default via {other4}"))?;
        ns.ip(&format!("-6 route add default via {other6}"))?;
    }
    Ok((pod, peer))
}

/// An agent with one enrolled pod, and the pod's neighbour.
pub struct World {
    pub net: Arc<PodNet>,
    pub agent: Agent,
    pub pod: Ns,
    pub peer: Ns,
}

impl World {
    pub fn new() -> Result<Self> {
        Self::asking(CapturePolicy::default())
    }

    /// With a pod whose annotations ask for this.
    pub fn asking(asked: CapturePolicy) -> Result<Self> {
        let (pod, peer) = pair()?;
        let agent = Agent::new()?;
        let net = agent.enrol_as(&pod, &[POD4, POD6], asked)?;
        Ok(Self { net, agent, pod, peer })
    }

    pub fn accept(&self, listener: Listener) -> Result<Captured> {
        self.agent.accept(&self.net, listener)
    }
}

pub fn addr(ip: &str, port: u16) -> Result<SocketAddr> {
    Ok(SocketAddr::new(ip.parse()?, port))
}
