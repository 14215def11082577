//! An HTTP connection of a pod's app, or to one where policy asks about requests, in either version: its requests one by
//! one, until it ends.
//!
//! Promises: a connection on which nothing moves is closed, each thing it waits for having its own limit; a refusal of
//! bytes is answered and counted as any request is; when the pod drains, what is under way is finished and nothing new is
//! taken; when another agent takes over, a client is told with its next answer. Tested in the lab (`limits.rs`, `strict.rs`, `abuse.rs` and others in `tests/tests/http/`).

use std::{
    convert::Infallible,
    future::poll_fn,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
};

use ::http::{
    HeaderValue, Method, Request, Response,
    header::{CONNECTION, UPGRADE},
};
use hyper::{body::Incoming, server::conn::http1, service::service_fn, upgrade::OnUpgrade};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, Sleep},
};

use super::{
    Mesh,
    exchange::{Client, Reported},
    gateway::Entry,
    http::{self, Answered, To},
    inbound::Inbound,
    inspected,
    outbound::Outbound,
    parked::{self, Parked},
    unsent::{Left, Unsent, Watched},
};
use crate::{
    body::{Activity, Body, Connection, Inform},
    config::HttpLimits,
    detect::Prefixed,
    drain::Drain,
    error::{Error, Kind, Result},
    http1::{Edge, Gate, Limits, Refusal},
    http2::{self, ReadAlong, Reply, ServerStream, StreamRefusal},
    state::snapshot::{Cluster, Protocol},
    upstream::{Io, Pod},
};

/// HTTP/2 towards apps: windows in bytes.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;

/// What a stream may have waiting for the connection to take it, bytes: a client that reads nothing costs so much for each
/// of its streams.
const UNSENT: usize = 32 << 10;

/// Header lists this many times larger than allowed are not decoded, and have no request to be reported; those between
/// are reported as requests.
const HEADER_LIST_SLACK: u32 = 4;

/// Header lines that hyper takes at least: trailers count too, and what is too much the edge has refused before.
const MAX_HEADERS: usize = 100;

/// What hyper buffers of an HTTP/1 connection beside a head, bytes.
const BUFFER_SLACK: usize = 8 << 10;

/// Serves requests until the client is done or the pod drains.
pub(super) async fn serve<S>(
    server: Server,
    client: Prefixed<S>,
    left: Left<Prefixed<S>>,
    version: Protocol,
) -> Result<()>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    match version {
        // Boxed: one of HTTP/1 need not pay for its room.
        Protocol::Http2 => Box::pin(serve_http2(server, client, left)).await,
        Protocol::Http1 | Protocol::Opaque => serve_http1(server, client, left).await,
    }
}

/// Who answers the requests of a connection.
#[derive(Clone)]
pub(super) enum Server {
    /// They are routed: a pod's app has dialled a service.
    Outbound(Arc<Outbound>, Arc<Cluster>),
    /// They are for the app of a pod, at this address.
    Inbound(Arc<Inbound>, SocketAddr),
    /// They are routed: somebody has come to a gateway.
    Gateway(Arc<Entry>),
}

impl Server {
    fn mesh(&self) -> &Mesh {
        match self {
            Self::Outbound(outbound, _) => &outbound.mesh,
            Self::Inbound(inbound, _) => &inbound.mesh,
            Self::Gateway(entry) => &entry.outbound().mesh,
        }
    }

    fn pod(&self) -> &Pod {
        match self {
            Self::Outbound(outbound, _) => &outbound.pod,
            Self::Inbound(inbound, _) => &inbound.pod,
            Self::Gateway(entry) => &entry.outbound().pod,
        }
    }

    /// What has its connection end.
    fn drain(&self) -> &Drain {
        match self {
            Self::Outbound(..) | Self::Inbound(..) => &self.pod().drain,
            Self::Gateway(entry) => entry.drain(),
        }
    }

    fn refused(&self, error: &Error) {
        match self {
            Self::Outbound(outbound, _) => outbound.refused(error),
            Self::Inbound(inbound, app) => inbound.refused(Some(*app), error),
            Self::Gateway(entry) => entry.outbound().refused(error),
        }
    }

