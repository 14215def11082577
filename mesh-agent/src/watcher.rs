//! Tells when something in a directory changed, or in others that belong to it, through inotify.
//!
//! Promises to notice every change of its entries, and that the directory itself was taken away and came back; and to tell of
//! a file that is complete within milliseconds, of one that is still being written once that has ended. Which entries it names
//! is where to look, not what has changed: the reader compares. Tested below and in `source/tests.rs`.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::{OsStr, OsString},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use notify::{
    Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode, ModifyKind, RenameMode},
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout, timeout_at},
};

/// How long nothing more may happen before what is complete is looked at: who writes several files writes on.
const SETTLED: Duration = Duration::from_millis(5);

/// How long nothing may happen before anything else is looked at: a file that is being written, or has gone and may be about
/// to come back (editors and copies write in several steps); and what comes soon after another change.
const QUIET: Duration = Duration::from_millis(50);

/// The longest that changes without a pause can put a look off.
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// How often to look for a directory that is gone, or that could not be watched.
const RETRY: Duration = Duration::from_secs(1);

/// What whoever watches makes of changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pace {
    /// Each file is a whole: it is told as soon as it is complete.
    EachFile,
    /// Files belong together, and are told once all of them are at rest.
    Together,
}

/// Where to look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Seen {
    /// At these entries of the directory.
    Entries(BTreeSet<OsString>),
    /// At all of them: nobody knows what has changed.
    Anything,
}

/// Watches one directory, and what is found to belong to it.
#[derive(Debug)]
pub(crate) struct Watcher {
    dir: PathBuf,
    pace: Pace,
    watched: Option<Watched>,
    changes: mpsc::Receiver<()>,
    events: Events,
    /// When changes were told last.
    told: Option<Instant>,
}

#[derive(Debug)]
struct Watched {
    /// Device and inode: the same path may come to be another directory.
    identity: Identity,
    /// The others, each as it was when it was last looked for.
    others: BTreeMap<PathBuf, Identity>,
    /// Watches until dropped.
    watcher: RecommendedWatcher,
}

/// Device and inode.
type Identity = (u64, u64);

/// What has happened and was not told yet.
#[derive(Debug, Clone)]
struct Events {
    waiting: Arc<Mutex<Waiting>>,
    /// One message is enough: what has happened is in `waiting`.
    happened: mpsc::Sender<()>,
}

#[derive(Debug, Default)]
struct Waiting {
    entries: BTreeSet<OsString>,
    /// Entries of which more is to come.
    half: BTreeSet<OsString>,
    anything: bool,
}

impl Watcher {
    /// Starts watching.
    pub fn new(dir: PathBuf, pace: Pace) -> anyhow::Result<Self> {
        let (happened, changes) = mpsc::channel(1);
        let events = Events { waiting: Arc::default(), happened };
        let watched = Some(watch(&dir, events.clone())?);
        Ok(Self { dir, pace, watched, changes, events, told: None })
    }

    /// Waits until something changed and then nothing did for a while; and says what it was.
    pub async fn changed(&mut self) -> Seen {
        if self.watched.is_none() {
            // Time to look whether the directory is back.
            let _ = timeout(RETRY, self.changes.recv()).await;
            drop(self.events.take());
            return Seen::Anything;
        }
        self.changes.recv().await;
        let end = Instant::now() + LONGEST_WAIT;
        let follows = self.told.is_some_and(|told| told.elapsed() < QUIET);
        let patient = follows || self.pace == Pace::Together;
        while Instant::now() < end {
            let wait = if patient || self.events.is_half() { QUIET } else { SETTLED };
            if timeout_at(end.min(Instant::now() + wait), self.changes.recv()).await.is_err() {
                break;
            }
        }
        self.told = Some(Instant::now());
        self.events.take()
    }

    /// Watches what is at the path now, if that is another directory than before. Whether it is, or is none: then anything may
    /// have changed.
    pub fn renew(&mut self) -> bool {
        let now = identity(&self.dir);
        if now.is_some() && now == self.watched.as_ref().map(|watched| watched.identity) {
            return false;
        }
        self.watched = None;
        if now.is_none() {
            return true;
        }
        match watch(&self.dir, self.events.clone()) {
            Ok(watched) => self.watched = Some(watched),
            Err(error) => tracing::warn!("cannot watch {}: {error:#}", self.dir.display()),
        }
        true
    }

    /// Watches these directories besides, as far as they are there, and no others any more; what happens in one is told as
    /// [`Seen::Anything`]. Whether one is watched now that was not, so that it may have changed before.
    pub fn follow(&mut self, wanted: BTreeSet<PathBuf>) -> bool {
        let Some(Watched { identity: own, others, watcher }) = &mut self.watched else { return false };
        let mut new = false;
        let found = |dir: PathBuf| identity(&dir).filter(|found| found != own).map(|found| (dir, found));
        let wanted: BTreeMap<PathBuf, Identity> = wanted.into_iter().filter_map(found).collect();
        others.retain(|dir, was| {
            let stays = wanted.get(dir) == Some(was);
            if !stays {
                // Gone by itself, where the directory has.
                let _ = watcher.unwatch(dir);
            }
            stays
        });
        for (dir, identity) in wanted {
            // One directory has one watch, by whatever names.
            if others.values().any(|other| *other == identity) {
                continue;
            }
            match watcher.watch(&dir, RecursiveMode::NonRecursive) {
                Ok(()) => {
                    others.insert(dir, identity);
                    new = true;
                }
                Err(error) => tracing::warn!("cannot watch {}: {error}", dir.display()),
            }
        }
        new
    }
}

