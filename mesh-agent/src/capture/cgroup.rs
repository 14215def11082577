//! Where the kernel programs are attached: the root of the cgroup2 hierarchy that holds the pods and the agent, and below
//! it the directory of the pods alone.
//!
//! Attached anywhere else they would see the agent's own sockets and no pod's, and seem to work: a hierarchy found
//! rather than named has to be the host's. Tested below.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use crate::mounts::mounts;

/// The directory to attach to: the one named, else the host's hierarchy as `/proc/self/mountinfo` shows it (the hybrid
/// layout's `unified` as well).
pub(super) fn root(named: Option<&Path>) -> Result<PathBuf> {
    if let Some(path) = named {
        let is_cgroup2 =
            statfs(path).with_context(|| format!("cgroup root {}", path.display()))?.filesystem_type()
                == CGROUP2_SUPER_MAGIC;
        ensure!(is_cgroup2, "{} is not in a cgroup2 hierarchy: check --cgroup-root", path.display());
        return Ok(path.to_path_buf());
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("looking for the cgroup2 hierarchy")?;
    let found = mounted(&mounts);
    // The root of the hierarchy alone has no `cgroup.events`: what a private cgroup namespace shows as root does.
    if let Some(root) = found.iter().find(|path| !path.join("cgroup.events").exists()) {
        return Ok(root.clone());
    }
    match found.first() {
        None => bail!("no cgroup2 hierarchy is mounted: mount the host's and name it with --cgroup-root"),
        Some(path) => bail!(
            "{} is the root of a cgroup namespace, not the host's: no pod is below it; mount the host's cgroup2 \
             hierarchy and name it with --cgroup-root",
            path.display()
        ),
    }
}

/// Where container managers put the pods, below the root: the kubelet's two drivers, and both in a node that is a
/// container itself.
const PODS: [&str; 4] =
    ["kubepods.slice", "kubepods", "kubelet.slice/kubelet-kubepods.slice", "kubelet/kubepods"];

/// The directory that holds the pods alone: the one named, else the one that a kubelet has made, else the root. Programs
/// of a child run before those of its parents: what a pod dials is seen there as the pod dialled it, whatever another
/// tool at the root makes of it.
pub(super) fn pods(named: Option<&Path>, root: &Path) -> Result<PathBuf> {
    if let Some(path) = named {
        ensure!(
            path.starts_with(root) && path.is_dir(),
            "{} is not below the cgroup root {}: check --pods-cgroup",
            path.display(),
            root.display()
        );
        return Ok(path.to_path_buf());
    }
    let found = PODS.iter().map(|name| root.join(name)).find(|path| path.is_dir());
    Ok(found.unwrap_or_else(|| root.to_path_buf()))
}

/// Mount points of whole cgroup2 hierarchies, in the order of the text.
fn mounted(mountinfo: &str) -> Vec<PathBuf> {
    let whole_cgroup2 =
        mounts(mountinfo).filter(|mount| mount.kind == "cgroup2" && mount.root == Path::new("/"));
    whole_cgroup2.map(|mount| mount.point.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_layouts_are_found() {
        let text = "\
30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:10 - cgroup2 cgroup2 rw
32 30 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
33 30 0:27 /some/where /mnt rw - cgroup2 cgroup2 rw
34 24 0:27 / /sys/fs/cgroup2 rw - cgroup2 none rw";
        let found = mounted(text);
        assert_eq!(found, [Path::new("/sys/fs/cgroup/unified"), Path::new("/sys/fs/cgroup2")]);
    }

    #[test]
    fn the_pods_have_a_directory_of_their_own_where_a_kubelet_runs() -> Result<()> {
        let root = tempfile::tempdir()?;
        assert_eq!(pods(None, root.path())?, root.path());
        let kubelet = root.path().join("kubelet/kubepods");
        fs::create_dir_all(&kubelet)?;
        assert_eq!(pods(None, root.path())?, kubelet);
        let plain = root.path().join("kubepods");
        fs::create_dir(&plain)?;
        assert_eq!(pods(None, root.path())?, plain);
        assert_eq!(pods(Some(&kubelet), root.path())?, kubelet);
        assert!(
            pods(Some(Path::new("/proc")), root.path())
                .is_err_and(|e| e.to_string().contains("--pods-cgroup"))
        );
        Ok(())
    }

    #[test]
    fn a_directory_elsewhere_is_refused() {
        let error = root(Some(Path::new("/proc"))).map_err(|error| error.to_string());
        assert!(error.is_err_and(|text| text.contains("--cgroup-root")));
    }
}
