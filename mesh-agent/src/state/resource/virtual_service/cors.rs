//! `corsPolicy`.
//!
//! Promises that what it says is ready to be a header's value. Tested in `tests.rs` beside it; what becomes of a
//! request, in `route/cors.rs`.

use http::HeaderValue;
use serde::Deserialize;

use crate::state::{
    resource::{
        duration::IstioDuration,
        field::{Checked, FieldError, item, under},
        string_match::{self, header_name},
    },
    snapshot::{CorsPolicy, StringMatch, UnmatchedPreflights},
};

/// Methods that may be allowed, besides `*`.
const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "CONNECT", "OPTIONS", "TRACE"];

/// As written.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Wire {
    allow_origins: Option<Vec<string_match::Wire>>,
    allow_origin: Option<Vec<String>>,
    allow_methods: Option<Vec<String>>,
    allow_headers: Option<Vec<String>>,
    expose_headers: Option<Vec<String>>,
    max_age: Option<IstioDuration>,
    allow_credentials: Option<bool>,
    unmatched_preflights: Option<WireUnmatched>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum WireUnmatched {
    Unspecified,
    Forward,
    Ignore,
}

impl Wire {
    /// The policy.
    pub fn check(self) -> Checked<CorsPolicy> {
        let mut allow_origins = Vec::new();
        for (i, origin) in self.allow_origins.unwrap_or_default().into_iter().enumerate() {
            allow_origins.push(origin.check().map_err(item("allowOrigins", i))?);
        }
        if allow_origins.is_empty() {
            // The older form, where the newer one says nothing.
            allow_origins.extend(self.allow_origin.unwrap_or_default().into_iter().map(StringMatch::Exact));
        }
        for (i, method) in self.allow_methods.iter().flatten().enumerate() {
            if method != "*" && !METHODS.contains(&method.as_str()) {
                let message = format!("{method:?} is not a supported HTTP method");
                return Err(item("allowMethods", i)(FieldError::new("", message)));
            }
        }
        let names = |field: &str, names: Option<Vec<String>>| {
            for (i, name) in names.iter().flatten().enumerate() {
                header_name(name).map_err(item(field, i))?;
            }
            joined(names).map_err(under(field))
        };
        Ok(CorsPolicy {
            allow_origins,
            allow_methods: joined(self.allow_methods).map_err(under("allowMethods"))?,
            allow_headers: names("allowHeaders", self.allow_headers)?,
            expose_headers: names("exposeHeaders", self.expose_headers)?,
            max_age: self.max_age.map(max_age).transpose()?,
            allow_credentials: self.allow_credentials.unwrap_or(false),
            unmatched_preflights: match self.unmatched_preflights {
                None | Some(WireUnmatched::Unspecified) => UnmatchedPreflights::default(),
                Some(WireUnmatched::Forward) => UnmatchedPreflights::Forward,
                Some(WireUnmatched::Ignore) => UnmatchedPreflights::Ignore,
            },
        })
    }
}

/// A list as the one header that carries it.
fn joined(list: Option<Vec<String>>) -> Checked<Option<HeaderValue>> {
    let Some(list) = list.filter(|list| !list.is_empty()) else { return Ok(None) };
    let value = HeaderValue::from_str(&list.join(","))
        .map_err(|_| FieldError::new("", "the list is not a valid header value"))?;
    Ok(Some(value))
}

fn max_age(age: IstioDuration) -> Checked<HeaderValue> {
    let age = age.at_least_a_millisecond("maxAge")?;
    if age.subsec_nanos() > 0 {
        return Err(FieldError::new("maxAge", "max_age duration is accurate only to seconds precision"));
    }
    Ok(age.as_secs().into())
}
