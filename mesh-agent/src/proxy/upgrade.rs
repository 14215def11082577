//! A request that wants another protocol: the endpoint is asked, and from its yes on there are only bytes.

use std::{net::SocketAddr, pin::pin, sync::Arc};

use ::http::{
    HeaderValue, Request, Response,
    header::{SEC_WEBSOCKET_KEY, SET_COOKIE},
};
use http_body::Body as _;
use tokio::sync::oneshot;

use super::{
    cut::{is_cut, unless_cut},
    exchange::Exchange,
    headers, health,
    http::{self, Answered, Made},
    outbound::Outbound,
    tries::{self, Picked},
};
use crate::{
    body::Body,
    copy::{self, Moved},
    drain::Drain,
    error::{Error, Kind, Result},
    state::snapshot::{Cluster, Protocol, RetryPolicy},
    upstream::{Destination, Io, Kept, Switch, Switched, retry},
};

/// Who takes the client's side of the connection once it is bytes.
pub(super) type Taker = oneshot::Sender<Box<dyn Io>>;

/// Ends once what was switched is over and reported.
pub(super) type Carried = oneshot::Receiver<()>;

/// An endpoint that has agreed.
pub(super) struct Agreed {
    head: Response<()>,
    endpoint: Box<dyn Io>,
}

/// Asks one endpoint of the cluster after the other, as far as retries allow it, until one is reached. What one has been
/// asked is not asked again, for nobody knows what it has begun.
pub(super) async fn ask(
    outbound: &Outbound,
    exchange: &mut Exchange,
    cluster: &Arc<Cluster>,
    policy: &RetryPolicy,
    request: Request<Body>,
    wanted: &Switch,
) -> Result<Made> {
    let (parts, body) = request.into_parts();
    // A body can be sent once: who has one asks once.
    let again = body.is_end_stream();
    let mut body = Some(body.metered(Arc::clone(&exchange.request)));
    let (mut tried, mut retrying) = (Vec::new(), None);
    loop {
        let mut parts = parts.clone();
        parts.headers.insert(headers::ATTEMPT_COUNT, HeaderValue::from(exchange.tries + 1));
        let request = Request::from_parts(parts, body.take().unwrap_or(Body::Empty));
        let asked = one(outbound, exchange, cluster, request, wanted, &tried).await;
        let Err(error) = &asked else { return asked };
        if !again || !retry::is_unsent(error.kind) || !retry::covers_error(&policy.on, error) {
            return asked;
        }
        // What the failed try held of the budget goes back before the next one asks.
        drop(retrying.take());
        let Some(next) = tries::another(outbound, exchange, policy, cluster) else { return asked };
        retrying = Some(next.wait(exchange, policy, &mut tried).await);
    }
}

async fn one(
    outbound: &Outbound,
    exchange: &mut Exchange,
    cluster: &Arc<Cluster>,
    mut request: Request<Body>,
    wanted: &Switch,
    tried: &[SocketAddr],
) -> Result<Made> {
    let key = request.headers().get(SEC_WEBSOCKET_KEY).cloned();
    let limit = exchange.deadline;
    let cluster = tries::serving(outbound, exchange, cluster);
    // A connection of its own, whatever is spoken on it.
    tries::take_place(outbound, exchange, cluster, Protocol::Http1, limit).await?;
    let picking = tries::pick_in_time(outbound, exchange, cluster, &mut request, tried, limit);
    let Picked { endpoint, via, permit } = picking.await?;
    let destination = Destination {
        address: endpoint.address,
        via: &via,
        protocol: http::upgrade_protocol(cluster, exchange.client.version),
        connect_timeout: cluster.connect_timeout,
        kept: Kept::of(cluster, None).on_behalf(outbound.shown, outbound.dialled()),
        flow: None,
    };
    let asking = pin!(outbound.pod.switch(&permit, &destination, request, wanted, outbound.shown));
    let activity = &exchange.client.activity;
    let asking = pin!(tries::in_time(outbound, activity, &endpoint.address, exchange.deadline, asking));
    let asked = unless_cut(exchange.standing.as_mut(), asking).await;
    health::timed(exchange.chosen.as_mut(), health::pace_of_switched(&asked));
    health::learn(&outbound.mesh.reporter, cluster, &endpoint, || health::of_switched(&asked));
    match asked? {
        Switched::Answered(response) => Ok(Made::Response(response)),
        Switched::Agreed(head, bytes) => {
            // What limits a request does not limit what it has become.
            exchange.deadline = None;
            Ok(Made::Switch(agree(exchange, head, bytes, wanted, key.as_ref())))
        }
    }
}

pub(super) fn agree(
    exchange: &Exchange,
    head: Response<()>,
    endpoint: Box<dyn Io>,
    wanted: &Switch,
    key: Option<&HeaderValue>,
) -> Agreed {
    let mut head = wanted.agreed(head, exchange.client.version, key);
    if let Some(cookie) = &exchange.set_cookie {
        head.headers_mut().append(SET_COOKIE, cookie.clone());
    }
    Agreed { head, endpoint }
}

/// Tells the client, and moves bytes until both sides are done; reports then.
/// `connection` is kept until then: its place and its facts, for the HTTP connection it was has ended.
pub(super) fn carry<C: Send + Sync + 'static>(
    connection: Arc<C>,
    drain: &Drain,
    mut exchange: Box<Exchange>,
    agreed: Agreed,
) -> Answered {
    let Agreed { head, endpoint } = agreed;
    let (taker, taken) = oneshot::channel::<Box<dyn Io>>();
    let (reported, carried) = oneshot::channel();
    let status = head.status();
    drain.spawn(async move {
        // Dropped last, when all is reported.
        let (_connection, _reported) = (connection, reported);
        let Ok(client) = taken.await else {
            let gone = Error::new(Kind::DownstreamReset, "the client left before the protocol was switched");
            return exchange.switched(status, 0, Some(gone));
        };
        let moved = Moved::default();
        let copying = pin!(copy::both_ways(client, endpoint, &moved));
        let mut error = unless_cut(exchange.standing.as_mut(), copying).await.err();
        if error.as_ref().is_some_and(|error| !is_cut(error)) && exchange.client.activity.has_stalled() {
            error = Some(Error::new(Kind::StreamIdle, "the client's connection was given up"));
        }
        let (sent, received) = moved.get();
        exchange.request.add(sent);
        exchange.switched(status, received, error);
    });
    Answered::Switch(head, taker, carried)
}
