//! From a peer to a pod's app.
//!
//! Reads top to bottom. Mesh (port 15008): accept → identify by mTLS → each stream of the connection is a tunnel or a
//! native request → permit → hand over to the app → report. Plaintext (port 15006): accept → permit → hand over →
//! report; the peer has no identity.

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use http::{Request, Response, StatusCode};
use hyper::{
    body::{Body as _, Incoming},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    Ends, Mesh, assert_small,
    exchange::{Exchange, Reported, Sides},
    pod_name, vouched,
};
use crate::{
    body::Body,
    capture::{Captured, Listener},
    copy::{self, Moved},
    error::{Error, Kind, Result},
    identity::SpiffeId,
    policy::{self, Permit},
    report::{FlowGuard, Peer, RequestProtocol, Security, Side, TcpLabels},
    state::snapshot::{Protocol, Workload},
    tunnel::{self, MeshStream, Tunnel, Wire},
    upstream::{Lease, Pod, message},
};

/// Time for the app inside the pod to accept a connection.
const APP_CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Largest future of one connection, bytes.
const CONNECTION_FUTURE: usize = 12 << 10;

/// Takes a pod's connections from one of its inbound listeners until the listener is gone or the pod drains.
pub async fn serve(mesh: Arc<Mesh>, pod: Arc<Pod>, listener: Listener) {
    loop {
        let captured = tokio::select! {
            captured = pod.net().accept(listener) => captured,
            () = pod.drain.started() => return,
        };
        let Ok(captured) = captured else { return };
        let connection = connection(Arc::clone(&mesh), Arc::clone(&pod), listener, captured);
        pod.drain.spawn(assert_small(connection, CONNECTION_FUTURE));
    }
}

async fn connection(mesh: Arc<Mesh>, pod: Arc<Pod>, listener: Listener, captured: Captured) {
    let workload = pod.workload();
    let client = captured.client;
    let reporter = Arc::clone(&mesh.reporter);
    let handled = match listener {
        Listener::Mesh => mesh_connection(mesh, pod, captured).await,
        Listener::Inbound | Listener::Outbound => plaintext_connection(mesh, pod, captured).await,
    };
    if let Err(error) = handled {
        reporter.refused(Side::Destination, &workload, client, &error);
    }
}

/// What every stream of one inbound connection shares.
#[derive(Debug)]
struct Inbound {
    mesh: Arc<Mesh>,
    pod: Arc<Pod>,
    workload: Arc<Workload>,
    source: Peer,
    ends: Ends,
    flow: FlowGuard,
}

impl Inbound {
    /// `identity` is what the peer proved. The pod at its address is taken for the source only when that is its identity.
    fn new(mesh: Arc<Mesh>, pod: Arc<Pod>, ends: Ends, identity: Option<SpiffeId>) -> Self {
        let workload = pod.workload();
        let by_address = mesh.snapshot().workload_at(ends.client.ip()).cloned();
        let by_address =
            by_address.filter(|peer| identity.as_ref().is_none_or(|proved| peer.identity == *proved));
        let flow = mesh.reporter.flow(&workload, Side::Destination, ends.client);
        flow.learn(|facts| {
            facts.peer_pod = by_address.as_deref().map(pod_name);
            facts.peer.clone_from(&identity);
            facts.mutual_tls = identity.is_some();
            facts.protocol = Some(RequestProtocol::Tcp);
        });
        Self { mesh, pod, workload, source: Peer { workload: by_address, identity }, ends, flow }
    }

    fn refused(&self, error: &Error) {
        self.mesh.reporter.refused(Side::Destination, &self.workload, self.ends.client, error);
    }

    fn security(&self) -> Security {
        if self.source.identity.is_some() { Security::MutualTls } else { Security::None }
    }
}

async fn mesh_connection(mesh: Arc<Mesh>, pod: Arc<Pod>, captured: Captured) -> Result<()> {
    let ends = Ends { client: captured.client, original_dst: captured.original_dst };
    // Boxed: the handshake is over soon.
    let (tls, peer, wire) = Box::pin(tunnel::accept(captured.stream, pod.identity())).await?;
    let inbound = Arc::new(Inbound::new(mesh, pod, ends, Some(peer)));
    match wire {
        Wire::Hbone => {
            let (ips, drain) = (inbound.workload.ips.clone(), inbound.pod.drain.token());
            tunnel::serve_tunnels(tls, &ips, &drain, |tunnel| tunnelled(Arc::clone(&inbound), tunnel)).await
        }
        // Boxed: most connections of a pod that serves bytes never need the room.
        Wire::MeshH2 => Box::pin(serve_requests(inbound, TokioIo::new(tls))).await,
    }
}

/// One CONNECT of an HBONE connection.
async fn tunnelled(inbound: Arc<Inbound>, tunnel: Tunnel) {
    let destination = tunnel.destination;
    let opened = match policy::inbound(destination) {
        Ok(permit) => hand_over(&inbound, &permit, destination).await,
        Err(error) => Err(error),
    };
    match opened {
        Ok(app) => match tunnel.accept() {
            Ok(stream) => copy_to_app(&inbound, stream, app, destination).await,
            Err(error) => tracing::debug!(%destination, %error, "the peer left before its tunnel was open"),
        },
        Err(error) => {
            inbound.refused(&error);
            tunnel.refuse(tunnel_status(error.kind));
        }
    }
}

