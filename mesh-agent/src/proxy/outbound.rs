//! From a pod's app to an endpoint.
//!
//! Reads top to bottom: accept → identify → resolve → detect → then HTTP (in `http.rs`, request by request) or opaque
//! bytes (here, choose → permit → open → copy → report).

use std::{net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::OwnedSemaphorePermit,
    time::timeout,
};

use super::{
    Ends, Mesh, acceptor, admit, assert_small, choose,
    copied::Copied,
    cut,
    downstream::{self, Server},
    health,
    inbound::Inbound,
    inspected, lasting, learn_end, next,
    permits::{self, Stands},
    pod_name,
    resolve::{Resolved, ServicePort, resolve, silent},
    spawn, unsent, vouched,
};
use crate::{
    balance::{self, Chosen, Wish},
    capture::{Captured, Listener},
    copy::Moved,
    detect::{self, Prefixed},
    error::{Error, Kind, Result},
    policy::Ruling,
    report::{FlowGuard, FlowKey, Peer, RequestProtocol, Side, TcpLabels},
    route::{self, StreamFacts},
    state::snapshot::{Backend, Cluster, Endpoint, Protocol, Workload},
    upstream::{self, Destination, Kept, Pod, UpstreamStream, Used, Via},
    workers::Seat,
};

/// How long an undeclared port's client may be silent before the endpoint is dialled, in case the server speaks first.
pub(super) const SERVER_FIRST_AFTER: Duration = Duration::from_millis(50);

/// Time to connect where no DestinationRule says another (Istio's default).
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// What a pipe between two ends of one pass holds, bytes.
const PIPE: usize = 64 << 10;

/// Largest future of one connection, bytes: idle connections must be cheap.
const CONNECTION_FUTURE: usize = 2 << 10;

/// Takes a pod's captured connections until its listener is gone.
pub async fn serve(mesh: Arc<Mesh>, pod: Arc<Pod>) {
    let Some(acceptor) = acceptor(&pod, Listener::Outbound).await else { return };
    while let Some(captured) = next(&mesh, &pod, &acceptor, Side::Source).await {
        let Some(place) = admit(&mesh, &pod, Side::Source, (&captured).into()) else { continue };
        spawn(&mesh, &pod.drain, |seat| {
            let connection = connection(Arc::clone(&mesh), Arc::clone(&pod), captured, (place, seat));
            assert_small(connection, CONNECTION_FUTURE)
        });
    }
}

/// What every request or byte of one outbound connection shares.
#[derive(Debug)]
pub(super) struct Outbound {
    pub mesh: Arc<Mesh>,
    pub pod: Arc<Pod>,
    /// The pod whose app dials: told by the network namespace the connection was captured in.
    pub source: Peer,
    pub ends: Ends,
    /// The client as others are shown it: at an address of the pod's own, whatever the app has bound itself to.
    pub shown: SocketAddr,
    pub flow: FlowGuard,
    /// Its place among the pod's connections, and on its thread.
    _place: (OwnedSemaphorePermit, Option<Seat>),
}

async fn connection(
    mesh: Arc<Mesh>,
    pod: Arc<Pod>,
    captured: Captured,
    place: (OwnedSemaphorePermit, Option<Seat>),
) {
    let ends = Ends::from(&captured);
    let shown = pod.vouched_address(ends.client);
    let outbound = Arc::new(Outbound::new(mesh, pod, ends, shown, place));
    if let Err(error) = outbound.carry(captured.stream).await {
        outbound.flow.learn(|facts| facts.flag = Some(error.kind.row().flag));
        outbound.refused(&error);
    }
}

/// How a connection goes on for as long as it is open.
#[expect(clippy::large_enum_variant, reason = "made once for each connection, and taken apart at once")]
enum Course {
    /// Its requests are answered one by one.
    Requests(Server, Prefixed<TcpStream>, Protocol),
    /// Its bytes are copied.
    Bytes(Prefixed<TcpStream>, Opened, Option<Arc<Cluster>>),
}

impl Outbound {
    /// `shown`: the client as others are shown it.
    pub(super) fn new(
        mesh: Arc<Mesh>,
        pod: Arc<Pod>,
        ends: Ends,
        shown: SocketAddr,
        place: (OwnedSemaphorePermit, Option<Seat>),
    ) -> Self {
        let workload = pod.workload();
        let flow = mesh.reporter.flow(&workload, FlowKey::Outbound(ends.client, ends.original_dst));
        Self { mesh, pod, source: vouched(&workload), ends, shown, flow, _place: place }
    }

