//! Enrolling pods and letting them go again.
//!
//! Enrolling makes everything ready before the first connection is sent its way; un-enrolling stops sending first. A pod
//! that cannot be enrolled is refused alone, and nothing of the attempt stays. Pods that another agent hands over are
//! adopted in `adopt.rs`. Tested in the lab.

use std::{
    collections::{HashMap, hash_map},
    io,
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use aya::maps::{HashMap as BpfHashMap, HashOfMaps, InnerMap, Map, MapData, SockMap};
use mesh_common::{
    addr::Addr,
    flow::FlowRecord,
    maps::{
        ADMITTED, Admitted, CLIENTS, Entry, FLOWS, LISTENERS, ORIGINAL_DST, PACKET_FLOWS, POD_ADMITTED,
        POD_CLIENTS, POD_FLOWS, POD_ORIGINAL_DST, POD_PACKET_FLOWS, POD_PROBES, PODS, PROBES, PacketKey,
        PodAddrs, Probe, STEERING, Tuple, kind,
    },
};
use socket2::Socket;
use tokio::task::AbortHandle;

use super::{
    Listener, Net, PodNet,
    at_once::each_at_once,
    attach, cgroup,
    direct::Direct,
    flows::Reading,
    guests::{self, Guests},
    kernel::{Facts, KernelNet},
    links::{BpfDir, detach_all, make, unpin_all},
    loader::{self, CaptureConfig, EbpfLog, Loading, Object},
    netns::Netns,
    policy::Policies,
    probes::Probes,
};
use crate::state::snapshot::{WhenAgentIsDown, Workload};

/// `BPF_NOEXIST`: an element that is there stays as it is.
const NO_EXIST: u64 = 1;

/// The kernel side of one agent. Dropped without [`Capture::remove`] it leaves its programs in place, so that enrolled
/// pods fail closed until the next agent comes.
#[derive(Debug)]
pub struct Capture {
    pub(super) dir: BpfDir,
    pub(super) shared: Arc<Shared>,
    pub(super) with: Loading,
    /// The root of the hierarchy, and where the pods are below it: a cgroup of their own, which the agent need not be in.
    pub(super) cgroups: Cgroups,
    pub(super) policies: Policies,
    pub(super) direct: Direct,
    pub(super) probes: Probes,
    /// Keeps the programs of the node; its maps are used through handles of their own.
    pub(super) node: Mutex<Object>,
    /// What reads the kernel's buffers, each of which has one reader.
    pub(super) reading: Mutex<Option<Reading>>,
    pub(super) forwarding: Mutex<Option<AbortHandle>>,
}

/// Where the programs of the node are attached.
#[derive(Debug)]
pub(super) struct Cgroups {
    pub(super) root: PathBuf,
    pub(super) pods: PathBuf,
}

/// What the reading of flows needs too.
#[derive(Debug)]
pub(super) struct Shared {
    pods: Mutex<HashMap<u64, Enrolled>>,
}

#[derive(Debug)]
pub(super) struct Enrolled {
    pub(super) net: Arc<PodNet>,
    pub(super) flows: Arc<Flows>,
    pub(super) guests: Arc<Guests>,
}

/// The tables of one pod's flows.
#[derive(Debug)]
pub(super) struct Flows {
    pub(super) sockets: Mutex<BpfHashMap<MapData, u64, FlowRecord>>,
    pub(super) packets: Mutex<BpfHashMap<MapData, PacketKey, FlowRecord>>,
    /// Direct connections to the pod.
    pub(super) admitted: Mutex<BpfHashMap<MapData, Tuple, Admitted>>,
}

impl Shared {
    pub(super) fn pods(&self) -> MutexGuard<'_, HashMap<u64, Enrolled>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does `work` if this is the pod enrolled under the cookie, and while it stays so.
    pub(super) fn if_enrolled(
        &self,
        cookie: u64,
        pod: &PodNet,
        work: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let pods = self.pods();
        match pods.get(&cookie) {
            Some(enrolled) if std::ptr::eq(&raw const *enrolled.net, pod) => work(),
            _ => Ok(()),
        }
    }

    /// The tables of the pod with this cookie.
    pub(super) fn flows_of(&self, cookie: u64) -> Option<Arc<Flows>> {
        self.pods().get(&cookie).map(|pod| Arc::clone(&pod.flows))
    }

    /// The tables of all pods.
    pub(super) fn all_flows(&self) -> Vec<Arc<Flows>> {
        self.pods().values().map(|pod| Arc::clone(&pod.flows)).collect()
    }
}

impl Capture {
    /// Loads the kernel programs and attaches them. Takes the place of what an agent that is gone left behind. To be
    /// called inside a tokio runtime.
    ///
    /// # Errors
    /// A sentence that says what the host lacks: a cgroup2 hierarchy, bpffs, a capability, the kernel's support; or
    /// that another agent uses the same directory.
    pub fn load(config: &CaptureConfig) -> Result<Self> {
        let root = cgroup::root(config.cgroup_root.as_deref())?;
        let pods = cgroup::pods(config.pods_cgroup.as_deref(), &root)?;
        let probes = Probes::new(config.kubelet_cgroup.as_deref(), &root, &pods)?;
        let dir = BpfDir::create(&config.bpf_dir)?;
        let with = Loading::of(config);
        let loaded = loader::load(&dir, &with)
            .and_then(|mut node| loader::attach(&mut node, &dir, &root, &pods).map(|()| node));
        match loaded {
            Ok(node) => {
                let capture =
                    Self::of(dir, Cgroups { root, pods }, (with, config.when_agent_is_down), node, probes);
                capture.follow_kubelet();
                capture.forward_log()?;
                Ok(capture)
            }
            Err(error) => {
                dir.abandon()?;
                Err(error)
            }
        }
    }

    pub(super) fn of(
        dir: BpfDir,
        cgroups: Cgroups,
        (with, when_agent_is_down): (Loading, WhenAgentIsDown),
        node: Object,
        probes: Probes,
    ) -> Self {
        let shared = Arc::new(Shared { pods: Mutex::default() });
        let policies = Policies::new(when_agent_is_down);
        let (node, reading, forwarding) = (Mutex::new(node), Mutex::default(), Mutex::default());
        let direct = Direct::default();
        Self { dir, shared, with, cgroups, policies, direct, probes, node, reading, forwarding }
    }

    pub(super) fn forward_log(&self) -> Result<()> {
        if self.with.log != EbpfLog::Off {
            let mut node = self.node.lock().unwrap_or_else(PoisonError::into_inner);
            let forwarding = loader::forward_log(&mut node)?;
            *self.forwarding.lock().unwrap_or_else(PoisonError::into_inner) = Some(forwarding);
        }
        Ok(())
    }

    /// Enrols a pod: from here on its connections come to its [`PodNet`]. To be called inside a tokio runtime.
    ///
    /// # Errors
    /// A sentence that names the pod: its namespace is gone, one of the three ports is taken, it is enrolled already.
    /// Nothing else is affected and nothing is left.
    pub fn enrol(&self, workload: Arc<Workload>) -> Result<Arc<PodNet>> {
        let name = format!("{}/{}", workload.namespace, workload.name);
        self.try_enrol(workload).with_context(|| format!("pod {name} is not enrolled"))
    }

    fn try_enrol(&self, workload: Arc<Workload>) -> Result<Arc<PodNet>> {
        let path = workload.netns.as_deref();
        let path = path.ok_or_else(|| anyhow!("it has no annotation mesh.io/netns"))?;
        let netns = Netns::open(path)?;
        let cookie = netns.cookie();
        let mut addrs = pod_addrs(&workload.ips)?;
        let mut pods = self.shared.pods();
        if let Some(other) = pods.get(&cookie) {
            bail!(
                "its network namespace {} is that of {}, which is enrolled",
                path.display(),
                other.net.name()
            );
        }
        // Before the first connection is steered.
        let flags = self.write_policy(cookie, &workload.capture);
        let made = flags.and_then(|flags| {
            addrs.flags = flags;
            let pod = self.prepare(workload, netns)?;
            self.pods_map()?.insert(cookie, addrs, 0).context("map PODS")?;
            self.write_probes(cookie, &pod.net.workload)?;
            Ok(pod)
        });
        match made {
            Ok(pod) => {
                let net = Arc::clone(&pod.net);
                pod.guests.follow(&net);
                pods.insert(cookie, pod);
                self.take_from_crashed(cookie);
                Ok(net)
            }
            Err(error) => {
                // Whatever the attempt came to: what is not there is no error.
                let _ = self.take_away(cookie);
                Err(error)
            }
        }
    }

    /// Everything but the entry that has the pod's connections captured.
    fn prepare(&self, workload: Arc<Workload>, netns: Netns) -> Result<Enrolled> {
        let cookie = netns.cookie();
        let facts = Facts::open(&self.dir.maps())?;
        let sockets = listeners(&netns, &facts)?;
        make(&self.dir.maps_of(cookie))?;
        let mut object = loader::load_pod(&self.dir, &self.with, cookie)?;

        let mut steering: SockMap<MapData> = loader::take(&mut object, LISTENERS)?;
        for (socket, index) in sockets.iter().zip(0..) {
            steering.set(index, socket, 0).context("map LISTENERS")?;
        }
        self.list(STEERING, cookie, &steering)?;
        let flows = self.list_maps(&mut object, cookie)?;

        let links = self.dir.pod(cookie);
        make(&links)?;
        attach::attach(&mut object, &netns, &links)?;
        let guests = Guests::of(&mut object, &self.dir, cookie)?;
        self.guard(cookie, &netns, &workload.ips, workload.capture.restrict_egress)?;

        let net = Net::Kernel(KernelNet::new(netns, facts));
        Ok(Enrolled { net: PodNet::new(workload, sockets.map(Into::into), net), flows, guests })
    }

    /// Lists the pod's own maps under its cookie, where the programs of the node look for them, unless they are listed.
    pub(super) fn list_maps(&self, object: &mut Object, cookie: u64) -> Result<Arc<Flows>> {
        let mut original_dst: BpfHashMap<MapData, Tuple, Entry> = loader::take(object, POD_ORIGINAL_DST)?;
        let mut clients: BpfHashMap<MapData, Tuple, Entry> = loader::take(object, POD_CLIENTS)?;
        // Where the kernel notes that the table was full.
        exists_is_fine(original_dst.insert(Tuple::default(), Entry::default(), NO_EXIST))
            .context("map ORIGINAL_DST")?;
        exists_is_fine(clients.insert(Tuple::default(), Entry::default(), NO_EXIST))
            .context("map CLIENTS")?;
        let sockets: BpfHashMap<MapData, u64, FlowRecord> = loader::take(object, POD_FLOWS)?;
        let packets: BpfHashMap<MapData, PacketKey, FlowRecord> = loader::take(object, POD_PACKET_FLOWS)?;
        let admitted: BpfHashMap<MapData, Tuple, Admitted> = loader::take(object, POD_ADMITTED)?;
        let probes: BpfHashMap<MapData, Tuple, Probe> = loader::take(object, POD_PROBES)?;
        let lists: [&(dyn Fn() -> Result<()> + Sync); 6] = [
            &|| self.list(ORIGINAL_DST, cookie, &original_dst),
            &|| self.list(CLIENTS, cookie, &clients),
            &|| self.list(FLOWS, cookie, &sockets),
            &|| self.list(PACKET_FLOWS, cookie, &packets),
            &|| self.list(ADMITTED, cookie, &admitted),
            &|| self.list(PROBES, cookie, &probes),
        ];
        each_at_once(&lists, |list| list())?;
        let (sockets, packets, admitted) = (Mutex::new(sockets), Mutex::new(packets), Mutex::new(admitted));
        Ok(Arc::new(Flows { sockets, packets, admitted }))
    }

    fn list<M: InnerMap>(&self, outer: &str, cookie: u64, inner: &M) -> Result<()>
    where
        HashOfMaps<MapData, u64, M>: TryFrom<Map, Error = aya::maps::MapError>,
    {
        let mut outer_map: HashOfMaps<MapData, u64, M> = loader::open(&self.dir, outer)?;
        exists_is_fine(outer_map.insert(cookie, inner, NO_EXIST)).with_context(|| format!("map {outer}"))
    }

    pub(super) fn pods_map(&self) -> Result<BpfHashMap<MapData, u64, PodAddrs>> {
        loader::open(&self.dir, PODS)
    }

    /// Lets a pod go: nothing of the agent stays in it. Connections that are open stay with whoever holds them.
    ///
    /// # Errors
    /// What could not be taken away; the rest is gone all the same.
    pub fn un_enrol(&self, pod: &PodNet) -> Result<()> {
        let_go_of(&mut self.shared.pods(), pod).map_or(Ok(()), |net| self.leave(pod, net))
    }

    /// As [`Capture::un_enrol`] for each of them, in the time of a few.
    ///
    /// # Errors
    /// One of those that there were; the rest is gone all the same.
    pub fn un_enrol_all(&self, pods: &[Arc<PodNet>]) -> Result<()> {
        let mut enrolled = self.shared.pods();
        let leaving: Vec<_> =
            pods.iter().filter_map(|pod| Some((pod, let_go_of(&mut enrolled, pod)?))).collect();
        each_at_once(&leaving, |(pod, net)| self.leave(pod, net))
    }

    fn leave(&self, pod: &PodNet, net: &KernelNet) -> Result<()> {
        // What another agent has taken over stays.
        let taken = if self.dir.is_ours() { self.take_away(net.netns().cookie()) } else { Ok(()) };
        pod.close();
        taken.with_context(|| format!("pod {} at {}", pod.name(), net.netns().path().display()))
    }

    /// Takes away what a pod has in maps and links, whatever there is of it; the first error counts.
    pub(super) fn take_away(&self, cookie: u64) -> Result<()> {
        let captured = self.pods_map().and_then(|mut map| missing_is_fine(map.remove(&cookie)));
        let links = detach_all(&self.dir.pod(cookie));
        let routes = guests::leave(&self.dir.guests().join(cookie.to_string()));
        let policy =
            self.forget_policy(cookie).and(self.forget_direct(cookie)).and(self.forget_probes(cookie));
        let tables = [PROBES, ADMITTED, ORIGINAL_DST, CLIENTS, FLOWS, PACKET_FLOWS, STEERING];
        let tables = each_at_once(&tables, |name| {
            let mut map: HashOfMaps<MapData, u64, MapData> = loader::open(&self.dir, name)?;
            missing_is_fine(map.remove(&cookie)).with_context(|| format!("map {name}"))
        });
        // Not before the table has left the list: until then connections to the pod are counted.
        let held = self.forget_held(cookie);
        let pins = unpin_all(&self.dir.maps_of(cookie));
        captured.and(links).and(routes).and(policy).and(tables).and(held).and(pins)
    }

    /// Pods enrolled now.
    pub fn enrolled(&self) -> Vec<Arc<PodNet>> {
        self.shared.pods().values().map(|pod| Arc::clone(&pod.net)).collect()
    }

    /// Lets every pod go and takes away every program, map, pin and directory. To be called when the agent is being
    /// removed; otherwise it is dropped, and pods fail closed until the next one. What is another agent's stays.
    ///
    /// # Errors
    /// What could not be taken away.
    pub fn remove(self) -> Result<()> {
        if !self.dir.is_ours() {
            return Ok(());
        }
        let pods = self.un_enrol_all(&self.enrolled());
        self.dir.remove()?;
        pods
    }
}

/// `None` where the pod is not, or no longer, the one that is enrolled.
fn let_go_of<'a>(pods: &mut HashMap<u64, Enrolled>, pod: &'a PodNet) -> Option<&'a KernelNet> {
    let Net::Kernel(net) = &pod.net else { return None };
    match pods.entry(net.netns().cookie()) {
        hash_map::Entry::Occupied(entry) if std::ptr::eq(&raw const *entry.get().net, pod) => {
            entry.remove().guests.close();
            Some(net)
        }
        _ => None,
    }
}