    async fn answer(
        &self,
        request: Box<Request<Body>>,
        client: Client,
        refused: Option<Refusal>,
    ) -> Answered {
        match self {
            Self::Outbound(outbound, cluster) => {
                http::answer(outbound, To::Service(Arc::clone(cluster)), request, client, refused).await
            }
            Self::Gateway(entry) => {
                http::answer(entry.outbound(), To::Gateway(entry), request, client, refused).await
            }
            // Boxed: few connections need the room.
            Self::Inbound(inbound, app) => {
                Box::pin(inspected::answer(inbound, *app, request, client, refused)).await
            }
        }
    }
}

// === HTTP/2 ===

async fn serve_http2<S>(server: Server, client: Prefixed<S>, left: Left<Prefixed<S>>) -> Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let limits = server.mesh().limits;
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(limits.max_streams_per_connection)
        .max_send_buffer_size(UNSENT)
        .max_header_list_size(limits.max_request_head_bytes.saturating_mul(HEADER_LIST_SLACK))
        .enable_connect_protocol();
    let options = http2::Options {
        handshake: limits.request_head_timeout,
        ping: None,
        idle: limits.idle(),
        flush: limits.flush_timeout,
    };
    let drain = server.drain().clone();
    let telling = server.clone();
    let connection = Arc::<Connection>::default();
    let (client, unsent) = Watched::new(client, left, Arc::clone(&connection));
    let (io, along) = ReadAlong::new(client, move |refusal| telling.stream_refused(refusal));
    let handle = |request, stream: ServerStream| {
        let (server, request) = (server.clone(), Box::new(request));
        let asking = Client {
            version: Protocol::Http2,
            activity: stream.activity(),
            inform: stream.informer(),
            turn: None,
        };
        async move {
            let stall = server.mesh().limits.stall();
            // Pinned here: handed over, it would take its room twice.
            let making = pin!(reply(server, request, asking));
            stream.run(making, stall).await;
        }
    };
    let given_up = async {
        tokio::select! {
            () = unsent.stuck(limits.flush_timeout) => takes_nothing(&limits),
            () = along.head_late(limits.request_head_timeout) => Refusal::HeadTimeout.into(),
        }
    };
    let watch = http2::Watch { along: Some(&along), connection, given_up };
    match http2::serve(io, &builder, options, &drain, watch, handle).await {
        Ok(http2::Ended::Idle) => server.mesh().reporter.idle_closed(&server.pod().workload()),
        Ok(http2::Ended::Done) => {}
        Err(error) => unless_gone(error)?,
    }
    Ok(())
}

impl Server {
    /// Nothing is known of the request: it is counted as what is refused before it is one.
    fn stream_refused(&self, refusal: StreamRefusal) {
        let limits = self.mesh().limits;
        let error = match refusal {
            StreamRefusal::HeaderList => Error::new(
                Kind::HeadTooLarge,
                format!(
                    "the headers are far larger than the {} bytes allowed",
                    limits.max_request_head_bytes
                ),
            ),
            StreamRefusal::TooMany => Error::new(
                Kind::Overflow,
                format!("the connection has {} streams open already", limits.max_streams_per_connection),
            ),
            StreamRefusal::Malformed(reason) => {
                Error::new(Kind::BadRequest, format!("the stream is no HTTP/2 request: {reason}"))
            }
        };
        self.refused(&error);
    }
}

async fn reply(server: Server, request: Box<Request<Body>>, client: Client) -> Reply<Reported> {
    match server.answer(request, client, None).await {
        Answered::Response(response) => Reply::Response(response),
        Answered::Switch(head, taker, carried) => {
            let take = move |stream| -> http2::Taken {
                let stream: Box<dyn Io> = Box::new(stream);
                // Nobody there any more: dropped here, the stream is reset.
                drop(taker.send(stream));
                Box::pin(async { drop(carried.await) })
            };
            Reply::Switch(head, Box::new(take))
        }
    }
}

/// What waits for the client is more than its socket holds, whatever became of the requests.
fn takes_nothing(limits: &HttpLimits) -> Error {
    let text = format!("the client has taken nothing of what is ready for it for {:?}", limits.flush_timeout);
    Error::new(Kind::StreamIdle, text)
}

/// A client that goes away is no refusal.
fn unless_gone(error: Error) -> Result<()> {
    if error.kind == Kind::DownstreamReset { Ok(()) } else { Err(error) }
}

// === HTTP/1 ===

