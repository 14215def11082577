//! `loadBalancer` of a `DestinationRule`: `simple`, or `consistentHash`.
//!
//! Fields that Istio has and this version does not honour are refused by name. Tested by the tables below.

use std::{sync::Arc, time::Duration};

use serde::Deserialize;

use super::{
    duration::IstioDuration,
    field::{Checked, FieldError, NotYet, item, under},
    string_match::header_name,
};
use crate::state::{
    defaults,
    snapshot::{Balancing, HashCookie, HashKey, HashTable},
};

/// How endpoints are chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Balancer {
    /// `simple`.
    Simple(Balancing),
    /// `consistentHash`: what requests are told apart by, and the table.
    Hash(Arc<HashKey>, HashTable),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Wire {
    simple: Option<Simple>,
    consistent_hash: Option<WireHash>,
    #[serde(rename = "localityLbSetting")]
    _locality_lb_setting: Option<NotYet>,
    #[serde(rename = "zoneAwareLbSetting")]
    _zone_aware_lb_setting: Option<NotYet>,
    #[serde(rename = "warmup")]
    _warmup: Option<NotYet>,
    #[serde(rename = "warmupDurationSecs")]
    _warmup_duration_secs: Option<NotYet>,
    #[serde(rename = "backendUtilization")]
    _backend_utilization: Option<NotYet>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum Simple {
    Unspecified,
    LeastRequest,
    LeastConn,
    RoundRobin,
    Random,
    Passthrough,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireHash {
    http_header_name: Option<String>,
    http_cookie: Option<WireCookie>,
    use_source_ip: Option<bool>,
    http_query_parameter_name: Option<String>,
    ring_hash: Option<WireRing>,
    maglev: Option<WireMaglev>,
    /// Deprecated in favour of `ringHash.minimumRingSize`.
    minimum_ring_size: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireRing {
    minimum_ring_size: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireMaglev {
    table_size: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireCookie {
    name: String,
    path: Option<String>,
    ttl: Option<IstioDuration>,
    #[serde(default)]
    attributes: Vec<WireAttribute>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireAttribute {
    name: String,
    value: Option<String>,
}

impl Wire {
    pub(super) fn check(self) -> Checked<Balancer> {
        let simple = match (self.simple, self.consistent_hash) {
            (Some(_), Some(_)) => {
                return Err(FieldError::new("", "only one of simple and consistentHash may be set"));
            }
            (None, Some(hash)) => return hash.check().map_err(under("consistentHash")),
            (simple, None) => simple,
        };
        Ok(Balancer::Simple(match simple {
            None | Some(Simple::Unspecified) => Balancing::default(),
            Some(Simple::LeastRequest | Simple::LeastConn) => Balancing::LeastRequest,
            Some(Simple::RoundRobin) => Balancing::RoundRobin,
            Some(Simple::Random) => Balancing::Random,
            Some(Simple::Passthrough) => {
                return Err(FieldError::new("simple", "PASSTHROUGH is not supported yet"));
            }
        }))
    }
}

impl WireHash {
    fn check(self) -> Checked<Balancer> {
        let table = self.table()?;
        let keys = [
            self.http_header_name.map(|name| header(&name)),
            self.http_cookie.map(|cookie| cookie.check().map(HashKey::Cookie).map_err(under("httpCookie"))),
            self.use_source_ip.filter(|used| *used).map(|_| Ok(HashKey::SourceIp)),
            self.http_query_parameter_name.map(query),
        ];
        let mut keys = keys.into_iter().flatten();
        let (Some(key), None) = (keys.next(), keys.next()) else {
            let message = "exactly one of httpHeaderName, httpCookie, useSourceIp: true and httpQueryParameterName must be set";
            return Err(FieldError::new("", message));
        };
        Ok(Balancer::Hash(Arc::new(key?), table))
    }

    fn table(&self) -> Checked<HashTable> {
        match (&self.ring_hash, &self.maglev) {
            (Some(_), Some(_)) => Err(FieldError::new("", "only one of ringHash and maglev may be set")),
            (None, Some(maglev)) => maglev.check().map_err(under("maglev")),
            (ring, None) => {
                let (size, field) = match ring.as_ref().and_then(|ring| ring.minimum_ring_size) {
                    Some(size) => (Some(size), "ringHash.minimumRingSize"),
                    None => (self.minimum_ring_size, "minimumRingSize"),
                };
                let size = size.unwrap_or(u64::from(defaults::RING_SIZE));
                let size = u32::try_from(size).ok().filter(|size| *size <= defaults::LARGEST_RING);
                let most = defaults::LARGEST_RING;
                let size = size.ok_or_else(|| FieldError::new(field, format!("must be at most {most}")))?;
                Ok(HashTable::Ring(size))
            }
        }
    }
}

impl WireMaglev {
    fn check(&self) -> Checked<HashTable> {
        let Some(size) = self.table_size else { return Ok(HashTable::Maglev(defaults::MAGLEV_SIZE)) };
        let size =
            u32::try_from(size).ok().filter(|size| *size <= defaults::LARGEST_MAGLEV && is_prime(*size));
        let message = || format!("must be a prime, at most {}", defaults::LARGEST_MAGLEV);
        Ok(HashTable::Maglev(size.ok_or_else(|| FieldError::new("tableSize", message()))?))
    }
}

fn is_prime(number: u32) -> bool {
    let divisors = (2..).take_while(|divisor| divisor * divisor <= number);
    number >= 2 && divisors.into_iter().all(|divisor| !number.is_multiple_of(divisor))
}

fn header(name: &str) -> Checked<HashKey> {
    header_name(name).map(HashKey::Header).map_err(under("httpHeaderName"))
}

fn query(name: String) -> Checked<HashKey> {
    if name.is_empty() {
        return Err(FieldError::new("httpQueryParameterName", "may not be empty"));
    }
    Ok(HashKey::Query(name.into()))
}

impl WireCookie {
    fn check(self) -> Checked<HashCookie> {
        if self.name.is_empty() || !self.name.bytes().all(is_token) {
            return Err(FieldError::new("name", "is not the name of a cookie (RFC 6265 section 4.1.1)"));
        }
        if self.path.as_deref().is_some_and(|path| !is_value(path)) {
            return Err(FieldError::new("path", "may have no control characters and no semicolon"));
        }
        let attributes = self.attributes.iter().enumerate();
        let attributes = attributes.map(|(i, attribute)| attribute.check().map_err(item("attributes", i)));
        Ok(HashCookie {
            name: self.name.into(),
            path: self.path.map(Into::into),
            ttl: self.ttl.map(|ttl| Duration::from_secs(ttl.0.as_secs())),
            attributes: attributes.collect::<Checked<_>>()?,
        })
    }
}

impl WireAttribute {
    fn check(&self) -> Checked<String> {
        if self.name.is_empty() || !self.name.bytes().all(is_token) {
            return Err(FieldError::new("name", "is not the name of an attribute"));
        }
        match &self.value {
            None => Ok(self.name.clone()),
            Some(value) if is_value(value) => Ok(format!("{}={value}", self.name)),
            Some(_) => Err(FieldError::new("value", "may have no control characters and no semicolon")),
        }
    }
}

/// `token` of RFC 9110 section 5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// What stands in an attribute of a cookie.
fn is_value(text: &str) -> bool {
    text.bytes().all(|byte| (b' '..=b'~').contains(&byte) && byte != b';')
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(value: &Value) -> Checked<Balancer> {
        crate::state::resource::field::deserialize::<Wire>(value)?.check()
    }

    fn hash(value: &Value) -> Checked<Balancer> {
        read(&json!({ "consistentHash": value }))
    }

    #[test]
    fn simple_balancers_are_read() {
        let table = [
            ("LEAST_REQUEST", Balancing::LeastRequest),
            ("LEAST_CONN", Balancing::LeastRequest),
            ("UNSPECIFIED", Balancing::LeastRequest),
            ("ROUND_ROBIN", Balancing::RoundRobin),
            ("RANDOM", Balancing::Random),
        ];
        for (simple, balancing) in table {
            assert_eq!(read(&json!({ "simple": simple })), Ok(Balancer::Simple(balancing)), "{simple}");
        }
    }

    #[test]
    fn hashes_are_read() {
        let (ring, maglev) = (HashTable::Ring(1024), HashTable::Maglev(65_537));
        let header = HashKey::Header(http::HeaderName::from_static("x-user"));
        let cookie = |path: Option<&str>, ttl, attributes: &[&str]| {
            HashKey::Cookie(HashCookie {
                name: "user".into(),
                path: path.map(Into::into),
                ttl,
                attributes: attributes.iter().map(ToString::to_string).collect(),
            })
        };
        let table = [
            (json!({"httpHeaderName": "X-User"}), header, ring),
            (json!({"useSourceIp": true, "maglev": {}}), HashKey::SourceIp, maglev),
            (
                json!({"httpQueryParameterName": "id", "maglev": {"tableSize": 7}}),
                HashKey::Query("id".into()),
                HashTable::Maglev(7),
            ),
            (
                json!({"useSourceIp": true, "ringHash": {"minimumRingSize": 9}, "minimumRingSize": 8}),
                HashKey::SourceIp,
                HashTable::Ring(9),
            ),
            (json!({"useSourceIp": true, "minimumRingSize": 8}), HashKey::SourceIp, HashTable::Ring(8)),
            (json!({"httpCookie": {"name": "user"}, "ringHash": {}}), cookie(None, None, &[]), ring),
            (
                json!({"httpCookie": {"name": "user", "path": "/a", "ttl": "0s",
                    "attributes": [{"name": "SameSite", "value": "Strict"}, {"name": "Secure"}]}}),
                cookie(Some("/a"), Some(Duration::ZERO), &["SameSite=Strict", "Secure"]),
                ring,
            ),
        ];
        for (written, key, table) in table {
            assert_eq!(hash(&written).unwrap(), Balancer::Hash(Arc::new(key), table), "{written}");
        }
    }

    #[test]
    fn bad_balancers_name_their_field() {
        let cookie = |rest: Value| {
            let mut cookie = json!({"name": "user"});
            cookie.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
            json!({"consistentHash": {"httpCookie": cookie}})
        };
        let table = [
            (json!({"simple": "PASSTHROUGH"}), "simple", "not supported yet"),
            (json!({"simple": "BEST"}), "simple", "unknown variant"),
            (json!({"warmup": {}}), "warmup", "not supported yet"),
            (json!({"simple": "RANDOM", "consistentHash": {"useSourceIp": true}}), "", "only one of"),
            (json!({"consistentHash": {}}), "consistentHash", "exactly one of"),
            (json!({"consistentHash": {"useSourceIp": false}}), "consistentHash", "exactly one of"),
            (
                json!({"consistentHash": {"useSourceIp": true, "httpHeaderName": "a"}}),
                "consistentHash",
                "exactly one of",
            ),
            (json!({"consistentHash": {"httpHeaderName": "a b"}}), "consistentHash.httpHeaderName", "header"),
            (
                json!({"consistentHash": {"httpQueryParameterName": ""}}),
                "consistentHash.httpQueryParameterName",
                "empty",
            ),
            (
                json!({"consistentHash": {"useSourceIp": true, "ringHash": {}, "maglev": {}}}),
                "consistentHash",
                "only one of",
            ),
            (
                json!({"consistentHash": {"useSourceIp": true, "maglev": {"tableSize": 8}}}),
                "consistentHash.maglev.tableSize",
                "prime",
            ),
            (
                json!({"consistentHash": {"useSourceIp": true, "ringHash": {"minimumRingSize": 9_000_000}}}),
                "consistentHash.ringHash.minimumRingSize",
                "at most",
            ),
            (cookie(json!({"name": "a;b"})), "consistentHash.httpCookie.name", "not the name"),
            (cookie(json!({"path": "/a;b"})), "consistentHash.httpCookie.path", "semicolon"),
            (cookie(json!({"ttl": "soon"})), "consistentHash.httpCookie.ttl", "not a duration"),
            (
                cookie(json!({"attributes": [{"name": "a", "value": "b\r\n"}]})),
                "consistentHash.httpCookie.attributes[0].value",
                "control",
            ),
        ];
        for (written, field, message) in table {
            let error = read(&written).unwrap_err();
            assert_eq!(error.field, field, "{written}");
            assert!(error.message.contains(message), "{written}: {}", error.message);
        }
    }

    #[test]
    fn primes_are_told() {
        assert!([2, 3, 5, 7, 65_537, 5_000_011].into_iter().all(is_prime));
        assert!([0, 1, 4, 9, 65_536, 5_000_000].into_iter().all(|number| !is_prime(number)));
    }
}
