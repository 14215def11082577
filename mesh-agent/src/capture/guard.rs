//! The guard of a pod whose egress is restricted: at the node's end of its veth, what leaves around the agent is dropped.
//!
//! Promises that a pod is restricted on every way out or not at all: one that the guard cannot stand at is an error, which
//! names it. A way out that comes later is guarded within two seconds, or named likewise. Other pods cost nothing. Tested below and in the lab (`tests/tests/leaks.rs`).

use std::{collections::BTreeSet, fs::File, net::IpAddr, os::fd::AsFd as _};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use aya::programs::SchedClassifier;
use netlink_packet_route::link::InfoKind;

use super::{
    Net, PodNet,
    enrol::Capture,
    links::{self, Hook},
    loader,
    netns::Netns,
    rtnetlink::{Link, RouteSocket},
};
use crate::state::snapshot::Workload;

/// What the pins of its links begin with.
pub(super) const PINS: &str = "guard-";
/// The name of loopback in every namespace.
const LOOPBACK: &str = "lo";

impl Capture {
    /// Puts the guard in place, or takes it away. `pods`: the pod's addresses.
    pub(super) fn guard(&self, cookie: u64, netns: &Netns, pods: &[IpAddr], restricted: bool) -> Result<()> {
        let ends = if restricted { self.place(cookie, netns, pods)? } else { BTreeSet::new() };
        links::detach_others(&self.dir.pod(cookie), |pinned| {
            pinned
                .strip_prefix(PINS)
                .is_none_or(|index| index.parse().is_ok_and(|index| ends.contains(&index)))
        })
    }

    /// The pod's interfaces have changed: where its egress is restricted, the guard is put in place on what leads out now.
    /// The last that was asked for holds, so a pod that asks for nothing is left alone.
    ///
    /// # Errors
    /// A sentence that names an interface by which the pod may lead out unguarded; it is guarded on all others. (What is made
    /// inside leads out through the others: it takes the node's root, or another pod's help, to make one that does not.)
    pub fn guard_again(&self, pod: &PodNet, workload: &Workload) -> Result<()> {
        let Net::Kernel(net) = &pod.net else { return Ok(()) };
        let cookie = net.netns().cookie();
        self.shared.if_enrolled(cookie, pod, || {
            let (ends, elsewhere) = node_ends(net.netns(), &workload.ips)?;
            let links = self.dir.pod(cookie);
            if elsewhere.is_none() && ends.iter().all(|end| links.join(format!("{PINS}{end}")).exists()) {
                return Ok(());
            }
            self.guard(cookie, net.netns(), &workload.ips, true)
        })
    }

    /// Where it stands: the indexes of the node's ends.
    fn place(&self, cookie: u64, netns: &Netns, pods: &[IpAddr]) -> Result<BTreeSet<u32>> {
        let (ends, elsewhere) = node_ends(netns, pods).context("its egress cannot be restricted")?;
        let mut object = loader::load_guard(&self.dir, &self.with, cookie, number(netns)?)?;
        let program: &mut SchedClassifier = loader::program(&mut object, "guard")?;
        for index in &ends {
            let pinned = self.dir.pod(cookie).join(format!("{PINS}{index}"));
            links::attach_tcx(None, program.fd()?.as_fd(), *index, Hook::Ingress, &pinned)
                .with_context(|| format!("the node's interface {index}"))?;
        }
        if let Some(name) = elsewhere {
            bail!(
                "its egress cannot be restricted: its interface {name} is no veth that leads to the agent's network \
                 namespace"
            );
        }
        Ok(ends)
    }
}

/// The number of the pod's namespace in the agent's, by which its sockets are looked up from there.
fn number(netns: &Netns) -> Result<u64> {
    let routes = RouteSocket::here()?;
    let asked = || routes.number_of(netns.as_fd()).context("the number of its network namespace");
    let number = if let Some(number) = asked()? {
        number
    } else {
        // It gets one with the first look at an interface that leads there.
        routes.links().context("interfaces of the node")?;
        asked()?.ok_or_else(|| anyhow!("its network namespace has no number in the node's"))?
    };
    Ok(u64::from(number.cast_unsigned()))
}

/// The node's ends of all interfaces by which the pod leads out, and the name of one that leads elsewhere.
fn node_ends(netns: &Netns, pods: &[IpAddr]) -> Result<(BTreeSet<u32>, Option<String>)> {
    let routes = RouteSocket::open(netns)?;
    let links = routes.links().context("interfaces of its namespace")?;
    let addresses = routes.addresses().context("addresses of its namespace")?;
    let agents = File::open("/proc/self/ns/net").context("the agent's own network namespace")?;
    let agents = routes.number_of(agents.as_fd()).context("the agent's own network namespace")?;
    let (mut ends, mut elsewhere) = (BTreeSet::new(), None);
    for link in &links {
        let has_pods = addresses.iter().any(|(index, ip)| *index == link.index && pods.contains(ip));
        match way_out(link, has_pods, agents) {
            WayOut::No => {}
            WayOut::By(index) => drop(ends.insert(index)),
            WayOut::Elsewhere => elsewhere = Some(link.name.clone()),
        }
    }
    let leads_out = !ends.is_empty() || elsewhere.is_some();
    ensure!(leads_out, "no interface of its leads to the agent's network namespace");
    Ok((ends, elsewhere))
}

#[derive(Debug, PartialEq, Eq)]
enum WayOut {
    /// It does not lead out, or by way of another one.
    No,
    /// By the node's interface with this index.
    By(u32),
    /// Where the agent cannot see.
    Elsewhere,
}

fn way_out(link: &Link, has_pods: bool, agents: Option<i32>) -> WayOut {
    match link.kind {
        _ if link.name == LOOPBACK => WayOut::No,
        Some(InfoKind::Veth) if agents.is_some() && link.peer_netns == agents => WayOut::By(link.peer),
        // A device of the machine's own.
        None => WayOut::Elsewhere,
        Some(InfoKind::MacVlan | InfoKind::MacVtap | InfoKind::IpVlan | InfoKind::IpVtap)
            if link.peer_netns.is_some() =>
        {
            WayOut::Elsewhere
        }
        _ if has_pods => WayOut::Elsewhere,
        _ => WayOut::No,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_out_is_known() {
        let link = |name: &str, kind, peer_netns| Link {
            index: 2,
            name: name.to_owned(),
            kind,
            has_controller: false,
            peer: 7,
            peer_netns,
        };
        let agents = Some(3);
        let table = [
            (link("lo", None, None), true, WayOut::No),
            (link("eth0", Some(InfoKind::Veth), agents), true, WayOut::By(7)),
            (link("net1", Some(InfoKind::Veth), agents), false, WayOut::By(7)),
            (link("guest", Some(InfoKind::Veth), Some(4)), false, WayOut::No),
            (link("eth0", Some(InfoKind::Veth), Some(4)), true, WayOut::Elsewhere),
            (link("net1", Some(InfoKind::MacVlan), agents), false, WayOut::Elsewhere),
            (link("mac0", Some(InfoKind::MacVlan), None), false, WayOut::No),
            (link("vf0", None, None), false, WayOut::Elsewhere),
            (link("br0", Some(InfoKind::Bridge), None), false, WayOut::No),
            (link("wg0", Some(InfoKind::Wireguard), None), false, WayOut::No),
        ];
        for (link, has_pods, expected) in table {
            assert_eq!(way_out(&link, has_pods, agents), expected, "{link:?}");
        }
        assert_eq!(way_out(&link("eth0", Some(InfoKind::Veth), None), true, None), WayOut::Elsewhere);
    }
}
