//! A node: a network namespace that routes for its pods, and cgroups laid out as a machine's.
//!
//! Promises: pods hang off it as a CNI plugin would have them; nodes reach each other's pods; service addresses are
//! routed nowhere. Tested in `tests/lab.rs`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    agent::AgentBuilder,
    lab::{Role, World, lock},
    manifest,
    net::{self, Addresses, Netns},
    pod::{PodBuilder, PodInner},
    process::Process,
};

/// A node of a lab. Clones are the same node.
#[derive(Debug, Clone)]
pub struct Node {
    pub(crate) world: Arc<World>,
    pub(crate) inner: Arc<NodeInner>,
}

#[derive(Debug)]
pub(crate) struct NodeInner {
    pub(crate) name: String,
    /// From 1, in the order of creation.
    pub(crate) number: u8,
    pub(crate) netns: Netns,
    pub(crate) cgroup: PathBuf,
    pub(crate) pods: Mutex<Vec<Arc<PodInner>>>,
    /// Pods ever made here: addresses are not used twice.
    pub(crate) last_pod: Mutex<u8>,
}

impl Node {
    pub(crate) fn find_or_create(world: Arc<World>, name: &str) -> Result<Self> {
        let mut nodes = lock(&world.nodes);
        if let Some(inner) = nodes.iter().find(|node| node.name == name).cloned() {
            drop(nodes);
            return Ok(Self { world, inner });
        }
        let number = u8::try_from(nodes.len() + 1).ok().filter(|n| *n < 96);
        let number = number.context("a lab has at most 95 nodes: services live in 10.96")?;
        let inner = Arc::new(NodeInner {
            name: name.to_owned(),
            number,
            netns: Netns::create(&format!("{}-{name}", world.unique))?,
            cgroup: world.cgroup.join(name),
            pods: Mutex::default(),
            last_pod: Mutex::new(1),
        });
        // Known from here on, so that it is removed whatever happens next.
        nodes.push(Arc::clone(&inner));
        for directory in ["kubepods", "agent"] {
            fs::create_dir_all(inner.cgroup.join(directory)).context("making the cgroups of a node")?;
        }
        net::join_fabric(world.fabric(), &inner.netns, number)?;
        for other in nodes.iter().filter(|other| other.number != number) {
            net::route_to_node(&inner.netns, other.number)?;
            net::route_to_node(&other.netns, number)?;
        }
        world
            .apply_object(&format!("node-{name}.yaml"), &manifest::node(name, &Addresses::of_node(number)))?;
        drop(nodes);
        Ok(Self { world, inner })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Its addresses on the network between nodes.
    pub fn addresses(&self) -> Addresses {
        Addresses::of_node(self.inner.number)
    }

    /// Its network namespace.
    pub fn netns(&self) -> &Netns {
        &self.inner.netns
    }

    /// What a machine would have as the root of its cgroups: `kubepods/POD` and `agent` are below.
    pub fn cgroup(&self) -> &Path {
        &self.inner.cgroup
    }

    /// The cgroup of its agent.
    pub fn agent_cgroup(&self) -> PathBuf {
        self.inner.cgroup.join("agent")
    }

    /// Begins a pod; see [`PodBuilder`].
    pub fn pod(&self, name: &str) -> PodBuilder {
        PodBuilder::new(self.clone(), name)
    }

    /// Begins an agent; see [`AgentBuilder`].
    pub fn agent(&self) -> AgentBuilder {
        AgentBuilder::new(self.clone())
    }

    /// Starts a process in the node's own network namespace and the agent's cgroup: what is on the node, but in no
    /// pod.
    pub fn spawn(&self, command: Command) -> Result<Process> {
        self.spawn_as(command, Role::App)
    }

    pub(crate) fn spawn_as(&self, command: Command, role: Role) -> Result<Process> {
        self.world.spawn(command, &self.inner.netns.path(), &self.agent_cgroup(), self.name(), role)
    }

    pub(crate) fn next_pod(&self) -> Result<u8> {
        let mut last = lock(&self.inner.last_pod);
        ensure!(*last < u8::MAX, "node {} has no address left for another pod", self.inner.name);
        *last += 1;
        Ok(*last)
    }
}
