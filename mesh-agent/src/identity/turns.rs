//! Who is asked for first: a certificate that somebody waits for goes before renewals and those that are fetched ahead.
//!
//! Promises that the latter never take all places, so that what is needed now waits for no queue of theirs. Tested below.

use tokio::sync::{AcquireError, Semaphore, SemaphorePermit};

use super::ca::Urgency;

/// Requests that an agent has under way with its authority at a time.
const PLACES: usize = 16;
/// How many of them those may take that nobody waits for.
const FOR_LATER: usize = 4;

/// The places.
#[derive(Debug)]
pub(super) struct Turns {
    all: Semaphore,
    later: Semaphore,
}

/// A place, until dropped.
#[derive(Debug)]
pub(super) struct Turn<'a> {
    _place: SemaphorePermit<'a>,
    _later: Option<SemaphorePermit<'a>>,
}

impl Turns {
    pub(super) fn new() -> Self {
        Self { all: Semaphore::new(PLACES), later: Semaphore::new(FOR_LATER) }
    }

    /// Waits for a place. Those that are for later wait among themselves first, so that no more than a few are ever ahead of anybody.
    pub(super) async fn take(&self, urgency: Urgency) -> Result<Turn<'_>, AcquireError> {
        let later = match urgency {
            Urgency::Now => None,
            Urgency::Later => Some(self.later.acquire().await?),
        };
        Ok(Turn { _place: self.all.acquire().await?, _later: later })
    }
}

#[cfg(test)]
mod tests {
    use std::{future::Future, pin::pin, task::Poll};

    use super::*;

    type TestResult = Result<(), Box<dyn std::error::Error>>;

    async fn is_pending(waiting: std::pin::Pin<&mut impl Future>) -> bool {
        let mut waiting = waiting;
        std::future::poll_fn(move |cx| Poll::Ready(waiting.as_mut().poll(cx).is_pending())).await
    }

    #[tokio::test]
    async fn renewals_leave_places_to_what_is_needed_now() -> TestResult {
        let turns = Turns::new();
        let mut held = Vec::new();
        for _ in 0..FOR_LATER {
            held.push(turns.take(Urgency::Later).await?);
        }
        let mut renewal = pin!(turns.take(Urgency::Later));
        assert!(is_pending(renewal.as_mut()).await, "a renewal too many");
        for _ in FOR_LATER..PLACES {
            held.push(turns.take(Urgency::Now).await?);
        }
        let mut now = pin!(turns.take(Urgency::Now));
        assert!(is_pending(now.as_mut()).await, "more than there are places");
        // The renewal was there first; the place of one goes to what is needed now all the same.
        held.pop();
        drop(now.await?);
        held.remove(0);
        renewal.await?;
        Ok(())
    }
}
