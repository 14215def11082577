//! The kinds that are watched: exactly those that something is compiled from, in the versions that are understood.
//!
//! Kubernetes' own are always there; those of resource definitions (Istio's, the mesh's own) are there when somebody has
//! installed them. Tested below.

use kube::core::{ApiResource, GroupVersionKind};

/// A kind of objects.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Kind {
    /// `kind`.
    pub name: &'static str,
    /// Its name in paths.
    pub plural: &'static str,
    /// Its group; empty for the core group.
    pub group: &'static str,
    /// Versions of it that are understood, the best first.
    pub versions: &'static [&'static str],
}

const fn kind(
    group: &'static str,
    versions: &'static [&'static str],
    name: &'static str,
    plural: &'static str,
) -> Kind {
    Kind { name, plural, group, versions }
}

const V1: &[&str] = &["v1"];

/// Pods, which are watched twice on a node: its own, and the others.
pub(super) const POD: Kind = kind("", V1, "Pod", "pods");

/// Of which only what is named is watched.
pub(super) const SECRET: Kind = kind("", V1, "Secret", "secrets");

/// Of which only that of mesh-wide settings is watched.
pub(super) const CONFIG_MAP: Kind = kind("", V1, "ConfigMap", "configmaps");

/// Kubernetes' own that are watched whole.
pub(super) const BUILT_IN: [Kind; 4] = [
    kind("", V1, "Namespace", "namespaces"),
    kind("", V1, "Node", "nodes"),
    kind("", V1, "Service", "services"),
    kind("discovery.k8s.io", V1, "EndpointSlice", "endpointslices"),
];

const NETWORKING: &str = "networking.istio.io";
const SECURITY: &str = "security.istio.io";
const NETWORKING_VERSIONS: &[&str] = &["v1", "v1beta1", "v1alpha3"];
const SECURITY_VERSIONS: &[&str] = &["v1", "v1beta1"];

/// Those of resource definitions.
pub(super) const DEFINED: [Kind; 7] = [
    kind(NETWORKING, NETWORKING_VERSIONS, "VirtualService", "virtualservices"),
    kind(NETWORKING, NETWORKING_VERSIONS, "DestinationRule", "destinationrules"),
    kind(NETWORKING, NETWORKING_VERSIONS, "Gateway", "gateways"),
    kind(SECURITY, SECURITY_VERSIONS, "AuthorizationPolicy", "authorizationpolicies"),
    kind(SECURITY, SECURITY_VERSIONS, "PeerAuthentication", "peerauthentications"),
    kind(SECURITY, SECURITY_VERSIONS, "RequestAuthentication", "requestauthentications"),
    kind("mesh.io", &["v1alpha1"], "ServicePolicy", "servicepolicies"),
];

impl Kind {
    /// It in one of its versions.
    pub fn resource(&self, version: &str) -> ApiResource {
        let kind = GroupVersionKind::gvk(self.group, version, self.name);
        ApiResource::from_gvk_with_plural(&kind, self.plural)
    }

    /// Name of its resource definition.
    pub fn definition(&self) -> String {
        format!("{}.{}", self.plural, self.group)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::state::resource::{self, Origin};

    #[test]
    fn each_kind_is_read_in_each_of_its_versions() {
        for kind in BUILT_IN.iter().chain(&DEFINED).chain([&POD, &SECRET, &CONFIG_MAP]) {
            for version in kind.versions {
                let api_version = kind.resource(version).api_version;
                let object = json!({"apiVersion": api_version, "kind": kind.name, "metadata": {"name": "a"}, "spec": {}});
                // Without a spec some are refused, but never for what they are.
                if let Err(refused) = resource::read(&object, Origin::ApiServer) {
                    assert!(!refused.error.message.contains("kind"), "{api_version}: {refused:?}");
                }
            }
        }
    }
}
