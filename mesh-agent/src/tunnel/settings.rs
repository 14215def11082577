//! The numbers of the wire, each with its source, and the HTTP/2 builders made of them.

use std::time::Duration;

use hyper::{client, server};
use hyper_util::rt::{TokioExecutor, TokioTimer};

/// Where every enrolled pod accepts mesh connections (Istio's HBONE port).
pub const MESH_TLS_PORT: u16 = 15008;
/// Ports of ours inside a pod's namespace, never proxied to: outbound capture, inbound capture, mesh.
pub(super) const OWN_PORTS: [u16; 3] = [15001, 15006, MESH_TLS_PORT];

/// Flow-control window of one stream, in bytes (ztunnel).
pub(super) const STREAM_WINDOW: u32 = 4 << 20;
/// Flow-control window of one connection, in bytes: four streams' worth, so that a stream nobody reads does not
/// stop the others (ztunnel).
pub(super) const CONNECTION_WINDOW: u32 = 4 * STREAM_WINDOW;
/// Largest frame, in bytes (ztunnel).
pub(super) const MAX_FRAME: u32 = 1 << 20;
/// Streams a server lets one connection have at once (ztunnel).
pub(super) const SERVER_MAX_STREAMS: u32 = 200;
/// Streams a client puts on one connection at once; half of what the server allows, so that no stream waits in
/// the connection behind long-lived ones (ztunnel's pool).
pub(super) const CLIENT_MAX_STREAMS: usize = 100;
/// Header list a server accepts, in bytes (ztunnel).
pub(super) const SERVER_HEADER_LIST: u32 = 64 << 10;
/// Header list a client accepts, in bytes (ztunnel).
pub(super) const CLIENT_HEADER_LIST: u32 = 16 << 10;
/// A PING is sent this often, idle or not (ztunnel).
pub(super) const PING_INTERVAL: Duration = Duration::from_secs(10);
/// A PING without an answer for this long ends the connection (ztunnel).
pub(super) const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// Time limit of a TLS handshake, both ends (ztunnel's connect timeout).
pub(super) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// A pooled connection that nobody used for this long is released (ztunnel).
pub(super) const POOL_IDLE: Duration = Duration::from_mins(5);

/// The HTTP/2 server of a mesh connection: give it the stream of [`accept`](super::accept) and a service that
/// starts with [`classify`](super::classify).
pub fn server_builder() -> server::conn::http2::Builder<TokioExecutor> {
    let mut builder = server::conn::http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_concurrent_streams(SERVER_MAX_STREAMS)
        .max_header_list_size(SERVER_HEADER_LIST)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        // The app's own Date, or none.
        .auto_date_header(false);
    builder
}

/// The HTTP/2 client of a `mesh-h2` connection.
pub(super) fn client_builder() -> client::conn::http2::Builder<TokioExecutor> {
    let mut builder = client::conn::http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(CLIENT_HEADER_LIST)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true);
    builder
}

/// The HTTP/2 client of an HBONE connection.
pub(super) fn tunnel_client_builder() -> h2::client::Builder {
    let mut builder = h2::client::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(CLIENT_HEADER_LIST)
        .enable_push(false);
    builder
}

/// The HTTP/2 server of an HBONE connection.
pub(super) fn tunnel_server_builder() -> h2::server::Builder {
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_concurrent_streams(SERVER_MAX_STREAMS)
        .max_header_list_size(SERVER_HEADER_LIST);
    builder
}
