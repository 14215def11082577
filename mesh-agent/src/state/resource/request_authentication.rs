//! Istio's `RequestAuthentication`, checked.
//!
//! Promises that a rule which is accepted can be used: its issuer is named, its keys are given or can be fetched, and
//! every header that it names is one. Tested by the table below; what tokens come to, in `policy/jwt`.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use http::{HeaderName, Uri};
use serde::Deserialize;

use super::{
    ObjectKey,
    authorization_policy::{Scope, WireSelector, WireTarget, scope},
    duration::IstioDuration,
    field::{Checked, FieldError, NotYet, item, under},
    headers::FRAMING,
    string_match::header_name,
};
use crate::state::snapshot::{ClaimPath, KeySet, Keys, Location, RemoteKeys, TokenRule};

/// Claims that are lists of words whether or not a rule says so (Istio).
const SPACED: [&str; 2] = ["scope", "permission"];

/// The parameter that has the token where a rule names no place (RFC 6750 section 2.3).
const ACCESS_TOKEN: &str = "access_token";

/// How long fetching a key set may take where `timeout` does not say (Istio).
const TIMEOUT: Duration = Duration::from_secs(5);

/// A `RequestAuthentication`.
#[derive(Debug)]
pub struct RequestAuthentication {
    /// `NAMESPACE/NAME`
    pub name: Arc<str>,
    /// Which workloads it is about.
    pub scope: Scope,
    /// `jwtRules`
    pub rules: Arc<[TokenRule]>,
    /// Parts of `targetRefs` that are passed over, and why.
    pub passed_over: Vec<FieldError>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Wire {
    /// Pods of its namespace that it is for; none: all. In the root namespace: of the whole mesh.
    selector: Option<WireSelector>,
    /// Deprecated in favour of `targetRefs`.
    target_ref: Option<WireTarget>,
    /// Services or gateways that it is for, in place of a selector.
    target_refs: Option<Vec<WireTarget>>,
    /// Tokens that are taken; one that is bad by all that look where it is has its request refused.
    jwt_rules: Option<Vec<WireRule>>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireRule {
    /// Who has to have issued the token (`iss`).
    issuer: Option<String>,
    /// One of these has to be among those it is for (`aud`).
    audiences: Option<Vec<String>>,
    /// Where the keys are fetched that it has to be signed with.
    #[serde(alias = "jwks_uri")]
    jwks_uri: Option<String>,
    /// Those keys themselves.
    jwks: Option<String>,
    /// Headers that have it; `Authorization: Bearer` by default.
    from_headers: Option<Vec<WireHeader>>,
    /// Query parameters that have it.
    from_params: Option<Vec<String>>,
    /// Cookies that have it.
    from_cookies: Option<Vec<String>>,
    /// Header that tells the app its payload, in base64.
    output_payload_to_header: Option<String>,
    /// Headers that tell the app single claims.
    output_claim_to_headers: Option<Vec<WireClaim>>,
    /// Whether the app is given the token itself.
    forward_original_token: Option<bool>,
    /// Time for fetching the keys.
    timeout: Option<IstioDuration>,
    /// Claims whose text is a list of words.
    space_delimited_claims: Option<Vec<String>>,
    #[expect(dead_code, reason = "naming it is an error")]
    presence: Option<NotYet>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireHeader {
    name: String,
    prefix: Option<String>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireClaim {
    header: String,
    claim: String,
}

/// What its `spec` may be, for its resource definition.
#[cfg(test)]
pub(super) fn schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
    generator.subschema_for::<Wire>()
}

/// Checks the `spec` of a `RequestAuthentication`.
pub(super) fn check(key: &ObjectKey, spec: &serde_json::Value) -> Checked<RequestAuthentication> {
    let nothing = serde_json::Value::Object(serde_json::Map::new());
    let spec = if spec.is_null() { &nothing } else { spec };
    let Wire { selector, target_ref, target_refs, jwt_rules } = super::field::deserialize(spec)?;
    let (scope, passed_over) = scope(&key.namespace, selector, target_ref, target_refs)?;
    let rules = jwt_rules.unwrap_or_default().into_iter().enumerate();
    let rules = rules.map(|(i, rule)| rule.check().map_err(item("jwtRules", i))).collect::<Checked<_>>()?;
    let name = format!("{}/{}", key.namespace, key.name).into();
    Ok(RequestAuthentication { name, scope, rules, passed_over })
}

impl WireRule {
    fn check(self) -> Checked<TokenRule> {
        let issuer = self.issuer.filter(|issuer| !issuer.is_empty());
        let issuer = issuer.ok_or_else(|| FieldError::new("issuer", "is required"))?;
        let timeout =
            self.timeout.map_or(Ok(TIMEOUT), |timeout| timeout.at_least_a_millisecond("timeout"))?;
        let keys = keys(self.jwks.as_deref(), self.jwks_uri.as_deref(), timeout)?;
        let mut locations = Vec::new();
        for (i, header) in self.from_headers.unwrap_or_default().into_iter().enumerate() {
            locations.push(header.check().map_err(item("fromHeaders", i))?);
        }
        let params = names("fromParams", self.from_params)?;
        locations.extend(params.into_iter().map(Location::Param));
        for (i, name) in names("fromCookies", self.from_cookies)?.into_iter().enumerate() {
            // RFC 6265 section 4.1.1: the name of a cookie is a token, as that of a header is.
            header_name(&name)
                .map_err(|_| FieldError::new("", format!("{name:?} is not the name of a cookie")))
                .map_err(item("fromCookies", i))?;
            locations.push(Location::Cookie(name));
        }
        if locations.is_empty() {
            locations = vec![Location::Bearer, Location::Param(ACCESS_TOKEN.into())];
        }
        let payload_to = self.output_payload_to_header.filter(|name| !name.is_empty());
        let payload_to = payload_to.map(|name| output(&name)).transpose();
        let mut claims_to = Vec::new();
        for (i, one) in self.output_claim_to_headers.unwrap_or_default().iter().enumerate() {
            claims_to.push(one.check().map_err(item("outputClaimToHeaders", i))?);
        }
        let mut spaced: BTreeSet<Box<str>> = SPACED.into_iter().map(Box::from).collect();
        spaced.extend(names("spaceDelimitedClaims", self.space_delimited_claims)?);
        Ok(TokenRule {
            issuer: issuer.into(),
            audiences: names("audiences", self.audiences)?.into(),
            keys,
            locations: locations.into(),
            forward: self.forward_original_token.unwrap_or(false),
            payload_to: payload_to.map_err(under("outputPayloadToHeader"))?,
            claims_to: claims_to.into(),
            spaced: spaced.into_iter().collect(),
        })
    }
}

fn keys(inline: Option<&str>, uri: Option<&str>, timeout: Duration) -> Checked<Keys> {
    match (inline.filter(|text| !text.is_empty()), uri.filter(|uri| !uri.is_empty())) {
        (Some(_), Some(_)) => Err(FieldError::new("jwks", "only one of jwks and jwksUri may be given")),
        (Some(text), None) => match KeySet::parse(text) {
            Ok(keys) => Ok(Keys::Inline(Arc::new(keys))),
            Err(why) => Err(FieldError::new("jwks", why)),
        },
        (None, Some(uri)) => {
            check_uri(uri).map_err(|why| FieldError::new("jwksUri", format!("{uri:?} {why}")))?;
            Ok(Keys::Remote(Arc::new(RemoteKeys::new(uri, timeout))))
        }
        (None, None) => Err(FieldError::new(
            "jwksUri",
            "one of jwks and jwksUri is required: keys are not looked for at the issuer (OpenID Connect Discovery)",
        )),
    }
}

fn check_uri(text: &str) -> Result<(), &'static str> {
    let uri: Uri = text.parse().map_err(|_| "is not a URI")?;
    if !matches!(uri.scheme_str(), Some("http" | "https")) {
        return Err("is not an http or https URI");
    }
    let authority = uri.authority().filter(|authority| !authority.host().is_empty());
    match authority {
        None => Err("names no host"),
        Some(authority) if authority.as_str().contains('@') => Err("has a user in it"),
        Some(_) => Ok(()),
    }
}

impl WireHeader {
    fn check(self) -> Checked<Location> {
        let name = header_name(&self.name).map_err(under("name"))?;
        let prefix = self.prefix.unwrap_or_default();
        let default = name == http::header::AUTHORIZATION && prefix == "Bearer ";
        Ok(if default { Location::Bearer } else { Location::Header(name, prefix.into()) })
    }
}

impl WireClaim {
    fn check(&self) -> Checked<(HeaderName, ClaimPath)> {
        let header = output(&self.header).map_err(under("header"))?;
        // A claim within a claim is written with a dot (Envoy).
        let path: ClaimPath = self.claim.split('.').map(Box::from).collect();
        if path.iter().any(|name| name.is_empty()) {
            return Err(FieldError::new(
                "claim",
                format!("{:?} is not a claim: NAME or NAME.NAME", self.claim),
            ));
        }
        Ok((header, path))
    }
}

/// A header that a rule may write: not one that says where the request goes, or where it ends.
fn output(name: &str) -> Checked<HeaderName> {
    let header = header_name(name)?;
    if header == http::header::HOST || FRAMING.contains(&header) {
        return Err(FieldError::new("", format!("{header} cannot be set: it frames or directs the request")));
    }
    Ok(header)
}

fn names(field: &str, written: Option<Vec<String>>) -> Checked<Vec<Box<str>>> {
    let read = |(i, name): (usize, String)| match &*name {
        "" => Err(item(field, i)(FieldError::new("", "a value may not be empty"))),
        name => Ok(name.into()),
    };
    written.unwrap_or_default().into_iter().enumerate().map(read).collect()
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use serde_json::{Value, json};

    use super::*;

    const KEYS: &str =
        r#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc"}]}"#;

    fn read(spec: &Value) -> Checked<RequestAuthentication> {
        check(&ObjectKey::new("RequestAuthentication", "app", "tokens"), spec)
    }

    /// A rule that is good but for these fields.
    fn rule(fields: Value) -> Value {
        let mut rule = json!({"issuer": "https://issuer", "jwks": KEYS});
        let Value::Object(fields) = fields else { panic!("fields") };
        for (name, value) in fields {
            rule[name] = value;
        }
        json!({ "jwtRules": [rule] })
    }

    #[test]
    fn what_cannot_be_used_is_refused_by_name() {
        for (spec, field, message) in [
            (json!({"jwtRule": []}), "jwtRule", "unknown field"),
            (json!({"selector": {"matchLabels": {"": "a"}}}), "selector.matchLabels.", "needs a name"),
            (
                json!({"selector": {}, "targetRefs": [{"kind": "Service", "name": "a"}]}),
                "targetRefs",
                "only one of selector and targetRefs",
            ),
            (
                json!({"targetRefs": [{"kind": "Pod", "name": "a"}]}),
                "targetRefs[0].kind",
                "only a Service is",
            ),
            (rule(json!({"issuer": null})), "jwtRules[0].issuer", "is required"),
            (rule(json!({"issuer": ""})), "jwtRules[0].issuer", "is required"),
            (rule(json!({"isuer": "a"})), "jwtRules[0].isuer", "unknown field"),
            (rule(json!({"audiences": ["a", ""]})), "jwtRules[0].audiences[1]", "may not be empty"),
            (rule(json!({"jwks": null})), "jwtRules[0].jwksUri", "one of jwks and jwksUri is required"),
            (rule(json!({"jwks": "{"})), "jwtRules[0].jwks", "is not a JSON Web Key Set"),
            (rule(json!({"jwks": {"keys": []}})), "jwtRules[0].jwks", "expected a string"),
            (
                rule(json!({"jwks": r#"{"keys":[{"kty":"oct","k":"AAAA"}]}"#})),
                "jwtRules[0].jwks",
                "is a secret",
            ),
            (rule(json!({"jwksUri": "https://a/"})), "jwtRules[0].jwks", "only one of jwks and jwksUri"),
            (rule(json!({"jwks": "", "jwksUri": "a b"})), "jwtRules[0].jwksUri", "is not a URI"),
            (rule(json!({"jwks": "", "jwksUri": "file:///etc"})), "jwtRules[0].jwksUri", "is not a"),
            (rule(json!({"jwks": "", "jwksUri": "ftp://a/"})), "jwtRules[0].jwksUri", "not an http or https"),
            (rule(json!({"jwks": "", "jwksUri": "/keys"})), "jwtRules[0].jwksUri", "not an http or https"),
            (rule(json!({"jwks": "", "jwksUri": "https://u:p@a/"})), "jwtRules[0].jwksUri", "has a user"),
            (rule(json!({"timeout": "0s"})), "jwtRules[0].timeout", "greater than 1ms"),
            (rule(json!({"timeout": 5})), "jwtRules[0].timeout", "expected a string"),
            (rule(json!({"fromHeaders": [{"prefix": "a"}]})), "jwtRules[0].fromHeaders[0]", "missing field"),
            (
                rule(json!({"fromHeaders": [{"name": "a b"}]})),
                "jwtRules[0].fromHeaders[0].name",
                "not a valid header name",
            ),
            (rule(json!({"fromParams": [""]})), "jwtRules[0].fromParams[0]", "may not be empty"),
            (rule(json!({"fromCookies": [""]})), "jwtRules[0].fromCookies[0]", "may not be empty"),
            (rule(json!({"fromCookies": ["a;b"]})), "jwtRules[0].fromCookies[0]", "name of a cookie"),
            (
                rule(json!({"outputPayloadToHeader": "a b"})),
                "jwtRules[0].outputPayloadToHeader",
                "not a valid header name",
            ),
            (
                rule(json!({"outputPayloadToHeader": "host"})),
                "jwtRules[0].outputPayloadToHeader",
                "cannot be set",
            ),
            (
                rule(json!({"outputClaimToHeaders": [{"header": "transfer-encoding", "claim": "a"}]})),
                "jwtRules[0].outputClaimToHeaders[0].header",
                "cannot be set",
            ),
            (
                rule(json!({"outputClaimToHeaders": [{"header": "x-a", "claim": "a..b"}]})),
                "jwtRules[0].outputClaimToHeaders[0].claim",
                "is not a claim",
            ),
            (
                rule(json!({"outputClaimToHeaders": [{"header": "x-a", "claim": ""}]})),
                "jwtRules[0].outputClaimToHeaders[0].claim",
                "is not a claim",
            ),
            (rule(json!({"presence": "REQUIRED"})), "jwtRules[0].presence", "not supported yet"),
        ] {
            let error = read(&spec).map(|_| ()).unwrap_err();
            assert_eq!(error.field, field, "{spec}: {}", error.message);
            assert!(error.message.contains(message), "{spec}: {}", error.message);
        }
    }

    #[test]
    fn fields_and_defaults_are_read() {
        let all = read(&rule(json!({
            "audiences": ["a"],
            "fromHeaders": [{"name": "X-Token", "prefix": "t "}],
            "fromParams": ["p"],
            "fromCookies": ["c"],
            "outputPayloadToHeader": "x-payload",
            "outputClaimToHeaders": [{"header": "x-sub", "claim": "sub"}, {"header": "x-b", "claim": "a.b"}],
            "forwardOriginalToken": true,
            "spaceDelimitedClaims": ["roles"],
        })));
        let all = all.unwrap();
        let rule_of_all = &all.rules[0];
        let header = Location::Header(HeaderName::from_static("x-token"), "t ".into());
        assert_eq!(
            *rule_of_all.locations,
            [header, Location::Param("p".into()), Location::Cookie("c".into())]
        );
        assert!(rule_of_all.forward);
        assert_eq!(rule_of_all.payload_to, Some(HeaderName::from_static("x-payload")));
        let nested: (HeaderName, ClaimPath) =
            (HeaderName::from_static("x-b"), Box::new(["a".into(), "b".into()]));
        assert_eq!(rule_of_all.claims_to[1], nested);
        let spaced: Vec<&str> = rule_of_all.spaced.iter().map(|name| &**name).collect();
        assert_eq!(spaced, ["permission", "roles", "scope"]);

        for name in ["jwksUri", "jwks_uri"] {
            let least = read(&rule(json!({"jwks": null, name: "https://issuer:8443/keys", "timeout": "2s"})));
            let least = least.unwrap();
            let rule = &least.rules[0];
            assert_eq!(*rule.locations, [Location::Bearer, Location::Param("access_token".into())]);
            assert!(!rule.forward && rule.payload_to.is_none() && rule.keys.get().is_none());
            let Keys::Remote(keys) = &rule.keys else { panic!("{:?}", rule.keys) };
            assert_eq!((&*keys.uri, keys.timeout), ("https://issuer:8443/keys", Duration::from_secs(2)));
        }
        for nothing in [Value::Null, json!({}), json!({"jwtRules": []})] {
            assert_eq!(read(&nothing).unwrap().rules.len(), 0);
        }
    }
}
