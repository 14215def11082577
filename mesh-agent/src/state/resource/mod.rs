//! What users write: Kubernetes objects and Istio's, typed and checked one by one.
//!
//! Promises that an object which is accepted cannot make `compile` fail, and that one which is refused names the
//! field. Never does I/O and never sees YAML: sources hand in JSON values. Tested by the tables below and in each
//! kind's file.

use std::{collections::BTreeMap, fmt, sync::Arc};

use k8s_openapi::api::{
    core::v1::{self, ConfigMap, Namespace, Node, Pod, Secret, ServiceAccount},
    discovery,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use self::{
    authorization_policy::AuthorizationPolicy,
    client_tls::Credential,
    destination_rule::DestinationRule,
    endpoint_slice::EndpointSlice,
    field::{Checked, FieldError, under},
    gateway::Gateway,
    mesh_config::MeshConfig,
    peer_authentication::PeerAuthentication,
    request_authentication::RequestAuthentication,
    service::Service,
    service_policy::ServicePolicy,
    virtual_service::VirtualService,
};
use super::{Cause, Problem, defaults};

pub mod authorization_policy;
pub mod besides;
pub mod client_tls;
pub mod connection_pool;
pub mod destination_rule;
mod duration;
pub mod endpoint_slice;
pub mod export_to;
pub mod field;
pub mod gateway;
mod headers;
mod http_tunnel;
pub mod load_balancer;
pub mod locality;
pub mod mesh_config;
mod outlier_detection;
pub mod peer_authentication;
pub mod pod;
pub mod probes;
pub mod request_authentication;
pub mod service;
pub mod service_policy;
mod string_match;
mod utilization;
pub mod virtual_service;

#[cfg(test)]
mod tests;

/// Which object: there is one of each.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    /// `kind`.
    pub kind: Arc<str>,
    /// `metadata.namespace`; empty for kinds that have none.
    pub namespace: Arc<str>,
    /// `metadata.name`.
    pub name: Arc<str>,
}

impl ObjectKey {
    /// A key; the namespace is empty for kinds that have none.
    pub fn new(kind: &str, namespace: &str, name: &str) -> Self {
        Self { kind: kind.into(), namespace: namespace.into(), name: name.into() }
    }
}

/// Which object a named file is: there is none of this kind in manifests.
pub fn file_key(path: &str) -> ObjectKey {
    ObjectKey::new("File", "", path)
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.namespace {
            "" => write!(f, "{} {}", self.kind, self.name),
            namespace => write!(f, "{} {namespace}/{}", self.kind, self.name),
        }
    }
}

/// A checked object and where it was read.
#[derive(Debug)]
pub struct Object {
    /// Where it was read, for problems; for example a file's path. Empty for objects of a cluster.
    pub file: Arc<str>,
    /// What it says.
    pub resource: Resource,
}

impl Object {
    /// Whether it stands in the place of a policy that cannot be read.
    pub fn is_stand_in(&self) -> bool {
        matches!(&self.resource, Resource::AuthorizationPolicy(policy) if policy.stand_in)
    }
}

/// The input of `compile`: objects by key.
pub type Objects = BTreeMap<ObjectKey, Arc<Object>>;

/// The objects of one kind, in their order, without a look at others.
pub fn of_kind<'o>(
    objects: &'o Objects,
    kind: &'o str,
) -> impl Iterator<Item = (&'o ObjectKey, &'o Arc<Object>)> {
    let first = ObjectKey::new(kind, "", "");
    objects.range(first..).take_while(move |(key, _)| *key.kind == *kind)
}

/// Those of one namespace.
pub fn in_namespace<'o>(
    objects: &'o Objects,
    kind: &'o str,
    namespace: &'o str,
) -> impl Iterator<Item = (&'o ObjectKey, &'o Arc<Object>)> {
    let first = ObjectKey::new(kind, namespace, "");
    let all = objects.range(first..);
    all.take_while(move |(key, _)| *key.kind == *kind && *key.namespace == *namespace)
}

/// An object of a kind the mesh reads.
#[derive(Debug)]
pub enum Resource {
    /// Namespace.
    Namespace(Box<Namespace>),
    /// Node: its labels, which say where it is.
    Node(BTreeMap<String, String>),
    /// Pod.
    Pod(Box<Pod>),
    /// Service.
    Service(Box<Service>),
    /// `EndpointSlice`.
    EndpointSlice(Box<EndpointSlice>),
    /// Istio's `VirtualService`.
    VirtualService(Box<VirtualService>),
    /// Istio's `DestinationRule`.
    DestinationRule(Box<DestinationRule>),
    /// Istio's `Gateway`.
    Gateway(Box<Gateway>),
    /// Istio's `AuthorizationPolicy`.
    AuthorizationPolicy(Box<AuthorizationPolicy>),
    /// Istio's `PeerAuthentication`.
    PeerAuthentication(Box<PeerAuthentication>),
    /// Mesh-wide settings: the `ConfigMap` `mesh`.
    MeshConfig(Box<MeshConfig>),
    /// Istio's `RequestAuthentication`.
    RequestAuthentication(Box<RequestAuthentication>),
    /// What a Secret has for TLS.
    Secret(Box<Credential>),
    /// The mesh's own `ServicePolicy`.
    ServicePolicy(Box<ServicePolicy>),
    /// A file that an object names by its path, in place of a Secret: what is in it, or why it was not read.
    File(Result<Arc<[u8]>, String>),
    /// A kind that belongs in manifests and that nothing is compiled from yet: `ServiceAccount`, `ConfigMap`. It was checked, and its content is not kept.
    Accepted,
}

