//! Services of a lab.
//!
//! Promises: a Service has an address of each family in a range that nothing routes: it answers through the mesh or
//! not at all. Tested in `tests/lab.rs`.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use anyhow::Result;
use serde_json::{Value, json};

use crate::{lab::Lab, net::Addresses};

/// What a Service is to be.
#[derive(Debug)]
#[must_use = "a Service exists once it is applied"]
pub struct ServiceBuilder<'a> {
    lab: &'a Lab,
    name: String,
    namespace: String,
    addresses: Option<Addresses>,
    selector: BTreeMap<String, String>,
    ports: Vec<Value>,
}

/// A Service of a lab.
#[derive(Debug, Clone)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its cluster addresses.
    pub addresses: Addresses,
}

impl<'a> ServiceBuilder<'a> {
    pub(crate) fn new(lab: &'a Lab, name: &str) -> Self {
        Self {
            lab,
            name: name.to_owned(),
            namespace: "default".to_owned(),
            addresses: None,
            selector: BTreeMap::new(),
            ports: Vec::new(),
        }
    }

    /// Its namespace (`default`).
    pub fn ns(mut self, namespace: &str) -> Self {
        namespace.clone_into(&mut self.namespace);
        self
    }

    /// Its addresses; by default the next free ones.
    pub fn addresses(mut self, addresses: Addresses) -> Self {
        self.addresses = Some(addresses);
        self
    }

    /// Selects pods by a label.
    pub fn selector(mut self, key: &str, value: &str) -> Self {
        self.selector.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Adds a port. Its name declares the protocol by its prefix (`http`, `http2`, `grpc`, `tcp`), as Istio has it;
    /// any other name leaves it undeclared.
    pub fn port(mut self, name: &str, port: u16, target: u16) -> Self {
        self.ports.push(json!({ "name": name, "port": port, "targetPort": target, "protocol": "TCP" }));
        self
    }

    /// Writes the manifest.
    pub fn apply(self) -> Result<Service> {
        let addresses =
            self.addresses.unwrap_or_else(|| Addresses::of_service(self.lab.world.next_service()));
        let ips = addresses.both().map(|ip| ip.to_string());
        let object = json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": { "name": self.name, "namespace": self.namespace },
            "spec": {
                "type": "ClusterIP",
                "clusterIP": ips[0],
                "clusterIPs": ips,
                "ipFamilies": ["IPv4", "IPv6"],
                "ipFamilyPolicy": "PreferDualStack",
                "selector": self.selector,
                "ports": self.ports,
            },
        });
        let file = format!("service-{}-{}.yaml", self.namespace, self.name);
        self.lab.world.apply_object(&file, &object)?;
        Ok(Service { name: self.name, namespace: self.namespace, addresses })
    }
}

impl Service {
    /// Its fully qualified host name.
    pub fn host(&self) -> String {
        format!("{}.{}.svc.cluster.local", self.name, self.namespace)
    }

    /// Its IPv4 address.
    pub fn ip(&self) -> IpAddr {
        self.addresses.v4.into()
    }

    /// Its IPv4 address with a port.
    pub fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip(), port)
    }

    /// Its IPv6 address with a port.
    pub fn at6(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.addresses.v6.into(), port)
    }

    /// A URL with its IPv4 address; `path` begins with `/`.
    pub fn url(&self, port: u16, path: &str) -> String {
        format!("http://{}{path}", self.at(port))
    }

    /// A URL with its IPv6 address; `path` begins with `/`.
    pub fn url6(&self, port: u16, path: &str) -> String {
        format!("http://{}{path}", self.at6(port))
    }
}
