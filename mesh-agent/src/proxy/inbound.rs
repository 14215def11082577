//! From a peer to a pod's app.
//!
//! Reads top to bottom. Mesh (port 15008): accept → identify by mTLS → each stream of the connection is a tunnel or a
//! native request → permit → hand over to the app → report. Plaintext (port 15006): accept → permit → hand over →
//! report; the peer has no identity. Where requests decide what is permitted, bytes are read first (`inspected.rs`).
//! So are those of the kubelet, whose declared requests are permitted whatever policies say.

use std::{net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use http::{HeaderValue, Request, Response, StatusCode};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::OwnedSemaphorePermit,
};

use super::{
    Ends, Mesh, acceptor, admit, assert_small,
    cut::{self, Standing},
    exchange::{Client, Exchange, Reported, Sides},
    headers, inspected, next, pod_name, spawn, unsent, vouched,
};
use crate::{
    body::{Body, Stall},
    capture::{Captured, Listener},
    copy::{self, Moved},
    error::{Error, Kind, Result},
    http2::{Reply, ServerStream},
    identity::{Shown, SpiffeId},
    policy::{Permit, Ruling},
    report::{FlowGuard, FlowKey, Peer, RequestProtocol, Security, Side, TcpLabels},
    state::snapshot::{Cluster, Protocol, Workload},
    tunnel::{self, Accepted, MeshStream, Tunnel},
    upstream::{AGAIN, Destination, Kept, Lease, Pod, Via, message},
    workers::Seat,
};

/// Time for the app inside the pod to accept a connection, where no rule says another (Istio's default).
const APP_CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Largest future of one connection, bytes.
const CONNECTION_FUTURE: usize = 12 << 10;

/// Takes a pod's connections from one of its inbound listeners until the listener is gone.
pub async fn serve(mesh: Arc<Mesh>, pod: Arc<Pod>, listener: Listener) {
    let Some(acceptor) = acceptor(&pod, listener).await else { return };
    while let Some(captured) = next(&mesh, &pod, &acceptor, Side::Destination).await {
        let captured = if listener == Listener::Mesh { pod.take_carrier(captured) } else { Some(captured) };
        let Some(captured) = captured else { continue };
        // The kubelet asks whether the pod is well, not whether there is room; the kernel bounds how often at a time.
        let place = if captured.probe {
            None
        } else {
            let Some(place) = admit(&mesh, &pod, Side::Destination, (&captured).into()) else { continue };
            Some(place)
        };
        spawn(&mesh, &pod.drain, |seat| {
            let (mesh, pod) = (Arc::clone(&mesh), Arc::clone(&pod));
            assert_small(connection(mesh, pod, listener, captured, (place, seat)), CONNECTION_FUTURE)
        });
    }
}

/// Its place among the pod's connections, if it needs one, and on its thread is held until it has ended.
async fn connection(
    mesh: Arc<Mesh>,
    pod: Arc<Pod>,
    listener: Listener,
    captured: Captured,
    _place: (Option<OwnedSemaphorePermit>, Option<Seat>),
) {
    let workload = pod.workload();
    let ends = Ends::from(&captured);
    let reporter = Arc::clone(&mesh.reporter);
    let handled = match listener {
        Listener::Mesh => mesh_connection(mesh, pod, captured).await,
        Listener::Inbound | Listener::Outbound => plaintext_connection(mesh, pod, captured).await,
    };
    if let Err(error) = handled {
        reporter.refused(Side::Destination, &workload, ends.client, Some(ends.original_dst), &error);
    }
}

/// What every stream of one inbound connection shares.
#[derive(Debug)]
pub(super) struct Inbound {
    pub mesh: Arc<Mesh>,
    pub pod: Arc<Pod>,
    pub workload: Arc<Workload>,
    pub source: Peer,
    pub ends: Ends,
    /// What its app is told of the source.
    pub certificate: Option<HeaderValue>,
    /// The kernel says that it is the kubelet's, to a port with declared requests.
    pub probe: bool,
    /// What the peer proved its identity with.
    pub shown: Option<Arc<Shown>>,
    flow: FlowGuard,
}

impl Inbound {
    /// `identity` is what the peer proved. The pod at its address is taken for the source only when that is its identity.
    pub fn new(mesh: Arc<Mesh>, pod: Arc<Pod>, ends: Ends, identity: Option<SpiffeId>) -> Self {
        let workload = pod.workload();
        let by_address = mesh.snapshot().workload_at(ends.client.ip()).cloned();
        let by_address =
            by_address.filter(|peer| identity.as_ref().is_none_or(|proved| peer.identity == *proved));
        let flow = mesh.reporter.flow(&workload, FlowKey::Inbound(ends.client));
        flow.learn(|facts| {
            facts.peer_pod = by_address.as_deref().map(pod_name);
            facts.peer.clone_from(&identity);
            facts.mutual_tls = identity.is_some();
            facts.protocol = Some(RequestProtocol::Tcp);
        });
        let certificate = message::certificate_of(identity.as_ref(), &workload.identity);
        let source = Peer { workload: by_address, identity };
        Self { mesh, pod, workload, source, ends, certificate, probe: false, shown: None, flow }
    }

