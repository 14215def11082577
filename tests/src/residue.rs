//! What labs and agents leave behind: finds it, and takes it away.
//!
//! Promises: [`any`] names everything on the machine that belongs to any lab, and what carries the mark of a running or
//! dead agent; [`clean`] removes what belongs to labs whose process has ended. Never: touches a lab that is in use, or an
//! agent that no lab started. Tested in `tests/lab.rs`, with residue planted there.

use std::{
    collections::{BTreeSet, HashSet},
    fmt, fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use mesh_agent::capture::{
    Mark,
    residue::{Trace, Whose},
    rules_and_routes_in,
};
use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MntFlags, MsFlags, mount, umount2},
};

use crate::{bpf, cgroup, lab::PREFIX, net};

/// Where bpffs is mounted.
const BPFFS: &str = "/sys/fs/bpf";
/// The kernel frees links and namespaces a moment after the last process let go of them.
const SETTLING: Duration = Duration::from_secs(5);

/// Something that should be gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Leftover {
    /// A named network namespace.
    Netns(PathBuf),
    /// A cgroup.
    Cgroup(PathBuf),
    /// A process in a cgroup or a network namespace of a lab.
    Process {
        /// Its pid.
        pid: i32,
        /// Its command line.
        command: String,
    },
    /// A directory of pinned maps and links.
    Pins(PathBuf),
    /// A mount of any kind.
    Mount(PathBuf),
    /// A directory of manifests, output and state.
    Directory(PathBuf),
    /// A BPF link that is still attached.
    Link(bpf::Link),
    /// Programs on the TCX hooks of an interface.
    Tcx {
        /// The network namespace.
        netns: PathBuf,
        /// The interface in it.
        interface: String,
        /// How many programs, both directions together.
        programs: u32,
    },
    /// Something that carries the mark of an agent's instance, wherever it is attached, pinned or held.
    Marked(Trace),
    /// Rules and routes of the mesh in a network namespace.
    Routes {
        /// The network namespace.
        netns: PathBuf,
        /// What there is.
        what: String,
    },
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Netns(path) => write!(f, "network namespace {}", path.display()),
            Self::Cgroup(path) => write!(f, "cgroup {}", path.display()),
            Self::Process { pid, command } => write!(f, "process {pid}: {command}"),
            Self::Pins(path) => write!(f, "pinned maps and links in {}", path.display()),
            Self::Mount(path) => write!(f, "mount {}", path.display()),
            Self::Directory(path) => write!(f, "directory {}", path.display()),
            Self::Link(link) => write!(f, "BPF link {} on {:?}", link.id, link.target),
            Self::Tcx { netns, interface, programs } => {
                write!(f, "{programs} TCX programs on {interface} in {}", netns.display())
            }
            Self::Marked(Trace { instance, kind, id, what }) => {
                let instance = instance.map_or_else(String::new, |mark| mark.to_string());
                write!(f, "of the agent {instance}: {} {} {what}", kind.word(), id.unwrap_or_default())
            }
            Self::Routes { netns, what } => write!(f, "{what} in {}", netns.display()),
        }
    }
}

/// What one lab has made, as the kernel knows it.
#[derive(Debug)]
pub(crate) struct Footprint {
    pub(crate) unique: String,
    /// Path and inode of its network namespaces.
    pub(crate) namespaces: Vec<(PathBuf, u64)>,
    /// Ids of its cgroups.
    pub(crate) cgroups: HashSet<u64>,
    /// The marks of its agents.
    pub(crate) marks: BTreeSet<Mark>,
}

/// What agents and apps that have ended left in a lab that still stands: processes, pins, links, programs.
pub(crate) fn of_agents(footprint: &Footprint) -> Result<Vec<Leftover>> {
    let inodes: HashSet<u64> = footprint.namespaces.iter().map(|(_, inode)| *inode).collect();
    let mut found = processes_in_namespaces(&inodes);
    for path in cgroup::tree(&cgroup::root()?.join(&footprint.unique)) {
        let strays = processes_in_cgroup(&path).filter(|stray| !found.contains(stray)).collect::<Vec<_>>();
        found.extend(strays);
    }
    found.extend(pins(&footprint.unique).map(Leftover::Pins));
    found.extend(bpf::links_to(&footprint.cgroups, &inodes)?.into_iter().map(Leftover::Link));
    found.extend(marked(&Whose::Of(footprint.marks.clone()))?);
    for (netns, _) in &footprint.namespaces {
        for (interface, programs) in bpf::tcx_programs(netns)? {
            found.push(Leftover::Tcx { netns: netns.clone(), interface, programs });
        }
        found.extend(routes(netns)?);
    }
    Ok(found)
}

/// What carries the mark of an agent.
fn marked(whose: &Whose) -> Result<impl Iterator<Item = Leftover>> {
    Ok(mesh_agent::capture::residue::find(whose, &[])?.into_iter().map(Leftover::Marked))
}

