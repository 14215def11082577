//! The resource definitions of the chart, made of the types that objects are read into.
//!
//! `cargo xtask crds` writes them; the test below fails where they are others than those that are there. What objects they let
//! in is in `mesh-agent/tests/definitions.rs`.

use std::{fs, path::PathBuf};

use schemars::{Schema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Value, json};

use super::{super::*, structural::structural};

/// Set, the definitions are written and not compared.
const WRITE: &str = "MESH_WRITE_DEFINITIONS";

/// One kind.
struct Definition {
    group: &'static str,
    /// The first is the one that is stored.
    versions: &'static [&'static str],
    kind: &'static str,
    plural: &'static str,
    short: &'static str,
    /// What `kubectl get` shows besides name and age: heading and path.
    column: Option<(&'static str, &'static str)>,
    schema: fn(&mut SchemaGenerator) -> Schema,
}

const NETWORKING: (&str, &[&str]) = ("networking.istio.io", &["v1", "v1beta1", "v1alpha3"]);
const SECURITY: (&str, &[&str]) = ("security.istio.io", &["v1", "v1beta1"]);
const OWN: (&str, &[&str]) = ("mesh.io", &["v1alpha1"]);

const fn definition(
    (group, versions): (&'static str, &'static [&'static str]),
    [kind, plural, short]: [&'static str; 3],
    column: Option<(&'static str, &'static str)>,
    schema: fn(&mut SchemaGenerator) -> Schema,
) -> Definition {
    Definition { group, versions, kind, plural, short, column, schema }
}

const DEFINITIONS: [Definition; 7] = [
    definition(
        NETWORKING,
        ["VirtualService", "virtualservices", "vs"],
        Some(("Hosts", ".spec.hosts")),
        virtual_service::schema,
    ),
    definition(
        NETWORKING,
        ["DestinationRule", "destinationrules", "dr"],
        Some(("Host", ".spec.host")),
        destination_rule::schema,
    ),
    definition(NETWORKING, ["Gateway", "gateways", "gw"], None, gateway::schema),
    definition(
        SECURITY,
        ["AuthorizationPolicy", "authorizationpolicies", "ap"],
        Some(("Action", ".spec.action")),
        authorization_policy::schema,
    ),
    definition(
        SECURITY,
        ["PeerAuthentication", "peerauthentications", "pa"],
        Some(("Mode", ".spec.mtls.mode")),
        peer_authentication::schema,
    ),
    definition(
        SECURITY,
        ["RequestAuthentication", "requestauthentications", "ra"],
        None,
        request_authentication::schema,
    ),
    definition(OWN, ["ServicePolicy", "servicepolicies", "svcpol"], None, service_policy::schema),
];

impl Definition {
    fn object(&self) -> Value {
        let column =
            self.column.map(|(name, path)| json!({"name": name, "type": "string", "jsonPath": path}));
        let age = json!({"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"});
        let columns: Vec<Value> = column.into_iter().chain([age]).collect();
        let mut settings = SchemaSettings::draft2020_12();
        settings.inline_subschemas = true;
        let spec = structural((self.schema)(&mut settings.into_generator()).as_value());
        // What stands beside it by mistake is kept too.
        let schema = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true, "properties": {
            "spec": spec,
            "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}});
        let version = |(i, name): (usize, &&str)| {
            json!({"name": name, "served": true, "storage": i == 0, "subresources": {"status": {}},
                   "additionalPrinterColumns": columns, "schema": {"openAPIV3Schema": schema}})
        };
        let versions: Vec<Value> = self.versions.iter().enumerate().map(version).collect();
        json!({
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": format!("{}.{}", self.plural, self.group), "labels": {"app.kubernetes.io/part-of": "mesh"}},
            "spec": {
                "group": self.group,
                "scope": "Namespaced",
                "names": {"kind": self.kind, "listKind": format!("{}List", self.kind), "plural": self.plural,
                          "singular": self.kind.to_lowercase(), "shortNames": [self.short], "categories": ["mesh"]},
                "versions": versions,
            },
        })
    }
}

#[test]
fn the_chart_has_the_definitions_of_what_is_read() {
    let chart = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../deploy/chart/crds");
    for definition in DEFINITIONS {
        let file = chart.join(format!("{}.yaml", definition.plural));
        let text = serde_saphyr::to_string(&definition.object()).unwrap();
        let text = format!("# Made by `cargo xtask crds`: changes are lost.\n{text}");
        if std::env::var_os(WRITE).is_some() {
            fs::write(file, text).unwrap();
        } else {
            let kept = fs::read_to_string(&file).unwrap();
            assert!(
                kept == text,
                "{} is not of the types as they are: run `cargo xtask crds`",
                file.display()
            );
        }
    }
}

#[test]
fn each_kind_that_is_watched_is_defined_as_it_is_watched() {
    let defined: Vec<_> = DEFINITIONS
        .iter()
        .map(|one| (one.kind, format!("{}.{}", one.plural, one.group), one.versions))
        .collect();
    assert_eq!(crate::source::definitions().collect::<Vec<_>>(), defined);
}
