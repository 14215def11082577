//! Readiness: the agent is ready when nothing it must wait for is left.
//!
//! Promises that a start-up task that ends early, by error or panic, releases nothing it should not: each holds a
//! guard and drops it when done, so a task that never finishes keeps the agent unready, with its name in the answer.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::HealthView;

/// What the agent waits for. Cheap to clone; all clones are one.
#[derive(Debug, Clone, Default)]
pub struct Readiness(Arc<Mutex<BTreeMap<String, usize>>>);

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

    /// The map is whole after every change, so a panic elsewhere does not make it wrong.
    fn tasks(&self) -> MutexGuard<'_, BTreeMap<String, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for BlockReady {
    fn drop(&mut self) {
        let mut tasks = self.readiness.tasks();
        if let Some(count) = tasks.get_mut(&self.task) {
            *count -= 1;
            if *count == 0 {
                tasks.remove(&self.task);
            }
        }
    }
}
