//! A node seen from the machine: its network namespace on the bridge, its cgroups, its first process, and how to run
//! something inside it.
//!
//! What happens inside is in [`super::inside`]. Never changes the machine's own sysctls, mounts or links; everything it
//! makes carries [`Node::mark`]. Tested below, and by `cargo xtask test cluster`.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::control_plane::{start, tail};
use super::state::{self, Node, Shape};
use crate::command::kept;

/// Where Linux mounts hierarchies of cgroups.
pub const CGROUPS: &str = "/sys/fs/cgroup";

/// The bridge, with the machine's address on it and the owner's name.
pub fn make_bridge() -> Result<()> {
    let owner = state::dir().display().to_string();
    ip(&["link", "add", state::NAME, "type", "bridge"])?;
    ip(&["link", "set", state::NAME, "alias", &owner])?;
    ip(&["addr", "add", &format!("{}/24", state::control_plane()), "dev", state::NAME])?;
    ip(&["link", "set", state::NAME, "up"])
}

/// Makes the node's network and starts its first process, which starts the rest.
pub fn begin(node: Node, shape: Shape) -> Result<()> {
    fs::create_dir_all(node.dir()).with_context(|| format!("cannot create {}", node.dir().display()))?;
    connect(node, shape)?;
    let command =
        [state::own_program().display().to_string(), "cluster".into(), "node".into(), node.0.to_string()];
    start(&node.name(), &command)
}

/// A network namespace with one link to the bridge, and routes between it, its pods and those of the other nodes.
fn connect(node: Node, shape: Shape) -> Result<()> {
    let mark = node.mark();
    ip(&["netns", "add", &mark])?;
    ip(&["link", "add", &mark, "type", "veth", "peer", "name", "eth0", "netns", &mark])?;
    ip(&["link", "set", &mark, "master", state::NAME, "up"])?;
    ip(&["-n", &mark, "link", "set", "lo", "up"])?;
    ip(&["-n", &mark, "addr", "add", &format!("{}/24", node.address()), "dev", "eth0"])?;
    ip(&["-n", &mark, "link", "set", "eth0", "up"])?;
    ip(&["-n", &mark, "route", "add", "default", "via", &state::control_plane()])?;
    for other in shape.all_nodes().filter(|&other| other != node) {
        ip(&["-n", &mark, "route", "add", &other.pods(), "via", &other.address()])?;
    }
    ip(&["route", "replace", &node.pods(), "via", &node.address(), "dev", state::NAME])
}

fn ip(arguments: &[&str]) -> Result<()> {
    let mut ip = Command::new("ip");
    ip.args(arguments);
    kept(ip)
}

/// Becomes the node: joins its cgroups and its network, and replaces this process by one that is outside of the node's
/// other namespaces, with the node's first process as its child. Returns only on failure.
pub fn become_node(node: Node) -> Result<()> {
    let memberships = fs::read_to_string("/proc/self/cgroup").context("cannot read /proc/self/cgroup")?;
    if has_v2_alone(Path::new(CGROUPS)) {
        delegate_controllers(Path::new(CGROUPS));
    }
    // All are read before the first is joined: joining changes what can be read.
    for cgroup in cgroups(&memberships, Path::new(CGROUPS), &node.mark()) {
        join(&cgroup)?;
    }
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/run/netns/{}", node.mark()));
    command.args(["unshare", "--mount", "--uts", "--ipc", "--cgroup", "--pid", "--fork", "--kill-child"]);
    command.arg("--mount-proc").arg(state::own_program()).args(["cluster", "inside", &node.0.to_string()]);
    Err(command.exec()).context("cannot start nsenter")
}

/// A cgroup of this name in every hierarchy, by the lines of `/proc/self/cgroup`, below where this process is now. Where
/// there is cgroup v2 alone, it is at the top: below a cgroup with processes none could have controllers.
fn cgroups(memberships: &str, root: &Path, name: &str) -> Vec<PathBuf> {
    if has_v2_alone(root) {
        return vec![root.join(name)];
    }
    let places = memberships.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let hierarchy = hierarchy(controllers, root)?;
        Some(hierarchy.join(path.trim_start_matches('/')).join(name))
    });
    places.collect()
}

/// Whether the machine has no cgroup v1.
pub fn has_v2_alone(root: &Path) -> bool {
    root.join("cgroup.controllers").is_file()
}

