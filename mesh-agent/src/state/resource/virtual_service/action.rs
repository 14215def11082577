//! What a rule does with a request: `route`, `redirect`, `directResponse`, `rewrite`.
//!
//! Tested in `tests.rs` beside it; what becomes of a request, in `route/`.

use std::num::NonZeroU16;

use http::{StatusCode, uri::PathAndQuery};
use k8s_openapi::ByteString;
use regex::Regex;
use serde::Deserialize;

use super::{Destination, RuleAction, Target, check_host};
use crate::state::{
    defaults,
    resource::{
        field::{Checked, FieldError, item, under},
        headers::{self, authority},
        string_match,
    },
    snapshot::{PathRewrite, Redirect, RedirectPort, Rewrite},
};

/// In front of a redirect's `uri`, it makes that replace the matched prefix alone.
const PREFIX: &str = "%PREFIX()%";

/// Statuses that clients follow.
const REDIRECTS: [u16; 5] = [301, 302, 303, 307, 308];

/// `route[]`.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WireDestination {
    destination: WireTarget,
    weight: Option<i32>,
    headers: Option<headers::Wire>,
}

/// `route[]` of `tls` and `tcp`, which has no headers to change.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WireStreamDestination {
    destination: WireTarget,
    weight: Option<i32>,
}

impl From<WireStreamDestination> for WireDestination {
    fn from(stream: WireStreamDestination) -> Self {
        Self { destination: stream.destination, weight: stream.weight, headers: None }
    }
}

/// `destination`.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WireTarget {
    host: String,
    subset: Option<String>,
    port: Option<PortSelector>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct PortSelector {
    number: NonZeroU16,
}

/// Checks `route`: a single destination takes everything, whatever its weight; those of weight 0 are left out.
pub fn check_route(route: Vec<WireDestination>) -> Checked<Vec<Destination>> {
    let single = route.len() == 1;
    let mut destinations = Vec::with_capacity(route.len());
    let mut total: i32 = 0;
    for (index, wire) in route.into_iter().enumerate() {
        let (destination, weight) = wire.check(index, single).map_err(item("route", index))?;
        total = total
            .checked_add(weight)
            .ok_or_else(|| FieldError::new("route", "total destination weight is too large"))?;
        if weight > 0 {
            destinations.push(destination);
        }
    }
    if total == 0 {
        return Err(FieldError::new("route", "total destination weight = 0"));
    }
    Ok(destinations)
}

impl WireDestination {
    fn check(self, index: usize, single: bool) -> Checked<(Destination, i32)> {
        let target = self.destination.check().map_err(under("destination"))?;
        let weight = self.weight.unwrap_or(0);
        if weight < 0 {
            return Err(FieldError::new("weight", format!("weight {weight} < 0")));
        }
        let weight = if single { 1 } else { weight };
        let destination = Destination {
            index,
            target,
            weight: weight.unsigned_abs(),
            headers: self.headers.unwrap_or_default().check().map_err(under("headers"))?,
        };
        Ok((destination, weight))
    }
}

impl WireTarget {
    /// The destination: one host, not many.
    pub fn check(self) -> Checked<Target> {
        check_host(&self.host).map_err(under("host"))?;
        if self.host.starts_with('*') {
            return Err(FieldError::new("host", "destination host cannot be a wildcard"));
        }
        Ok(Target {
            host: self.host,
            port: self.port.map(|port| port.number.get()),
            subset: self.subset.filter(|subset| !subset.is_empty()),
        })
    }
}

/// `redirect`.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WireRedirect {
    uri: Option<String>,
    authority: Option<String>,
    port: Option<NonZeroU16>,
    derive_port: Option<DerivePort>,
    scheme: Option<String>,
    redirect_code: Option<u16>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum DerivePort {
    FromProtocolDefault,
    FromRequestPort,
}

impl WireRedirect {
    /// The redirect.
    pub fn check(self) -> Checked<Redirect> {
        let given = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
        let port_given = self.port.is_some() || self.derive_port.is_some();
        if !(given(&self.uri) || given(&self.authority) || given(&self.scheme) || port_given) {
            return Err(FieldError::new("", "redirect must specify URI, authority, scheme, or port"));
        }
        let port = match (self.port, self.derive_port) {
            (Some(_), Some(_)) => {
                return Err(FieldError::new("derivePort", "port and derivePort cannot both be given"));
            }
            (Some(port), None) => Some(RedirectPort::Number(port.get())),
            (None, Some(DerivePort::FromProtocolDefault)) => Some(RedirectPort::ProtocolDefault),
            (None, Some(DerivePort::FromRequestPort)) => Some(RedirectPort::RequestPort),
            (None, None) => None,
        };
        let uri = self.uri.filter(|uri| !uri.is_empty());
        let prefix = uri.as_ref().is_some_and(|uri| uri.starts_with(PREFIX));
        let uri = uri.map(|uri| uri.strip_prefix(PREFIX).map(str::to_owned).unwrap_or(uri));
        if let Some(uri) = &uri {
            check_path(uri).map_err(under("uri"))?;
        }
        let authority_text = self.authority.filter(|authority| !authority.is_empty());
        if let Some(text) = &authority_text {
            authority(text).map_err(under("authority"))?;
        }
        let scheme = self.scheme.filter(|scheme| !scheme.is_empty());
        if let Some(scheme) = scheme.as_deref().filter(|scheme| !["http", "https"].contains(scheme)) {
            return Err(FieldError::new(
                "scheme",
                format!("invalid redirect scheme {scheme:?}, must be http or https"),
            ));
        }
        Ok(Redirect {
            uri,
            prefix,
            authority: authority_text,
            port,
            scheme,
            status: redirect_status(self.redirect_code)?,
        })
    }
}

