//! Control groups of the lab.
//!
//! Promises: directories of the cgroup2 hierarchy that hold exactly the processes put there, found wherever the
//! machine mounts it (`/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` on hybrid ones). Never: changes a controller,
//! or touches a directory it did not make. Tested in `tests/lab.rs`.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
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
