//! Capture: the connections of enrolled pods, handed over by the kernel; and sockets inside those pods.
//!
//! [`Capture`] loads the kernel programs and enrols pods; each enrolled pod is a [`PodNet`] with three listeners in the
//! pod's own network namespace. What the kernel hands over is a [`Captured`]; what the agent dials for a pod leaves
//! from the pod. Addresses are canonical from here on: never v4-mapped. A [`PodNet`] can also be made of ordinary
//! loopback sockets ([`PodNet::fixed`]), or be the one that the process runs in ([`PodNet::own`]), without kernel programs and
//! without privileges.
//!
//! Never touches a pod that is not enrolled, never leaves anything behind in one that is un-enrolled. `unsafe` code of
//! the agent is in this room alone. Tested by the unit tests of its files and, with the kernel, by the lab
//! (`tests/tests/capture/`).

mod accept;
mod adopt;
mod at_once;
mod attach;
mod cgroup;
mod crashed;
pub mod descriptors;
mod direct;
mod enrol;
mod fixed;
mod flows;
mod guard;
mod guests;
mod heap;
pub mod inspect;
mod instance;
mod kernel;
mod links;
mod live;
mod loader;
mod netns;
pub mod objects;
mod own;
mod policy;
mod probes;
mod prove;
pub mod residue;
mod rtnetlink;
mod sockets;
mod tables;

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use arc_swap::ArcSwapOption;
use mesh_common::maps::port;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

pub use self::sockets::unacknowledged;
pub use self::{
    accept::Acceptor,
    adopt::{Adopted, OfferedPod},
    direct::{DirectEndpoint, DirectRoute, DirectSet, Endpoints, OpenDirect},
    enrol::Capture,
    guests::rules_and_routes_in,
    heap::{Allocator, give_back_free_memory, give_back_soon},
    instance::Mark,
    links::clean,
    live::bring_up_to_date,
    loader::{CaptureConfig, EbpfLog},
    own::{Arrivals, Arrived, OpenPort},
    tables::{Losses, Outcome, PodTables, REASONS, Reason},
};
use self::{fixed::FixedNet, kernel::KernelNet};
pub use crate::state::snapshot::WhenAgentIsDown;
use crate::{
    error::{Error, Kind},
    state::snapshot::Workload,
};

/// A connection of an enrolled pod, as the kernel handed it over.
#[derive(Debug)]
pub struct Captured {
    /// The connection, of no runtime yet: whoever serves it need not be on the one that has accepted it.
    pub stream: std::net::TcpStream,
    /// The pod it was captured in.
    pub pod: Arc<PodNet>,
    /// The other end: the app (outbound), or who dialled the pod (inbound, mesh).
    pub client: SocketAddr,
    /// What the client dialled.
    pub original_dst: SocketAddr,
    /// Number of the endpoint that the kernel has chosen for it ([`Endpoints`]); 0 leaves that to the agent.
    pub endpoint: u32,
    /// Whether the kubelet has dialled it, to a port for which the pod declares requests.
    pub probe: bool,
}

/// What is known of an accepted connection.
#[derive(Debug)]
struct Meant {
    original_dst: SocketAddr,
    endpoint: u32,
    probe: bool,
}

impl Captured {
    /// The connection, for the runtime of whoever asks.
    ///
    /// # Errors
    /// The process has no room for it.
    pub fn open(stream: std::net::TcpStream) -> Result<TcpStream, Error> {
        TcpStream::from_std(stream).map_err(|error| {
            Error::new(Kind::ConnectFailure, format!("a connection cannot be watched: {error}"))
        })
    }
}

impl Meant {
    /// Nothing but what was dialled.
    const fn dialled(original_dst: SocketAddr) -> Self {
        Self { original_dst, endpoint: 0, probe: false }
    }
}

/// A connection that the agent does not serve.
#[derive(Debug)]
pub struct Refused {
    /// The other end.
    pub client: SocketAddr,
    /// Why not.
    pub error: Error,
}

