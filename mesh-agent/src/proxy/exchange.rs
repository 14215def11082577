//! One HTTP request and its response, to the last byte of the body: what is known of it, reported exactly once.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Method, Request, StatusCode,
    header::ORIGIN,
    uri::{Authority, PathAndQuery},
};
use http_body::{Body as _, Frame, SizeHint};
use percent_encoding::{AsciiSet, CONTROLS, percent_encode};
use tokio::time::{Instant, Sleep};

use super::{Ends, headers, health, permits::Stands, tries::UnderWay};
use crate::{
    balance::{Chosen, Visited},
    body::{Activity, Body, BodyError, Breaking, Inform, Meter},
    error::{Error, Kind, grpc_of},
    http1::Turn,
    report::{GaveUp, Peer, Reporter, RequestOutcome, RequestProtocol, Security, Side},
    route,
    state::snapshot::{Cluster, HttpRoute, Protocol},
    tunnel,
    upstream::{Held, Lease, RequestPlace, message, retry},
};

/// What `grpc-message` has encoded, beside what is not ASCII (gRPC over HTTP/2, "Responses").
const GRPC_MESSAGE: &AsciiSet = &CONTROLS.add(b'%');

/// The client's side of one request, as its connection gives it.
pub(super) struct Client {
    /// What it speaks.
    pub version: Protocol,
    /// Whether anything moves.
    pub activity: Arc<Activity>,
    /// Where interim responses go.
    pub inform: Arc<dyn Inform>,
    /// Over HTTP/1: its turn on the connection, which ends with the exchange.
    pub turn: Option<Turn>,
}

/// What is known of one request; reported when dropped. Boxed: it is large, and goes from hand to hand.
pub(super) struct Exchange {
    pub reporter: Arc<Reporter>,
    /// Source, destination, or both for a pass within the node.
    pub sides: Sides,
    pub source: Peer,
    pub destination: Peer,
    pub ends: Ends,
    pub client: Client,
    pub route: Option<Arc<HttpRoute>>,
    /// What logs call the route.
    pub route_name: Option<Arc<str>>,
    /// What metrics call the route.
    pub stat_name: Option<Arc<str>>,
    pub cluster: Option<Arc<Cluster>>,
    pub endpoint: Option<SocketAddr>,
    pub security: Security,
    pub error: Option<Error>,
    pub delay_injected: bool,
    pub gave_up: Option<GaveUp>,
    pub tries: u32,
    pub request: Arc<Meter>,
    pub grpc: bool,
    pub authority: Option<Authority>,
    pub request_id: Option<HeaderValue>,
    /// When the whole response must have passed.
    pub deadline: Option<Instant>,
    /// The deadline of a call by its client's own word (`grpc-timeout`).
    pub told: Option<Instant>,
    /// Held until the response has ended.
    pub lease: Option<Lease>,
    /// At a pod of this node: what is asked again when its policies change.
    pub standing: Stands,
    /// Counts as in flight until the response has ended.
    pub chosen: Option<Chosen>,
    /// What it has in use of a limited cluster until the response has ended.
    pub place: Option<RequestPlace>,
    /// Where the tries before went, if the next one is to go elsewhere.
    pub visited: Visited,
    /// Counts as under way at the cluster until the response has ended.
    pub under_way: Option<UnderWay>,
    /// Counts as the pod's until the response has ended.
    pub held: Option<Held>,
    /// Given to the client with the response, so that it comes back to the same endpoint.
    pub set_cookie: Option<HeaderValue>,
    method: Method,
    path: Option<PathAndQuery>,
    unread: bool,
    /// Of a browser's request: the site it is made from.
    origin: Option<HeaderValue>,
    started: Instant,
    sent: Instant,
    /// What the client was told; `None` while it was told nothing.
    status: Option<StatusCode>,
    grpc_status: Option<u32>,
    response_bytes: u64,
}

/// Who reports an exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sides {
    Source,
    Destination,
    Both,
}

impl Exchange {
    /// What the request is called in reports.
    pub fn protocol(&self) -> RequestProtocol {
        if self.grpc { RequestProtocol::Grpc } else { RequestProtocol::Http }
    }

