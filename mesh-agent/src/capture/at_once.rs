//! Changes of the kernel that wait, made side by side.
//!
//! A map of maps answers a change, and TCX the end of a link, only after a grace period of RCU, some 10 ms of waiting:
//! changes made at once wait for the same one. Promises that all of them are tried, whatever becomes of one. Tested
//! below.

use std::{
    panic::resume_unwind,
    sync::atomic::{AtomicUsize, Ordering},
    thread::{self, Builder},
};

use anyhow::Result;

/// Threads at a time: enough for a node full of pods to be let go of in a second or two.
const AT_ONCE: usize = 16;

/// Does `work` with each, several at a time, and returns when all is done. Blocks; a thread that cannot be had is no
/// error, it only takes longer.
///
/// # Errors
/// One of those that there were.
pub(super) fn each_at_once<T: Sync>(items: &[T], work: impl Fn(&T) -> Result<()> + Sync) -> Result<()> {
    let next = AtomicUsize::new(0);
    let take = || {
        let mut result = Ok(());
        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
            let done = work(item);
            result = result.and(done);
        }
        result
    };
    thread::scope(|scope| {
        let others = 1..items.len().min(AT_ONCE);
        let others: Vec<_> = others.map_while(|_| Builder::new().spawn_scoped(scope, take).ok()).collect();
        let own = take();
        others
            .into_iter()
            .map(|other| other.join().unwrap_or_else(|panic| resume_unwind(panic)))
            .fold(own, Result::and)
    })
}

#[cfg(test)]
mod tests {
    use std::sync::{Barrier, Mutex};

    use anyhow::ensure;

    use super::*;

    #[test]
    fn all_are_tried_and_an_error_is_told() -> Result<()> {
        let items: Vec<usize> = (0..100).collect();
        let seen = Mutex::new(Vec::new());
        let result = each_at_once(&items, |item| {
            seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(*item);
            ensure!(*item != 17, "seventeen");
            Ok(())
        });
        assert_eq!(result.map_err(|error| error.to_string()), Err("seventeen".to_owned()));
        let mut seen = seen.into_inner()?;
        seen.sort_unstable();
        assert_eq!(seen, items);
        each_at_once(&[], |(): &()| anyhow::bail!("there is none"))
    }

    #[test]
    fn those_that_wait_wait_together() -> Result<()> {
        // Each waits for all the others: one after the other would wait for ever.
        let together = Barrier::new(AT_ONCE);
        each_at_once(&[(); AT_ONCE], |()| {
            together.wait();
            Ok(())
        })
    }
}
