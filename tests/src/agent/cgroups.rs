//! Where the programs of an agent are attached, and what it sees of the machine's cgroups.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use crate::node::Node;

/// Where an agent's programs are attached.
#[derive(Debug, Clone, Default)]
pub enum Cgroups {
    /// At the root that the lab has made for its node.
    #[default]
    OfNode,
    /// There.
    At(PathBuf),
    /// Where the agent finds the machine's cgroup2 hierarchy by itself.
    Found,
    /// The same, on a machine that has no other hierarchies: cgroup2 at `/sys/fs/cgroup`.
    Version2Alone,
}

impl Cgroups {
    /// What starts a program so.
    pub(super) fn starts(&self, path: &Path) -> Command {
        match self {
            Self::Version2Alone => with_cgroup2_alone(path),
            Self::OfNode | Self::At(_) | Self::Found => Command::new(path),
        }
    }

    /// What the agent is told.
    pub(super) fn told(&self, command: &mut Command, node: &Node) {
        match self {
            Self::OfNode => drop(command.arg("--cgroup-root").arg(node.cgroup())),
            Self::At(root) => drop(command.arg("--cgroup-root").arg(root)),
            Self::Found | Self::Version2Alone => {}
        }
    }
}

/// A program, as it sees a host that has nothing but cgroup2. What is mounted later elsewhere it sees as everybody does.
fn with_cgroup2_alone(path: &Path) -> Command {
    let script = "umount -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && exec \"$0\" \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "slave", "sh", "-c", script]).arg(path);
    command
}
