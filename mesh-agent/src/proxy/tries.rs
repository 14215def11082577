//! One request to one cluster: choose, permit, send, and try again where the route's `retries` and the cluster's
//! budget allow it.

use std::{
    fmt::Display,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use http::{Request, Response, request};
use hyper::body::Body as _;
use tokio::time::{Instant, sleep_until};

use super::{
    choose,
    cut::unless_cut,
    exchange::{Exchange, Sides},
    headers, health, http as requests, learn_end,
    outbound::Outbound,
    permits, vouched,
};
use crate::{
    balance::{self, Wish},
    body::{Activity, Body, Follow, Replay},
    error::{Error, Kind, Result},
    policy,
    report::GaveUp,
    state::snapshot::{Cluster, Endpoint, Protocol, RetryPolicy},
    upstream::{self, Destination, Kept, Pod, Used, Via, retry},
};

/// A request that may be sent more than once.
pub(super) struct Sendable {
    parts: request::Parts,
    body: Source,
}

enum Source {
    Empty,
    /// Sent once only.
    Once(Option<Body>),
    Kept(Replay),
}

impl Sendable {
    /// `kept`: the body is needed again, for other tries or for mirrors; where the pod has memory for that.
    pub fn new(parts: request::Parts, body: Body, kept: bool, pod: &Pod, exchange: &Exchange) -> Self {
        let meter = Arc::clone(&exchange.request);
        let body = match body {
            body if body.is_end_stream() => Source::Empty,
            Body::Peer(peer) if kept => Source::Kept(Replay::new(peer, meter, Arc::clone(pod.allowance()))),
            body => Source::Once(Some(body.metered(meter))),
        };
        Self { parts, body }
    }

    /// The head, as it stands after the route's changes.
    pub fn parts(&self) -> &request::Parts {
        &self.parts
    }

    /// Whether the body is declared to be too long to be copied.
    pub fn is_too_long(&self) -> bool {
        matches!(&self.body, Source::Kept(replay) if replay.is_too_long())
    }

    /// A copy of the body for a mirror, as it comes; `None` for an empty one.
    pub fn follow(&self) -> Option<Follow> {
        match &self.body {
            Source::Kept(replay) => Some(replay.follow()),
            Source::Empty | Source::Once(_) => None,
        }
    }

    /// The request for the next try; `None` when its body has gone and cannot be sent again.
    fn next(&mut self, attempt: u32) -> Option<Box<Request<Body>>> {
        let body = match &mut self.body {
            Source::Empty => Body::Empty,
            Source::Once(body) => body.take()?,
            Source::Kept(replay) => Body::Replay(replay.again()?),
        };
        let mut parts = self.parts.clone();
        parts.headers.insert(headers::ATTEMPT_COUNT, headers::number(attempt.into()));
        Some(Box::new(Request::from_parts(parts, body)))
    }
}

/// Copies under way to one mirror at a time.
const MOST_MIRRORED: u32 = 512;

/// One of the requests under way at a cluster, or one of the retries among them; counted until dropped.
pub(super) struct UnderWay {
    cluster: Arc<Cluster>,
    count: fn(&Cluster) -> &AtomicU32,
}

impl UnderWay {
    fn request(cluster: &Arc<Cluster>) -> Self {
        if let Some(interval) = cluster.retry_budget.interval {
            cluster.state.recent.get_or_init(Box::default).first_try(interval);
        }
        Self::counted(cluster, |cluster| &cluster.state.active)
    }

    /// A retry; `None` when there are as many already as the budget allows.
    fn retry(cluster: &Arc<Cluster>) -> Option<Self> {
        let retry = Self::counted(cluster, |cluster| &cluster.state.retrying);
        let state = &cluster.state;
        let retrying = state.retrying.load(Ordering::Relaxed);
        let budget = &cluster.retry_budget;
        if let Some(interval) = budget.interval {
            let recent = state.recent.get_or_init(Box::default);
            return recent.retry(budget, interval, retrying).then_some(retry);
        }
        // A share of the requests that are no retries: measured by all of them, a fifth would become a quarter.
        let first_tries = state.active.load(Ordering::Relaxed).saturating_sub(retrying);
        (retrying <= budget.limit(first_tries)).then_some(retry)
    }

    /// A copy for a mirror; `None` when there are too many already: a slow mirror is none of the request's trouble.
    pub fn mirror(cluster: &Arc<Cluster>) -> Option<Self> {
        let mirror = Self::counted(cluster, |cluster| &cluster.state.mirroring);
        (cluster.state.mirroring.load(Ordering::Relaxed) <= MOST_MIRRORED).then_some(mirror)
    }

    fn counted(cluster: &Arc<Cluster>, count: fn(&Cluster) -> &AtomicU32) -> Self {
        count(cluster).fetch_add(1, Ordering::Relaxed);
        Self { cluster: Arc::clone(cluster), count }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        (self.count)(&self.cluster).fetch_sub(1, Ordering::Relaxed);
    }
}

/// A retry under way, as it is counted: in the budget, or against `maxRetries` of the rule.
#[expect(dead_code, reason = "held for what is counted")]
pub(super) enum Retrying {
    Budget(UnderWay),
    Most(Used),
}

impl Retrying {
    /// `None` when there are as many already as there may be.
    fn begin(pod: &Pod, cluster: &Arc<Cluster>) -> Option<Self> {
        match (cluster.pool.retries, pod.usage(cluster)) {
            (Some(most), Some(usage)) => usage.retry(most).map(Self::Most),
            _ => UnderWay::retry(cluster).map(Self::Budget),
        }
    }
}

/// Sends until a try is good enough or no more are allowed. The last try's answer counts.
pub(super) async fn run(
    outbound: &Outbound,
    exchange: &mut Exchange,
    policy: &RetryPolicy,
    cluster: &Arc<Cluster>,
    sendable: &mut Sendable,
) -> Result<Response<Body>> {
    exchange.under_way = Some(UnderWay::request(cluster));
    let mut tried: Vec<SocketAddr> = Vec::new();
    let mut request = sendable.next(1);
    let mut retrying = None;
    loop {
        let Some(mut sending) = request.take() else {
            return Err(Error::new(Kind::UpstreamReset, "the request body is too long to be sent again"));
        };
        let limit = try_limit(exchange, policy);
        if let Some(limit) = limit {
            // What the client has said of its call itself stands as it is, the first time.
            let lowered = exchange.tries > 0 || exchange.told != Some(limit);
            headers::expected(sending.headers_mut(), limit, exchange.grpc && lowered);
        }
        let result = one(outbound, exchange, cluster, sending, &tried, limit).await;
        // What the failed try held of the budget goes back before the next one asks.
        drop(retrying.take());
        let covered = match &result {
            Ok(response) => retry::covers_response(&policy.on, response, &sendable.parts.headers),
            Err(error) => retry::covers_error(&policy.on, error),
        };
        if !covered {
            return result;
        }
        let Some(next) = another(outbound, exchange, policy, cluster) else { return result };
        request = sendable.next(exchange.tries + 1);
        if request.is_none() {
            return result;
        }
        drop(result);
        retrying = Some(next.wait(exchange, policy, &mut tried).await);
    }
}

/// Another try that may be made.
pub(super) struct Another {
    under_way: Retrying,
    wait: Duration,
}

impl Another {
    /// Lets go of what the failed try held, so that the next one can choose anew, and waits until that is due. What comes of
    /// it counts as a retry for as long as it is kept.
    pub async fn wait(
        self,
        exchange: &mut Exchange,
        policy: &RetryPolicy,
        tried: &mut Vec<SocketAddr>,
    ) -> Retrying {
        if policy.ignore_previous_hosts {
            tried.extend(exchange.endpoint);
        }
        if let Some(chosen) = exchange.chosen.as_ref().filter(|_| policy.remote_localities) {
            exchange.visited.note(chosen);
        }
        (exchange.lease, exchange.chosen, exchange.place) = (None, None, None);
        if exchange.sides == Sides::Both {
            exchange.standing = None;
        }
        let _own = exchange.client.activity.own_wait();
        tokio::time::sleep(self.wait).await;
        self.under_way
    }
}

/// Whether there may be another try after one that the route's conditions cover.
pub(super) fn another(
    outbound: &Outbound,
    exchange: &mut Exchange,
    policy: &RetryPolicy,
    cluster: &Arc<Cluster>,
) -> Option<Another> {
    let wait = retry::backoff(policy, exchange.tries + 1);
    let late = |wait| exchange.deadline.is_some_and(|deadline| Instant::now() + wait >= deadline);
    if policy.attempts == 0 || late(Duration::ZERO) {
        return None;
    }
    if exchange.tries > policy.attempts {
        exchange.gave_up = Some(GaveUp::Tries);
        return None;
    }
    let Some(under_way) = Retrying::begin(&outbound.pod, cluster) else {
        exchange.gave_up = Some(GaveUp::Budget);
        outbound.mesh.reporter.retry_over_budget(cluster);
        return None;
    };
    (!late(wait)).then_some(Another { under_way, wait })
}

/// When the next try must have its response headers: `perTryTimeout`, within the route's `timeout`.
fn try_limit(exchange: &Exchange, policy: &RetryPolicy) -> Option<Instant> {
    let per_try = policy.per_try_timeout.map(|limit| Instant::now() + limit);
    match (per_try, exchange.deadline) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (one, other) => one.or(other),
    }
}

