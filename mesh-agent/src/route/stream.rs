//! Which route takes a connection whose bytes are not read as HTTP.
//!
//! Promises the order in which the routes stand: first match wins. A route that asks for a server name never takes a
//! connection without one. Tested by the tables below and in `tests/routing_cases.rs`.

use std::{net::IpAddr, sync::Arc};

use super::matching::has_labels;
use crate::state::snapshot::{SniHost, StreamMatch, StreamRoute, Workload};

/// What is known of a connection before its first byte is passed on.
#[derive(Debug, Clone, Copy)]
pub struct StreamFacts<'a> {
    /// The server name in the client's `ClientHello`; `None` when it sent none, or something else than TLS.
    pub sni: Option<&'a str>,
    /// The address the client dialled.
    pub destination: IpAddr,
    /// The port the client dialled.
    pub port: u16,
    /// The client.
    pub source: &'a Workload,
    /// The client's address.
    pub source_ip: IpAddr,
}

/// The first route that takes the connection; with none, it goes to the whole service.
pub fn find_stream<'a>(
    routes: &'a [Arc<StreamRoute>],
    facts: &StreamFacts<'_>,
) -> Option<&'a Arc<StreamRoute>> {
    routes.iter().find(|route| route.matches.is_empty() || route.matches.iter().any(|m| holds(m, facts)))
}

/// Whether any route looks at the server name, so that the `ClientHello` must be read before one is chosen.
pub fn needs_sni(routes: &[Arc<StreamRoute>]) -> bool {
    routes.iter().flat_map(|route| &route.matches).any(|m| !m.sni_hosts.is_empty())
}

fn holds(m: &StreamMatch, facts: &StreamFacts<'_>) -> bool {
    m.port.is_none_or(|asked| asked == facts.port)
        && m.source_namespace.as_deref().is_none_or(|asked| asked == &*facts.source.namespace)
        && has_labels(facts.source, &m.source_labels)
        && m.source_subnet.is_none_or(|subnet| subnet.contains(facts.source_ip.to_canonical()))
        && any_or_none(&m.destination_subnets, |subnet| subnet.contains(facts.destination.to_canonical()))
        && any_or_none(&m.sni_hosts, |host| facts.sni.is_some_and(|name| names(host, name)))
}

/// Whether one of a list holds; an empty list asks for nothing.
fn any_or_none<T>(list: &[T], holds: impl Fn(&T) -> bool) -> bool {
    list.is_empty() || list.iter().any(holds)
}

/// Names are compared without their case. `*.example.com` covers any number of labels, but not `example.com`.
fn names(host: &SniHost, name: &str) -> bool {
    let name = name.as_bytes();
    match host {
        SniHost::Any => true,
        SniHost::Exact(host) => name.eq_ignore_ascii_case(host.as_bytes()),
        SniHost::Below(suffix) => {
            name.len() > suffix.len()
                && name[name.len() - suffix.len()..].eq_ignore_ascii_case(suffix.as_bytes())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_names() {
        let exact = SniHost::Exact("a.example.com".to_owned());
        let below = SniHost::Below(".example.com".to_owned());
        let table = [
            (&SniHost::Any, "x", true),
            (&exact, "a.example.com", true),
            (&exact, "A.Example.COM", true),
            (&exact, "b.a.example.com", false),
            (&below, "a.example.com", true),
            (&below, "b.A.EXAMPLE.com", true),
            (&below, "example.com", false),
            (&below, ".example.com", false),
            (&below, "aexample.com", false),
            (&below, "com", false),
            (&below, "", false),
        ];
        for (host, name, expected) in table {
            assert_eq!(names(host, name), expected, "{host:?} {name}");
        }
    }
}
