//! The end of a cluster, and the proof that nothing of it is left.
//!
//! Processes are ended by the pids that were written down, and only if they are still the same; a node's go with its
//! first one. Then what carries the cluster's name is removed, and looked for again: network namespaces, links, mounts,
//! cgroups, processes, directories. Never touches what carries another name. Tested below, and by
//! `cargo xtask test cluster`.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::control_plane::end;
use super::inside::OWN_DIRECTORIES;
use super::node::all_cgroups;
use super::state::{self, NAME, Process};
use super::wait::until;
use crate::command::kept;

/// The kernel takes a moment to free what ended processes had, and a process ends only after what it was writing or
/// removing: minutes on a disk that is busy.
const SETTLING: Duration = Duration::from_mins(3);

/// Where `ip` keeps network namespaces.
const NETNS: &str = "/run/netns";

/// Makes the directories that nodes mount their own over, and notes which the machine did not have.
pub fn make_directories() -> Result<()> {
    let mut made = String::new();
    for dir in OWN_DIRECTORIES.iter().filter(|dir| !Path::new(dir).exists()) {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {dir}"))?;
        made.extend([dir, "\n"]);
    }
    fs::write(made_file(), made).context("cannot note which directories were made")
}

fn made_file() -> PathBuf {
    state::dir().join("directories")
}

/// Ends all of it. An error names what could not be removed.
pub fn run() -> Result<()> {
    state::not_anothers()?;
    end_processes()?;
    for name in names_in(NETNS) {
        ip(&["netns", "delete", &name])?;
    }
    if Path::new("/sys/class/net").join(NAME).exists() {
        ip(&["link", "delete", NAME])?;
    }
    until("the cgroups are empty", SETTLING, || Ok(all_cgroups().iter().all(|dir| remove_cgroup(dir))))?;
    for dir in fs::read_to_string(made_file()).unwrap_or_default().lines() {
        // One that was put to another use meanwhile stays.
        let _ = fs::remove_dir(dir);
    }
    match fs::remove_dir_all(state::dir()) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot remove {}", state::dir().display()));
        }
        _ => {}
    }
    nothing_left()
}

/// Waits until nothing is left; an error names what is.
fn nothing_left() -> Result<()> {
    let gone = until("nothing is left", SETTLING, || Ok(leftovers().is_empty()));
    let left = leftovers();
    if gone.is_err() || !left.is_empty() {
        bail!("the cluster has ended, but this is left of it:\n  {}", left.join("\n  "));
    }
    Ok(())
}

fn end_processes() -> Result<()> {
    let processes = state::processes();
    for (name, process) in &processes {
        if process.lives() {
            end(process.pid).with_context(|| format!("cannot end {name}, process {}", process.pid))?;
        }
    }
    until("the processes have ended", SETTLING, || {
        Ok(!processes.iter().any(|(_, process)| Process::lives(*process)))
    })?;
    // Those of nodes go with the first of each, whom its parent takes along; what is left was started otherwise.
    let ended = until("the processes of the nodes have ended", SETTLING, || {
        let left = processes_of_nodes();
        for (pid, _) in &left {
            end(*pid)?;
        }
        Ok(left.is_empty())
    });
    ended.with_context(|| format!("these do not end: {:?}", processes_of_nodes()))
}

/// Whether it is gone; its children go first.
fn remove_cgroup(dir: &Path) -> bool {
    let children = fs::read_dir(dir).into_iter().flatten().filter_map(std::io::Result::ok);
    for child in children.filter(|child| child.file_type().is_ok_and(|kind| kind.is_dir())) {
        remove_cgroup(&child.path());
    }
    fs::remove_dir(dir).is_ok() || !dir.exists()
}

fn ip(arguments: &[&str]) -> Result<()> {
    let mut ip = Command::new("ip");
    ip.args(arguments);
    kept(ip)
}

/// Everything on the machine that carries the cluster's name or is below its directory.
pub fn leftovers() -> Vec<String> {
    let mut left: Vec<_> = names_in(NETNS).map(|name| format!("network namespace {name}")).collect();
    left.extend(names_in("/sys/class/net").map(|name| format!("link {name}")));
    left.extend(all_cgroups().iter().map(|dir| format!("cgroup {}", dir.display())));
    left.extend(processes_of_nodes().iter().map(|(pid, name)| format!("process {pid} ({name})")));
    left.extend(
        state::processes()
            .into_iter()
            .filter(|(_, process)| process.lives())
            .map(|(name, process)| format!("process {} ({name})", process.pid)),
    );
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    left.extend(mounts_below(&mounts, &state::dir().display().to_string()).map(|at| format!("mount {at}")));
    if state::dir().exists() {
        left.push(format!("directory {}", state::dir().display()));
    }
    left
}

fn names_in(dir: &str) -> impl Iterator<Item = String> + use<> {
    let entries = fs::read_dir(dir).into_iter().flatten().filter_map(std::io::Result::ok);
    entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| is_ours(name))
}

/// The name itself, or one that begins with it and a dash.
fn is_ours(name: &str) -> bool {
    name.strip_prefix(NAME).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

/// Mounts whose place is below the directory, or that are of a node's network namespace.
fn mounts_below<'a>(mountinfo: &'a str, dir: &'a str) -> impl Iterator<Item = &'a str> {
    let places = mountinfo.lines().filter_map(|line| line.split(' ').nth(4));
    places.filter(move |place| {
        Path::new(place).starts_with(dir) || place.strip_prefix("/run/netns/").is_some_and(is_ours)
    })
}

/// Processes in a cgroup of a node: pid and name.
fn processes_of_nodes() -> Vec<(u32, String)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().filter_map(std::io::Result::ok);
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    // One that has ended is in its cgroup until its parent has asked: where this process started the nodes, that is itself.
    pids.filter(|pid| Process::now(*pid).is_some())
        .filter(|pid| {
            let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
            cgroups.lines().any(in_node)
        })
        .map(|pid| {
            (pid, fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned())
        })
        .collect()
}

fn in_node(membership: &str) -> bool {
    membership.rsplit(':').next().unwrap_or_default().split('/').any(|part| {
        part.strip_prefix(NAME).and_then(|rest| rest.strip_prefix("-n")).is_some_and(|rest| !rest.is_empty())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_carries_the_name_is_ours() {
        for name in ["mesh-k8s", "mesh-k8s-n1"] {
            assert!(is_ours(name), "{name}");
        }
        for name in ["mesh-k8sx", "mesh", "mesh-lab-1-2", "docker0"] {
            assert!(!is_ours(name), "{name}");
        }
        assert!(in_node("4:memory:/some/where/mesh-k8s-n2/kubepods/pod1"));
        assert!(!in_node("4:memory:/some/where/mesh-k8s"));
    }

    #[test]
    fn mounts_of_the_cluster_are_told_from_others() {
        let mounts = "1 2 0:3 / /run/netns/mesh-k8s-n1 rw - nsfs nsfs rw\n\
                      1 2 0:3 / /target/cluster/node1/x rw - tmpfs tmpfs rw\n\
                      1 2 0:3 / /target/clusters rw - tmpfs tmpfs rw\n\
                      1 2 0:3 / /run/netns/other rw - nsfs nsfs rw\n";
        let found: Vec<_> = mounts_below(mounts, "/target/cluster").collect();
        assert_eq!(found, ["/run/netns/mesh-k8s-n1", "/target/cluster/node1/x"]);
    }
}
