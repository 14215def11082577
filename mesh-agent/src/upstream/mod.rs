//! From a permit and an endpoint to a connection: to the app of a pod on this node, through the mesh to a pod on
//! another, or in the clear to what is not in the mesh.
//!
//! Promises: pools belong to one pod and are never shared between pods; an enrolled endpoint is never spoken to in
//! the clear; nothing is dialled from the node's own network namespace. Tested in the lab, with two
//! nodes.

mod carrier;
mod connect;
mod dial;
pub mod message;
mod originate;
mod pod;
mod pool;
mod proxied;
pub mod retry;
mod slot;
mod stream;
mod switch;
mod terms;
mod transitions;
mod usage;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use http::{Request, Response};
use tokio::{
    io::{AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
};

pub use self::{
    dial::Dial,
    originate::has_name,
    pod::{Held, LocalPods, Pod, PodLimits, PodName},
    pool::{AGAIN, Key, Lease, Pool},
    proxied::{spoken, through_proxy},
    stream::UpstreamStream,
    switch::{Io, Switch, Switched},
    transitions::Transitions,
    usage::{RequestPlace, Usage, Used},
};
use crate::{
    body::{Body, Inform},
    error::{Error, Kind, Result},
    policy::Permit,
    report::{FlowGuard, Security},
    state::snapshot::{Cluster, ClusterId, ConnectionPool, Endpoint, Origination, Protocol, Workload},
    tunnel::{Introduction, MESH_TLS_PORT, MeshConnection, PoolKey, Wire},
};

/// How an endpoint is reached.
#[derive(Debug, Clone)]
pub enum Via {
    /// Its pod is on this node: one pass, no TLS, nothing encrypted to be decrypted in the same process; for as long as
    /// the network between the pods would carry a connection (`carrier.rs`).
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

/// Decides how an endpoint is reached. An enrolled pod that this node should hold but does not is waited for, up to
/// `limit`, where it joins the mesh just now, and is refused otherwise; it is never reached in the clear.
pub async fn via(pods: &LocalPods, node: &str, endpoint: &Endpoint, limit: Duration) -> Result<Via> {
    let Some(workload) = &endpoint.workload else { return Ok(Via::Plain) };
    if !workload.enrolled {
        return Ok(pods.transitions().just_left(workload).map_or(Via::Plain, |was| left(pods, node, was)));
    }
    if workload.node.as_deref() != Some(node) {
        return Ok(Via::Mesh(Arc::clone(workload)));
    }
    match pods.get_or_wait(workload, limit).await {
        Some(pod) => Ok(Via::Local(pod)),
        None => Err(Error::new(
            Kind::ConnectFailure,
            format!("pod {}/{} of this node is not enrolled (yet)", workload.namespace, workload.name),
        )),
    }
}

/// The way to a pod that has just left the mesh: what its agent still takes. Of this node's own it is known when they are
/// gone.
fn left(pods: &LocalPods, node: &str, was: Arc<Workload>) -> Via {
    if was.node.as_deref() != Some(node) {
        return Via::Mesh(was);
    }
    pods.get(&was).map_or(Via::Plain, Via::Local)
}

/// Connections on which a tunnel is tried before that is a failure: each may be of an agent that leaves.
const TUNNEL_TRIES: u32 = 3;

/// Begins the facts of an app's new connection.
pub type BeginFlow<'a> = dyn Fn() -> Option<FlowGuard> + Send + Sync + 'a;

/// One exchange's way to an endpoint.
#[derive(Clone, Copy)]
pub struct Destination<'a> {
    /// Where the app listens.
    pub address: SocketAddr,
    /// How it is reached.
    pub via: &'a Via,
    /// What the app speaks.
    pub protocol: Protocol,
    /// Time to connect.
    pub connect_timeout: Duration,
    /// How its connections are kept.
    pub kept: Kept<'a>,
    /// What is called when a connection to an app of this node is made for it; kept for as long as that is open.
    pub flow: Option<&'a BeginFlow<'a>>,
}

/// How the connections of an exchange are kept, and by whom they may be shared.
#[derive(Debug, Clone, Copy)]
pub struct Kept<'a> {
    /// The rule.
    pub pool: &'a ConnectionPool,
    /// Whose rule it is: connections under a rule are its cluster's alone.
    pub cluster: Option<ClusterId>,
    /// How it is protected outside the mesh.
    pub tls: &'a Origination,
    /// What the client's pod has in use of the cluster, where that is limited.
    pub usage: Option<&'a Arc<Usage>>,
    /// Whom the app is told of first of all (`proxyProtocol`).
    pub introduces: Option<Introduction>,
}