/// Binds the three listeners inside the pod. Each is marked as the agent's before it can accept.
fn listeners(netns: &Netns, facts: &Facts) -> Result<[Socket; 3]> {
    let open = |listener: Listener| -> Result<Socket> {
        let port = listener.port();
        let marked = match listener {
            Listener::Outbound => kind::OUTBOUND_LISTENER,
            Listener::Inbound | Listener::Mesh => kind::LISTENER,
        };
        let socket = netns.enter(|| super::sockets::bind(port)).and_then(|socket| {
            facts.write(&socket, marked, Addr::default())?;
            super::sockets::listen(&socket)?;
            Ok(socket)
        });
        socket.map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => anyhow!(
                "port {port} is taken in its network namespace (by a sidecar, or an agent that still runs): the mesh \
                 needs 15001, 15006 and 15008"
            ),
            _ => anyhow!(error).context(format!("cannot listen on port {port} in its network namespace")),
        })
    };
    Ok([open(Listener::Outbound)?, open(Listener::Inbound)?, open(Listener::Mesh)?])
}

fn exists_is_fine(inserted: Result<(), aya::maps::MapError>) -> Result<()> {
    match inserted {
        Err(aya::maps::MapError::SyscallError(error))
            if error.io_error.kind() == io::ErrorKind::AlreadyExists =>
        {
            Ok(())
        }
        other => Ok(other?),
    }
}

