//! From a client outside the mesh, by a port of a gateway, to an endpoint.
//!
//! Reads top to bottom: accept → what the port serves → TLS: the server by the name in the `ClientHello`; passed on as it is, or
//! ended here → HTTP: request by request, the virtual host by the request's authority, then as for requests of pods (`http.rs`);
//! bytes: the route, then as for pods. What the port serves, and whom a host belongs to, is looked up in the configuration of now:
//! a change holds for connections that are kept too. Never passes on what no server, host or route takes. Tested in the lab
//! (`tests/tests/gateway/`).

mod edge;
mod entry;
mod ports;
mod tls;

use std::{
    net::TcpStream as Accepted,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::OwnedSemaphorePermit,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

pub(super) use self::entry::{Admitted, Entry};
pub use self::ports::{Failing, Ports};
use super::{
    Ends, Mesh, admit, assert_small,
    copied::Copied,
    downstream::{self, Server},
    outbound::Outbound,
    permits, spawn,
    unsent::{self, Left},
};
use crate::{
    capture::{self, Arrived, Captured, OpenPort},
    copy::Socket,
    detect::{self, Prefixed},
    drain::Drain,
    error::{Error, Kind, Result},
    identity::Shown,
    report::Side,
    route::{self, StreamFacts},
    state::snapshot::{Backend, Cluster, GatewayPort, Protocol, Served, ServerTls, StreamRoute, TlsAction},
    tunnel,
    upstream::Pod,
    workers::Seat,
};

/// Largest future of one connection, bytes.
const CONNECTION_FUTURE: usize = 2 << 10;

/// Pause until a port that could not be watched is looked at again.
const AGAIN: Duration = Duration::from_secs(1);

/// A port that is listened on.
#[derive(Debug)]
pub(super) struct Port {
    mesh: Arc<Mesh>,
    pod: Arc<Pod>,
    number: u16,
    /// Ends when the port is closed.
    drain: Drain,
    /// Cuts what is open, when there has been time enough.
    cut: CancellationToken,
    /// Somebody else takes the connections from now on.
    handed_on: AtomicBool,
}

/// Takes the connections of a port until it is closed.
async fn serve(port: Arc<Port>, open: OpenPort) {
    let arrivals = loop {
        match open.share().and_then(OpenPort::takes) {
            Ok(arrivals) => break arrivals,
            Err(error) => {
                tracing::error!(port = port.number, %error, "the port's connections are not taken, trying again");
                let left = timeout(AGAIN, port.drain.left()).await;
                if left.is_ok() {
                    return;
                }
            }
        }
    };
    drop(open);
    loop {
        tokio::select! {
            biased;
            () = port.drain.left() => break,
            arrived = arrivals.next() => take(&port, arrived),
        }
    }
    if port.handed_on.load(Ordering::Relaxed) {
        return;
    }
    // Whoever is connected already, for all that it can know, is not to be turned away.
    while let Ok(arrived) = timeout(Duration::ZERO, arrivals.next()).await {
        take(&port, arrived);
    }
}

fn take(port: &Arc<Port>, arrived: Arrived) {
    let Arrived { stream, client, local } = arrived;
    let ends = Ends { client, original_dst: local, endpoint: 0 };
    let Some(place) = admit(&port.mesh, &port.pod, Side::Source, ends) else { return };
    spawn(&port.mesh, &port.drain, |seat| {
        let connection = connection(Arc::clone(port), stream, ends, (place, seat));
        assert_small(connection, CONNECTION_FUTURE)
    });
}

async fn connection(
    port: Arc<Port>,
    stream: Accepted,
    ends: Ends,
    place: (OwnedSemaphorePermit, Option<Seat>),
) {
    let (mesh, pod) = (Arc::clone(&port.mesh), Arc::clone(&port.pod));
    let outbound = Arc::new(Outbound::new(mesh, pod, ends, ends.client, place));
    let carried = tokio::select! {
        biased;
        () = port.cut.cancelled() => return,
        carried = carry(&port, &outbound, stream) => carried,
    };
    if let Err(error) = carried {
        outbound.flow.learn(|facts| facts.flag = Some(error.kind.row().flag));
        outbound.refused(&error);
    }
}

/// How a connection goes on once it is known what it is.
enum Course {
    /// Its client has gone, or the port is being closed.
    Over,
    Requests(Prefixed<TcpStream>),
    SecureRequests(tls::Secure, tls::Client, Option<String>),
    Bytes(Prefixed<TcpStream>, Arc<[Arc<StreamRoute>]>, Option<String>),
    SecureBytes(tls::Secure, tls::Client, Arc<[Arc<StreamRoute>]>, Option<String>),
}

async fn carry(port: &Arc<Port>, outbound: &Arc<Outbound>, stream: Accepted) -> Result<()> {
    // Boxed, each of them: finding out is over soon, and no connection is to hold the room of another kind of it.
    match Box::pin(course(port, outbound, Captured::open(stream)?)).await? {
        Course::Over => Ok(()),
        Course::Requests(client) => {
            let entry = Entry::new(port, outbound, tls::Client::unknown(), None, false);
            Box::pin(requests(entry, client, unsent::of_socket)).await
        }
        Course::SecureRequests(client, peer, name) => {
            let shown = peer.shown.clone();
            let entry = Entry::new(port, outbound, peer, name, true);
            let served = Box::pin(secure_requests(entry, client));
            unless_withdrawn(outbound, shown.as_deref(), served).await
        }
        Course::Bytes(client, routes, name) => {
            Box::pin(bytes(port, outbound, client, &tls::Client::unknown(), &routes, name.as_deref())).await
        }
        Course::SecureBytes(client, peer, routes, name) => {
            let served = Box::pin(bytes(port, outbound, client, &peer, &routes, name.as_deref()));
            unless_withdrawn(outbound, peer.shown.as_deref(), served).await
        }
    }
}

/// What serving a client comes to, unless the certificate that it has proved itself with in the mesh is withdrawn before.
async fn unless_withdrawn(
    outbound: &Outbound,
    shown: Option<&Shown>,
    served: impl Future<Output = Result<()>> + Unpin,
) -> Result<()> {
    let Some(shown) = shown else { return served.await };
    tokio::select! {
        biased;
        served = served => served,
        error = tunnel::withdrawn(shown, outbound.ends.client, || {}, || outbound.pod.ask_again()) => Err(error),
    }
}

async fn course(port: &Port, outbound: &Outbound, client: TcpStream) -> Result<Course> {
    let snapshot = outbound.mesh.snapshot();
    let served = snapshot.gateway.as_ref().and_then(|gateway| gateway.port(port.number));
    let Some(served) = served.map(|served| served.serves.clone()) else { return Ok(Course::Over) };
    let mut client = Prefixed::new(client);
    match served {
        Served::Http(_) => Ok(Course::Requests(client)),
        Served::Tcp(routes) => Ok(Course::Bytes(client, routes, None)),
        Served::Tls(servers) => {
            let limit = outbound.mesh.limits.request_head_timeout;
            let named = tokio::select! {
                biased;
                () = port.drain.started() => return Ok(Course::Over),
                named = timeout(limit, detect::server_name(&mut client)) => named,
            };
            let named = named.map_err(|_| slow(&format!("no ClientHello within {limit:?}")))?;
            // Who only looks whether somebody listens is no refusal, however it goes.
            let Ok(name) = named else { return Ok(Course::Over) };
            if client.is_unread() {
                return Ok(Course::Over);
            }
            let name = name.map(|name| name.to_ascii_lowercase());
            if !detect::may_be_tls(&client) {
                let text = format!("what it has sent to port {} is no TLS", port.number);
                return Err(Error::new(Kind::TlsFailure, text));
            }
            let Some(server) = servers.find(name.as_deref()) else {
                let asked = name.map_or_else(|| "no name".to_owned(), |name| format!("{name:?}"));
                let text = format!("no server of port {} has what is asked for: {asked}", port.number);
                return Err(Error::new(Kind::NoRoute, text));
            };
            match &server.action {
                TlsAction::PassThrough(routes) => Ok(Course::Bytes(client, Arc::clone(routes), name)),
                TlsAction::Http(tls, _) => {
                    let (client, peer) = end_tls(outbound, client, tls, tls::Inside::Requests).await?;
                    Ok(Course::SecureRequests(client, peer, name))
                }
                TlsAction::Stream(tls, routes) => {
                    let (client, peer) = end_tls(outbound, client, tls, tls::Inside::Bytes).await?;
                    Ok(Course::SecureBytes(client, peer, Arc::clone(routes), name))
                }
            }
        }
    }
}

async fn end_tls(
    outbound: &Outbound,
    client: Prefixed<TcpStream>,
    tls: &Arc<ServerTls>,
    inside: tls::Inside,
) -> Result<(tls::Secure, tls::Client)> {
    let (said, client) = client.into_parts();
    let client = Prefixed::after(said, Socket::new(client));
    let limit = outbound.mesh.limits.request_head_timeout;
    let accepting = tls::accept(client, tls, outbound.pod.identity(), inside, outbound.ends.client);
    let late = |_| Err(slow(&format!("no TLS handshake within {limit:?}")));
    timeout(limit, accepting).await.unwrap_or_else(late)
}

/// What the client has not acknowledged of what is below TLS.
fn of_tls(client: &Prefixed<tls::Secure>) -> Option<u32> {
    capture::unacknowledged(client.inner().get_ref().0.inner().stream())
}

async fn secure_requests(entry: Arc<Entry>, client: tls::Secure) -> Result<()> {
    let http2 = client.get_ref().1.alpn_protocol() == Some(tls::HTTP2);
    let client = Prefixed::new(client);
    if !http2 {
        return requests(entry, client, of_tls).await;
    }
    Box::pin(downstream::serve(Server::Gateway(entry), client, of_tls, Protocol::Http2)).await
}

/// Serves requests in the version that the first bytes tell. Who opens a connection beforehand, or only looks whether somebody
/// listens, is no refusal.
async fn requests<S>(entry: Arc<Entry>, mut client: Prefixed<S>, left: Left<Prefixed<S>>) -> Result<()>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let outbound = Arc::clone(entry.outbound());
    let limits = outbound.mesh.limits;
    let idle = limits.idle().unwrap_or(limits.request_head_timeout);
    let spoken = tokio::select! {
        biased;
        () = entry.drain().started() => return Ok(()),
        spoken = timeout(idle, detect::first_bytes(&mut client)) => spoken,
    };
    match spoken {
        Ok(Ok(())) if client.is_unread() => return Ok(()),
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::debug!(client = %outbound.ends.client, %error, "a client left before it asked for anything");
            return Ok(());
        }
        Err(_) => {
            outbound.mesh.reporter.idle_closed(&outbound.pod.workload());
            return Ok(());
        }
    }
    let version = timeout(limits.request_head_timeout, detect::http_version(&mut client)).await;
    let version =
        version.map_err(|_| slow(&format!("no request within {:?}", limits.request_head_timeout)))?;
    let version = version.map_err(|error| gone(&error))?;
    Box::pin(downstream::serve(Server::Gateway(entry), client, left, version)).await
}