    async fn carry(self: &Arc<Self>, client: std::net::TcpStream) -> Result<()> {
        let client = Captured::open(client)?;
        // Boxed, each of them: finding out is over soon, and no connection is to hold the room of another kind of it.
        match Box::pin(self.course(client)).await? {
            Course::Requests(server, client, version) => {
                Box::pin(downstream::serve(server, client, unsent::of_socket, version)).await
            }
            Course::Bytes(client, server, cluster) => Box::pin(self.copy(client, server, cluster)).await,
        }
    }

    async fn course(self: &Arc<Self>, client: TcpStream) -> Result<Course> {
        let snapshot = self.mesh.snapshot();
        match resolve(&snapshot, &self.pod.workload(), self.ends)? {
            Resolved::Service(port) => self.to_service(Prefixed::new(client), port).await,
            Resolved::Pod(workload) => self.to_address(client, Some(workload)).await,
            Resolved::Unknown => self.to_address(client, None).await,
        }
    }

    async fn to_service(
        self: &Arc<Self>,
        mut client: Prefixed<TcpStream>,
        port: ServicePort,
    ) -> Result<Course> {
        self.flow.learn(|facts| facts.service = Some(Arc::clone(&port.cluster.host)));
        let protocol = match port.cluster.protocol {
            Some(Protocol::Opaque) => Protocol::Opaque,
            Some(Protocol::Http1 | Protocol::Http2) => self.http_version(&mut client).await?,
            None => return Box::pin(self.detect(client, port)).await,
        };
        self.as_protocol(client, port, protocol).await
    }

    async fn as_protocol(
        self: &Arc<Self>,
        mut client: Prefixed<TcpStream>,
        port: ServicePort,
        protocol: Protocol,
    ) -> Result<Course> {
        match protocol {
            Protocol::Opaque => {
                let cluster = self.routed(&mut client, port).await?;
                let server = self.open(&cluster).await?;
                Ok(Course::Bytes(client, server, Some(cluster)))
            }
            version => {
                let server = Server::Outbound(Arc::clone(self), port.cluster);
                Ok(Course::Requests(server, client, version))
            }
        }
    }

    /// The cluster that serves a connection: of the service's routes, or who stands in for that.
    async fn routed(&self, client: &mut Prefixed<TcpStream>, port: ServicePort) -> Result<Arc<Cluster>> {
        let cluster = self.by_route(client, port).await?;
        Ok(Arc::clone(self.serving(&cluster)))
    }

    /// The cluster that the service's `tls` and `tcp` routes choose; the whole service where none of them holds.
    async fn by_route(&self, client: &mut Prefixed<TcpStream>, port: ServicePort) -> Result<Arc<Cluster>> {
        if port.streams.is_empty() {
            return Ok(port.cluster);
        }
        // Boxed: few ports have routes that ask for a server name.
        let name =
            if route::needs_sni(&port.streams) { Box::pin(self.server_name(client)).await? } else { None };
        let workload = self.pod.workload();
        let facts = StreamFacts {
            sni: name.as_deref(),
            destination: self.ends.original_dst.ip(),
            port: port.cluster.port,
            source: &workload,
            source_ip: self.shown.ip(),
        };
        let Some(route) = route::find_stream(&port.streams, &facts) else { return Ok(port.cluster) };
        self.flow.learn(|facts| facts.route = Some(Arc::clone(&route.name)));
        match &route::draw(&route.backends).backend {
            Backend::Cluster(cluster) => Ok(Arc::clone(cluster)),
            Backend::Missing(what) => {
                Err(Error::new(Kind::NoHealthyUpstream, format!("{}: {what}", route.origin)))
            }
        }
    }

    /// The name in the client's `ClientHello`; none where it says something else, or nothing within the limit.
    async fn server_name(&self, client: &mut Prefixed<TcpStream>) -> Result<Option<String>> {
        match timeout(self.mesh.limits.detection_timeout, detect::server_name(client)).await {
            Ok(Ok(name)) => Ok(name),
            Ok(Err(error)) => Err(Error::new(Kind::DownstreamReset, format!("client went away: {error}"))),
            Err(_) => Ok(None),
        }
    }

