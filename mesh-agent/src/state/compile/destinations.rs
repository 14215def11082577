//! Destinations of routes and mirrors, resolved to clusters.
//!
//! One that does not exist becomes a backend that answers 503, and a problem that names it; the other routes stand.
//! Tested in `tests.rs` beside it.

use super::{
    Problems,
    clients::Client,
    clusters::Clusters,
    resolve,
    services::{Definition, PortDefinition},
    virtual_services::key_of,
};
use crate::state::{
    resource::virtual_service::{Target, VirtualService},
    snapshot::{Backend, Visibility},
};

/// Resolves destinations for clients of one namespace, or for everybody else.
pub(super) struct Destinations<'c, 'a, 'p, 'o> {
    /// Where routes lead.
    pub clusters: &'c mut Clusters<'a, 'p>,
    /// What is wrong.
    pub problems: &'c mut Problems<'o>,
    /// Whose, where they have a view of their own.
    pub client: Option<Client<'c>>,
}

/// Where a destination is written.
pub(super) struct Place<'a> {
    /// Who wrote it: a host without dots is in its namespace.
    pub owner: &'a VirtualService,
    /// The field, for example `spec.http[0].route[1].destination`.
    pub field: String,
}

/// Why a destination leads nowhere.
struct Missing {
    /// Which part of it.
    part: &'static str,
    /// The kind of what is missing.
    kind: &'static str,
    message: String,
    /// Whether somebody must do something about it.
    is_problem: bool,
}

impl Missing {
    fn new(part: &'static str, kind: &'static str, message: String) -> Self {
        Self { part, kind, message, is_problem: true }
    }
}

impl<'a, 'p> Destinations<'_, 'a, 'p, '_> {
    /// What a destination leads to; `port` is the one that the client dialled.
    pub fn backend(&mut self, place: &Place<'_>, target: &Target, port: u16) -> Backend {
        let missing = match self.cluster(&place.owner.namespace, target, port) {
            Ok(backend) => return backend,
            Err(missing) => missing,
        };
        self.report(place, missing)
    }

    /// Says of a destination if it leads nowhere, whoever the client is.
    pub fn check(&mut self, place: &Place<'_>, target: &Target) {
        let found =
            self.service(&place.owner.namespace, target).and_then(|(host, service)| match target.port {
                Some(number) => port_of(service, &host, number).map(drop),
                None => Ok(()),
            });
        if let Err(missing) = found {
            self.report(place, missing);
        }
    }

    fn report(&mut self, place: &Place<'_>, missing: Missing) -> Backend {
        let key = key_of(place.owner);
        let field = format!("{}.{}", place.field, missing.part);
        let message = missing.message;
        if missing.is_problem {
            let text = format!("{message}; requests that take this route are answered with 503");
            self.problems.not_found(&key, &field, missing.kind, text);
        }
        Backend::Missing(format!("{key}: {field}: {message}").into())
    }

    /// The service, and its full host name.
    fn service(&self, namespace: &str, target: &Target) -> Result<(String, &'p Definition<'a>), Missing> {
        let host = resolve(&target.host, namespace);
        let Some(service) = self.clusters.definition(&host) else {
            let hint = match host.split('.').count() {
                2..=3 => {
                    ", and a host with dots is taken as it stands: write NAME.NAMESPACE.svc.cluster.local"
                }
                _ => "",
            };
            return Err(Missing::new("host", "Service", format!("no Service has the host {host}{hint}")));
        };
        Ok((host, service))
    }

    fn cluster(&mut self, namespace: &str, target: &Target, port: u16) -> Result<Backend, Missing> {
        let (host, service) = self.service(namespace, target)?;
        if !self.sees(service) {
            // As its owner wants it.
            let message = format!("{} is not exported to {}", service.key, self.clients());
            return Err(Missing { part: "host", kind: "Service", message, is_problem: false });
        }
        let number = match (target.port, service.ports.as_slice()) {
            (Some(number), _) => number,
            (None, [only]) => only.port,
            (None, _) => port,
        };
        let port = port_of(service, &host, number)?;
        let Some(subset) = &target.subset else {
            return Ok(Backend::Cluster(self.clusters.whole(service, port, self.client)));
        };
        let cluster = self.clusters.subset(service, port, subset, self.client);
        cluster.map(Backend::Cluster).ok_or_else(|| {
            let whom = self.client.map(|_| format!(" for {}", self.clients())).unwrap_or_default();
            let message = format!("no DestinationRule defines the subset {subset:?} of {host}{whom}");
            Missing::new("subset", "DestinationRule", message)
        })
    }

    fn sees(&self, service: &Definition<'_>) -> bool {
        match self.client {
            Some(client) => service.visible.to(client.namespace),
            None => service.visible == Visibility::Everywhere,
        }
    }

    fn clients(&self) -> String {
        match self.client {
            Some(client) => match client.name.split_once('/') {
                Some((namespace, labels)) => {
                    format!("clients of the namespace {namespace} with the labels {labels}")
                }
                None => format!("clients of the namespace {}", client.namespace),
            },
            None => "clients of all namespaces".to_owned(),
        }
    }
}

fn port_of<'d, 'a>(
    service: &'d Definition<'a>,
    host: &str,
    number: u16,
) -> Result<&'d PortDefinition<'a>, Missing> {
    service.port(number).ok_or_else(|| {
        let message = format!("{} ({host}) has no TCP port {number}", service.key);
        Missing::new("port", "Service", message)
    })
}
