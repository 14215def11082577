//! `fault`: delays and aborts, and the share of requests they hit.
//!
//! Tested in `tests.rs` beside it.

use serde::Deserialize;

use super::action::http_status;
use crate::state::{
    defaults,
    resource::{
        duration::IstioDuration,
        field::{Checked, FieldError, under},
    },
    snapshot::{Abort, Fault, Percentage},
};

/// gRPC's statuses in the order of their numbers.
const GRPC_STATUS: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// The least percentage above 0 (Istio's `validatePercent`: a millionth of all requests).
const LEAST_PERCENT: f64 = 0.0001;

/// As written.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Wire {
    delay: Option<WireDelay>,
    abort: Option<WireAbort>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireDelay {
    fixed_delay: Option<IstioDuration>,
    percentage: Option<WirePercentage>,
    percent: Option<i32>,
    #[cfg_attr(test, schemars(with = "Option<serde_json::Value>"))]
    exponential_delay: Option<serde::de::IgnoredAny>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireAbort {
    http_status: Option<u16>,
    grpc_status: Option<String>,
    #[cfg_attr(test, schemars(with = "Option<serde_json::Value>"))]
    http2_error: Option<serde::de::IgnoredAny>,
    percentage: Option<WirePercentage>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct WirePercentage {
    #[serde(default)]
    value: f64,
}

impl Wire {
    /// The fault.
    pub fn check(self) -> Checked<Fault> {
        if self.delay.is_none() && self.abort.is_none() {
            return Err(FieldError::new("", "HTTP fault injection must have an abort and/or a delay"));
        }
        Ok(Fault {
            delay: self.delay.map(WireDelay::check).transpose().map_err(under("delay"))?,
            abort: self.abort.map(WireAbort::check).transpose().map_err(under("abort"))?,
            by_header: false,
        })
    }
}

impl WireDelay {
    fn check(self) -> Checked<(Percentage, std::time::Duration)> {
        if self.exponential_delay.is_some() {
            return Err(FieldError::new(
                "exponentialDelay",
                "exponentialDelay not supported; use fixedDelay",
            ));
        }
        let Some(delay) = self.fixed_delay else {
            return Err(FieldError::new("fixedDelay", "a delay needs fixedDelay"));
        };
        let delay = delay.at_least_a_millisecond("fixedDelay")?;
        let share = match (self.percentage, self.percent) {
            (Some(percentage), _) => percentage.check("percentage")?,
            (None, Some(percent)) => share(f64::from(percent)).map_err(under("percent"))?,
            (None, None) => defaults::FAULT_PERCENTAGE,
        };
        Ok((share, delay))
    }
}

impl WireAbort {
    fn check(self) -> Checked<(Percentage, Abort)> {
        if self.http2_error.is_some() {
            return Err(FieldError::new(
                "http2Error",
                "http2Error not supported; use httpStatus or grpcStatus",
            ));
        }
        let abort = match (self.http_status, self.grpc_status) {
            (Some(status), None) => Abort::Http(http_status(status).map_err(under("httpStatus"))?),
            (None, Some(status)) => Abort::Grpc(grpc_status(&status).map_err(under("grpcStatus"))?),
            _ => return Err(FieldError::new("", "an abort needs either httpStatus or grpcStatus")),
        };
        let share = self.percentage.map(|percentage| percentage.check("percentage")).transpose()?;
        Ok((share.unwrap_or(defaults::FAULT_PERCENTAGE), abort))
    }
}

impl WirePercentage {
    /// The share, of the field of this name.
    pub(super) fn check(self, field: &str) -> Checked<Percentage> {
        share(self.value).map_err(under("value")).map_err(under(field))
    }
}

/// To the resolution of the path, which is Istio's: less than that is refused, as there.
pub(super) fn share(percent: f64) -> Checked<Percentage> {
    if !(0.0..=100.0).contains(&percent) {
        return Err(FieldError::new("", format!("percentage {percent} is not in range 0..100")));
    }
    if percent > 0.0 && percent < LEAST_PERCENT {
        let text = format!("percentage {percent} is less than {LEAST_PERCENT}, the least above 0");
        return Err(FieldError::new("", text));
    }
    Ok(Percentage((percent * f64::from(Percentage::PERCENT)).round() as u32))
}

/// A status by name (`UNAVAILABLE`) or number (`14`).
fn grpc_status(text: &str) -> Checked<u32> {
    let by_name = GRPC_STATUS.iter().position(|name| *name == text);
    let by_number = || text.parse::<usize>().ok().filter(|number| *number < GRPC_STATUS.len());
    match by_name.or_else(by_number) {
        Some(number) => Ok(number as u32),
        None => Err(FieldError::new(
            "",
            format!("gRPC status {text:?} is not supported; use a name like UNAVAILABLE"),
        )),
    }
}
