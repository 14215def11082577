//! HTTP routes of one service port: those of its `VirtualService`, else the default route.
//!
//! Tested in `tests.rs` beside it.

use std::sync::Arc;

use super::{
    delegates::Rule,
    destinations::{Destinations, Place},
    services::{Definition, PortDefinition},
    virtual_services::Routed,
};
use crate::state::{
    defaults,
    resource::virtual_service::{HttpRule, Retries, RuleAction},
    snapshot::{
        Backend, Fault, HeaderOps, HttpRoute, Mirror, RequestMatch, RetryPolicy, Rewrite, RouteAction,
        WeightedBackend,
    },
};

/// The routes of one port, in order; never empty.
pub(super) fn compile<'a>(
    destinations: &mut Destinations<'_, 'a, '_, '_>,
    service: &Definition<'a>,
    port: &PortDefinition<'a>,
    routed: Option<&Routed<'_>>,
) -> Arc<[Arc<HttpRoute>]> {
    let mut routes: Vec<Arc<HttpRoute>> = Vec::new();
    for rule in routed.into_iter().flat_map(|routed| &routed.http) {
        if let Some(matches) = matches(&rule.says, port.port) {
            routes.push(Arc::new(route(destinations, rule, matches, port.port)));
        }
    }
    if routes.is_empty() {
        // No VirtualService, or one that speaks of other ports or gateways only.
        routes.push(Arc::new(default_route(destinations, service, port)));
    }
    routes.into()
}

fn default_route<'a>(
    destinations: &mut Destinations<'_, 'a, '_, '_>,
    service: &Definition<'a>,
    port: &PortDefinition<'a>,
) -> HttpRoute {
    let cluster = destinations.clusters.whole(service, port, destinations.client);
    let backend =
        WeightedBackend { weight: 1, headers: HeaderOps::default(), backend: Backend::Cluster(cluster) };
    HttpRoute {
        name: "default".into(),
        origin: service.key.to_string().into(),
        matches: Vec::new(),
        action: RouteAction::Forward(vec![backend]),
        fault: Fault::default(),
        headers: HeaderOps::default(),
        rewrite: Rewrite::default(),
        timeout: None,
        retries: defaults::retry_policy(),
        mirrors: Vec::new(),
        cors: None,
        stat_name: None,
    }
}

/// What a rule comes to on a port, for requests that one of these matches.
pub(super) fn route(
    destinations: &mut Destinations<'_, '_, '_, '_>,
    rule: &Rule<'_>,
    mut matches: Vec<RequestMatch>,
    port: u16,
) -> HttpRoute {
    let written: &HttpRule = &rule.says;
    let rewrite = written.rewrite.clone().unwrap_or_default();
    let mut headers = written.headers.clone().unwrap_or_default();
    let mut action = action(destinations, rule, port);
    if rewrite.authority.is_some() || headers.request.authority.is_some() {
        // The route's wins over its destinations', and the rewrite over what header operations say.
        if rewrite.authority.is_some() {
            headers.request.authority = None;
        }
        if let RouteAction::Forward(backends) = &mut action {
            for backend in backends {
                backend.headers.request.authority = None;
            }
        }
    }
    let name = rule.name();
    for m in &mut matches {
        m.name = m.name.as_ref().map(|of_match| format!("{name}.{of_match}").into());
    }
    let fault = written.fault.clone().unwrap_or_default();
    HttpRoute {
        name: name.into(),
        origin: rule.origin().into(),
        matches,
        mirrors: mirrors(destinations, rule, &action, port),
        action,
        fault: Fault { by_header: rule.fault_by_header(), ..fault },
        headers,
        rewrite,
        timeout: written.timeout.filter(|timeout| !timeout.is_zero()),
        retries: retries(written.retries.as_ref()),
        cors: written.cors.clone().map(Box::new),
        stat_name: written.name.as_deref().map(Arc::from),
    }
}

fn action(destinations: &mut Destinations<'_, '_, '_, '_>, rule: &Rule<'_>, port: u16) -> RouteAction {
    let list = match &rule.says.action {
        RuleAction::Redirect(redirect) => return RouteAction::Redirect(redirect.clone()),
        RuleAction::Direct { status, body } => {
            return RouteAction::Direct { status: *status, body: body.clone() };
        }
        RuleAction::Forward(list) => list.as_slice(),
        // Replaced by its delegate's rules before, which do not delegate.
        RuleAction::Delegate { .. } => &[],
    };
    let backends = list.iter().map(|destination| {
        let field = format!("spec.http[{}].route[{}].destination", rule.index, destination.index);
        WeightedBackend {
            weight: destination.weight,
            headers: destination.headers.clone(),
            backend: destinations.backend(&Place { owner: rule.owner, field }, &destination.target, port),
        }
    });
    RouteAction::Forward(backends.collect())
}

fn mirrors(
    destinations: &mut Destinations<'_, '_, '_, '_>,
    rule: &Rule<'_>,
    action: &RouteAction,
    port: u16,
) -> Vec<Mirror> {
    if !matches!(action, RouteAction::Forward(_)) {
        return Vec::new();
    }
    let (owner, index) = rule.mirrored_by();
    let written = rule.says.mirrors.iter().flatten();
    written
        .map(|mirror| {
            let place = Place { owner, field: format!("spec.http[{index}].{}", mirror.field) };
            let backend = destinations.backend(&place, &mirror.target, port);
            Mirror { percentage: mirror.percentage, backend }
        })
        .collect()
}

/// The matches that can hold on this port inside the mesh; `None` when the rule asks for matches and none can.
fn matches(rule: &HttpRule, port: u16) -> Option<Vec<RequestMatch>> {
    let here = rule.matches.iter().filter(|m| m.mesh && m.request.port.is_none_or(|asked| asked == port));
    let matches: Vec<RequestMatch> = here.map(|m| m.request.clone()).collect();
    (rule.matches.is_empty() || !matches.is_empty()).then_some(matches)
}

/// A route's retries with the defaults filled in.
fn retries(written: Option<&Retries>) -> RetryPolicy {
    let default = defaults::retry_policy();
    let Some(written) = written else { return default };
    RetryPolicy {
        attempts: written.attempts,
        per_try_timeout: written.per_try_timeout,
        on: written.on.clone().unwrap_or(default.on),
        backoff: written.backoff.unwrap_or(default.backoff),
        remote_localities: written.remote_localities.unwrap_or(default.remote_localities),
        ignore_previous_hosts: written.ignore_previous_hosts.unwrap_or(default.ignore_previous_hosts),
    }
}