async fn serve_http1<S>(server: Server, client: Prefixed<S>, left: Left<Prefixed<S>>) -> Result<()>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let limits = server.mesh().limits;
    let bounds = Limits {
        head_bytes: limits.max_request_head_bytes as usize,
        headers: limits.max_request_headers as usize,
        target_bytes: limits.max_request_target_bytes as usize,
    };
    let connection = Arc::<Connection>::default();
    let (client, unsent) = Watched::new(client, left, Arc::clone(&connection));
    let (mut edge, gate) = Edge::new(client, bounds);
    let activity = Arc::new(Activity::on(connection));
    loop {
        // Boxed: what requests take is given back while there are none.
        match Box::pin(serve_requests(&server, edge, bounds, (&gate, &activity, &unsent))).await? {
            Some(parked) => edge = parked,
            None => return Ok(()),
        }
        match parked::wait(&mut edge, server.drain(), activity.last(), limits.idle()).await {
            Parked::Asked => {}
            Parked::Idle => {
                server.mesh().reporter.idle_closed(&server.pod().workload());
                return Ok(());
            }
            Parked::Ended => return Ok(()),
        }
    }
}

/// Serves requests until the connection has ended, or there has been none for a while: then its edge is given back.
async fn serve_requests<S>(
    server: &Server,
    edge: Edge<S>,
    bounds: Limits,
    (gate, activity, unsent): (&Arc<Gate>, &Arc<Activity>, &Unsent),
) -> Result<Option<Edge<S>>>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let limits = server.mesh().limits;
    let (shared, told, moving) = (server.clone(), Arc::clone(gate), Arc::clone(activity));
    let answer = service_fn(move |mut request: Request<Incoming>| {
        // Both now, before hyper reads on.
        let (refused, turn) = (told.next_request(), told.turn());
        let may_switch = request.method() == Method::CONNECT || request.headers().contains_key(UPGRADE);
        let upgrade = may_switch.then(|| hyper::upgrade::on(&mut request));
        // Boxed before anything waits for its answer: what goes from hand to hand is small.
        let request = Box::new(request.map(Body::from));
        let client = Client {
            version: Protocol::Http1,
            activity: Arc::clone(&moving),
            inform: Arc::clone(&told) as Arc<dyn Inform>,
            turn: Some(turn),
        };
        answer(shared.clone(), Arc::clone(&told), (request, upgrade), client, refused)
    });
    let mut connection = builder(bounds).serve_connection(TokioIo::new(edge), answer).with_upgrades();
    let mut watch = Watch::new(gate, activity, unsent, &limits);
    let mut draining = pin!(server.drain().started());
    let mut drained = false;
    let ended = poll_fn(|cx| {
        if !drained && draining.as_mut().poll(cx).is_ready() {
            drained = true;
            Pin::new(&mut connection).graceful_shutdown();
        }
        if let Poll::Ready(ended) = Pin::new(&mut connection).poll(cx) {
            return Poll::Ready(ended);
        }
        // Last, so that it judges by what the connection has just done.
        watch.poll(cx).map(Ok)
    })
    .await;
    match watch.reached {
        Some(Limit::Idle) => server.mesh().reporter.idle_closed(&server.pod().workload()),
        Some(Limit::Unsent) => return Err(takes_nothing(&limits)),
        Some(Limit::Parked) => return Ok(connection.into_parts().and_then(parked::edge_of)),
        _ => {}
    }
    if let Err(error) = ended {
        tracing::debug!(pod = %server.pod().workload().name, %error, "connection of a client ended early");
    }
    Ok(None)
}

fn builder(bounds: Limits) -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        .half_close(false)
        .max_headers(bounds.headers.max(MAX_HEADERS))
        .max_buf_size(bounds.head_bytes + BUFFER_SLACK)
        .header_read_timeout(None);
    builder
}

async fn answer(
    server: Server,
    gate: Arc<Gate>,
    (request, upgrade): (Box<Request<Body>>, Option<OnUpgrade>),
    client: Client,
    refused: Option<Refusal>,
) -> std::result::Result<Response<Reported>, Infallible> {
    let answered = server.answer(request, client, refused).await;
    Ok(match (answered, upgrade) {
        (Answered::Switch(head, taker, _), Some(upgrade)) => {
            gate.switched(true);
            tokio::spawn(async move {
                if let Ok(stream) = upgrade.await {
                    let stream: Box<dyn Io> = Box::new(TokioIo::new(stream));
                    drop(taker.send(stream));
                }
            });
            head.map(|()| Reported::silent(Body::Empty))
        }
        (Answered::Switch(head, ..), None) => head.map(|()| Reported::silent(Body::Empty)),
        (Answered::Response(mut response), _) => {
            gate.switched(false);
            let overload = &server.mesh().overload;
            if server.drain().is_leaving() || overload.sheds(|| server.pod().held()) {
                // Closed without a word, it might cross the client's next request.
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            response
        }
    })
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        let kind = match refusal {
            Refusal::Malformed(_) => Kind::BadRequest,
            Refusal::HeadTooLarge(_) | Refusal::TooManyHeaders(_) => Kind::HeadTooLarge,
            Refusal::TargetTooLong(_) => Kind::TargetTooLong,
            Refusal::HeadTimeout => Kind::HeadTimeout,
        };
        Self::new(kind, refusal.to_string())
    }
}

