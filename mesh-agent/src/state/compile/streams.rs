//! TLS and TCP routes of one service port.
//!
//! Tested in `tests/streams.rs` beside it.

use std::sync::Arc;

use super::{
    destinations::{Destinations, Place},
    virtual_services::key_of,
};
use crate::state::{
    resource::virtual_service::{StreamRule, VirtualService},
    snapshot::{StreamMatch, StreamRoute, WeightedBackend},
};

/// The routes of one port in order: those that look at server names, then the others.
pub(super) fn compile(
    destinations: &mut Destinations<'_, '_, '_, '_>,
    virtual_service: Option<&VirtualService>,
    port: u16,
) -> Arc<[Arc<StreamRoute>]> {
    let Some(owner) = virtual_service else { return Arc::default() };
    let mut routes = Vec::new();
    for (list, rules) in [("tls", &owner.tls), ("tcp", &owner.tcp)] {
        for (index, rule) in rules.iter().enumerate() {
            let Some(matches) = matches(rule, port) else { continue };
            routes.push(Arc::new(route(
                destinations,
                (owner, &format!("{list}[{index}]")),
                rule,
                matches,
                port,
            )));
        }
    }
    routes.into()
}

/// What a rule, which has this name, comes to on a port, for connections that one of these matches.
pub(super) fn route(
    destinations: &mut Destinations<'_, '_, '_, '_>,
    (owner, name): (&VirtualService, &str),
    rule: &StreamRule,
    matches: Vec<StreamMatch>,
    port: u16,
) -> StreamRoute {
    let backends = rule.route.iter().map(|destination| {
        let field = format!("spec.{name}.route[{}].destination", destination.index);
        WeightedBackend {
            weight: destination.weight,
            headers: destination.headers.clone(),
            backend: destinations.backend(&Place { owner, field }, &destination.target, port),
        }
    });
    StreamRoute {
        backends: backends.collect(),
        name: name.into(),
        origin: key_of(owner).to_string().into(),
        matches,
    }
}

/// The matches that can hold on this port inside the mesh; `None` when the rule asks for matches and none can.
fn matches(rule: &StreamRule, port: u16) -> Option<Vec<StreamMatch>> {
    let here = rule.matches.iter().filter(|m| m.mesh && m.stream.port.is_none_or(|asked| asked == port));
    let matches: Vec<StreamMatch> = here.map(|m| m.stream.clone()).collect();
    (rule.matches.is_empty() || !matches.is_empty()).then_some(matches)
}
