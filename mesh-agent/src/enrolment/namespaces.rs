//! Where the network namespaces of a cluster's pods are: as the network plugin told, else as processes of the pods show.
//!
//! Each has a link in one directory, named by the pod's UID, through which the agent opens it. Promises that a link leads to a
//! namespace which the pod was in when it was made, whoever has the number of the process by now: it leads to a descriptor
//! that the agent holds. It goes, or leads elsewhere, when the sandbox has ended. Never leads to the agent's own namespace:
//! what shares that is the node itself. Tested below.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io,
    os::{
        fd::AsRawFd as _,
        unix::fs::{DirBuilderExt as _, MetadataExt as _, symlink},
    },
    path::{Path, PathBuf},
};

use crate::source::Sandboxes;

/// Finds namespaces.
#[derive(Debug)]
pub struct Namespaces {
    /// Where the links are.
    dir: PathBuf,
    /// Where processes are shown.
    proc: PathBuf,
    told: Sandboxes,
    found: HashMap<Box<str>, Found>,
    /// Nothing was looked for yet: links may be those of an agent before.
    is_new: bool,
}

/// A namespace that is held open.
#[derive(Debug)]
struct Found {
    _file: File,
    witness: Witness,
}

/// What says that a namespace is still that of its pod.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Witness {
    /// It was told of with this path.
    Told(PathBuf),
    /// This process is in it.
    Process(Process),
}

/// A process, which nobody else is taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Process {
    /// Clock ticks from the machine's start to its own (proc(5), `starttime`). First, so that older ones are less.
    started: u64,
    pid: u32,
}

impl Namespaces {
    /// `dir`: where the links are to be.
    pub fn new(dir: PathBuf, told: Sandboxes) -> Self {
        Self { dir, proc: "/proc".into(), told, found: HashMap::new(), is_new: true }
    }

    /// What was told, to be told when that changes.
    pub fn told(&self) -> &Sandboxes {
        &self.told
    }

    /// Has the links lead to the namespaces of these pods, as far as they can be found, and no others.
    pub fn look(&mut self, paths: impl Iterator<Item = PathBuf>) {
        let uid = |path: PathBuf| {
            let is_here = path.parent() == Some(&self.dir);
            path.file_name().and_then(|name| name.to_str()).filter(|_| is_here).map(Box::from)
        };
        let wanted: HashSet<Box<str>> = paths.filter_map(uid).collect();
        if std::mem::take(&mut self.is_new) {
            self.forget_links(&wanted);
        }
        let gone =
            self.found.iter().filter(|(uid, found)| !wanted.contains(*uid) || !self.stands(uid, found));
        let gone: Vec<Box<str>> = gone.map(|(uid, _)| uid.clone()).collect();
        for uid in gone {
            self.found.remove(&uid);
            let _ = fs::remove_file(self.dir.join(&*uid));
        }
        let missing: HashSet<&str> =
            wanted.iter().filter(|uid| !self.found.contains_key(*uid)).map(AsRef::as_ref).collect();
        for (uid, file, witness) in self.find(missing) {
            match self.link(&uid, &file) {
                Ok(()) => drop(self.found.insert(uid, Found { _file: file, witness })),
                Err(error) => {
                    tracing::warn!(dir = %self.dir.display(), %error, "cannot keep a network namespace");
                }
            }
        }
    }

    fn stands(&self, uid: &str, found: &Found) -> bool {
        match (&found.witness, self.told.get(uid)) {
            (Witness::Told(path), told) => told.is_some_and(|sandbox| sandbox.netns == *path),
            // What is told from now on holds.
            (Witness::Process(_), Some(_)) => false,
            (Witness::Process(process), None) => started(&self.proc, process.pid) == Some(process.started),
        }
    }

    fn find(&self, mut missing: HashSet<&str>) -> Vec<(Box<str>, File, Witness)> {
        let mut found = Vec::new();
        missing.retain(|uid| {
            let Some(sandbox) = self.told.get(uid) else { return true };
            let file = File::open(&sandbox.netns).ok().filter(|file| self.is_foreign(file));
            found.extend(file.map(|file| (Box::from(*uid), file, Witness::Told(sandbox.netns))));
            false
        });
        if missing.is_empty() {
            return found;
        }
        for (uid, process) in oldest(&self.proc, &missing) {
            let file = File::open(self.proc.join(process.pid.to_string()).join("ns/net"));
            // It is still the process that was looked at, so that what was opened is of the pod.
            let is_it = |_: &File| started(&self.proc, process.pid) == Some(process.started);
            let file = file.ok().filter(is_it).filter(|file| self.is_foreign(file));
            found.extend(file.map(|file| (uid, file, Witness::Process(process))));
        }
        found
    }

