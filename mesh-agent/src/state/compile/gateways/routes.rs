//! What the rules of a `VirtualService` come to at a gateway.
//!
//! What a match says of gateways, ports and the client's pod (which is the gateway's own) is decided here, once: the path is
//! not asked again. Tested in `tests/gateways.rs`.

use std::sync::Arc;

use super::Bound;
use crate::state::{
    compile::{destinations::Destinations, routes, streams},
    resource::virtual_service::{HttpRule, StreamRule},
    snapshot::{HttpRoute, RequestMatch, SniHost, StreamMatch, StreamRoute, StringMatch, Workload},
};

/// Where something would hold.
#[derive(Clone, Copy)]
pub(super) struct Where<'w> {
    /// The gateway, as `VirtualService`s name it.
    pub gateway: &'w str,
    /// The port of the server.
    pub port: u16,
    /// The pod of the gateway.
    pub workload: &'w Workload,
}

impl Where<'_> {
    /// Whether what a match says besides requests and connections holds. What names gateways does not ask for pods (as in
    /// Istio).
    fn has(
        &self,
        gateways: &[String],
        port: Option<u16>,
        labels: &[(String, String)],
        namespace: Option<&str>,
    ) -> bool {
        let here = || {
            let has = |(name, value): &(String, String)| {
                self.workload.labels.get(name.as_str()).is_some_and(|found| **found == **value)
            };
            labels.iter().all(has) && namespace.is_none_or(|namespace| namespace == &*self.workload.namespace)
        };
        let named =
            if gateways.is_empty() { here() } else { gateways.iter().any(|name| name == self.gateway) };
        named && port.is_none_or(|port| port == self.port)
    }
}

/// The HTTP routes of one `VirtualService`.
#[derive(Default)]
pub(super) struct Piece {
    /// Those that ask for something of a request.
    pub asking: Vec<Arc<HttpRoute>>,
    /// What takes all others. Whatever is written behind it takes nothing.
    pub rest: Option<Arc<HttpRoute>>,
}

impl Piece {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.asking.is_empty() && self.rest.is_none()
    }
}

/// The routes of one `VirtualService` in one place.
pub(super) fn http(
    destinations: &mut Destinations<'_, '_, '_, '_>,
    bound: &Bound<'_>,
    at: &Where<'_>,
) -> Piece {
    let mut piece = Piece::default();
    for rule in &bound.http {
        let Some(mut asking) = requests(&rule.says, at) else { continue };
        // From the first match on that takes everything, nothing is left.
        let all = asking.iter().position(takes_everything);
        let rest = all.map(|place| asking.drain(place..).take(1).collect::<Vec<_>>());
        let rest = if rule.says.matches.is_empty() { Some(Vec::new()) } else { rest };
        if !asking.is_empty() {
            piece.asking.push(Arc::new(routes::route(destinations, rule, asking, at.port)));
        }
        if let Some(matches) = rest {
            piece.rest = Some(Arc::new(routes::route(destinations, rule, matches, at.port)));
            break;
        }
    }
    piece
}

/// The matches that can hold there, without what is decided; `None` when the rule asks for matches and none can.
fn requests(rule: &HttpRule, at: &Where<'_>) -> Option<Vec<RequestMatch>> {
    let holds = rule.matches.iter().filter(|one| {
        let asked = &one.request;
        at.has(&one.gateways, asked.port, &asked.source_labels, asked.source_namespace.as_deref())
    });
    let decided = |asked: &RequestMatch| RequestMatch {
        port: None,
        source_labels: Vec::new(),
        source_namespace: None,
        ..asked.clone()
    };
    let matches: Vec<RequestMatch> = holds.map(|one| decided(&one.request)).collect();
    (rule.matches.is_empty() || !matches.is_empty()).then_some(matches)
}

/// Whether there is no request that it does not match.
fn takes_everything(asked: &RequestMatch) -> bool {
    let RequestMatch {
        name: _,
        stat_prefix: _,
        uri,
        ignore_uri_case: _,
        scheme,
        method,
        authority,
        headers,
        without_headers,
        query_params,
        port,
        source_labels,
        source_namespace,
    } = asked;
    let any_uri = uri.as_ref().is_none_or(|uri| match uri {
        StringMatch::Exact(_) => false,
        StringMatch::Prefix(prefix) => prefix == "/",
        // As it is compiled where the whole string has to match.
        StringMatch::Regex(regex) => regex.as_str() == "^(?:.*)$",
    });
    any_uri
        && scheme.is_none()
        && method.is_none()
        && authority.is_none()
        && headers.is_empty()
        && without_headers.is_empty()
        && query_params.is_empty()
        && port.is_none()
        && source_labels.is_empty()
        && source_namespace.is_none()
}

/// The routes of `tcp[]`, or of `tls[]`, in one place.
pub(super) fn streams(
    destinations: &mut Destinations<'_, '_, '_, '_>,
    bound: &Bound<'_>,
    (list, rules): (&str, &[StreamRule]),
    at: &Where<'_>,
) -> Vec<StreamRoute> {
    let mut found = Vec::new();
    for (index, rule) in rules.iter().enumerate() {
        let holds = rule.matches.iter().filter(|one| {
            let asked = &one.stream;
            at.has(&one.gateways, asked.port, &asked.source_labels, asked.source_namespace.as_deref())
        });
        let decided = |asked: &StreamMatch| StreamMatch {
            port: None,
            source_labels: Vec::new(),
            source_namespace: None,
            ..asked.clone()
        };
        let matches: Vec<StreamMatch> = holds.map(|one| decided(&one.stream)).collect();
        if rule.matches.is_empty() || !matches.is_empty() {
            let name = format!("{list}[{index}]");
            found.push(streams::route(destinations, (bound.service, &name), rule, matches, at.port));
        }
    }
    found
}

/// The same routes, one for each name that they ask for: those of a name before those of wildcards, longer ones first, else as
/// they were.
pub(super) fn by_name(routes: Vec<StreamRoute>) -> Vec<StreamRoute> {
    let mut all = Vec::new();
    for route in routes {
        for asked in &route.matches {
            for host in &asked.sni_hosts {
                let asked = StreamMatch { sni_hosts: vec![host.clone()], ..asked.clone() };
                let rank = match host {
                    SniHost::Exact(_) => usize::MAX,
                    SniHost::Below(rest) => rest.len(),
                    SniHost::Any => 0,
                };
                all.push((rank, StreamRoute { matches: vec![asked], ..route.clone() }));
            }
        }
    }
    all.sort_by_key(|(rank, _)| std::cmp::Reverse(*rank));
    all.into_iter().map(|(_, route)| route).collect()
}
