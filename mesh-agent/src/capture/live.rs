//! What open sockets count at this moment, asked of the kernel (`sock_diag(7)`). The kernel programs write a flow's record
//! when something happens to it, at most so often; a connection on which nothing more happens would be told of as it
//! was a moment before its last byte.
//!
//! Promises to ask once for each pod and family, whatever the number of flows. Never writes into the kernel's maps.
//! Tested in the lab (`tests/tests/flows.rs`).

use std::{
    collections::HashMap,
    io::{self, Read as _},
    net::{IpAddr, SocketAddr},
};

use mesh_common::{
    decide::{self, seen, tcp},
    flow::{FlowRecord, direction},
};
use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NetlinkHeader, NetlinkMessage,
    NlasIterator,
};
use netlink_packet_sock_diag::{
    SockDiagMessage,
    constants::{AF_INET, AF_INET6, IPPROTO_TCP, SOCK_DIAG_BY_FAMILY},
    inet::{ExtensionFlags, InetRequest, SocketId, StateFlags, nlas::TcpInfo},
};
use socket2::{Domain, Protocol, Socket, Type};

use super::{Net, PodNet, netns::Netns};

/// `NETLINK_SOCK_DIAG`
const SOCK_DIAG: i32 = 4;

/// Bytes of `struct inet_diag_msg`, and where in it are the port and address of the socket's own side, those of the other,
/// the interface that the socket is bound to, its cookie and inode. The first byte is the family.
const HEADER: usize = 72;
const SOURCE_PORT: usize = 4;
const DESTINATION_PORT: usize = 6;
const SOURCE: usize = 8;
const DESTINATION: usize = 24;
const INTERFACE: usize = 40;
const COOKIE: usize = 44;
const INODE: usize = 68;

/// The attribute `INET_DIAG_INFO`.
const INFO: u16 = 2;

/// What the kernel hands over at once, at most (`NLMSG_GOODSIZE` and what `dump` raises it to).
const BUFFER: usize = 32 << 10;

/// Brings records of open flows up to date from the sockets of these pods. A pod whose sockets cannot be asked keeps the
/// records as they are.
pub fn bring_up_to_date<'a>(records: &mut [FlowRecord], pods: impl IntoIterator<Item = &'a PodNet>) {
    let open = |(_, record): &(usize, &FlowRecord)| record.socket != 0 && record.end_ns == 0;
    let places: HashMap<u64, usize> =
        records.iter().enumerate().filter(open).map(|(place, record)| (record.socket, place)).collect();
    if places.is_empty() {
        return;
    }
    for pod in pods {
        let Net::Kernel(net) = &pod.net else { continue };
        let asked = ask(net.netns(), &open_states(), |socket| {
            // Cookies are unique on the machine, so whose pod it is need not be asked.
            if let Some(record) = places.get(&socket.cookie()).and_then(|place| records.get_mut(*place)) {
                update(record, &socket);
            }
        });
        if let Err(error) = asked {
            tracing::debug!(netns = %net.netns().path().display(), %error, "open sockets are not told of");
        }
    }
}

/// What the kernel says of one socket: `struct inet_diag_msg` and its attributes, of which only what is asked for is
/// read. Most sockets in a pod are not those of a flow (the agent has as many), and none of them needs memory.
struct Told<'a>(&'a [u8; HEADER], &'a [u8]);

impl<'a> Told<'a> {
    fn of(payload: &'a [u8]) -> Option<Self> {
        payload.split_first_chunk().map(|(header, attributes)| Self(header, attributes))
    }

