//! Which protocol a service port declares.
//!
//! Order: `appProtocol`, else the prefix of the port's name, else the well-known opaque ports. Tested by the table
//! below.

use crate::state::{defaults, snapshot::Protocol};

/// The declared protocol; `None` leaves it to detection.
pub fn declared(app_protocol: Option<&str>, port_name: Option<&str>, port: u16) -> Option<Protocol> {
    if let Some(app_protocol) = app_protocol.filter(|word| !word.is_empty()) {
        return from_app_protocol(app_protocol);
    }
    let name = port_name.unwrap_or_default().to_ascii_lowercase();
    let prefix =
        if name.starts_with("grpc-web") { "grpc-web" } else { name.split('-').next().unwrap_or_default() };
    from_word(prefix).or_else(|| defaults::OPAQUE_PORTS.contains(&port).then_some(Protocol::Opaque))
}

fn from_app_protocol(word: &str) -> Option<Protocol> {
    match word.to_ascii_lowercase().as_str() {
        "kubernetes.io/h2c" => Some(Protocol::Http2),
        // A WebSocket starts as an HTTP/1.1 request; with TLS it is bytes.
        "kubernetes.io/ws" => Some(Protocol::Http1),
        "kubernetes.io/wss" => Some(Protocol::Opaque),
        word => from_word(word),
    }
}

fn from_word(word: &str) -> Option<Protocol> {
    match word {
        "http" => Some(Protocol::Http1),
        "http2" | "grpc" | "grpc-web" | "h2c" => Some(Protocol::Http2),
        "https" | "tls" | "tcp" | "mongo" | "mysql" | "redis" | "postgres" | "postgresql" | "amqp"
        | "kafka" | "smtp" | "ldap" | "memcached" | "cassandra" => Some(Protocol::Opaque),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn declarations_in_order() {
        let table = [
            (Some("http"), None, 1, Some(Protocol::Http1)),
            (Some("HTTP2"), None, 1, Some(Protocol::Http2)),
            (Some("grpc"), Some("tcp"), 1, Some(Protocol::Http2)),
            (Some("kubernetes.io/h2c"), None, 1, Some(Protocol::Http2)),
            (Some("kubernetes.io/ws"), None, 1, Some(Protocol::Http1)),
            (Some("https"), None, 1, Some(Protocol::Opaque)),
            (Some("example.com/own"), Some("http"), 1, None),
            (Some(""), Some("http-web"), 1, Some(Protocol::Http1)),
            (None, Some("http"), 1, Some(Protocol::Http1)),
            (None, Some("http2-api"), 1, Some(Protocol::Http2)),
            (None, Some("grpc-web-ui"), 1, Some(Protocol::Http2)),
            (None, Some("mongo-db"), 1, Some(Protocol::Opaque)),
            (None, Some("httpish"), 1, None),
            (None, Some("web"), 3306, Some(Protocol::Opaque)),
            (None, Some("http"), 3306, Some(Protocol::Http1)),
            (None, None, 5432, Some(Protocol::Opaque)),
            (None, None, 9080, None),
        ];
        for (app, name, port, expected) in table {
            assert_eq!(declared(app, name, port), expected, "{app:?} {name:?} {port}");
        }
    }
}
