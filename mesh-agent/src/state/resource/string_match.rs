//! Istio's `StringMatch`: one of `exact`, `prefix`, `regex`.
//!
//! Promises that a regular expression is compiled once, when the object is read, and matches whole strings only.
//! Tested by the table below.

use http::HeaderName;
use regex::Regex;
use serde::Deserialize;

use super::field::{Checked, FieldError};
use crate::state::{
    defaults,
    snapshot::{HeaderMatch, StringMatch},
};

/// As written.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Wire {
    exact: Option<String>,
    prefix: Option<String>,
    regex: Option<String>,
}

impl Wire {
    /// The match, where one must be given.
    pub fn check(self) -> Checked<StringMatch> {
        self.check_optional()?
            .ok_or_else(|| FieldError::new("", "one of exact, prefix or regex must be given"))
    }

    /// The match; `None` for `{}`.
    pub fn check_optional(self) -> Checked<Option<StringMatch>> {
        match (self.exact, self.prefix, self.regex) {
            (None, None, None) => Ok(None),
            (Some(exact), None, None) => Ok(Some(StringMatch::Exact(exact))),
            (None, Some(prefix), None) if prefix.is_empty() => {
                Err(FieldError::new("prefix", "prefix string match should not be empty"))
            }
            (None, Some(prefix), None) => Ok(Some(StringMatch::Prefix(prefix))),
            (None, None, Some(regex)) => whole(&regex, "regex").map(|regex| Some(StringMatch::Regex(regex))),
            _ => Err(FieldError::new("", "only one of exact, prefix and regex may be given")),
        }
    }

    /// A match on a header: `{}` and the regular expression `*` ask for presence only.
    pub fn check_header(self) -> Checked<HeaderMatch> {
        if self.regex.as_deref() == Some("*") && self.exact.is_none() && self.prefix.is_none() {
            return Ok(HeaderMatch::Present);
        }
        Ok(self.check_optional()?.map_or(HeaderMatch::Present, HeaderMatch::Value))
    }
}

/// Compiles a regular expression that must match the whole string.
fn whole(expression: &str, field: &str) -> Checked<Regex> {
    // Compiled alone first: the error then shows what was written, and an unbalanced `)` cannot close our group.
    anywhere(expression, field)?;
    anywhere_unchecked(&format!("^(?:{expression})$"), field)
}

/// Compiles a regular expression that may match anywhere, within Istio's limit of length.
pub fn anywhere(expression: &str, field: &str) -> Checked<Regex> {
    if expression.is_empty() {
        return Err(FieldError::new(field, "regex string match should not be empty"));
    }
    if expression.chars().count() > defaults::REGEX_LENGTH {
        let limit = defaults::REGEX_LENGTH;
        return Err(FieldError::new(field, format!("regex is too large, max length allowed is {limit}")));
    }
    anywhere_unchecked(expression, field)
}

fn anywhere_unchecked(expression: &str, field: &str) -> Checked<Regex> {
    Regex::new(expression).map_err(|error| {
        FieldError::new(field, format!("{expression:?} is not a regular expression in RE2 style: {error}"))
    })
}

/// A header's name as written in a match or an operation.
pub fn header_name(name: &str) -> Checked<HeaderName> {
    HeaderName::from_bytes(name.as_bytes())
        .map_err(|_| FieldError::new("", format!("{name:?} is not a valid header name")))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(value: serde_json::Value) -> Checked<StringMatch> {
        serde_json::from_value::<Wire>(value).unwrap().check()
    }

    #[test]
    fn bad_matches_name_what_is_wrong() {
        let table = [
            (json!({}), "", "one of exact"),
            (json!({"exact": "a", "prefix": "b"}), "", "only one"),
            (json!({"prefix": ""}), "prefix", "not be empty"),
            (json!({"regex": ""}), "regex", "not be empty"),
            (json!({"regex": "("}), "regex", "not a regular expression"),
            (json!({"regex": "a)|(b"}), "regex", "not a regular expression"),
            (json!({"regex": "a".repeat(1025)}), "regex", "1024"),
        ];
        for (value, field, message) in table {
            let error = check(value.clone()).unwrap_err();
            assert_eq!(error.field, field, "{value}");
            assert!(error.message.contains(message), "{value}: {}", error.message);
        }
    }

    #[test]
    fn a_regex_matches_whole_strings_only() {
        let StringMatch::Regex(regex) = check(json!({"regex": "a|bc"})).unwrap() else { panic!("a regex") };
        assert!(regex.is_match("a") && regex.is_match("bc"));
        assert!(!regex.is_match("ab") && !regex.is_match("abc") && !regex.is_match("bc\n"));
    }

    #[test]
    fn presence_of_a_header_has_two_spellings() {
        for value in [json!({}), json!({"regex": "*"})] {
            let wire: Wire = serde_json::from_value(value).unwrap();
            assert!(matches!(wire.check_header().unwrap(), HeaderMatch::Present));
        }
    }
}