    /// Whether it is another namespace than the agent's.
    fn is_foreign(&self, file: &File) -> bool {
        let own = fs::metadata(self.proc.join("self/ns/net")).map(|own| (own.dev(), own.ino()));
        matches!((file.metadata(), own), (Ok(one), Ok(own)) if (one.dev(), one.ino()) != own)
    }

    fn link(&self, uid: &str, file: &File) -> io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        let (path, new) = (self.dir.join(uid), self.dir.join(format!(".{uid}")));
        let _ = fs::remove_file(&new);
        symlink(format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()), &new)?;
        fs::rename(new, path)
    }

    /// Links of an agent before to namespaces that nobody wants any more.
    fn forget_links(&self, wanted: &HashSet<Box<str>>) {
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let is_wanted = entry.file_name().to_str().is_some_and(|name| wanted.contains(name));
            if !is_wanted && entry.file_type().is_ok_and(|kind| kind.is_symlink()) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

/// The oldest process of each of these pods: the one that holds its sandbox, where there is such, else the first of a
/// container, and never one that has made a namespace of its own within the pod.
fn oldest(proc: &Path, uids: &HashSet<&str>) -> HashMap<Box<str>, Process> {
    let mut oldest: HashMap<Box<str>, Process> = HashMap::new();
    for entry in fs::read_dir(proc).into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(cgroups) = fs::read_to_string(entry.path().join("cgroup")) else { continue };
        let uid = cgroups.lines().filter_map(|line| line.splitn(3, ':').nth(2)).find_map(pod_uid);
        let Some(uid) = uid.filter(|uid| uids.contains(&**uid)) else { continue };
        let Some(started) = started(proc, pid) else { continue };
        let process = Process { started, pid };
        oldest.entry(uid).and_modify(|known| *known = process.min(*known)).or_insert(process);
    }
    oldest
}

/// The UID of the pod whose cgroup this is, or is in: `kubepods/burstable/podUID` of a kubelet that makes cgroups itself,
/// `kubepods-burstable-podUID.slice` with `_` for `-` where systemd makes them. The outermost counts: what is within is the
/// pod's own to name.
fn pod_uid(cgroup: &str) -> Option<Box<str>> {
    let mut parts = cgroup.split('/').skip_while(|part| !part.contains("kubepods"));
    parts.find_map(|part| match part.strip_suffix(".slice") {
        Some(slice) => slice.rsplit_once("-pod").map(|(_, uid)| uid.replace('_', "-").into()),
        None => part.strip_prefix("pod").filter(|uid| !uid.is_empty()).map(Box::from),
    })
}

