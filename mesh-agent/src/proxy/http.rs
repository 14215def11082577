//! An HTTP connection of a pod's app: each request is routed, permitted, balanced and sent on its own.

use std::{convert::Infallible, sync::Arc, time::Duration};

use http::{HeaderValue, Request, Response, header::LOCATION};
use hyper::{body::Incoming, server::conn, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::TcpStream;

use super::{
    exchange::{Exchange, Reported, Sides},
    outbound::Outbound,
    tries::{self, Sendable},
};
use crate::{
    body::Body,
    detect::Prefixed,
    error::{Error, FaultStatus, Kind, Result},
    route,
    state::snapshot::{Abort, Backend, Cluster, Fault, HttpRoute, Protocol, RouteAction, WeightedBackend},
    tunnel,
    upstream::message,
};

/// Time for the head of an HTTP/1 request, first byte to last.
const HEAD_TIMEOUT: Duration = Duration::from_mins(1);

/// Largest head of a request, bytes (Envoy: 60 KiB), and for HTTP/1 the largest buffer.
const HEAD_LIMIT: u32 = 60 << 10;

/// HTTP/2 towards apps: windows in bytes, and how many requests one connection may have open (Envoy: 2^31 - 1; what is
/// open is bounded by the pod's budget).
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;
const STREAMS: u32 = 1 << 10;

/// Serves requests until the client is done or the pod drains.
pub(super) async fn serve(
    outbound: Arc<Outbound>,
    client: Prefixed<TcpStream>,
    version: Protocol,
    cluster: Arc<Cluster>,
) -> Result<()> {
    let io = TokioIo::new(client);
    let shared = Arc::clone(&outbound);
    let answer =
        service_fn(move |request| answer(Arc::clone(&shared), Arc::clone(&cluster), version, request));
    let ended = if version == Protocol::Http2 {
        let mut builder = conn::http2::Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_concurrent_streams(STREAMS)
            .max_header_list_size(HEAD_LIMIT);
        let mut connection = std::pin::pin!(builder.serve_connection(io, answer));
        tokio::select! {
            ended = &mut connection => ended,
            () = outbound.pod.drain.started() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        }
    } else {
        let mut builder = conn::http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .max_buf_size(HEAD_LIMIT as usize)
            .half_close(true);
        let mut connection = std::pin::pin!(builder.serve_connection(io, answer));
        tokio::select! {
            ended = &mut connection => ended,
            () = outbound.pod.drain.started() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        }
    };
    ended.or_else(|error| broken(&outbound, &error))
}

/// How a connection that did not end well is told: bad bytes are a refusal, a client that goes away is not.
fn broken(outbound: &Outbound, error: &hyper::Error) -> Result<()> {
    let protocol_error = error.is_parse()
        || std::error::Error::source(error)
            .and_then(|cause| cause.downcast_ref::<h2::Error>())
            .is_some_and(|cause| cause.is_go_away() && !cause.is_remote() || cause.is_library());
    if protocol_error {
        return Err(Error::new(Kind::BadRequest, format!("not a valid HTTP request: {error}")));
    }
    tracing::debug!(client = %outbound.ends.client, %error, "connection of a client ended early");
    Ok(())
}

async fn answer(
    outbound: Arc<Outbound>,
    cluster: Arc<Cluster>,
    version: Protocol,
    request: Request<Incoming>,
) -> std::result::Result<Response<Reported>, Infallible> {
    let (parts, body) = request.into_parts();
    let mesh = &outbound.mesh;
    let mut exchange =
        Exchange::begin(&mesh.reporter, Sides::Source, outbound.source.clone(), outbound.ends, &parts);
    exchange.cluster = Some(cluster);
    let answered = forward(&outbound, &mut exchange, version, parts, body).await;
    Ok(match answered {
        Ok((head, body)) => exchange.respond(head, body),
        Err(error) => exchange.refuse(error),
    })
}

/// The request's way: normalise → route → fault → rewrite → send → the response's headers.
async fn forward(
    outbound: &Outbound,
    exchange: &mut Exchange,
    version: Protocol,
    mut parts: http::request::Parts,
    body: Incoming,
) -> Result<(http::response::Parts, Body)> {
    message::normalise(&mut parts)?;
    message::strip_hop_by_hop(&mut parts.headers);
    tunnel::strip_mesh_headers(&mut parts.headers);
    exchange.authority = parts.uri.authority().map(ToString::to_string).unwrap_or_default();

    let snapshot = outbound.mesh.snapshot();
    let (port, routes) = {
        let known = exchange.cluster.as_ref().and_then(|cluster| {
            snapshot.services.get(&cluster.host).and_then(|service| service.port(cluster.port))
        });
        let known = known.ok_or_else(|| Error::new(Kind::NoRoute, "the service is no longer there"))?;
        (known.port, Arc::clone(&known.routes))
    };
    let workload = outbound.pod.workload();
    let Some((route, matched)) = route::find(&routes, &parts, port, &workload) else {
        let text =
            format!("no route of {} matches {} {}", exchange.authority, parts.method, parts.uri.path());
        return Err(Error::new(Kind::NoRoute, text));
    };
    exchange.route = Some(Arc::clone(route));

    inject(&route.fault, exchange).await?;
    match &route.action {
        RouteAction::Redirect(redirect) => {
            let location = route::location(redirect, &parts, matched, port);
            let (mut head, ()) = Response::new(()).into_parts();
            head.status = redirect.status;
            let location = HeaderValue::from_str(&location).map_err(|_| {
                Error::new(Kind::BadRequest, "the redirect's Location would not be a valid header")
            })?;
            head.headers.insert(LOCATION, location);
            route::apply_response(&mut head.headers, &route.headers.response);
            Ok((head, Body::Empty))
        }
        RouteAction::Direct { status, body } => {
            let (mut head, ()) = Response::new(()).into_parts();
            head.status = *status;
            route::apply_response(&mut head.headers, &route.headers.response);
            Ok((head, Body::from(body.clone())))
        }
        RouteAction::Forward(backends) => {
            let backend = route::draw(backends);
            route::apply_request(&mut parts, &route.headers.request);
            route::apply_request(&mut parts, &backend.headers.request);
            route::rewrite(&mut parts, &route.rewrite, matched);
            let sendable = Sendable::new(parts, body, route, exchange);
            send(outbound, exchange, version, route, backend, sendable).await
        }
    }
}

async fn send(
    outbound: &Outbound,
    exchange: &mut Exchange,
    version: Protocol,
    route: &HttpRoute,
    backend: &WeightedBackend,
    sendable: Sendable,
) -> Result<(http::response::Parts, Body)> {
    let cluster = match &backend.backend {
        Backend::Cluster(cluster) => cluster,
        Backend::Missing(what) => {
            return Err(Error::new(Kind::NoHealthyUpstream, format!("{}: {what}", route.origin)));
        }
    };
    exchange.cluster = Some(Arc::clone(cluster));
    exchange.limit(route.timeout);
    let protocol = upstream_protocol(cluster, version, exchange.grpc);
    let response = tries::run(outbound, exchange, route, cluster, protocol, sendable).await?;
    let (mut head, body) = response.into_parts();
    message::for_client(&mut head.headers, head.status);
    tunnel::strip_mesh_headers(&mut head.headers);
    route::apply_response(&mut head.headers, &route.headers.response);
    route::apply_response(&mut head.headers, &backend.headers.response);
    head.version = http::Version::default();
    Ok((head, body))
}

/// What to speak to the app: what its port declares; where nothing is declared, what the client speaks. gRPC needs HTTP/2
/// whatever the port is called.
fn upstream_protocol(cluster: &Cluster, client: Protocol, grpc: bool) -> Protocol {
    match cluster.protocol {
        _ if grpc => Protocol::Http2,
        Some(declared @ (Protocol::Http1 | Protocol::Http2)) => declared,
        _ => client,
    }
}

/// `fault`: first the delay, then the abort (Envoy's order).
async fn inject(fault: &Fault, exchange: &mut Exchange) -> Result<()> {
    if let Some((share, delay)) = fault.delay
        && route::hits(share)
    {
        exchange.delay_injected = true;
        tokio::time::sleep(delay).await;
    }
    if let Some((share, abort)) = fault.abort
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
