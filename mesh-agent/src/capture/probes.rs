//! The kubelet's probes, from user space: the programs at its cgroup, and the ports that pods declare.
//!
//! Promises that no cgroup which holds pods is ever taken for the kubelet's, that a cgroup which is made anew (a service
//! manager does so when the kubelet starts again) is followed within a second, and that a change of what a pod declares
//! holds for the next connection. Without a kubelet's cgroup no connection has a privilege. Tested below, and with the
//! kernel in the lab (`tests/tests/probes.rs`).

use std::{
    collections::{HashMap, hash_map},
    fs::{self, File},
    net::SocketAddr,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::{Component, Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap as BpfHashMap, MapData};
use mesh_common::{
    addr::Addr,
    maps::{PROBE_PORTS, ProbePort, probe},
};

use super::{
    enrol::{Capture, missing_is_fine},
    links::{detach_others, pin, replace},
    loader::{self, attach_to_cgroup},
};
use crate::state::snapshot::Workload;

/// Where service managers put the kubelet: systemd by itself, as kind and kubeadm's drop-ins, EKS and Bottlerocket, and
/// node images with a slice for the runtime. Never a directory that a kubelet also makes its pods' below.
const KUBELETS: [&str; 5] = [
    "system.slice/kubelet.service",
    "kubelet.slice/kubelet.service",
    "runtime.slice/kubelet.service",
    "podruntime.slice/kubelet.service",
    "podruntime/kubelet",
];

/// The programs at the kubelet's cgroup, and how their pins begin.
const PROGRAMS: [(&str, &str); 3] =
    [("kube4", "kubelet-connect4"), ("kube6", "kubelet-connect6"), ("kubeout", "kubelet-egress")];

/// Whether this is the pin of a link at the kubelet's cgroup.
pub(super) fn is_pin(name: &str) -> bool {
    PROGRAMS.iter().any(|(_, pin)| name.starts_with(pin))
}

/// The part of the kernel side that is about probes.
#[derive(Debug)]
pub(super) struct Probes {
    /// Where the kubelet's cgroup may be: the one that was named, else where it usually is.
    places: Vec<PathBuf>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    kubelet: Kubelet,
    /// By the pod's cookie.
    written: HashMap<u64, HashMap<Addr, u32>>,
}

/// How the looking for its cgroup has come out; logged when that changes.
#[derive(Debug, Default, PartialEq, Eq)]
enum Kubelet {
    #[default]
    Unknown,
    Missing,
    /// By the number of its cgroup.
    At(u64),
    Failed(String),
}

impl Probes {
    /// Nothing attached and nothing written.
    ///
    /// # Errors
    /// The named cgroup holds the pods, or is not below the root.
    pub(super) fn new(named: Option<&Path>, root: &Path, pods: &Path) -> Result<Self> {
        let places = match named {
            Some(named) => {
                let plain = |part: Component<'_>| matches!(part, Component::Normal(_));
                let below = named.strip_prefix("/").unwrap_or(named);
                ensure!(
                    below.components().next().is_some() && below.components().all(plain),
                    "{} does not lead from the cgroup root to a cgroup below it: check --kubelet-cgroup",
                    named.display()
                );
                let place = root.join(below);
                ensure!(
                    !pods.starts_with(&place),
                    "{} holds the pods too, which would all pass for the kubelet: check --kubelet-cgroup",
                    place.display()
                );
                vec![place]
            }
            None => KUBELETS.iter().map(|place| root.join(place)).collect(),
        };
        Ok(Self { places, state: Mutex::default() })
    }

    /// The cgroup that is there now, and its number.
    fn find(&self) -> Option<(&Path, u64)> {
        let number =
            |place: &Path| fs::metadata(place).ok().filter(fs::Metadata::is_dir).map(|meta| meta.ino());
        self.places.iter().find_map(|place| Some((place.as_path(), number(place)?)))
    }
}

impl Capture {
    /// Has the kubelet's cgroup that is there now run the programs, and no other. To be called again and again: without
    /// a change it costs a look at the file system.
    pub fn follow_kubelet(&self) {
        if !self.dir.is_ours() {
            return;
        }
        let mut state = self.probes.state.lock().unwrap_or_else(PoisonError::into_inner);
        let found = self.probes.find();
        if found.is_some_and(|(_, number)| state.kubelet == Kubelet::At(number)) {
            return;
        }
        let now = match found.map(|(place, number)| (place, self.attach_to_kubelet(place, number))) {
            None if state.kubelet == Kubelet::Missing => return,
            None => match self.keep_links_at(None) {
                Ok(()) => Kubelet::Missing,
                Err(error) => Kubelet::Failed(format!("{error:#}")),
            },
            Some((_, Ok(number))) => Kubelet::At(number),
            Some((place, Err(error))) => Kubelet::Failed(format!("{}: {error:#}", place.display())),
        };
        if now != state.kubelet {
            match (&now, found) {
                (Kubelet::At(_), Some((place, _))) => {
                    tracing::info!(cgroup = %place.display(), "the kubelet's probes reach the pods that declare them");
                }
                (Kubelet::Failed(error), _) => {
                    tracing::warn!(error, "probes have no privilege: the kubelet's cgroup cannot be used");
                }
                _ => tracing::info!(
                    "no cgroup of a kubelet is there (see --kubelet-cgroup): its probes are plaintext as any other"
                ),
            }
        }
        state.kubelet = now;
    }

    /// Links carry the number of the cgroup in their names, so that those of one that is gone are told apart.
    fn attach_to_kubelet(&self, place: &Path, number: u64) -> Result<u64> {
        let cgroup = File::open(place)?;
        let mut node = self.node.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, pinned) in PROGRAMS {
            let pinned = self.dir.links().join(format!("{pinned}-{number}"));
            let program = node.program_mut(name)?;
            if replace(&pinned, program.fd()?.as_fd())? {
                continue;
            }
            let link = attach_to_cgroup(program, &cgroup)
                .with_context(|| format!("the kernel does not attach the {name} program"))?;
            pin(link, &pinned)?;
        }
        drop(node);
        self.keep_links_at(Some(number))?;
        Ok(number)
    }

    fn keep_links_at(&self, number: Option<u64>) -> Result<()> {
        let end = number.map(|number| format!("-{number}"));
        let stays = |name: &str| !is_pin(name) || end.as_ref().is_some_and(|end| name.ends_with(end));
        detach_others(&self.dir.links(), stays)
    }

    /// Writes what the pod declares, in place of what it did before.
    ///
    /// # Errors
    /// The map is full or gone; what was declared before may be in force in part.
    pub(super) fn write_probes(&self, cookie: u64, workload: &Workload) -> Result<()> {
        let wanted = compile(workload);
        let mut state = self.probes.state.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = state.written.entry(cookie);
        if wanted.is_empty() && matches!(entry, hash_map::Entry::Vacant(_)) {
            return Ok(());
        }
        let written = entry.or_default();
        let mut map = self.probe_ports()?;
        // First what is declared no more.
        let stale: Vec<Addr> = written.keys().filter(|addr| !wanted.contains_key(addr)).copied().collect();
        for addr in stale {
            remove(&mut map, addr, cookie)?;
            written.remove(&addr);
        }
        for (addr, kind) in wanted {
            map.insert(addr, ProbePort { netns: cookie, kind, pad: 0 }, 0)
                .context("map PROBE_PORTS, which all pods of the node share")?;
            written.insert(addr, kind);
        }
        if written.is_empty() {
            state.written.remove(&cookie);
        }
        Ok(())
    }

    /// Takes away what a pod has declared.
    pub(super) fn forget_probes(&self, cookie: u64) -> Result<()> {
        let mut state = self.probes.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(written) = state.written.remove(&cookie) else { return Ok(()) };
        let mut map = self.probe_ports()?;
        written.into_keys().try_for_each(|addr| remove(&mut map, addr, cookie))
    }

    /// Learns what an agent that hands over has written.
    pub(super) fn learn_probes(&self) -> Result<()> {
        let map = self.probe_ports()?;
        let mut state = self.probes.state.lock().unwrap_or_else(PoisonError::into_inner);
        for entry in &map {
            let (addr, port) = entry.context("map PROBE_PORTS")?;
            state.written.entry(port.netns).or_default().insert(addr, port.kind);
        }
        Ok(())
    }

    fn probe_ports(&self) -> Result<BpfHashMap<MapData, Addr, ProbePort>> {
        loader::open(&self.dir, PROBE_PORTS)
    }
}

