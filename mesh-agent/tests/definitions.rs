//! The resource definitions of the chart let in what the mesh reads, and what it refuses with better words; and refuse what has
//! another form.
//!
//! What an API server does with a structural schema is done here by a walk of the few keywords that ours have (Kubernetes:
//! Extend the API with `CustomResourceDefinitions`). That they are made of the types is tested beside these.

mod documents;

use std::{collections::BTreeMap, error::Error, fs, path::PathBuf};

use mesh_agent::source::{read_documents, read_text};
use serde_json::{Value, json};

const KEEP: &str = "x-kubernetes-preserve-unknown-fields";
const INT_OR_STRING: &str = "x-kubernetes-int-or-string";

type Done = Result<(), Box<dyn Error>>;

/// The schemas of all versions, by `apiVersion` and `kind`.
fn schemas() -> Result<BTreeMap<(String, String), Value>, Box<dyn Error>> {
    let mut files = Vec::new();
    documents::below(&documents::root().join("deploy/chart/crds"), "yaml", &mut files)?;
    let mut schemas = BTreeMap::new();
    for file in files {
        for definition in read_documents(&fs::read_to_string(&file)?)? {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let (group, kind) =
                (text(&definition["spec"]["group"]), text(&definition["spec"]["names"]["kind"]));
            for version in definition["spec"]["versions"].as_array().into_iter().flatten() {
                let api_version = format!("{group}/{}", text(&version["name"]));
                schemas.insert((api_version, kind.clone()), version["schema"]["openAPIV3Schema"].clone());
            }
        }
    }
    Ok(schemas)
}

/// Where a value is not what its schema says, and how; none if it is.
fn wrong(schema: &Value, value: &Value, path: &str) -> Option<String> {
    let differs = |why: &str| Some(format!("{path}: {value} {why}"));
    if value.is_null() {
        return if schema["nullable"] == true || schema["type"].is_null() {
            None
        } else {
            differs("is null")
        };
    }
    let fits = match schema["type"].as_str() {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("boolean") => value.is_boolean(),
        Some("integer") => value.is_i64() || value.is_u64(),
        Some("number") => value.is_number(),
        None if schema[INT_OR_STRING] == true => value.is_i64() || value.is_u64() || value.is_string(),
        None => schema[KEEP] == true,
        Some(_) => false,
    };
    if !fits {
        return differs("has another type");
    }
    if schema["enum"].as_array().is_some_and(|words| !words.contains(value)) {
        return differs("is none of the words");
    }
    let number = value.as_f64();
    let bound = |name: &str| number.zip(schema[name].as_f64());
    if bound("minimum").is_some_and(|(number, least)| number < least)
        || bound("maximum").is_some_and(|(number, most)| number > most)
    {
        return differs("is out of bounds");
    }
    let missing = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
    if let Some(name) = missing.into_iter().find(|name| value.get(name).is_none()) {
        return differs(&format!("has no {name}"));
    }
    match value {
        Value::Object(fields) => fields.iter().find_map(|(name, field)| {
            let schema = schema["properties"].get(name).or_else(|| schema.get("additionalProperties"));
            wrong(schema?, field, &format!("{path}.{name}"))
        }),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .find_map(|(i, item)| wrong(&schema["items"], item, &format!("{path}[{i}]"))),
        _ => None,
    }
}

