//! Load reports in the head or the trailers of a response (Open Request Cost Aggregation): `endpoint-load-metrics`, as `TEXT`,
//! `JSON` or `BIN`, and `endpoint-load-metrics-bin`, as gRPC services send it.
//!
//! Promises that a report which cannot be read changes nothing. Tested below, and in the lab
//! (`tests/tests/backend_utilization.rs`).

use std::collections::HashMap;

use base64::{Engine as _, engine::general_purpose::GeneralPurpose};
use http::HeaderMap;
use prost::Message as _;
use serde::Deserialize;

use crate::state::snapshot::{Metric, UtilizationRule};

const HEADER: &str = "endpoint-load-metrics";
const BINARY: &str = "endpoint-load-metrics-bin";

/// gRPC takes base64 with and without padding.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    base64::engine::GeneralPurposeConfig::new()
        .with_decode_padding_mode(base64::engine::DecodePaddingMode::Indifferent),
);

/// `xds.data.orca.v3.OrcaLoadReport`, as far as it is used; its JSON has names in either spelling, as that of Protobuf may.
#[derive(Clone, PartialEq, prost::Message, Deserialize)]
#[serde(default)]
struct Report {
    #[prost(double, tag = "1")]
    #[serde(alias = "cpuUtilization")]
    cpu_utilization: f64,
    #[prost(double, tag = "2")]
    #[serde(alias = "memUtilization")]
    mem_utilization: f64,
    #[prost(map = "string, double", tag = "5")]
    utilization: HashMap<String, f64>,
    #[prost(double, tag = "6")]
    #[serde(alias = "rpsFractional")]
    rps_fractional: f64,
    #[prost(double, tag = "7")]
    eps: f64,
    #[prost(map = "string, double", tag = "8")]
    #[serde(alias = "namedMetrics")]
    named_metrics: HashMap<String, f64>,
    #[prost(double, tag = "9")]
    #[serde(alias = "applicationUtilization")]
    application_utilization: f64,
}

/// How many requests a second it does for each whole of itself that it uses (Envoy's and gRPC's formula): what its share is
/// proportional to. `None` without a report, or one that says nothing of that.
pub fn weight(headers: &HeaderMap, rule: &UtilizationRule) -> Option<f64> {
    let report = read(headers)?;
    let (requests, errors) = (report.rps_fractional, report.eps.max(0.0));
    let utilization = report.utilization(&rule.metrics);
    let penalty = if requests > 0.0 { errors / requests * rule.penalty } else { 0.0 };
    let weight = requests / (utilization + penalty);
    (utilization > 0.0 && weight.is_finite() && weight > 0.0).then_some(weight)
}

fn read(headers: &HeaderMap) -> Option<Report> {
    if let Some(value) = headers.get(BINARY) {
        return binary(value.as_bytes());
    }
    let (form, report) = headers.get(HEADER)?.to_str().ok()?.split_once(' ')?;
    match form {
        "TEXT" => text(report),
        "JSON" => serde_json::from_str(report).ok(),
        "BIN" => binary(report.as_bytes()),
        _ => None,
    }
}

fn binary(value: &[u8]) -> Option<Report> {
    Report::decode(&*BASE64.decode(value).ok()?).ok()
}

/// `name=value`, with a comma in between, and a dot within names of maps.
fn text(report: &str) -> Option<Report> {
    let mut read = Report::default();
    for pair in report.split(',') {
        let (name, value) = pair.split_once('=')?;
        let value = value.trim().parse().ok()?;
        match (name.trim(), name.trim().split_once('.')) {
            ("cpu_utilization" | "cpu", _) => read.cpu_utilization = value,
            ("mem_utilization" | "mem", _) => read.mem_utilization = value,
            ("application_utilization", _) => read.application_utilization = value,
            ("rps_fractional" | "rps", _) => read.rps_fractional = value,
            ("eps", _) => read.eps = value,
            (_, Some(("utilization", name))) => drop(read.utilization.insert(name.to_owned(), value)),
            (_, Some(("named_metrics", name))) => drop(read.named_metrics.insert(name.to_owned(), value)),
            _ => {}
        }
    }
    Some(read)
}