impl<'a> Kept<'a> {
    /// Under no rule.
    pub const FREELY: Self = Self {
        pool: &ConnectionPool::UNLIMITED,
        cluster: None,
        tls: &Origination::Plaintext,
        usage: None,
        introduces: None,
    };

    /// As the rule of a cluster says; for nobody but the agent itself.
    pub fn of(cluster: &'a Cluster, usage: Option<&'a Arc<Usage>>) -> Self {
        let ruled = cluster.pool != ConnectionPool::UNLIMITED;
        let cluster_id = ruled.then_some(cluster.state.id);
        let introduces = cluster.proxy_protocol.map(|version| Introduction { version, ends: None });
        Self { pool: &cluster.pool, cluster: cluster_id, tls: &cluster.tls, usage, introduces }
    }

    /// The same, for a client, who has dialled this.
    #[must_use]
    pub fn on_behalf(mut self, client: SocketAddr, dialled: SocketAddr) -> Self {
        if let Some(introduction) = &mut self.introduces {
            introduction.ends = Some((client, dialled));
        }
        self
    }
}

impl Pod {
    /// Sends a normalised request to an endpoint; the response's body is still to come, interim responses go to
    /// `inform`. The lease lives as long as the body. Boxed: it goes from hand to hand.
    pub async fn send(
        &self,
        _permit: &Permit,
        to: &Destination<'_>,
        mut request: Box<Request<Body>>,
        client: SocketAddr,
        inform: &Arc<dyn Inform>,
    ) -> Result<(Response<Body>, Lease)> {
        match to.via {
            Via::Local(pod) => {
                self.carried(pod, to.address.ip(), to.connect_timeout).await?;
                // This agent is the destination's too.
                let app = &pod.identity().id;
                message::client_certificate(request.headers_mut(), Some(&self.identity().id), app);
                pod.send_to_app(to, request, client, inform).await
            }
            Via::Mesh(workload) => {
                let timeout = to.connect_timeout;
                if let Some(introduction) = to.kept.introduces {
                    request.extensions_mut().insert(introduction);
                }
                let connection = self.mesh_connection(workload, to.address, Wire::MeshH2, timeout).await?;
                if connection.wire == Wire::Hbone {
                    // Its agent sees bytes only.
                    let (own, app) = (&self.identity().id, &workload.identity);
                    message::client_certificate(request.headers_mut(), Some(own), app);
                    return Box::pin(self.send_over_tunnel(&connection, to, request, client, inform)).await;
                }
                let sent = connection.send(request, to.address, to.protocol, Some(&**inform)).await;
                Ok((sent?, Lease::shared()))
            }
            Via::Plain => {
                let dial = self.dial_plain(to)?;
                let tls = dial.tls.map(|tls| tls.id);
                let shard = Key::shard(&to.kept);
                let (cluster, introduces) = (to.kept.cluster, to.kept.introduces);
                let key = Key { to: to.address, client: None, cluster, tls, introduces, shard };
                bring_in_form(&mut request, to.protocol);
                if tls.is_some() {
                    message::over_tls(request.uri_mut());
                }
                self.plain.send(key, to.protocol, request, inform, &dial, to.kept).await
            }
        }
    }

    /// The app of this pod, over loopback inside the pod; it is shown the client's address.
    pub async fn send_to_app(
        &self,
        to: &Destination<'_>,
        mut request: Box<Request<Body>>,
        client: SocketAddr,
        inform: &Arc<dyn Inform>,
    ) -> Result<(Response<Body>, Lease)> {
        bring_in_form(&mut request, to.protocol);
        let (client_ip, cluster, shard) = (Some(client.ip()), to.kept.cluster, Key::shard(&to.kept));
        let introduces = to.kept.introduces;
        let key = Key { to: to.address, client: client_ip, cluster, tls: None, introduces, shard };
        let (net, timeout) = (self.net(), to.connect_timeout);
        let dial = Dial {
            net,
            to: to.address,
            as_client: Some(client),
            timeout,
            keepalive: None,
            tls: None,
            introduces,
            flow: to.flow,
        };
        self.apps.send(key, to.protocol, request, inform, &dial, to.kept).await
    }

