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
use crate::capture::{Net, PodNet, enrol::Capture, live, netns::Netns};

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
                    destroy_in(&client, src, dst, one.socket);
                    destroy_in(&net, dst, src, one.servers());
                    taken.insert((dst, src));
                }
            }
            ended += taken.len();
            destroy_unlisted(&net, &taken);
        }
        ended
    }
}

fn miscounted(error: &anyhow::Error) {
    tracing::warn!(error = format!("{error:#}"), "direct connections are miscounted");
}

/// Ends what a server's pod still has of connections whose entries have been taken away: its own end of each, and the
/// other. A SYN that comes now finds the agent. One that was let in before has a socket that no entry names, until the
/// handshake is done or for good, and what completes the handshake asks nobody.
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
        warn_once(&error);
    }
    for socket in left {
        destroy_in(pod, socket.local, socket.remote, socket.cookie);
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

fn destroy_in(pod: &PodNet, local: SocketAddr, remote: SocketAddr, cookie: u64) {
    let Net::Kernel(net) = &pod.net else { return };
    if cookie == 0 || cookie == Admitted::CLOSED {
        return;
    }
    match destroy(net.netns(), local, remote, cookie) {
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
fn destroy(netns: &Netns, local: SocketAddr, remote: SocketAddr, cookie: u64) -> io::Result<()> {
    let mut socket = netns.enter(live::open)?;
    socket.send(&request(local, remote, cookie))?;
    let mut buffer = vec![0; 4 << 10];
    let length = socket.read(&mut buffer)?;
    let answer =
        NetlinkMessage::<SockDiagMessage>::deserialize(&buffer[..length]).map_err(io::Error::other)?;
    match answer.payload {
        NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
        _ => Ok(()),
    }
}

fn request(local: SocketAddr, remote: SocketAddr, cookie: u64) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_ACK;
    let family = if local.is_ipv4() { AF_INET } else { AF_INET6 };
    let socket_id = SocketId {
        source_port: local.port(),
        destination_port: remote.port(),
        source_address: local.ip(),
        destination_address: remote.ip(),
        interface_id: 0,
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

    #[test]
    fn a_socket_is_closed_and_no_other() {
        let netns = match Netns::open(Path::new("/proc/self/ns/net")) {
            Ok(netns) => netns,
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                return eprintln!("skipped: entering a network namespace takes root");
            }
            Err(error) => panic!("{error}"),
        };
        for listen in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(listen).unwrap();
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (mut server, _) = listener.accept().unwrap();
            let (local, remote) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
            let cookie = socket2::SockRef::from(&client).cookie().unwrap();
            let wrong = destroy(&netns, local, remote, cookie + 1).unwrap_err();
            assert_ne!(wrong.raw_os_error(), None, "{wrong}");
            match destroy(&netns, local, remote, cookie) {
                Err(error) if error.raw_os_error() == Some(nix::libc::EOPNOTSUPP) => {
                    return eprintln!("skipped: {error}");
                }
                destroyed => destroyed.unwrap(),
            }
            let aborted = client.read(&mut [0]).unwrap_err();
            assert_eq!(aborted.kind(), ErrorKind::ConnectionAborted);
            assert_eq!(server.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        }
    }
}