    pub fn begin(
        reporter: &Arc<Reporter>,
        sides: Sides,
        source: Peer,
        ends: Ends,
        client: Client,
        request: &Request<Body>,
    ) -> Box<Self> {
        client.activity.begin();
        let now = Instant::now();
        Box::new(Self {
            reporter: Arc::clone(reporter),
            sides,
            source,
            destination: Peer::default(),
            ends,
            route: None,
            route_name: None,
            stat_name: None,
            cluster: None,
            endpoint: None,
            security: Security::None,
            error: None,
            delay_injected: false,
            gave_up: None,
            tries: 0,
            request: Arc::new(Meter::new(Arc::clone(&client.activity))),
            client,
            grpc: message::is_grpc(request.headers()),
            authority: None,
            request_id: None,
            deadline: None,
            told: None,
            lease: None,
            standing: None,
            chosen: None,
            place: None,
            visited: Visited::default(),
            under_way: None,
            held: None,
            set_cookie: None,
            method: request.method().clone(),
            path: request.uri().path_and_query().cloned(),
            unread: false,
            origin: request.headers().get(ORIGIN).cloned(),
            started: now,
            sent: now,
            status: None,
            grpc_status: None,
            response_bytes: 0,
        })
    }

    /// Whom the request is for, as its client wrote it; empty where it was not read.
    pub fn authority(&self) -> &str {
        self.authority.as_ref().map_or("", Authority::as_str)
    }

    fn path(&self) -> &str {
        if self.unread { "" } else { self.path.as_ref().map_or("/", PathAndQuery::as_str) }
    }

    /// What came was no request that could be read: nothing is told of it.
    pub fn unread(&mut self) {
        self.unread = true;
    }

    /// The whole exchange, response body included, must be done within this time from now; the shortest counts.
    pub fn limit(&mut self, timeout: Option<Duration>) {
        let Some(timeout) = timeout else { return };
        let deadline = Instant::now() + timeout;
        self.deadline = Some(self.deadline.map_or(deadline, |before| before.min(deadline)));
    }

    /// From now on it is with the endpoints: what held it up before is not theirs.
    pub fn sent(&mut self) {
        self.sent = Instant::now();
    }

    /// How long endpoints have had it.
    pub fn served_in(&self) -> Duration {
        self.sent.elapsed()
    }

    /// The response goes to the client; its body reports when it ends.
    pub fn respond(
        mut self: Box<Self>,
        mut parts: http::response::Parts,
        body: Body,
    ) -> http::Response<Reported> {
        self.status = Some(parts.status);
        self.grpc_status = retry::grpc_status(&parts.headers);
        let cors = self.route.as_ref().and_then(|route| route.cors.as_deref());
        if let (Some(policy), Some(origin)) = (cors, &self.origin) {
            route::cors::apply(policy, origin, &mut parts.headers);
        }
        if let Some(standing) = &self.standing {
            standing.changes_of_response(&mut parts.headers);
        }
        let body = if self.method == Method::HEAD { Body::Empty } else { body };
        let deadline = self.deadline.map(|deadline| Box::pin(tokio::time::sleep_until(deadline)));
        let body = Reported { body, deadline, exchange: Some(self) };
        http::Response::from_parts(parts, body.ended_already())
    }

    /// The mesh answers instead of the endpoint: as a gRPC status to gRPC clients, else with the error's HTTP status.
    pub fn refuse(mut self: Box<Self>, error: Error) -> http::Response<Reported> {
        if let Some(answer) = &error.answer {
            let (head, body) = http::Response::clone(answer).into_parts();
            let (head, body) = self.local(head, body).into_parts();
            (self.deadline, self.standing, self.error) = (None, None, Some(error));
            return self.respond(head, body);
        }
        let (mut parts, ()) = http::Response::new(()).into_parts();
        let row = error.kind.row();
        let body = if self.grpc {
            say_grpc(&mut parts, row.grpc, error.kind.told().as_bytes());
            Body::Empty
        } else {
            parts.status = row.http;
            set(&mut parts.headers, "content-type", "text/plain");
            // The detail names endpoints and policies: it is the operator's, in the log, not the client's.
            Body::from(Bytes::from_static(error.kind.told().as_bytes()))
        };
        if let Kind::Full(limit) = error.kind {
            // Envoy's word that nobody need ask an endpoint.
            set(&mut parts.headers, "x-envoy-overloaded", "true");
            if let Some(cluster) = &self.cluster {
                self.reporter.overflowed(cluster, limit);
            }
        }
        if let Kind::Token(_) = error.kind {
            set(&mut parts.headers, "www-authenticate", &headers::challenge(self.authority(), self.path()));
        }
        // Our own answer is whole: neither the time that was the endpoint's nor a change of its policies cuts it off.
        (self.deadline, self.standing) = (None, None);
        self.error = Some(error);
        self.respond(parts, body)
    }

