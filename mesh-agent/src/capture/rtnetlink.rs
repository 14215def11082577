//! The interfaces, rules and routes of a network namespace, asked and told by `rtnetlink(7)`.
//!
//! Promises: what is added is added once however often it is asked for, and what is removed may be gone already. Never
//! touches a rule or route outside the mesh's own table. Tested below, and with the kernel in the lab
//! (`tests/tests/traffic_without_sockets.rs`).

use std::{
    io::{self, Read as _},
    net::IpAddr,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use mesh_common::maps::GUEST_MARK;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage as Message,
    address::{AddressAttribute, AddressMessage},
    link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
    nsid::{NsidAttribute, NsidMessage},
    route::{RouteAttribute, RouteHeader, RouteMessage, RouteScope, RouteType},
    rule::{RuleAction, RuleAttribute, RuleMessage},
};
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};
use tokio::io::{Interest, unix::AsyncFd};

use super::netns::Netns;

/// `NETLINK_ROUTE`
const ROUTE: i32 = 0;
/// `RTMGRP_LINK`: interfaces that come, change and go.
const LINKS: u32 = 1;
/// What the kernel hands over at once, at most.
const BUFFER: usize = 32 << 10;
/// Messages that are read in one go: more than the socket holds.
const MOST_READ: usize = 1024;
/// Index of loopback in every namespace.
const LOOPBACK: u32 = 1;
/// The table of the one route, which has everything delivered inside the pod.
pub(super) const TABLE: u32 = 15_008;
/// After the kernel's own rule for local addresses, before whatever else is in the pod.
const PRIORITY: u32 = 10;
/// Both families.
const FAMILIES: [AddressFamily; 2] = [AddressFamily::Inet, AddressFamily::Inet6];

/// A socket in a network namespace, to ask by.
#[derive(Debug)]
pub(super) struct RouteSocket(Socket);

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) kind: Option<InfoKind>,
    /// It is a port of another one, a bridge.
    pub(super) has_controller: bool,
    /// The index of its other end, or of what it stands on; 0 without.
    pub(super) peer: u32,
    /// Whose other end is in another namespace: that namespace's number in this one.
    pub(super) peer_netns: Option<i32>,
}

fn socket(kind: Type) -> io::Result<Socket> {
    Socket::new(Domain::from(nix::libc::AF_NETLINK), kind.cloexec(), Some(Protocol::from(ROUTE)))
}

/// A socket that becomes readable when an interface comes, changes or goes. To be called inside a tokio runtime.
pub(super) fn watch(netns: &Netns) -> io::Result<AsyncFd<Socket>> {
    let socket = netns.enter(|| socket(Type::DGRAM.nonblocking()))?;
    socket.bind(&groups(LINKS))?;
    #[expect(
        unsafe_code,
        reason = "what is registered has to keep its descriptor, which no type can promise"
    )]
    // SAFETY: a socket owns its descriptor and gives the same one, open, for as long as it lives.
    unsafe {
        AsyncFd::register_with_interest(socket, Interest::READABLE).map_err(io::Error::from)
    }
}

