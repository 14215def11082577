//! Pods that pass from one agent to its successor, with their sockets, maps and links.
//!
//! The successor makes everything ready beside the agent that serves, and changes nothing of it: the sockets are the
//! same, the maps are opened where they are pinned. Once that agent has let go, the links are given the successor's
//! programs one by one, each in one step. Never leaves a pod without a listener or a program in between. Maps whose
//! layout differs are refused before anything is touched. Tested in the lab (`tests/tests/upgrade.rs`).

use std::{
    collections::HashSet,
    io,
    net::TcpListener,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    sync::{Arc, PoisonError},
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::MapInfo;
use mesh_common::{
    addr::Addr,
    flow::FlowRecord,
    maps::{
        ADMITTED, Admitted, CLIENTS, CLOSED, COUNTERS, CidrOf, DIRECT, DIRECT_SLOTS, DirectKey,
        DirectService, ENDPOINTS, EXCLUDED_CIDRS, Endpoint, Entry, FLOWS, HELD, HeldKey, INNER_LINKS,
        LISTENERS, ORIGINAL_DST, PACKET_FLOWS, POD_ADMITTED, POD_CLIENTS, POD_FLOWS, POD_GUESTS,
        POD_ORIGINAL_DST, POD_PACKET_FLOWS, POD_PROBES, PODS, POLICIES, PROBE_PORTS, PROBES, PacketKey,
        PodAddrs, PodPolicy, Probe, ProbePort, SOCKETS, STEERING, Slot, SlotKey, SocketFacts, Tuple,
    },
};

use super::{
    Net, PodNet, attach, cgroup,
    enrol::{Capture, Cgroups, Enrolled, Flows, pod_addrs},
    guard,
    guests::Guests,
    kernel::{Facts, KernelNet},
    links::{BpfDir, detach_others},
    loader::{self, CaptureConfig, Loading, Object},
    netns::Netns,
    probes::Probes,
};
use crate::state::snapshot::Workload;

/// An enrolled pod, as its agent hands it over.
#[derive(Debug)]
pub struct OfferedPod {
    /// `metadata.namespace`
    pub namespace: String,
    /// `metadata.name`
    pub name: String,
    /// Cookie of its network namespace.
    pub cookie: u64,
    /// Its listening sockets, in the order of [`super::Listener::ALL`].
    pub listeners: [OwnedFd; 3],
}

/// A pod that is ready to be served by this agent, while another one still does.
#[derive(Debug)]
pub struct Adopted {
    net: Arc<PodNet>,
    cookie: u64,
    addrs: PodAddrs,
    flows: Arc<Flows>,
    object: Object,
}

impl Adopted {
    /// Its network: the same sockets as the other agent's.
    pub fn net(&self) -> &Arc<PodNet> {
        &self.net
    }
}

impl Capture {
    /// What another process needs in order to take over: the lock of the directory, and the pods.
    ///
    /// # Errors
    /// No file descriptors are left.
    pub fn offer(&self) -> io::Result<(OwnedFd, Vec<OfferedPod>)> {
        let lock = self.dir.share_lock()?;
        let pods = self.enrolled().into_iter().filter_map(|net| offered(&net).transpose());
        Ok((lock, pods.collect::<io::Result<_>>()?))
    }

    /// Whether what is in the kernel is this agent's to change: not before it was handed over, nor after.
    pub fn is_ours(&self) -> bool {
        self.dir.is_ours()
    }

    /// Lets go of everything without taking anything away: listeners are closed here, and stay open in whoever has
    /// them too; the kernel's buffers are read no more. Open connections stay.
    pub async fn let_go(&self) {
        self.let_go_of_direct();
        for pod in self.shared.pods().values() {
            pod.guests.close();
            pod.net.close();
        }
        self.stop_reading().await;
    }

    /// The kernel side of an agent that hands over, which goes on until [`Capture::confirm`]. To be called inside a
    /// tokio runtime.
    ///
    /// # Errors
    /// The maps are laid out in another way, or the host lacks something.
    pub fn take_over(config: &CaptureConfig, lock: OwnedFd) -> Result<Self> {
        let root = cgroup::root(config.cgroup_root.as_deref())?;
        let pods = cgroup::pods(config.pods_cgroup.as_deref(), &root)?;
        let dir = BpfDir::of_another(&config.bpf_dir, lock);
        check_layout(&dir.maps(), &shared_layout())?;
        let with = Loading::of(config);
        let node = loader::load(&dir, &with)?;
        let probes = Probes::new(config.kubelet_cgroup.as_deref(), &root, &pods)?;
        let capture = Self::of(dir, Cgroups { root, pods }, (with, config.when_agent_is_down), node, probes);
        capture.learn_endpoints()?;
        capture.learn_probes()?;
        Ok(capture)
    }

    /// Makes ready to serve a pod that another agent serves. `None` when it is another pod by now: its network
    /// namespace has gone, or been replaced.
    ///
    /// # Errors
    /// A sentence that names the pod.
    pub fn adopt(&self, workload: Arc<Workload>, pod: OfferedPod) -> Result<Option<Adopted>> {
        let name = format!("{}/{}", pod.namespace, pod.name);
        self.try_adopt(workload, pod).with_context(|| format!("pod {name} cannot be taken over"))
    }

    fn try_adopt(&self, workload: Arc<Workload>, pod: OfferedPod) -> Result<Option<Adopted>> {
        let OfferedPod { cookie, listeners, .. } = pod;
        let netns = workload.netns.as_deref().map(Netns::open);
        let Some(Ok(netns)) = netns.filter(|netns| netns.as_ref().is_ok_and(|it| it.cookie() == cookie))
        else {
            return Ok(None);
        };
        let addrs = pod_addrs(&workload.ips)?;
        check_layout(&self.dir.maps_of(cookie), &pod_layout())?;
        let facts = Facts::open(&self.dir.maps())?;
        let mut object = loader::load_pod(&self.dir, &self.with, cookie)?;
        let flows = self.list_maps(&mut object, cookie)?;
        let net = Net::Kernel(KernelNet::new(netns, facts));
        let net = PodNet::new(workload, listeners.map(TcpListener::from), net);
        Ok(Some(Adopted { net, cookie, addrs, flows, object }))
    }

    /// The other agent has let go: from here on everything is this one's, and runs its programs. Pods that were offered
    /// and not adopted are let go of. The errors say what was not done, and in which pod; the rest is.
    pub fn confirm(&self, adopted: Vec<Adopted>, offered: &HashSet<u64>) -> Vec<anyhow::Error> {
        self.dir.take();
        let mut failed: Vec<anyhow::Error> = Vec::new();
        {
            let mut node = self.node.lock().unwrap_or_else(PoisonError::into_inner);
            failed.extend(loader::attach(&mut node, &self.dir, &self.cgroups.root, &self.cgroups.pods).err());
        }
        self.follow_kubelet();
        failed.extend(self.forward_log().err());
        let mut gone = offered.clone();
        for pod in adopted {
            gone.remove(&pod.cookie);
            let name = pod.net.name();
            failed.extend(self.take_in(pod).with_context(|| format!("pod {name}")).err());
        }
        failed.extend(gone.into_iter().filter_map(|cookie| self.take_away(cookie).err()));
        failed
    }

    fn take_in(&self, pod: Adopted) -> Result<()> {
        let Adopted { net, cookie, mut addrs, flows, mut object } = pod;
        let guests = Guests::of(&mut object, &self.dir, cookie)?;
        let enrolled = Enrolled { net: Arc::clone(&net), flows, guests: Arc::clone(&guests) };
        self.shared.pods().insert(cookie, enrolled);
        let mut pods = self.pods_map()?;
        // What the kernel has found out stays known.
        addrs.low_ports = pods.get(&cookie, 0).map_or(0, |before| before.low_ports);
        addrs.flags = self.write_policy(cookie, &net.workload.capture)?;
        pods.insert(cookie, addrs, 0).context("map PODS")?;
        self.write_probes(cookie, &net.workload)?;
        let Net::Kernel(kernel) = &net.net else { return Ok(()) };
        let links = self.dir.pod(cookie);
        attach::attach(&mut object, kernel.netns(), &links)?;
        let known = ["inbound", "egress-", "ingress-", "from-guest-", "to-guest-", guard::PINS];
        detach_others(&links, |pinned| known.iter().any(|name| pinned.starts_with(name)))?;
        guests.follow(&net);
        let restricted = net.workload.capture.restrict_egress;
        self.guard(cookie, kernel.netns(), &net.workload.ips, restricted)
    }
}

fn offered(net: &PodNet) -> io::Result<Option<OfferedPod>> {
    let (Some(cookie), Some(listeners)) = (net.cookie(), net.listeners.load_full()) else { return Ok(None) };
    let [outbound, inbound, mesh] = &*listeners;
    let handed = |listener: &TcpListener| listener.as_fd().try_clone_to_owned();
    Ok(Some(OfferedPod {
        namespace: net.workload.namespace.to_string(),
        name: net.workload.name.to_string(),
        cookie,
        listeners: [handed(outbound)?, handed(inbound)?, handed(mesh)?],
    }))
}

/// Name of a map, and the bytes of its keys and values. The capacity may differ: that of the map that is there counts.
type Layout = (&'static str, usize, usize);

fn shared_layout() -> [Layout; 18] {
    const MAP: usize = size_of::<u32>();
    const COOKIE: usize = size_of::<u64>();
    [
        (PODS, COOKIE, size_of::<PodAddrs>()),
        (SOCKETS, size_of::<i32>(), size_of::<SocketFacts>()),
        (ORIGINAL_DST, COOKIE, MAP),
        (CLIENTS, COOKIE, MAP),
        (FLOWS, COOKIE, MAP),
        (PACKET_FLOWS, COOKIE, MAP),
        (CLOSED, 0, 0),
        (COUNTERS, size_of::<u32>(), size_of::<u64>()),
        (POLICIES, COOKIE, size_of::<PodPolicy>()),
        // A trie's key has the length of the prefix before it.
        (EXCLUDED_CIDRS, size_of::<u32>() + size_of::<CidrOf>(), size_of::<u8>()),
        (STEERING, COOKIE, MAP),
        (DIRECT, size_of::<DirectKey>(), size_of::<DirectService>()),
        (DIRECT_SLOTS, size_of::<SlotKey>(), size_of::<Slot>()),
        (ENDPOINTS, size_of::<u32>(), size_of::<Endpoint>()),
        (ADMITTED, COOKIE, MAP),
        (HELD, size_of::<HeldKey>(), size_of::<i64>()),
        (PROBE_PORTS, size_of::<Addr>(), size_of::<ProbePort>()),
        (PROBES, COOKIE, MAP),
    ]
}

fn pod_layout() -> [Layout; 9] {
    [
        (POD_ORIGINAL_DST, size_of::<Tuple>(), size_of::<Entry>()),
        (POD_CLIENTS, size_of::<Tuple>(), size_of::<Entry>()),
        (POD_FLOWS, size_of::<u64>(), size_of::<FlowRecord>()),
        (POD_PACKET_FLOWS, size_of::<PacketKey>(), size_of::<FlowRecord>()),
        (LISTENERS, size_of::<u32>(), size_of::<u32>()),
        (INNER_LINKS, size_of::<u32>(), size_of::<u32>()),
        (POD_GUESTS, size_of::<Tuple>(), size_of::<u64>()),
        (POD_ADMITTED, size_of::<Tuple>(), size_of::<Admitted>()),
        (POD_PROBES, size_of::<Tuple>(), size_of::<Probe>()),
    ]
}

/// A map that is not there yet is made; one that is there has to be as this agent would make it.
fn check_layout(dir: &Path, expected: &[Layout]) -> Result<()> {
    for (name, key, value) in expected {
        let path = dir.join(name);
        if !path.exists() {
            continue;
        }
        let found = MapInfo::from_pin(&path).with_context(|| format!("map {}", path.display()))?;
        let (found_key, found_value) = (found.key_size() as usize, found.value_size() as usize);
        ensure!(
            (found_key, found_value) == (*key, *value),
            "map {} is laid out in another way ({found_key} and {found_value} bytes instead of {key} and {value}): \
             this agent's version cannot take over from the one that runs; stop that one first",
            path.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use mesh_common::maps::{OF_A_POD, SHARED};

    use super::*;

    #[test]
    fn every_map_has_its_layout_checked() {
        assert_eq!(shared_layout().map(|(name, ..)| name), SHARED);
        assert_eq!(pod_layout().map(|(name, ..)| name), OF_A_POD);
    }
}
