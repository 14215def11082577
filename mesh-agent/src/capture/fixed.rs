//! Capture without a kernel: ordinary loopback sockets, and told rather than found original destinations.
//!
//! For tests in one process and for trying the path by hand. Never needs privileges. Tested below.

use std::{
    collections::HashMap,
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    sync::{Arc, Mutex, PoisonError},
};

use tokio::net::TcpStream;

use super::{Listener, Net, PodNet, client_gone};
use crate::{
    error::{Error, Kind, Result},
    state::snapshot::Workload,
};

/// What stands in for the kernel.
#[derive(Debug, Default)]
pub(super) struct FixedNet {
    told: Mutex<Told>,
}

#[derive(Debug, Default)]
struct Told {
    original_dst: [Option<SocketAddr>; 3],
    redirects: HashMap<SocketAddr, SocketAddr>,
}

impl PodNet {
    /// A pod whose listeners are on ephemeral loopback ports ([`PodNet::listener_addr`]) and which dials from the
    /// agent's own network. To be called inside a tokio runtime.
    pub fn fixed(workload: Arc<Workload>) -> io::Result<Arc<Self>> {
        let listeners = [listen()?, listen()?, listen()?];
        Ok(Self::new(workload, listeners, Net::Fixed(FixedNet::default())))
    }

    /// Sets what connections to this listener of a [`PodNet::fixed`] have dialled. Until then the inbound and mesh
    /// listeners say their own address and the outbound one refuses. No effect on a pod of the kernel's.
    pub fn set_original_dst(&self, listener: Listener, dst: SocketAddr) {
        if let Net::Fixed(net) = &self.net {
            net.told().original_dst[listener as usize] = Some(dst);
        }
    }

    /// Has a [`PodNet::fixed`] dial `to` when it is asked for `from`, for example the mesh listener of another. No
    /// effect on a pod of the kernel's.
    pub fn redirect(&self, from: SocketAddr, to: SocketAddr) {
        if let Net::Fixed(net) = &self.net {
            net.told().redirects.insert(from, to);
        }
    }
}

impl FixedNet {
    pub(super) async fn dial(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let to = self.told().redirects.get(&to).copied().unwrap_or(to);
        let stream = TcpStream::connect(to).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    pub(super) fn original_dst(
        &self,
        listener: Listener,
        stream: &std::net::TcpStream,
    ) -> Result<SocketAddr> {
        match (self.told().original_dst[listener as usize], listener) {
            (Some(dst), _) => Ok(dst),
            (None, Listener::Outbound) => {
                Err(Error::new(Kind::IllegalDestination, "no original destination was set"))
            }
            (None, _) => stream.local_addr().map_err(|error| client_gone(&error)),
        }
    }

    fn told(&self) -> std::sync::MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn listen() -> io::Result<TcpListener> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        identity::SpiffeId,
        state::snapshot::{Authentication, CapturePolicy},
    };

    pub(crate) fn workload() -> Arc<Workload> {
        let text = |s: &str| Arc::<str>::from(s);
        let identity = SpiffeId {
            trust_domain: text("cluster.local"),
            namespace: text("default"),
            service_account: text("a"),
        };
        Arc::new(Workload {
            namespace: text("default"),
            name: text("a"),
            ips: Vec::new(),
            node: None,
            identity,
            labels: BTreeMap::new(),
            view: None,
            enrolled: true,
            netns: None,
            announced: false,
            capture: CapturePolicy::default(),
            authorization: Arc::default(),
            authentication: Authentication::default(),
            workload_name: text("a"),
            canonical_service: text("a"),
            canonical_revision: text("latest"),
        })
    }

    #[tokio::test]
    async fn captured_with_the_original_destination_set() -> io::Result<()> {
        let pod = PodNet::fixed(workload())?;
        let dst = SocketAddr::from(([10, 0, 0, 1], 80));
        pod.set_original_dst(Listener::Outbound, dst);
        let app = TcpStream::connect(pod.listener_addr(Listener::Outbound)?).await?;
        let captured = pod.accept(Listener::Outbound).await?;
        assert_eq!((captured.original_dst, captured.client), (dst, app.local_addr()?));
        Ok(())
    }

    #[tokio::test]
    async fn dials_where_it_was_redirected_to() -> io::Result<()> {
        let (a, b) = (PodNet::fixed(workload())?, PodNet::fixed(workload())?);
        let mesh = SocketAddr::from(([10, 0, 0, 2], 15008));
        a.redirect(mesh, b.listener_addr(Listener::Mesh)?);
        let stream = a.dial(mesh).await?;
        let captured = b.accept(Listener::Mesh).await?;
        assert_eq!(captured.client, stream.local_addr()?);
        assert_eq!(captured.original_dst, b.listener_addr(Listener::Mesh)?);
        Ok(())
    }

    #[tokio::test]
    async fn closing_ends_accept_and_frees_the_ports() -> io::Result<()> {
        let pod = PodNet::fixed(workload())?;
        let addr = pod.listener_addr(Listener::Inbound)?;
        let waiting = tokio::spawn({
            let pod = Arc::clone(&pod);
            async move { pod.accept(Listener::Inbound).await.map(|_| ()) }
        });
        pod.close();
        let ended = waiting.await.map_err(io::Error::other)?;
        assert_eq!(ended.map_err(|error| error.kind()), Err(io::ErrorKind::NotConnected));
        assert!(TcpStream::connect(addr).await.is_err());
        Ok(())
    }
}
