//! A lab: one world of nodes, pods, manifests and agents.
//!
//! Promises: see the crate. [`Lab::finish`] stops all, removes all and fails on leftovers; dropping a lab without it
//! cleans up as well as can be and quotes what the processes last said. Tested in `tests/lab.rs`.

use std::{
    collections::{BTreeSet, HashSet},
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU16, AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    cgroup, manifest,
    net::{self, Netns},
    node::{Node, NodeInner},
    process::{Place, Process},
    residue,
    service::ServiceBuilder,
};

/// What every name of every lab begins with.
pub const PREFIX: &str = "mesh-lab-";
/// How long an app may take to end on SIGTERM.
const APP_GRACE: Duration = Duration::from_secs(5);
/// How long an agent may take: it has connections to drain and pods to leave.
const AGENT_GRACE: Duration = Duration::from_secs(20);

static LABS: AtomicU32 = AtomicU32::new(0);

/// A name that nothing else on this machine has: `mesh-lab-PID-sSTART-N-NAME`. Process ids are used again, so the time
/// at which this process started is part of it.
pub fn unique(name: &str) -> Result<String> {
    let pid = std::process::id();
    let start = residue::start_time(pid).context("reading when this process started")?;
    Ok(format!("{PREFIX}{pid}-s{start}-{}-{name}", LABS.fetch_add(1, Ordering::Relaxed)))
}

/// A world of its own. See the crate.
#[derive(Debug)]
pub struct Lab {
    pub(crate) world: Arc<World>,
    /// Set once there is nothing left for `drop` to do.
    done: bool,
}

/// What the handles of one lab share.
#[derive(Debug)]
pub(crate) struct World {
    /// As [`unique`] gives it.
    pub(crate) unique: String,
    pub(crate) dir: PathBuf,
    pub(crate) cgroup: PathBuf,
    fabric: Netns,
    pub(crate) nodes: Mutex<Vec<Arc<NodeInner>>>,
    namespaces: Mutex<BTreeSet<String>>,
    processes: Mutex<Vec<Entry>>,
    outputs: AtomicU32,
    services: AtomicU16,
}

#[derive(Debug)]
struct Entry {
    /// Whose it is.
    cgroup: PathBuf,
    role: Role,
    process: Process,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    App,
    /// Must live until it is stopped.
    Agent,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Lab {
    /// Makes an empty world: a fabric that nodes join, an empty directory of manifests (with the namespace
    /// `default`, enrolled), cgroups, and bpffs at `/sys/fs/bpf`. `name` is short: letters, digits and dashes.
    pub async fn new(name: &str) -> Result<Self> {
        let name = name.to_owned();
        tokio::task::spawn_blocking(move || Self::create(&name)).await?
    }

    fn create(name: &str) -> Result<Self> {
        ensure!(
            !name.is_empty()
                && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'),
            "the name of a lab is made of a-z, 0-9 and -: {name:?}"
        );
        residue::mount_bpffs()?;
        let unique = unique(name)?;
        let world = World {
            dir: std::env::temp_dir().join(&unique),
            cgroup: cgroup::root()?.join(&unique),
            fabric: Netns::create(&format!("{unique}-fabric"))?,
            unique,
            nodes: Mutex::default(),
            namespaces: Mutex::default(),
            processes: Mutex::default(),
            outputs: AtomicU32::new(0),
            services: AtomicU16::new(0),
        };
        // From here on, dropping cleans up.
        let lab = Self { world: Arc::new(world), done: false };
        for directory in [&lab.world.cgroup, &lab.world.dir.join("output"), &lab.world.config_dir()] {
            fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
        }
        net::make_fabric(&lab.world.fabric)?;
        lab.world.ensure_namespace("default")?;
        Ok(lab)
    }

    /// The node with this name; made if there is none yet.
    pub async fn node(&self, name: &str) -> Result<Node> {
        let (world, name) = (Arc::clone(&self.world), name.to_owned());
        tokio::task::spawn_blocking(move || Node::find_or_create(world, &name)).await?
    }

    /// Begins a Service; see [`ServiceBuilder`].
    pub fn service(&self, name: &str) -> ServiceBuilder<'_> {
        ServiceBuilder::new(self, name)
    }

    /// Writes a file of manifests, at once and whole, for the agents to read.
    pub fn apply(&self, file: &str, yaml: &str) -> Result<()> {
        self.world.apply(file, yaml)
    }

