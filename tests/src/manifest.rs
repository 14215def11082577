//! The manifests that the lab writes for what it made: what an API server would say of running nodes and pods.

use std::{collections::BTreeMap, net::Ipv4Addr};

use serde_json::{Value, json};

use crate::net::Addresses;

/// The label that enrols a namespace or a pod (`node`), or keeps a pod out (`none`).
pub(crate) const ENROLMENT: &str = "mesh.io/dataplane-mode";
/// The annotation that says where a pod's network namespace is.
pub(crate) const NETNS: &str = "mesh.io/netns";

pub(crate) fn namespace(name: &str, enrolled: bool) -> Value {
    let mode = if enrolled { "node" } else { "none" };
    json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {
            "name": name,
            "labels": { "kubernetes.io/metadata.name": name, ENROLMENT: mode },
        },
    })
}

pub(crate) fn node(name: &str, addresses: &Addresses) -> Value {
    let address = |ip: String| json!({ "type": "InternalIP", "address": ip });
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": { "name": name, "labels": { "kubernetes.io/hostname": name } },
        "status": {
            "addresses": addresses.both().map(|ip| address(ip.to_string())),
        },
    })
}

/// A running pod.
pub(crate) struct Pod<'a> {
    pub(crate) name: &'a str,
    pub(crate) namespace: &'a str,
    pub(crate) service_account: &'a str,
    pub(crate) node: &'a str,
    pub(crate) node_ip: Ipv4Addr,
    pub(crate) addresses: Addresses,
    pub(crate) labels: &'a BTreeMap<String, String>,
    pub(crate) annotations: &'a BTreeMap<String, String>,
}

impl Pod<'_> {
    pub(crate) fn object(&self) -> Value {
        let ips = self.addresses.both().map(|ip| json!({ "ip": ip.to_string() }));
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": self.name,
                "namespace": self.namespace,
                "labels": self.labels,
                "annotations": self.annotations,
            },
            "spec": {
                "nodeName": self.node,
                "serviceAccountName": self.service_account,
                "containers": [{ "name": "app", "image": "lab" }],
            },
            "status": {
                "phase": "Running",
                "hostIP": self.node_ip.to_string(),
                "podIP": self.addresses.v4.to_string(),
                "podIPs": ips,
                "conditions": [{ "type": "Ready", "status": "True" }],
            },
        })
    }
}
