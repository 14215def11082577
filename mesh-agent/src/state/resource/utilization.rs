//! `loadBalancer.backendUtilization` of a `DestinationRule`. Tested by the table below.

use serde::Deserialize;

use super::{
    duration::IstioDuration,
    field::{Checked, FieldError, item},
};
use crate::state::{
    defaults,
    snapshot::{Metric, UtilizationRule},
};

/// Named as in Envoy's `ClientSideWeightedRoundRobin`.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Wire {
    blackout_period: Option<IstioDuration>,
    weight_expiration_period: Option<IstioDuration>,
    weight_update_period: Option<IstioDuration>,
    error_utilization_penalty: Option<f64>,
    #[serde(default)]
    metric_names_for_computing_utilization: Vec<String>,
    enable_oob_load_report: Option<bool>,
}

impl Wire {
    pub(super) fn check(self) -> Checked<UtilizationRule> {
        let by_default = defaults::backend_utilization();
        let or = |written: Option<IstioDuration>, default| written.map_or(default, |written| written.0);
        let update = or(self.weight_update_period, by_default.update).max(defaults::LEAST_WEIGHT_UPDATE);
        let expiration = or(self.weight_expiration_period, by_default.expiration);
        let penalty = self.error_utilization_penalty.unwrap_or(by_default.penalty);
        if !(penalty.is_finite() && penalty >= 0.0) {
            return Err(FieldError::new("errorUtilizationPenalty", format!("{penalty} is not 0 or more")));
        }
        if self.enable_oob_load_report == Some(true) {
            let message = "is not supported: reports are read in responses";
            return Err(FieldError::new("enableOobLoadReport", message));
        }
        let mut metrics = Vec::new();
        for (i, name) in self.metric_names_for_computing_utilization.into_iter().enumerate() {
            metrics.push(metric(&name).map_err(item("metricNamesForComputingUtilization", i))?);
        }
        let blackout = or(self.blackout_period, by_default.blackout);
        Ok(UtilizationRule { blackout, expiration, update, penalty, metrics: metrics.into() })
    }
}

fn metric(name: &str) -> Checked<Metric> {
    Ok(match (name, name.split_once('.')) {
        ("cpu_utilization", _) => Metric::Cpu,
        ("mem_utilization", _) => Metric::Memory,
        ("application_utilization", _) => Metric::Application,
        (_, Some(("utilization", name))) if !name.is_empty() => Metric::Utilization(name.to_owned()),
        (_, Some(("named_metrics", name))) if !name.is_empty() => Metric::Named(name.to_owned()),
        _ => {
            let message = format!(
                "{name:?} is not cpu_utilization, mem_utilization, application_utilization, utilization.NAME or \
                 named_metrics.NAME"
            );
            return Err(FieldError::new("", message));
        }
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::time::Duration;

    use serde_json::{Value, json};

    use super::*;

    fn read(written: Value) -> Checked<UtilizationRule> {
        serde_json::from_value::<Wire>(written).unwrap().check()
    }

    #[test]
    fn bad_settings_name_their_field() {
        let table = [
            (json!({"errorUtilizationPenalty": -1.0}), "errorUtilizationPenalty", "0 or more"),
            (json!({"enableOobLoadReport": true}), "enableOobLoadReport", "reports are read in responses"),
            (
                json!({"metricNamesForComputingUtilization": ["cpu_utilization", "named_metrics."]}),
                "metricNamesForComputingUtilization[1]",
                "is not cpu_utilization",
            ),
        ];
        for (written, path, message) in table {
            let error = read(written).unwrap_err();
            assert_eq!(error.field, path);
            assert!(error.message.contains(message), "{error:?}");
        }
    }

    #[test]
    fn what_is_left_out_is_by_default() {
        assert_eq!(read(json!({})).unwrap(), defaults::backend_utilization());
        let written = json!({
            "blackoutPeriod": "0s",
            "weightExpirationPeriod": "1m",
            "weightUpdatePeriod": "1ms",
            "errorUtilizationPenalty": 0.5,
            "metricNamesForComputingUtilization": ["mem_utilization", "utilization.disk", "named_metrics.a.b"],
            "enableOobLoadReport": false,
        });
        let expected = UtilizationRule {
            blackout: Duration::ZERO,
            expiration: Duration::from_mins(1),
            update: Duration::from_millis(100),
            penalty: 0.5,
            metrics: [Metric::Memory, Metric::Utilization("disk".into()), Metric::Named("a.b".into())].into(),
        };
        assert_eq!(read(written).unwrap(), expected);
    }
}
