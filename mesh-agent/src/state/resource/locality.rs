//! `localityLbSetting`, of a `DestinationRule` and of the mesh-wide settings: shares by locality, or who stands in for whom;
//! and `zoneAwareLbSetting` of a `DestinationRule`.
//!
//! Tested by the tables below.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::field::{Checked, FieldError, entry, item, under};
use crate::state::{defaults, snapshot::Locality};

/// `topology.kubernetes.io/region`.
pub const REGION: &str = "topology.kubernetes.io/region";
/// `topology.kubernetes.io/zone`.
pub const ZONE: &str = "topology.kubernetes.io/zone";
/// Istio's label for what is within a zone.
pub const SUBZONE: &str = "topology.istio.io/subzone";
/// Label of a node that has its name.
pub const HOSTNAME: &str = "kubernetes.io/hostname";

/// Labels that every pod of a node has in common; the last two have one value in all of a mesh.
const OF_A_NODE: [&str; 6] =
    [REGION, ZONE, SUBZONE, HOSTNAME, "topology.istio.io/network", "topology.istio.io/cluster"];

/// A `localityLbSetting`, or a `zoneAwareLbSetting`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LocalitySetting {
    /// `enabled: false`: it does nothing.
    pub disabled: bool,
    /// `distribute`: of clients in a place, the shares of others, in percent.
    pub distribute: Vec<(Locality, Vec<(Locality, u32)>)>,
    /// `failover`: of clients in a region, the region that comes before other ones.
    pub failover: Vec<(String, String)>,
    /// That it is a `zoneAwareLbSetting`: its `minClusterSize`.
    pub zone_aware: Option<u32>,
    /// `failoverPriority`: labels that an endpoint has to have in common with the client, the most important first; with a
    /// value where the client's own is not meant.
    pub priority: Vec<(String, Option<String>)>,
}

#[derive(Debug, Clone, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Wire {
    enabled: Option<bool>,
    #[serde(default)]
    distribute: Vec<WireDistribute>,
    #[serde(default)]
    failover: Vec<WireFailover>,
    #[serde(default)]
    failover_priority: Vec<String>,
}

#[derive(Debug, Clone, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
struct WireDistribute {
    from: String,
    #[serde(default)]
    to: BTreeMap<String, u32>,
}

#[derive(Debug, Clone, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
struct WireFailover {
    from: String,
    to: String,
}

impl Wire {
    pub(super) fn check(self) -> Checked<LocalitySetting> {
        let priority = self.failover_priority.iter().enumerate();
        let priority: Vec<_> = priority
            .map(|(i, label)| label_of(label).map_err(item("failoverPriority", i)))
            .collect::<Checked<_>>()?;
        let fails_over = !self.failover.is_empty() || !priority.is_empty();
        if fails_over && !self.distribute.is_empty() {
            let message = "only one of distribute and failover or failoverPriority may be set";
            return Err(FieldError::new("distribute", message));
        }
        let place = |(label, _): &&(String, Option<String>)| [REGION, ZONE, SUBZONE].contains(&&**label);
        if let (false, Some((label, _))) = (self.failover.is_empty(), priority.iter().find(place)) {
            let message = format!("failover and {label} in failoverPriority say the same in two ways");
            return Err(FieldError::new("failover", message));
        }
        let distribute = self.distribute.into_iter().enumerate();
        let distribute = distribute.map(|(i, one)| one.check().map_err(item("distribute", i)));
        let failover = self.failover.into_iter().enumerate();
        let failover = failover.map(|(i, one)| one.check().map_err(item("failover", i)));
        Ok(LocalitySetting {
            disabled: self.enabled == Some(false),
            distribute: distribute.collect::<Checked<_>>()?,
            failover: failover.collect::<Checked<_>>()?,
            priority,
            zone_aware: None,
        })
    }
}

/// A `zoneAwareLbSetting`.
#[derive(Debug, Clone, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct WireZones {
    enabled: Option<bool>,
    #[serde(default)]
    failover: Vec<WireFailover>,
    #[serde(default)]
    failover_priority: Vec<String>,
    min_cluster_size: Option<u32>,
}