/// Who serves this try: the cluster, or a fallback of it, where nobody in it does.
pub(super) fn serving<'c>(
    outbound: &Outbound,
    exchange: &mut Exchange,
    cluster: &'c Arc<Cluster>,
) -> &'c Arc<Cluster> {
    let cluster = outbound.serving(cluster);
    if !exchange.cluster.as_ref().is_some_and(|noted| Arc::ptr_eq(noted, cluster)) {
        exchange.cluster = Some(Arc::clone(cluster));
    }
    cluster
}

/// An endpoint that was chosen and permitted.
pub(super) struct Picked {
    pub endpoint: Arc<Endpoint>,
    pub via: Via,
    pub permit: policy::Permit,
}

/// Chooses an endpoint of the cluster for a request, and notes it in the exchange.
async fn pick(
    outbound: &Outbound,
    exchange: &mut Exchange,
    cluster: &Cluster,
    request: &mut Request<Body>,
    tried: &[SocketAddr],
) -> Result<Picked> {
    let keyed = balance::key(cluster, Some((request.uri(), request.headers())), outbound.shown.ip());
    let wish = Wish { tried, hash: keyed.hash, visited: exchange.visited, ..Wish::default() };
    let chosen = choose::endpoint(&outbound.mesh, &outbound.pod, cluster, &wish, Some(outbound.dialled()))?;
    exchange.set_cookie = keyed.set_cookie;
    let endpoint = Arc::clone(&chosen.endpoint);
    exchange.chosen = Some(chosen);
    exchange.tries += 1;
    // Now, so that the next try avoids it however this one fails.
    exchange.endpoint = Some(endpoint.address);
    let via =
        upstream::via(&outbound.mesh.pods, &outbound.mesh.node, &endpoint, cluster.connect_timeout).await?;
    note(outbound, exchange, &endpoint, &via);
    let (permit, standing) =
        permits::request_to(&outbound.mesh, outbound.asks(), &via, &endpoint, request).await?;
    // What a gateway has been asked for stands whatever endpoint it goes to.
    exchange.standing = standing.or_else(|| exchange.standing.take());
    Ok(Picked { endpoint, via, permit })
}