/// Where the hierarchy is mounted; cgroup v2 beside v1 has no controllers in its name.
fn hierarchy(controllers: &str, root: &Path) -> Option<PathBuf> {
    let place = match controllers.strip_prefix("name=").unwrap_or(controllers) {
        "" => root.join("unified"),
        name => root.join(name),
    };
    place.is_dir().then_some(place)
}

/// Lets the children of a cgroup v2 have its controllers, as far as it has them itself; systemd has done so already.
pub fn delegate_controllers(cgroup: &Path) {
    let controllers = fs::read_to_string(cgroup.join("cgroup.controllers")).unwrap_or_default();
    for controller in controllers.split_whitespace() {
        let _ = fs::write(cgroup.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}

fn join(cgroup: &Path) -> Result<()> {
    fs::create_dir_all(cgroup).with_context(|| format!("cannot create {}", cgroup.display()))?;
    // A new cpuset has neither processors nor memory, and takes no process.
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let (own, parent) = (cgroup.join(file), cgroup.parent().unwrap_or(cgroup).join(file));
        if own.is_file() && cgroup.join("cgroup.clone_children").is_file() {
            fs::write(&own, fs::read(&parent)?).with_context(|| format!("cannot write {}", own.display()))?;
        }
    }
    let file = cgroup.join("cgroup.procs");
    fs::write(&file, std::process::id().to_string())
        .with_context(|| format!("cannot join {}", file.display()))
}

/// The cgroups of any node of a cluster, wherever they were made.
pub fn all_cgroups() -> Vec<PathBuf> {
    let mut found = Vec::new();
    find_cgroups(Path::new(CGROUPS), &mut found);
    found
}

fn find_cgroups(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().filter_map(std::io::Result::ok) {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let name = entry.file_name();
        if name.to_str().is_some_and(|name| name.starts_with(&format!("{}-n", state::NAME))) {
            found.push(entry.path());
        } else {
            find_cgroups(&entry.path(), found);
        }
    }
}

/// The node's first process, as the machine knows it.
pub fn first_process(node: Node) -> Option<u32> {
    let outer = state::remembered(&node.name()).filter(|process| process.lives())?;
    children(outer.pid).into_iter().next()
}

fn children(parent: u32) -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().filter_map(std::io::Result::ok);
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| parent_of(*pid) == Some(parent)).collect()
}

fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// A command inside all namespaces of the node.
pub fn enter(node: Node, program: &str) -> Result<Command> {
    let Some(pid) = first_process(node) else {
        bail!("{} does not run: {}", node.name(), tail(&node.name()))
    };
    let mut command = Command::new("nsenter");
    command.args(["--target", &pid.to_string(), "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup"]);
    command.args(["--", program]);
    Ok(command)
}

/// Gives the images in an archive to the node's containerd.
pub fn import(node: Node, archive: &Path) -> Result<()> {
    let file = fs::File::open(archive).with_context(|| format!("cannot open {}", archive.display()))?;
    // Through standard input: the node has directories of its own in many places, and the file may be in one of them.
    let mut ctr = enter(node, "ctr")?;
    ctr.args(["--namespace", "k8s.io", "images", "import", "--no-unpack", "-"]).stdin(file);
    let output = ctr.output().context("cannot start nsenter")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{} does not take {}: {}", node.name(), archive.display(), said.trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_has_a_cgroup_in_every_hierarchy() -> Result<()> {
        let root = std::env::temp_dir().join(format!("xtask-cgroups-{}", std::process::id()));
        for name in ["cpu", "systemd", "unified"] {
            fs::create_dir_all(root.join(name))?;
        }
        let found = cgroups("4:cpu:/a\n3:memory:/b\n1:name=systemd:/\n0::/c:d\n", &root, "n1");
        let expected = ["cpu/a/n1", "systemd/n1", "unified/c:d/n1"].map(|path| root.join(path));
        assert_eq!(found, expected, "memory is not mounted");
        fs::write(root.join("cgroup.controllers"), "")?;
        assert_eq!(cgroups("0::/c\n", &root, "n1"), [root.join("n1")], "v2 alone");
        fs::remove_dir_all(&root)?;
        Ok(())
    }

    #[test]
    fn parents_are_read_past_any_name() {
        assert_eq!(parent_of(std::process::id()), Some(std::os::unix::process::parent_id()));
        assert_eq!(parent_of(4_194_999), None, "beyond the largest pid");
    }
}
