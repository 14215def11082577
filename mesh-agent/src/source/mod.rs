//! Where the configuration comes from: a directory of manifests, watched.
//!
//! A source says what has become of which object ([`Change`]), so that another one (a Kubernetes watch) can stand in its
//! place or beside it. Promises that the first snapshot is compiled when the function returns, that a broken manifest leaves its
//! last good state in force, and that each problem is logged once. Never blocks the runtime: files are read and
//! compiled on a blocking thread. Tested in `tests.rs` beside it.

mod directory;
mod file;
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

use self::directory::{Directory, Look};
use crate::{
    state::{
        Problem,
        compile::{Change, Compiled, Settings},
        snapshot::Snapshot,
    },
    watcher::{Pace, Seen, Watcher},
};

pub use directory::read_text;
pub use file::read_documents;

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
    let watcher =
        Watcher::new(dir.clone(), Pace::EachFile).with_context(|| format!("--config {}", dir.display()))?;
    let mut state = State {
        directory: Directory::new(dir.clone()),
        compiled: Compiled::new(settings),
        problems: BTreeSet::new(),
        foreign: BTreeSet::new(),
        counts: Arc::new(Counts::default()),
    };
    state = tokio::task::spawn_blocking(move || state.load().map(|()| state))
        .await?
        .with_context(|| format!("--config {}", dir.display()))?;
    let (snapshot_tx, snapshots) = watch::channel(Arc::clone(state.compiled.snapshot()));
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
        let look = tokio::select! {
            () = snapshots.closed() => return,
            seen = watcher.changed() => match seen {
                Seen::Entries(names) => Look::Entries(names),
                Seen::Anything => Look::Anything,
            },
            () = reread.0.notified() => Look::Everything,
        };
        let reloaded = tokio::task::spawn_blocking(move || {
            let look = if watcher.renew() { Look::Anything } else { look };
            state.reload(&look);
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
            let changed = !Arc::ptr_eq(before, state.compiled.snapshot());
            *before = Arc::clone(state.compiled.snapshot());
            changed
        });
    }
}

/// What is known between two reads.
struct State {
    directory: Directory,
    compiled: Compiled,
    problems: BTreeSet<Problem>,
    /// Kinds that were said to be passed over.
    foreign: BTreeSet<String>,
    counts: Arc<Counts>,
}

impl State {
    /// The first read, which fails when the directory cannot be listed.
    fn load(&mut self) -> anyhow::Result<()> {
        self.directory.check()?;
        self.reload(&Look::Everything);
        Ok(())
    }

    fn reload(&mut self, look: &Look) {
        self.counts.reads.fetch_add(1, Ordering::Relaxed);
        let changes = self.directory.read(look, self.compiled.objects());
        for kind in self.directory.foreign() {
            if !self.foreign.contains(kind) {
                tracing::info!(
                    kind,
                    "configuration: objects of this kind are none of the mesh's and are passed over"
                );
                self.foreign.insert(kind.to_owned());
            }
        }
        // An empty directory is a configuration too.
        if !changes.is_empty() || self.compiled.snapshot().revision == 0 {
            self.compile(changes);
        }
        let found = self.directory.problems().chain(self.compiled.problems());
        let found = found.cloned().collect();
        self.note(found);
    }

    fn compile(&mut self, changes: Vec<Change>) {
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
