//! HTTP routes of one service port: those of its `VirtualService`, else the default route.
//!
//! A destination that does not exist becomes a backend that answers 503, and a problem that names it; the other
//! routes stand. Tested in `tests.rs` beside it.

use std::sync::Arc;

use super::{
    Problems,
    clusters::Clusters,
    resolve,
    services::{Definition, PortDefinition},
    virtual_services::key_of,
};
use crate::state::{
    defaults,
    resource::virtual_service::{Destination, HttpRule, Retries, RuleAction, VirtualService},
    snapshot::{
        Backend, Fault, HeaderOps, HttpRoute, RequestMatch, RetryPolicy, Rewrite, RouteAction,
        WeightedBackend,
    },
};

/// Compiles the routes of one service.
pub(super) struct Routes<'c, 'a, 'p, 'o> {
    /// Where routes lead.
    pub clusters: &'c mut Clusters<'a, 'p>,
    /// What is wrong.
    pub problems: &'c mut Problems<'o>,
}

impl<'a> Routes<'_, 'a, '_, '_> {
    /// The routes of one port, in order; never empty.
    pub fn compile(
        &mut self,
        service: &Definition<'a>,
        port: &PortDefinition<'a>,
        virtual_service: Option<&VirtualService>,
    ) -> Arc<[Arc<HttpRoute>]> {
        let mut routes: Vec<Arc<HttpRoute>> = Vec::new();
        if let Some(virtual_service) = virtual_service {
            for (index, rule) in virtual_service.http.iter().enumerate() {
                if let Some(matches) = matches(rule, port.port) {
                    routes.push(Arc::new(self.route(virtual_service, index, rule, matches, port.port)));
                }
            }
        }
        if routes.is_empty() {
            // No VirtualService, or one that speaks of other ports or gateways only.
            routes.push(Arc::new(self.default_route(service, port)));
        }
        routes.into()
    }

    fn default_route(&mut self, service: &Definition<'a>, port: &PortDefinition<'a>) -> HttpRoute {
        let cluster = self.clusters.whole(service, port);
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
        }
    }

    fn route(
        &mut self,
        virtual_service: &VirtualService,
        index: usize,
        rule: &HttpRule,
        matches: Vec<RequestMatch>,
        port: u16,
    ) -> HttpRoute {
        let action = match &rule.action {
            RuleAction::Redirect(redirect) => RouteAction::Redirect(redirect.clone()),
            RuleAction::Direct { status, body } => {
                RouteAction::Direct { status: *status, body: body.clone() }
            }
            RuleAction::Forward(destinations) => RouteAction::Forward(
                destinations
                    .iter()
                    .map(|destination| WeightedBackend {
                        weight: destination.weight,
                        headers: destination.headers.clone(),
                        backend: self.backend(virtual_service, index, destination, port),
                    })
                    .collect(),
            ),
        };
        HttpRoute {
            name: rule.name.clone().unwrap_or_else(|| format!("http[{index}]")).into(),
            origin: key_of(virtual_service).to_string().into(),
            matches,
            action,
            fault: rule.fault.clone(),
            headers: rule.headers.clone(),
            rewrite: rule.rewrite.clone(),
            timeout: rule.timeout,
            retries: retries(rule.retries.as_ref()),
        }
    }

    fn backend(
        &mut self,
        virtual_service: &VirtualService,
        index: usize,
        destination: &Destination,
        port: u16,
    ) -> Backend {
        let (part, message) = match self.cluster(virtual_service, destination, port) {
            Ok(backend) => return backend,
            Err(missing) => missing,
        };
        let key = key_of(virtual_service);
        let field = format!("spec.http[{index}].route[{}].destination.{part}", destination.index);
        self.problems.add(
            &key,
            &field,
            format!("{message}; requests that take this route are answered with 503"),
        );
        Backend::Missing(format!("{key}: {field}: {message}").into())
    }

    /// The cluster, or which part of the destination does not exist.
    fn cluster(
        &mut self,
        virtual_service: &VirtualService,
        destination: &Destination,
        port: u16,
    ) -> Result<Backend, (&'static str, String)> {
        let host = resolve(&destination.host, &virtual_service.namespace);
        let Some(service) = self.clusters.definition(&host) else {
            let hint = match host.split('.').count() {
                2..=3 => {
                    ", and a host with dots is taken as it stands: write NAME.NAMESPACE.svc.cluster.local"
                }
                _ => "",
            };
            return Err(("host", format!("no Service has the host {host}{hint}")));
        };
        let number = match (destination.port, service.ports.as_slice()) {
            (Some(number), _) => number,
            (None, [only]) => only.port,
            (None, _) => port,
        };
        let Some(target) = service.port(number) else {
            return Err(("port", format!("{} ({host}) has no TCP port {number}", service.key)));
        };
        let Some(subset) = &destination.subset else {
            return Ok(Backend::Cluster(self.clusters.whole(service, target)));
        };
        match self.clusters.subset(service, target, subset) {
            Some(cluster) => Ok(Backend::Cluster(cluster)),
            None => Err(("subset", format!("no DestinationRule defines the subset {subset:?} of {host}"))),
        }
    }
}

/// The matches that can hold on this port inside the mesh; `None` when the rule asks for matches and none can.
fn matches(rule: &HttpRule, port: u16) -> Option<Vec<RequestMatch>> {
    let here = rule.matches.iter().filter(|m| m.mesh && m.request.port.is_none_or(|asked| asked == port));
    let matches: Vec<RequestMatch> = here.map(|m| m.request.clone()).collect();
    (rule.matches.is_empty() || !matches.is_empty()).then_some(matches)
}

/// A route's retries with the defaults filled in.
fn retries(written: Option<&Retries>) -> RetryPolicy {
    let Some(written) = written else { return defaults::retry_policy() };
    RetryPolicy {
        attempts: written.attempts,
        per_try_timeout: written.per_try_timeout,
        on: written.on.clone().unwrap_or_else(defaults::retry_on),
        backoff: written.backoff.unwrap_or(defaults::RETRY_BACKOFF),
    }
}
