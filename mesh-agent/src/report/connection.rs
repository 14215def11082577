//! Opaque connections: counted when they begin, while bytes move, and when they end, with one access-log line.
//!
//! Promises that every connection that was opened is closed in the figures too, by `Drop`. The handles of its series
//! are resolved once per connection. Never looks into the bytes. Tested in `metrics_tests.rs`.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
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
        | Kind::Denied
        | Kind::FaultAbort(_)
        | Kind::IllegalDestination
        | Kind::Overflow => true,
        Kind::BadRequest
        | Kind::UpstreamReset
        | Kind::Timeout
        | Kind::DownstreamReset
        | Kind::HeadTimeout
        | Kind::HeadTooLarge
        | Kind::TargetTooLong
        | Kind::StreamIdle
        | Kind::NoUpgrade => false,
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
    open: Option<Box<(TcpLabels, TrafficLabels)>>,
    start: Instant,
    reporter: Arc<Reporter>,
}

impl ConnectionGuard {
    pub(super) fn begin(reporter: &Arc<Reporter>, labels: TcpLabels) -> Self {
        let traffic = TrafficLabels::new(
            labels.side,
            (&labels.source, &labels.destination),
            labels.cluster.as_deref(),
            RequestProtocol::Tcp,
            labels.security,
        );
        reporter.metrics.tcp_opened.get_or_create(&traffic).inc();
        Self {
            sent: reporter.metrics.tcp_sent.get_or_create_owned(&traffic),
            received: reporter.metrics.tcp_received.get_or_create_owned(&traffic),
            moved: [0.into(), 0.into()],
            open: Some(Box::new((labels, traffic))),
            start: Instant::now(),
            reporter: reporter.clone(),
        }
    }

    fn report(&self, labels: &TcpLabels, traffic: TrafficLabels, error: Option<&Error>) {
        let reporter = &self.reporter;
        let flags = Flags::new(error);
        let traffic = traffic.with_flags(flags);
        reporter.metrics.tcp_closed.get_or_create(&traffic).inc();
        if error.is_some_and(|error| never_established(error.kind)) {
            reporter.metrics.tcp_failed.get_or_create(&traffic).inc();
        }
        let [to_server, to_client] = self.totals();
        reporter.log.line(|line| {
            line.text("event", Some("connection"));
            line.text("reporter", Some(labels.side.word()));
            line.end(SOURCE, Some(labels.client), &labels.source);
            line.end(DESTINATION, Some(labels.original_dst), &labels.destination);
            line.text("dst.service", labels.cluster.as_ref().map(|cluster| &*cluster.host));
            line.text("cluster", labels.cluster.as_ref().map(|cluster| &*cluster.name));
            line.display("endpoint", labels.endpoint);
            line.text("protocol", Some(RequestProtocol::Tcp.word()));
            line.display("flags", Some(flags));
            line.number("bytes_received", Some(to_server));
            line.number("bytes_sent", Some(to_client));
            line.milliseconds("duration_ms", self.start.elapsed());
            line.text("security", Some(labels.security.word()));
            line.text("error", error.map(|error| error.detail.as_str()));
        });
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
        if let Some(open) = self.open.take() {
            let (labels, traffic) = *open;
            self.report(&labels, traffic, error);
        }
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        self.end(None);
    }
}