/// An address that two pods claim may be the other's by now.
fn remove(map: &mut BpfHashMap<MapData, Addr, ProbePort>, addr: Addr, cookie: u64) -> Result<()> {
    if map.get(&addr, 0).is_ok_and(|port| port.netns != cookie) {
        return Ok(());
    }
    missing_is_fine(map.remove(&addr)).context("map PROBE_PORTS")
}

/// What the kernel is told of a pod: each declared port, at each of its addresses.
fn compile(workload: &Workload) -> HashMap<Addr, u32> {
    let kind = |bare| if bare { probe::BARE } else { probe::REQUESTS };
    let ports = workload.capture.probes.iter().map(|port| (port.port, kind(port.requests.is_empty())));
    ports
        .flat_map(|(port, kind)| workload.ips.iter().map(move |ip| (SocketAddr::new(*ip, port).into(), kind)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_holds_the_pods_is_no_kubelets() -> Result<()> {
        let (root, pods) = (Path::new("/sys/fs/cgroup"), Path::new("/sys/fs/cgroup/kubelet/kubepods"));
        for refused in ["kubelet", "/kubelet", "kubelet/kubepods", "", "/", "../x", "kubelet/../x", "."] {
            let error = Probes::new(Some(Path::new(refused)), root, pods).map_err(|error| error.to_string());
            assert!(error.is_err_and(|text| text.contains("--kubelet-cgroup")), "{refused}");
        }
        let named = Probes::new(Some(Path::new("/kubelet/own")), root, pods)?;
        assert_eq!(named.places, [root.join("kubelet/own")]);
        Ok(())
    }

    #[test]
    fn the_usual_places_are_looked_at() -> Result<()> {
        let root = tempfile::tempdir()?;
        let probes = Probes::new(None, root.path(), root.path())?;
        assert_eq!(probes.find(), None);
        let place = root.path().join("runtime.slice/kubelet.service");
        fs::create_dir_all(&place)?;
        assert_eq!(probes.find().map(|(found, _)| found), Some(&*place));
        Ok(())
    }
}
