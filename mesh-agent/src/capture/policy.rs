//! What pods ask of their capture (exclusions, and what becomes of connections without an agent), written where the
//! kernel programs look.
//!
//! A change is in force for the next connection; no socket of the pod or the agent is touched. A pod that asks for
//! nothing has no entry anywhere. Tested below, and with the kernel in the lab (`tests/tests/capture/exclusions.rs`).

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    sync::{Mutex, PoisonError},
};

use anyhow::{Context as _, Result};
use aya::maps::{HashMap as BpfHashMap, MapData, lpm_trie::LpmTrie};
use mesh_common::{
    addr::Addr,
    flow::direction,
    maps::{CidrOf, EXCLUDED_CIDRS, POLICIES, PodPolicy, PortRange, Ports, policy},
};

use super::{
    Net, PodNet,
    enrol::{Capture, missing_is_fine},
    loader,
};
use crate::state::snapshot::{CapturePolicy, Exclusions, Subnet, WhenAgentIsDown, Workload};

/// As a range.
const EVERY_PORT: crate::state::snapshot::PortRange =
    crate::state::snapshot::PortRange { first: 0, last: u16::MAX };

/// A subnet as the kernel's trie has it.
type Cidr = (u32, CidrOf);

/// What is written, by the pod's cookie, so that it can be taken away.
#[derive(Debug)]
pub(super) struct Policies {
    when_agent_is_down: WhenAgentIsDown,
    cidrs: Mutex<HashMap<u64, HashSet<Cidr>>>,
}

impl Policies {
    /// Nothing is written yet; pods that do not say are served so when there is no agent.
    pub(super) fn new(when_agent_is_down: WhenAgentIsDown) -> Self {
        Self { when_agent_is_down, cidrs: Mutex::default() }
    }
}

impl Capture {
    /// Has the pod captured as its annotations say now. New connections alone are concerned.
    ///
    /// # Errors
    /// A map of the kernel is full or gone; what was asked for before may be in force in part.
    pub fn update(&self, pod: &PodNet, workload: &Workload) -> Result<()> {
        let Net::Kernel(net) = &pod.net else { return Ok(()) };
        let cookie = net.netns().cookie();
        self.shared.if_enrolled(cookie, pod, || {
            self.write_flags(cookie, &workload.capture)?;
            pod.set_passed_by(false);
            self.write_probes(cookie, workload)?;
            self.guard(cookie, net.netns(), &workload.ips, workload.capture.restrict_egress)
        })
    }

    /// Has new connections pass by the agent, as if every port were excluded; what is captured already stays captured, and
    /// what other agents dial (15008) is still steered to this one. [`Capture::update`] takes it back.
    ///
    /// # Errors
    /// A map of the kernel is full or gone; the pod may be captured still.
    pub fn pass_by(&self, pod: &PodNet) -> Result<()> {
        let Net::Kernel(net) = &pod.net else { return Ok(()) };
        if !self.dir.is_ours() {
            return Ok(());
        }
        let cookie = net.netns().cookie();
        self.shared.if_enrolled(cookie, pod, || {
            let everything = Exclusions { ports: vec![EVERY_PORT], cidrs: Vec::new() };
            let asked = CapturePolicy {
                exclude_outbound: everything.clone(),
                exclude_inbound: everything,
                ..CapturePolicy::default()
            };
            self.write_flags(cookie, &asked)?;
            pod.set_passed_by(true);
            Ok(())
        })
    }

    fn write_flags(&self, cookie: u64, asked: &CapturePolicy) -> Result<()> {
        let flags = self.write_policy(cookie, asked)?;
        let mut pods = self.pods_map()?;
        let mut addrs = pods.get(&cookie, 0).context("map PODS")?;
        addrs.flags = flags;
        pods.insert(cookie, addrs, 0).context("map PODS")
    }

    /// Writes what a pod asks for, in place of what it did before. Returns the flags for its entry in `PODS`.
    pub(super) fn write_policy(&self, cookie: u64, asked: &CapturePolicy) -> Result<u8> {
        let (entry, wanted) = compile(cookie, asked, self.policies.when_agent_is_down);
        let mut all = self.policies.cidrs.lock().unwrap_or_else(PoisonError::into_inner);
        let written = all.entry(cookie).or_default();
        let mut trie: LpmTrie<MapData, CidrOf, u8> = loader::open(&self.dir, EXCLUDED_CIDRS)?;
        for &(bits, of) in &wanted {
            if !written.contains(&(bits, of)) {
                trie.insert(&aya::maps::lpm_trie::Key::new(bits, of), 1, 0)
                    .context("map EXCLUDED_CIDRS, which all pods of the node share")?;
                written.insert((bits, of));
            }
        }
        let mut policies: BpfHashMap<MapData, u64, PodPolicy> = loader::open(&self.dir, POLICIES)?;
        if entry.flags == 0 {
            missing_is_fine(policies.remove(&cookie)).context("map POLICIES")?;
        } else {
            policies.insert(cookie, entry, 0).context("map POLICIES")?;
        }
        let stale: Vec<Cidr> = written.difference(&wanted).copied().collect();
        for (bits, of) in stale {
            missing_is_fine(trie.remove(&aya::maps::lpm_trie::Key::new(bits, of)))
                .context("map EXCLUDED_CIDRS")?;
            written.remove(&(bits, of));
        }
        if written.is_empty() {
            all.remove(&cookie);
        }
        Ok(entry.flags)
    }

