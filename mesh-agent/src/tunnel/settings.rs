//! The numbers of the wire, each with its source, and the HTTP/2 builders made of them.

use std::time::Duration;

use super::Wire;

/// Where every enrolled pod accepts mesh connections (Istio's HBONE port).
pub const MESH_TLS_PORT: u16 = 15008;
/// Ports of ours inside a pod's namespace, never proxied to: outbound capture, inbound capture, mesh.
pub(super) const OWN_PORTS: [u16; 3] = [15001, 15006, MESH_TLS_PORT];

/// Flow-control window of one stream, in bytes (ztunnel).
pub(super) const STREAM_WINDOW: u32 = 4 << 20;
/// Flow-control window of one connection, in bytes: four streams' worth, so that a stream nobody reads does not
/// stop the others (ztunnel).
pub(super) const CONNECTION_WINDOW: u32 = 4 * STREAM_WINDOW;
/// The same for connections that carry requests: streams that nobody reads cost what their windows hold, and there are
/// many of them. Still 4 Gbit/s for one stream within a millisecond.
const REQUEST_STREAM_WINDOW: u32 = 512 << 10;
/// See [`REQUEST_STREAM_WINDOW`]: eight streams' worth.
const REQUEST_CONNECTION_WINDOW: u32 = 8 * REQUEST_STREAM_WINDOW;
/// Largest frame, in bytes (ztunnel).
pub(super) const MAX_FRAME: u32 = 1 << 20;
/// Streams a server lets one connection have at once (ztunnel).
pub(super) const SERVER_MAX_STREAMS: u32 = 200;
/// Streams a client puts on one connection at once; half of what the server allows, so that no stream waits in
/// the connection behind long-lived ones (ztunnel's pool).
pub(super) const CLIENT_MAX_STREAMS: usize = 100;
/// Header list either side accepts, in bytes: the largest head of an app (60 KiB) as HTTP/2 counts it, with ours.
/// (ztunnel, whose streams carry no heads of apps: 64 KiB and 16 KiB.)
pub(super) const HEADER_LIST: u32 = 128 << 10;
/// A PING is sent this often, idle or not (ztunnel).
pub(super) const PING_INTERVAL: Duration = Duration::from_secs(10);
/// A PING without an answer for this long ends the connection (ztunnel).
pub(super) const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// Time limit of a TLS handshake, both ends (ztunnel's connect timeout).
pub(super) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// What stands on a root that is not believed any more is asked to end at once, and cut after this: requests under way
/// come to their answers.
pub(super) const ROOT_GONE_GRACE: Duration = Duration::from_secs(10);
/// What is refused because its certificate is revoked has this long to be told so.
pub(super) const LAST_WORDS: Duration = Duration::from_millis(500);
/// A pooled connection that nobody used for this long is released (ztunnel).
pub(super) const POOL_IDLE: Duration = Duration::from_mins(5);

/// The HTTP/2 client of a mesh connection.
pub(super) fn client_builder(wire: Wire) -> h2::client::Builder {
    let (stream, connection) = windows(wire);
    let mut builder = h2::client::Builder::new();
    builder
        .initial_window_size(stream)
        .initial_connection_window_size(connection)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(HEADER_LIST)
        .enable_push(false);
    builder
}

/// The HTTP/2 server of a mesh connection.
pub(super) fn server_builder(wire: Wire) -> h2::server::Builder {
    let (stream, connection) = windows(wire);
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(stream)
        .initial_connection_window_size(connection)
        .max_frame_size(MAX_FRAME)
        .max_concurrent_streams(SERVER_MAX_STREAMS)
        .max_header_list_size(HEADER_LIST);
    builder
}

/// Of one stream, and of the whole connection.
fn windows(wire: Wire) -> (u32, u32) {
    match wire {
        Wire::Hbone => (STREAM_WINDOW, CONNECTION_WINDOW),
        Wire::MeshH2 => (REQUEST_STREAM_WINDOW, REQUEST_CONNECTION_WINDOW),
    }
}
