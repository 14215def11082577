//! Istio's `PeerAuthentication`, checked.
//!
//! Promises that what is accepted says what it means: fields that are not known, modes that there are not, and ports
//! without a selector are refused by name. Tested by the table below; what modes come to, in `compile/tests`.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde::Deserialize;

use super::{
    ObjectKey,
    authorization_policy::{WireSelector, labels_of},
    field::{Checked, FieldError, entry},
};
use crate::state::snapshot::MtlsMode;

/// A `PeerAuthentication`.
#[derive(Debug)]
pub struct PeerAuthentication {
    /// `NAMESPACE/NAME`.
    pub name: Arc<str>,
    /// `metadata.creationTimestamp`; the oldest of a scope holds.
    pub created: Option<Time>,
    /// `selector.matchLabels`; none: every pod of the namespace, in the root namespace of the mesh.
    pub labels: BTreeMap<String, String>,
    /// `mtls.mode`; `None` (`UNSET`) is inherited.
    pub mode: Option<MtlsMode>,
    /// `portLevelMtls`, by port of the pod; `None` is inherited.
    pub ports: BTreeMap<u16, Option<MtlsMode>>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Wire {
    /// Pods of its namespace that it is for; none: all. In the root namespace: of the whole mesh.
    selector: Option<WireSelector>,
    /// Whether plaintext is taken.
    mtls: Option<WireMtls>,
    /// The same for single ports of the pod.
    port_level_mtls: Option<BTreeMap<String, Option<WireMtls>>>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireMtls {
    mode: Option<WireMode>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum WireMode {
    Unset,
    Disable,
    Permissive,
    Strict,
}

impl WireMtls {
    fn mode(&self) -> Option<MtlsMode> {
        match self.mode {
            None | Some(WireMode::Unset) => None,
            Some(WireMode::Disable | WireMode::Permissive) => Some(MtlsMode::Permissive),
            Some(WireMode::Strict) => Some(MtlsMode::Strict),
        }
    }
}

/// What its `spec` may be, for its resource definition.
#[cfg(test)]
pub(super) fn schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
    generator.subschema_for::<Wire>()
}

/// Checks the `spec` of a `PeerAuthentication`.
pub(super) fn check(
    key: &ObjectKey,
    created: Option<Time>,
    spec: &serde_json::Value,
) -> Checked<PeerAuthentication> {
    let nothing = serde_json::Value::Object(serde_json::Map::new());
    let spec = if spec.is_null() { &nothing } else { spec };
    let Wire { selector, mtls, port_level_mtls } = super::field::deserialize(spec)?;
    let labels = labels_of(selector)?;
    let mut ports = BTreeMap::new();
    if let Some(written) = port_level_mtls {
        let refused = |why: &str| Err(FieldError::new("portLevelMtls", why));
        if labels.is_empty() {
            return refused("needs a selector with labels: whose ports are meant?");
        }
        if written.is_empty() {
            return refused("is there and names no port");
        }
        for (text, mtls) in written {
            let port = text.parse::<u16>().ok().filter(|port| *port > 0);
            let port = port.ok_or_else(|| {
                entry("portLevelMtls", &text)(FieldError::new("", "is no port: 1 to 65535, and of the pod"))
            })?;
            ports.insert(port, mtls.as_ref().and_then(WireMtls::mode));
        }
    }
    Ok(PeerAuthentication {
        name: format!("{}/{}", key.namespace, key.name).into(),
        created,
        labels,
        mode: mtls.as_ref().and_then(WireMtls::mode),
        ports,
    })
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use serde_json::{Value, json};

    use super::*;

    fn read(spec: &Value) -> Checked<PeerAuthentication> {
        check(&ObjectKey::new("PeerAuthentication", "app", "p"), None, spec)
    }

    #[test]
    fn what_cannot_mean_what_it_says_is_refused() {
        let selector = json!({"matchLabels": {"app": "a"}});
        let ports = |ports: Value| json!({"selector": selector, "portLevelMtls": ports});
        for (spec, field, message) in [
            (json!({"mtls": {"mode": "strict"}}), "mtls.mode", "unknown variant"),
            (json!({"mtls": {"mode": "STRICT", "x": 1}}), "mtls.x", "unknown field"),
            (json!({"mtl": {}}), "mtl", "unknown field"),
            (json!({"selector": {"matchLabels": {"app": "a*"}}}), "selector.matchLabels.app", "wildcards"),
            (json!({"portLevelMtls": {"80": {}}}), "portLevelMtls", "needs a selector"),
            (json!({"selector": {}, "portLevelMtls": {"80": {}}}), "portLevelMtls", "needs a selector"),
            (ports(json!({})), "portLevelMtls", "names no port"),
            (ports(json!({"0": {}})), "portLevelMtls.0", "is no port"),
            (ports(json!({"65536": {}})), "portLevelMtls.65536", "is no port"),
            (ports(json!({"http": {}})), "portLevelMtls.http", "is no port"),
            (ports(json!({"80": {"mode": "ON"}})), "portLevelMtls.80.mode", "unknown variant"),
        ] {
            let error = read(&spec).map(|_| ()).unwrap_err();
            assert_eq!(error.field, field, "{spec}: {}", error.message);
            assert!(error.message.contains(message), "{spec}: {}", error.message);
        }
    }

    #[test]
    fn modes_are_read() {
        let (permissive, strict) = (Some(MtlsMode::Permissive), Some(MtlsMode::Strict));
        for (mtls, expected) in [
            (Value::Null, None),
            (json!({}), None),
            (json!({"mode": "UNSET"}), None),
            (json!({"mode": "DISABLE"}), permissive),
            (json!({"mode": "PERMISSIVE"}), permissive),
            (json!({"mode": "STRICT"}), strict),
        ] {
            assert_eq!(read(&json!({"mtls": mtls})).unwrap().mode, expected, "{mtls}");
            let selector = json!({"matchLabels": {"app": "a"}});
            let spec = json!({"selector": selector, "portLevelMtls": {"8080": mtls}});
            assert_eq!(read(&spec).unwrap().ports, BTreeMap::from([(8080, expected)]), "{mtls}");
        }
        assert_eq!(read(&Value::Null).unwrap().mode, None);
    }
}
