//! The form in which cases are written.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Value, json};

/// What all cases share.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct World {
    pub objects: Vec<Value>,
}

/// A file of cases.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// Objects of each case of this file.
    #[serde(default)]
    pub objects: Vec<Value>,
    pub cases: Vec<Case>,
}

/// One case.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    pub name: String,
    /// The spec of `VirtualService default/a`.
    pub vs: Option<Value>,
    /// The `http` of a `VirtualService default/a` with the host `a`, as the shorter form.
    pub http: Option<Value>,
    /// Annotations of that object.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    /// The spec of `DestinationRule default/a`.
    pub dr: Option<Value>,
    /// Further objects: whole ones, or `{Kind namespace/name [created]: spec}` for Istio's.
    #[serde(default)]
    pub objects: Vec<Value>,
    /// The client: `namespace/pod`.
    #[serde(default = "client")]
    pub from: String,
    /// The service that the client dials: `name`, `name.namespace`, either with `:port`.
    #[serde(default = "dialled")]
    pub to: String,
    /// `METHOD URL`.
    pub request: Option<String>,
    /// Headers of the request.
    #[serde(default)]
    pub headers: BTreeMap<String, Values>,
    /// Headers of the app's response.
    #[serde(default)]
    pub response: BTreeMap<String, Values>,
    /// A connection instead of a request.
    pub stream: Option<Stream>,
    pub expect: Option<Expect>,
    pub refused: Option<Refusal>,
    /// Parts of the problems that compiling reports, in their order.
    #[serde(default)]
    pub problems: Vec<String>,
}

fn client() -> String {
    "default/client".to_owned()
}

fn dialled() -> String {
    "a".to_owned()
}

/// One value or several.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum Values {
    One(String),
    Many(Vec<String>),
}

impl Values {
    pub fn all(&self) -> Vec<String> {
        match self {
            Self::One(value) => vec![value.clone()],
            Self::Many(values) => values.clone(),
        }
    }
}

/// A connection whose bytes are not read as HTTP.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stream {
    pub sni: Option<String>,
    pub destination: Option<String>,
    pub source: Option<String>,
}

/// What must come out. What is not given is not looked at.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expect {
    /// Clusters with their weights: `service[.namespace][/subset]:port`, or `missing: …`.
    pub to: Option<To>,
    /// No route takes the request, or the service does not exist for this client.
    pub nothing: Option<String>,
    pub route: Option<String>,
    pub stat: Option<String>,
    pub origin: Option<String>,
    /// Path and query as the app sees them.
    pub path: Option<String>,
    pub authority: Option<String>,
    /// Headers of the request as the app sees them; no value: it is not there.
    #[serde(default)]
    pub headers: BTreeMap<String, Vec<String>>,
    /// Headers of the response as the client sees them.
    #[serde(default)]
    pub response: BTreeMap<String, Vec<String>>,
    /// `STATUS LOCATION`.
    pub redirect: Option<String>,
    /// `STATUS BODY`.
    pub direct: Option<String>,
    /// For example `2s@100%`, or `none`.
    pub delay: Option<String>,
    /// For example `503@50%` or `grpc 14@50%`, or `none`.
    pub abort: Option<String>,
    /// Mirrors with their shares in percent.
    pub mirrors: Option<BTreeMap<String, f64>>,
    /// The mesh's own answer to a preflight, headers sorted; or `none`.
    pub preflight: Option<Value>,
    pub timeout: Option<String>,
    /// For example `2 connect-failure,refused-stream,grpc-1,grpc-14`.
    pub retries: Option<String>,
    /// The first cluster's.
    pub balancing: Option<String>,
    /// The first cluster's, in seconds.
    pub connect_timeout: Option<u64>,
    /// The first cluster's: percent and minimum.
    pub budget: Option<(f64, u32)>,
    /// The first cluster's addresses.
    pub endpoints: Option<Vec<String>>,
    /// The namespace that the first cluster is for; empty: everybody.
    pub view: Option<String>,
    /// Whether the client's first bytes must be read for a server name.
    pub needs_sni: Option<bool>,
}

/// Clusters of a route.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum To {
    One(String),
    Weighted(BTreeMap<String, u32>),
}

/// How an object must be refused.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refusal {
    /// The exact path of the field; empty for the whole object.
    pub field: String,
    /// Part of the reason.
    pub reason: String,
}

/// All objects of a case, as whole objects.
pub fn objects(world: &World, file: &File, case: &Case) -> Vec<Value> {
    let mut objects: Vec<Value> = world.objects.iter().chain(&file.objects).map(whole).collect();
    let own = |kind: &str, spec: &Value| {
        json!({
            "apiVersion": "networking.istio.io/v1", "kind": kind,
            "metadata": {"name": "a", "annotations": case.annotations}, "spec": spec,
        })
    };
    objects.extend(case.vs.iter().map(|spec| own("VirtualService", spec)));
    objects
        .extend(case.http.iter().map(|http| own("VirtualService", &json!({"hosts": ["a"], "http": http}))));
    objects.extend(case.dr.iter().map(|spec| own("DestinationRule", spec)));
    objects.extend(case.objects.iter().map(whole));
    objects
}

/// `{Kind namespace/name [created]: spec}` as the object it stands for.
fn whole(written: &Value) -> Value {
    let Some((head, spec)) =
        written.as_object().filter(|map| map.len() == 1).and_then(|map| map.iter().next())
    else {
        return written.clone();
    };
    let mut words = head.split(' ');
    let (kind, named) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (namespace, name) = named.split_once('/').unwrap_or(("default", named));
    let mut metadata = json!({"name": name, "namespace": namespace});
    if let Some(created) = words.next() {
        metadata["creationTimestamp"] = json!(created);
    }
    json!({"apiVersion": "networking.istio.io/v1", "kind": kind, "metadata": metadata, "spec": spec})
}