    /// As [`Exchange::refuse`], towards the agent of the source: it is told what failed and makes its own answer.
    pub fn refuse_to_agent(self: Box<Self>, error: Error) -> http::Response<Reported> {
        let kind = error.kind;
        let mut response = self.refuse(error);
        tunnel::tell_failure(response.headers_mut(), kind);
        response
    }

    /// An answer that the route itself gives; a gRPC client gets it as a status (as Envoy's local replies).
    pub fn local(&self, mut head: http::response::Parts, body: Bytes) -> http::Response<Body> {
        if !self.grpc {
            return http::Response::from_parts(head, Body::from(body));
        }
        let status = grpc_of(head.status);
        say_grpc(&mut head, status, &body);
        http::Response::from_parts(head, Body::Empty)
    }

    /// The client and the endpoint went over to another protocol: this was said, and so much passed.
    pub fn switched(mut self: Box<Self>, status: StatusCode, received: u64, error: Option<Error>) {
        (self.status, self.response_bytes, self.error) = (Some(status), received, error);
    }

    fn report(&self) {
        let protocol = self.protocol();
        let outcome = |side| RequestOutcome {
            side,
            source: &self.source,
            destination: &self.destination,
            cluster: self.cluster.as_deref(),
            protocol,
            security: self.security,
            // 0, as in Envoy, for who was told nothing.
            status: self.status.map_or(0, |status| status.as_u16()),
            grpc_status: self.grpc_status,
            error: self.error.as_ref(),
            delay_injected: self.delay_injected,
            gave_up: self.gave_up,
            method: if self.unread { "" } else { self.method.as_str() },
            authority: self.authority(),
            path: self.path(),
            request_id: self.request_id.as_ref().and_then(|id| id.to_str().ok()),
            route: self.route_name.as_deref().unwrap_or_default(),
            stat_name: self.stat_name.as_ref(),
            endpoint: self.endpoint,
            client: self.ends.client,
            original_dst: self.ends.original_dst,
            tries: self.tries,
            request_bytes: self.request.bytes(),
            response_bytes: self.response_bytes,
            duration: self.started.elapsed(),
        };
        if self.sides != Sides::Destination {
            self.reporter.request(&outcome(Side::Source));
        }
        if self.sides != Sides::Source {
            self.reporter.request(&outcome(Side::Destination));
        }
    }
}