fn identity(dir: &Path) -> Option<Identity> {
    let meta = std::fs::metadata(dir).ok().filter(std::fs::Metadata::is_dir)?;
    Some((meta.dev(), meta.ino()))
}

impl Events {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // It is whole after every change, so a panic elsewhere does not make it wrong.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether more may be to come: of files elsewhere nobody knows what belongs together.
    fn is_half(&self) -> bool {
        let waiting = self.waiting();
        waiting.anything || !waiting.half.is_empty()
    }

    fn take(&self) -> Seen {
        let Waiting { entries, anything, .. } = std::mem::take(&mut *self.waiting());
        if anything { Seen::Anything } else { Seen::Entries(entries) }
    }

    /// Takes note of what the system tells.
    fn note(&self, event: notify::Result<Event>, dir: &Path) {
        let mut waiting = self.waiting();
        match event {
            Ok(event) if !matters(event.kind) => return,
            Ok(event) if !event.need_rescan() && !event.paths.is_empty() => {
                for path in &event.paths {
                    match path.file_name().filter(|_| path.parent() == Some(dir)) {
                        Some(name) => waiting.note(name, is_complete(event.kind)),
                        None => waiting.anything = true,
                    }
                }
            }
            // Events are lost, or may be: better to look once too often.
            Ok(_) | Err(_) => waiting.anything = true,
        }
        // Full means that it is about to be looked at anyway.
        let _ = self.happened.try_send(());
    }
}

impl Waiting {
    fn note(&mut self, entry: &OsStr, is_complete: bool) {
        if is_complete {
            self.half.remove(entry);
        } else if !self.half.contains(entry) {
            self.half.insert(entry.to_owned());
        }
        if !self.entries.contains(entry) {
            self.entries.insert(entry.to_owned());
        }
    }
}

fn watch(dir: &Path, events: Events) -> anyhow::Result<Watched> {
    let Some(identity) = identity(dir) else {
        anyhow::bail!("{} is not a directory that can be read", dir.display());
    };
    let watched = dir.to_owned();
    let mut watcher = notify::recommended_watcher(move |event| events.note(event, &watched))?;
    watcher.watch(dir, RecursiveMode::NonRecursive).map_err(|error| {
        let hint = "is fs.inotify.max_user_instances or max_user_watches used up?";
        anyhow::Error::new(error).context(format!("cannot watch {} ({hint})", dir.display()))
    })?;
    Ok(Watched { identity, others: BTreeMap::new(), watcher })
}

/// Whether a file is as whoever writes it wants it: closed after it was written, or moved here.
fn is_complete(kind: EventKind) -> bool {
    matches!(
        kind,
        EventKind::Access(AccessKind::Close(AccessMode::Write))
            | EventKind::Modify(ModifyKind::Name(RenameMode::To | RenameMode::Both))
    )
}

/// Reading changes nothing, and we read.
fn matters(kind: EventKind) -> bool {
    !matches!(kind, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::{fs, io::Write as _};

    use super::*;

    fn entries(names: &[&str]) -> Seen {
        Seen::Entries(names.iter().map(OsString::from).collect())
    }

    #[tokio::test]
    async fn the_entries_that_changed_are_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("same"), "").unwrap();
        let mut watcher = Watcher::new(dir.path().to_owned(), Pace::EachFile).unwrap();
        fs::write(dir.path().join("written"), "x").unwrap();
        assert_eq!(watcher.changed().await, entries(&["written"]));
        fs::rename(dir.path().join("written"), dir.path().join("moved")).unwrap();
        assert_eq!(watcher.changed().await, entries(&["moved", "written"]));
        fs::remove_file(dir.path().join("moved")).unwrap();
        assert_eq!(watcher.changed().await, entries(&["moved"]));
        fs::remove_dir_all(dir.path()).unwrap();
        assert_eq!(watcher.changed().await, Seen::Anything);
    }

    /// What is half written is waited for, however early the rest of the directory has settled.
    #[tokio::test]
    async fn a_file_that_is_being_written_is_one_change() {
        let dir = tempfile::tempdir().unwrap();
        let mut watcher = Watcher::new(dir.path().to_owned(), Pace::EachFile).unwrap();
        let mut file = fs::File::create(dir.path().join("a")).unwrap();
        file.write_all(b"half").unwrap();
        watcher.changes.recv().await;
        assert!(watcher.events.is_half());
        drop(file);
        while watcher.events.is_half() {
            watcher.changes.recv().await;
        }
        assert_eq!(watcher.events.take(), entries(&["a"]));
    }

    #[test]
    fn events_without_a_path_may_be_about_anything() {
        let (happened, _changes) = mpsc::channel(1);
        let events = Events { waiting: Arc::default(), happened };
        let lost = Event::new(EventKind::Other).set_flag(notify::event::Flag::Rescan);
        for event in [Ok(lost), Ok(Event::new(EventKind::Any)), Err(notify::Error::generic("?"))] {
            events.note(event, Path::new("/dir"));
            assert_eq!(events.take(), Seen::Anything);
        }
        events.note(Ok(Event::new(EventKind::Any).add_path("/dir/sub/a".into())), Path::new("/dir"));
        assert_eq!(events.take(), Seen::Anything, "not an entry");
        events.note(
            Ok(Event::new(EventKind::Access(AccessKind::Read)).add_path("/dir/a".into())),
            Path::new("/dir"),
        );
        assert_eq!(events.take(), entries(&[]));
    }
}
