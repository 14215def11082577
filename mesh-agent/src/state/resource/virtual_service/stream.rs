//! `tls` and `tcp`: routes of connections that carry no HTTP the mesh reads.
//!
//! Tested in `tests.rs` beside it; which connection takes which route, in `route/stream.rs`.

use std::{collections::BTreeMap, num::NonZeroU16};

use serde::Deserialize;

use super::{
    Destination, StreamRule, StreamRuleMatch,
    action::{self, WireDestination},
    check_host, for_mesh, gateway_names,
};
use crate::state::{
    resource::field::{Checked, FieldError, item, under},
    snapshot::{SniHost, StreamMatch, Subnet},
};

/// One entry of `tls`.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WireTls {
    r#match: Option<Vec<WireTlsMatch>>,
    route: Option<Vec<action::WireStreamDestination>>,
}

/// One entry of `tcp`.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WireTcp {
    r#match: Option<Vec<WireTcpMatch>>,
    route: Option<Vec<action::WireStreamDestination>>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireTlsMatch {
    sni_hosts: Option<Vec<String>>,
    destination_subnets: Option<Vec<String>>,
    port: Option<NonZeroU16>,
    source_labels: Option<BTreeMap<String, String>>,
    source_namespace: Option<String>,
    gateways: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireTcpMatch {
    destination_subnets: Option<Vec<String>>,
    port: Option<NonZeroU16>,
    source_labels: Option<BTreeMap<String, String>>,
    source_namespace: Option<String>,
    gateways: Option<Vec<String>>,
    source_subnet: Option<String>,
}

impl WireTls {
    /// The rule of a `VirtualService` of this namespace with these hosts.
    pub fn check(self, namespace: &str, hosts: &[String]) -> Checked<StreamRule> {
        let written = self.r#match.unwrap_or_default();
        if written.is_empty() {
            return Err(FieldError::new("match", "TLS route must have at least one match condition"));
        }
        let mut matches = Vec::with_capacity(written.len());
        for (i, wire) in written.into_iter().enumerate() {
            matches.push(wire.check(namespace, hosts).map_err(item("match", i))?);
        }
        Ok(StreamRule { matches, route: route(self.route, "TLS route is required")? })
    }
}

impl WireTcp {
    /// The rule of a `VirtualService` of this namespace.
    pub fn check(self, namespace: &str) -> Checked<StreamRule> {
        let mut matches = Vec::new();
        for (i, wire) in self.r#match.unwrap_or_default().into_iter().enumerate() {
            matches.push(wire.check(namespace).map_err(item("match", i))?);
        }
        Ok(StreamRule { matches, route: route(self.route, "TCP route is required")? })
    }
}

impl WireTlsMatch {
    fn check(self, namespace: &str, hosts: &[String]) -> Checked<StreamRuleMatch> {
        let written = self.sni_hosts.unwrap_or_default();
        if written.is_empty() {
            return Err(FieldError::new("sniHosts", "TLS match must have at least one SNI host"));
        }
        let mut sni_hosts = Vec::with_capacity(written.len());
        for (i, host) in written.iter().enumerate() {
            sni_hosts.push(sni_host(host, hosts).map_err(item("sniHosts", i))?);
        }
        Ok(StreamRuleMatch {
            mesh: for_mesh(self.gateways.as_deref()),
            gateways: gateway_names(self.gateways.unwrap_or_default(), namespace),
            stream: StreamMatch {
                sni_hosts,
                destination_subnets: subnets(self.destination_subnets)?,
                port: self.port.map(NonZeroU16::get),
                source_labels: self.source_labels.unwrap_or_default().into_iter().collect(),
                source_namespace: self.source_namespace.filter(|namespace| !namespace.is_empty()),
                source_subnet: None,
            },
        })
    }
}

impl WireTcpMatch {
    fn check(self, namespace: &str) -> Checked<StreamRuleMatch> {
        let source_subnet = self.source_subnet.filter(|subnet| !subnet.is_empty());
        Ok(StreamRuleMatch {
            mesh: for_mesh(self.gateways.as_deref()),
            gateways: gateway_names(self.gateways.unwrap_or_default(), namespace),
            stream: StreamMatch {
                sni_hosts: Vec::new(),
                destination_subnets: subnets(self.destination_subnets)?,
                port: self.port.map(NonZeroU16::get),
                source_labels: self.source_labels.unwrap_or_default().into_iter().collect(),
                source_namespace: self.source_namespace.filter(|namespace| !namespace.is_empty()),
                source_subnet: source_subnet
                    .map(|text| subnet(&text))
                    .transpose()
                    .map_err(under("sourceSubnet"))?,
            },
        })
    }
}

fn route(written: Option<Vec<action::WireStreamDestination>>, missing: &str) -> Checked<Vec<Destination>> {
    let written = written.unwrap_or_default();
    if written.is_empty() {
        return Err(FieldError::new("route", missing));
    }
    action::check_route(written.into_iter().map(WireDestination::from).collect())
}

/// A name that is covered by one of the hosts.
fn sni_host(name: &str, hosts: &[String]) -> Checked<SniHost> {
    check_host(name)?;
    if !hosts.iter().any(|host| is_subset(name, host)) {
        let message = format!(
            "SNI host {name:?} is not a compatible subset of any of the virtual service hosts: [{}]",
            hosts.join(", ")
        );
        return Err(FieldError::new("", message));
    }
    let name = name.to_ascii_lowercase();
    Ok(match name.strip_prefix('*') {
        Some("") => SniHost::Any,
        Some(below) => SniHost::Below(below.to_owned()),
        None => SniHost::Exact(name),
    })
}

/// Whether every name that one host covers is covered by the other too.
fn is_subset(name: &str, host: &str) -> bool {
    let (name, host) = (name.to_ascii_lowercase(), host.to_ascii_lowercase());
    match (name.strip_prefix('*'), host.strip_prefix('*')) {
        (None | Some(_), Some(host)) => name.ends_with(host),
        (None, None) => name == host,
        (Some(_), None) => false,
    }
}

fn subnets(written: Option<Vec<String>>) -> Checked<Vec<Subnet>> {
    let mut subnets = Vec::new();
    for (i, text) in written.unwrap_or_default().iter().enumerate() {
        subnets.push(subnet(text).map_err(item("destinationSubnets", i))?);
    }
    Ok(subnets)
}

fn subnet(text: &str) -> Checked<Subnet> {
    Subnet::parse(text)
        .ok_or_else(|| FieldError::new("", format!("{text:?} is not an address or a subnet like 10.0.0.0/8")))
}
