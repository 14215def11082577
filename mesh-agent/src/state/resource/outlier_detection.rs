//! `outlierDetection` of a `DestinationRule`, with Istio's and Envoy's defaults.
//!
//! Tested by the tables below.

use serde::Deserialize;

use super::{
    duration::IstioDuration,
    field::{Checked, FieldError, item},
};
use crate::state::{
    defaults,
    snapshot::{OutlierDetection, Statuses},
};

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Wire {
    #[serde(rename = "consecutive5xxErrors")]
    consecutive_5xx_errors: Option<u32>,
    consecutive_gateway_errors: Option<u32>,
    /// Deprecated: means `consecutiveGatewayErrors`.
    consecutive_errors: Option<u32>,
    #[serde(default)]
    split_external_local_origin_errors: bool,
    consecutive_local_origin_failures: Option<u32>,
    interval: Option<IstioDuration>,
    base_ejection_time: Option<IstioDuration>,
    max_ejection_percent: Option<u32>,
    min_health_percent: Option<u32>,
    #[serde(default)]
    outlier_detection_http_error_codes: Vec<u16>,
}

impl Wire {
    pub(super) fn check(self) -> Checked<OutlierDetection> {
        let default = defaults::OUTLIER_DETECTION;
        let duration = |given: Option<IstioDuration>, field, default| match given {
            Some(given) => given.at_least_a_millisecond(field),
            None => Ok(default),
        };
        let percent = |given: Option<u32>, field, default| match given {
            Some(given) if given > 100 => {
                Err(FieldError::new(field, format!("percent {given} is not in range 0..100")))
            }
            given => Ok(given.unwrap_or(default)),
        };
        let apart = self.consecutive_local_origin_failures.unwrap_or(defaults::LOCAL_ORIGIN_FAILURES);
        Ok(OutlierDetection {
            server_errors: self.consecutive_5xx_errors.unwrap_or(default.server_errors),
            gateway_errors: self
                .consecutive_gateway_errors
                .or(self.consecutive_errors)
                .unwrap_or(default.gateway_errors),
            local_failures: self.split_external_local_origin_errors.then_some(apart),
            interval: duration(self.interval, "interval", default.interval)?,
            base_ejection_time: duration(
                self.base_ejection_time,
                "baseEjectionTime",
                default.base_ejection_time,
            )?,
            max_ejection_percent: percent(
                self.max_ejection_percent,
                "maxEjectionPercent",
                default.max_ejection_percent,
            )?,
            min_health_percent: percent(
                self.min_health_percent,
                "minHealthPercent",
                default.min_health_percent,
            )?,
            errors: statuses(&self.outlier_detection_http_error_codes)
                .map_err(|(i, error)| item("outlierDetectionHttpErrorCodes", i)(error))?,
        })
    }
}

/// None: what is left out is as Istio has it.
fn statuses(written: &[u16]) -> Result<Option<Statuses>, (usize, FieldError)> {
    if let Some(i) = written.iter().position(|status| !Statuses::RANGE.contains(status)) {
        return Err((i, FieldError::new("", format!("{} is not in range 100..599", written[i]))));
    }
    Ok((!written.is_empty()).then(|| written.iter().copied().collect()))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::time::Duration;

    use serde_json::{Value, json};

    use super::*;

    fn read(value: &Value) -> Checked<OutlierDetection> {
        crate::state::resource::field::deserialize::<Wire>(value)?.check()
    }

    #[test]
    fn rules_are_read() {
        let default = OutlierDetection {
            server_errors: 5,
            gateway_errors: 0,
            local_failures: None,
            interval: Duration::from_secs(10),
            base_ejection_time: Duration::from_secs(30),
            max_ejection_percent: 10,
            min_health_percent: 0,
            errors: None,
        };
        let errors = Statuses::from_iter([599, 429, 100]);
        let table = [
            (json!({}), default),
            (json!({"outlierDetectionHttpErrorCodes": []}), default),
            (
                json!({"outlierDetectionHttpErrorCodes": [599, 100, 429]}),
                OutlierDetection { errors: Some(errors), ..default },
            ),
            (json!({"consecutiveErrors": 3}), OutlierDetection { gateway_errors: 3, ..default }),
            (
                json!({"consecutive5xxErrors": 0, "consecutiveGatewayErrors": 2, "consecutiveErrors": 3}),
                OutlierDetection { server_errors: 0, gateway_errors: 2, ..default },
            ),
            (json!({"consecutiveLocalOriginFailures": 2}), default),
            (
                json!({"splitExternalLocalOriginErrors": true}),
                OutlierDetection { local_failures: Some(5), ..default },
            ),
            (
                json!({"splitExternalLocalOriginErrors": true, "consecutiveLocalOriginFailures": 2}),
                OutlierDetection { local_failures: Some(2), ..default },
            ),
            (
                json!({"interval": "1s", "baseEjectionTime": "1m", "maxEjectionPercent": 100, "minHealthPercent": 40}),
                OutlierDetection {
                    interval: Duration::from_secs(1),
                    base_ejection_time: Duration::from_mins(1),
                    max_ejection_percent: 100,
                    min_health_percent: 40,
                    ..default
                },
            ),
        ];
        for (written, expected) in table {
            assert_eq!(read(&written).unwrap(), expected, "{written}");
        }
        assert_eq!(errors.iter().collect::<Vec<_>>(), [100, 429, 599]);
    }

    #[test]
    fn bad_rules_name_their_field() {
        let table = [
            (json!({"interval": "0s"}), "interval", "1ms"),
            (json!({"baseEjectionTime": "long"}), "baseEjectionTime", "not a duration"),
            (json!({"maxEjectionPercent": 101}), "maxEjectionPercent", "0..100"),
            (json!({"minHealthPercent": -1}), "minHealthPercent", "invalid value"),
            (json!({"consecutive5xxErrors": "five"}), "consecutive5xxErrors", "invalid type"),
            (
                json!({"outlierDetectionHttpErrorCodes": [500, 600]}),
                "outlierDetectionHttpErrorCodes[1]",
                "100..599",
            ),
            (json!({"successRate": 1}), "successRate", "unknown field"),
        ];
        for (written, field, message) in table {
            let error = read(&written).unwrap_err();
            assert_eq!(error.field, field, "{written}");
            assert!(error.message.contains(message), "{written}: {}", error.message);
        }
    }
}