    /// Opens a byte stream to an endpoint.
    pub async fn open(
        &self,
        _permit: &Permit,
        to: &Destination<'_>,
        client: SocketAddr,
    ) -> Result<UpstreamStream> {
        let timeout = to.connect_timeout;
        match to.via {
            Via::Local(pod) => {
                self.carried(pod, to.address.ip(), timeout).await?;
                let introduces = to.kept.introduces;
                Ok(UpstreamStream::Tcp(pod.open_app(to.address, client, timeout, introduces).await?))
            }
            Via::Mesh(workload) => {
                let mut tries = 1;
                loop {
                    let connection = self.mesh_connection(workload, to.address, Wire::Hbone, timeout).await?;
                    match connection.open_tunnel(to.address, client).await {
                        // Its agent was leaving at that moment, and has not looked at it.
                        Err(error) if error.kind == Kind::RefusedStream && tries < TUNNEL_TRIES => tries += 1,
                        opened => {
                            let mut stream = UpstreamStream::Tunnel(opened?);
                            introduce(&mut stream, to).await?;
                            return Ok(stream);
                        }
                    }
                }
            }
            Via::Plain => self.dial_plain(to)?.open(to.protocol).await,
        }
    }

    /// A connection to what is not in the mesh. (Those between nodes have PINGs, those to apps do not leave the pod.)
    ///
    /// # Errors
    /// [`Kind::TlsFailure`], where the rule asks for TLS that there is not: it is never dialled in the clear then.
    fn dial_plain<'a>(&'a self, to: &Destination<'a>) -> Result<Dial<'a>> {
        let refused =
            |why: &str| Error::new(Kind::TlsFailure, format!("{} is not dialled: {why}", to.address));
        let tls = match to.kept.tls {
            Origination::Plaintext => None,
            Origination::Tls(tls) => Some(&**tls),
            Origination::MeshOnly => {
                return Err(refused("it is not in the mesh, and its rule says ISTIO_MUTUAL"));
            }
            Origination::Broken(why) => return Err(refused(why)),
        };
        Ok(Dial {
            net: self.net(),
            to: to.address,
            as_client: None,
            timeout: to.connect_timeout,
            keepalive: to.kept.pool.keepalive,
            tls,
            introduces: to.kept.introduces,
            flow: None,
        })
    }

    /// Whether the network lets this pod's bytes pass to a destination on this node.
    ///
    /// # Errors
    /// Those of dialling, where it does not.
    pub async fn pass(&self, to: &Destination<'_>) -> Result<()> {
        match to.via {
            Via::Local(pod) => self.carried(pod, to.address.ip(), to.connect_timeout).await,
            Via::Mesh(_) | Via::Plain => Ok(()),
        }
    }

    /// Dials the app of this pod; it is shown the client's address.
    pub async fn open_app(
        &self,
        app: SocketAddr,
        client: SocketAddr,
        timeout: Duration,
        introduces: Option<Introduction>,
    ) -> Result<TcpStream> {
        let (net, as_client) = (self.net(), Some(client));
        let dial =
            Dial { net, to: app, as_client, timeout, keepalive: None, tls: None, introduces, flow: None };
        dial.connect().await
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
        if let Some(connection) = self.tunnels.ready(&key) {
            return Ok(connection);
        }
        let net = self.net();
        let (to, as_client, keepalive) = (destination, None, None);
        let (tls, introduces, flow) = (None, None, None);
        let dial = Dial { net, to, as_client, timeout, keepalive, tls, introduces, flow };
        let joining = || self.transitions.joining_until(workload);
        // Boxed: rare, and every request would have to make room for it.
        Box::pin(self.tunnels.get(&key, self.identity(), dial.connect_once_it_listens(joining))).await
    }
}

/// Tells the app at the other end of a fresh byte stream whom it is for, where it is to be told.
pub(crate) async fn introduce(stream: &mut (impl AsyncWrite + Unpin), to: &Destination<'_>) -> Result<()> {
    let Some(introduction) = to.kept.introduces else { return Ok(()) };
    let written = stream.write_all(&introduction.bytes()).await;
    let failed =
        |error| Error::new(Kind::ConnectFailure, format!("{} has closed at once: {error}", to.address));
    written.map_err(failed)
}

fn bring_in_form(request: &mut Request<Body>, protocol: Protocol) {
    let (mut parts, body) = std::mem::take(request).into_parts();
    match protocol {
        Protocol::Http2 => message::for_http2(&mut parts),
        Protocol::Http1 | Protocol::Opaque => message::for_http1(&mut parts),
    }
    *request = Request::from_parts(parts, body);
}