/// A manifest that was refused: which object, as far as it could be told, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// The object; none when the manifest does not say what it is.
    pub key: Option<ObjectKey>,
    /// Why.
    pub error: FieldError,
}

impl Refused {
    /// The problem to report.
    pub fn problem(&self, file: &str) -> Problem {
        Problem {
            file: file.to_owned(),
            object: self.key.as_ref().map(ToString::to_string),
            field: Some(self.error.field.clone()).filter(|field| !field.is_empty()),
            message: self.error.message.clone(),
            cause: Cause::Invalid,
        }
    }
}

/// Where an object comes from, and so what a field of Kubernetes' own kinds means that this program does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Somebody wrote it: a typing error.
    Manifest,
    /// An API server has checked it, which may be newer than this program: nothing.
    ApiServer,
}

/// Reads and checks one object.
pub fn read(value: &Value, origin: Origin) -> Result<(ObjectKey, Resource), Refused> {
    let header = header(value, origin).map_err(|error| Refused { key: None, error })?;
    match resource(&header, value) {
        Ok(resource) => Ok((header.key, resource)),
        Err(error) => Err(Refused { key: Some(header.key), error }),
    }
}

/// What tells an object from others.
struct Header<'a> {
    api_version: &'a str,
    key: ObjectKey,
    origin: Origin,
}

fn header(value: &Value, origin: Origin) -> Checked<Header<'_>> {
    if !value.is_object() {
        return Err(FieldError::new("", "this is not an object with apiVersion, kind and metadata"));
    }
    let text = |path: &str| {
        let at = format!("/{}", path.replace('.', "/"));
        let text = value.pointer(&at).filter(|value| !value.is_null());
        match text.map(Value::as_str) {
            Some(None) => Err(FieldError::new(path, "must be a string")),
            Some(Some("")) | None => Ok(None),
            Some(text) => Ok(text),
        }
    };
    let required = |path: &str| text(path)?.ok_or_else(|| FieldError::new(path, "is required"));
    let (api_version, kind) = (required("apiVersion")?, required("kind")?);
    let name = required("metadata.name")?;
    dns_name(name).map_err(under("metadata.name"))?;
    let namespace = if ["Namespace", "Node"].contains(&kind) {
        ""
    } else {
        text("metadata.namespace")?.unwrap_or(defaults::NAMESPACE)
    };
    if !namespace.is_empty() {
        dns_name(namespace).map_err(under("metadata.namespace"))?;
    }
    Ok(Header { api_version, key: ObjectKey::new(kind, namespace, name), origin })
}

/// A DNS-1123 subdomain: names become parts of host names and of identities, where a slash would forge one.
pub(super) fn dns_name(name: &str) -> Checked<()> {
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    if name.len() <= 253 && edge(name.chars().next()) && edge(name.chars().last()) && name.chars().all(inner)
    {
        return Ok(());
    }
    Err(FieldError::new("", format!("{name:?} is not a name: lower case letters, digits, - and . only")))
}

fn resource(header: &Header<'_>, value: &Value) -> Checked<Resource> {
    let origin = header.origin;
    match (header.api_version, &*header.key.kind) {
        ("v1", "Namespace") => core(value, origin).map(Resource::Namespace),
        ("v1", "Pod") => pod::check(core(value, origin)?).map(Resource::Pod),
        ("v1", "Service") => core::<v1::Service>(value, origin)
            .map(|service| Resource::Service(Box::new(Service::of(*service)))),
        ("v1", "Node") => {
            core::<Node>(value, origin).map(|node| Resource::Node(node.metadata.labels.unwrap_or_default()))
        }
        ("v1", "ServiceAccount") => core::<ServiceAccount>(value, origin).map(|_| Resource::Accepted),
        ("v1", "Secret") => {
            core::<Secret>(value, origin).map(|secret| Resource::Secret(Box::new(Credential::of(*secret))))
        }
        ("v1", "ConfigMap") => core::<ConfigMap>(value, origin).map(|_| Resource::Accepted),
        ("discovery.k8s.io/v1", "EndpointSlice") => core::<discovery::v1::EndpointSlice>(value, origin)
            .map(|slice| Resource::EndpointSlice(Box::new(EndpointSlice::of(*slice)))),
        (
            "networking.istio.io/v1alpha3" | "networking.istio.io/v1beta1" | "networking.istio.io/v1",
            "VirtualService" | "DestinationRule" | "Gateway",
        )
        | (
            "security.istio.io/v1beta1" | "security.istio.io/v1",
            "AuthorizationPolicy" | "PeerAuthentication" | "RequestAuthentication",
        )
        | ("mesh.io/v1alpha1", "ServicePolicy") => istio(header, value),
        (api_version, kind) => {
            let group = api_version.split_once('/').map_or("", |(group, _)| group);
            let ours =
                group.ends_with("istio.io") || group == "mesh.io" || group == "gateway.networking.k8s.io";
            let why = if ours { "is not supported yet" } else { "is not one the mesh reads" };
            Err(FieldError::new("", format!("kind {kind} (apiVersion {api_version}) {why}")))
        }
    }
}

