//! `retries`: attempts, time limit of a try, and the conditions of `retryOn`.
//!
//! Tested in `tests.rs` beside it.

use serde::Deserialize;

use super::Retries;
use crate::state::{
    resource::{
        duration::IstioDuration,
        field::{Checked, FieldError},
    },
    snapshot::RetryOn,
};

/// As written.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
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
        if !on.add(word) {
            return Err(FieldError::new("retryOn", format!("{word:?} is not a valid retryOn policy")));
        }
    }
    Ok(on)
}
