//! From a permit and an endpoint to a connection: to the app of a pod on this node, through the mesh to a pod on
//! another, or in the clear to what is not in the mesh.
//!
//! Promises: pools belong to one pod and are never shared between pods; an enrolled endpoint is never spoken to in
//! the clear; nothing is dialled from the node's own network namespace. Tested in the lab, with two
//! nodes.

mod dial;
pub mod message;
mod pod;
mod pool;
pub mod retry;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use http::{Request, Response};
use tokio::net::TcpStream;

pub use self::{
    dial::Dial,
    pod::{LocalPods, Pod, PodName},
    pool::{Key, Lease, Pool},
};
use crate::{
    body::Body,
    error::{Error, Kind, Result},
    policy::Permit,
    report::Security,
    state::snapshot::{Endpoint, Protocol, Workload},
    tunnel::{ByteStream, MESH_TLS_PORT, MeshConnection, PoolKey, Wire},
};

/// How an endpoint is reached.
#[derive(Debug, Clone)]
pub enum Via {
    /// Its pod is on this node: one pass, no TLS, nothing encrypted to be decrypted in the same process.
    Local(Arc<Pod>),
    /// Its pod is enrolled on another node: mTLS to its port 15008.
    Mesh(Arc<Workload>),
    /// It is not in the mesh.
    Plain,
}

impl Via {
    /// How the bytes travel, for metrics. A local pass never leaves the process: as good as mTLS, and both identities
    /// are the kernel's.
    pub fn security(&self) -> Security {
        match self {
            Self::Local(_) | Self::Mesh(_) => Security::MutualTls,
            Self::Plain => Security::None,
        }
    }
}

/// Decides how an endpoint is reached. An enrolled pod that this node should hold but does not is refused, never
/// reached in the clear.
pub fn via(pods: &LocalPods, node: &str, endpoint: &Endpoint) -> Result<Via> {
    let Some(workload) = endpoint.workload.as_ref().filter(|workload| workload.enrolled) else {
        return Ok(Via::Plain);
    };
    if workload.node.as_deref() != Some(node) {
        return Ok(Via::Mesh(Arc::clone(workload)));
    }
    match pods.get(workload) {
        Some(pod) => Ok(Via::Local(pod)),
        None => Err(Error::new(
            Kind::ConnectFailure,
            format!("pod {}/{} of this node is not enrolled (yet)", workload.namespace, workload.name),
        )),
    }
}

/// One exchange's way to an endpoint.
#[derive(Debug)]
pub struct Destination<'a> {
    /// Where the app listens.
    pub address: SocketAddr,
    /// How it is reached.
    pub via: &'a Via,
    /// What the app speaks.
    pub protocol: Protocol,
    /// Time to connect.
    pub connect_timeout: Duration,
}

impl Pod {
    /// Sends a normalised request to an endpoint; the response's body is still to come. The lease lives as long as the
    /// body.
    pub async fn send(
        &self,
        _permit: &Permit,
        to: &Destination<'_>,
        request: Request<Body>,
        client: SocketAddr,
    ) -> Result<(Response<Body>, Lease)> {
        let timeout = to.connect_timeout;
        match to.via {
            Via::Local(pod) => pod.send_to_app(to.address, to.protocol, request, client, timeout).await,
            Via::Mesh(workload) => {
                let connection = self.mesh_connection(workload, to.address, Wire::MeshH2, timeout).await?;
                self.send_through_mesh(&connection, to, request).await
            }
            Via::Plain => {
                let key = Key { to: to.address, client: None };
                let request = in_form(request, to.protocol);
                let dial = Dial { net: self.net(), to: to.address, as_client: None, timeout };
                self.plain.send(key, to.protocol, request, &dial).await
            }
        }
    }

    async fn send_through_mesh(
        &self,
        connection: &MeshConnection,
        to: &Destination<'_>,
        request: Request<Body>,
    ) -> Result<(Response<Body>, Lease)> {
        match connection.wire {
            Wire::MeshH2 => {
                let response = connection.send(request, to.address, to.protocol).await?;
                Ok((response, Lease::shared()))
            }
            Wire::Hbone => self.send_over_tunnel(connection, to, request).await,
        }
    }

    /// The app of this pod, over loopback inside the pod; it is shown the client's address.
    pub async fn send_to_app(
        &self,
        app: SocketAddr,
        protocol: Protocol,
        request: Request<Body>,
        client: SocketAddr,
        timeout: Duration,
    ) -> Result<(Response<Body>, Lease)> {
        let key = Key { to: app, client: Some(client.ip()) };
        let dial = Dial { net: self.net(), to: app, as_client: Some(client), timeout };
        self.apps.send(key, protocol, in_form(request, protocol), &dial).await
    }

    /// Opens a byte stream to an endpoint.
    pub async fn open(
        &self,
        _permit: &Permit,
        to: &Destination<'_>,
        client: SocketAddr,
    ) -> Result<Box<dyn ByteStream>> {
        let timeout = to.connect_timeout;
        match to.via {
            Via::Local(pod) => Ok(Box::new(pod.open_app(to.address, client, timeout).await?)),
            Via::Mesh(workload) => {
                let connection = self.mesh_connection(workload, to.address, Wire::Hbone, timeout).await?;
                connection.open_tunnel(to.address).await
            }
            Via::Plain => {
                let dial = Dial { net: self.net(), to: to.address, as_client: None, timeout };
                Ok(Box::new(dial.connect().await?))
            }
        }
    }

    /// Dials the app of this pod; it is shown the client's address.
    pub async fn open_app(
        &self,
        app: SocketAddr,
        client: SocketAddr,
        timeout: Duration,
    ) -> Result<TcpStream> {
        Dial { net: self.net(), to: app, as_client: Some(client), timeout }.connect().await
    }

    async fn mesh_connection(
        &self,
        workload: &Arc<Workload>,
        app: SocketAddr,
        wire: Wire,
        timeout: Duration,
    ) -> Result<MeshConnection> {
        let destination = SocketAddr::new(app.ip(), MESH_TLS_PORT);
        let key = PoolKey::new(
            self.identity().id.clone(),
            self.address_towards(destination.ip()),
            destination,
            std::slice::from_ref(&workload.identity),
            wire,
        );
        let dial = Dial { net: self.net(), to: destination, as_client: None, timeout };
        self.tunnels.get(&key, self.identity(), dial.connect()).await
    }
}

fn in_form(request: Request<Body>, protocol: Protocol) -> Request<Body> {
    let (mut parts, body) = request.into_parts();
    match protocol {
        Protocol::Http2 => message::for_http2(&mut parts),
        Protocol::Http1 | Protocol::Opaque => message::for_http1(&mut parts),
    }
    Request::from_parts(parts, body)
}