/// A connection whose streams are requests.
async fn serve_requests<S>(inbound: Arc<Inbound>, io: TokioIo<S>) -> Result<()>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (drain, client) = (inbound.pod.drain.clone(), inbound.ends.client);
    let service = service_fn(move |request| stream(Arc::clone(&inbound), request));
    let mut serving = std::pin::pin!(tunnel::server_builder().serve_connection(io, service));
    let ended = tokio::select! {
        ended = &mut serving => ended,
        () = drain.started() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    let Err(error) = ended else { return Ok(()) };
    let broke_protocol = std::error::Error::source(&error)
        .and_then(|cause| cause.downcast_ref::<h2::Error>())
        .is_some_and(h2::Error::is_library);
    if broke_protocol {
        return Err(Error::new(Kind::BadRequest, format!("the peer broke HTTP/2: {error}")));
    }
    tracing::debug!(%client, %error, "mesh connection ended early");
    Ok(())
}

/// One stream of a `mesh-h2` connection.
async fn stream(
    inbound: Arc<Inbound>,
    request: Request<Incoming>,
) -> std::result::Result<Response<Reported>, Infallible> {
    let answered = match tunnel::classify(request, Wire::MeshH2, &inbound.workload.ips) {
        Ok(MeshStream::Tunnel { request, destination }) => open_tunnel(&inbound, request, destination).await,
        Ok(MeshStream::Http { request, port, protocol }) => {
            let app = SocketAddr::new(inbound.ends.original_dst.ip(), port);
            return Ok(native(&inbound, request, app, protocol).await);
        }
        Err(error) => Err(error),
    };
    Ok(answered.unwrap_or_else(|error| {
        inbound.refused(&error);
        let mut response = Response::new(Reported::silent(Body::Empty));
        *response.status_mut() = tunnel_status(error.kind);
        response
    }))
}

/// HBONE's answers: 400 for what cannot be meant, 401 for what policy refuses, 503 for what cannot be reached.
fn tunnel_status(kind: Kind) -> StatusCode {
    match kind {
        Kind::BadRequest | Kind::IllegalDestination => StatusCode::BAD_REQUEST,
        Kind::Denied | Kind::Unauthenticated => StatusCode::UNAUTHORIZED,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}

/// A CONNECT: answered with 200 only once the app has accepted; then bytes.
async fn open_tunnel(
    inbound: &Arc<Inbound>,
    request: Request<Incoming>,
    destination: SocketAddr,
) -> Result<Response<Reported>> {
    let permit = policy::inbound(destination)?;
    let app = hand_over(inbound, &permit, destination).await?;
    let shared = Arc::clone(inbound);
    inbound.pod.drain.spawn(async move {
        match hyper::upgrade::on(request).await {
            Ok(upgraded) => copy_to_app(&shared, TokioIo::new(upgraded), app, destination).await,
            Err(error) => tracing::debug!(%destination, %error, "the peer left before its tunnel was open"),
        }
    });
    Ok(Response::new(Reported::silent(Body::Empty)))
}

/// A request that travelled as a stream of its own.
async fn native(
    inbound: &Arc<Inbound>,
    request: Request<Incoming>,
    app: SocketAddr,
    protocol: Protocol,
) -> Response<Reported> {
    let (mut parts, body) = request.into_parts();
    let reporter = &inbound.mesh.reporter;
    let mut exchange =
        Exchange::begin(reporter, Sides::Destination, inbound.source.clone(), inbound.ends, &parts);
    exchange.destination = vouched(&inbound.workload);
    exchange.security = inbound.security();
    exchange.endpoint = Some(app);
    exchange.tries = 1;
    exchange.cluster = inbound.mesh.snapshot().inbound.get(&app).cloned();
    exchange.authority = parts.uri.authority().map(ToString::to_string).unwrap_or_default();
    inbound.flow.learn(|facts| {
        facts.protocol = Some(if exchange.grpc { RequestProtocol::Grpc } else { RequestProtocol::Http });
        facts.service = exchange.cluster.as_ref().map(|cluster| Arc::clone(&cluster.host));
    });
    message::strip_hop_by_hop(&mut parts.headers);
    let body = if body.is_end_stream() {
        Body::Empty
    } else {
        Body::Counted(body, Arc::clone(&exchange.request_bytes))
    };
    let sent = match policy::inbound(app) {
        Ok(permit) => send_to_app(inbound, &permit, app, protocol, Request::from_parts(parts, body)).await,
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
        Err(error) => exchange.refuse(error),
    }
}

async fn send_to_app(
    inbound: &Inbound,
    _permit: &Permit,
    app: SocketAddr,
    protocol: Protocol,
    request: Request<Body>,
) -> Result<(Response<Body>, Lease)> {
    inbound.pod.send_to_app(app, protocol, request, inbound.ends.client, APP_CONNECT_TIMEOUT).await
}

async fn hand_over(inbound: &Inbound, _permit: &Permit, app: SocketAddr) -> Result<tokio::net::TcpStream> {
    inbound.pod.open_app(app, inbound.ends.client, APP_CONNECT_TIMEOUT).await
}

async fn plaintext_connection(mesh: Arc<Mesh>, pod: Arc<Pod>, captured: Captured) -> Result<()> {
    let ends = Ends { client: captured.client, original_dst: captured.original_dst };
    let permit = policy::inbound(ends.original_dst)?;
    let inbound = Inbound::new(mesh, pod, ends, None);
    let app = hand_over(&inbound, &permit, ends.original_dst).await?;
    copy_to_app(&inbound, captured.stream, app, ends.original_dst).await;
    Ok(())
}

async fn copy_to_app<C>(inbound: &Inbound, client: C, app: tokio::net::TcpStream, destination: SocketAddr)
where
    C: AsyncRead + AsyncWrite + Unpin,
{
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
    let ended = copy::both_ways(client, app, &moved).await;
    let error =
        ended.err().map(|error| Error::new(Kind::DownstreamReset, format!("connection broke: {error}")));
    let (sent, received) = moved.get();
    guard.moved(sent, received);
    guard.closed(error.as_ref());
}
