//! How much memory the agent may use and does use.
//!
//! The limit is what it was told, else that of its cgroup, the tightest of those above it included; version 1 of the
//! memory controller and version 2, whichever has it. In use is what counts against the limit and cannot be given back:
//! the process's resident memory; where the limit is the cgroup's and nothing else runs there, what the kernel charges
//! to the cgroup if that is more (kernel memory, in version 2 the buffers of sockets too), without file pages that it
//! can drop. Never writes anything. Tested below on a made-up hierarchy, in the lab (`tests/tests/overload.rs`) on the
//! real one.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::mounts::{Mount, mounts};

/// Larger limits are none: version 1 says so by the largest number of pages.
const UNLIMITED: u64 = 1 << 60;

/// The memory of this process.
#[derive(Debug)]
pub struct Memory {
    /// What may be used, in bytes; `None`: anything.
    pub limit: Option<u64>,
    /// Whose limit it is, for people.
    pub whose: String,
    /// Its cgroup, where what is charged to that counts.
    charged: Option<Group>,
}

/// A cgroup with the memory controller.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Group {
    path: PathBuf,
    /// Where its hierarchy is mounted: nothing above can be seen.
    top: PathBuf,
    files: Files,
}

/// What the files of a version of the controller are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Files {
    limit: &'static str,
    used: &'static str,
    /// Line of `memory.stat` with the file pages that nobody has used for a while.
    idle: &'static str,
}

const VERSION_1: Files =
    Files { limit: "memory.limit_in_bytes", used: "memory.usage_in_bytes", idle: "total_inactive_file" };
const VERSION_2: Files = Files { limit: "memory.max", used: "memory.current", idle: "inactive_file" };

impl Memory {
    /// Of this process. `given`: the limit that it was told; 0 is none.
    pub fn of_process(given: Option<u64>) -> Self {
        if let Some(bytes) = given {
            let limit = Some(bytes).filter(|bytes| *bytes > 0);
            return Self { limit, whose: "--memory-limit".to_owned(), charged: None };
        }
        let group =
            match (fs::read_to_string("/proc/self/cgroup"), fs::read_to_string("/proc/self/mountinfo")) {
                (Ok(groups), Ok(mounts)) => group(&groups, &mounts),
                _ => None,
            };
        let Some((limit, path)) = group.as_ref().and_then(Group::limit) else {
            return Self { limit: None, whose: String::new(), charged: None };
        };
        let whose = format!("the cgroup {}", path.display());
        let charged = group.filter(Group::is_ours_alone);
        Self { limit: Some(limit), whose, charged }
    }

    /// Bytes in use now.
    ///
    /// # Errors
    /// Those of reading `/proc` and the cgroup.
    pub fn used(&self) -> io::Result<u64> {
        let resident = resident(&fs::read_to_string("/proc/self/status")?)?;
        Ok(self.charged.as_ref().map_or(Ok(0), Group::used)?.max(resident))
    }
}

/// `VmRSS` of `/proc/PID/status`, in bytes.
fn resident(status: &str) -> io::Result<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    Ok(1024 * kibibytes.ok_or_else(|| io::Error::other("/proc/self/status has no VmRSS"))?)
}

/// The cgroup by which the kernel counts this process's memory (cgroups(7)): on a hybrid host that of version 1 where
/// the controller is there.
fn group(groups: &str, mounts: &str) -> Option<Group> {
    let lines = groups.lines().filter_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        Some((controllers, path))
    });
    let lines: Vec<_> = lines.collect();
    let own = |wanted: fn(&str) -> bool| lines.iter().find(|(all, _)| wanted(all)).map(|(_, path)| *path);
    let (path, mount, files) = match own(|all| all.split(',').any(|one| one == "memory")) {
        Some(path) => (path, mounted(mounts, "cgroup", Some("memory"))?, VERSION_1),
        None => (own(str::is_empty)?, mounted(mounts, "cgroup2", None)?, VERSION_2),
    };
    // In a container the mount may begin at its own cgroup, or name it in a way that its namespace does not.
    let below = Path::new(path).strip_prefix(mount.root).unwrap_or(Path::new(""));
    Some(Group { path: mount.point.join(below), top: mount.point.to_owned(), files })
}

/// The mount of a hierarchy.
fn mounted<'a>(mountinfo: &'a str, kind: &str, controller: Option<&str>) -> Option<Mount<'a>> {
    mounts(mountinfo).find(|mount| {
        let has = controller.is_none_or(|wanted| mount.options.split(',').any(|one| one == wanted));
        mount.kind == kind && has
    })
}

impl Group {
    /// The tightest limit of it and those above, and whose it is.
    fn limit(&self) -> Option<(u64, &Path)> {
        let up = self.path.ancestors().take_while(|path| path.starts_with(&self.top));
        let limits = up.filter_map(|path| {
            let text = fs::read_to_string(path.join(self.files.limit)).ok()?;
            let bytes = text.trim().parse::<u64>().ok().filter(|bytes| *bytes < UNLIMITED)?;
            Some((bytes, path))
        });
        limits.min_by_key(|(bytes, _)| *bytes)
    }