/// Why a schema is not structural, or would have a server drop fields; none if neither.
fn not_structural(schema: &Value, path: &str) -> Option<String> {
    const KEYWORDS: [&str; 13] = [
        "additionalProperties",
        "description",
        "enum",
        "format",
        "items",
        "maximum",
        "minimum",
        "nullable",
        "properties",
        "required",
        "type",
        KEEP,
        INT_OR_STRING,
    ];
    let fields = schema.as_object()?;
    if let Some(other) = fields.keys().find(|name| !KEYWORDS.contains(&name.as_str())) {
        return Some(format!("{path}: {other}"));
    }
    let typed = fields.contains_key("type");
    if !typed && schema[KEEP] != true && schema[INT_OR_STRING] != true {
        return Some(format!("{path}: no type"));
    }
    let (has_fields, is_map) =
        (fields.contains_key("properties"), fields.contains_key("additionalProperties"));
    if has_fields && is_map {
        return Some(format!("{path}: both properties and additionalProperties"));
    }
    if schema["type"] == "object" && !is_map && schema[KEEP] != true {
        return Some(format!("{path}: drops fields that it does not have"));
    }
    if schema["type"] == "array" && !fields.contains_key("items") {
        return Some(format!("{path}: no items"));
    }
    let inner =
        schema["properties"].as_object().into_iter().flatten().map(|(name, field)| (name.as_str(), field));
    let lists =
        ["items", "additionalProperties"].into_iter().filter_map(|name| Some((name, fields.get(name)?)));
    inner.chain(lists).find_map(|(name, field)| not_structural(field, &format!("{path}.{name}")))
}

/// What a server with these definitions says of an object; none of a kind that they do not define.
fn judged(schemas: &BTreeMap<(String, String), Value>, object: &Value) -> Option<Result<(), String>> {
    let text = |name: &str| object[name].as_str().unwrap_or_default().to_owned();
    let schema = schemas.get(&(text("apiVersion"), text("kind")))?;
    Some(wrong(schema, object, &text("kind")).map_or(Ok(()), Err))
}

#[test]
fn every_definition_is_structural_and_drops_nothing() -> Done {
    let schemas = schemas()?;
    assert_eq!(schemas.len(), 16, "each kind in each of its versions");
    for ((version, kind), schema) in &schemas {
        assert_eq!(not_structural(schema, kind), None, "{version}");
        assert!(
            schema["properties"]["spec"]["properties"].is_object(),
            "{version} {kind} has no schema of its spec"
        );
    }
    Ok(())
}

#[test]
fn what_documents_and_samples_show_is_let_in() -> Done {
    let schemas = schemas()?;
    let mut texts = documents::blocks()?;
    let mut files: Vec<PathBuf> = Vec::new();
    documents::below(&documents::root().join("deploy/samples"), "yaml", &mut files)?;
    for file in files {
        texts.push((file.clone(), fs::read_to_string(file)?));
    }
    let mut seen = 0;
    for (file, text) in texts {
        for object in read_documents(&text)? {
            if let Some(judged) = judged(&schemas, &object) {
                assert_eq!(judged, Ok(()), "{}", file.display());
                seen += 1;
            }
        }
    }
    assert!(seen >= 10, "{seen} objects of our kinds: are they still written so?");
    Ok(())
}

#[test]
fn what_the_mesh_takes_is_let_in() -> Done {
    let schemas = schemas()?;
    let mut files: Vec<PathBuf> = Vec::new();
    documents::below(&documents::root().join("mesh-agent/tests/routing_cases"), "yaml", &mut files)?;
    let mut taken = 0;
    for file in files {
        for document in read_documents(&fs::read_to_string(&file)?)? {
            for case in document["cases"].as_array().into_iter().flatten() {
                let spec = json!({"hosts": ["a"], "http": case["http"]});
                let object = object(NETWORKING, "VirtualService", &spec);
                // Some cases are of what is refused.
                if read_text(&object.to_string()).1.is_empty() {
                    assert_eq!(judged(&schemas, &object), Some(Ok(())), "{}: {object}", file.display());
                    taken += 1;
                }
            }
        }
    }
    assert!(taken >= 100, "{taken} cases: are they still written so?");
    Ok(())
}

fn object(version: &str, kind: &str, spec: &Value) -> Value {
    json!({"apiVersion": version, "kind": kind, "metadata": {"name": "a"}, "spec": spec})
}

const NETWORKING: &str = "networking.istio.io/v1";