    fn at<const N: usize>(&self, place: usize) -> [u8; N] {
        self.0.get(place..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
    }

    fn source_port(&self) -> u16 {
        u16::from_be_bytes(self.at(SOURCE_PORT))
    }

    /// As the apps would say it, were they of one family: an IPv4 address is one in a socket of IPv6 too.
    fn end(&self, address: usize, port: usize) -> SocketAddr {
        let ip = if self.0[0] == AF_INET {
            IpAddr::from(self.at::<4>(address))
        } else {
            IpAddr::from(self.at::<16>(address)).to_canonical()
        };
        SocketAddr::new(ip, u16::from_be_bytes(self.at(port)))
    }

    fn cookie(&self) -> u64 {
        u64::from_ne_bytes(self.at(COOKIE))
    }

    fn inode(&self) -> u32 {
        u32::from_ne_bytes(self.at(INODE))
    }

    fn info(&self) -> Option<TcpInfo> {
        let attributes = NlasIterator::new(self.1).filter_map(Result::ok);
        let mut info = attributes.filter(|attribute| attribute.kind() == INFO);
        TcpInfo::parse(info.next()?.value()).ok()
    }
}

fn update(record: &mut FlowRecord, socket: &Told<'_>) {
    let Some(info) = socket.info() else { return };
    let (tx, rx) = payload(record.direction, info.state, info.bytes_acked, info.bytes_received);
    // Never back: the record may have been written since.
    (record.tx_bytes, record.rx_bytes) = (record.tx_bytes.max(tx), record.rx_bytes.max(rx));
    record.tx_packets = record.tx_packets.max(info.segs_out.into());
    record.rx_packets = record.rx_packets.max(info.segs_in.into());
    (record.srtt_us, record.retransmits, record.tcp_state) = (info.rtt, info.total_retrans, info.state);
}

/// Payload by the counters and the state that an open socket is in.
fn payload(direction: u8, state: u8, acked: u64, received: u64) -> (u64, u64) {
    let dialled = if direction == direction::OUTBOUND { seen::ACTIVE } else { 0 };
    let closing = match state {
        tcp::FIN_WAIT2 => seen::FIN_ACKED,
        tcp::CLOSE_WAIT | tcp::CLOSING | tcp::LAST_ACK => seen::FIN_RECEIVED,
        _ => 0,
    };
    let established = if state == tcp::SYN_SENT { 0 } else { seen::ESTABLISHED };
    decide::payload(dialled | closing | established, acked, received, 0, 0)
}

/// Those that end leave their last word in the record themselves.
fn open_states() -> StateFlags {
    StateFlags::all() - StateFlags::LISTEN - StateFlags::TIME_WAIT - StateFlags::CLOSE
}

/// Port and inode of the TCP sockets that listen in a network namespace.
pub(super) fn listening(netns: &Netns) -> io::Result<Vec<(u16, u32)>> {
    let mut found = Vec::new();
    ask(netns, &StateFlags::LISTEN, |socket| {
        found.push((socket.source_port(), socket.inode()));
    })?;
    Ok(found)
}

/// A TCP socket that is open, or whose handshake is not done.
#[derive(Debug, Clone, Copy)]
pub(super) struct OpenSocket {
    pub local: SocketAddr,
    pub remote: SocketAddr,
    /// Number of the interface that it is bound to; 0 without one.
    pub interface: u32,
    /// The cookie. That of a handshake goes over to the socket that comes of it.
    pub cookie: u64,
}

/// Those of a network namespace.
pub(super) fn open_sockets(netns: &Netns, mut each: impl FnMut(OpenSocket)) -> io::Result<()> {
    ask(netns, &open_states(), |socket| {
        each(OpenSocket {
            local: socket.end(SOURCE, SOURCE_PORT),
            remote: socket.end(DESTINATION, DESTINATION_PORT),
            interface: u32::from_ne_bytes(socket.at(INTERFACE)),
            cookie: socket.cookie(),
        });
    })
}

/// A socket by which the kernel is asked about those of this thread's network namespace.
pub(super) fn open() -> io::Result<Socket> {
    Socket::new(Domain::from(nix::libc::AF_NETLINK), Type::DGRAM, Some(Protocol::from(SOCK_DIAG)))
}

/// Asks for the TCP sockets of a network namespace that are in one of these states.
fn ask(netns: &Netns, states: &StateFlags, mut each: impl FnMut(Told<'_>)) -> io::Result<()> {
    let socket = netns.enter(open)?;
    for family in [AF_INET, AF_INET6] {
        socket.send(&request(family, states.clone()))?;
        read(&socket, &mut each)?;
    }
    Ok(())
}

fn request(family: u8, states: StateFlags) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let socket_id = if family == AF_INET { SocketId::new_v4() } else { SocketId::new_v6() };
    let request =
        InetRequest { family, protocol: IPPROTO_TCP, extensions: ExtensionFlags::INFO, states, socket_id };
    let mut message = NetlinkMessage::new(header, SockDiagMessage::InetRequest(request).into());
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

/// Reads until the kernel says that this was all.
fn read(mut socket: &Socket, each: &mut impl FnMut(Told<'_>)) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let length = socket.read(&mut buffer)?;
        let mut rest = &buffer[..length];
        while !rest.is_empty() {
            let message = NetlinkBuffer::new_checked(rest).map_err(io::Error::other)?;
            // Messages begin at multiples of four.
            let taken = (message.length() as usize).next_multiple_of(4).clamp(1, rest.len());
            match message.message_type() {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => return Err(refusal(message.payload())),
                SOCK_DIAG_BY_FAMILY => Told::of(message.payload()).into_iter().for_each(&mut *each),
                _ => {}
            }
            rest = &rest[taken..];
        }
    }
}

/// `struct nlmsgerr` begins with the negative error number.
fn refusal(payload: &[u8]) -> io::Error {
    let code = payload.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
    io::Error::from_raw_os_error(-code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_syn_nor_fin_is_payload() {
        assert_eq!(payload(direction::OUTBOUND, tcp::ESTABLISHED, 101, 50), (100, 50));
        assert_eq!(payload(direction::INBOUND, tcp::ESTABLISHED, 100, 50), (100, 50));
        assert_eq!(payload(direction::OUTBOUND, tcp::FIN_WAIT2, 102, 50), (100, 50));
        assert_eq!(payload(direction::INBOUND, tcp::CLOSE_WAIT, 100, 51), (100, 50));
        assert_eq!(payload(direction::OUTBOUND, tcp::SYN_SENT, 0, 0), (0, 0));
    }

    #[test]
    fn sockets_of_a_namespace_are_told_with_their_counters() -> io::Result<()> {
        use std::{
            io::Write as _,
            net::{TcpListener, TcpStream},
            path::Path,
        };

        let listener = TcpListener::bind("127.0.0.1:0")?;
        let mut client = TcpStream::connect(listener.local_addr()?)?;
        let (mut server, _) = listener.accept()?;
        client.write_all(&[7; 1000])?;
        server.read_exact(&mut [0; 1000])?;
        let netns = match Netns::open(Path::new("/proc/self/ns/net")) {
            Ok(netns) => netns,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                eprintln!("skipped: entering a network namespace takes root");
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let port = client.local_addr()?.port();
        let mut seen = Vec::new();
        ask(&netns, &open_states(), |socket| {
            let (source, destination) =
                (socket.source_port(), u16::from_be_bytes(socket.at(DESTINATION_PORT)));
            if source == port || destination == port {
                let dialled = source == port;
                let direction = if dialled { direction::OUTBOUND } else { direction::INBOUND };
                let mut record = FlowRecord { direction, ..FlowRecord::default() };
                update(&mut record, &socket);
                seen.push((record.tx_bytes, record.rx_bytes));
                assert_ne!(socket.cookie(), 0);
            }
        })?;
        seen.sort_unstable();
        assert_eq!(seen, [(0, 1000), (1000, 0)]);
        Ok(())
    }
}