impl Report {
    /// How much of it is used: by its app's own word, else the most that any of these figures says, else its processor.
    fn utilization(&self, metrics: &[Metric]) -> f64 {
        if self.application_utilization > 0.0 {
            return self.application_utilization;
        }
        let of = |metric: &Metric| match metric {
            Metric::Cpu => self.cpu_utilization,
            Metric::Memory => self.mem_utilization,
            Metric::Application => self.application_utilization,
            Metric::Utilization(name) => self.utilization.get(name).copied().unwrap_or_default(),
            Metric::Named(name) => self.named_metrics.get(name).copied().unwrap_or_default(),
        };
        let most = metrics.iter().map(of).fold(0.0, f64::max);
        if most > 0.0 { most } else { self.cpu_utilization }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::state::defaults;

    fn weighed(name: &'static str, value: &str, rule: &UtilizationRule) -> Option<f64> {
        let mut headers = HeaderMap::new();
        headers.insert(name, value.parse().unwrap());
        weight(&headers, rule)
    }

    #[test]
    fn every_form_of_a_report_is_read() {
        let rule = defaults::backend_utilization();
        let report = Report { cpu_utilization: 0.5, rps_fractional: 100.0, eps: 10.0, ..Report::default() };
        let padded = base64::prelude::BASE64_STANDARD.encode(report.encode_to_vec());
        let bare = padded.trim_end_matches('=');
        for (name, value) in [
            (HEADER, "TEXT cpu_utilization=0.5,rps_fractional=100, eps=10"),
            (HEADER, "TEXT cpu=0.5, rps=100, eps=10, unknown=3"),
            (HEADER, r#"JSON {"cpu_utilization": 0.5, "rps_fractional": 100, "eps": 10, "more": 1}"#),
            (HEADER, r#"JSON {"cpuUtilization": 0.5, "rpsFractional": 100, "eps": 10}"#),
            (HEADER, &format!("BIN {padded}")),
            (BINARY, &padded),
            (BINARY, bare),
        ] {
            // 100 / (0.5 + 10 / 100 * 1.0)
            let found = weighed(name, value, &rule).unwrap();
            assert!((found - 100.0 / 0.6).abs() < 1e-9, "{name}: {value}: {found}");
        }
    }

    #[test]
    fn the_figure_that_the_rule_names_counts() {
        let named = Metric::Named("queue".to_owned());
        let of_disk = Metric::Utilization("disk".to_owned());
        let all = "named_metrics.queue=0.2, utilization.disk=0.8, mem_utilization=0.9";
        for (metrics, report, wanted) in [
            (vec![], format!("cpu_utilization=0.4, {all}"), 0.4),
            (vec![named.clone()], format!("cpu_utilization=0.4, {all}"), 0.2),
            (vec![named.clone(), of_disk], format!("cpu_utilization=0.4, {all}"), 0.8),
            (vec![Metric::Memory], format!("cpu_utilization=0.4, {all}"), 0.9),
            (vec![named.clone()], "cpu_utilization=0.4".to_owned(), 0.4),
            (vec![named], format!("application_utilization=0.1, cpu_utilization=0.4, {all}"), 0.1),
        ] {
            let rule = UtilizationRule { metrics: metrics.into(), ..defaults::backend_utilization() };
            let found = weighed(HEADER, &format!("TEXT rps_fractional=1, {report}"), &rule).unwrap();
            assert!((found - 1.0 / wanted).abs() < 1e-9, "{report}: {found}");
        }
    }

    #[test]
    fn what_says_nothing_of_it_changes_nothing() {
        let rule = defaults::backend_utilization();
        assert_eq!(weight(&HeaderMap::new(), &rule), None);
        for (name, value) in [
            (HEADER, "TEXT"),
            (HEADER, "TEXT cpu_utilization"),
            (HEADER, "TEXT cpu_utilization=a,rps_fractional=1"),
            (HEADER, "TEXT cpu_utilization=0.5"),
            (HEADER, "TEXT cpu_utilization=0,rps_fractional=1"),
            (HEADER, "TEXT cpu_utilization=0.5,rps_fractional=inf"),
            (HEADER, "TEXT cpu_utilization=NaN,rps_fractional=1"),
            (HEADER, "TEXT cpu_utilization=-1,rps_fractional=1"),
            (HEADER, "JSON {"),
            (HEADER, r#"JSON {"cpu_utilization": "much"}"#),
            (HEADER, "YAML cpu_utilization: 0.5"),
            (HEADER, "BIN !"),
            (BINARY, "////"),
        ] {
            assert_eq!(weighed(name, value, &rule), None, "{value}");
        }
    }
}
