//! Says in the status of each object of the mesh's kinds what has become of it. The leader's work.
//!
//! Promises that the status comes to be what is so; that it is written only where it says something else, so that what was
//! written leads to nothing more; a bound of how much is written, in all and of each object; and that conditions of others stay.
//! What cannot be written is tried again. Ends when it is dropped, in the middle of what it writes. Tested in `tests.rs`,
//! against an API server in this process.

mod conditions;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    core::DynamicObject,
};
use serde_json::json;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use self::conditions::{conditions, corrected};
use crate::{
    source::kubernetes::{Described, Description, Descriptions},
    state::{Cause, Problem, resource::ObjectKey},
};

/// How long an object is left alone after news of it: the source compiles meanwhile, and one that changes all the time is not
/// written all the time.
const SETTLES: Duration = Duration::from_secs(1);
/// Between two writes: twenty a second.
const PACE: Duration = Duration::from_millis(50);
/// Pause of an object that could not be written.
const AGAIN: Duration = Duration::from_secs(5);

/// Says what is wrong by `problems`, and by the objects themselves, for as long as it is asked to.
pub(crate) async fn keep_told(client: Client, mut problems: watch::Receiver<Arc<[Problem]>>) {
    let mut descriptions = Descriptions::follow(client.clone());
    let mut told =
        Telling { client, objects: BTreeMap::new(), problems: HashMap::new(), queue: Queue::default() };
    told.hear_of(&problems.borrow_and_update());
    let mut next_write = Instant::now();
    loop {
        let due = told.queue.due().map(|due| due.max(next_write));
        tokio::select! {
            news = descriptions.next() => match news {
                Some(news) => told.hear(news),
                None => return,
            },
            changed = problems.changed() => match changed {
                Ok(()) => told.hear_of(&problems.borrow_and_update()),
                Err(_) => return,
            },
            () = sleep_until(due.unwrap_or(next_write)), if due.is_some() => {
                if told.tell_next().await {
                    next_write = Instant::now() + PACE;
                }
            }
        }
    }
}

/// What is known, and what is still to be said.
struct Telling {
    client: Client,
    objects: BTreeMap<ObjectKey, Description>,
    /// What is wrong besides what an object says by itself, by the object's name.
    problems: HashMap<String, Vec<Problem>>,
    queue: Queue,
}

impl Telling {
    fn hear(&mut self, news: Described) {
        match news {
            Described::All(kind, all) => {
                self.objects.retain(|key, _| *key.kind != *kind);
                for description in all {
                    self.set(description);
                }
            }
            Described::Set(description) => self.set(*description),
            Described::Gone(key) => drop(self.objects.remove(&key)),
        }
    }

    fn set(&mut self, description: Description) {
        self.queue.add(&description.key, SETTLES);
        self.objects.insert(description.key.clone(), description);
    }

    /// Takes note of all problems there are.
    fn hear_of(&mut self, problems: &[Problem]) {
        let mut now: HashMap<String, Vec<Problem>> = HashMap::new();
        // What an object says by itself is looked at with the generation that it has.
        for problem in problems.iter().filter(|problem| problem.cause != Cause::Invalid) {
            if let Some(object) = &problem.object {
                now.entry(object.clone()).or_default().push(problem.clone());
            }
        }
        let before = std::mem::replace(&mut self.problems, now);
        for key in self.objects.keys() {
            let name = key.to_string();
            if before.get(&name) != self.problems.get(&name) {
                self.queue.add(key, SETTLES);
            }
        }
    }

    /// Looks at the next object: whether the API server was asked for anything.
    async fn tell_next(&mut self) -> bool {
        let Some(key) = self.queue.take() else { return false };
        let Some(object) = self.objects.get(&key) else { return false };
        let problems = self.problems.get(&key.to_string()).map_or(&[][..], Vec::as_slice);
        let wanted = conditions(object.refused.as_ref(), problems);
        let Some(conditions) = corrected(&object.conditions, &wanted, object.generation) else {
            return false;
        };
        let api: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), &key.namespace, &object.resource);
        // Conditions of others may have come since it was read: then it is told, and looked at again.
        let patch = json!({
            "metadata": {"resourceVersion": object.version},
            "status": {"conditions": conditions},
        });
        match api.patch_status(&key.name, &PatchParams::default(), &Patch::Merge(patch)).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 404 => {
                tracing::debug!("{key} has gone, or its definition has no status");
            }
            Err(kube::Error::Api(status)) if status.code == 409 => self.queue.add(&key, AGAIN),
            Err(error) => {
                tracing::warn!("the status of {key} cannot be written: {error}; it is tried again");
                self.queue.add(&key, AGAIN);
            }
        }
        true
    }
}

/// Objects that are to be looked at, each once, in the order of their times.
#[derive(Default)]
struct Queue {
    waiting: BTreeSet<(Instant, ObjectKey)>,
    known: HashSet<ObjectKey>,
}

impl Queue {
    /// After this time, unless it waits already.
    fn add(&mut self, key: &ObjectKey, after: Duration) {
        if self.known.insert(key.clone()) {
            self.waiting.insert((Instant::now() + after, key.clone()));
        }
    }

    fn due(&self) -> Option<Instant> {
        self.waiting.first().map(|(due, _)| *due)
    }

    fn take(&mut self) -> Option<ObjectKey> {
        let (_, key) = self.waiting.pop_first()?;
        self.known.remove(&key);
        Some(key)
    }
}
