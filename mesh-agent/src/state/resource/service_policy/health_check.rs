//! `healthCheck`: Kubernetes' words and defaults for probes where it has them.

use std::ops::RangeInclusive;

use http::uri::{Authority, PathAndQuery};
use serde::Deserialize;

use crate::state::{
    defaults,
    resource::{
        duration::IstioDuration,
        field::{Checked, FieldError, item, under},
    },
    snapshot::{HealthCheck, HealthProbe},
};

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Wire {
    http: Option<WireHttp>,
    grpc: Option<WireGrpc>,
    tcp: Option<WireTcp>,
    port: Option<u16>,
    interval: Option<IstioDuration>,
    timeout: Option<IstioDuration>,
    jitter: Option<u32>,
    unhealthy_threshold: Option<u32>,
    healthy_threshold: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireHttp {
    path: Option<String>,
    host: Option<String>,
    expected_statuses: Option<Vec<WireStatuses>>,
}

/// `200`, or `200-299`.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(untagged)]
enum WireStatuses {
    One(u16),
    Range(String),
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
struct WireGrpc {
    #[serde(default)]
    service: String,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
struct WireTcp {}

impl Wire {
    pub(super) fn check(self) -> Checked<HealthCheck> {
        let probe = match (self.http, self.grpc, self.tcp) {
            (Some(http), None, None) => http.check().map_err(under("http"))?,
            (None, Some(grpc), None) => HealthProbe::Grpc { service: grpc.service },
            (None, None, Some(WireTcp {})) => HealthProbe::Tcp,
            _ => return Err(FieldError::new("", "exactly one of http, grpc and tcp must be given")),
        };
        if self.port == Some(0) {
            return Err(FieldError::new("port", "is no port: 1 to 65535, and of the pod"));
        }
        let duration = |given: Option<IstioDuration>, field, default| match given {
            Some(given) => given.at_least_a_millisecond(field),
            None => Ok(default),
        };
        let threshold = |given: Option<u32>, field, default| match given {
            Some(0) => Err(FieldError::new(field, "must be at least 1")),
            given => Ok(given.unwrap_or(default)),
        };
        let interval = duration(self.interval, "interval", defaults::HEALTH_CHECK_INTERVAL)?;
        if interval < defaults::SHORTEST_HEALTH_CHECK_INTERVAL {
            let text = format!("must be at least {:?}", defaults::SHORTEST_HEALTH_CHECK_INTERVAL);
            return Err(FieldError::new("interval", text));
        }
        let jitter_percent = self.jitter.unwrap_or(defaults::HEALTH_CHECK_JITTER);
        if jitter_percent > 100 {
            return Err(FieldError::new(
                "jitter",
                format!("percent {jitter_percent} is not in range 0..100"),
            ));
        }
        Ok(HealthCheck {
            probe,
            port: self.port,
            interval,
            timeout: duration(self.timeout, "timeout", defaults::HEALTH_CHECK_TIMEOUT)?,
            jitter_percent,
            unhealthy_threshold: threshold(
                self.unhealthy_threshold,
                "unhealthyThreshold",
                defaults::UNHEALTHY_THRESHOLD,
            )?,
            healthy_threshold: threshold(
                self.healthy_threshold,
                "healthyThreshold",
                defaults::HEALTHY_THRESHOLD,
            )?,
        })
    }
}

impl WireHttp {
    fn check(self) -> Checked<HealthProbe> {
        let path = self.path.unwrap_or_else(|| "/".to_owned());
        let bad = |error: &dyn std::fmt::Display| FieldError::new("path", format!("{path:?}: {error}"));
        if !path.starts_with('/') {
            return Err(bad(&"must begin with /"));
        }
        let path = PathAndQuery::try_from(path.as_str()).map_err(|error| bad(&error))?;
        let host = self.host.map(|host| {
            Authority::try_from(host.as_str())
                .map_err(|error| FieldError::new("host", format!("{host:?} is no host: {error}")))
        });
        let written = self.expected_statuses.unwrap_or_default();
        let mut statuses = Vec::with_capacity(written.len());
        for (i, one) in written.into_iter().enumerate() {
            statuses.push(one.check().map_err(item("expectedStatuses", i))?);
        }
        if statuses.is_empty() {
            statuses.push(defaults::HEALTHY_STATUSES);
        }
        Ok(HealthProbe::Http { path, host: host.transpose()?, statuses })
    }
}

impl WireStatuses {
    fn check(self) -> Checked<RangeInclusive<u16>> {
        let range = match &self {
            Self::One(status) => Some(*status..=*status),
            Self::Range(text) => {
                let (first, last) = text.split_once('-').unwrap_or((text, text));
                first.trim().parse().ok().zip(last.trim().parse().ok()).map(|(first, last)| first..=last)
            }
        };
        let is_status = |status: &u16| (100..600).contains(status);
        let range =
            range.filter(|range| is_status(range.start()) && is_status(range.end()) && !range.is_empty());
        range.ok_or_else(|| FieldError::new("", "is neither a status (204) nor a range of them (200-299)"))
    }
}
