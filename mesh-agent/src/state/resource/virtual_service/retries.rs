//! `retries`: attempts, time limit of a try, and the conditions of `retryOn`.
//!
//! Tested in `tests.rs` beside it.

use serde::Deserialize;

use super::{Retries, fault::GRPC_STATUS};
use crate::state::{
    resource::{
        duration::IstioDuration,
        field::{Checked, FieldError},
    },
    snapshot::RetryOn,
};

/// gRPC statuses that `retryOn` may name, in its own spelling.
const GRPC: [&str; 5] = ["cancelled", "deadline-exceeded", "internal", "resource-exhausted", "unavailable"];

/// As written.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Wire {
    #[serde(default)]
    attempts: i32,
    per_try_timeout: Option<IstioDuration>,
    retry_on: Option<String>,
    backoff: Option<IstioDuration>,
    retry_remote_localities: Option<bool>,
    retry_ignore_previous_hosts: Option<bool>,
}

impl Wire {
    /// The policy, with what is not said left open.
    pub fn check(self) -> Checked<Retries> {
        let attempts = u32::try_from(self.attempts)
            .map_err(|_| FieldError::new("attempts", "attempts cannot be negative"))?;
        let on = self.retry_on.filter(|on| !on.is_empty());
        let more = self.per_try_timeout.is_some()
            || on.is_some()
            || self.backoff.is_some()
            || self.retry_remote_localities.is_some()
            || self.retry_ignore_previous_hosts.is_some();
        if attempts == 0 && more {
            let message = "http retry policy configured when attempts are set to 0 (disabled)";
            return Err(FieldError::new("attempts", message));
        }
        let at_least = |wire: Option<IstioDuration>, field| {
            wire.map(|duration| duration.at_least_a_millisecond(field)).transpose()
        };
        Ok(Retries {
            attempts,
            per_try_timeout: at_least(self.per_try_timeout, "perTryTimeout")?,
            on: on.map(|on| conditions(&on)).transpose()?,
            backoff: at_least(self.backoff, "backoff")?,
            remote_localities: self.retry_remote_localities,
            ignore_previous_hosts: self.retry_ignore_previous_hosts,
        })
    }
}

/// Reads the comma-separated conditions.
fn conditions(text: &str) -> Checked<RetryOn> {
    let mut on = RetryOn::default();
    for word in text.split(',').map(str::trim).filter(|word| !word.is_empty()) {
        match word {
            "5xx" => on.server_error = true,
            "gateway-error" => on.gateway_error = true,
            "reset" => on.reset = true,
            "connect-failure" => on.connect_failure = true,
            "refused-stream" => on.refused_stream = true,
            "retriable-4xx" => on.retriable_4xx = true,
            "retriable-headers" => on.retriable_headers = true,
            "envoy-ratelimited" => on.envoy_ratelimited = true,
            "reset-before-request" => on.reset_before_request = true,
            // One means the numbers beside it, which count without it too; the other never happens, as nothing here
            // speaks HTTP/3.
            "retriable-status-codes" | "http3-post-connect-failure" => {}
            word if GRPC.contains(&word) => on.grpc.extend(grpc_number(word)),
            word => match word.parse::<u16>() {
                Ok(status @ 100..=599) => on.status_codes.push(status),
                _ => {
                    return Err(FieldError::new(
                        "retryOn",
                        format!("{word:?} is not a valid retryOn policy"),
                    ));
                }
            },
        }
    }
    Ok(on)
}

/// The number of a status that `retryOn` spells in small letters with dashes.
fn grpc_number(word: &str) -> Option<u32> {
    let name = word.to_ascii_uppercase().replace('-', "_");
    GRPC_STATUS.iter().position(|status| *status == name).map(|number| number as u32)
}