    /// A declared HTTP port whose client says nothing within the limit is closed; there is nothing to answer.
    async fn http_version(&self, client: &mut Prefixed<TcpStream>) -> Result<Protocol> {
        match timeout(self.mesh.limits.detection_timeout, detect::http_version(client)).await {
            Ok(Ok(version)) => Ok(version),
            Ok(Err(error)) => Err(Error::new(Kind::DownstreamReset, format!("client went away: {error}"))),
            Err(_) => {
                let limit = self.mesh.limits.detection_timeout;
                Err(Error::new(Kind::BadRequest, format!("no request within {limit:?}")))
            }
        }
    }

    /// An undeclared port: the client's first bytes tell, unless the server speaks first.
    async fn detect(self: &Arc<Self>, mut client: Prefixed<TcpStream>, port: ServicePort) -> Result<Course> {
        let limit = self.mesh.limits.detection_timeout;
        let gone = |error| Error::new(Kind::DownstreamReset, format!("client went away: {error}"));
        if let Ok(protocol) = timeout(SERVER_FIRST_AFTER, detect::by_first_bytes(&mut client)).await {
            let protocol = protocol.map_err(gone)?;
            return self.as_protocol(client, port, protocol).await;
        }
        // Whoever is silent for so long has no server name to tell either.
        let cluster =
            self.routed(&mut client, ServicePort { streams: silent(&port), ..port.clone() }).await?;
        let mut server = self.open(&cluster).await?;
        let mut greeting = vec![0; 1 << 10];
        let first = tokio::select! {
            protocol = detect::by_first_bytes(&mut client) => First::Client(protocol.map_err(gone)?),
            read = server.stream.read(&mut greeting) => First::Server(read),
            () = tokio::time::sleep(limit) => First::Nobody,
        };
        match first {
            First::Client(protocol @ (Protocol::Http1 | Protocol::Http2)) => {
                drop(server);
                self.as_protocol(client, port, protocol).await
            }
            First::Client(Protocol::Opaque) if route::needs_sni(&port.streams) => {
                drop(server);
                self.as_protocol(client, port, Protocol::Opaque).await
            }
            First::Nobody if port.routed => Err(Error::new(
                Kind::BadRequest,
                format!("nothing known within {limit:?}, on a port whose requests are routed"),
            )),
            First::Client(Protocol::Opaque) | First::Nobody => {
                Ok(Course::Bytes(client, server, Some(cluster)))
            }
            First::Server(read) => {
                let read = read.map_err(|error| closed_by_server(&server, &error))?;
                client.write_all(&greeting[..read]).await.map_err(gone)?;
                server.received = read as u64;
                Ok(Course::Bytes(client, server, Some(cluster)))
            }
        }
    }

    /// A pod dialled by its own address, or an address that the mesh does not know: bytes, whatever they are.
    async fn to_address(&self, client: TcpStream, workload: Option<Arc<Workload>>) -> Result<Course> {
        let endpoint = Arc::new(Endpoint::alone(self.ends.original_dst, workload));
        let server = self.open_endpoint(endpoint, Protocol::Opaque, CONNECT_TIMEOUT, Kept::FREELY).await?;
        Ok(Course::Bytes(Prefixed::new(client), server, None))
    }

    /// Tells that the connection, or something on it, is refused.
    pub(super) fn refused(&self, error: &Error) {
        let (client, dialled) = (self.ends.client, Some(self.ends.original_dst));
        self.mesh.reporter.refused(Side::Source, &self.pod.workload(), client, dialled, error);
    }

