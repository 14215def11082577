//! `loadBalancer` of a `DestinationRule`: `simple` or `consistentHash`, by locality, and how endpoints warm up.
//!
//! Fields that Istio has and this version does not honour are refused by name. Tested by the tables below.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use serde::Deserialize;

use super::{
    duration::IstioDuration,
    field::{Checked, FieldError, item, under},
    locality::{self, LocalitySetting},
    string_match::header_name,
    utilization,
};
use crate::state::{
    defaults,
    snapshot::{Balancing, HashCookie, HashKey, HashTable, UtilizationRule, Warmup},
};

/// How endpoints are chosen.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Balancer {
    /// `simple` or `consistentHash`; `None` where it says neither, or `UNSPECIFIED`.
    pub choice: Option<Choice>,
    /// `localityLbSetting`, or `zoneAwareLbSetting`.
    pub locality: Option<Arc<LocalitySetting>>,
    /// `warmup`, or the older `warmupDurationSecs`.
    pub warmup: Option<Warmup>,
    /// `backendUtilization`.
    pub utilization: Option<Arc<UtilizationRule>>,
}

/// Whom the choice falls on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// `simple`.
    Simple(Balancing),
    /// `consistentHash`: what requests are told apart by, and the table.
    Hash(Arc<HashKey>, HashTable),
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Wire {
    simple: Option<Simple>,
    consistent_hash: Option<WireHash>,
    locality_lb_setting: Option<locality::Wire>,
    zone_aware_lb_setting: Option<locality::WireZones>,
    warmup: Option<WireWarmup>,
    /// Deprecated in favour of `warmup.duration`.
    warmup_duration_secs: Option<IstioDuration>,
    /// Shares by load reports in responses (ORCA).
    backend_utilization: Option<utilization::Wire>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireWarmup {
    duration: Option<IstioDuration>,
    minimum_percent: Option<f64>,
    aggression: Option<f64>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
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
#[cfg_attr(test, derive(schemars::JsonSchema))]
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
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireRing {
    minimum_ring_size: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireMaglev {
    table_size: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireCookie {
    name: String,
    path: Option<String>,
    ttl: Option<IstioDuration>,
    #[serde(default)]
    attributes: Vec<WireAttribute>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireAttribute {
    name: String,
    value: Option<String>,
}

/// Annotation of a Service or a `DestinationRule` for what `simple` has no word for.
pub const ANNOTATION: &str = "mesh.io/load-balancer";

/// Whether these annotations ask for endpoints by their latency (`PEAK_EWMA`).
pub fn by_latency(annotations: &BTreeMap<String, String>) -> Checked<bool> {
    match annotations.get(ANNOTATION).map(String::as_str) {
        None => Ok(false),
        Some("PEAK_EWMA") => Ok(true),
        Some(other) => {
            let message = format!(
                "{other:?} is not PEAK_EWMA; all others are loadBalancer.simple of a DestinationRule"
            );
            Err(FieldError::new(format!("annotations.{ANNOTATION}"), message))
        }
    }
}

impl Wire {
    pub(super) fn check(self) -> Checked<Balancer> {
        let utilization = self.backend_utilization.map(utilization::Wire::check).transpose();
        let utilization = utilization.map_err(under("backendUtilization"))?.map(Arc::new);
        if utilization.is_some() && (self.simple.is_some() || self.consistent_hash.is_some()) {
            let message = "only one of simple, consistentHash and backendUtilization may be set";
            return Err(FieldError::new("backendUtilization", message));
        }
        let choice = match (self.simple, self.consistent_hash) {
            (Some(_), Some(_)) => {
                return Err(FieldError::new("", "only one of simple and consistentHash may be set"));
            }
            (None, Some(hash)) => Some(hash.check().map_err(under("consistentHash"))?),
            // In turn, as in Envoy, but that turns are passed over.
            (None, None) if utilization.is_some() => Some(Choice::Simple(Balancing::RoundRobin)),
            (simple, None) => simple.and_then(Simple::balancing).map(Choice::Simple),
        };
        let (field, warmup) = match (self.warmup, self.warmup_duration_secs) {
            (None, Some(duration)) => {
                let warmup = WireWarmup { duration: Some(duration), minimum_percent: None, aggression: None };
                ("warmupDurationSecs", Some(warmup))
            }
            (warmup, _) => ("warmup", warmup),
        };
        let warmup = warmup.map(WireWarmup::check).transpose().map_err(under(field))?;
        let warms_up =
            matches!(choice, None | Some(Choice::Simple(Balancing::LeastRequest | Balancing::RoundRobin)));
        if warmup.is_some() && !warms_up {
            return Err(FieldError::new(field, "is for LEAST_REQUEST and ROUND_ROBIN alone"));
        }
        let locality = self.locality_lb_setting.map(locality::Wire::check).transpose();
        let locality = locality.map_err(under("localityLbSetting"))?;
        let zones = self.zone_aware_lb_setting.map(locality::WireZones::check).transpose();
        let locality = match (locality, zones.map_err(under("zoneAwareLbSetting"))?) {
            (Some(_), Some(_)) => {
                let message = "only one of localityLbSetting and zoneAwareLbSetting may be set";
                return Err(FieldError::new("zoneAwareLbSetting", message));
            }
            (one, other) => one.or(other).map(Arc::new),
        };
        Ok(Balancer { choice, locality, warmup, utilization })
    }
}

impl Simple {
    fn balancing(self) -> Option<Balancing> {
        match self {
            Self::Unspecified => None,
            Self::LeastRequest | Self::LeastConn => Some(Balancing::LeastRequest),
            Self::RoundRobin => Some(Balancing::RoundRobin),
            Self::Random => Some(Balancing::Random),
            Self::Passthrough => Some(Balancing::Passthrough),
        }
    }
}

impl WireWarmup {
    fn check(self) -> Checked<Warmup> {
        let duration = self.duration.ok_or_else(|| FieldError::new("duration", "is required"))?;
        let minimum_percent = self.minimum_percent.unwrap_or(defaults::WARMUP_MINIMUM_PERCENT);
        if !(0.0..=100.0).contains(&minimum_percent) {
            let message = format!("percent {minimum_percent} is not in range 0..100");
            return Err(FieldError::new("minimumPercent", message));
        }
        let aggression = self.aggression.unwrap_or(defaults::WARMUP_AGGRESSION);
        if !(aggression.is_finite() && aggression >= 1.0) {
            return Err(FieldError::new("aggression", format!("{aggression} is not 1 or more")));
        }
        Ok(Warmup { duration: duration.at_least_a_millisecond("duration")?, minimum_percent, aggression })
    }
}

impl WireHash {
    fn check(self) -> Checked<Choice> {
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
        Ok(Choice::Hash(Arc::new(key?), table))
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
            ("LEAST_REQUEST", Some(Balancing::LeastRequest)),
            ("LEAST_CONN", Some(Balancing::LeastRequest)),
            ("UNSPECIFIED", None),
            ("ROUND_ROBIN", Some(Balancing::RoundRobin)),
            ("RANDOM", Some(Balancing::Random)),
            ("PASSTHROUGH", Some(Balancing::Passthrough)),
        ];
        for (simple, balancing) in table {
            let choice = balancing.map(Choice::Simple);
            assert_eq!(read(&json!({ "simple": simple })).unwrap().choice, choice, "{simple}");
        }
    }

    #[test]
    fn warming_up_is_read() {
        let warmup = |seconds, minimum_percent, aggression| {
            Some(Warmup { duration: Duration::from_secs(seconds), minimum_percent, aggression })
        };
        let table = [
            (json!({}), None),
            (json!({"warmupDurationSecs": "30s"}), warmup(30, 10.0, 1.0)),
            (json!({"simple": "ROUND_ROBIN", "warmup": {"duration": "1m"}}), warmup(60, 10.0, 1.0)),
            (
                json!({"warmupDurationSecs": "30s", "warmup":
                    {"duration": "2s", "minimumPercent": 0, "aggression": 1.5}}),
                warmup(2, 0.0, 1.5),
            ),
        ];
        for (written, expected) in table {
            assert_eq!(read(&written).unwrap().warmup, expected, "{written}");
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
            let choice = Choice::Hash(Arc::new(key), table);
            assert_eq!(hash(&written).unwrap().choice, Some(choice), "{written}");
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
            (json!({"simple": "BEST"}), "simple", "unknown variant"),
            (json!({"warmup": {}}), "warmup.duration", "is required"),
            (json!({"warmup": {"duration": "0s"}}), "warmup.duration", "1ms"),
            (json!({"warmup": {"duration": "1s", "minimumPercent": 101}}), "warmup.minimumPercent", "0..100"),
            (json!({"warmup": {"duration": "1s", "aggression": 0.5}}), "warmup.aggression", "1 or more"),
            (json!({"simple": "RANDOM", "warmupDurationSecs": "1s"}), "warmupDurationSecs", "alone"),
            (json!({"simple": "PASSTHROUGH", "warmup": {"duration": "1s"}}), "warmup", "alone"),
            (
                json!({"localityLbSetting": {"failover": [{"from": "a", "to": "a"}]}}),
                "localityLbSetting.failover[0].to",
                "itself",
            ),
            (
                json!({"zoneAwareLbSetting": {"failoverPriority": ["topology.kubernetes.io/zone"]}}),
                "zoneAwareLbSetting.failoverPriority[0]",
                "sees to itself",
            ),
            (json!({"localityLbSetting": {}, "zoneAwareLbSetting": {}}), "zoneAwareLbSetting", "only one of"),
            (
                json!({"backendUtilization": {}, "simple": "RANDOM"}),
                "backendUtilization",
                "only one of simple, consistentHash and backendUtilization",
            ),
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
