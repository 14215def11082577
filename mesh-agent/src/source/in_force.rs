//! What comes of changes, whichever source they are from: snapshots, problems, counts, and the log of both.
//!
//! Promises that each problem is logged and counted once for as long as it lasts, and that whoever waits for a snapshot finds
//! the problems that belong to it. Tested with the sources.

use std::{
    collections::BTreeSet,
    sync::{Arc, atomic::Ordering},
};

use tokio::sync::watch;

use super::{
    Counts, Reread, Source,
    inquiry::{Configured, Inquiries, inquiry},
};
use crate::state::{
    Problem,
    compile::{Change, Compiled, Settings},
    resource::Objects,
    snapshot::Snapshot,
};

/// What is in force.
pub(super) struct InForce {
    compiled: Compiled,
    problems: BTreeSet<Problem>,
    counts: Arc<Counts>,
    configured: Configured,
}

impl InForce {
    /// Nothing yet.
    pub fn new(settings: Settings) -> Self {
        let (compiled, configured) = (Compiled::new(settings), Configured::default());
        Self { compiled, problems: BTreeSet::new(), counts: Arc::default(), configured }
    }

    /// All objects.
    pub fn objects(&self) -> &Objects {
        self.compiled.objects()
    }

    /// Those that do not come and go with pods.
    pub fn configured(&mut self) -> Arc<Objects> {
        self.configured.of(self.compiled.objects())
    }

    /// Takes changes over. `problems` are those of the source itself, all that there are.
    pub fn take<'p>(&mut self, changes: Vec<Change>, problems: impl Iterator<Item = &'p Problem>) {
        self.counts.reads.fetch_add(1, Ordering::Relaxed);
        // Without any object there is a configuration too.
        if !changes.is_empty() || self.compiled.snapshot().revision == 0 {
            self.compile(changes);
        }
        let mut found: BTreeSet<Problem> = problems.cloned().collect();
        found.extend(self.compiled.problems().iter().cloned());
        self.note(found);
    }

    fn compile(&mut self, changes: Vec<Change>) {
        for Change::Set(key, _) | Change::Gone(key) in &changes {
            self.configured.changed(key);
        }
        self.compiled.apply(changes);
        self.counts.compiled.fetch_add(1, Ordering::Relaxed);
        let snapshot = self.compiled.snapshot();
        tracing::info!(
            revision = snapshot.revision,
            services = snapshot.services.len(),
            addresses = snapshot.workloads.len(),
            "configuration compiled"
        );
    }

    /// Logs and counts what is new.
    fn note(&mut self, found: BTreeSet<Problem>) {
        for problem in found.difference(&self.problems) {
            self.counts.problems.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(
                file = if problem.file.is_empty() { "-" } else { &problem.file },
                object = problem.object.as_deref().unwrap_or("-"),
                field = problem.field.as_deref().unwrap_or("-"),
                "configuration: {}",
                problem.message
            );
        }
        for problem in self.problems.difference(&found) {
            tracing::info!("configuration: no longer a problem: {problem}");
        }
        self.problems = found;
    }

    /// What follows it from here on, and what shows it to others.
    pub fn follow(&self) -> (Followed, Inquiries, Source) {
        let (snapshot_tx, snapshots) = watch::channel(Arc::clone(self.compiled.snapshot()));
        let (problem_tx, problems) = watch::channel(self.listed());
        let followed = Followed { snapshots: snapshot_tx, problems: problem_tx };
        let counts = Arc::clone(&self.counts);
        let (inquiry, inquiries) = inquiry();
        let source = Source { snapshots, problems, reread: Reread::default(), inquiry, counts };
        (followed, inquiries, source)
    }

    fn listed(&self) -> Arc<[Problem]> {
        self.problems.iter().cloned().collect()
    }
}

/// Where news go.
pub(super) struct Followed {
    snapshots: watch::Sender<Arc<Snapshot>>,
    problems: watch::Sender<Arc<[Problem]>>,
}

impl Followed {
    /// Waits until nobody wants news any more.
    pub async fn nobody_listens(&self) {
        self.snapshots.closed().await;
    }

    /// Tells what is new.
    pub fn publish(&self, now: &InForce) {
        // Problems first: who waits for a snapshot finds what belongs to it.
        let listed = now.listed();
        self.problems.send_if_modified(|before| {
            let changed = **before != *listed;
            *before = listed;
            changed
        });
        self.snapshots.send_if_modified(|before| {
            let changed = !Arc::ptr_eq(before, now.compiled.snapshot());
            *before = Arc::clone(now.compiled.snapshot());
            changed
        });
    }
}
