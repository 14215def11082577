//! Waiting for what a cluster offers no event for: a server that does not listen yet, a process that is ending.
//!
//! Looks again after a short while, with a deadline, and never sleeps in the hope that something has happened meanwhile;
//! what the API server can tell is awaited with `kubectl wait` instead. Tested below.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How often it is looked.
const INTERVAL: Duration = Duration::from_millis(25);

/// Looks until it is true; after `limit`, fails with what was waited for.
pub fn until(what: &str, limit: Duration, mut is_true: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !is_true()? {
        if Instant::now() >= deadline {
            bail!("waited {} s in vain: {what}", limit.as_secs());
        }
        thread::sleep(INTERVAL);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_becomes_true_is_awaited_and_what_does_not_is_named() {
        let mut looks = 0;
        let third = until("the third look", Duration::from_mins(1), || {
            looks += 1;
            Ok(looks == 3)
        });
        assert!(third.is_ok());
        assert_eq!(looks, 3);
        let never = until("never", Duration::ZERO, || Ok(false)).err().map(|error| error.to_string());
        assert_eq!(never.as_deref(), Some("waited 0 s in vain: never"));
        assert!(until("broken", Duration::from_mins(1), || bail!("gone")).is_err());
    }
}