/// The mesh's rules and routes in a network namespace.
fn routes(netns: &Path) -> Result<impl Iterator<Item = Leftover>> {
    let left = rules_and_routes_in(netns).with_context(|| format!("routes in {}", netns.display()))?;
    let netns = netns.to_owned();
    Ok(left.into_iter().map(move |what| Leftover::Routes { netns: netns.clone(), what }))
}

/// What agents have left in a network namespace that still stands: links, programs on its interfaces, rules and routes.
pub fn in_netns(netns: &Path) -> Result<Vec<Leftover>> {
    let inode = fs::metadata(netns).with_context(|| format!("looking at {}", netns.display()))?.ino();
    let links = bpf::links_to(&HashSet::new(), &HashSet::from([inode]))?;
    let mut found: Vec<_> = links.into_iter().map(Leftover::Link).collect();
    for (interface, programs) in bpf::tcx_programs(netns)? {
        found.push(Leftover::Tcx { netns: netns.to_owned(), interface, programs });
    }
    found.extend(routes(netns)?);
    Ok(found)
}

/// What agents have left attached to a cgroup that still stands.
pub fn in_cgroup(path: &Path) -> Result<Vec<Leftover>> {
    let links = bpf::links_to(&HashSet::from([cgroup::id(path)?]), &HashSet::new())?;
    Ok(links.into_iter().map(Leftover::Link).collect())
}

/// Everything whose name begins with `prefix`.
pub(crate) fn named(prefix: &str) -> Result<Vec<Leftover>> {
    let mut found: Vec<Leftover> = Vec::new();
    for top in entries(&cgroup::root()?, prefix) {
        for path in cgroup::tree(&top) {
            found.extend(processes_in_cgroup(&path));
        }
        found.push(Leftover::Cgroup(top));
    }
    found.extend(mounts()?.into_iter().filter(|path| has_prefix(path, prefix)).map(Leftover::Mount));
    found.extend(entries(Path::new(net::NETNS_DIR), prefix).map(Leftover::Netns));
    found.extend(pins(prefix).map(Leftover::Pins));
    found.extend(entries(&std::env::temp_dir(), prefix).map(Leftover::Directory));
    Ok(found)
}

/// Everything of any lab, and everything of any agent, on this machine. Labs in use are included.
pub fn any() -> Result<Vec<Leftover>> {
    let mut found = named(PREFIX)?;
    found.extend(marked(&Whose::All)?);
    Ok(found)
}

/// Takes away what belongs to labs whose process has ended. Says what it removed and, as errors, what it could not.
pub fn clean() -> Result<(Vec<Leftover>, Vec<String>)> {
    let (mut removed, mut failed) = (Vec::new(), Vec::new());
    for leftover in named(PREFIX)? {
        if owner_lives(&leftover) {
            continue;
        }
        match remove(&leftover) {
            Ok(()) => removed.push(leftover),
            Err(error) => failed.push(format!("{leftover}: {error:#}")),
        }
    }
    Ok((removed, failed))
}

/// Directories of pins whose name begins with `prefix`.
pub(crate) fn pins(prefix: &str) -> impl Iterator<Item = PathBuf> {
    entries(Path::new(BPFFS), prefix)
}

/// Looks again until nothing is found or time is up; says what is left then.
pub fn wait_until_none(find: impl Fn() -> Result<Vec<Leftover>>) -> Vec<String> {
    let deadline = Instant::now() + SETTLING;
    loop {
        match find() {
            Ok(found) if found.is_empty() => return Vec::new(),
            Ok(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
            Ok(found) => return found.iter().map(|leftover| format!("left behind: {leftover}")).collect(),
            Err(error) => return vec![format!("{:#}", error.context("looking for residue"))],
        }
    }
}

/// Mounts bpffs if nobody has. Tests do this at once, and two mounts on top of each other would hide pins.
pub(crate) fn mount_bpffs() -> Result<()> {
    let is_mounted = || -> Result<bool> { Ok(mounts()?.iter().any(|path| path == Path::new(BPFFS))) };
    if is_mounted()? {
        return Ok(());
    }
    let directory = fs::File::open(BPFFS).with_context(|| format!("opening {BPFFS}"))?;
    let _held = Flock::lock(directory, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
    if is_mounted()? {
        return Ok(());
    }
    mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), None::<&str>)
        .with_context(|| format!("mount -t bpf bpf {BPFFS} (this needs root)"))
}

fn remove(leftover: &Leftover) -> Result<()> {
    match leftover {
        Leftover::Netns(path) => net::remove_named(path),
        Leftover::Cgroup(path) => cgroup::remove_tree(path),
        Leftover::Pins(path) | Leftover::Directory(path) => {
            fs::remove_dir_all(path).with_context(|| format!("removing {}", path.display()))
        }
        Leftover::Mount(path) if path.starts_with(net::NETNS_DIR) => net::remove_named(path),
        Leftover::Mount(path) => {
            umount2(path, MntFlags::MNT_DETACH).with_context(|| format!("unmounting {}", path.display()))
        }
        // Processes end with their cgroup; links and programs go with pins and namespaces.
        Leftover::Process { .. }
        | Leftover::Link(_)
        | Leftover::Tcx { .. }
        | Leftover::Routes { .. }
        | Leftover::Marked(_) => Ok(()),
    }
}