    /// Who serves what is for this cluster.
    pub(super) fn serving<'c>(&self, cluster: &'c Arc<Cluster>) -> &'c Arc<Cluster> {
        super::serving(&self.mesh, cluster, || self.pod.workload())
    }

    /// What the client has dialled.
    pub(super) fn dialled(&self) -> SocketAddr {
        self.ends.original_dst
    }

    pub(super) async fn open(&self, cluster: &Cluster) -> Result<Opened> {
        let place = self.pod.usage(cluster).map_or(Ok(None), |usage| usage.stream(&cluster.pool));
        let place = place.inspect_err(|error| {
            if let Kind::Full(limit) = error.kind {
                self.mesh.reporter.overflowed(cluster, limit);
            }
        })?;
        // What the kernel has chosen for the connection stands: others of the same service go there without the agent, and
        // together they are to have the shares that they should.
        let by_kernel = self.mesh.endpoints.address(self.ends.endpoint);
        let by_kernel = by_kernel.and_then(|address| balance::chosen(cluster, address));
        let hash = balance::key(cluster, None, self.shown.ip()).hash;
        let wish = Wish { hash, ..Wish::default() };
        let mut chosen = match by_kernel {
            Some(chosen) => chosen,
            None => choose::endpoint(&self.mesh, &self.pod, cluster, &wish, Some(self.dialled()))?,
        };
        let endpoint = Arc::clone(&chosen.endpoint);
        let (timeout, kept) = (cluster.connect_timeout, Kept::of(cluster, None));
        let kept = kept.on_behalf(self.shown, self.dialled());
        // A proxy that is to be asked has to speak HTTP, and says so where TLS begins.
        let protocol = cluster.tunnel.as_ref().map_or(Protocol::Opaque, |_| upstream::spoken(cluster));
        let mut opened = self.open_endpoint(Arc::clone(&endpoint), protocol, timeout, kept).await;
        if let Some(tunnel) = &cluster.tunnel {
            // Boxed: rare, and every connection would have to make room for it.
            opened = match opened {
                Ok(found) => {
                    Box::pin(upstream::through_proxy(found.stream, tunnel, cluster, endpoint.address))
                        .await
                        .map(|stream| Opened { stream, ..found })
                }
                failed => failed,
            };
        }
        health::timed(Some(&mut chosen), health::pace_of_opened(&opened));
        health::learn(&self.mesh.reporter, cluster, &endpoint, || health::of_opened(&opened));
        let in_use = InUse { _chosen: Some(chosen), _place: place };
        opened.map(|opened| Opened { _in_use: in_use, ..opened })
    }

    async fn open_endpoint(
        &self,
        endpoint: Arc<Endpoint>,
        protocol: Protocol,
        connect_timeout: Duration,
        kept: Kept<'_>,
    ) -> Result<Opened> {
        let via = upstream::via(&self.mesh.pods, &self.mesh.node, &endpoint, connect_timeout).await?;
        let (ruling, standing) = permits::connection_to(&self.mesh, self.asks(), &via, &endpoint)?;
        let destination =
            Destination { address: endpoint.address, via: &via, protocol, connect_timeout, kept, flow: None };
        // Known even if nothing comes of it.
        self.flow.learn(|facts| learn_end(facts, &endpoint, &via, RequestProtocol::Tcp));
        // Boxed: dialling is over soon, copying lasts.
        let (stream, is_read, standing) = match ruling {
            Ruling::Permitted(permit) => {
                (Box::pin(self.pod.open(&permit, &destination, self.shown)).await?, false, standing)
            }
            Ruling::BytesDecide => (self.open_inspected(&destination, standing).await?, true, None),
        };
        let passed = || {
            let service = self.mesh.snapshot().inbound.get(&endpoint.address).map(|c| Arc::clone(&c.host));
            self.passed_flow(&endpoint, service, RequestProtocol::Tcp)
        };
        let flow = (matches!(via, Via::Local(_)) && !is_read).then(passed).flatten();
        let in_use = InUse::default();
        Ok(Opened { stream, endpoint, via, received: 0, is_read, standing, _in_use: in_use, _flow: flow })
    }

    /// The other end of a pass within the node, where the bytes decide what is permitted: what another node's agent does
    /// with a tunnel is done here with a pipe.
    async fn open_inspected(&self, to: &Destination<'_>, standing: Stands) -> Result<UpstreamStream> {
        let (Via::Local(pod), Some(standing)) = (to.via, standing) else {
            return Err(Error::new(Kind::Denied, "bytes are read at the node of the pod they are for"));
        };
        Box::pin(self.pod.pass(to)).await?;
        let (mut near, far) = tokio::io::duplex(PIPE);
        upstream::introduce(&mut near, to).await?;
        let ends = Ends { client: self.shown, original_dst: to.address, endpoint: 0 };
        let (mesh, source) = (Arc::clone(&self.mesh), self.source.identity.clone());
        let inbound = Arc::new(Inbound::new(mesh, Arc::clone(pod), ends, source));
        pod.drain.spawn(inspected::serve(inbound, far, unsent::not_known, to.address, standing));
        Ok(UpstreamStream::Pipe(near))
    }

    /// Who asks, where policy is asked.
    pub(super) fn asks(&self) -> permits::From<'_> {
        permits::From { identity: self.source.identity.as_ref(), client: self.shown }
    }

    /// In a pass within the node nobody else knows what the app's end of the connection is for.
    pub(super) fn passed_flow(
        &self,
        endpoint: &Endpoint,
        service: Option<Arc<str>>,
        protocol: RequestProtocol,
    ) -> Option<FlowGuard> {
        let app = endpoint.workload.as_ref()?;
        let flow = self.mesh.reporter.flow(app, FlowKey::Inbound(self.shown));
        let source = self.pod.workload();
        flow.learn(|facts| {
            facts.service = service;
            facts.peer_pod = Some(pod_name(&source));
            facts.peer = Some(source.identity.clone());
            // As in metrics: the bytes stay in this process, and both identities are the kernel's word.
            facts.mutual_tls = true;
            facts.protocol = Some(protocol);
        });
        Some(flow)
    }

    /// Moves bytes until both sides are done, and reports. From here on a failure is the connection's end, and a refusal
    /// only where policy cuts it.
    pub(super) async fn copy(
        &self,
        client: impl Copied,
        server: Opened,
        cluster: Option<Arc<Cluster>>,
    ) -> Result<()> {
        let peer = server.endpoint.workload.clone();
        let limited = cluster.clone().filter(|cluster| lasting::limits(&cluster.pool));
        let labels = TcpLabels {
            side: Side::Source,
            source: self.source.clone(),
            destination: peer.as_ref().map(vouched).unwrap_or_default(),
            cluster,
            security: server.via.security(),
            client: self.ends.client,
            original_dst: self.ends.original_dst,
            endpoint: Some(server.endpoint.address),
        };
        // One pass does the work of both nodes, so it reports as both; where the bytes are read, their reader does.
        let passed = (matches!(server.via, Via::Local(_)) && !server.is_read)
            .then(|| TcpLabels { side: Side::Destination, ..labels.clone() });
        let connection = self.mesh.reporter.connection(labels);
        // Boxed: few pass, and every idle connection would have to make room for it.
        let passed = passed.map(|labels| Box::new(self.mesh.reporter.connection(labels)));
        let moved = Moved::default();
        let mut standing = server.standing;
        let mut copying = pin!(client.copied(server.stream, &moved));
        let ended = match &limited {
            None => cut::unless_cut(standing.as_mut(), copying.as_mut()).await,
            // Boxed: few are limited, and every idle connection would have to make room for it.
            Some(cluster) => {
                let mut copying = Box::pin(lasting::within(&cluster.pool, &moved, copying.as_mut()));
                cut::unless_cut(standing.as_mut(), copying.as_mut()).await
            }
        };
        let error = ended.err();
        let (sent, received) = moved.get();
        for guard in std::iter::once(connection).chain(passed.map(|passed| *passed)) {
            guard.moved(sent, received + server.received);
            guard.closed(error.as_ref());
        }
        error.filter(cut::is_cut).map_or(Ok(()), Err)
    }
}

/// Who broke the silence on an undeclared port.
enum First {
    Client(Protocol),
    Server(std::io::Result<usize>),
    Nobody,
}

/// An open byte stream to an endpoint.
pub(super) struct Opened {
    stream: UpstreamStream,
    endpoint: Arc<Endpoint>,
    via: Via,
    /// Bytes of the server that were handed on before the copy began.
    received: u64,
    /// By this agent's own other half, in a pass within the node.
    is_read: bool,
    /// In a pass within the node, or at a gateway.
    pub standing: Stands,
    _in_use: InUse,
    /// The facts of the app's end, in a pass within the node.
    _flow: Option<FlowGuard>,
}

/// What a stream counts as, until it has ended.
#[derive(Default)]
struct InUse {
    /// As in flight at its endpoint.
    _chosen: Option<Chosen>,
    /// As a connection of a limited cluster.
    _place: Option<Used>,
}

fn closed_by_server(server: &Opened, error: &std::io::Error) -> Error {
    Error::new(
        Kind::UpstreamReset,
        format!("{} closed before anybody spoke: {error}", server.endpoint.address),
    )
}
