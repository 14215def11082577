//! Where the configuration comes from: a directory of manifests, or the API server of a cluster; both are watched.
//!
//! A source says what has become of which object ([`Change`](crate::state::compile::Change)); what comes of that is the same
//! for all (`in_force.rs`). Promises that the first snapshot is compiled when the function returns, that what is broken leaves
//! its last good state in force, and that each problem is logged once. Never blocks the runtime: files are read and all is
//! compiled on a blocking thread. Tested in `tests.rs` and `kubernetes/tests.rs` beside it.

mod directory;
mod file;
mod in_force;
mod inquiry;
pub mod key_sets;
pub(crate) mod kubernetes;
mod named;
mod sandboxes;
#[cfg(test)]
mod tests;
pub mod validate;

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{Arc, atomic::AtomicU64},
};

use anyhow::Context;
use tokio::sync::{Notify, watch};

use self::{
    directory::{Directory, Look},
    in_force::{Followed, InForce},
    inquiry::Inquiries,
};
use crate::{
    state::{Problem, compile::Settings, snapshot::Snapshot},
    watcher::{Pace, Seen, Watcher},
};

pub use directory::read_text;
pub use file::read_documents;
pub use inquiry::Inquiry;
pub use kubernetes::{Cluster, kubernetes};
pub(crate) use kubernetes::{Retry, definitions, unless_changed};
pub use sandboxes::{ByUid, Sandbox, Sandboxes};

/// A running source. It runs for as long as any receiver of `snapshots` is held.
#[derive(Debug)]
pub struct Source {
    /// The compiled configuration; the first is there from the start.
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
    /// What is wrong with the configuration now.
    pub problems: watch::Receiver<Arc<[Problem]>>,
    /// Asks for another look (`SIGHUP`).
    pub reread: Reread,
    /// Asks for the objects that there are.
    pub inquiry: Inquiry,
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
    /// Times the directory was read, or objects of a cluster were taken over.
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
    let mut watcher =
        Watcher::new(dir.clone(), Pace::EachFile).with_context(|| format!("--config {}", dir.display()))?;
    let mut state = State {
        directory: Directory::new(dir.clone()).serving(settings.gateway.is_some()),
        in_force: InForce::new(settings),
        foreign: BTreeSet::new(),
    };
    let loading = tokio::task::spawn_blocking(move || {
        state.load()?;
        state.follow(&mut watcher);
        anyhow::Ok((state, watcher))
    });
    let (state, watcher) = loading.await?.with_context(|| format!("--config {}", dir.display()))?;
    let (followed, inquiries, source) = state.in_force.follow();
    tokio::spawn(run(state, watcher, source.reread.clone(), followed, inquiries));
    Ok(source)
}

/// Reads again at each change until nobody listens any more.
async fn run(
    mut state: State,
    mut watcher: Watcher,
    reread: Reread,
    followed: Followed,
    mut inquiries: Inquiries,
) {
    loop {
        let look = tokio::select! {
            () = followed.nobody_listens() => return,
            seen = watcher.changed() => match seen {
                Seen::Entries(names) => Look::Entries(names),
                Seen::Anything => Look::Anything,
            },
            () = reread.0.notified() => Look::Everything,
            answer = inquiries.next() => {
                // Who has asked may have gone.
                let _ = answer.send(state.in_force.configured());
                continue;
            }
        };
        let reloaded = tokio::task::spawn_blocking(move || {
            let look = if watcher.renew() { Look::Anything } else { look };
            state.reload(&look);
            state.follow(&mut watcher);
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
        followed.publish(&state.in_force);
    }
}

/// What is known between two reads.
struct State {
    directory: Directory,
    in_force: InForce,
    /// Kinds that were said to be passed over.
    foreign: BTreeSet<String>,
}

impl State {
    /// The first read, which fails when the directory cannot be listed.
    fn load(&mut self) -> anyhow::Result<()> {
        self.directory.check()?;
        self.reload(&Look::Everything);
        Ok(())
    }

    fn reload(&mut self, look: &Look) {
        let changes = self.directory.read(look, self.in_force.objects());
        for kind in self.directory.foreign() {
            if !self.foreign.contains(kind) {
                tracing::info!(
                    kind,
                    "configuration: objects of this kind are none of the mesh's and are passed over"
                );
                self.foreign.insert(kind.to_owned());
            }
        }
        self.in_force.take(changes, self.directory.problems());
    }

    /// Watches wherever the configuration is now. What has changed before that shows in another look.
    fn follow(&mut self, watcher: &mut Watcher) {
        if watcher.follow(self.directory.places()) {
            self.reload(&Look::Anything);
        }
    }
}