fn redirect_status(code: Option<u16>) -> Checked<StatusCode> {
    let Some(code) = code.filter(|code| *code != 0) else { return Ok(defaults::REDIRECT_STATUS) };
    let bad = || FieldError::new("redirectCode", format!("redirect code {code} is none of {REDIRECTS:?}"));
    if !REDIRECTS.contains(&code) {
        return Err(bad());
    }
    StatusCode::from_u16(code).map_err(|_| bad())
}

/// `directResponse`.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WireDirect {
    status: u16,
    body: Option<WireBody>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireBody {
    string: Option<String>,
    #[cfg_attr(test, schemars(with = "Option<String>"))]
    bytes: Option<ByteString>,
}

impl WireDirect {
    /// The answer.
    pub fn check(self) -> Checked<RuleAction> {
        let status = http_status(self.status).map_err(under("status"))?;
        let body = match self.body {
            None => bytes::Bytes::new(),
            Some(WireBody { string: Some(text), bytes: None }) => text.into(),
            Some(WireBody { string: None, bytes: Some(ByteString(bytes)) }) => bytes.into(),
            Some(_) => return Err(FieldError::new("body", "either string or bytes must be given")),
        };
        let limit = defaults::DIRECT_RESPONSE_BODY;
        if body.len() > limit {
            return Err(FieldError::new(
                "body",
                format!("body is {} bytes long, at most {limit} are allowed", body.len()),
            ));
        }
        Ok(RuleAction::Direct { status, body })
    }
}

/// A status that may be answered.
pub fn http_status(status: u16) -> Checked<StatusCode> {
    let bad = || FieldError::new("", format!("HTTP status {status} is not in the range 200 to 600"));
    if !(200..=600).contains(&status) {
        return Err(bad());
    }
    StatusCode::from_u16(status).map_err(|_| bad())
}

/// `rewrite`.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WireRewrite {
    uri: Option<String>,
    authority: Option<String>,
    uri_regex_rewrite: Option<WireRegexRewrite>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireRegexRewrite {
    r#match: String,
    rewrite: String,
}

impl WireRewrite {
    /// The rewrite, with its expression compiled.
    pub fn check(self) -> Checked<Rewrite> {
        let uri = self.uri.filter(|uri| !uri.is_empty());
        let authority_text = self.authority.filter(|authority| !authority.is_empty());
        let path = match (uri, self.uri_regex_rewrite) {
            (Some(_), Some(_)) => {
                let message = "rewrite may only contain one of uri or uriRegexRewrite";
                return Err(FieldError::new("uriRegexRewrite", message));
            }
            (Some(uri), None) => {
                check_path(&uri).map_err(under("uri"))?;
                Some(PathRewrite::Uri(uri))
            }
            (None, Some(regex)) => Some(regex.check().map_err(under("uriRegexRewrite"))?),
            (None, None) if authority_text.is_none() => {
                return Err(FieldError::new("", "rewrite must specify uri, uriRegexRewrite, or authority"));
            }
            (None, None) => None,
        };
        let authority =
            authority_text.map(|text| authority(&text)).transpose().map_err(under("authority"))?;
        Ok(Rewrite { path, authority })
    }
}

impl WireRegexRewrite {
    fn check(self) -> Checked<PathRewrite> {
        let regex = string_match::anywhere(&self.r#match, "match")?;
        let replacement = replacement(&self.rewrite, &regex).map_err(under("rewrite"))?;
        Ok(PathRewrite::Regex(regex, replacement))
    }
}

/// Turns RE2's `\1` into the `${1}` of the regex crate.
fn replacement(text: &str, regex: &Regex) -> Checked<String> {
    let mut out = String::with_capacity(text.len() + 8);
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '$' => out.push_str("$$"),
            '\\' => match chars.next() {
                Some('\\') => out.push('\\'),
                Some(digit @ '0'..='9') => {
                    if digit.to_digit(10).is_some_and(|group| group as usize >= regex.captures_len()) {
                        let message = format!("\\{digit} names a group that the match does not have");
                        return Err(FieldError::new("", message));
                    }
                    out.extend(["${", digit.encode_utf8(&mut [0; 4]), "}"]);
                }
                _ => {
                    return Err(FieldError::new(
                        "",
                        "a backslash must be followed by a digit or a backslash",
                    ));
                }
            },
            c => out.push(c),
        }
    }
    Ok(out)
}

fn check_path(path: &str) -> Checked<()> {
    let absolute = format!("/{}", path.strip_prefix('/').unwrap_or(path));
    match absolute.parse::<PathAndQuery>() {
        Ok(_) if !path.contains('#') => Ok(()),
        _ => Err(FieldError::new("", format!("{path:?} is not a path of a URI"))),
    }
}
