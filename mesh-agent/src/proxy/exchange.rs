//! One HTTP request and its response, from the first header to the last byte of the body: what is known of it, and the
//! guarantee that it is reported exactly once.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, atomic::AtomicU64},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, request};
use http_body::{Body as _, Frame, SizeHint};
use tokio::time::{Instant, Sleep};

use super::Ends;
use crate::{
    balance::Chosen,
    body::{Body, counted},
    error::{Error, Kind},
    report::{Peer, Reporter, RequestOutcome, RequestProtocol, Security, Side},
    state::snapshot::{Cluster, HttpRoute},
    upstream::{Lease, message, retry},
};

/// What is known of one request; reported when dropped.
#[derive(Debug)]
pub(super) struct Exchange {
    pub reporter: Arc<Reporter>,
    /// Source, destination, or both for a pass within the node.
    pub sides: Sides,
    pub source: Peer,
    pub destination: Peer,
    pub ends: Ends,
    pub route: Option<Arc<HttpRoute>>,
    pub cluster: Option<Arc<Cluster>>,
    pub endpoint: Option<SocketAddr>,
    pub security: Security,
    pub error: Option<Error>,
    pub delay_injected: bool,
    pub tries: u32,
    pub request_bytes: Arc<AtomicU64>,
    pub grpc: bool,
    pub authority: String,
    /// When the whole response must have passed.
    pub deadline: Option<Instant>,
    /// Held until the response has ended.
    pub lease: Option<Lease>,
    /// Counts as in flight until the response has ended.
    pub chosen: Option<Chosen>,
    method: Method,
    path: String,
    started: Instant,
    status: StatusCode,
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
    pub fn begin(
        reporter: &Arc<Reporter>,
        sides: Sides,
        source: Peer,
        ends: Ends,
        request: &request::Parts,
    ) -> Self {
        Self {
            reporter: Arc::clone(reporter),
            sides,
            source,
            destination: Peer::default(),
            ends,
            route: None,
            cluster: None,
            endpoint: None,
            security: Security::None,
            error: None,
            delay_injected: false,
            tries: 0,
            request_bytes: Arc::default(),
            grpc: message::is_grpc(&request.headers),
            authority: String::new(),
            deadline: None,
            lease: None,
            chosen: None,
            method: request.method.clone(),
            path: request.uri.path_and_query().map_or_else(|| "/".to_owned(), ToString::to_string),
            started: Instant::now(),
            status: StatusCode::OK,
            grpc_status: None,
            response_bytes: 0,
        }
    }

    /// The whole exchange, response body included, must be done within this time from now.
    pub fn limit(&mut self, timeout: Option<Duration>) {
        self.deadline = timeout.map(|timeout| Instant::now() + timeout);
    }

    /// The response goes to the client; its body reports when it ends.
    pub fn respond(mut self, parts: http::response::Parts, body: Body) -> http::Response<Reported> {
        self.status = parts.status;
        self.grpc_status = retry::grpc_status(&parts.headers);
        let deadline = self.deadline.map(|deadline| Box::pin(tokio::time::sleep_until(deadline)));
        let body = Reported { body, deadline, exchange: Some(Box::new(self)) };
        http::Response::from_parts(parts, body.ended_already())
    }

    /// The mesh answers instead of the endpoint: as a gRPC status to gRPC clients, else with the error's HTTP status.
    pub fn refuse(mut self, error: Error) -> http::Response<Reported> {
        let (mut parts, ()) = http::Response::new(()).into_parts();
        let row = error.kind.row();
        let body = if self.grpc {
            parts.status = StatusCode::OK;
            set(&mut parts.headers, "content-type", "application/grpc");
            set(&mut parts.headers, "grpc-status", &row.grpc.to_string());
            set(&mut parts.headers, "grpc-message", row.word);
            Body::Empty
        } else {
            parts.status = row.http;
            set(&mut parts.headers, "content-type", "text/plain");
            // The detail names endpoints and policies: it is the operator's, in the log, not the client's.
            Body::from(Bytes::from_static(row.word.as_bytes()))
        };
        // Our own answer is whole; the time that was the endpoint's does not cut it off.
        self.deadline = None;
        self.error = Some(error);
        self.respond(parts, body)
    }

    fn report(&self) {
        let protocol = if self.grpc { RequestProtocol::Grpc } else { RequestProtocol::Http };
        let outcome = |side| RequestOutcome {
            side,
            source: &self.source,
            destination: &self.destination,
            cluster: self.cluster.as_deref(),
            protocol,
            security: self.security,
            status: self.status.as_u16(),
            grpc_status: self.grpc_status,
            error: self.error.as_ref(),
            delay_injected: self.delay_injected,
            method: self.method.as_str(),
            authority: &self.authority,
            path: &self.path,
            route: self.route.as_ref().map_or("", |route| &route.name),
            endpoint: self.endpoint,
            client: self.ends.client,
            original_dst: self.ends.original_dst,
            tries: self.tries,
            request_bytes: counted(&self.request_bytes),
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
    if let Ok(value) = http::HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.report();
    }
}

/// A response body on its way to the client.
#[derive(Debug)]
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
        if let Some(mut exchange) = self.exchange.take()
            && let Some(lease) = exchange.lease.take()
        {
            lease.finished();
        }
    }

    fn fail(&mut self, kind: Kind, detail: String) {
        if let Some(exchange) = &mut self.exchange {
            exchange.error = Some(Error::new(kind, detail));
        }
        self.exchange = None;
    }

    fn note(&mut self, frame: &Frame<Bytes>) {
        let Some(exchange) = &mut self.exchange else { return };
        if let Some(data) = frame.data_ref() {
            exchange.response_bytes += data.len() as u64;
        } else if let Some(trailers) = frame.trailers_ref() {
            exchange.grpc_status = retry::grpc_status(trailers).or(exchange.grpc_status);
        }
    }
}

impl Drop for Reported {
    fn drop(&mut self) {
        self.fail(Kind::DownstreamReset, "the client went away before the response had ended".to_owned());
    }
}

impl http_body::Body for Reported {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let this = self.get_mut();
        if let Some(deadline) = &mut this.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            let detail = "the route's timeout ran out within the response body".to_owned();
            this.fail(Kind::Timeout, detail.clone());
            return Poll::Ready(Some(Err(Error::new(Kind::Timeout, detail))));
        }
        match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
            Some(Ok(frame)) => {
                this.note(&frame);
                if this.body.is_end_stream() {
                    this.end();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                let detail = format!("the endpoint broke off within the response body: {error}");
                this.fail(Kind::UpstreamReset, detail.clone());
                Poll::Ready(Some(Err(Error::new(Kind::UpstreamReset, detail))))
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