impl Inform for Gate {
    fn inform(&self, status: ::http::StatusCode, headers: &::http::HeaderMap) {
        Self::inform(self, status, headers);
    }
}

/// Looks after an HTTP/1 connection: what it waits for now, and until when.
struct Watch<'a> {
    gate: &'a Gate,
    activity: &'a Activity,
    unsent: &'a Unsent,
    limits: &'a HttpLimits,
    begun: Instant,
    /// Set no later than the earliest limit; moved when that is reached and has moved on, so that a busy connection
    /// seldom touches the timer.
    timer: Pin<Box<Sleep>>,
    /// Why the connection was closed.
    reached: Option<Limit>,
}

/// What happens when a limit is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Limit {
    /// The head is refused, and that is answered.
    Head,
    /// Nothing moves on the request under way, and the connection ends.
    Stalled,
    /// The last response is made, its client does not take it, and the connection ends.
    Unsent,
    /// There was no request for too long, and the connection ends.
    Idle,
    /// There was no request for a while: what the next one needs is made when it comes.
    Parked,
    /// What waits is to be looked at: the client may be slow.
    Look,
}

impl<'a> Watch<'a> {
    fn new(gate: &'a Gate, activity: &'a Activity, unsent: &'a Unsent, limits: &'a HttpLimits) -> Self {
        let timer = Box::pin(tokio::time::sleep(limits.request_head_timeout));
        Self { gate, activity, unsent, limits, begun: Instant::now(), timer, reached: None }
    }

    fn next(&self) -> Option<(Instant, Limit)> {
        let look = self.unsent.look_at(self.limits.flush_timeout).map(|at| (at, Limit::Look));
        // The look goes first, for it may move the limit.
        look.into_iter().chain(self.limit()).min_by_key(|(at, _)| *at)
    }

    fn limit(&self) -> Option<(Instant, Limit)> {
        if self.activity.is_open() {
            return self.activity.deadline(self.limits.stall()).map(|at| (at, Limit::Stalled));
        }
        let unsent = self.unsent.since().map(|since| (since + self.limits.flush_timeout, Limit::Unsent));
        let head =
            self.gate.head_began().map(|began| (began + self.limits.request_head_timeout, Limit::Head));
        // What cannot be written is not answered either: its limit goes first.
        if let Some(next) = unsent.or(head) {
            return Some(next);
        }
        let idle = self.limits.idle().map(|idle| (self.activity.last() + idle, Limit::Idle));
        let quiet = self.gate.awaits_head().then(|| self.activity.last().max(self.begun));
        let park = quiet.map(|since| (since + parked::AFTER, Limit::Parked));
        park.into_iter().chain(idle).min_by_key(|(at, _)| *at)
    }

    /// Ready when the connection is to be closed.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let next = self.next();
            if let Some((at, limit)) = next
                && at <= Instant::now()
            {
                if limit == Limit::Head {
                    self.gate.expire_head();
                    // It wakes the connection, which ends with the answer.
                    return Poll::Pending;
                }
                if limit == Limit::Look {
                    self.unsent.ask();
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                if limit != Limit::Parked {
                    self.activity.give_up();
                }
                self.reached = Some(limit);
                return Poll::Ready(());
            }
            let now = Instant::now();
            match next {
                Some((at, _)) if at < self.timer.deadline() => self.timer.as_mut().reset(at),
                _ => {}
            }
            std::task::ready!(self.timer.as_mut().poll(cx));
            // Nothing was due: look again when something may be.
            let again = next.map_or(now + self.limits.request_head_timeout, |(at, _)| at);
            self.timer.as_mut().reset(again.max(now + std::time::Duration::from_millis(1)));
        }
    }
}
