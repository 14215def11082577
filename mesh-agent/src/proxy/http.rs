//! A request of a pod's app, or of who comes to a gateway: routed, permitted, balanced and sent on its own, whatever connection it came on.
//!
//! Reads top to bottom: check → normalise → route → preflight → fault → rewrite → mirror → send → the response's headers.

use std::sync::Arc;

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Request, Response, StatusCode,
    header::{CONTENT_TYPE, LOCATION, SET_COOKIE},
    request, response,
};

use super::{
    asked,
    exchange::{Client, Exchange, Reported, Sides},
    gateway::{Admitted, Entry},
    headers, mirror,
    outbound::Outbound,
    permits,
    tries::{self, Sendable},
    upgrade::{self, Agreed, Carried, Taker},
};
use crate::{
    body::Body,
    config::HttpLimits,
    error::{Error, FaultStatus, Kind, Result},
    http1::{Refusal, Turn},
    route,
    state::snapshot::{
        Abort, Backend, Cluster, HttpRoute, Protocol, Redirect, RequestMatch, RouteAction, WeightedBackend,
        Workload,
    },
    tunnel,
    upstream::{Switch, message},
};

/// What the client is told.
pub(super) enum Answered {
    /// A response, whose body reports when it ends.
    Response(Response<Reported>),
    /// The protocol is switched: this head, and from then on bytes, until they are over.
    Switch(Response<()>, Taker, Carried),
}

/// What the way of a request comes to.
pub(super) enum Made {
    Response(Response<Body>),
    Switch(Agreed),
}

/// Where a request has come to.
pub(super) enum To<'a> {
    /// A port of a service, which a pod's app has dialled.
    Service(Arc<Cluster>),
    /// A port of a gateway.
    Gateway(&'a Arc<Entry>),
}

/// Answers one request. `refused`: what the connection it came on found wrong with it.
pub(super) async fn answer(
    outbound: &Arc<Outbound>,
    to: To<'_>,
    request: Box<Request<Body>>,
    client: Client,
    refused: Option<Refusal>,
) -> Answered {
    let source = outbound.source.clone();
    let reporter = &outbound.mesh.reporter;
    let mut exchange = Exchange::begin(reporter, Sides::Source, source, outbound.ends, client, &request);
    let entry = match to {
        To::Service(cluster) => {
            exchange.cluster = Some(cluster);
            None
        }
        To::Gateway(entry) => Some(&**entry),
    };
    exchange.held = Some(outbound.pod.hold());
    let made = if let Some(refusal) = refused {
        exchange.unread();
        Err(Error::from(refusal))
    } else {
        let (parts, body) = (*request).into_parts();
        forward(outbound, entry, &mut exchange, parts, body).await
    };
    match made {
        Ok(Made::Response(response)) => {
            let (head, body) = response.into_parts();
            Answered::Response(exchange.respond(head, body))
        }
        Ok(Made::Switch(agreed)) => {
            let drain = entry.map_or(&outbound.pod.drain, Entry::drain);
            upgrade::carry(Arc::clone(outbound), drain, exchange, agreed)
        }
        Err(error) => {
            // What broke the body off is what went wrong, whatever it led to behind.
            let refused = exchange.client.turn.as_ref().and_then(Turn::body_refusal);
            Answered::Response(exchange.refuse(refused.map_or(error, Error::from)))
        }
    }
}