    /// Takes a file of manifests away.
    pub fn delete(&self, file: &str) -> Result<()> {
        self.world.delete(file)
    }

    /// Writes the manifest of a namespace, enrolled or not. Pods bring theirs, enrolled, unless it was written.
    pub fn namespace(&self, name: &str, enrolled: bool) -> Result<()> {
        self.world.write_namespace(name, enrolled)
    }

    /// The directory of manifests.
    pub fn config_dir(&self) -> PathBuf {
        self.world.config_dir()
    }

    /// The name that everything of this lab begins with.
    pub fn unique(&self) -> &str {
        &self.world.unique
    }

    /// The cgroup of everything that runs in this lab.
    pub fn cgroup(&self) -> &Path {
        &self.world.cgroup
    }

    /// The network namespace whose bridge all traffic between nodes crosses: the place to watch the wire.
    pub fn fabric(&self) -> &Netns {
        &self.world.fabric
    }

    /// Stops agents and apps, removes everything, and fails if an agent died by itself or did not end well, or if
    /// anything of the agents or of the lab is left.
    pub async fn finish(mut self) -> Result<()> {
        self.done = true;
        let world = Arc::clone(&self.world);
        let problems = tokio::task::spawn_blocking(move || world.close(false)).await?;
        if problems.is_empty() {
            return Ok(());
        }
        bail!("{} did not end clean:\n{}", self.world.unique, problems.join("\n"))
    }

    /// Leaves everything running for a person to look at; `lab-residue clean` takes it away once this process has
    /// ended.
    pub fn keep(mut self) {
        self.done = true;
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        for entry in lock(&self.world.processes).iter() {
            eprint!("{}", entry.process.tail());
        }
        for problem in self.world.close(std::env::var_os("MESH_LAB_KEEP").is_some()) {
            eprintln!("{problem}");
        }
    }
}

impl World {
    pub(crate) fn config_dir(&self) -> PathBuf {
        self.dir.join("config")
    }

    pub(crate) fn apply(&self, file: &str, yaml: &str) -> Result<()> {
        let path = self.config_dir().join(file);
        let hidden = self.config_dir().join(format!(".{file}.new"));
        fs::write(&hidden, yaml).with_context(|| format!("writing {}", hidden.display()))?;
        fs::rename(&hidden, &path).with_context(|| format!("writing {}", path.display()))
    }

    pub(crate) fn apply_object(&self, file: &str, object: &Value) -> Result<()> {
        // JSON is YAML.
        self.apply(file, &serde_json::to_string_pretty(object)?)
    }