/// When a process was started; `None`: there is none.
fn started(proc: &Path, pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(proc.join(pid.to_string()).join("stat")).ok()?;
    // The name, in brackets, may hold anything; 20 fields behind it is the start.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::source::Sandbox;

    const UID: &str = "0b1c2d3e-0000-1111-2222-333344445555";
    const OTHER: &str = "ffffffff-0000-1111-2222-333344445555";

    #[test]
    fn the_pod_of_a_cgroup_is_known_by_either_form() {
        let systemd = UID.replace('-', "_");
        let table = [
            (format!("/kubepods/burstable/pod{UID}/abc"), Some(UID)),
            (format!("/kubepods/pod{UID}"), Some(UID)),
            (
                format!(
                    "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{systemd}.slice/cri-containerd-1.scope"
                ),
                Some(UID),
            ),
            (format!("/kubepods.slice/kubepods-pod{systemd}.slice"), Some(UID)),
            (format!("/../../kubepods/burstable/pod{UID}/abc"), Some(UID)),
            (
                format!(
                    "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{systemd}.slice/a"
                ),
                Some(UID),
            ),
            (format!("/kubepods/pod{UID}/x/kubepods/pod{OTHER}/y"), Some(UID)),
            (format!("/system.slice/pod{UID}.service"), None),
            (format!("/user/pod{UID}"), None),
            ("/kubepods/burstable".to_owned(), None),
            ("/kubepods/pod".to_owned(), None),
            ("/".to_owned(), None),
        ];
        for (cgroup, expected) in table {
            assert_eq!(pod_uid(&cgroup).as_deref(), expected, "{cgroup}");
        }
    }

    /// Processes as they are shown, of files.
    struct Machine {
        dir: tempfile::TempDir,
        told: Sandboxes,
        namespaces: Namespaces,
    }

    impl Machine {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let (proc, told) = (dir.path().join("proc"), Sandboxes::default());
            fs::create_dir_all(proc.join("self/ns")).unwrap();
            fs::write(proc.join("self/ns/net"), "the node's").unwrap();
            let namespaces = Namespaces { proc, ..Namespaces::new(dir.path().join("netns"), told.clone()) };
            Self { dir, told, namespaces }
        }

        /// `net`: what its namespace is.
        fn process(&self, pid: u32, started: u64, uid: &str, net: &str) {
            let dir = self.dir.path().join("proc").join(pid.to_string());
            fs::create_dir_all(dir.join("ns")).unwrap();
            fs::write(dir.join("cgroup"), format!("0::/kubepods/pod{uid}/c\n")).unwrap();
            fs::write(dir.join("stat"), format!("{pid} (a b) c) S{} {started} 0", " 0".repeat(18))).unwrap();
            let _ = fs::remove_file(dir.join("ns/net"));
            if net == "the node's" {
                fs::hard_link(self.dir.path().join("proc/self/ns/net"), dir.join("ns/net")).unwrap();
            } else {
                fs::write(dir.join("ns/net"), net).unwrap();
            }
        }

        fn end(&self, pid: u32) {
            fs::remove_dir_all(self.dir.path().join("proc").join(pid.to_string())).unwrap();
        }

        fn path(&self, uid: &str) -> PathBuf {
            self.dir.path().join("netns").join(uid)
        }

        /// What the pod's link leads to, once it was looked.
        fn look(&mut self) -> Option<String> {
            let paths = [self.path(UID)];
            self.namespaces.look(paths.into_iter());
            fs::read_to_string(self.path(UID)).ok()
        }
    }

    #[test]
    fn the_oldest_process_of_a_pod_shows_its_namespace() {
        let mut machine = Machine::new();
        assert_eq!(machine.look(), None);
        machine.process(30, 500, UID, "made within");
        machine.process(40, 400, UID, "the pod's");
        machine.process(50, 100, OTHER, "another's");
        assert_eq!(machine.look().as_deref(), Some("the pod's"));
        let link = fs::read_link(machine.path(UID)).unwrap();
        machine.look();
        assert_eq!(fs::read_link(machine.path(UID)).unwrap(), link, "it stays as long as its process");
    }

    #[test]
    fn another_process_of_the_same_number_is_not_taken_for_it() {
        let mut machine = Machine::new();
        machine.process(40, 400, UID, "first sandbox");
        assert_eq!(machine.look().as_deref(), Some("first sandbox"));
        machine.process(40, 700, OTHER, "another's");
        assert_eq!(machine.look(), None);
        machine.process(41, 800, UID, "second sandbox");
        assert_eq!(machine.look().as_deref(), Some("second sandbox"));
        machine.end(41);
        assert_eq!(machine.look(), None);
    }

    #[test]
    fn the_namespace_of_the_node_is_nobodys() {
        let mut machine = Machine::new();
        machine.process(40, 400, UID, "the node's");
        assert_eq!(machine.look(), None);
        let own = machine.dir.path().join("proc/self/ns/net");
        machine.told.insert(UID, Sandbox { netns: own, ips: Vec::new() });
        assert_eq!(machine.look(), None);
    }

    #[test]
    fn what_the_network_plugin_told_comes_first_and_goes_with_its_word() {
        let mut machine = Machine::new();
        machine.process(40, 400, UID, "shown");
        assert_eq!(machine.look().as_deref(), Some("shown"));
        let told = machine.dir.path().join("told");
        fs::write(&told, "told").unwrap();
        machine.told.insert(UID, Sandbox { netns: told, ips: Vec::new() });
        assert_eq!(machine.look().as_deref(), Some("told"));
        machine.told.remove(UID);
        assert_eq!(machine.look().as_deref(), Some("shown"));
    }

    #[test]
    fn links_of_an_agent_before_and_of_pods_that_have_gone_go() {
        let mut machine = Machine::new();
        machine.process(40, 400, UID, "the pod's");
        fs::create_dir(machine.dir.path().join("netns")).unwrap();
        symlink("/nowhere", machine.path(OTHER)).unwrap();
        symlink("/nowhere", machine.path(UID)).unwrap();
        assert_eq!(machine.look().as_deref(), Some("the pod's"));
        assert!(fs::symlink_metadata(machine.path(OTHER)).is_err());
        machine.namespaces.look(std::iter::empty());
        assert!(fs::symlink_metadata(machine.path(UID)).is_err());
        // What is not in the directory is not the agent's to find.
        machine.namespaces.look([PathBuf::from("/run/netns").join(UID)].into_iter());
        assert!(fs::symlink_metadata(machine.path(UID)).is_err());
    }
}