impl WireZones {
    pub(super) fn check(self) -> Checked<LocalitySetting> {
        let Self { enabled, failover, failover_priority, min_cluster_size } = self;
        for (i, label) in failover_priority.iter().enumerate() {
            let label = label.split_once('=').map_or(&**label, |(label, _)| label);
            if [REGION, ZONE, SUBZONE].contains(&label) {
                let message = format!("{label} is what zone-aware routing sees to itself");
                return Err(item("failoverPriority", i)(FieldError::new("", message)));
            }
        }
        let setting = Wire { enabled, distribute: Vec::new(), failover, failover_priority }.check()?;
        let least = min_cluster_size.unwrap_or(defaults::ZONE_AWARE_CLUSTER_SIZE);
        Ok(LocalitySetting { zone_aware: Some(least), ..setting })
    }
}

impl WireDistribute {
    fn check(self) -> Checked<(Locality, Vec<(Locality, u32)>)> {
        let from = pattern(&self.from).map_err(under("from"))?;
        let mut to: Vec<(Locality, u32)> = Vec::new();
        let mut whole = 0_u32;
        for (text, share) in &self.to {
            let place = pattern(text).map_err(entry("to", text))?;
            if !(1..=100).contains(share) {
                let error = FieldError::new("", format!("{share} is not a share of 1 to 100 percent"));
                return Err(entry("to", text)(error));
            }
            if let Some((other, _)) = to.iter().find(|(other, _)| overlap(other, &place)) {
                let message = format!("means some of the places that {other} means too");
                return Err(entry("to", text)(FieldError::new("", message)));
            }
            whole = whole.saturating_add(*share);
            to.push((place, *share));
        }
        if whole != 100 {
            return Err(FieldError::new("to", format!("the shares come to {whole}, not to 100")));
        }
        Ok((from, to))
    }
}

impl WireFailover {
    fn check(self) -> Checked<(String, String)> {
        for (field, region) in [("from", &self.from), ("to", &self.to)] {
            if region.is_empty() || region.contains(['/', '*']) {
                return Err(FieldError::new(field, format!("{region:?} is not a region")));
            }
        }
        if self.from == self.to {
            return Err(FieldError::new("to", "a region does not stand in for itself"));
        }
        Ok((self.from, self.to))
    }
}

/// `region/zone/subzone`, of which the end may be missing or `*`.
fn pattern(text: &str) -> Checked<Locality> {
    let parts: Vec<&str> = text.split('/').collect();
    let wild = parts.iter().position(|part| part.contains('*'));
    let wild_within = wild.is_some_and(|at| at + 1 < parts.len() || parts[at] != "*");
    if parts.len() > 3 || wild_within || parts.iter().any(|part| part.is_empty()) {
        let message = "is no place: REGION, REGION/ZONE or REGION/ZONE/SUBZONE, of which the last may be *";
        return Err(FieldError::new("", format!("{text:?} {message}")));
    }
    Ok(Locality::parse(text))
}

fn overlap(one: &Locality, other: &Locality) -> bool {
    let any = |part: &str| part == "*" || part.is_empty();
    let meets = |one: &str, other: &str| any(one) || any(other) || one == other;
    meets(&one.region, &other.region) && meets(&one.zone, &other.zone) && meets(&one.subzone, &other.subzone)
}

/// Whether what is compared with this label of `failoverPriority` depends on the client's pod.
pub fn is_of_client(label: &str, value: Option<&str>) -> bool {
    value.is_none() && !OF_A_NODE.contains(&label)
}

