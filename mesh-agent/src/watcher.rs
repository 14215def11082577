//! Tells when something in a directory changed, through inotify.
//!
//! Promises to notice every change of its entries, and that the directory itself was taken away and came back.
//! Never says what changed: the reader compares. Tested in `source/tests.rs`.

use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use notify::{
    Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode},
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout, timeout_at},
};

/// How long nothing may happen before the directory is read: editors and copies write in several steps.
const QUIET: Duration = Duration::from_millis(50);

/// The longest that changes without a pause can put a read off.
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// How often to look for a directory that is gone, or that could not be watched.
const RETRY: Duration = Duration::from_secs(1);

/// Watches one directory.
#[derive(Debug)]
pub(crate) struct Watcher {
    dir: PathBuf,
    watched: Option<Watched>,
    changes: mpsc::Receiver<()>,
    changed: mpsc::Sender<()>,
}

#[derive(Debug)]
struct Watched {
    /// Device and inode: the same path may come to be another directory.
    identity: (u64, u64),
    /// Watches until dropped.
    _watcher: RecommendedWatcher,
}

impl Watcher {
    /// Starts watching.
    pub fn new(dir: PathBuf) -> anyhow::Result<Self> {
        // One waiting change is enough: it makes the reader look at everything.
        let (changed, changes) = mpsc::channel(1);
        let watched = Some(watch(&dir, changed.clone())?);
        Ok(Self { dir, watched, changes, changed })
    }

    /// Waits until something changed and then nothing did for a while.
    pub async fn changed(&mut self) {
        if self.watched.is_none() {
            // Time to look whether the directory is back.
            let _ = timeout(RETRY, self.changes.recv()).await;
            return;
        }
        self.changes.recv().await;
        let end = Instant::now() + LONGEST_WAIT;
        while Instant::now() < end {
            let quiet = end.min(Instant::now() + QUIET);
            if timeout_at(quiet, self.changes.recv()).await.is_err() {
                return;
            }
        }
    }

    /// Watches what is at the path now, if that is another directory than before.
    pub fn renew(&mut self) {
        let now = identity(&self.dir);
        if now.is_some() && now == self.watched.as_ref().map(|watched| watched.identity) {
            return;
        }
        self.watched = None;
        if now.is_none() {
            return;
        }
        match watch(&self.dir, self.changed.clone()) {
            Ok(watched) => self.watched = Some(watched),
            Err(error) => tracing::warn!("cannot watch {}: {error:#}", self.dir.display()),
        }
    }
}

fn identity(dir: &Path) -> Option<(u64, u64)> {
    let meta = std::fs::metadata(dir).ok().filter(std::fs::Metadata::is_dir)?;
    Some((meta.dev(), meta.ino()))
}

fn watch(dir: &Path, changed: mpsc::Sender<()>) -> anyhow::Result<Watched> {
    let Some(identity) = identity(dir) else {
        anyhow::bail!("{} is not a directory that can be read", dir.display());
    };
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
        // An error means that events may be lost: better to look once too often.
        if event.map_or(true, |event| matters(event.kind)) {
            // Full means that a look is due anyway.
            let _ = changed.try_send(());
        }
    })?;
    watcher.watch(dir, RecursiveMode::NonRecursive).map_err(|error| {
        let hint = "is fs.inotify.max_user_instances or max_user_watches used up?";
        anyhow::Error::new(error).context(format!("cannot watch {} ({hint})", dir.display()))
    })?;
    Ok(Watched { identity, _watcher: watcher })
}

/// Reading changes nothing, and we read.
fn matters(kind: EventKind) -> bool {
    !matches!(kind, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write))
}
