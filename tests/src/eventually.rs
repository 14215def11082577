//! Waiting for what offers no event to await.
//!
//! Promises: one place that polls, with a deadline and the last reason in the error. Never: sleeps a fixed time in
//! the hope that something has happened meanwhile. Tested in `tests/lab.rs` by everything that waits.

use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::time::{Instant, sleep};

/// How long something may take to become true, with room for a machine that is busy building.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// How often it is looked at.
const INTERVAL: Duration = Duration::from_millis(20);

/// Calls `probe` until it succeeds, and returns what it gave; after [`PATIENCE`], fails with its last error.
pub async fn eventually<T>(what: &str, probe: impl AsyncFnMut() -> Result<T>) -> Result<T> {
    eventually_within(PATIENCE, what, probe).await
}

/// As [`eventually`], with a deadline of one's own.
pub async fn eventually_within<T>(
    limit: Duration,
    what: &str,
    mut probe: impl AsyncFnMut() -> Result<T>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        match probe().await {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() >= deadline => {
                return Err(error).with_context(|| format!("waited {limit:?} in vain: {what}"));
            }
            Err(_) => sleep(INTERVAL).await,
        }
    }
}
