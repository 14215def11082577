//! Who is asked for first: a certificate that somebody waits for goes before renewals.
//!
//! Promises that renewals never take all places, so that what is needed now waits for no queue of theirs. Tested below.

use tokio::sync::{AcquireError, Semaphore, SemaphorePermit};

use super::ca::Urgency;

/// Requests that an agent has under way with its authority at a time.
const PLACES: usize = 16;
/// How many of them renewals may take.
const FOR_RENEWALS: usize = 4;

/// The places.
#[derive(Debug)]
pub(super) struct Turns {
    all: Semaphore,
    renewals: Semaphore,
}

/// A place, until dropped.
#[derive(Debug)]
pub(super) struct Turn<'a> {
    _place: SemaphorePermit<'a>,
    _renewal: Option<SemaphorePermit<'a>>,
}

impl Turns {
    pub(super) fn new() -> Self {
        Self { all: Semaphore::new(PLACES), renewals: Semaphore::new(FOR_RENEWALS) }
    }

    /// Waits for a place. Renewals wait among themselves first, so that no more than a few are ever ahead of anybody.
    pub(super) async fn take(&self, urgency: Urgency) -> Result<Turn<'_>, AcquireError> {
        let renewal = match urgency {
            Urgency::Now => None,
            Urgency::Renewal => Some(self.renewals.acquire().await?),
        };
        Ok(Turn { _place: self.all.acquire().await?, _renewal: renewal })
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
        for _ in 0..FOR_RENEWALS {
            held.push(turns.take(Urgency::Renewal).await?);
        }
        let mut renewal = pin!(turns.take(Urgency::Renewal));
        assert!(is_pending(renewal.as_mut()).await, "a renewal too many");
        for _ in FOR_RENEWALS..PLACES {
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