/// The same, within the time that there is: an external authorizer may take long.
pub(super) async fn pick_in_time(
    outbound: &Outbound,
    exchange: &mut Exchange,
    cluster: &Cluster,
    request: &mut Request<Body>,
    tried: &[SocketAddr],
    limit: Option<Instant>,
) -> Result<Picked> {
    let activity = Arc::clone(&exchange.client.activity);
    let picked = {
        let picking = pin!(pick(outbound, exchange, cluster, request, tried));
        in_time(outbound, &activity, &"an external authorizer", limit, picking).await
    };
    if let Err(error) = &picked
        && error.kind != Kind::Timeout
    {
        // A pod of this node may have too much to do already; time that an authorizer took is none of the endpoint's.
        health::timed(exchange.chosen.as_mut(), health::pace_of_error(error));
    }
    picked
}

/// Takes a place among what the cluster's `connectionPool` allows, within the time that there is, and notes it in the
/// exchange. Before an endpoint is chosen: who waits for a connection is no load of any.
pub(super) async fn take_place(
    outbound: &Outbound,
    exchange: &mut Exchange,
    cluster: &Cluster,
    protocol: Protocol,
    limit: Option<Instant>,
) -> Result<()> {
    let Some(usage) = outbound.pod.usage(cluster) else { return Ok(()) };
    let activity = Arc::clone(&exchange.client.activity);
    // Boxed: few clusters are limited.
    let mut taking = Box::pin(usage.request(&cluster.pool, protocol));
    let taking = in_time(outbound, &activity, &"the queue for a connection", limit, taking.as_mut());
    exchange.place = Some(Box::pin(taking).await?);
    Ok(())
}

