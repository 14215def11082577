//! Where the configuration comes from: a directory of manifests, watched.
//!
//! A source gives `compile` a set of objects by key, so that another one (a Kubernetes watch) can stand in its
//! place. Promises that the first snapshot is compiled when the function returns, that a broken manifest leaves its
//! last good state in force, and that each problem is logged once. Never blocks the runtime: files are read and
//! compiled on a blocking thread. Tested in `tests.rs` beside it.

mod directory;
pub mod key_sets;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use anyhow::Context;
use tokio::sync::{Notify, watch};

use self::directory::Directory;
use crate::{
    state::{
        Problem,
        compile::{self, Settings},
        resource::Objects,
        snapshot::Snapshot,
    },
    watcher::Watcher,
};

pub use directory::{read_documents, read_text};

/// A running source. It runs for as long as any receiver of `snapshots` is held.
#[derive(Debug)]
pub struct Source {
    /// The compiled configuration; the first is there from the start.
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
    /// What is wrong with the configuration now.
    pub problems: watch::Receiver<Arc<[Problem]>>,
    /// Asks for another look (`SIGHUP`).
    pub reread: Reread,
    /// What has happened so far.
    pub counts: Arc<Counts>,
}

/// Asks the source to look at everything again, whatever it believes to have changed. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Reread(Arc<Notify>);

impl Reread {
    /// Looks again soon; returns at once.
    pub fn reread(&self) {
        self.0.notify_one();
    }
}

/// Counters since the start, for metrics.
#[derive(Debug, Default)]
pub struct Counts {
    /// Times the directory was read.
    pub reads: AtomicU64,
    /// Snapshots compiled.
    pub compiled: AtomicU64,
    /// Problems found, each counted once for as long as it lasts.
    pub problems: AtomicU64,
}

/// Starts watching a directory of manifests. Returns once the first load is compiled; later changes arrive in the
/// receivers.
///
/// # Errors
/// When the directory cannot be read or watched. Broken manifests are no error: they are problems.
pub async fn directory(dir: PathBuf, settings: Settings) -> anyhow::Result<Source> {
    // Watched before it is read: what changes in between is read twice rather than never.
    let watcher = Watcher::new(dir.clone()).with_context(|| format!("--config {}", dir.display()))?;
    let mut state = State {
        directory: Directory::new(dir.clone()),
        settings,
        objects: Objects::new(),
        compiled: Vec::new(),
        snapshot: Arc::new(Snapshot::default()),
        problems: BTreeSet::new(),
        foreign: BTreeSet::new(),
        counts: Arc::new(Counts::default()),
    };
    state = tokio::task::spawn_blocking(move || state.load().map(|()| state))
        .await?
        .with_context(|| format!("--config {}", dir.display()))?;
    let (snapshot_tx, snapshots) = watch::channel(Arc::clone(&state.snapshot));
    let (problem_tx, problems) = watch::channel(state.listed());
    let reread = Reread::default();
    let counts = Arc::clone(&state.counts);
    tokio::spawn(run(state, watcher, reread.clone(), snapshot_tx, problem_tx));
    Ok(Source { snapshots, problems, reread, counts })
}

/// Reads again at each change until nobody listens any more.
async fn run(
    mut state: State,
    mut watcher: Watcher,
    reread: Reread,
    snapshots: watch::Sender<Arc<Snapshot>>,
    problems: watch::Sender<Arc<[Problem]>>,
) {
    loop {
        tokio::select! {
            () = snapshots.closed() => return,
            () = watcher.changed() => {}
            () = reread.0.notified() => {}
        }
        let reloaded = tokio::task::spawn_blocking(move || {
            watcher.renew();
            state.reload();
            (state, watcher)
        });
        match reloaded.await {
            Ok(next) => (state, watcher) = next,
            Err(error) => {
                // Only a panic ends up here; the last snapshot stays in force.
                tracing::error!(%error, "the configuration is no longer followed; restart the agent");
                return;
            }
        }
        // Problems first: who waits for a snapshot finds what belongs to it.
        let listed = state.listed();
        problems.send_if_modified(|before| {
            let changed = **before != *listed;
            *before = listed;
            changed
        });
        snapshots.send_if_modified(|before| {
            let changed = !Arc::ptr_eq(before, &state.snapshot);
            *before = Arc::clone(&state.snapshot);
            changed
        });
    }
}

/// What is known between two reads.
struct State {
    directory: Directory,
    settings: Settings,
    objects: Objects,
    /// Problems of the last compile.
    compiled: Vec<Problem>,
    snapshot: Arc<Snapshot>,
    problems: BTreeSet<Problem>,
    /// Kinds that were said to be passed over.
    foreign: BTreeSet<String>,
    counts: Arc<Counts>,
}

impl State {
    /// The first read, which fails when the directory cannot be listed.
    fn load(&mut self) -> anyhow::Result<()> {
        self.directory.check()?;
        self.reload();
        if self.snapshot.revision == 0 {
            // An empty directory is a configuration too.
            self.compile();
        }
        Ok(())
    }

    fn reload(&mut self) {
        self.counts.reads.fetch_add(1, Ordering::Relaxed);
        self.directory.read();
        for kind in self.directory.foreign() {
            if !self.foreign.contains(&kind) {
                tracing::info!(
                    kind,
                    "configuration: objects of this kind are none of the mesh's and are passed over"
                );
                self.foreign.insert(kind);
            }
        }
        let (objects, mut found) = self.directory.merge();
        if !same(&objects, &self.objects) {
            self.objects = objects;
            self.compile();
        }
        found.extend(self.compiled.iter().cloned());
        self.note(found.into_iter().collect());
    }

    fn compile(&mut self) {
        let (snapshot, problems) = compile::compile(&self.objects, Some(&self.snapshot), &self.settings);
        self.counts.compiled.fetch_add(1, Ordering::Relaxed);
        tracing::info!(
            revision = snapshot.revision,
            services = snapshot.services.len(),
            addresses = snapshot.workloads.len(),
            "configuration compiled"
        );
        self.snapshot = Arc::new(snapshot);
        self.compiled = problems;
    }

    /// Logs and counts what is new.
    fn note(&mut self, found: BTreeSet<Problem>) {
        for problem in found.difference(&self.problems) {
            self.counts.problems.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(
                file = problem.file,
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

    fn listed(&self) -> Arc<[Problem]> {
        self.problems.iter().cloned().collect()
    }
}

/// Whether two sets hold the very same objects.
fn same(one: &Objects, other: &Objects) -> bool {
    one.len() == other.len()
        && one.iter().zip(other).all(|((key, object), (other_key, other_object))| {
            key == other_key && Arc::ptr_eq(object, other_object)
        })
}