/// The request's way.
async fn forward(
    outbound: &Arc<Outbound>,
    entry: Option<&Entry>,
    exchange: &mut Exchange,
    mut parts: request::Parts,
    mut body: Body,
) -> Result<Made> {
    within(&outbound.mesh.limits, &parts)?;
    let wanted = Switch::asked(&parts);
    let expects = message::expects_continue(exchange.client.version, &parts.headers);
    accept(outbound, entry, exchange, &mut parts)?;
    outbound.mesh.overload.admit(|| outbound.pod.held())?;

    let workload = outbound.pod.workload();
    let (port, routes) = match entry {
        None => routes(outbound, exchange, &workload)?,
        // Boxed: no request of a pod is to make room for it.
        Some(entry) => match Box::pin(entry.admit(exchange, parts, body, expects)).await? {
            Admitted::ByHttps(location) => {
                return redirect_to(exchange, StatusCode::MOVED_PERMANENTLY, &location);
            }
            Admitted::ToRoutes { request, port, routes } => {
                (parts, body) = request.into_parts();
                (port, routes)
            }
        },
    };
    let Some((route, matched)) = route::find(&routes, &parts, port, &workload) else {
        let text =
            format!("no route of {} matches {} {}", exchange.authority(), parts.method, parts.uri.path());
        return Err(Error::new(Kind::NoRoute, text));
    };
    exchange.route_name = Some(Arc::clone(route.name_of(matched)));
    exchange.stat_name = route.stat_name_of(matched).cloned();
    exchange.route = Some(Arc::clone(route));

    if let Some((status, headers)) =
        route.cors.as_deref().and_then(|cors| route::cors::preflight(cors, &parts))
    {
        let (mut head, ()) = Response::new(()).into_parts();
        (head.status, head.headers) = (status, headers);
        return Ok(Made::Response(Response::from_parts(head, Body::Empty)));
    }
    inject(route, exchange, &parts).await?;
    match &route.action {
        RouteAction::Redirect(redirect) => redirected(exchange, route, redirect, &parts, matched, port),
        RouteAction::Direct { status, body } => {
            let (mut head, ()) = Response::new(()).into_parts();
            head.status = *status;
            if !body.is_empty() {
                head.headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
            }
            route::apply_response(&mut head.headers, &route.headers.response);
            Ok(Made::Response(exchange.local(head, body.clone())))
        }
        RouteAction::Forward(backends) => {
            if expects {
                exchange.client.inform.inform(StatusCode::CONTINUE, &HeaderMap::new());
            }
            let backend = route::draw(backends);
            route::apply_request(&mut parts, &route.headers.request);
            route::apply_request(&mut parts, &backend.headers.request);
            route::rewrite(&mut parts, &route.rewrite, matched);
            send(outbound, exchange, route, backend, parts, body, wanted).await
        }
    }
}

/// Brings the request into the form that the rest works with, and notes what it is.
fn accept(
    outbound: &Outbound,
    entry: Option<&Entry>,
    exchange: &mut Exchange,
    parts: &mut request::Parts,
) -> Result<()> {
    message::normalise(parts, outbound.ends.original_dst)?;
    message::strip_hop_by_hop(&mut parts.headers);
    tunnel::strip_mesh_headers(&mut parts.headers);
    if let Some(entry) = entry {
        entry.mark(parts);
    }
    permits::settle_path(&outbound.mesh, &mut parts.uri)?;
    exchange.authority = parts.uri.authority().cloned();
    exchange.request_id = Some(headers::identify(&mut parts.headers));
    if exchange.grpc {
        exchange.limit(headers::grpc_timeout(&parts.headers));
        exchange.told = exchange.deadline;
    }
    Ok(())
}

/// The port that was dialled and its routes, as they are now for this pod.
fn routes(
    outbound: &Outbound,
    exchange: &Exchange,
    workload: &Workload,
) -> Result<(u16, Arc<[Arc<HttpRoute>]>)> {
    let snapshot = outbound.mesh.snapshot();
    let known = exchange.cluster.as_ref().and_then(|cluster| {
        let service = snapshot.services.get(&cluster.host)?;
        service.port_for(workload.view(), cluster.port)
    });
    let known = known.ok_or_else(|| Error::new(Kind::NoRoute, "the service is no longer there"))?;
    Ok((known.port, Arc::clone(&known.routes)))
}

/// What the connection it came on has not bounded yet (HTTP/2).
pub(super) fn within(limits: &HttpLimits, parts: &request::Parts) -> Result<()> {
    let target = parts.uri.path_and_query().map_or(0, |target| target.as_str().len());
    if target > limits.max_request_target_bytes as usize {
        let text = format!("the target has {target} bytes, {} are allowed", limits.max_request_target_bytes);
        return Err(Error::new(Kind::TargetTooLong, text));
    }
    let bytes: usize = parts.headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    if bytes > limits.max_request_head_bytes as usize {
        let text = format!("the headers have {bytes} bytes, {} are allowed", limits.max_request_head_bytes);
        return Err(Error::new(Kind::HeadTooLarge, text));
    }
    if parts.headers.len() > limits.max_request_headers as usize {
        let count = parts.headers.len();
        let text = format!("there are {count} headers, {} are allowed", limits.max_request_headers);
        return Err(Error::new(Kind::HeadTooLarge, text));
    }
    Ok(())
}

fn redirected(
    exchange: &Exchange,
    route: &HttpRoute,
    redirect: &Redirect,
    parts: &request::Parts,
    matched: Option<&RequestMatch>,
    port: u16,
) -> Result<Made> {
    let location = route::location(redirect, parts, matched, port);
    let mut head = redirect_head(redirect.status, &location)?;
    route::apply_response(&mut head.headers, &route.headers.response);
    Ok(Made::Response(exchange.local(head, Bytes::new())))
}

fn redirect_to(exchange: &Exchange, status: StatusCode, location: &str) -> Result<Made> {
    Ok(Made::Response(exchange.local(redirect_head(status, location)?, Bytes::new())))
}

