//! One request to one cluster: choose, permit, send, and try again where the route's `retries` allow it.

use std::{net::SocketAddr, sync::Arc};

use http::{Request, Response, request};
use hyper::body::{Body as _, Incoming};
use tokio::time::{Instant, timeout_at};

use super::{
    exchange::{Exchange, Sides},
    outbound::Outbound,
    pod_name, vouched,
};
use crate::{
    balance,
    body::{Body, Replay},
    error::{Error, Kind, Result},
    policy,
    report::RequestProtocol,
    state::snapshot::{Cluster, Endpoint, HttpRoute, Protocol},
    upstream::{self, Destination, Via, retry},
};

/// A request that may be sent more than once.
pub(super) struct Sendable {
    parts: request::Parts,
    body: Source,
}

enum Source {
    Empty,
    /// Sent once only: the route has no retries.
    Once(Option<Body>),
    Kept(Replay),
}

impl Sendable {
    pub fn new(parts: request::Parts, body: Incoming, route: &HttpRoute, exchange: &Exchange) -> Self {
        let count = Arc::clone(&exchange.request_bytes);
        let body = match () {
            () if body.is_end_stream() => Source::Empty,
            () if route.retries.attempts == 0 => Source::Once(Some(Body::Counted(body, count))),
            () => Source::Kept(Replay::new(body, count)),
        };
        Self { parts, body }
    }

    /// The request for the next try; `None` when its body has gone and cannot be sent again.
    fn next(&mut self) -> Option<Request<Body>> {
        let body = match &mut self.body {
            Source::Empty => Body::Empty,
            Source::Once(body) => body.take()?,
            Source::Kept(replay) => Body::Replay(replay.again()?),
        };
        Some(Request::from_parts(self.parts.clone(), body))
    }
}

/// Sends until a try is good enough or no more are allowed. The last try's answer counts.
pub(super) async fn run(
    outbound: &Outbound,
    exchange: &mut Exchange,
    route: &HttpRoute,
    cluster: &Arc<Cluster>,
    protocol: Protocol,
    mut sendable: Sendable,
) -> Result<Response<Body>> {
    let policy = &route.retries;
    let mut tried: Vec<SocketAddr> = Vec::new();
    let mut request = sendable.next();
    loop {
        let Some(sending) = request.take() else {
            return Err(Error::new(Kind::UpstreamReset, "the request body is too long to be sent again"));
        };
        exchange.tries += 1;
        let limit = try_limit(exchange, route);
        let result = one(outbound, exchange, cluster, protocol, sending, &tried, limit).await;
        let again = exchange.tries <= policy.attempts
            && match &result {
                Ok(response) => retry::covers_response(&policy.on, response.status(), response.headers()),
                Err(error) => retry::covers_error(&policy.on, error),
            };
        let over = exchange.deadline.is_some_and(|deadline| Instant::now() >= deadline);
        if !again || over {
            return result;
        }
        request = sendable.next();
        if request.is_none() {
            return result;
        }
        tried.extend(exchange.endpoint);
        // What the failed try held goes back before the next one chooses.
        (exchange.lease, exchange.chosen) = (None, None);
        drop(result);
        tokio::time::sleep(retry::backoff(policy, exchange.tries + 1)).await;
    }
}

/// When the next try must have its response headers: `perTryTimeout`, within the route's `timeout`.
fn try_limit(exchange: &Exchange, route: &HttpRoute) -> Option<Instant> {
    let per_try = route.retries.per_try_timeout.map(|limit| Instant::now() + limit);
    match (per_try, exchange.deadline) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (one, other) => one.or(other),
    }
}

async fn one(
    outbound: &Outbound,
    exchange: &mut Exchange,
    cluster: &Arc<Cluster>,
    protocol: Protocol,
    request: Request<Body>,
    tried: &[SocketAddr],
    limit: Option<Instant>,
) -> Result<Response<Body>> {
    let Some(chosen) = balance::choose(cluster, tried) else {
        return Err(Error::new(Kind::NoHealthyUpstream, format!("{} has no ready endpoint", cluster.name)));
    };
    let endpoint = Arc::clone(&chosen.endpoint);
    let via = upstream::via(&outbound.mesh.pods, &outbound.mesh.node, &endpoint)?;
    note(outbound, exchange, &endpoint, &via);
    let permit = policy::outbound(endpoint.workload.as_deref(), endpoint.address)?;
    let destination = Destination {
        address: endpoint.address,
        via: &via,
        protocol,
        connect_timeout: cluster.connect_timeout,
    };
    let sending = outbound.pod.send(&permit, &destination, request, outbound.ends.client);
    let (response, lease) = match limit {
        None => sending.await?,
        Some(limit) => timeout_at(limit, sending).await.map_err(|_| {
            Error::new(Kind::Timeout, format!("no response from {} in time", endpoint.address))
        })??,
    };
    exchange.lease = Some(lease);
    exchange.chosen = Some(chosen);
    Ok(response)
}

fn note(outbound: &Outbound, exchange: &mut Exchange, endpoint: &Endpoint, via: &Via) {
    exchange.endpoint = Some(endpoint.address);
    exchange.destination = endpoint.workload.as_ref().map(vouched).unwrap_or_default();
    exchange.security = via.security();
    exchange.sides = if matches!(via, Via::Local(_)) { Sides::Both } else { Sides::Source };
    let peer = endpoint.workload.as_deref();
    outbound.flow.learn(|facts| {
        if facts.endpoint != exchange.endpoint {
            facts.endpoint = exchange.endpoint;
            facts.peer_pod = peer.map(pod_name);
            facts.peer = peer.filter(|peer| peer.enrolled).map(|peer| peer.identity.clone());
            facts.mutual_tls = matches!(via, Via::Mesh(_));
            facts.protocol = Some(if exchange.grpc { RequestProtocol::Grpc } else { RequestProtocol::Http });
        }
        let route = exchange.route.as_ref().map(|route| &route.name);
        if facts.route.as_ref() != route {
            facts.route = route.cloned();
        }
    });
}