pub(super) fn missing_is_fine(removed: Result<(), aya::maps::MapError>) -> Result<()> {
    use aya::maps::MapError::{KeyNotFound, SyscallError};
    match removed {
        Err(KeyNotFound) => Ok(()),
        Err(SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => Ok(other?),
    }
}

/// The first address of each family.
pub(super) fn pod_addrs(ips: &[IpAddr]) -> Result<PodAddrs> {
    ensure!(!ips.is_empty(), "it has no address (status.podIPs)");
    let mut addrs = PodAddrs::default();
    for ip in ips.iter().rev() {
        match ip {
            IpAddr::V4(ip) => (addrs.v4, addrs.has_v4) = (ip.octets(), 1),
            IpAddr::V6(ip) => (addrs.v6, addrs.has_v6) = (ip.octets(), 1),
        }
    }
    Ok(addrs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_address_of_each_family_counts() -> Result<()> {
        let ips = ["10.0.0.1", "fd00::1", "10.0.0.2"].map(str::parse::<IpAddr>);
        let addrs = pod_addrs(&ips.into_iter().collect::<Result<Vec<_>, _>>()?)?;
        assert_eq!((addrs.v4, addrs.has_v4, addrs.v6[15], addrs.has_v6), ([10, 0, 0, 1], 1, 1, 1));
        let only_v4 = pod_addrs(&["10.0.0.1".parse()?])?;
        assert_eq!(only_v4.has_v6, 0);
        assert!(pod_addrs(&[]).is_err());
        Ok(())
    }
}
