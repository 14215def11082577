//! The network of the process itself: a gateway's pod has no other, and nothing of it is captured.
//!
//! Dials as any program does, and listens on ports that its configuration names. Never enters another network namespace and never
//! marks a socket. Tested below, and in the lab (`tests/tests/gateway/`).

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwapOption;
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::TcpStream,
};

use super::{Net, PodNet, canonical, is_of_one_connection, sockets};
use crate::state::snapshot::Workload;

/// Pause after a failure to accept that is the whole process's, as for the listeners of pods.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

impl PodNet {
    /// The pod that this process runs in: it dials from where the process is, and none of its connections is captured.
    pub fn own(workload: Arc<Workload>) -> Arc<Self> {
        Self::with(workload, ArcSwapOption::empty(), Net::Own)
    }

    /// Whether it is the pod that this process runs in.
    pub const fn is_own(&self) -> bool {
        matches!(self.net, Net::Own)
    }
}

pub(super) async fn dial(to: SocketAddr) -> io::Result<TcpStream> {
    sockets::into_tokio(sockets::dialler(to)?).connect(to).await
}

/// A connection that came to an [`OpenPort`].
#[derive(Debug)]
pub struct Arrived {
    /// The connection, of no runtime yet.
    pub stream: std::net::TcpStream,
    /// Who opened it.
    pub client: SocketAddr,
    /// The address of this host that it came to.
    pub local: SocketAddr,
}

/// A port of every address of this process's network, both families.
#[derive(Debug)]
pub struct OpenPort(TcpListener);

impl OpenPort {
    /// Listens on it.
    ///
    /// # Errors
    /// Somebody else does, or this process may not.
    pub fn bind(port: u16) -> io::Result<Self> {
        let socket = sockets::bind(port)?;
        sockets::listen(&socket)?;
        Ok(Self(socket.into()))
    }

    /// The same port, for whoever takes its connections from now on.
    ///
    /// # Errors
    /// The process has no file descriptor left.
    pub fn share(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// What takes its connections, watched by the runtime that this is called in.
    ///
    /// # Errors
    /// The system watches no more files.
    pub fn takes(self) -> io::Result<Arrivals> {
        #[expect(unsafe_code, reason = "a standard listener cannot be watched otherwise")]
        // SAFETY: it is a listener of its own, held open and never exchanged for as long as it is watched.
        let watched = unsafe { AsyncFd::register_with_interest(self.0, Interest::READABLE) };
        Ok(Arrivals(watched?))
    }
}

/// Takes the connections of an [`OpenPort`].
#[derive(Debug)]
pub struct Arrivals(AsyncFd<TcpListener>);

impl Arrivals {
    /// The next connection. Cancel safe.
    pub async fn next(&self) -> Arrived {
        loop {
            match self.0.async_io(Interest::READABLE, arrived).await {
                Ok(arrived) => return arrived,
                Err(error) if is_of_one_connection(&error) => {}
                Err(error) => {
                    tracing::warn!(%error, "cannot accept, trying again");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

fn arrived(listener: &TcpListener) -> io::Result<Arrived> {
    let (stream, client) = sockets::accept(listener)?;
    // Gone already, where it has no address any more.
    let gone = |_| io::Error::from(io::ErrorKind::ConnectionAborted);
    let local = canonical(stream.local_addr().map_err(gone)?);
    Ok(Arrived { stream, client: canonical(client), local })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::fixed::tests::workload;

    #[tokio::test]
    async fn both_families_arrive_as_what_they_are_and_a_closed_port_is_free() -> io::Result<()> {
        let port = OpenPort::bind(0)?;
        let number = port.0.local_addr()?.port();
        assert_eq!(
            OpenPort::bind(number).map_err(|error| error.kind()).err(),
            Some(io::ErrorKind::AddrInUse)
        );
        let arrivals = port.share()?.takes()?;
        drop(port);
        let net = PodNet::own(workload());
        for at in [format!("127.0.0.1:{number}"), format!("[::1]:{number}")] {
            let at: SocketAddr = at.parse().map_err(io::Error::other)?;
            let dialled = net.dial(at).await?;
            let arrived = arrivals.next().await;
            assert_eq!((arrived.client, arrived.local), (dialled.local_addr()?, at));
        }
        drop(arrivals);
        assert!(OpenPort::bind(number).is_ok());
        assert!(net.is_own() && net.cookie().is_none());
        Ok(())
    }
}