/// Takes what is there to read, without looking at it: that something came is what counts. Whether that was all; who makes
/// more meanwhile keeps nobody here.
pub(super) fn drain(mut socket: &Socket) -> io::Result<bool> {
    let mut buffer = [0; 4096];
    for _ in 0..MOST_READ {
        match socket.read(&mut buffer) {
            Ok(0) => return Ok(true),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
            // More came than the socket holds.
            Err(error) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

fn groups(groups: u32) -> SockAddr {
    let mut storage = SockAddrStorage::zeroed();
    #[expect(unsafe_code, reason = "the socket library knows no address of netlink")]
    // SAFETY: `sockaddr_nl` is plain data that fits; all zeros is a value of it, and its length is given with it.
    unsafe {
        let netlink: &mut nix::libc::sockaddr_nl = storage.view_as();
        netlink.nl_family = nix::libc::AF_NETLINK as u16;
        netlink.nl_groups = groups;
        SockAddr::new(storage, size_of::<nix::libc::sockaddr_nl>() as nix::libc::socklen_t)
    }
}

impl RouteSocket {
    pub(super) fn open(netns: &Netns) -> io::Result<Self> {
        netns.enter(|| socket(Type::DGRAM)).map(Self)
    }

    /// In the agent's own namespace.
    pub(super) fn here() -> io::Result<Self> {
        socket(Type::DGRAM).map(Self)
    }

    /// Its interfaces, loopback too.
    pub(super) fn links(&self) -> io::Result<Vec<Link>> {
        let answers = self.ask(Message::GetLink(LinkMessage::default()), NLM_F_DUMP)?;
        let links = answers.into_iter().filter_map(|answer| match answer {
            Message::NewLink(link) => Some(link_of(&link)),
            _ => None,
        });
        Ok(links.collect())
    }

    /// The addresses of its interfaces, with the interface's index.
    pub(super) fn addresses(&self) -> io::Result<Vec<(u32, IpAddr)>> {
        let answers = self.ask(Message::GetAddress(AddressMessage::default()), NLM_F_DUMP)?;
        let mut found = Vec::new();
        for answer in answers {
            let Message::NewAddress(address) = answer else { continue };
            found.extend(address.attributes.iter().filter_map(|attribute| match attribute {
                // IPv4 says its own address as `Local`; for IPv6 there is `Address` alone.
                AddressAttribute::Local(ip) | AddressAttribute::Address(ip) => {
                    Some((address.header.index, *ip))
                }
                _ => None,
            }));
        }
        Ok(found)
    }

    /// The number that another namespace has in this one, if it has one: no interface leads there else.
    pub(super) fn number_of(&self, netns: BorrowedFd<'_>) -> io::Result<Option<i32>> {
        let mut request = NsidMessage::default();
        request.attributes.push(NsidAttribute::Fd(netns.as_raw_fd().cast_unsigned()));
        let answers = self.ask(Message::GetNsId(request), 0)?;
        let number = answers.iter().find_map(|answer| match answer {
            Message::NewNsId(it) => it.attributes.iter().find_map(|attribute| match attribute {
                NsidAttribute::Id(number) => Some(*number),
                _ => None,
            }),
            _ => None,
        });
        Ok(number.filter(|number| *number >= 0))
    }

    /// The mesh's rules: their family, and the interface each is for.
    pub(super) fn rules(&self) -> io::Result<Vec<RuleMessage>> {
        let mut found = Vec::new();
        for family in FAMILIES {
            let mut request = RuleMessage::default();
            request.header.family = family;
            let answers = no_such_family(self.ask(Message::GetRule(request), NLM_F_DUMP))?;
            found.extend(answers.unwrap_or_default().into_iter().filter_map(|answer| match answer {
                Message::NewRule(rule) if is_ours(&rule) => Some(rule),
                _ => None,
            }));
        }
        Ok(found)
    }

    /// Packets that come in by this interface with the mesh's mark are routed by its table.
    pub(super) fn add_rule(&self, interface: &str) -> io::Result<()> {
        for family in FAMILIES {
            let request = Message::NewRule(rule(family, interface));
            there_already(no_such_family(self.ask(request, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL)))?;
        }
        Ok(())
    }

    pub(super) fn remove_rule(&self, rule: RuleMessage) -> io::Result<()> {
        not_there(self.ask(Message::DelRule(rule), NLM_F_ACK))
    }

    /// What is routed by the mesh's table is delivered inside the pod, whatever its destination.
    pub(super) fn add_route(&self) -> io::Result<()> {
        for family in FAMILIES {
            let request = Message::NewRoute(route(family));
            there_already(no_such_family(self.ask(request, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL)))?;
        }
        Ok(())
    }

    pub(super) fn remove_route(&self) -> io::Result<()> {
        for family in FAMILIES {
            not_there(self.ask(Message::DelRoute(route(family)), NLM_F_ACK))?;
        }
        Ok(())
    }

    /// How many routes are in the mesh's table.
    pub(super) fn routes(&self) -> io::Result<usize> {
        let mut count = 0;
        for family in FAMILIES {
            let mut request = RouteMessage::default();
            request.header.address_family = family;
            let answers = no_such_family(self.ask(Message::GetRoute(request), NLM_F_DUMP))?;
            let ours = |answer: &&Message| match answer {
                Message::NewRoute(route) => route.attributes.contains(&RouteAttribute::Table(TABLE)),
                _ => false,
            };
            count += answers.unwrap_or_default().iter().filter(ours).count();
        }
        Ok(count)
    }

    /// Sends a request and returns what is answered.
    fn ask(&self, request: Message, flags: u16) -> io::Result<Vec<Message>> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.0.send(&bytes)?;
        self.read(flags & NLM_F_DUMP == NLM_F_DUMP)
    }

    /// Reads until the kernel says that this was all: one answer is, unless it is one of many.
    fn read(&self, is_dump: bool) -> io::Result<Vec<Message>> {
        let (mut answers, mut buffer) = (Vec::new(), vec![0; BUFFER]);
        let mut socket = &self.0;
        loop {
            let length = socket.read(&mut buffer)?;
            let mut rest = &buffer[..length];
            while !rest.is_empty() {
                let message = NetlinkMessage::<Message>::deserialize(rest).map_err(io::Error::other)?;
                // Messages begin at multiples of four.
                let taken = (message.header.length as usize).next_multiple_of(4).clamp(1, rest.len());
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(answers),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    NetlinkPayload::InnerMessage(answer) => answers.push(answer),
                    _ => {}
                }
                rest = &rest[taken..];
            }
            if !is_dump && !answers.is_empty() {
                return Ok(answers);
            }
        }
    }
}

fn link_of(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: None,
        has_controller: false,
        peer: 0,
        peer_netns: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Controller(_) => link.has_controller = true,
            LinkAttribute::Link(index) => link.peer = *index,
            LinkAttribute::LinkNetNsId(number) => link.peer_netns = Some(*number),
            LinkAttribute::LinkInfo(infos) => {
                link.kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.clone()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    link
}

fn rule(family: AddressFamily, interface: &str) -> RuleMessage {
    let mut rule = RuleMessage::default();
    (rule.header.family, rule.header.action) = (family, RuleAction::ToTable);
    rule.attributes = vec![
        RuleAttribute::Iifname(interface.to_owned()),
        RuleAttribute::FwMark(GUEST_MARK),
        RuleAttribute::FwMask(u32::MAX),
        RuleAttribute::Table(TABLE),
        RuleAttribute::Priority(PRIORITY),
    ];
    rule
}

fn is_ours(rule: &RuleMessage) -> bool {
    [RuleAttribute::FwMark(GUEST_MARK), RuleAttribute::Table(TABLE)]
        .iter()
        .all(|ours| rule.attributes.contains(ours))
}

/// The interface a rule is for.
pub(super) fn interface_of(rule: &RuleMessage) -> Option<&str> {
    rule.attributes.iter().find_map(|attribute| match attribute {
        RuleAttribute::Iifname(name) => Some(name.as_str()),
        _ => None,
    })
}

fn route(family: AddressFamily) -> RouteMessage {
    let mut route = RouteMessage::default();
    route.header = RouteHeader {
        address_family: family,
        kind: RouteType::Local,
        scope: RouteScope::Host,
        ..RouteHeader::default()
    };
    route.attributes = vec![RouteAttribute::Table(TABLE), RouteAttribute::Oif(LOOPBACK)];
    route
}

/// A pod without IPv6 has no rules and routes of it.
fn no_such_family<T>(asked: io::Result<T>) -> io::Result<Option<T>> {
    match asked {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(nix::libc::EAFNOSUPPORT | nix::libc::EOPNOTSUPP | nix::libc::EPFNOSUPPORT)
            ) =>
        {
            Ok(None)
        }
        other => other.map(Some),
    }
}

fn there_already<T>(asked: io::Result<T>) -> io::Result<()> {
    match asked {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

fn not_there<T>(asked: io::Result<T>) -> io::Result<()> {
    match no_such_family(asked) {
        Err(error) if !matches!(error.raw_os_error(), Some(nix::libc::ENOENT | nix::libc::ESRCH)) => {
            Err(error)
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_rules_with_the_mark_and_the_table_are_ours() {
        let ours = rule(AddressFamily::Inet, "br0");
        assert!(is_ours(&ours));
        assert_eq!(interface_of(&ours), Some("br0"));
        for missing in [1, 3] {
            let mut other = rule(AddressFamily::Inet6, "br0");
            other.attributes.remove(missing);
            assert!(!is_ours(&other));
        }
    }
}