/// Reads a Kubernetes object, refusing fields of a manifest that its schema does not have (`status` apart: it is written by
/// clusters, which may be newer than this program).
fn core<T: DeserializeOwned + Serialize>(value: &Value, origin: Origin) -> Checked<Box<T>> {
    let object: T = field::deserialize(value)?;
    if origin == Origin::Manifest {
        refuse_unknown(value, &object)?;
    }
    Ok(Box::new(object))
}

/// Compares what was written with what the schema kept of it.
fn refuse_unknown<T: Serialize>(written: &Value, read: &T) -> Checked<()> {
    let kept = serde_json::to_value(read).map_err(|error| FieldError::new("", error.to_string()))?;
    match lost(written, &kept) {
        None => Ok(()),
        Some(path) => Err(FieldError::new(path, "unknown field")),
    }
}

/// Path of the first field that is in `written` and not in `kept`.
fn lost(written: &Value, kept: &Value) -> Option<String> {
    match (written, kept) {
        (Value::Object(written), Value::Object(kept)) => written.iter().find_map(|(name, value)| {
            let nothing = value.is_null() || value.as_array().is_some_and(Vec::is_empty);
            match kept.get(name) {
                _ if name == "status" || nothing => None,
                None if value.as_object().is_some_and(serde_json::Map::is_empty) => None,
                None => Some(name.clone()),
                Some(kept) => lost(value, kept).map(|rest| join(name, &rest)),
            }
        }),
        (Value::Array(written), Value::Array(kept)) => {
            let pairs = written.iter().zip(kept).enumerate();
            pairs.into_iter().find_map(|(i, (written, kept))| {
                lost(written, kept).map(|rest| join(&format!("[{i}]"), &rest))
            })
        }
        _ => None,
    }
}

fn join(parent: &str, rest: &str) -> String {
    if rest.starts_with('[') { format!("{parent}{rest}") } else { format!("{parent}.{rest}") }
}

fn istio(header: &Header<'_>, value: &Value) -> Checked<Resource> {
    let envelope: virtual_service::Envelope = field::deserialize(value)?;
    refuse_unknown(&value["metadata"], &envelope.metadata).map_err(under("metadata"))?;
    let created = envelope.metadata.creation_timestamp;
    let annotations = envelope.metadata.annotations.unwrap_or_default();
    let (key, spec) = (&header.key, &envelope.spec);
    let under_spec = under("spec");
    Ok(match &*key.kind {
        "VirtualService" => {
            let checked = virtual_service::check(key, created, &annotations, spec).map_err(under_spec)?;
            Resource::VirtualService(Box::new(checked))
        }
        "Gateway" => {
            let checked = gateway::check(key, created, spec).map_err(under_spec)?;
            Resource::Gateway(Box::new(checked))
        }
        "AuthorizationPolicy" => {
            let dry_run = authorization_policy::dry_run(&annotations).map_err(under("metadata"))?;
            let checked = authorization_policy::check(key, dry_run, spec).map_err(under_spec)?;
            Resource::AuthorizationPolicy(Box::new(checked))
        }
        "PeerAuthentication" => {
            let checked = peer_authentication::check(key, created, spec).map_err(under_spec)?;
            Resource::PeerAuthentication(Box::new(checked))
        }
        "RequestAuthentication" => {
            let checked = request_authentication::check(key, spec).map_err(under_spec)?;
            Resource::RequestAuthentication(Box::new(checked))
        }
        "ServicePolicy" => {
            let checked = service_policy::check(key, created, spec).map_err(under_spec)?;
            Resource::ServicePolicy(Box::new(checked))
        }
        _ => {
            let by_latency = load_balancer::by_latency(&annotations).map_err(under("metadata"))?;
            let checked = destination_rule::check(key, created, spec).map_err(under_spec)?;
            if by_latency && checked.policy.as_ref().is_some_and(|policy| !policy.blocks.may_be_by_latency())
            {
                let message = "says otherwise than spec.trafficPolicy.loadBalancer";
                let field = format!("metadata.annotations.{}", load_balancer::ANNOTATION);
                return Err(FieldError::new(field, message));
            }
            Resource::DestinationRule(Box::new(DestinationRule { by_latency, ..checked }))
        }
    })
}