/// Which of a pod's three listeners.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listener {
    /// 15001: what the pod's apps dial.
    Outbound,
    /// 15006: what arrives at the pod in plaintext.
    Inbound,
    /// 15008: mesh mTLS.
    Mesh,
}

impl Listener {
    /// All three.
    pub const ALL: [Self; 3] = [Self::Outbound, Self::Inbound, Self::Mesh];

    /// Its port inside the pod's network namespace.
    pub const fn port(self) -> u16 {
        match self {
            Self::Outbound => port::OUTBOUND,
            Self::Inbound => port::INBOUND,
            Self::Mesh => port::MESH,
        }
    }
}

/// An enrolled pod's network: its listeners, and sockets dialled from inside its network namespace.
#[derive(Debug)]
pub struct PodNet {
    /// The pod.
    pub workload: Arc<Workload>,
    /// Empty once the pod is un-enrolled, whoever still holds this.
    listeners: ArcSwapOption<[TcpListener; 3]>,
    gone: CancellationToken,
    /// A listener was closed from inside the pod.
    lost: AtomicBool,
    /// Interfaces have come or gone.
    rewired: AtomicBool,
    /// What is new passes by the agent.
    passed_by: AtomicBool,
    net: Net,
}

/// Where a pod's sockets are.
#[derive(Debug)]
enum Net {
    /// In the pod's network namespace, known to the kernel programs.
    Kernel(KernelNet),
    /// In the agent's own.
    Fixed(FixedNet),
    /// In that of the process, which runs in the pod.
    Own,
}

impl PodNet {
    fn new(workload: Arc<Workload>, listeners: [TcpListener; 3], net: Net) -> Arc<Self> {
        Self::with(workload, ArcSwapOption::from_pointee(listeners), net)
    }

    fn with(workload: Arc<Workload>, listeners: ArcSwapOption<[TcpListener; 3]>, net: Net) -> Arc<Self> {
        Arc::new(Self {
            workload,
            listeners,
            gone: CancellationToken::new(),
            lost: AtomicBool::new(false),
            rewired: AtomicBool::new(false),
            passed_by: AtomicBool::new(false),
            net,
        })
    }

    /// Dials from the pod's network namespace with the pod's own address, exempt from capture. Waits for as long as
    /// the kernel tries: a time limit is the caller's.
    pub async fn dial(&self, to: SocketAddr) -> io::Result<TcpStream> {
        match &self.net {
            Net::Kernel(net) => net.dial(to).await,
            Net::Fixed(net) => net.dial(to).await,
            Net::Own => own::dial(to).await,
        }
    }

    /// As [`PodNet::dial`], from this address of the pod's; `before` learns from which port, before anything is sent.
    pub async fn dial_from(
        &self,
        from: IpAddr,
        to: SocketAddr,
        before: impl FnOnce(SocketAddr),
    ) -> io::Result<TcpStream> {
        match &self.net {
            Net::Kernel(net) => net.dial_from(from, to, before).await,
            Net::Fixed(net) => net.dial(to).await,
            Net::Own => own::dial(to).await,
        }
    }

    /// Dials the app without leaving the pod; the app sees `client` as its peer. `to` is the address the client
    /// dialled, so that an app that listens on one address alone is found.
    pub async fn dial_app(&self, to: SocketAddr, client: SocketAddr) -> io::Result<TcpStream> {
        match &self.net {
            Net::Kernel(net) => net.dial_app(to, client).await,
            Net::Fixed(net) => net.dial(to).await,
            Net::Own => own::dial(to).await,
        }
    }

    /// Where this listener can be reached: of interest for [`PodNet::fixed`], whose ports the kernel chooses.
    pub fn listener_addr(&self, listener: Listener) -> io::Result<SocketAddr> {
        let listeners = self.listeners.load();
        listeners.as_ref().ok_or_else(un_enrolled)?[listener as usize].local_addr()
    }