#[test]
fn what_has_another_form_is_refused_at_once() -> Done {
    let schemas = schemas()?;
    let routed = |route: Value| json!({"hosts": ["a"], "http": [{"route": [route]}]});
    for (version, kind, spec, why) in [
        (NETWORKING, "VirtualService", json!({"hosts": "a"}), "spec.hosts: \"a\" has another type"),
        (
            NETWORKING,
            "VirtualService",
            routed(json!({"weight": 1})),
            "http[0].route[0]: {\"weight\":1} has no destination",
        ),
        (
            NETWORKING,
            "VirtualService",
            routed(json!({"destination": {"host": "a", "port": {"number": 70000}}})),
            "number: 70000 is out of bounds",
        ),
        (
            NETWORKING,
            "VirtualService",
            routed(json!({"destination": {"host": "a", "port": {"number": 0}}})),
            "number: 0 is out of bounds",
        ),
        (NETWORKING, "DestinationRule", json!({}), "has no host"),
        (
            NETWORKING,
            "DestinationRule",
            json!({"host": "a", "trafficPolicy": {"loadBalancer": {"simple": "SOMETIMES"}}}),
            "\"SOMETIMES\" is none of the words",
        ),
        (
            NETWORKING,
            "DestinationRule",
            json!({"host": "a", "trafficPolicy": {"portLevelSettings": null}}),
            "portLevelSettings: null is null",
        ),
        (
            NETWORKING,
            "Gateway",
            json!({"servers": [{"port": {"number": 0, "name": "a", "protocol": "HTTP"}, "hosts": ["*"]}]}),
            "number: 0 is out of bounds",
        ),
        (
            NETWORKING,
            "Gateway",
            json!({"servers": [{"port": {"number": 443, "name": "a", "protocol": "TLS"}, "hosts": ["*"],
                                "tls": {"mode": "simple"}}]}),
            "is none of the words",
        ),
        (
            "security.istio.io/v1",
            "PeerAuthentication",
            json!({"mtls": {"mode": "strict"}}),
            "is none of the words",
        ),
        (
            "security.istio.io/v1",
            "AuthorizationPolicy",
            json!({"rules": {}}),
            "spec.rules: {} has another type",
        ),
        (
            "security.istio.io/v1",
            "AuthorizationPolicy",
            json!({"selector": {"matchLabels": {"a": 1}}}),
            "matchLabels.a: 1",
        ),
        ("mesh.io/v1alpha1", "ServicePolicy", json!({"service": "a", "port": "http"}), "spec.port: \"http\""),
    ] {
        let object = object(version, kind, &spec);
        let said = judged(&schemas, &object).and_then(Result::err).unwrap_or_default();
        assert!(said.contains(why), "{object}: {said:?}");
        // None of it would have been taken by the mesh.
        assert!(!read_text(&object.to_string()).1.is_empty(), "{object}");
    }
    Ok(())
}

#[test]
fn what_the_mesh_refuses_in_better_words_is_let_in() -> Done {
    let schemas = schemas()?;
    let route = json!([{"destination": {"host": "a"}}]);
    for (version, kind, spec, words) in [
        (NETWORKING, "VirtualService", json!({"hosts": ["a"], "htpp": [{"route": route}]}), "unknown field"),
        (
            NETWORKING,
            "VirtualService",
            json!({"hosts": ["a"], "http": [{"route": route, "timeout": "soon"}]}),
            "is not a duration",
        ),
        (
            "security.istio.io/v1",
            "RequestAuthentication",
            json!({"jwtRules": [{"issuer": "a", "presence": "REQUIRED"}]}),
            "not supported yet",
        ),
        (
            NETWORKING,
            "Gateway",
            json!({"servers": [{"port": {"number": 80, "name": "a", "protocol": "HTTP"}, "hosts": ["*"], "bind": "::1"}]}),
            "not supported yet",
        ),
    ] {
        let object = object(version, kind, &spec);
        assert_eq!(judged(&schemas, &object), Some(Ok(())), "{object}");
        let problems = read_text(&object.to_string()).1;
        assert!(problems.iter().any(|problem| problem.message.contains(words)), "{object}: {problems:?}");
    }
    Ok(())
}
