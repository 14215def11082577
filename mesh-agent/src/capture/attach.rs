//! Attaching a pod's programs to its network namespace and its interfaces.
//!
//! Promises that a link which is there already is given the new program in one step. Tested in the lab.

use std::{io, os::fd::AsFd as _, path::Path};

use anyhow::{Context as _, Result};
use aya::programs::{LinkOrder, SchedClassifier, SkLookup, TcAttachType, links::FdLink, tc::TcAttachOptions};

use super::{
    links::{pin, replace},
    loader::{self, Object},
    netns::Netns,
};

/// Interfaces of a pod whose packets are counted: more than any pod needs, few enough that one which makes thousands
/// of them does not keep the node's other pods waiting.
const MOST_INTERFACES: usize = 32;

/// Attaches the pod's programs and pins their links; a link that is there already is given the program instead.
pub(super) fn attach(object: &mut Object, netns: &Netns, links: &Path) -> Result<()> {
    count_packets(object, netns, links)?;
    let program: &mut SkLookup = loader::program(object, "inbound")?;
    let pinned = links.join("inbound");
    if replace(&pinned, program.fd()?.as_fd())? {
        return Ok(());
    }
    let id =
        program.attach(netns).context("cannot steer inbound connections (another sk_lookup program?)")?;
    pin(program.take_link(id)?.into(), &pinned)
}

/// Attaches the counting of packets to the pod's interfaces, loopback excepted. A kernel without TCX (before 6.6) goes
/// without: those flows are then not counted. What the pod calls its interfaces, and how many it makes, is its own
/// affair: neither keeps it from being enrolled.
fn count_packets(object: &mut Object, netns: &Netns, links: &Path) -> Result<()> {
    for (name, direction) in [("egress", TcAttachType::Egress), ("ingress", TcAttachType::Ingress)] {
        let program: &mut SchedClassifier = loader::program(object, name)?;
        for (index, interface) in interfaces(netns)? {
            let pinned = links.join(format!("{name}-{index}"));
            if replace(&pinned, program.fd()?.as_fd())? {
                continue;
            }
            let attached = netns.enter(|| {
                let order = TcAttachOptions::TcxOrder(LinkOrder::default());
                program.attach_with_options(&interface, direction, order).map_err(io::Error::other)
            });
            match attached {
                Ok(id) => {
                    let link: FdLink = program.take_link(id)?.try_into()?;
                    pin(link, &pinned)?;
                }
                Err(error) => {
                    tracing::warn!(%interface, %error, "flows without a socket (UDP) are not counted: no TCX here");
                }
            }
        }
    }
    Ok(())
}

/// Index and name of the first [`MOST_INTERFACES`].
fn interfaces(netns: &Netns) -> Result<Vec<(u32, String)>> {
    let all = netns.enter(|| nix::net::if_::if_nameindex().map_err(io::Error::from));
    let all = all.context("cannot list its network interfaces")?;
    let all = all.iter().map(|one| (one.index(), one.name().to_string_lossy().into_owned()));
    let mut wanted: Vec<_> = all.filter(|(_, name)| name != "lo").collect();
    if wanted.len() > MOST_INTERFACES {
        let path = netns.path().display();
        tracing::warn!(netns = %path, "flows without a socket are counted on {MOST_INTERFACES} interfaces of {}", wanted.len());
        wanted.sort_unstable();
        wanted.truncate(MOST_INTERFACES);
    }
    Ok(wanted)
}
