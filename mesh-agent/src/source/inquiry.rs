//! What a source has now, for who asks what would be if there were something else.
//!
//! Promises that nothing is kept for it until somebody asks, and then nothing again until the next change of a rule or a
//! service. Tested in `tests.rs`.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use crate::state::resource::{ObjectKey, Objects};

/// Questions that wait while the source compiles; more wait where they are asked.
const WAITING: usize = 16;

/// Kinds that come and go with pods, and that no rule names.
const PASSING: [&str; 3] = ["Pod", "EndpointSlice", "Node"];

/// Asks for what is configured. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Inquiry(mpsc::Sender<oneshot::Sender<Arc<Objects>>>);

impl Inquiry {
    /// All objects but those that come and go with pods. `None`: the source has ended.
    pub async fn configured(&self) -> Option<Arc<Objects>> {
        let (answer, answered) = oneshot::channel();
        self.0.send(answer).await.ok()?;
        answered.await.ok()
    }
}

/// Where questions come out.
#[derive(Debug)]
pub(super) struct Inquiries(mpsc::Receiver<oneshot::Sender<Arc<Objects>>>);

/// Who asks, and who is asked.
pub(super) fn inquiry() -> (Inquiry, Inquiries) {
    let (ask, asked) = mpsc::channel(WAITING);
    (Inquiry(ask), Inquiries(asked))
}

impl Inquiries {
    /// The next question. Waits for ever once nobody can ask any more.
    pub async fn next(&mut self) -> oneshot::Sender<Arc<Objects>> {
        match self.0.recv().await {
            Some(answer) => answer,
            None => std::future::pending().await,
        }
    }
}

/// What is configured of these.
#[derive(Debug, Default)]
pub(super) struct Configured(Option<Arc<Objects>>);

impl Configured {
    /// An object of this key is another one, or has gone.
    pub fn changed(&mut self, key: &ObjectKey) {
        if !is_passing(key) {
            self.0 = None;
        }
    }

    /// It.
    pub fn of(&mut self, objects: &Objects) -> Arc<Objects> {
        let found = || {
            let kept = objects.iter().filter(|(key, _)| !is_passing(key));
            Arc::new(kept.map(|(key, object)| (key.clone(), Arc::clone(object))).collect())
        };
        Arc::clone(self.0.get_or_insert_with(found))
    }
}

fn is_passing(key: &ObjectKey) -> bool {
    PASSING.contains(&&*key.kind)
}