fn redirect_head(status: StatusCode, location: &str) -> Result<response::Parts> {
    let (mut head, ()) = Response::new(()).into_parts();
    head.status = status;
    let location = HeaderValue::from_str(location)
        .map_err(|_| Error::new(Kind::BadRequest, "the redirect's Location would not be a valid header"))?;
    head.headers.insert(LOCATION, location);
    Ok(head)
}

async fn send(
    outbound: &Arc<Outbound>,
    exchange: &mut Exchange,
    route: &HttpRoute,
    backend: &WeightedBackend,
    mut parts: request::Parts,
    body: Body,
    wanted: Option<Switch>,
) -> Result<Made> {
    let cluster = match &backend.backend {
        Backend::Cluster(cluster) => cluster,
        Backend::Missing(what) => {
            return Err(Error::new(Kind::NoHealthyUpstream, format!("{}: {what}", route.origin)));
        }
    };
    exchange.cluster = Some(Arc::clone(cluster));
    let terms = asked::terms(&mut parts.headers, route.timeout, &route.retries);
    exchange.limit(terms.timeout);
    exchange.sent();
    let response = if let Some(wanted) = wanted {
        // Boxed: rare, and its room is not the usual request's to pay.
        let request = Request::from_parts(parts, body);
        match Box::pin(upgrade::ask(outbound, exchange, cluster, &terms.retries, request, &wanted)).await? {
            Made::Response(response) => response,
            switched @ Made::Switch(_) => return Ok(switched),
        }
    } else {
        let kept = terms.retries.attempts > 0 || !route.mirrors.is_empty();
        let mut sendable = Sendable::new(parts, body, kept, &outbound.pod, exchange);
        mirror::send(outbound, route, terms.timeout, &sendable, exchange.grpc);
        // Boxed: its room goes back once the head of the response is there, while the body may take long.
        Box::pin(tries::run(outbound, exchange, &terms.retries, cluster, &mut sendable)).await?
    };
    let (mut head, body) = response.into_parts();
    for_client(&mut head, exchange);
    if let Some(cookie) = exchange.set_cookie.take() {
        head.headers.append(SET_COOKIE, cookie);
    }
    route::apply_response(&mut head.headers, &route.headers.response);
    route::apply_response(&mut head.headers, &backend.headers.response);
    Ok(Made::Response(Response::from_parts(head, body)))
}

fn for_client(head: &mut response::Parts, exchange: &Exchange) {
    message::for_client(&mut head.headers, head.status);
    tunnel::strip_mesh_headers(&mut head.headers);
    headers::served_in(&mut head.headers, exchange.served_in());
    head.version = http::Version::default();
    head.extensions = http::Extensions::new();
}

/// What to speak to the app: what the cluster's `connectionPool` says, else what its port declares; where nothing is declared, what the client speaks. gRPC needs HTTP/2
/// whatever the port is called.
pub(super) fn upstream_protocol(cluster: &Cluster, client: Protocol, grpc: bool) -> Protocol {
    match cluster.protocol {
        _ if grpc || cluster.pool.upgrade => Protocol::Http2,
        _ if cluster.pool.client_protocol => client,
        Some(declared @ (Protocol::Http1 | Protocol::Http2)) => declared,
        _ => client,
    }
}

/// What another protocol is asked for in: `Upgrade` is HTTP/1.1's, unless the port declares HTTP/2 (`h2UpgradePolicy` is
/// about requests: few servers take an `Upgrade` over HTTP/2), or the rule says that the client's version is kept.
pub(super) fn upgrade_protocol(cluster: &Cluster, client: Protocol) -> Protocol {
    if cluster.pool.client_protocol {
        return client;
    }
    cluster.protocol.filter(|declared| *declared == Protocol::Http2).unwrap_or(Protocol::Http1)
}

/// The version a request was made in.
pub(super) fn version_of<B>(request: &Request<B>) -> Protocol {
    if request.version() == http::Version::HTTP_2 { Protocol::Http2 } else { Protocol::Http1 }
}

/// `fault`: first the delay, then the abort (Envoy's order).
async fn inject(route: &HttpRoute, exchange: &mut Exchange, parts: &request::Parts) -> Result<()> {
    let injection = route::injection(&route.fault, &parts.headers);
    if let Some((share, delay)) = injection.delay
        && route::hits(share)
    {
        exchange.delay_injected = true;
        let _own = exchange.client.activity.own_wait();
        tokio::time::sleep(delay).await;
    }
    if let Some((share, abort)) = injection.abort
        && route::hits(share)
    {
        let status = match abort {
            Abort::Http(status) => FaultStatus::Http(status),
            Abort::Grpc(code) => FaultStatus::Grpc(code),
        };
        return Err(Error::new(Kind::FaultAbort(status), "abort injected by the route"));
    }
    Ok(())
}