    /// Takes away what a pod has asked for.
    pub(super) fn forget_policy(&self, cookie: u64) -> Result<()> {
        let mut policies: BpfHashMap<MapData, u64, PodPolicy> = loader::open(&self.dir, POLICIES)?;
        let entry = missing_is_fine(policies.remove(&cookie)).context("map POLICIES");
        let mut all = self.policies.cidrs.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(written) = all.remove(&cookie) else { return entry };
        let mut trie: LpmTrie<MapData, CidrOf, u8> = loader::open(&self.dir, EXCLUDED_CIDRS)?;
        let removed = written.into_iter().map(|(bits, of)| {
            missing_is_fine(trie.remove(&aya::maps::lpm_trie::Key::new(bits, of)))
                .context("map EXCLUDED_CIDRS")
        });
        entry.and(removed.collect())
    }
}

/// What the kernel is told of a pod that asks for this.
fn compile(cookie: u64, asked: &CapturePolicy, default: WhenAgentIsDown) -> (PodPolicy, HashSet<Cidr>) {
    let (out, into) = (&asked.exclude_outbound, &asked.exclude_inbound);
    let open = asked.when_agent_is_down.unwrap_or(default) == WhenAgentIsDown::Open;
    let flags = [
        (!out.ports.is_empty(), policy::OUTBOUND_PORTS),
        (!out.cidrs.is_empty(), policy::OUTBOUND_CIDRS),
        (!into.ports.is_empty(), policy::INBOUND_PORTS),
        (!into.cidrs.is_empty(), policy::INBOUND_CIDRS),
        (open, policy::OPEN),
    ];
    let entry = PodPolicy {
        flags: flags.into_iter().filter(|(is, _)| *is).map(|(_, flag)| flag).sum(),
        pad: [0; 3],
        outbound: ports(&out.ports),
        inbound: ports(&into.ports),
    };
    let both = [(direction::OUTBOUND, &out.cidrs), (direction::INBOUND, &into.cidrs)];
    let cidrs = both
        .into_iter()
        .flat_map(|(direction, list)| list.iter().map(move |subnet| cidr(cookie, direction, subnet)));
    (entry, cidrs.collect())
}

/// As many as the table holds: more are refused where the annotation is read.
fn ports(ranges: &[crate::state::snapshot::PortRange]) -> Ports {
    let mut ports = Ports::default();
    for (slot, range) in ports.ranges.iter_mut().zip(ranges) {
        *slot = PortRange { first: range.first, last: range.last };
        ports.count += 1;
    }
    ports
}

fn cidr(cookie: u64, direction: u8, subnet: &Subnet) -> Cidr {
    let bits = u32::from(subnet.bits());
    let (ip, bits) = match subnet.address() {
        IpAddr::V6(ip) => (ip, bits),
        IpAddr::V4(ip) => (ip.to_ipv6_mapped(), bits + 96),
    };
    // A subnet of IPv4 written in its mapped form is one of IPv4.
    let is_v4 = bits >= 96 && ip.to_ipv4_mapped().is_some();
    let masked = ip.to_bits() & u128::MAX.checked_shl(128 - bits).unwrap_or(0);
    let ip = Addr::v6(masked.to_be_bytes(), 0).ip;
    let family = if is_v4 { CidrOf::V4 } else { CidrOf::V6 };
    (
        CidrOf::BITS_BEFORE_IP + bits,
        CidrOf { direction, family, pad: [0; 2], netns: cookie.to_ne_bytes(), ip },
    )
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::state::snapshot::PortRange as Range;

    #[test]
    fn a_pod_that_asks_for_nothing_is_told_nothing_of() {
        let (entry, cidrs) = compile(7, &CapturePolicy::default(), WhenAgentIsDown::Closed);
        assert_eq!((entry, cidrs), (PodPolicy::default(), HashSet::new()));
        let (entry, _) = compile(7, &CapturePolicy::default(), WhenAgentIsDown::Open);
        assert_eq!(entry.flags, policy::OPEN, "the node's default");
        let closed =
            CapturePolicy { when_agent_is_down: Some(WhenAgentIsDown::Closed), ..CapturePolicy::default() };
        assert_eq!(compile(7, &closed, WhenAgentIsDown::Open).0.flags, 0, "the pod's own word counts");
    }

    #[test]
    fn each_wish_has_its_flag() {
        let asked = CapturePolicy {
            exclude_outbound: Exclusions {
                ports: vec![Range { first: 80, last: 81 }],
                cidrs: vec![Subnet::parse("10.0.0.0/8").unwrap()],
            },
            ..CapturePolicy::default()
        };
        let (entry, cidrs) = compile(7, &asked, WhenAgentIsDown::Closed);
        assert_eq!(entry.flags, policy::OUTBOUND);
        assert_eq!((entry.outbound.count, entry.inbound.count, cidrs.len()), (1, 0, 1));
    }

    #[test]
    fn subnets_of_one_family_are_not_of_the_other() {
        let of = |text: &str| cidr(7, direction::OUTBOUND, &Subnet::parse(text).unwrap());
        assert_eq!(of("10.1.2.3/8"), of("10.0.0.0/8"), "bits that do not count");
        assert_eq!(of("::ffff:10.0.0.0/104"), of("10.0.0.0/8"));
        assert_eq!(of("10.0.0.0/8").0, CidrOf::BITS_BEFORE_IP + 104);
        assert_eq!((of("0.0.0.0/0").1.family, of("::/0").1.family), (CidrOf::V4, CidrOf::V6));
        assert_eq!(of("::/0").0, CidrOf::BITS_BEFORE_IP);
    }
}