/// Bytes: permitted by the policies of the gateway's pod, and copied to where the first route that takes them leads.
async fn bytes(
    port: &Port,
    outbound: &Outbound,
    client: impl Copied,
    peer: &tls::Client,
    routes: &[Arc<StreamRoute>],
    name: Option<&str>,
) -> Result<()> {
    outbound.mesh.overload.admit(|| outbound.pod.held())?;
    let Outbound { mesh, pod, ends, .. } = outbound;
    let from = permits::From { identity: peer.identity.as_ref(), client: ends.client };
    let permitted = permits::bytes_at_gateway(mesh, pod, from, ends.original_dst, name);
    // Boxed: over soon, while copying lasts.
    let mut standing = Box::pin(permitted).await?;
    standing.shown.clone_from(&peer.shown);
    let cluster = by_route(port, outbound, routes, name)?;
    let mut opened = Box::pin(outbound.open(&cluster)).await?;
    opened.standing = Some(standing);
    outbound.copy(client, opened, Some(cluster)).await
}

fn by_route(
    port: &Port,
    outbound: &Outbound,
    routes: &[Arc<StreamRoute>],
    name: Option<&str>,
) -> Result<Arc<Cluster>> {
    let workload = outbound.pod.workload();
    let facts = StreamFacts {
        sni: name,
        destination: outbound.ends.original_dst.ip(),
        port: port.number,
        source: &workload,
        source_ip: outbound.ends.client.ip(),
    };
    let Some(route) = route::find_stream(routes, &facts) else {
        let text = format!("no route of port {} takes the connection", port.number);
        return Err(Error::new(Kind::NoRoute, text));
    };
    outbound.flow.learn(|facts| facts.route = Some(Arc::clone(&route.name)));
    match &route::draw(&route.backends).backend {
        Backend::Cluster(cluster) => Ok(Arc::clone(outbound.serving(cluster))),
        Backend::Missing(what) => {
            Err(Error::new(Kind::NoHealthyUpstream, format!("{}: {what}", route.origin)))
        }
    }
}

/// Whether connections of one are served as those of the other: with another kind of server they have to come anew.
fn same_kind(one: &GatewayPort, other: &GatewayPort) -> bool {
    std::mem::discriminant(&one.serves) == std::mem::discriminant(&other.serves)
}

fn slow(text: &str) -> Error {
    Error::new(Kind::BadRequest, text)
}

fn gone(error: &std::io::Error) -> Error {
    Error::new(Kind::DownstreamReset, format!("client went away: {error}"))
}
