//! Errors that name a field, and the type of fields that are known but not honoured yet.
//!
//! A check returns the path relative to what it was given; each caller puts its own part in front, so that paths
//! cost nothing while there is no error. Tested through the resources that use it.

use serde::{Deserialize, Deserializer, de};

/// What is wrong, and with which field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    /// Path of the field, for example `spec.http[0].timeout`; empty for the object itself.
    pub field: String,
    /// What is wrong with it.
    pub message: String,
}

/// What a check returns.
pub type Checked<T> = Result<T, FieldError>;

impl FieldError {
    /// An error of this field.
    pub fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { field: field.into(), message: message.into() }
    }

    fn within(self, parent: &str) -> Self {
        let dot = if self.field.is_empty() || self.field.starts_with('[') { "" } else { "." };
        Self { field: format!("{parent}{dot}{}", self.field), message: self.message }
    }
}

/// Puts a parent field in front of an error's path.
pub fn under(parent: &str) -> impl FnOnce(FieldError) -> FieldError {
    move |error| error.within(parent)
}

/// Puts an entry of a list in front of an error's path.
pub fn item(list: &str, index: usize) -> impl FnOnce(FieldError) -> FieldError {
    move |error| error.within(&format!("{list}[{index}]"))
}

/// Puts an entry of a map in front of an error's path.
pub fn entry(map: &str, key: &str) -> impl FnOnce(FieldError) -> FieldError {
    move |error| error.within(&format!("{map}.{key}"))
}

/// A field that Istio has and this version does not honour: naming it is an error, never silence.
#[derive(Debug, Clone)]
pub enum NotYet {}

impl<'de> Deserialize<'de> for NotYet {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        de::IgnoredAny::deserialize(from)?;
        Err(de::Error::custom(
            "not supported yet; remove the field to have the rest of the object take effect",
        ))
    }
}

/// Whatever it is: what is said of it here says more than an API server would.
#[cfg(test)]
impl schemars::JsonSchema for NotYet {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "NotYet".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        true.into()
    }
}

/// Turns an error of deserialization into one that names the field.
pub fn deserialize<'de, T: Deserialize<'de>>(value: &'de serde_json::Value) -> Checked<T> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        FieldError::new(if path == "." { String::new() } else { path }, error.inner().to_string())
    })
}
