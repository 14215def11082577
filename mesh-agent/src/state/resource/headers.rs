//! `headers` of a route or destination: set, add, remove, for the request and the response.
//!
//! Promises that names and values are valid before they reach the path. Never accepts Envoy's command operators
//! (`%REQ(…)%`) in values, which this mesh does not evaluate. Tested by the table below.

use std::collections::BTreeMap;

use http::{HeaderName, HeaderValue, uri::Authority};
use serde::Deserialize;

use super::{
    field::{Checked, FieldError, entry, item, under},
    string_match::header_name,
};
use crate::state::snapshot::{BothHeaderOps, HeaderOp, HeaderOps};

/// As written.
#[derive(Debug, Default, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Wire {
    #[serde(default)]
    request: WireOp,
    #[serde(default)]
    response: WireOp,
}

#[derive(Debug, Default, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireOp {
    #[serde(default)]
    set: BTreeMap<String, String>,
    #[serde(default)]
    add: BTreeMap<String, String>,
    #[serde(default)]
    remove: Vec<String>,
}

impl Wire {
    /// The operations, with the request's authority apart from its headers.
    pub fn check(self) -> Checked<HeaderOps> {
        Ok(BothHeaderOps {
            request: self.request.check(true).map_err(under("request"))?,
            response: self.response.check(false).map_err(under("response"))?,
        }
        .into())
    }
}

impl WireOp {
    fn check(self, request: bool) -> Checked<HeaderOp> {
        let mut op = HeaderOp::default();
        // `add` first: where both name the authority, `set` wins.
        for (map, written) in [("add", self.add), ("set", self.set)] {
            for (name, value) in written {
                if request && is_authority(&name) {
                    op.authority = Some(authority(&value).map_err(entry(map, &name))?);
                    continue;
                }
                let pair = pair(&name, &value).map_err(entry(map, &name))?;
                if map == "set" { op.set.push(pair) } else { op.add.push(pair) }
            }
        }
        for (i, name) in self.remove.iter().enumerate() {
            if request && is_authority(name) {
                let error = FieldError::new("", "the authority of a request cannot be removed");
                return Err(item("remove", i)(error));
            }
            op.remove.push(header_name(name).map_err(item("remove", i))?);
        }
        Ok(op)
    }
}

fn is_authority(name: &str) -> bool {
    name.eq_ignore_ascii_case("host") || name.eq_ignore_ascii_case(":authority")
}

/// What says where a message ends and what becomes of its connection: the proxy's own to write.
pub(super) const FRAMING: [HeaderName; 7] = [
    http::header::CONTENT_LENGTH,
    http::header::TRANSFER_ENCODING,
    http::header::CONNECTION,
    http::header::UPGRADE,
    http::header::TRAILER,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
];

fn pair(name: &str, value: &str) -> Checked<(HeaderName, HeaderValue)> {
    let name = header_name(name)?;
    if FRAMING.contains(&name) {
        return Err(FieldError::new("", format!("{name} frames the message and cannot be set")));
    }
    let value = literal(value)?;
    let value = HeaderValue::from_str(&value)
        .map_err(|_| FieldError::new("", format!("{value:?} is not a valid header value")))?;
    Ok((name, value))
}

/// The value with `%%` turned into `%`; a single `%` starts a command operator.
fn literal(value: &str) -> Checked<String> {
    let pieces: Vec<&str> = value.split("%%").collect();
    if pieces.iter().any(|piece| piece.contains('%')) {
        return Err(FieldError::new(
            "",
            "command operators (%…%) in header values are not supported yet; write %% for a literal percent sign",
        ));
    }
    Ok(pieces.join("%"))
}

/// An authority as written in a rewrite or a header operation.
pub fn authority(value: &str) -> Checked<Authority> {
    let bad = || FieldError::new("", format!("{value:?} is not a host name with an optional port"));
    let authority: Authority = value.parse().map_err(|_| bad())?;
    // Userinfo is no part of a Host header.
    if authority.as_str().contains('@') { Err(bad()) } else { Ok(authority) }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn bad_operations_name_their_field() {
        let table = [
            (json!({"request": {"set": {"bad name": "x"}}}), "request.set.bad name", "header name"),
            (json!({"request": {"add": {"x": "a\nb"}}}), "request.add.x", "header value"),
            (json!({"response": {"set": {"x": "%REQ(y)%"}}}), "response.set.x", "not supported yet"),
            (json!({"request": {"remove": ["ok", ":path"]}}), "request.remove[1]", "header name"),
            (json!({"request": {"remove": ["Host"]}}), "request.remove[0]", "cannot be removed"),
            (json!({"response": {"set": {"Content-Length": "1"}}}), "response.set.Content-Length", "frames"),
            (json!({"request": {"add": {"upgrade": "x"}}}), "request.add.upgrade", "frames"),
            (json!({"request": {"set": {"host": "a b"}}}), "request.set.host", "host name"),
            (json!({"request": {"set": {"host": "u@b"}}}), "request.set.host", "host name"),
        ];
        for (value, field, message) in table {
            let error = serde_json::from_value::<Wire>(value.clone()).unwrap().check().unwrap_err();
            assert_eq!(error.field, field, "{value}");
            assert!(error.message.contains(message), "{value}: {}", error.message);
        }
    }

    #[test]
    fn set_names_the_authority_before_add() {
        let value = json!({"request": {
            "add": {"Host": "add.example"}, "set": {":authority": "set.example:8080", "x": "100%%"}
        }});
        let ops = serde_json::from_value::<Wire>(value).unwrap().check().unwrap();
        assert_eq!(ops.request.authority.clone().unwrap(), "set.example:8080");
        assert!(ops.request.add.is_empty());
        assert_eq!(ops.request.set[0].1, "100%");
    }
}
