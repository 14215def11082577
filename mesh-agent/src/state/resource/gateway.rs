//! Istio's `Gateway`, checked: the ports a gateway serves, for which hosts, and how TLS ends there.
//!
//! Promises that what is accepted is honoured whole: fields of Istio's that are not, and those that mean nothing together, are
//! refused by name. TLS before 1.2 is not spoken. Tested by the tables in `gateway/tests.rs`.

use std::{collections::BTreeMap, num::NonZeroU16, sync::Arc};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde::Deserialize;

use super::{
    ObjectKey, dns_name,
    field::{Checked, FieldError, NotYet, item, under},
    virtual_service::check_host,
};

mod tls;

#[cfg(test)]
mod tests;

pub use self::tls::{Terms, Tls};

/// A `Gateway`.
#[derive(Debug)]
pub struct Gateway {
    /// `metadata.namespace`.
    pub namespace: Arc<str>,
    /// `metadata.name`.
    pub name: Arc<str>,
    /// `metadata.creationTimestamp`; decides which one holds when two want the same.
    pub created: Option<Time>,
    /// `spec.selector`: the labels of the pods that serve it; none: every gateway's.
    pub selector: BTreeMap<String, String>,
    /// `spec.servers`; never empty.
    pub servers: Vec<Server>,
}

/// One entry of `servers`.
#[derive(Debug)]
pub struct Server {
    /// `port.number`.
    pub port: u16,
    /// `hosts`; never empty.
    pub hosts: Vec<Host>,
    /// What is spoken there.
    pub serves: Serves,
}

/// One entry of `hosts`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// Of which namespace `VirtualService`s may have it; `None`: of any.
    pub namespace: Option<String>,
    /// The name in small letters, possibly a wildcard.
    pub name: String,
}

/// `port.protocol`, with what `tls` says of it.
#[derive(Debug, PartialEq)]
pub enum Serves {
    /// `HTTP`, `HTTP2`, `GRPC`.
    Http {
        /// `tls.httpsRedirect`.
        redirects: bool,
    },
    /// `HTTPS` that ends here.
    Https(Terms),
    /// `TLS` that ends here, with bytes inside.
    Tls(Terms),
    /// `TLS` or `HTTPS` that stays as it is.
    PassThrough,
    /// `TCP`.
    Tcp,
}

impl Serves {
    /// How TLS ends there, where it does.
    pub fn terms(&self) -> Option<&Terms> {
        match self {
            Self::Https(terms) | Self::Tls(terms) => Some(terms),
            Self::Http { .. } | Self::PassThrough | Self::Tcp => None,
        }
    }
}

impl Gateway {
    /// How TLS ends at its servers, where it does.
    pub fn terms(&self) -> impl Iterator<Item = &Terms> {
        self.servers.iter().filter_map(|server| server.serves.terms())
    }