    /// `app`: what was asked for within the connection.
    pub fn refused(&self, app: Option<SocketAddr>, error: &Error) {
        let dialled = Some(app.unwrap_or(self.ends.original_dst));
        self.mesh.reporter.refused(Side::Destination, &self.workload, self.ends.client, dialled, error);
    }

    /// The same for one tunnel, whose client the peer names: a further port of its own address, and nothing else, for
    /// an address is what policies go by.
    fn told(self: &Arc<Self>, client: Option<SocketAddr>) -> Arc<Self> {
        let Some(client) = client.filter(|told| told.ip() == self.ends.client.ip()) else {
            return Arc::clone(self);
        };
        let (mesh, pod) = (Arc::clone(&self.mesh), Arc::clone(&self.pod));
        let told = Self::new(mesh, pod, Ends { client, ..self.ends }, self.source.identity.clone());
        Arc::new(Self { shown: self.shown.clone(), ..told })
    }

    /// Whether there is memory for another request or stream.
    pub fn admit(&self) -> Result<()> {
        if self.probe { Ok(()) } else { self.mesh.overload.admit(|| self.pod.held()) }
    }

    fn security(&self) -> Security {
        if self.source.identity.is_some() { Security::MutualTls } else { Security::None }
    }
}

/// How many flush timeouts a stream may last of which the source takes nothing. What a slow client takes only its own
/// agent sees, and gives it up; here it shows in steps of what that agent's socket and windows hold.
const PATIENCE: u32 = 8;

async fn mesh_connection(mesh: Arc<Mesh>, pod: Arc<Pod>, captured: Captured) -> Result<()> {
    let ends = Ends::from(&captured);
    // Boxed: the handshake is over soon.
    let Accepted { tls, peer, wire, shown } =
        Box::pin(tunnel::accept(Captured::open(captured.stream)?, pod.identity())).await?;
    let shown = Arc::new(shown);
    let inbound = Inbound::new(mesh, pod, ends, Some(peer));
    let inbound = Arc::new(Inbound { shown: Some(Arc::clone(&shown)), ..inbound });
    let (ips, drain) = (inbound.workload.ips.clone(), inbound.pod.drain.child());
    let flush = inbound.mesh.limits.flush_timeout;
    let withdrawn = tunnel::withdrawn(&shown, ends.client, || drain.start(), || inbound.pod.ask_again());
    let handle = |stream| serve_stream(Arc::clone(&inbound), stream);
    // Boxed, the handshake being over: what an idle connection needs is small, what serving one takes is not.
    match Box::pin(tunnel::serve(tls, wire, &ips, &drain, flush, withdrawn, handle)).await {
        // Whichever came first: the end of its last stream, or of the time in which it could be told.
        _ if shown.is_cut() => Err(tunnel::not_believed(ends.client)),
        // A peer that goes away is no refusal: what was open has been reported stream by stream.
        Err(error) if error.kind == Kind::DownstreamReset => {
            tracing::debug!(client = %ends.client, %error, "mesh connection ended early");
            Ok(())
        }
        ended => ended,
    }
}

async fn serve_stream(inbound: Arc<Inbound>, stream: MeshStream) {
    match stream {
        // Boxed: a stream is the one or the other.
        MeshStream::Tunnel(tunnel) => Box::pin(tunnelled(inbound, tunnel)).await,
        // Boxed: most connections of a pod that serves bytes never need the room.
        MeshStream::Http { request, port, protocol, stream } => {
            let app = SocketAddr::new(inbound.ends.original_dst.ip(), port);
            Box::pin(native(inbound, request, app, protocol, stream)).await;
        }
        MeshStream::Neither { error, stream } => {
            inbound.refused(None, &error);
            stream.refuse(tunnel_status(error.kind));
        }
    }
}

