//! An end to direct connections: the sockets of both apps are closed by the kernel (`SOCK_DESTROY`, Linux 4.9 with
//! `CONFIG_INET_DIAG_DESTROY`); each is told of a reset.

use std::{
    collections::HashSet,
    io::{self, Read as _},
    net::SocketAddr,
    sync::{
        Arc, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use mesh_common::maps::{Admitted, Tuple};
use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::{
    SockDiagMessage,
    constants::{AF_INET, AF_INET6, IPPROTO_TCP},
    inet::{ExtensionFlags, InetRequest, SocketId, StateFlags},
};

use super::tables::held_less;
use crate::capture::{
    Net, PodNet,
    enrol::Capture,
    live::{self, OpenSocket},
    netns::Netns,
};

/// `SOCK_DESTROY` of `linux/sock_diag.h`.
const SOCK_DESTROY: u16 = 21;

/// A direct connection that is open, or about to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenDirect {
    /// Cookie of the client pod's network namespace.
    pub client: u64,
    /// Cookie of the server pod's.
    pub server: u64,
    /// What the client dialled.
    pub dialled: SocketAddr,
    /// Where the app listens.
    pub endpoint: SocketAddr,
}

impl Capture {
    /// Ends the direct connections for which `forbidden` holds. How many there were.
    ///
    /// To be called after [`Capture::set_direct`]. A connection that was chosen just before that, and listed after this
    /// has looked, is found by the next call.
    pub fn end_direct(&self, forbidden: impl Fn(&OpenDirect) -> bool) -> usize {
        let pods: Vec<_> = {
            let pods = self.shared.pods();
            pods.iter().map(|(cookie, pod)| (*cookie, Arc::clone(&pod.flows), Arc::clone(&pod.net))).collect()
        };
        if !self.dir.is_ours() {
            return 0;
        }
        let mut held = self.held().inspect_err(miscounted).ok();
        let mut ended = 0;
        for (server, tables, net) in pods {
            let mut table = tables.admitted.lock().unwrap_or_else(PoisonError::into_inner);
            let found: Vec<(Tuple, Admitted)> = table.iter().filter_map(Result::ok).collect();
            let mut taken = HashSet::new();
            for (tuple, one) in found {
                let (src, dst) = (tuple.src.into(), tuple.dst.into());
                let open =
                    OpenDirect { client: one.netns, server, dialled: one.dialled.into(), endpoint: dst };
                let client = self.shared.pods().get(&one.netns).map(|pod| Arc::clone(&pod.net));
                // Of a pod that has left: its connection goes on, but its address may be another's by now.
                if client.is_some() && !forbidden(&open) {
                    continue;
                }
                // Whoever takes an entry away counts one less, and the kernel may have been first.
                if table.remove(&tuple).is_ok()
                    && let Some(held) = &mut held
                    && let Err(error) = held_less(held, server, one.netns)
                {
                    miscounted(&error);
                }
                if let Some(client) = client {
                    let socket = |local, remote, cookie| OpenSocket { local, remote, interface: 0, cookie };
                    destroy_in(&client, &socket(src, dst, one.socket));
                    destroy_in(&net, &socket(dst, src, one.servers()));
                    taken.insert((dst, src));
                }
            }
            drop(table);
            ended += taken.len();
            destroy_unlisted(&net, &taken);
        }
        ended
    }
}

fn miscounted(error: &anyhow::Error) {
    tracing::warn!(error = format!("{error:#}"), "direct connections are miscounted");
}

/// Ends what a server's pod still has of connections whose entries have been taken away. A SYN that comes now finds the
/// agent; one that was let in before has a socket that no entry names until its handshake is done, and what completes that
/// asks nobody. A socket that its app has bound to an interface is found here alone.
fn destroy_unlisted(pod: &PodNet, taken: &HashSet<(SocketAddr, SocketAddr)>) {
    let Net::Kernel(net) = &pod.net else { return };
    if taken.is_empty() {
        return;
    }
    await_lookups();
    let mut left = Vec::new();
    let told = live::open_sockets(net.netns(), |socket| {
        if taken.contains(&(socket.local, socket.remote)) {
            left.push(socket);
        }
    });
    if let Err(error) = told {
        let pod = pod.name();
        tracing::warn!(%pod, %error, "direct connections that were about to begin may go on: the pod's sockets are not told of");
    }
    for socket in left {
        destroy_in(pod, &socket);
    }
}

/// Returns when what the kernel did for packets that had come before is done: it asks for an entry and makes the socket in
/// one read-side section of RCU, and `membarrier(2)` waits for those to end. A kernel that refuses (`nohz_full`) leaves a
/// gap of microseconds.
#[expect(unsafe_code, reason = "no library has this call")]
fn await_lookups() {
    const MEMBARRIER_CMD_GLOBAL: i32 = 1;
    // SAFETY: the call touches no memory of ours.
    unsafe { nix::libc::syscall(nix::libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
}

fn destroy_in(pod: &PodNet, socket: &OpenSocket) {
    let Net::Kernel(net) = &pod.net else { return };
    if socket.cookie == 0 || socket.cookie == Admitted::CLOSED {
        return;
    }
    match destroy(net.netns(), socket) {
        Ok(()) => {}
        // It has ended by itself.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => warn_once(&error),
    }
}

/// The reason is the kernel's, and the same for all: it is told once.
fn warn_once(error: &io::Error) {
    static TOLD: AtomicBool = AtomicBool::new(false);
    if !TOLD.swap(true, Ordering::Relaxed) {
        tracing::warn!(
            %error,
            "direct connections that are not allowed any more go on until their apps end them: the kernel does not \
             close sockets of others (CONFIG_INET_DIAG_DESTROY)"
        );
    }
}

/// Has the kernel close a socket as if its connection had been reset.
fn destroy(netns: &Netns, socket: &OpenSocket) -> io::Result<()> {
    let mut kernel = netns.enter(live::open)?;
    kernel.send(&request(socket))?;
    let mut buffer = vec![0; 4 << 10];
    let length = kernel.read(&mut buffer)?;
    let answer =
        NetlinkMessage::<SockDiagMessage>::deserialize(&buffer[..length]).map_err(io::Error::other)?;
    match answer.payload {
        NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
        _ => Ok(()),
    }
}

fn request(&OpenSocket { local, remote, interface, cookie }: &OpenSocket) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_ACK;
    let family = if local.is_ipv4() { AF_INET } else { AF_INET6 };
    let socket_id = SocketId {
        source_port: local.port(),
        destination_port: remote.port(),
        source_address: local.ip(),
        destination_address: remote.ip(),
        interface_id: interface,
        cookie: cookie.to_ne_bytes(),
    };
    let request = InetRequest {
        family,
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::all(),
        socket_id,
    };
    let mut message = NetlinkMessage::new(header, SockDiagMessage::InetRequest(request).into());
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    // The library has the request, and not this use of it: the message's type is after its length.
    bytes[4..6].copy_from_slice(&SOCK_DESTROY.to_ne_bytes());
    bytes
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::{
        io::{ErrorKind, Read as _},
        net::{TcpListener, TcpStream},
        path::Path,
    };

    use super::*;

    fn own_netns() -> Option<Netns> {
        match Netns::open(Path::new("/proc/self/ns/net")) {
            Ok(netns) => Some(netns),
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                eprintln!("skipped: entering a network namespace takes root");
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// Whether the kernel can.
    fn destroyed(netns: &Netns, socket: &OpenSocket) -> bool {
        match destroy(netns, socket) {
            Err(error) if error.raw_os_error() == Some(nix::libc::EOPNOTSUPP) => {
                eprintln!("skipped: {error}");
                false
            }
            destroyed => {
                destroyed.unwrap();
                true
            }
        }
    }

    #[test]
    fn a_socket_is_closed_and_no_other() {
        let Some(netns) = own_netns() else { return };
        for listen in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(listen).unwrap();
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (mut server, _) = listener.accept().unwrap();
            let (local, remote) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
            let cookie = socket2::SockRef::from(&client).cookie().unwrap();
            let socket = OpenSocket { local, remote, interface: 0, cookie };
            let wrong = destroy(&netns, &OpenSocket { cookie: cookie + 1, ..socket }).unwrap_err();
            assert_ne!(wrong.raw_os_error(), None, "{wrong}");
            if !destroyed(&netns, &socket) {
                return;
            }
            let aborted = client.read(&mut [0]).unwrap_err();
            assert_eq!(aborted.kind(), ErrorKind::ConnectionAborted);
            assert_eq!(server.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        }
    }

    #[test]
    fn what_is_bound_to_an_interface_is_told_of_with_it_and_closed() {
        let Some(netns) = own_netns() else { return };
        for listen in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(listen).unwrap();
            socket2::SockRef::from(&listener).bind_device(Some(b"lo")).unwrap();
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (mut server, _) = listener.accept().unwrap();
            let (local, remote) = (server.local_addr().unwrap(), server.peer_addr().unwrap());
            let mut found = Vec::new();
            let is = |socket: &OpenSocket| socket.local == local && socket.remote == remote;
            live::open_sockets(&netns, |socket| found.extend(Some(socket).filter(is))).unwrap();
            let [socket] = found[..] else { panic!("{found:?}") };
            assert_eq!(Some(socket.cookie), socket2::SockRef::from(&server).cookie().ok());
            assert!(destroy(&netns, &OpenSocket { interface: 0, ..socket }).is_err());
            if !destroyed(&netns, &socket) {
                return;
            }
            assert_eq!(server.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionAborted);
            drop(client);
        }
    }
}