    pub(crate) fn delete(&self, file: &str) -> Result<()> {
        let path = self.config_dir().join(file);
        fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))
    }

    pub(crate) fn ensure_namespace(&self, name: &str) -> Result<()> {
        if lock(&self.namespaces).contains(name) { Ok(()) } else { self.write_namespace(name, true) }
    }

    fn write_namespace(&self, name: &str, enrolled: bool) -> Result<()> {
        lock(&self.namespaces).insert(name.to_owned());
        self.apply_object(&format!("namespace-{name}.yaml"), &manifest::namespace(name, enrolled))
    }

    /// The number of the next service.
    pub(crate) fn next_service(&self) -> u16 {
        // 0 is the network's own address.
        self.services.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub(crate) fn fabric(&self) -> &Netns {
        &self.fabric
    }

    /// Starts a process that lives until it ends, is stopped, or the lab goes.
    pub(crate) fn spawn(
        &self,
        command: std::process::Command,
        netns: &Path,
        cgroup: &Path,
        label: &str,
        role: Role,
    ) -> Result<Process> {
        let program =
            Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
        let number = self.outputs.fetch_add(1, Ordering::Relaxed);
        let place = Place {
            netns,
            cgroup,
            output: self
                .dir
                .join("output")
                .join(format!("{number:03}-{}-{program}", label.replace('/', "-"))),
            label: format!("{label} {program}"),
        };
        let process = Process::spawn(command, place)?;
        lock(&self.processes).push(Entry { cgroup: cgroup.to_owned(), role, process: process.clone() });
        Ok(process)
    }

    /// No longer counts on this process: whoever stops an agent on purpose says so first.
    pub(crate) fn forget(&self, process: &Process) {
        lock(&self.processes).retain(|entry| entry.process.pid() != process.pid());
    }

    /// An agent whose place another has taken may end by itself.
    pub(crate) fn no_longer_an_agent(&self, process: &Process) {
        for entry in lock(&self.processes).iter_mut().filter(|entry| entry.process.pid() == process.pid()) {
            entry.role = Role::App;
        }
    }

    /// Ends the processes of a cgroup and those below.
    pub(crate) fn stop_in(&self, cgroup: &Path) -> Vec<String> {
        let mut processes = lock(&self.processes);
        let (gone, rest): (Vec<_>, Vec<_>) =
            processes.drain(..).partition(|entry| entry.cgroup.starts_with(cgroup));
        *processes = rest;
        drop(processes);
        stop_all(&gone)
    }

    /// Ends and removes everything, but for the output of processes if that is asked for. Says what was wrong.
    fn close(&self, keep_output: bool) -> Vec<String> {
        let entries: Vec<Entry> = lock(&self.processes).drain(..).collect();
        let (agents, apps): (Vec<_>, Vec<_>) = entries.into_iter().partition(|e| e.role == Role::Agent);
        let mut problems = stop_all(&agents);
        problems.extend(stop_all(&apps));
        let footprint = self.footprint();
        problems.extend(residue::wait_until_none(|| residue::of_agents(&footprint)));
        problems.extend(self.remove_all());
        if keep_output {
            eprintln!("the output of all processes is kept in {}", self.dir.display());
            return problems;
        }
        problems.extend(fs::remove_dir_all(&self.dir).err().map(|e| format!("{}: {e}", self.dir.display())));
        problems.extend(residue::wait_until_none(|| residue::named(&self.unique)));
        problems
    }

    fn footprint(&self) -> residue::Footprint {
        let mut namespaces = vec![(self.fabric.path(), self.fabric.inode())];
        for node in lock(&self.nodes).iter() {
            namespaces.push((node.netns.path(), node.netns.inode()));
            namespaces.extend(lock(&node.pods).iter().map(|pod| (pod.netns.path(), pod.netns.inode())));
        }
        // Pods that went before: the kernel may have given their inodes to somebody else.
        namespaces.retain(|(path, _)| path.exists());
        let cgroups: HashSet<u64> =
            cgroup::tree(&self.cgroup).iter().filter_map(|path| cgroup::id(path).ok()).collect();
        let marks = lock(&self.nodes).iter().map(|node| self.mark(&node.name)).collect();
        residue::Footprint { unique: self.unique.clone(), namespaces, cgroups, marks }
    }

    fn remove_all(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut note = |result: Result<()>| problems.extend(result.err().map(|error| format!("{error:#}")));
        note(cgroup::remove_tree(&self.cgroup));
        for node in lock(&self.nodes).iter() {
            for pod in lock(&node.pods).iter() {
                note(pod.netns.remove());
            }
            note(node.netns.remove());
        }
        note(self.fabric.remove());
        // What agents left pinned has been found by now; it must not be in the way of anybody.
        for pins in residue::pins(&self.unique) {
            note(fs::remove_dir_all(&pins).with_context(|| format!("removing {}", pins.display())));
        }
        problems
    }
}

/// Asks all to end before it waits for any.
fn stop_all(entries: &[Entry]) -> Vec<String> {
    let mut problems = Vec::new();
    for Entry { role, process, .. } in entries {
        if *role == Role::Agent
            && let Some(status) = process.status()
        {
            problems.push(format!("{} ended by itself ({status})\n{}", process.label(), process.tail()));
        }
        problems.extend(process.signal(Signal::SIGTERM).err().map(|error| format!("{error:#}")));
    }
    for Entry { role, process, .. } in entries {
        let died = process.status().is_some();
        let grace = if *role == Role::Agent { AGENT_GRACE } else { APP_GRACE };
        match process.stop_blocking(grace) {
            Err(error) => problems.push(format!("{error:#}")),
            Ok(status) if *role == Role::Agent && !died && !status.success() => {
                problems.push(format!("{} ended badly ({status})\n{}", process.label(), process.tail()));
            }
            Ok(_) => {}
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_name_that_no_path_may_hold_is_refused() {
        let refused = Lab::new("a/b").await.map(|_| ()).map_err(|error| error.to_string());
        assert_eq!(refused, Err("the name of a lab is made of a-z, 0-9 and -: \"a/b\"".to_owned()));
    }
}