    /// Paths of the files that it names.
    pub fn files(&self) -> impl Iterator<Item = &Arc<str>> {
        self.terms().flat_map(|terms| &terms.files).map(|(_, path)| path)
    }
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Wire {
    /// Labels of the pods that serve it, in whatever namespace they are; none: those of every gateway.
    selector: Option<BTreeMap<String, String>>,
    /// What is served on which port.
    servers: Option<Vec<WireServer>>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireServer {
    /// Where it listens.
    port: WirePort,
    /// The names it is there for: `NAME`, or `NAMESPACE/NAME` for the VirtualServices of one namespace alone; `*.` in front of
    /// the rest of a name for all below it, `*` for all.
    hosts: Option<Vec<String>>,
    /// Name of the server, for people.
    #[serde(rename = "name")]
    _name: Option<String>,
    /// How TLS ends here, or does not; of a plain port, whether it sends everybody to HTTPS.
    tls: Option<tls::Wire>,
    #[serde(rename = "bind")]
    _bind: Option<NotYet>,
    #[serde(rename = "defaultEndpoint")]
    _default_endpoint: Option<NotYet>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WirePort {
    number: NonZeroU16,
    /// Name of the port, of which there is one in its Gateway.
    name: Option<String>,
    /// HTTP, HTTP2, GRPC, HTTPS, TLS or TCP.
    protocol: Option<String>,
    #[serde(rename = "targetPort")]
    _target_port: Option<NotYet>,
}

/// What its `spec` may be, for its resource definition.
#[cfg(test)]
pub(super) fn schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
    generator.subschema_for::<Wire>()
}

/// Checks the `spec` of a `Gateway`.
pub(super) fn check(key: &ObjectKey, created: Option<Time>, spec: &serde_json::Value) -> Checked<Gateway> {
    let wire: Wire = super::field::deserialize(spec)?;
    let mut servers = Vec::new();
    let mut names: Vec<String> = Vec::new();
    for (i, server) in wire.servers.unwrap_or_default().into_iter().enumerate() {
        let name = server.port.name.clone().unwrap_or_default();
        servers.push(server.check(&key.namespace).map_err(item("servers", i))?);
        if names.contains(&name) {
            let message = format!("port names in servers must be unique: duplicate name {name}");
            return Err(item("servers", i)(FieldError::new("port.name", message)));
        }
        names.push(name);
    }
    if servers.is_empty() {
        return Err(FieldError::new("servers", "gateway must have at least one server"));
    }
    let (namespace, name) = (Arc::clone(&key.namespace), Arc::clone(&key.name));
    Ok(Gateway { namespace, name, created, selector: wire.selector.unwrap_or_default(), servers })
}

impl WireServer {
    fn check(self, namespace: &str) -> Checked<Server> {
        if self.port.name.as_deref().unwrap_or_default().is_empty() {
            return Err(FieldError::new("port.name", "is required"));
        }
        let mut hosts = Vec::new();
        for (i, written) in self.hosts.unwrap_or_default().iter().enumerate() {
            let host = host(written, namespace).map_err(item("hosts", i))?;
            if hosts.contains(&host) {
                return Err(item("hosts", i)(FieldError::new("", format!("{written:?} is there already"))));
            }
            hosts.push(host);
        }
        if hosts.is_empty() {
            return Err(FieldError::new("hosts", "server config must contain at least one host"));
        }
        let port = self.port.number.get();
        Ok(Server { port, hosts, serves: serves(self.port.protocol.as_deref(), self.tls)? })
    }
}

/// What a server serves, of its protocol and its `tls`.
fn serves(protocol: Option<&str>, tls: Option<tls::Wire>) -> Checked<Serves> {
    let written = protocol.unwrap_or_default();
    let protocol = written.to_ascii_uppercase();
    match (&*protocol, tls) {
        ("HTTP" | "HTTP2" | "GRPC", None) => Ok(Serves::Http { redirects: false }),
        ("HTTP" | "HTTP2" | "GRPC", Some(tls)) => {
            let redirects = tls.check_plain().map_err(under("tls"))?;
            Ok(Serves::Http { redirects })
        }
        ("TCP", None) => Ok(Serves::Tcp),
        ("TCP", Some(_)) => Err(FieldError::new(
            "tls",
            "means nothing where the protocol is TCP: write TLS, whatever is inside",
        )),
        ("HTTPS" | "TLS", None) => {
            Err(FieldError::new("tls", "server must have TLS settings for HTTPS/TLS protocols"))
        }
        ("HTTPS" | "TLS", Some(tls)) => Ok(match tls.check().map_err(under("tls"))? {
            Tls::PassThrough => Serves::PassThrough,
            Tls::Ends(terms) if protocol == "HTTPS" => Serves::Https(terms),
            Tls::Ends(terms) => Serves::Tls(terms),
        }),
        ("GRPC-WEB" | "MONGO" | "REDIS" | "MYSQL" | "UDP" | "HBONE", _) => {
            let message =
                format!("{written} is not supported yet; it is HTTP, HTTP2, GRPC, HTTPS, TLS or TCP");
            Err(FieldError::new("port.protocol", message))
        }
        _ => {
            let message = format!("invalid protocol {written:?}: it is HTTP, HTTP2, GRPC, HTTPS, TLS or TCP");
            Err(FieldError::new("port.protocol", message))
        }
    }
}

/// `NAME` or `NAMESPACE/NAME`; `.` is the gateway's own namespace, `*` any.
fn host(written: &str, own: &str) -> Checked<Host> {
    let (namespace, name) = match written.split_once('/') {
        None | Some(("*", _)) => (None, written.split_once('/').map_or(written, |(_, name)| name)),
        Some((".", name)) => (Some(own), name),
        Some((namespace, name)) => {
            if namespace.contains('.') || dns_name(namespace).is_err() {
                let message = format!("invalid namespace {namespace:?} in {written:?}: it is a name, . or *");
                return Err(FieldError::new("", message));
            }
            (Some(namespace), name)
        }
    };
    check_host(name)?;
    Ok(Host { namespace: namespace.map(str::to_owned), name: name.to_ascii_lowercase() })
}
