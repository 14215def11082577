//! From what `schemars` says of a type to what a resource definition may say: a structural schema
//! (Kubernetes: Extend the API with `CustomResourceDefinitions`, "Specifying a structural schema").
//!
//! Fields that the type does not have stay in the object, so that the mesh's own checks see them. Panics where a type says
//! what has no structural form. Tested below, by cases, and by each definition in `definitions.rs`.

use serde_json::{Map, Value, json};

const KEEP: &str = "x-kubernetes-preserve-unknown-fields";
const INT_OR_STRING: &str = "x-kubernetes-int-or-string";

/// Whether it is the description of a type that only names it.
fn says_nothing(text: &str) -> bool {
    let rest =
        ["One entry of ", "One of ", "A "].iter().find_map(|start| text.strip_prefix(start)).unwrap_or(text);
    text == "As written." || (rest.starts_with('`') && rest.ends_with("`."))
}

/// The structural form.
pub(super) fn structural(schema: &Value) -> Value {
    let Value::Object(schema) = schema else {
        assert_eq!(schema, &json!(true), "a schema that nothing holds for");
        return json!({ KEEP: true });
    };
    let mut form = Map::new();
    for (keyword, value) in schema {
        match keyword.as_str() {
            "description" => {
                let text = value.as_str().unwrap();
                if !says_nothing(text) {
                    form.insert(keyword.clone(), text.replace('\n', " ").into());
                }
            }
            "type" => types(&mut form, value),
            "minimum" | "maximum" | "required" => drop(form.insert(keyword.clone(), value.clone())),
            "enum" => {
                let values: Vec<_> =
                    value.as_array().unwrap().iter().filter(|one| !one.is_null()).cloned().collect();
                form.insert(keyword.clone(), values.into());
            }
            "const" => drop(form.insert("enum".to_owned(), json!([value]))),
            "format" => format(&mut form, value.as_str().unwrap()),
            // What is not named is kept, below.
            "additionalProperties" if *value == json!(false) => {}
            "items" | "additionalProperties" => drop(form.insert(keyword.clone(), structural(value))),
            "properties" => {
                let fields = value.as_object().unwrap().iter();
                let fields: Map<_, _> =
                    fields.map(|(name, field)| (name.clone(), structural(field))).collect();
                form.insert(keyword.clone(), fields.into());
            }
            "oneOf" => variants(&mut form, value.as_array().unwrap()),
            "anyOf" => alternatives(&mut form, value.as_array().unwrap()),
            // Defaults are those of the mesh, which knows when one was given.
            "default" | "title" | "$schema" => {}
            other => panic!("{other} has no structural form: {schema:?}"),
        }
    }
    // Only an outer description is about the field.
    if let Some(description) =
        schema.get("description").and_then(Value::as_str).filter(|text| !says_nothing(text))
    {
        form.insert("description".to_owned(), description.replace('\n', " ").into());
    }
    let is_anything = !form.contains_key("type") && !form.contains_key(INT_OR_STRING);
    let is_object = form.get("type") == Some(&json!("object")) && !form.contains_key("additionalProperties");
    if is_anything || is_object {
        form.insert(KEEP.to_owned(), true.into());
    }
    form.into()
}

/// One type, which may be null.
fn types(form: &mut Map<String, Value>, value: &Value) {
    let all: Vec<_> = value.as_array().cloned().unwrap_or_else(|| vec![value.clone()]);
    let (null, types): (Vec<_>, Vec<_>) = all.into_iter().partition(|one| one == "null");
    assert_eq!(types.len(), 1, "one type: {value}");
    form.insert("type".to_owned(), types[0].clone());
    if !null.is_empty() {
        form.insert("nullable".to_owned(), true.into());
    }
}

/// The formats that Kubernetes knows; the bounds of those that it does not.
fn format(form: &mut Map<String, Value>, format: &str) {
    match format {
        "int32" | "int64" | "double" => drop(form.insert("format".to_owned(), format.into())),
        "uint32" => drop(form.insert("maximum".to_owned(), u32::MAX.into())),
        "uint8" | "uint16" | "uint64" => {}
        other => panic!("{other} is no format that is used here"),
    }
}

/// The words of an enumeration, some of which have a description.
fn variants(form: &mut Map<String, Value>, variants: &[Value]) {
    let mut words = Vec::new();
    for variant in variants {
        assert_eq!(variant["type"], "string", "an enumeration of words: {variant}");
        let many = variant["enum"].as_array().cloned();
        words.extend(many.unwrap_or_else(|| vec![variant["const"].clone()]));
    }
    form.insert("type".to_owned(), "string".into());
    form.insert("enum".to_owned(), words.into());
}

/// Something or nothing; or a number or a text.
fn alternatives(form: &mut Map<String, Value>, all: &[Value]) {
    let (null, some): (Vec<_>, Vec<_>) = all.iter().partition(|one| one["type"] == "null");
    if !null.is_empty() {
        form.insert("nullable".to_owned(), true.into());
    }
    let types: Vec<_> = some.iter().map(|one| one["type"].clone()).collect();
    if let [one] = some.as_slice()
        && let Value::Object(inner) = structural(one)
    {
        form.extend(inner);
    } else {
        assert_eq!(types, ["integer", "string"], "no structural form");
        form.insert(INT_OR_STRING.to_owned(), true.into());
    }
}

#[test]
fn schemas_become_structural() {
    for (schema, form) in [
        (json!(true), json!({KEEP: true})),
        (json!({"description": "a"}), json!({"description": "a", KEEP: true})),
        (json!({"type": ["string", "null"], "default": null}), json!({"type": "string", "nullable": true})),
        (
            json!({"type": "integer", "format": "uint16", "minimum": 0, "maximum": 65535}),
            json!({"type": "integer", "minimum": 0, "maximum": 65535}),
        ),
        (
            json!({"type": "integer", "format": "uint32", "minimum": 0}),
            json!({"type": "integer", "minimum": 0, "maximum": u32::MAX}),
        ),
        (
            json!({"type": "object", "properties": {"a": {"const": "b", "type": "string"}}, "required": ["a"], "additionalProperties": false}),
            json!({"type": "object", "properties": {"a": {"enum": ["b"], "type": "string"}}, "required": ["a"], KEEP: true}),
        ),
        (
            json!({"type": "object", "additionalProperties": {"type": "string"}}),
            json!({"type": "object", "additionalProperties": {"type": "string"}}),
        ),
        (
            json!({"description": "outer", "anyOf": [{"type": "string", "enum": ["A"], "description": "inner"}, {"type": "null"}]}),
            json!({"description": "outer", "type": "string", "enum": ["A"], "nullable": true}),
        ),
        (
            json!({"oneOf": [{"type": "string", "enum": ["A", "B"]}, {"type": "string", "const": "C", "description": "c"}]}),
            json!({"type": "string", "enum": ["A", "B", "C"]}),
        ),
        (
            json!({"anyOf": [{"type": "integer", "format": "uint16"}, {"type": "string"}]}),
            json!({INT_OR_STRING: true}),
        ),
    ] {
        assert_eq!(structural(&schema), form, "{schema}");
    }
}
