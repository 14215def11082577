//! Opaque connections: counted when they begin, while bytes move, and when they end, with one access-log line; those
//! without the agent are told of by the kernel, when they begin and when they end.
//!
//! Promises that every connection that was opened is closed in the figures too, by `Drop`. The handles of its series
//! are resolved once per connection. Never looks into the bytes. Tested in `metrics_tests.rs`.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use prometheus_client::metrics::counter::Counter;
use tokio::time::Instant;

use super::{
    DESTINATION, Peer, Reporter, RequestProtocol, SOURCE, Security, Side,
    labels::{Flags, TrafficLabels},
};
use crate::{
    error::{Error, Kind},
    state::snapshot::Cluster,
};

/// What an opaque connection is, known when it is opened.
#[derive(Debug, Clone)]
pub struct TcpLabels {
    /// Source or destination.
    pub side: Side,
    /// The client's end.
    pub source: Peer,
    /// The server's end.
    pub destination: Peer,
    /// The service, where one was addressed.
    pub cluster: Option<Arc<Cluster>>,
    /// How the bytes travel.
    pub security: Security,
    /// The app's address at the client's end.
    pub client: SocketAddr,
    /// What the client dialled.
    pub original_dst: SocketAddr,
    /// Address of the endpoint.
    pub endpoint: Option<SocketAddr>,
}

impl TcpLabels {
    fn traffic(&self) -> TrafficLabels {
        TrafficLabels::new(
            self.side,
            (&self.source, &self.destination),
            self.cluster.as_deref(),
            RequestProtocol::Tcp,
            self.security,
        )
    }
}

/// What a connection came to.
struct End<'a> {
    to_server: u64,
    to_client: u64,
    duration: Duration,
    error: Option<&'a Error>,
}

impl Reporter {
    /// A connection without the agent was established: the kernel says so.
    pub fn direct_opened(&self, labels: &TcpLabels) {
        self.metrics.tcp_opened.get_or_create(&labels.traffic()).inc();
    }

    /// A connection without the agent has ended, with these bytes `sent` to the server and `received` from it.
    pub fn direct_closed(&self, labels: &TcpLabels, sent: u64, received: u64, duration: Duration) {
        let traffic = labels.traffic();
        self.metrics.tcp_received.get_or_create(&traffic).inc_by(sent);
        self.metrics.tcp_sent.get_or_create(&traffic).inc_by(received);
        let end = End { to_server: sent, to_client: received, duration, error: None };
        self.connection_ended(labels, traffic, &end);
    }

    fn connection_ended(&self, labels: &TcpLabels, traffic: TrafficLabels, end: &End<'_>) {
        let flags = Flags::new(end.error);
        let traffic = traffic.with_flags(flags);
        self.metrics.tcp_closed.get_or_create(&traffic).inc();
        if end.error.is_some_and(|error| never_established(error.kind)) {
            self.metrics.tcp_failed.get_or_create(&traffic).inc();
        }
        self.log.line(|line| {
            line.text("event", Some("connection"));
            line.text("reporter", Some(labels.side.word()));
            line.end(SOURCE, Some(labels.client), &labels.source);
            line.end(DESTINATION, Some(labels.original_dst), &labels.destination);
            line.text("dst.service", labels.cluster.as_ref().map(|cluster| &*cluster.host));
            line.text("cluster", labels.cluster.as_ref().map(|cluster| &*cluster.name));
            line.display("endpoint", labels.endpoint);
            line.text("protocol", Some(RequestProtocol::Tcp.word()));
            line.display("flags", Some(flags));
            line.number("bytes_received", Some(end.to_server));
            line.number("bytes_sent", Some(end.to_client));
            line.milliseconds("duration_ms", end.duration);
            line.text("security", Some(labels.security.word()));
            line.text("error", end.error.map(|error| error.detail.as_str()));
        });
    }
}

/// Whether this kind of error means that client and server never spoke.
const fn never_established(kind: Kind) -> bool {
    match kind {
        Kind::NoRoute
        | Kind::NoHealthyUpstream
        | Kind::ConnectFailure
        | Kind::RefusedStream
        | Kind::TlsFailure
        | Kind::IdentityMismatch
        | Kind::Unauthenticated
        | Kind::FaultAbort(_)
        | Kind::IllegalDestination
        | Kind::Overflow
        | Kind::Full(_)
        | Kind::Overload => true,
        Kind::BadRequest
        | Kind::UpstreamReset
        | Kind::Timeout
        | Kind::DownstreamReset
        | Kind::HeadTimeout
        | Kind::HeadTooLarge
        | Kind::TargetTooLong
        | Kind::StreamIdle
        | Kind::TooOld
        | Kind::NoUpgrade
        // It was established, and then cut.
        | Kind::Denied
        | Kind::ExternalDenied
        | Kind::ExternalError
        | Kind::Token(_)
        | Kind::Revoked
        | Kind::Plaintext
        | Kind::RateLimited
        | Kind::ConcurrencyLimit => false,
    }
}

/// One open opaque connection. Counted as closed when dropped.
#[derive(Debug)]
pub struct ConnectionGuard {
    /// Istio counts "sent" and "received" from the client's connection, whoever reports: sent is what the server
    /// answered.
    sent: Counter,
    received: Counter,
    /// To the server, to the client.
    moved: [AtomicU64; 2],
    /// Its series are named anew at its end: it may be open, and do nothing, for long.
    open: Option<Box<TcpLabels>>,
    start: Instant,
    reporter: Arc<Reporter>,
}

impl ConnectionGuard {
    pub(super) fn begin(reporter: &Arc<Reporter>, labels: TcpLabels) -> Self {
        let traffic = labels.traffic();
        reporter.metrics.tcp_opened.get_or_create(&traffic).inc();
        Self {
            sent: reporter.metrics.tcp_sent.get_or_create_owned(&traffic),
            received: reporter.metrics.tcp_received.get_or_create_owned(&traffic),
            moved: [0.into(), 0.into()],
            open: Some(Box::new(labels)),
            start: Instant::now(),
            reporter: reporter.clone(),
        }
    }

    /// Bytes moved so far in addition to what was told before (`sent` to the server, `received` from it).
    pub fn moved(&self, sent: u64, received: u64) {
        self.received.inc_by(sent);
        self.sent.inc_by(received);
        self.moved[0].fetch_add(sent, Ordering::Relaxed);
        self.moved[1].fetch_add(received, Ordering::Relaxed);
    }

    /// The connection ended; `error` when not by both sides closing.
    pub fn closed(mut self, error: Option<&Error>) {
        self.end(error);
    }

    fn totals(&self) -> [u64; 2] {
        self.moved.each_ref().map(|bytes| bytes.load(Ordering::Relaxed))
    }

    fn end(&mut self, error: Option<&Error>) {
        if let Some(labels) = self.open.take() {
            let [to_server, to_client] = self.totals();
            let end = End { to_server, to_client, duration: self.start.elapsed(), error };
            self.reporter.connection_ended(&labels, labels.traffic(), &end);
        }
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        self.end(None);
    }
}