/// Whether the process that made the lab still runs: its pid and the time of its start are in the name.
fn owner_lives(leftover: &Leftover) -> bool {
    let (Leftover::Netns(path)
    | Leftover::Cgroup(path)
    | Leftover::Pins(path)
    | Leftover::Directory(path)
    | Leftover::Mount(path)) = leftover
    else {
        return false;
    };
    owner(path).is_some_and(|owner| {
        let now = start_time(owner.pid);
        // A name without a time says no more than its pid.
        now.is_some() && owner.start.is_none_or(|start| Some(start) == now)
    })
}

/// Who made something of a lab.
#[derive(Debug, PartialEq, Eq)]
struct Owner {
    pid: u32,
    start: Option<u64>,
}

fn owner(path: &Path) -> Option<Owner> {
    let name = path.iter().filter_map(|part| part.to_str()).find_map(|part| part.strip_prefix(PREFIX))?;
    let mut parts = name.split('-');
    let pid = parts.next()?.parse().ok()?;
    let start = parts.next().and_then(|part| part.strip_prefix('s')?.parse().ok());
    Some(Owner { pid, start })
}

/// When the process with this pid started, in clock ticks since boot; `None` where there is none.
pub(crate) fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name of the program, in parentheses, may hold anything; 20 fields after it (proc(5): field 22).
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

fn entries(directory: &Path, prefix: &str) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().filter_map(std::io::Result::ok);
    entries.map(|entry| entry.path()).filter(move |path| has_prefix(path, prefix))
}

/// Whether a part of the path is the prefix itself or begins with it and a dash: `lab-1` is not `lab-11`.
fn has_prefix(path: &Path, prefix: &str) -> bool {
    path.iter().filter_map(|part| part.to_str()).any(|part| {
        part.strip_prefix(prefix)
            .is_some_and(|rest| prefix.ends_with('-') || rest.is_empty() || rest.starts_with('-'))
    })
}

fn mounts() -> Result<Vec<PathBuf>> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("reading /proc/self/mountinfo")?;
    Ok(text.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from).collect())
}

fn processes_in_cgroup(path: &Path) -> impl Iterator<Item = Leftover> {
    cgroup::processes(path).into_iter().map(process)
}

fn processes_in_namespaces(inodes: &HashSet<u64>) -> Vec<Leftover> {
    let entries = fs::read_dir("/proc").into_iter().flatten().filter_map(std::io::Result::ok);
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        let namespace = fs::metadata(format!("/proc/{pid}/ns/net"));
        namespace.is_ok_and(|metadata| inodes.contains(&metadata.ino()))
    })
    .map(process)
    .collect()
}

fn process(pid: i32) -> Leftover {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let command = String::from_utf8_lossy(&line).replace('\0', " ").trim_end().to_owned();
    Leftover::Process { pid, command }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lab_is_not_mistaken_for_another_with_a_longer_number() {
        let path = Path::new("/run/netns/mesh-lab-7-11-name-a-default-x");
        assert!(has_prefix(path, "mesh-lab-"));
        assert!(has_prefix(path, "mesh-lab-7-11-name"));
        assert!(!has_prefix(path, "mesh-lab-7-1"));
        assert!(!has_prefix(Path::new("/run/netns/other"), "mesh-lab-"));
    }

    #[test]
    fn the_owner_is_in_the_name() -> Result<()> {
        let of = |pid, start| Some(Owner { pid, start });
        assert_eq!(owner(Path::new("/run/netns/mesh-lab-4711-s99-0-x-a")), of(4711, Some(99)));
        assert_eq!(owner(Path::new("/run/netns/mesh-lab-4711-0-x-a")), of(4711, None));
        assert_eq!(owner(Path::new("/tmp/mesh-lab-x")), None);
        let pid = std::process::id();
        assert_eq!(owner(Path::new(&crate::unique("x")?)), of(pid, start_time(pid)));
        Ok(())
    }

    #[test]
    fn a_pid_that_was_used_again_is_no_owner() {
        let pid = std::process::id();
        let start = start_time(pid).unwrap_or_default();
        let lives = |name: &str| owner_lives(&Leftover::Directory(Path::new("/tmp").join(name)));
        assert!(lives(&format!("mesh-lab-{pid}-s{start}-0-x")));
        assert!(!lives(&format!("mesh-lab-{pid}-s{}-0-x", start + 1)));
        assert!(lives(&format!("mesh-lab-{pid}-0-x")), "nothing but the pid is known");
        assert!(!lives("mesh-lab-4194999-s1-0-x"), "beyond the largest pid");
    }
}