fn label_of(text: &str) -> Checked<(String, Option<String>)> {
    let (label, value) = text.split_once('=').map_or((text, None), |(label, value)| (label, Some(value)));
    if label.is_empty() {
        return Err(FieldError::new("", "is not the name of a label"));
    }
    Ok((label.to_owned(), value.map(str::to_owned)))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(value: &Value) -> Checked<LocalitySetting> {
        crate::state::resource::field::deserialize::<Wire>(value)?.check()
    }

    #[test]
    fn settings_are_read() {
        assert_eq!(read(&json!({})).unwrap(), LocalitySetting::default());
        assert!(read(&json!({"enabled": false})).unwrap().disabled);
        let read = read(&json!({
            "failoverPriority": ["version=v2", "kubernetes.io/hostname", "team"],
            "failover": [{"from": "a", "to": "b"}],
        }));
        let setting = read.unwrap();
        assert_eq!(setting.failover, [("a".to_owned(), "b".to_owned())]);
        let labels = [
            ("version".to_owned(), Some("v2".to_owned())),
            (HOSTNAME.to_owned(), None),
            ("team".to_owned(), None),
        ];
        assert_eq!(setting.priority, labels);
        let shares = json!({"distribute": [{"from": "a/*", "to": {"a/z1/*": 80, "b": 20}}]});
        let places = vec![(Locality::parse("a/z1/*"), 80), (Locality::parse("b"), 20)];
        assert_eq!(super::tests::read(&shares).unwrap().distribute, [(Locality::parse("a/*"), places)]);
    }

    #[test]
    fn bad_settings_name_their_field() {
        let to = |to: Value| json!({"distribute": [{"from": "a", "to": to}]});
        let table = [
            (json!({"enabled": 1}), "enabled", "invalid type"),
            (json!({"distribute": [{"to": {}}]}), "distribute[0]", "missing field `from`"),
            (json!({"distribute": [{"from": "*/a", "to": {"b": 100}}]}), "distribute[0].from", "no place"),
            (
                json!({"distribute": [{"from": "a/b/c/d", "to": {"b": 100}}]}),
                "distribute[0].from",
                "no place",
            ),
            (to(json!({"b": 99})), "distribute[0].to", "come to 99"),
            (to(json!({"b": 0, "c": 100})), "distribute[0].to.b", "not a share"),
            (to(json!({"b": 50, "b/c": 50})), "distribute[0].to.b/c", "means some"),
            (
                json!({"distribute": [{"from": "a", "to": {"b": 100}}], "failover": [{"from": "a", "to": "b"}]}),
                "distribute",
                "only one of",
            ),
            (json!({"failover": [{"from": "a", "to": "a"}]}), "failover[0].to", "itself"),
            (json!({"failover": [{"from": "a/b", "to": "c"}]}), "failover[0].from", "not a region"),
            (
                json!({"failover": [{"from": "a", "to": "c"}], "failoverPriority": [REGION]}),
                "failover",
                "in two ways",
            ),
            (json!({"failoverPriority": ["=a"]}), "failoverPriority[0]", "not the name"),
            (json!({"zones": []}), "zones", "unknown field"),
        ];
        let zones = |value: &Value| crate::state::resource::field::deserialize::<WireZones>(value)?.check();
        let of_zones = [
            (json!({"distribute": []}), "distribute", "unknown field"),
            (json!({"minClusterSize": -1}), "minClusterSize", "invalid value"),
            (json!({"failover": [{"from": "a", "to": "a"}]}), "failover[0].to", "itself"),
            (json!({"failoverPriority": ["app", ZONE]}), "failoverPriority[1]", "sees to itself"),
            (
                json!({"failoverPriority": ["topology.kubernetes.io/region=r"]}),
                "failoverPriority[0]",
                "sees to itself",
            ),
        ];
        for (written, field, message) in of_zones {
            let error = zones(&written).unwrap_err();
            assert_eq!(error.field, field, "{written}");
            assert!(error.message.contains(message), "{written}: {}", error.message);
        }
        assert_eq!(zones(&json!({})).unwrap().zone_aware, Some(6));
        let written = json!({"enabled": false, "minClusterSize": 2, "failoverPriority": ["app"],
            "failover": [{"from": "a", "to": "b"}]});
        let setting = zones(&written).unwrap();
        assert!(setting.disabled && setting.zone_aware == Some(2));
        assert_eq!(setting.failover, [("a".to_owned(), "b".to_owned())]);
        for (written, field, message) in table {
            let error = read(&written).unwrap_err();
            assert_eq!(error.field, field, "{written}");
            assert!(error.message.contains(message), "{written}: {}", error.message);
        }
    }
}
