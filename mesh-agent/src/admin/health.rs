//! Readiness: the agent is ready when nothing it must wait for is left.
//!
//! Promises that a start-up task that ends early, by error or panic, releases nothing it should not: each holds a
//! guard and drops it when done, so a task that never finishes keeps the agent unready, with its name in the answer.

use std::{
    collections::BTreeMap,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use super::HealthView;

/// What the agent waits for. Cheap to clone; all clones are one.
#[derive(Debug, Clone, Default)]
pub struct Readiness(Arc<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    tasks: Mutex<BTreeMap<String, usize>>,
    /// Told when one of them is done.
    done: Notify,
}

/// Keeps the agent unready until dropped.
#[derive(Debug)]
#[must_use = "the agent is ready as soon as this is dropped"]
pub struct BlockReady {
    readiness: Readiness,
    task: String,
}

impl Readiness {
    /// Unready until the guard is dropped; `task` is what the operator reads.
    pub fn block(&self, task: impl Into<String>) -> BlockReady {
        let task = task.into();
        *self.tasks().entry(task.clone()).or_default() += 1;
        BlockReady { readiness: self.clone(), task }
    }

    /// The state now.
    pub fn view(&self) -> HealthView {
        let waiting_for: Vec<String> = self.tasks().keys().cloned().collect();
        HealthView { ready: waiting_for.is_empty(), waiting_for }
    }

    /// Waits until nothing is waited for.
    pub async fn until_ready(&self) {
        loop {
            let mut done = pin!(self.0.done.notified());
            // From now on nothing is missed.
            done.as_mut().enable();
            if self.view().ready {
                return;
            }
            done.await;
        }
    }

    /// The map is whole after every change, so a panic elsewhere does not make it wrong.
    fn tasks(&self) -> MutexGuard<'_, BTreeMap<String, usize>> {
        self.0.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for BlockReady {
    fn drop(&mut self) {
        let mut tasks = self.readiness.tasks();
        if let Some(count) = tasks.get_mut(&self.task) {
            *count -= 1;
            if *count == 0 {
                tasks.remove(&self.task);
                self.readiness.0.done.notify_waiters();
            }
        }
    }
}