fn set(headers: &mut HeaderMap, name: &'static str, value: &str) {
    // Every value here is a number or a word of our own table: always a valid header value.
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

/// Makes the head of a response one of trailers alone, with this status ("Responses" of gRPC over HTTP/2).
fn say_grpc(head: &mut http::response::Parts, status: u32, message: &[u8]) {
    head.status = StatusCode::OK;
    set(&mut head.headers, "content-type", "application/grpc");
    set_grpc(&mut head.headers, status, message);
}

fn set_grpc(headers: &mut HeaderMap, status: u32, message: &[u8]) {
    set(headers, "grpc-status", &status.to_string());
    if !message.is_empty() {
        set(headers, "grpc-message", &percent_encode(message, GRPC_MESSAGE).to_string());
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if self.status.is_none() && self.error.is_none() {
            self.error = Some(if self.client.activity.has_stalled() {
                Error::new(Kind::StreamIdle, "nothing moved for too long before there was an answer")
            } else {
                Error::new(Kind::DownstreamReset, "the client went away before it had an answer")
            });
        }
        self.report();
        self.client.activity.end();
    }
}

/// A response body on its way to the client.
pub(super) struct Reported {
    body: Body,
    deadline: Option<Pin<Box<Sleep>>>,
    /// Taken when the body has ended; what drops it first was cut short.
    exchange: Option<Box<Exchange>>,
}

impl Reported {
    /// A body that belongs to no exchange.
    pub fn silent(body: Body) -> Self {
        Self { body, deadline: None, exchange: None }
    }

    /// A body that is empty from the start may never be polled.
    fn ended_already(mut self) -> Self {
        if self.body.is_end_stream() {
            self.end();
        }
        self
    }

    /// The response is whole: the connection may serve again, and the exchange is reported.
    fn end(&mut self) {
        let Some(mut exchange) = self.exchange.take() else { return };
        if let Some(standing) = &exchange.standing {
            standing.finished();
        }
        if let Some(lease) = exchange.lease.take() {
            lease.finished();
        }
    }

    fn fail(&mut self, error: Error) -> BodyError {
        if let Some(mut exchange) = self.exchange.take() {
            exchange.error = Some(error.clone());
        }
        BodyError::Mesh(error)
    }

    /// Ends the response in the middle: a gRPC client is told by the status it waits for, others by the reset.
    fn break_off(&mut self, error: Error) -> Result<Frame<Bytes>, BodyError> {
        let Some(exchange) = self.exchange.as_mut().filter(|exchange| exchange.grpc) else {
            return Err(self.fail(error));
        };
        let row = error.kind.row();
        exchange.grpc_status = Some(row.grpc);
        let mut trailers = HeaderMap::new();
        set_grpc(&mut trailers, row.grpc, error.kind.told().as_bytes());
        (self.body, self.deadline) = (Body::Empty, None);
        self.fail(error);
        Ok(Frame::trailers(trailers))
    }

    /// Ready when what the endpoint's pod asks of those who come has changed, and this one would be refused.
    fn poll_cut(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        let standing = self.exchange.as_mut().and_then(|exchange| exchange.standing.as_mut());
        standing.map_or(Poll::Pending, |standing| standing.poll_cut(cx))
    }

    fn note(&mut self, frame: &Frame<Bytes>) {
        let Some(exchange) = &mut self.exchange else { return };
        exchange.client.activity.handed_over();
        if let Some(data) = frame.data_ref() {
            exchange.response_bytes += data.len() as u64;
        } else if let Some(trailers) = frame.trailers_ref() {
            exchange.grpc_status = retry::grpc_status(trailers).or(exchange.grpc_status);
            health::learn_load(exchange.cluster.as_deref(), exchange.chosen.as_ref(), trailers);
        }
    }
}

impl Drop for Reported {
    fn drop(&mut self) {
        let Some(exchange) = &self.exchange else { return };
        let error = if exchange.client.activity.has_stalled() {
            Error::new(Kind::StreamIdle, "nothing moved within the response for too long")
        } else {
            Error::new(Kind::DownstreamReset, "the client went away before the response had ended")
        };
        self.fail(error);
    }
}

impl Breaking for Reported {
    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<BodyError> {
        self.poll_cut(cx).map(|error| self.fail(error))
    }
}

impl http_body::Body for Reported {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        if let Some(exchange) = &mut this.exchange {
            exchange.client.activity.asked();
            if let Some(error) = exchange.standing.as_mut().and_then(|standing| standing.look()) {
                return Poll::Ready(Some(this.break_off(error)));
            }
        }
        if let Some(deadline) = &mut this.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            let error = Error::new(Kind::Timeout, "the route's timeout ran out within the response body");
            return Poll::Ready(Some(this.break_off(error)));
        }
        let Poll::Ready(polled) = Pin::new(&mut this.body).poll_frame(cx) else {
            return this.poll_cut(cx).map(|error| Some(this.break_off(error)));
        };
        match polled {
            Some(Ok(frame)) => {
                this.note(&frame);
                // Trailers are the last frame (RFC 9110 section 6.5): an HTTP/1.1 client's connection asks for no more.
                if frame.is_trailers() || this.body.is_end_stream() {
                    this.end();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(broken)) => {
                let detail = format!("the endpoint broke off within the response body: {broken}");
                let error = Error { reset: Some(broken.reason()), ..Error::new(Kind::UpstreamReset, detail) };
                Poll::Ready(Some(this.break_off(error)))
            }
            None => {
                this.end();
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