/// A CONNECT: answered with 200 only once the app has accepted; then bytes.
async fn tunnelled(inbound: Arc<Inbound>, tunnel: Tunnel) {
    let destination = tunnel.destination;
    let inbound = inbound.told(tunnel.client());
    let _held = inbound.pod.hold();
    let opened = match inbound.admit().and_then(|()| inbound.may_connect(destination)) {
        Ok((Ruling::Permitted(permit), standing)) => {
            hand_over(&inbound, &permit, destination).await.map(|app| (app, standing))
        }
        Ok((Ruling::BytesDecide, standing)) => {
            if let Ok(stream) = tunnel.accept() {
                // Boxed: few tunnels need the room.
                let serving = inspected::serve(inbound, stream, unsent::not_known, destination, standing);
                Box::pin(serving).await;
            }
            return;
        }
        Err(error) => Err(error),
    };
    match opened {
        Ok((app, standing)) => match tunnel.accept() {
            Ok(stream) => copy_to_app(&inbound, stream, app, destination, standing).await,
            Err(error) => tracing::debug!(%destination, %error, "the peer left before its tunnel was open"),
        },
        Err(error) => {
            inbound.refused(Some(destination), &error);
            tunnel.refuse(tunnel_status(error.kind));
        }
    }
}

/// HBONE's answers: 400 for what cannot be meant, 401 for what policy refuses, 503 for what cannot be reached.
fn tunnel_status(kind: Kind) -> StatusCode {
    match kind {
        Kind::BadRequest | Kind::IllegalDestination => StatusCode::BAD_REQUEST,
        Kind::Denied | Kind::Revoked | Kind::Unauthenticated => StatusCode::UNAUTHORIZED,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}

/// A request that travelled as a stream of its own.
async fn native(
    inbound: Arc<Inbound>,
    request: Box<Request<Body>>,
    app: SocketAddr,
    protocol: Protocol,
    stream: ServerStream,
) {
    let client = Client {
        version: Protocol::Http2,
        activity: stream.activity(),
        inform: stream.informer(),
        turn: None,
    };
    let stall = inbound.mesh.limits.stall();
    let stall = Stall { flush: stall.flush.saturating_mul(PATIENCE), ..stall };
    let answer = async {
        let exchange = begin(&inbound, &request, app, client);
        // Boxed: its room goes back once the head of the response is there, while the body may take long.
        Reply::Response(Box::pin(answer(&inbound, exchange, request, app, protocol)).await)
    };
    stream.run(pin!(answer), stall).await;
}

pub(super) fn begin(
    inbound: &Inbound,
    request: &Request<Body>,
    app: SocketAddr,
    client: Client,
) -> Box<Exchange> {
    let (reporter, source) = (&inbound.mesh.reporter, inbound.source.clone());
    let mut exchange = Exchange::begin(reporter, Sides::Destination, source, inbound.ends, client, request);
    exchange.destination = vouched(&inbound.workload);
    exchange.held = Some(inbound.pod.hold());
    exchange.security = inbound.security();
    exchange.endpoint = Some(app);
    exchange.tries = 1;
    exchange.cluster = inbound.mesh.snapshot().inbound.get(&app).cloned();
    exchange.authority = request.uri().authority().cloned();
    exchange.request_id = headers::request_id(request.headers());
    inbound.flow.learn(|facts| {
        facts.protocol = Some(exchange.protocol());
        facts.service = exchange.cluster.as_ref().map(|cluster| Arc::clone(&cluster.host));
    });
    exchange
}

async fn answer(
    inbound: &Inbound,
    mut exchange: Box<Exchange>,
    mut request: Box<Request<Body>>,
    app: SocketAddr,
    protocol: Protocol,
) -> Response<Reported> {
    let (mut parts, body) = std::mem::take(&mut *request).into_parts();
    message::strip_hop_by_hop(&mut parts.headers);
    message::show_certificate(&mut parts.headers, inbound.certificate.as_ref());
    message::show_client_of_gateway(&mut parts);
    *request = Request::from_parts(parts, body.metered(Arc::clone(&exchange.request)));
    let admitted = inbound.admit();
    let permitted = match admitted {
        Ok(()) => inbound.may_request(app, &mut request).await,
        Err(error) => Err(error),
    };
    let sent = match permitted {
        Ok((permit, mut standing)) => {
            let sending = tries(inbound, &permit, &mut exchange, request, app, protocol);
            let sent = cut::unless_cut(Some(&mut standing), pin!(sending)).await;
            exchange.standing = Some(standing);
            sent
        }
        Err(error) => Err(error),
    };
    match sent {
        Ok((response, lease)) => {
            exchange.lease = Some(lease);
            let (mut head, body) = response.into_parts();
            message::for_client(&mut head.headers, head.status);
            tunnel::strip_mesh_headers(&mut head.headers);
            head.version = http::Version::HTTP_2;
            exchange.respond(head, body)
        }
        Err(error) => exchange.refuse_to_agent(error),
    }
}

/// A request without a body that the app has not looked at is sent again (Istio's default for inbound traffic:
/// `reset-before-request`, twice, gRPC apart). Over HTTP/1 that is one that was not sent, which the pool sees to itself.
pub(super) async fn tries(
    inbound: &Inbound,
    permit: &Permit,
    exchange: &mut Exchange,
    request: Box<Request<Body>>,
    app: SocketAddr,
    protocol: Protocol,
) -> Result<(Response<Body>, Lease)> {
    if !matches!(request.body(), Body::Empty) || exchange.grpc || protocol != Protocol::Http2 {
        return send_to_app(inbound, permit, exchange, request, app, protocol).await;
    }
    // Boxed: few apps speak it, and every request would have to make room for it.
    Box::pin(async move {
        let (parts, _) = request.into_parts();
        loop {
            let sending = Box::new(Request::from_parts(parts.clone(), Body::Empty));
            let sent = send_to_app(inbound, permit, exchange, sending, app, protocol).await;
            match sent {
                Err(error) if error.kind == Kind::RefusedStream && exchange.tries <= AGAIN => {
                    exchange.tries += 1;
                }
                sent => return sent,
            }
        }
    })
    .await
}

async fn send_to_app(
    inbound: &Inbound,
    _permit: &Permit,
    exchange: &Exchange,
    request: Box<Request<Body>>,
    app: SocketAddr,
    protocol: Protocol,
) -> Result<(Response<Body>, Lease)> {
    let via = Via::Local(Arc::clone(&inbound.pod));
    // As in Istio, the rule that everybody sees holds for the last part of the way too.
    let kept = exchange.cluster.as_ref().map_or(Kept::FREELY, |cluster| Kept::of(cluster, None));
    let to = Destination {
        address: app,
        via: &via,
        protocol,
        connect_timeout: connect_timeout(exchange.cluster.as_deref()),
        // But of the client the app is told what the client's agent has it told.
        kept: Kept { introduces: request.extensions().get().copied(), ..kept },
        flow: None,
    };
    inbound.pod.send_to_app(&to, request, inbound.ends.client, &exchange.client.inform).await
}

pub(super) async fn hand_over(
    inbound: &Inbound,
    _permit: &Permit,
    app: SocketAddr,
) -> Result<tokio::net::TcpStream> {
    let timeout = connect_timeout(inbound.mesh.snapshot().inbound.get(&app).map(|cluster| &**cluster));
    inbound.pod.open_app(app, inbound.ends.client, timeout, None).await
}

/// The rule that everybody sees holds for the last part of the way too.
pub(super) fn connect_timeout(cluster: Option<&Cluster>) -> Duration {
    cluster.map_or(APP_CONNECT_TIMEOUT, |cluster| cluster.connect_timeout)
}

async fn plaintext_connection(mesh: Arc<Mesh>, pod: Arc<Pod>, captured: Captured) -> Result<()> {
    let ends = Ends::from(&captured);
    let inbound = Inbound { probe: captured.probe, ..Inbound::new(mesh, pod, ends, None) };
    match inbound.may_begin(ends.original_dst)? {
        (Ruling::Permitted(permit), standing) => {
            let app = hand_over(&inbound, &permit, ends.original_dst).await?;
            let client = Captured::open(captured.stream)?;
            let copy = async |moved: &Moved| copy::between_sockets(client, &[], app, moved).await;
            moving(&inbound, ends.original_dst, standing, copy).await;
        }
        (Ruling::BytesDecide, standing) => {
            // Boxed: few connections need the room.
            Box::pin(inspected::serve(
                Arc::new(inbound),
                Captured::open(captured.stream)?,
                unsent::of_socket,
                ends.original_dst,
                standing,
            ))
            .await;
        }
    }
    Ok(())
}

pub(super) async fn copy_to_app<C>(
    inbound: &Inbound,
    client: C,
    app: tokio::net::TcpStream,
    destination: SocketAddr,
    standing: Box<Standing>,
) where
    C: AsyncRead + AsyncWrite + Unpin,
{
    let copy = async |moved: &Moved| copy::both_ways(client, app, moved).await;
    moving(inbound, destination, standing, copy).await;
}

/// Reports a connection whose bytes `copy` moves for as long as it may stand.
async fn moving(
    inbound: &Inbound,
    destination: SocketAddr,
    mut standing: Box<Standing>,
    copy: impl AsyncFnOnce(&Moved) -> Result<()>,
) {
    let guard = inbound.mesh.reporter.connection(TcpLabels {
        side: Side::Destination,
        source: inbound.source.clone(),
        destination: vouched(&inbound.workload),
        cluster: inbound.mesh.snapshot().inbound.get(&destination).cloned(),
        security: inbound.security(),
        client: inbound.ends.client,
        original_dst: inbound.ends.original_dst,
        endpoint: Some(destination),
    });
    let moved = Moved::default();
    let copying = pin!(copy(&moved));
    let error = cut::unless_cut(Some(&mut standing), copying).await.err();
    let (sent, received) = moved.get();
    guard.moved(sent, received);
    guard.closed(error.as_ref());
    if let Some(error) = error.filter(cut::is_cut) {
        inbound.refused(Some(destination), &error);
    }
}