async fn one(
    outbound: &Outbound,
    exchange: &mut Exchange,
    cluster: &Arc<Cluster>,
    mut request: Box<Request<Body>>,
    tried: &[SocketAddr],
    limit: Option<Instant>,
) -> Result<Response<Body>> {
    let cluster = serving(outbound, exchange, cluster);
    let protocol = requests::upstream_protocol(cluster, exchange.client.version, exchange.grpc);
    take_place(outbound, exchange, cluster, protocol, limit).await?;
    let Picked { endpoint, via, permit } =
        pick_in_time(outbound, exchange, cluster, &mut request, tried, limit).await?;
    let service = exchange.cluster.as_ref().map(|cluster| &cluster.host);
    let (service, protocol_seen) = (service.cloned(), exchange.protocol());
    let passed = || outbound.passed_flow(&endpoint, service.clone(), protocol_seen);
    let usage = outbound.pod.usage(cluster);
    let destination = Destination {
        address: endpoint.address,
        via: &via,
        protocol,
        connect_timeout: cluster.connect_timeout,
        kept: Kept::of(cluster, usage.as_ref()).on_behalf(outbound.shown, outbound.dialled()),
        // In a pass within the node nobody else knows what the app's connection is for.
        flow: matches!(via, Via::Local(_)).then_some(&passed),
    };
    let (client, inform) = (outbound.shown, &exchange.client.inform);
    let sending = pin!(outbound.pod.send(&permit, &destination, request, client, inform));
    let sending = pin!(in_time(outbound, &exchange.client.activity, &endpoint.address, limit, sending));
    let sent = unless_cut(exchange.standing.as_mut(), sending).await;
    let result = sent.map(|(response, lease)| {
        exchange.lease = Some(lease);
        response
    });
    health::timed(exchange.chosen.as_mut(), health::pace_of_try(&result));
    health::learn(&outbound.mesh.reporter, cluster, &endpoint, || health::of_try(&result));
    if let Ok(response) = &result {
        health::learn_load(Some(cluster), exchange.chosen.as_ref(), response.headers());
    }
    result
}

/// Waits for what somebody answers: until `limit`, and for as long as anything moves. Pinned as in [`unless_cut`].
pub(super) async fn in_time<T>(
    outbound: &Outbound,
    activity: &Activity,
    from: &(dyn Display + Sync),
    limit: Option<Instant>,
    answer: Pin<&mut impl Future<Output = Result<T>>>,
) -> Result<T> {
    let late = async {
        match limit {
            Some(limit) => sleep_until(limit).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        answer = answer => answer,
        () = late => Err(Error::new(Kind::Timeout, format!("no response from {from} in time"))),
        () = activity.stalled(outbound.mesh.limits.stall()) => {
            let text = format!("nothing moved for too long while waiting for {from}");
            Err(Error::new(Kind::StreamIdle, text))
        }
    }
}

fn note(outbound: &Outbound, exchange: &mut Exchange, endpoint: &Endpoint, via: &Via) {
    exchange.endpoint = Some(endpoint.address);
    exchange.destination = endpoint.workload.as_ref().map(vouched).unwrap_or_default();
    exchange.security = via.security();
    exchange.sides = if matches!(via, Via::Local(_)) { Sides::Both } else { Sides::Source };
    outbound.flow.learn(|facts| {
        if facts.endpoint != exchange.endpoint {
            learn_end(facts, endpoint, via, exchange.protocol());
        }
        if facts.route != exchange.route_name {
            facts.route.clone_from(&exchange.route_name);
        }
    });
}
