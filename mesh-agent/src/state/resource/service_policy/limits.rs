//! `rateLimits` and `adaptiveConcurrency`, the latter with Envoy's defaults.

use std::{sync::Arc, time::Duration};

use http::Method;
use serde::Deserialize;

use crate::state::{
    defaults,
    resource::{
        duration::IstioDuration,
        field::{Checked, FieldError, item},
        string_match,
    },
    snapshot::{ConcurrencyRule, RateRule},
};

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct WireLimit {
    name: Option<String>,
    requests: Option<u32>,
    per: Option<IstioDuration>,
    burst: Option<u32>,
    #[serde(default)]
    shared_by: WireSharedBy,
    #[serde(default)]
    paths: Vec<string_match::Wire>,
    #[serde(default)]
    methods: Vec<String>,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum WireSharedBy {
    /// All that call.
    #[default]
    All,
    /// Those of one identity.
    Identity,
}

/// Checks `rateLimits`.
pub(super) fn rate_limits(written: Vec<WireLimit>) -> Checked<Vec<Arc<RateRule>>> {
    let mut rules: Vec<Arc<RateRule>> = Vec::with_capacity(written.len());
    for (i, limit) in written.into_iter().enumerate() {
        let at = item("rateLimits", i);
        let rule = match limit.check(i) {
            Ok(rule) if rules.iter().any(|other| other.name == rule.name) => {
                let text = format!("{:?} is the name of another", rule.name);
                return Err(at(FieldError::new("name", text)));
            }
            Ok(rule) => rule,
            Err(error) => return Err(at(error)),
        };
        rules.push(Arc::new(rule));
    }
    Ok(rules)
}

impl WireLimit {
    fn check(self, place: usize) -> Checked<RateRule> {
        let required = |given: Option<u32>, field: &str| match given {
            None => Err(FieldError::new(field, "is required")),
            Some(0) => Err(FieldError::new(field, "must be at least 1")),
            Some(given) => Ok(given),
        };
        let requests = required(self.requests, "requests")?;
        let burst = required(self.burst.or(Some(requests)), "burst")?;
        let per = match self.per {
            Some(per) => per.at_least_a_millisecond("per")?,
            None => return Err(FieldError::new("per", "is required")),
        };
        // Beyond that the times of a bucket would not fit into what it remembers.
        if per > defaults::LONGEST_RATE {
            let text = format!("must be at most {:?}", defaults::LONGEST_RATE);
            return Err(FieldError::new("per", text));
        }
        if u64::from(burst) > u64::from(requests) * defaults::LARGEST_BURST {
            let text = format!("must be at most {} times the requests", defaults::LARGEST_BURST);
            return Err(FieldError::new("burst", text));
        }
        let mut paths = Vec::with_capacity(self.paths.len());
        for (i, path) in self.paths.into_iter().enumerate() {
            paths.push(path.check().map_err(item("paths", i))?);
        }
        let mut methods = Vec::with_capacity(self.methods.len());
        for (i, method) in self.methods.iter().enumerate() {
            let method = Method::from_bytes(method.as_bytes())
                .map_err(|_| item("methods", i)(FieldError::new("", format!("{method:?} is no method"))))?;
            methods.push(method);
        }
        if self.name.as_deref() == Some("") {
            return Err(FieldError::new("name", "must not be empty"));
        }
        Ok(RateRule {
            name: self.name.unwrap_or_else(|| place.to_string()).into(),
            requests,
            per,
            burst,
            each_source: matches!(self.shared_by, WireSharedBy::Identity),
            paths,
            methods,
        })
    }
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct WireConcurrency {
    percentile: Option<u32>,
    max_concurrency: Option<u32>,
    min_concurrency: Option<u32>,
    update_interval: Option<IstioDuration>,
    #[serde(rename = "minRTT", default)]
    min_rtt: WireMinRtt,
}

#[derive(Debug, Default, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireMinRtt {
    interval: Option<IstioDuration>,
    requests: Option<u32>,
    jitter: Option<u32>,
    buffer: Option<u32>,
}

impl WireConcurrency {
    pub(super) fn check(self) -> Checked<ConcurrencyRule> {
        let default = defaults::ADAPTIVE_CONCURRENCY;
        let at_least_one = |given: Option<u32>, field: &str, default| match given {
            Some(0) => Err(FieldError::new(field, "must be at least 1")),
            given => Ok(given.unwrap_or(default)),
        };
        let percent = |given: Option<u32>, field: &str, default| match given {
            Some(given) if given > 100 => {
                Err(FieldError::new(field, format!("percent {given} is not in range 0..100")))
            }
            given => Ok(given.unwrap_or(default)),
        };
        let duration = |given: Option<IstioDuration>, field: &str, default: Duration| match given {
            Some(given) => given.at_least_a_millisecond(field),
            None => Ok(default),
        };
        let rule = ConcurrencyRule {
            percentile: percent(self.percentile, "percentile", default.percentile)?,
            max: at_least_one(self.max_concurrency, "maxConcurrency", default.max)?,
            min: at_least_one(self.min_concurrency, "minConcurrency", default.min)?,
            update_interval: duration(self.update_interval, "updateInterval", default.update_interval)?,
            min_rtt_interval: duration(self.min_rtt.interval, "minRTT.interval", default.min_rtt_interval)?,
            min_rtt_requests: at_least_one(
                self.min_rtt.requests,
                "minRTT.requests",
                default.min_rtt_requests,
            )?,
            jitter_percent: percent(self.min_rtt.jitter, "minRTT.jitter", default.jitter_percent)?,
            buffer_percent: percent(self.min_rtt.buffer, "minRTT.buffer", default.buffer_percent)?,
        };
        if rule.min > rule.max {
            return Err(FieldError::new("minConcurrency", "is more than maxConcurrency"));
        }
        Ok(rule)
    }
}