    /// What is charged to it and cannot be dropped.
    fn used(&self) -> io::Result<u64> {
        let wrong = |file: &str| io::Error::other(format!("{}: {file} has no number", self.path.display()));
        let charged = fs::read_to_string(self.path.join(self.files.used))?;
        let charged: u64 = charged.trim().parse().map_err(|_| wrong(self.files.used))?;
        let stat = fs::read_to_string(self.path.join("memory.stat"))?;
        let idle = stat.lines().find_map(|line| line.strip_prefix(self.files.idle)?.strip_prefix(' '));
        let idle: u64 = idle.and_then(|bytes| bytes.parse().ok()).ok_or_else(|| wrong("memory.stat"))?;
        Ok(charged.saturating_sub(idle))
    }

    /// Whether only agents run in it, as the one that this one takes over from: what others use is not for this agent's
    /// pods to give back.
    fn is_ours_alone(&self) -> bool {
        let name = |pid: &str| fs::read_to_string(format!("/proc/{pid}/comm")).ok();
        let own = name("self");
        let processes = fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default();
        // A process that has ended since is nobody's.
        processes.lines().all(|pid| name(pid).is_none_or(|name| Some(name) == own))
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const HYBRID: &str = "\
14 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
15 31 0:33 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
16 31 0:34 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw";
    const UNIFIED: &str = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate";
    const CONTAINER: &str = "30 24 0:26 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory";

    #[test]
    fn the_cgroup_is_found_in_each_layout() {
        let table = [
            ("4:memory:/pods/a\n0::/", HYBRID, Some(("/sys/fs/cgroup/memory/pods/a", VERSION_1))),
            ("4:cpu,memory:/\n0::/x", HYBRID, Some(("/sys/fs/cgroup/memory", VERSION_1))),
            ("3:cpu:/\n0::/x/y", HYBRID, Some(("/sys/fs/cgroup/unified/x/y", VERSION_2))),
            ("0::/system.slice/agent", UNIFIED, Some(("/sys/fs/cgroup/system.slice/agent", VERSION_2))),
            ("4:memory:/docker/abc", CONTAINER, Some(("/sys/fs/cgroup/memory", VERSION_1))),
            ("4:memory:/docker/abc/in", CONTAINER, Some(("/sys/fs/cgroup/memory/in", VERSION_1))),
            ("4:memory:/", CONTAINER, Some(("/sys/fs/cgroup/memory", VERSION_1))),
            ("4:memory:/a", UNIFIED, None),
            ("", "", None),
        ];
        for (groups, mounts, expected) in table {
            let found = group(groups, mounts);
            let found =
                found.as_ref().map(|group| (group.path.to_str().unwrap().trim_end_matches('/'), group.files));
            assert_eq!(found, expected, "{groups}");
        }
    }

    #[test]
    fn the_tightest_limit_holds_and_droppable_pages_do_not_count() {
        let top = tempfile::tempdir().unwrap();
        let path = top.path().join("kubepods/agent");
        fs::create_dir_all(&path).unwrap();
        let write = |at: &Path, file: &str, text: &str| fs::write(at.join(file), text).unwrap();
        for (files, unlimited) in [(VERSION_1, "9223372036854771712\n"), (VERSION_2, "max\n")] {
            let group = Group { path: path.clone(), top: top.path().to_owned(), files };
            for at in [top.path(), path.parent().unwrap(), &path] {
                write(at, files.limit, unlimited);
            }
            assert_eq!(group.limit(), None);
            write(path.parent().unwrap(), files.limit, "4000\n");
            assert_eq!(group.limit(), Some((4000, path.parent().unwrap())));
            write(&path, files.limit, "5000\n");
            assert_eq!(group.limit().map(|(bytes, _)| bytes), Some(4000));
            write(&path, files.limit, "3000\n");
            assert_eq!(group.limit(), Some((3000, &*path)));
            write(&path, files.used, "2500\n");
            write(&path, "memory.stat", "cache 9\ninactive_file 100\ntotal_inactive_file 100\n");
            assert_eq!(group.used().unwrap(), 2400);
        }
    }

    #[test]
    fn what_is_given_goes_before_the_cgroup_and_nothing_is_no_limit() {
        let given = Memory::of_process(Some(1 << 30));
        assert_eq!((given.limit, &*given.whose), (Some(1 << 30), "--memory-limit"));
        assert_eq!(Memory::of_process(Some(0)).limit, None);
        let used = given.used().unwrap();
        assert!(used > 1 << 20 && used < 1 << 40, "{used}");
    }

    #[test]
    fn resident_memory_is_in_kibibytes() {
        assert_eq!(resident("VmHWM:\t  99 kB\nVmRSS:\t   12 kB\n").unwrap(), 12 << 10);
        assert!(resident("VmHWM: 1 kB").is_err());
    }
}