    /// The cookie of its network namespace, by which the kernel's records name the pod; `None` without a kernel side.
    pub const fn cookie(&self) -> Option<u64> {
        match &self.net {
            Net::Kernel(net) => Some(net.netns().cookie()),
            Net::Fixed(_) | Net::Own => None,
        }
    }

    /// Whether the pod is about to leave: its new connections pass by the agent ([`Capture::pass_by`]).
    pub fn is_passed_by(&self) -> bool {
        self.passed_by.load(Ordering::Relaxed)
    }

    fn set_passed_by(&self, passed: bool) {
        self.passed_by.store(passed, Ordering::Relaxed);
    }

    /// Whether its listeners are no longer this agent's.
    pub fn has_left(&self) -> bool {
        self.gone.is_cancelled()
    }

    /// Completes once the pod is un-enrolled.
    pub async fn un_enrolled(&self) {
        self.gone.cancelled().await;
    }

    /// Whether its interfaces may have changed since this was last asked.
    pub fn was_rewired(&self) -> bool {
        self.rewired.swap(false, Ordering::Relaxed)
    }

    /// Has [`PodNet::was_rewired`] say so once more.
    pub fn look_again(&self) {
        self.rewired.store(true, Ordering::Relaxed);
    }

    /// Whether a listener was closed from inside the pod: what was to come to it is refused until the pod is enrolled
    /// anew. The pod is not let go of for that, else it could leave the mesh in this way.
    pub fn has_lost_a_listener(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Closes the listeners: every `accept` fails from now on. Connections that are open stay.
    fn close(&self) {
        self.listeners.store(None);
        self.gone.cancel();
    }

    fn identify(
        self: &Arc<Self>,
        listener: Listener,
        stream: std::net::TcpStream,
        client: SocketAddr,
    ) -> Result<Captured, Refused> {
        let client = canonical(client);
        let found = match &self.net {
            Net::Kernel(net) => net.original_dst(listener, &stream),
            Net::Fixed(net) => net.original_dst(listener, &stream).map(Meant::dialled),
            Net::Own => stream.local_addr().map(Meant::dialled).map_err(|error| client_gone(&error)),
        };
        match found {
            Ok(Meant { original_dst, endpoint, probe }) => {
                let original_dst = canonical(original_dst);
                Ok(Captured { stream, pod: Arc::clone(self), client, original_dst, endpoint, probe })
            }
            Err(error) => Err(Refused { client, error }),
        }
    }

    fn name(&self) -> String {
        format!("{}/{}", self.workload.namespace, self.workload.name)
    }
}

/// A connection whose end is told by an error of its own socket: the client is gone already.
fn client_gone(error: &io::Error) -> Error {
    Error::new(Kind::DownstreamReset, format!("the client went away: {error}"))
}

fn un_enrolled() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "the pod is no longer enrolled")
}

/// Errors of `accept` that are about the connection that was to be accepted, not about the listener (accept(2)).
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{
        ConnectionAborted, ConnectionRefused, ConnectionReset, HostUnreachable, Interrupted, NetworkDown,
        NetworkUnreachable, TimedOut,
    };
    matches!(
        error.kind(),
        ConnectionAborted
            | ConnectionRefused
            | ConnectionReset
            | HostUnreachable
            | Interrupted
            | NetworkDown
            | NetworkUnreachable
            | TimedOut
    )
}

/// The address without its v4-mapped form.
fn canonical(addr: SocketAddr) -> SocketAddr {
    match addr {
        SocketAddr::V6(v6) => match v6.ip().to_ipv4_mapped() {
            Some(ip) => SocketAddr::from((ip, v6.port())),
            None => addr,
        },
        SocketAddr::V4(_) => addr,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_addresses_become_ipv4_and_scopes_stay() -> Result<(), std::net::AddrParseError> {
        assert_eq!(canonical("[::ffff:10.0.0.1]:80".parse()?), "10.0.0.1:80".parse()?);
        for addr in ["10.0.0.1:80", "[fd00::1]:80", "[fe80::1%3]:80"] {
            assert_eq!(canonical(addr.parse()?).to_string(), addr);
        }
        Ok(())
    }
}
