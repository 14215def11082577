//! One entry of `match`.
//!
//! Tested in `tests.rs` beside it; how requests are matched, in `route/`.

use std::{collections::BTreeMap, num::NonZeroU16, sync::Arc};

use http::HeaderName;
use serde::Deserialize;

use super::{RuleMatch, for_mesh, gateway_names};
use crate::state::{
    resource::{
        field::{Checked, FieldError, entry, under},
        string_match::{self, header_name},
    },
    snapshot::{HeaderMatch, RequestMatch, StringMatch},
};

/// Names that Istio ignores as header matches because a field of their own is there for them.
const NOT_HEADERS: [&str; 4] = ["uri", "scheme", "method", "authority"];

/// As written.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Wire {
    name: Option<String>,
    uri: Option<string_match::Wire>,
    #[serde(default)]
    ignore_uri_case: bool,
    scheme: Option<string_match::Wire>,
    method: Option<string_match::Wire>,
    authority: Option<string_match::Wire>,
    headers: Option<BTreeMap<String, string_match::Wire>>,
    without_headers: Option<BTreeMap<String, string_match::Wire>>,
    query_params: Option<BTreeMap<String, string_match::Wire>>,
    port: Option<NonZeroU16>,
    source_labels: Option<BTreeMap<String, String>>,
    source_namespace: Option<String>,
    gateways: Option<Vec<String>>,
    stat_prefix: Option<String>,
}

impl Wire {
    /// The match of an object of this namespace, with every expression compiled.
    pub fn check(self, namespace: &str) -> Checked<RuleMatch> {
        let request = RequestMatch {
            name: text(self.name),
            stat_prefix: text(self.stat_prefix),
            uri: optional("uri", self.uri)?,
            ignore_uri_case: self.ignore_uri_case,
            scheme: optional("scheme", self.scheme)?,
            method: optional("method", self.method)?,
            authority: optional("authority", self.authority)?,
            headers: headers("headers", self.headers)?,
            without_headers: headers("withoutHeaders", self.without_headers)?,
            query_params: query_params(self.query_params)?,
            port: self.port.map(NonZeroU16::get),
            source_labels: self.source_labels.unwrap_or_default().into_iter().collect(),
            source_namespace: self.source_namespace.filter(|namespace| !namespace.is_empty()),
        };
        let mesh = for_mesh(self.gateways.as_deref());
        let gateways = gateway_names(self.gateways.unwrap_or_default(), namespace);
        Ok(RuleMatch { mesh, gateways, request })
    }
}

fn text(written: Option<String>) -> Option<Arc<str>> {
    written.filter(|text| !text.is_empty()).map(Arc::from)
}

fn optional(field: &str, wire: Option<string_match::Wire>) -> Checked<Option<StringMatch>> {
    wire.map(string_match::Wire::check).transpose().map_err(under(field))
}

fn headers(
    field: &str,
    wire: Option<BTreeMap<String, string_match::Wire>>,
) -> Checked<Vec<(HeaderName, HeaderMatch)>> {
    let mut headers = Vec::new();
    for (name, value) in wire.unwrap_or_default() {
        if NOT_HEADERS.contains(&name.as_str()) {
            let message = format!("match {name} with the field {name} of the match, not as a header");
            return Err(entry(field, &name)(FieldError::new("", message)));
        }
        let header = header_name(&name).map_err(entry(field, &name))?;
        headers.push((header, value.check_header().map_err(entry(field, &name))?));
    }
    Ok(headers)
}

fn query_params(wire: Option<BTreeMap<String, string_match::Wire>>) -> Checked<Vec<(String, StringMatch)>> {
    let mut params = Vec::new();
    for (name, value) in wire.unwrap_or_default() {
        // `{}` asks for presence, and every value starts with nothing.
        let value = value.check_optional().map_err(entry("queryParams", &name))?;
        params.push((name, value.unwrap_or_else(|| StringMatch::Prefix(String::new()))));
    }
    Ok(params)
}
