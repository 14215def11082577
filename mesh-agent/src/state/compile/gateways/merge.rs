//! The servers of all `Gateway`s of a pod, port by port.
//!
//! Promises that a port is spoken in one way, and that a name on a TLS port is one server's: the oldest keeps it, and whoever
//! does not get it is told. Tested in `tests/gateways.rs`.

use std::collections::BTreeMap;

use super::{Problems, Written, key_of_gateway};
use crate::state::resource::gateway::{Host, Server, Serves};

/// A server that is served.
pub(super) struct At<'a> {
    /// Whose it is.
    pub gateway: &'a Written,
    /// Its place in the list.
    pub index: usize,
    /// What it says.
    pub server: &'a Server,
    /// Its hosts, as far as it gets them.
    pub hosts: Vec<&'a Host>,
}

impl At<'_> {
    /// What logs call it.
    pub fn origin(&self) -> String {
        format!("{}: spec.servers[{}]", key_of_gateway(self.gateway), self.index)
    }
}

/// How a port is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Http,
    Tls,
    Tcp,
}

impl Way {
    fn of(serves: &Serves) -> Self {
        match serves {
            Serves::Http { .. } => Self::Http,
            Serves::Https(_) | Serves::Tls(_) | Serves::PassThrough => Self::Tls,
            Serves::Tcp => Self::Tcp,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Http => "plain HTTP",
            Self::Tls => "TLS",
            Self::Tcp => "TCP",
        }
    }
}

/// The servers of each port, never none, those of the oldest `Gateway` first; `gateways`: in that order.
pub(super) fn ports<'a>(gateways: &[&'a Written], problems: &mut Problems<'_>) -> BTreeMap<u16, Vec<At<'a>>> {
    let mut ports: BTreeMap<u16, Vec<At<'a>>> = BTreeMap::new();
    for gateway in gateways {
        for (index, server) in gateway.servers.iter().enumerate() {
            let others = ports.get(&server.port).map_or(&[][..], Vec::as_slice);
            let at = At { gateway, index, server, hosts: server.hosts.iter().collect() };
            if let Some(at) = fitting(at, others, problems) {
                ports.entry(server.port).or_default().push(at);
            }
        }
    }
    ports
}

/// What of a server there is room for beside the others of its port.
fn fitting<'a>(at: At<'a>, others: &[At<'a>], problems: &mut Problems<'_>) -> Option<At<'a>> {
    let Some(first) = others.first() else { return Some(at) };
    let (key, way) = (key_of_gateway(at.gateway), Way::of(&at.server.serves));
    let field = format!("spec.servers[{}]", at.index);
    let taken = Way::of(&first.server.serves);
    if taken != way || way == Way::Tcp {
        let message = format!(
            "port {} is already one of {}, by {}, which comes first; the server is left out",
            at.server.port,
            taken.word(),
            first.origin()
        );
        problems.conflict(&key, &format!("{field}.port"), message);
        return None;
    }
    if way == Way::Http {
        return Some(at);
    }
    let mut hosts = Vec::with_capacity(at.hosts.len());
    for (i, host) in at.hosts.iter().enumerate() {
        let same = |other: &&At<'_>| other.hosts.iter().any(|other| other.name == host.name);
        match others.iter().find(same) {
            None => hosts.push(*host),
            Some(other) => {
                let message = format!(
                    "{} is already a host of {} on port {}, which comes first and keeps it",
                    host.name,
                    other.origin(),
                    at.server.port
                );
                problems.conflict(&key, &format!("{field}.hosts[{i}]"), message);
            }
        }
    }
    (!hosts.is_empty()).then_some(At { hosts, ..at })
}
