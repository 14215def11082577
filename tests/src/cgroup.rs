//! Control groups of the lab.
//!
//! Promises: directories of the cgroup2 hierarchy that hold exactly the processes put there, found wherever the
//! machine mounts it (`/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` on hybrid ones). Never: changes a controller but that
//! of memory where a test asks for a limit ([`MemoryLimit`]), or touches a directory it did not make. Tested in
//! `tests/lab.rs`, limits in `tests/overload.rs`.

use std::{
    fs, io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};

/// How long killed processes may take to leave their cgroup.
const EMPTYING: Duration = Duration::from_secs(5);

/// The mount point of the cgroup2 hierarchy.
pub fn root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("reading /proc/self/mountinfo")?;
    find_root(&mounts).ok_or_else(|| anyhow!("no cgroup2 hierarchy is mounted: mount -t cgroup2 none DIR"))
}

fn find_root(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        (after.split(' ').next() == Some("cgroup2")).then(|| before.split(' ').nth(4).map(PathBuf::from))?
    })
}

/// The cgroup id the kernel knows the directory by.
pub fn id(path: &Path) -> Result<u64> {
    Ok(fs::metadata(path).with_context(|| format!("looking at the cgroup {}", path.display()))?.ino())
}

/// Processes in exactly this cgroup; none if it is gone.
pub fn processes(path: &Path) -> Vec<i32> {
    let text = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

/// The processor time of everything that ever ran in the cgroup and below, its own and the kernel's on its behalf, to the
/// microsecond.
pub fn cpu_time(path: &Path) -> Result<Duration> {
    let file = path.join("cpu.stat");
    let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    let usage = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
    let usage = usage.with_context(|| format!("{} has no usage_usec", file.display()))?;
    Ok(Duration::from_micros(usage.parse().with_context(|| format!("{usage:?} is no time"))?))
}

/// The directory and all below it, deepest first.
pub fn tree(path: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let entries = fs::read_dir(path).into_iter().flatten().filter_map(io::Result::ok);
    for entry in entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
        found.extend(tree(&entry.path()));
    }
    if path.is_dir() {
        found.push(path.to_owned());
    }
    found
}

/// Kills whatever is left in the cgroup and below, and removes the directories. It is no error if it is gone.
pub fn remove_tree(path: &Path) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    fs::write(path.join("cgroup.kill"), "1")
        .with_context(|| format!("killing what is left in {}", path.display()))?;
    let deadline = Instant::now() + EMPTYING;
    for directory in tree(path) {
        while let Err(error) = fs::remove_dir(&directory) {
            match error.kind() {
                io::ErrorKind::NotFound => break,
                io::ErrorKind::ResourceBusy if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                _ => bail!("removing the cgroup {}: {error}", directory.display()),
            }
        }
    }
    Ok(())
}

/// A limit of memory, in the hierarchy that has the controller on this machine: a directory of its own in that of
/// version 1, else the given one of version 2.
#[derive(Debug)]
pub struct MemoryLimit {
    path: PathBuf,
    version_1: bool,
}

impl MemoryLimit {
    /// Limits `cgroup` below [`root`], which holds nothing yet, to so many bytes. `None` where no hierarchy has the
    /// controller.
    pub fn new(unique: &str, cgroup: &Path, bytes: u64) -> Result<Option<Self>> {
        let own = fs::read_to_string("/proc/self/cgroup").context("reading /proc/self/cgroup")?;
        let version_1 = own.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            controllers.split(',').any(|one| one == "memory").then_some(path)
        });
        let write = |path: PathBuf, text: &str| {
            fs::write(&path, text).with_context(|| format!("writing {text} to {}", path.display()))
        };
        if let Some(own) = version_1 {
            let path = Path::new("/sys/fs/cgroup/memory").join(own.trim_start_matches('/')).join(unique);
            fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
            let limit = Self { path, version_1: true };
            write(limit.path.join("memory.limit_in_bytes"), &bytes.to_string())?;
            return Ok(Some(limit));
        }
        let root = root()?;
        let has = fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
        if !has.split_whitespace().any(|one| one == "memory") {
            return Ok(None);
        }
        let above: Vec<&Path> =
            cgroup.ancestors().skip(1).take_while(|path| path.starts_with(&root)).collect();
        for path in above.into_iter().rev() {
            write(path.join("cgroup.subtree_control"), "+memory")?;
        }
        write(cgroup.join("memory.max"), &bytes.to_string())?;
        Ok(Some(Self { path: cgroup.to_owned(), version_1: false }))
    }

    /// A script at `path` that runs `binary` within the limit, in the same process.
    pub fn script(&self, path: &Path, binary: &Path) -> Result<()> {
        let procs = self.path.join("cgroup.procs");
        let text = format!("#!/bin/sh\necho $$ > {} && exec {} \"$@\"\n", procs.display(), binary.display());
        fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).context("making a script executable")
    }

    /// The most that was charged to it, bytes.
    pub fn peak(&self) -> Result<u64> {
        let file = if self.version_1 { "memory.max_usage_in_bytes" } else { "memory.peak" };
        let text = fs::read_to_string(self.path.join(file)).with_context(|| format!("reading {file}"))?;
        text.trim().parse().with_context(|| format!("{file}: {text}"))
    }

    /// Processes killed for want of memory.
    pub fn killed(&self) -> Result<u64> {
        let file = if self.version_1 { "memory.oom_control" } else { "memory.events" };
        let text = fs::read_to_string(self.path.join(file)).with_context(|| format!("reading {file}"))?;
        let killed = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        killed.and_then(|count| count.parse().ok()).with_context(|| format!("{file} has no oom_kill: {text}"))
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        if self.version_1
            && let Err(error) = fs::remove_dir(&self.path)
        {
            eprintln!("{} is left: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_hierarchy_of_hybrid_and_unified_hosts() {
        let hybrid = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(find_root(hybrid), Some("/sys/fs/cgroup/unified".into()));
        let unified = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(find_root(unified), Some("/sys/fs/cgroup".into()));
        assert_eq!(find_root("29 24 0:5 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"), None);
    }
}
