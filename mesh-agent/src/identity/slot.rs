//! The place of one identity in the authority: who holds it, who fills it, and why it could not be filled.
//!
//! Promises that one asks at a time, and that what an authority says after its asker has given up is not lost: a certificate
//! is kept for him, and so is a refusal. Tested with `authority.rs`.

use std::{
    future::Future,
    sync::{Arc, Weak},
    time::Duration,
};

use arc_swap::ArcSwapOption;
use tokio::{
    sync::{Mutex, OwnedMutexGuard, oneshot},
    time::Instant,
};

use super::workload::WorkloadIdentity;
use crate::error::{Error, Result};

/// How long a certificate is kept that nobody has taken: who waits for it asks again within a second, and a node full of
/// pods takes a while.
const KEPT: Duration = Duration::from_mins(1);
/// How long it is remembered why an identity was not certified.
const FAILURE_KEPT: Duration = Duration::from_mins(1);

/// The place of one identity. Clones are the same place.
#[derive(Debug, Clone, Default)]
pub(super) struct Slot {
    /// The handle, while somebody holds it; locked by whoever fills it.
    handle: Arc<Mutex<Weak<WorkloadIdentity>>>,
    /// Why and when it could not be filled.
    failure: Arc<ArcSwapOption<(Error, Instant)>>,
}

impl Slot {
    /// Waits for whoever fills it.
    pub async fn lock(&self) -> OwnedMutexGuard<Weak<WorkloadIdentity>> {
        Arc::clone(&self.handle).lock_owned().await
    }

    /// The handle, unless somebody is about to fill it.
    pub fn try_lock(&self) -> Option<OwnedMutexGuard<Weak<WorkloadIdentity>>> {
        Arc::clone(&self.handle).try_lock_owned().ok()
    }

    /// Why it could not be filled the last time, if that was not long ago.
    pub fn failure(&self) -> Option<Error> {
        let failure = self.failure.load();
        failure.as_ref().filter(|failure| failure.1.elapsed() < FAILURE_KEPT).map(|failure| failure.0.clone())
    }

    /// Whether it has to be kept.
    pub fn is_used(&self) -> bool {
        // A slot somebody else has in hand is being filled.
        Arc::strong_count(&self.handle) > 1
            || self.failure().is_some()
            || self.handle.try_lock().is_ok_and(|held| held.strong_count() > 0)
    }

    /// Has the slot filled, whether or not the asker waits so long.
    pub fn fill(
        &self,
        filling: impl Future<Output = Result<Arc<WorkloadIdentity>>> + Send + 'static,
    ) -> oneshot::Receiver<Result<Arc<WorkloadIdentity>>> {
        let (told, asked) = oneshot::channel();
        let failure = Arc::clone(&self.failure);
        tokio::spawn(async move {
            let filled = filling.await;
            let failed = filled.as_ref().err().map(|error| Arc::new((error.clone(), Instant::now())));
            failure.store(failed);
            if let Err(Ok(kept)) = told.send(filled) {
                tokio::time::sleep(KEPT).await;
                drop(kept);
            }
        });
        asked
    }
}
