//! The sockets of a pod the kernel programs know: what an accepted connection was meant for, and dialling from inside.
//!
//! What is written on a socket here is what makes it the agent's own: `mesh_common::maps::SocketFacts`. Tested in the
//! lab.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd,
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use aya::maps::{Map, MapData, MapError, SkStorage};
use mesh_common::{
    addr::Addr,
    maps::{SOCKETS, SocketFacts, kind, port},
};
use tokio::net::TcpStream;

use super::{Listener, Meant, canonical, client_gone, netns::Netns, sockets};
use crate::error::{Error, Kind, Result};

/// One pod's network namespace and its way to the socket storage.
#[derive(Debug)]
pub(super) struct KernelNet {
    netns: Netns,
    facts: Facts,
    /// Source addresses are taken in turn.
    next_source: AtomicU32,
}

impl KernelNet {
    pub(super) fn new(netns: Netns, facts: Facts) -> Self {
        Self { netns, facts, next_source: AtomicU32::new(fastrand::u32(..)) }
    }

    pub(super) const fn netns(&self) -> &Netns {
        &self.netns
    }

    pub(super) async fn dial(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let socket = self.netns.enter(|| sockets::dialler(to))?;
        self.facts.write(&socket, kind::DIALLER, Addr::default())?;
        sockets::into_tokio(socket).connect(to).await
    }

    pub(super) async fn dial_from(
        &self,
        from: IpAddr,
        to: SocketAddr,
        before: impl FnOnce(SocketAddr),
    ) -> io::Result<TcpStream> {
        let socket = self.netns.enter(|| sockets::bound_dialler(from, to))?;
        self.facts.write(&socket, kind::DIALLER, Addr::default())?;
        let own = socket.local_addr()?.as_socket();
        before(own.ok_or_else(|| io::Error::other("a bound socket has no address"))?);
        sockets::into_tokio(socket).connect(to).await
    }

    pub(super) async fn dial_app(&self, to: SocketAddr, client: SocketAddr) -> io::Result<TcpStream> {
        let n = self.next_source.fetch_add(1, Ordering::Relaxed);
        // Where one source address has no port left, the next may.
        match self.dial_app_from(n, to, client).await {
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {}
            dialled => return dialled,
        }
        self.dial_app_from(n.wrapping_add(1), to, client).await.map_err(|error| match error.kind() {
            io::ErrorKind::AddrNotAvailable => io::Error::new(
                error.kind(),
                format!("the pod has no source port left for another connection to {to} ({error})"),
            ),
            _ => error,
        })
    }

    async fn dial_app_from(&self, n: u32, to: SocketAddr, client: SocketAddr) -> io::Result<TcpStream> {
        let socket = self.netns.enter(|| sockets::app_dialler(to, n))?;
        self.facts.write(&socket, kind::DIALLER, client.into())?;
        sockets::into_tokio(socket).connect(to).await
    }

    /// What an accepted connection was meant for, and what the kernel knows of it; an error says why the agent does not
    /// serve it.
    pub(super) fn original_dst(&self, listener: Listener, stream: &std::net::TcpStream) -> Result<Meant> {
        let gone = |error: io::Error| client_gone(&error);
        match listener {
            Listener::Outbound => match self.facts.read(stream).map_err(gone)? {
                Some(facts) if facts.kind == kind::ACCEPTED && facts.addr.port != 0 => {
                    let meant = Meant::dialled(facts.addr.into());
                    Ok(Meant { endpoint: facts.endpoint, ..meant })
                }
                _ => Err(illegal("the outbound port was dialled itself: nothing says what was meant")),
            },
            Listener::Inbound => {
                let local = canonical(stream.local_addr().map_err(gone)?);
                match local.port() {
                    port::OUTBOUND | port::INBOUND | port::MESH => {
                        Err(illegal(format!("{local} is the agent's own, not an app's")))
                    }
                    _ => {
                        let facts = self.facts.read(stream).map_err(gone)?;
                        let probe = facts.is_some_and(|facts| facts.kind == kind::PROBE);
                        Ok(Meant { probe, ..Meant::dialled(local) })
                    }
                }
            }
            Listener::Mesh => Ok(Meant::dialled(stream.local_addr().map_err(gone)?)),
        }
    }
}

fn illegal(text: impl Into<String>) -> Error {
    Error::new(Kind::IllegalDestination, text)
}

/// The socket storage, from outside the kernel.
#[derive(Debug)]
pub(super) struct Facts {
    for_reading: SkStorage<MapData, SocketFacts>,
    /// A handle of its own for each pod, so that pods do not wait for one another.
    for_writing: Mutex<SkStorage<MapData, SocketFacts>>,
}

impl Facts {
    /// Opens the storage pinned under `maps`.
    pub(super) fn open(maps: &Path) -> std::result::Result<Self, MapError> {
        let open = || Map::from_map_data(MapData::from_pin(maps.join(SOCKETS))?)?.try_into();
        Ok(Self { for_reading: open()?, for_writing: Mutex::new(open()?) })
    }

    /// Says what this socket of the agent's is.
    pub(super) fn write(&self, socket: &impl AsRawFd, kind: u8, addr: Addr) -> io::Result<()> {
        let facts = SocketFacts { kind, addr, ..SocketFacts::default() };
        self.for_writing
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(socket, facts, 0)
            .map_err(into_io)
    }

    /// What is known of this socket.
    pub(super) fn read(&self, socket: &impl AsRawFd) -> io::Result<Option<SocketFacts>> {
        match self.for_reading.get(socket, 0) {
            Ok(facts) => Ok(Some(facts)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {
                Ok(None)
            }
            Err(error) => Err(into_io(error)),
        }
    }
}

/// The system's error where there is one, so that its kind is not lost.
fn into_io(error: MapError) -> io::Error {
    match error {
        MapError::SyscallError(error) => error.io_error,
        other => io::Error::other(other),
    }
}
