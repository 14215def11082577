//! Mesh-wide settings: Istio's `MeshConfig`, in the key `mesh` of the `ConfigMap` `mesh`, as a stated subset.
//!
//! Promises that what is accepted says what it means: a field that is not among those below, an authorizer that cannot be
//! asked, a value that means nothing are refused by name. Tested by the tables below; what the settings come to, in
//! `compile/tests/mesh_config.rs`.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use http::{HeaderName, HeaderValue, StatusCode};
use serde::Deserialize;
use serde_json::Value;

use super::{
    ObjectKey, dns_name,
    duration::IstioDuration,
    field::{self, Checked, FieldError, entry, item, under},
    locality::{self, LocalitySetting},
    string_match::header_name,
};
use crate::state::{
    defaults,
    snapshot::{BodyInCheck, CheckProtocol, HttpCheck, PathNormalization, Provider, TextMatch},
};

/// Name of the `ConfigMap`, and its key.
const NAME: &str = "mesh";

/// The settings that are honoured.
#[derive(Debug, Default)]
pub struct MeshConfig {
    /// `rootNamespace`
    pub root_namespace: Option<Arc<str>>,
    /// `trustDomainAliases`
    pub trust_domain_aliases: Vec<Arc<str>>,
    /// `pathNormalization.normalization`
    pub path_normalization: Option<PathNormalization>,
    /// `extensionProviders`: those that authorize. Hosts are as they are written.
    pub providers: Vec<Arc<Provider>>,
    /// `localityLbSetting`
    pub locality: Option<Arc<LocalitySetting>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Wire {
    root_namespace: Option<String>,
    trust_domain_aliases: Option<Vec<String>>,
    path_normalization: Option<WirePath>,
    extension_providers: Option<Vec<WireProvider>>,
    locality_lb_setting: Option<locality::Wire>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WirePath {
    normalization: Option<WireNormalization>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum WireNormalization {
    Default,
    None,
    Base,
    MergeSlashes,
    DecodeAndMergeSlashes,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireProvider {
    name: Option<String>,
    envoy_ext_authz_grpc: Option<WireGrpc>,
    envoy_ext_authz_http: Option<WireHttp>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireGrpc {
    service: Option<String>,
    port: Option<u32>,
    timeout: Option<IstioDuration>,
    fail_open: Option<bool>,
    status_on_error: Option<Value>,
    include_request_body_in_check: Option<WireBody>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireHttp {
    service: Option<String>,
    port: Option<u32>,
    timeout: Option<IstioDuration>,
    fail_open: Option<bool>,
    status_on_error: Option<Value>,
    include_request_body_in_check: Option<WireBody>,
    path_prefix: Option<String>,
    include_request_headers_in_check: Option<Vec<String>>,
    /// The older name of the one before it.
    include_headers_in_check: Option<Vec<String>>,
    include_additional_headers_in_check: Option<BTreeMap<String, String>>,
    headers_to_upstream_on_allow: Option<Vec<String>>,
    headers_to_downstream_on_allow: Option<Vec<String>>,
    headers_to_downstream_on_deny: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireBody {
    max_request_bytes: Option<u32>,
    allow_partial_message: Option<bool>,
    pack_as_bytes: Option<bool>,
}

/// The text of the settings, where this object is the one that has them.
pub fn text<'a>(key: &ObjectKey, object: &'a Value) -> Option<&'a str> {
    (&*key.kind == "ConfigMap" && &*key.name == NAME).then_some(())?;
    object["data"][NAME].as_str()
}

/// Checks the settings, read from their text.
///
/// # Errors
/// Names the field from the root of the settings on.
pub fn check(settings: &Value) -> Checked<MeshConfig> {
    if settings.is_null() {
        return Ok(MeshConfig::default());
    }
    let wire: Wire = field::deserialize(settings)?;
    let domain = |name: &str| dns_name(name).map(|()| name.into());
    let root_namespace = wire.root_namespace.filter(|name| !name.is_empty());
    let root_namespace = root_namespace.map(|name| domain(&name).map_err(under("rootNamespace")));
    let aliases = wire.trust_domain_aliases.unwrap_or_default();
    let aliases = aliases.iter().enumerate();
    let aliases = aliases.map(|(i, name)| domain(name).map_err(item("trustDomainAliases", i)));
    let mut providers: Vec<Arc<Provider>> = Vec::new();
    for (i, written) in wire.extension_providers.unwrap_or_default().into_iter().enumerate() {
        let provider = written.check().map_err(item("extensionProviders", i))?;
        if providers.iter().any(|other| other.name == provider.name) {
            let message = format!("there are two providers named {:?}", provider.name);
            return Err(item("extensionProviders", i)(FieldError::new("name", message)));
        }
        providers.push(Arc::new(provider));
    }
    let locality = wire.locality_lb_setting.map(locality::Wire::check).transpose();
    Ok(MeshConfig {
        locality: locality.map_err(under("localityLbSetting"))?.map(Arc::new),
        root_namespace: root_namespace.transpose()?,
        trust_domain_aliases: aliases.collect::<Checked<_>>()?,
        path_normalization: wire.path_normalization.and_then(|path| path.normalization).map(
            |how| match how {
                WireNormalization::None => PathNormalization::None,
                WireNormalization::Default | WireNormalization::Base => PathNormalization::Base,
                WireNormalization::MergeSlashes => PathNormalization::MergeSlashes,
                WireNormalization::DecodeAndMergeSlashes => PathNormalization::DecodeAndMergeSlashes,
            },
        ),
        providers,
    })
}

impl WireProvider {
    fn check(self) -> Checked<Provider> {
        let name: Arc<str> = match self.name.as_deref() {
            None | Some("") => return Err(FieldError::new("name", "is required")),
            Some(name) => name.into(),
        };
        match (self.envoy_ext_authz_grpc, self.envoy_ext_authz_http) {
            (Some(grpc), None) => grpc.check(name).map_err(under("envoyExtAuthzGrpc")),
            (None, Some(http)) => http.check(name).map_err(under("envoyExtAuthzHttp")),
            _ => Err(FieldError::new("", "needs one of envoyExtAuthzGrpc and envoyExtAuthzHttp")),
        }
    }
}

impl WireGrpc {
    fn check(self, name: Arc<str>) -> Checked<Provider> {
        Ok(Provider {
            name,
            protocol: CheckProtocol::Grpc,
            host: service(self.service.as_deref())?,
            port: port(self.port)?,
            timeout: timeout(self.timeout)?,
            fail_open: self.fail_open.unwrap_or(false),
            status_on_error: status(self.status_on_error.as_ref())?,
            body: body(self.include_request_body_in_check)?,
        })
    }
}

impl WireHttp {
    fn check(self, name: Arc<str>) -> Checked<Provider> {
        let both = [self.include_headers_in_check, self.include_request_headers_in_check];
        let [older, newer] = both;
        let (field, wanted) = match (older, newer) {
            (Some(_), Some(_)) => {
                let message = "is an older name of includeRequestHeadersInCheck, which is there too";
                return Err(FieldError::new("includeHeadersInCheck", message));
            }
            (Some(older), None) => ("includeHeadersInCheck", Some(older)),
            (None, newer) => ("includeRequestHeadersInCheck", newer),
        };
        let check = HttpCheck {
            path_prefix: path_prefix(self.path_prefix)?,
            request_headers: names(field, wanted)?,
            added_headers: added(self.include_additional_headers_in_check)?,
            upstream_on_allow: names("headersToUpstreamOnAllow", self.headers_to_upstream_on_allow)?,
            downstream_on_allow: names("headersToDownstreamOnAllow", self.headers_to_downstream_on_allow)?,
            downstream_on_deny: names("headersToDownstreamOnDeny", self.headers_to_downstream_on_deny)?,
        };
        Ok(Provider {
            name,
            protocol: CheckProtocol::Http(Box::new(check)),
            host: service(self.service.as_deref())?,
            port: port(self.port)?,
            timeout: timeout(self.timeout)?,
            fail_open: self.fail_open.unwrap_or(false),
            status_on_error: status(self.status_on_error.as_ref())?,
            body: body(self.include_request_body_in_check)?,
        })
    }
}

/// `[NAMESPACE/]HOST`: the namespace is for hosts that several have, which Services' are not.
fn service(written: Option<&str>) -> Checked<Arc<str>> {
    let written = written.unwrap_or_default();
    let host = written.split_once('/').map_or(written, |(_, host)| host);
    if host.is_empty() {
        return Err(FieldError::new("service", "is required"));
    }
    let host = host.to_ascii_lowercase();
    dns_name(&host).map_err(under("service"))?;
    Ok(host.into())
}

fn port(written: Option<u32>) -> Checked<u16> {
    let port = written.and_then(|port| u16::try_from(port).ok()).filter(|port| *port > 0);
    port.ok_or_else(|| FieldError::new("port", "is required: the port of the service, 1 to 65535"))
}

fn timeout(written: Option<IstioDuration>) -> Checked<Duration> {
    written.map_or(Ok(defaults::CHECK_TIMEOUT), |written| written.at_least_a_millisecond("timeout"))
}

/// Istio writes it as a text; a number is meant the same.
fn status(written: Option<&Value>) -> Checked<StatusCode> {
    let number = match written {
        None | Some(Value::Null) => return Ok(defaults::CHECK_STATUS),
        Some(Value::String(text)) if text.is_empty() => return Ok(defaults::CHECK_STATUS),
        Some(Value::String(text)) => text.parse().ok(),
        Some(other) => other.as_u64().and_then(|number| u16::try_from(number).ok()),
    };
    let status = number.filter(|number| (200..=599).contains(number));
    let status = status.and_then(|number| StatusCode::from_u16(number).ok());
    status.ok_or_else(|| FieldError::new("statusOnError", "is not an HTTP status"))
}

fn body(written: Option<WireBody>) -> Checked<Option<BodyInCheck>> {
    let Some(written) = written else { return Ok(None) };
    let most = written.max_request_bytes.unwrap_or_default() as usize;
    if most == 0 || most > defaults::MOST_CHECKED_BODY {
        let most = defaults::MOST_CHECKED_BODY;
        let message = format!("must be 1 to {most}: so much the agent holds of each request");
        return Err(FieldError::new("includeRequestBodyInCheck.maxRequestBytes", message));
    }
    let partial = written.allow_partial_message.unwrap_or(false);
    Ok(Some(BodyInCheck { most, partial, raw: written.pack_as_bytes.unwrap_or(false) }))
}

fn path_prefix(written: Option<String>) -> Checked<Box<str>> {
    let prefix = written.unwrap_or_default();
    let bad = prefix.contains(['?', '#']) || prefix.parse::<http::uri::PathAndQuery>().is_err();
    if !prefix.is_empty() && (!prefix.starts_with('/') || bad) {
        return Err(FieldError::new("pathPrefix", format!("{prefix:?} is not the beginning of a path")));
    }
    Ok(prefix.into())
}

/// Names of headers: whole, their beginning (`x-*`) or their end (`*-id`).
fn names(field: &str, written: Option<Vec<String>>) -> Checked<Box<[TextMatch]>> {
    let read = |(i, name): (usize, &String)| {
        let name = name.to_ascii_lowercase();
        let bad = || {
            let message = format!("{name:?} is not the name of a header, with a * at one end of it at most");
            item(field, i)(FieldError::new("", message))
        };
        let part = name.trim_start_matches('*').trim_end_matches('*');
        part.parse::<HeaderName>().map_err(|_| bad())?;
        TextMatch::parse(&name).ok_or_else(bad)
    };
    written.unwrap_or_default().iter().enumerate().map(read).collect()
}

fn added(written: Option<BTreeMap<String, String>>) -> Checked<Box<[(HeaderName, HeaderValue)]>> {
    let read = |(name, value): (&String, &String)| {
        let at = || entry("includeAdditionalHeadersInCheck", name);
        let value = HeaderValue::from_str(value).map_err(|_| at()(FieldError::new("", "is no header value")));
        Ok((header_name(name).map_err(at())?, value?))
    };
    written.unwrap_or_default().iter().map(read).collect()
}

#[cfg(test)]
#[path = "mesh_config_tests.rs"]
mod tests;
