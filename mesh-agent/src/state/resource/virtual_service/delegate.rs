//! `delegate`: a rule that leaves the rest to another `VirtualService`.
//!
//! Tested in `tests.rs` beside it; how the two become one, in `compile/delegates.rs`.

use serde::Deserialize;

use super::RuleAction;
use crate::state::resource::{
    dns_name,
    field::{Checked, FieldError, under},
};

/// As written.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Wire {
    name: String,
    namespace: Option<String>,
}

impl Wire {
    /// The reference; its namespace is the rule's own where none is named.
    pub fn check(self, own: &str) -> Checked<RuleAction> {
        if self.name.is_empty() {
            return Err(FieldError::new("name", "is required"));
        }
        dns_name(&self.name).map_err(under("name"))?;
        let namespace = self.namespace.filter(|namespace| !namespace.is_empty());
        if let Some(namespace) = &namespace {
            dns_name(namespace).map_err(under("namespace"))?;
        }
        let namespace = namespace.as_deref().unwrap_or(own).into();
        Ok(RuleAction::Delegate { namespace, name: self.name.into() })
    }
}
