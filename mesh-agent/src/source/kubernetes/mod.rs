//! The API server of a cluster as a source: every kind that something is compiled from, watched.
//!
//! Promises that the first snapshot is compiled when everything there is has been listed once, within a bound; that what is
//! ready at once is compiled at once; and that the last snapshot stays in force while the API server cannot be asked, however
//! long. Never asks at regular times, and never for Secrets that nobody names. Each part says what else it promises:
//! `watch.rs` one watch, `definitions.rs` which kinds there are, `secrets.rs`, `prune.rs` what is kept, `mirror.rs` from news to
//! changes. Tested in `tests.rs`, against an API server of its own.

mod access;
mod addresses;
mod definitions;
mod described;
mod kinds;
mod mirror;
mod proposed;
mod prune;
mod retry;
mod secrets;
mod start;
#[cfg(test)]
pub(crate) mod tests;
mod watch;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::{Result, bail};
use kube::Api;
use tokio::{
    sync::{mpsc, watch as channel},
    time::{Instant, timeout_at},
};
use tokio_util::task::AbortOnDropHandle;

pub use self::access::Cluster;
pub(crate) use self::described::{Described, Description, Descriptions};
pub(crate) use self::proposed::read_proposed;
use self::{
    definitions::Definitions,
    kinds::{BUILT_IN, CONFIG_MAP, DEFINED, Kind, POD},
    mirror::Mirror,
    prune::Detail,
    secrets::Secrets,
    start::Starter,
    watch::{Told, Watch, WatchId, What},
};
pub(crate) use self::{retry::Retry, watch::unless_changed};
use super::{
    ByUid, Reread, Sandboxes, Source,
    in_force::{Followed, InForce},
    inquiry::Inquiries,
};
use crate::state::compile::{Change, Settings};

/// How long the first list of everything may take: an agent that knows only a part of the policies must not serve.
const FIRST_LISTS: Duration = Duration::from_mins(1);

/// How long the first list of the Secrets that are named may take. What is not there by then is a problem of the rule.
const FIRST_SECRETS: Duration = Duration::from_secs(5);

/// How often it is said what is waited for.
const SAY_SO: Duration = Duration::from_secs(5);

/// News that wait for a snapshot to be compiled: watches that have more wait too.
const NEWS: usize = 1024;

/// Name of the `ConfigMap` with mesh-wide settings.
const SETTINGS: &str = "mesh";

/// Pods that have not ended. One that ends leaves the list, as if it were deleted.
const RUNNING: &str = "status.phase!=Succeeded,status.phase!=Failed";

/// How long is waited for what.
#[derive(Debug, Clone)]
struct Patience {
    first_lists: Duration,
    retry: Retry,
}

impl Default for Patience {
    fn default() -> Self {
        Self { first_lists: FIRST_LISTS, retry: Retry::default() }
    }
}

/// The kinds of resource definitions that are read: name, name of the definition, and versions that are understood.
pub(crate) fn definitions() -> impl Iterator<Item = (&'static str, String, &'static [&'static str])> {
    DEFINED.iter().map(|kind| (kind.name, kind.definition(), kind.versions))
}

/// Starts following a cluster. Returns once the first configuration is compiled; later changes arrive in the receivers.
///
/// # Errors
/// When not everything could be listed within a minute; says what not, and why. Broken objects are no error: they are
/// problems.
pub async fn kubernetes(cluster: &Cluster, settings: Settings, sandboxes: &Sandboxes) -> Result<Source> {
    follow(cluster, settings, sandboxes, Patience::default()).await
}

async fn follow(
    cluster: &Cluster,
    settings: Settings,
    sandboxes: &Sandboxes,
    patience: Patience,
) -> Result<Source> {
    let (told, news) = mpsc::channel(NEWS);
    let (again, asked) = channel::channel(());
    let starter = Starter::new(cluster.client(), told, asked, patience.retry.clone());
    let watches = built_in(&starter, &settings);
    let mut waiting: BTreeSet<WatchId> = watches.iter().map(|watch| watch.id.clone()).collect();
    waiting.insert(WatchId::Definitions);
    let mut tasks: Vec<_> = watches.into_iter().map(|watch| starter.start(watch)).collect();
    tasks.push(AbortOnDropHandle::new(tokio::spawn(
        Definitions::new(starter.clone(), Detail::Whole).follow(),
    )));
    let mut follower = Follower {
        secrets: Secrets::new(starter, settings.clone()),
        in_force: InForce::new(settings),
        mirror: Mirror::default(),
        sandboxes: sandboxes.watch(),
        failing: BTreeMap::new(),
        news,
        waiting,
        _tasks: tasks,
    };
    let changes = follower.first_lists(patience.first_lists).await?;
    follower = follower.take(changes).await?;
    if let Some(changes) = follower.first_secrets().await? {
        follower = follower.take(changes).await?;
    }
    let (followed, inquiries, source) = follower.in_force.follow();
    tokio::spawn(run(follower, (followed, inquiries), source.reread.clone(), again));
    Ok(source)
}

/// The watches of what is always there.
fn built_in(starter: &Starter, settings: &Settings) -> Vec<Watch> {
    let of = |id: WatchId, kind: &'static Kind, fields: Option<String>, detail: Detail| {
        let version = kind.versions[0];
        let api = Api::all_with(starter.client(), &kind.resource(version));
        Watch { id, kind, version, api, fields, detail }
    };
    let all = |kind: &'static Kind| of(WatchId::All(kind.plural), kind, None, Detail::Whole);
    let mut watches: Vec<Watch> = BUILT_IN.iter().map(all).collect();
    // Those without a node yet have no address, and are nobody's endpoints.
    let others = match &settings.node {
        Some(node) => {
            let own = format!("spec.nodeName={node}");
            watches.push(of(WatchId::OwnPods, &POD, Some(own), Detail::Whole));
            format!("spec.nodeName!={node},spec.nodeName!=,{RUNNING}")
        }
        None => format!("spec.nodeName!=,{RUNNING}"),
    };
    watches.push(of(WatchId::OtherPods, &POD, Some(others), Detail::Elsewhere));
    let version = CONFIG_MAP.versions[0];
    let resource = CONFIG_MAP.resource(version);
    watches.push(Watch {
        id: WatchId::Settings,
        kind: &CONFIG_MAP,
        version,
        api: Api::namespaced_with(starter.client(), &settings.root_namespace, &resource),
        fields: Some(format!("metadata.name={SETTINGS}")),
        detail: Detail::Whole,
    });
    watches
}

/// What follows a cluster. All that runs for it ends with it.
struct Follower {
    in_force: InForce,
    mirror: Mirror,
    secrets: Secrets,
    /// What the network plugin told of this node's pods.
    sandboxes: channel::Receiver<ByUid>,
    /// Why which watch cannot go on.
    failing: BTreeMap<WatchId, String>,
    news: mpsc::Receiver<Told>,
    /// Watches whose first list is still to come.
    waiting: BTreeSet<WatchId>,
    _tasks: Vec<AbortOnDropHandle<()>>,
}

impl Follower {
    /// Takes note of what is told: whether it is news of objects.
    fn hear(&mut self, told: Told, changes: &mut Vec<Change>) -> bool {
        let Told { watch, what } = told;
        if !self.secrets.wants(&watch) {
            return false;
        }
        match &what {
            What::Begun => {
                self.waiting.insert(watch);
                return false;
            }
            What::Failing(reason) => {
                self.note(&watch, Some(reason));
                return false;
            }
            What::Listed(_) => drop(self.waiting.remove(&watch)),
            What::Set(_) | What::Gone(..) => {}
        }
        self.note(&watch, None);
        self.mirror.take(&watch, what, changes);
        true
    }

    /// Everything that is ready, if there are news of objects in it.
    fn hear_all(&mut self, first: Told) -> Option<Vec<Change>> {
        let mut changes = Vec::new();
        let mut is_news = self.hear(first, &mut changes);
        while let Ok(told) = self.news.try_recv() {
            is_news |= self.hear(told, &mut changes);
        }
        is_news.then_some(changes)
    }

    /// Takes changes over, on a thread that may compile for long.
    async fn take(mut self, mut changes: Vec<Change>) -> Result<Self> {
        addresses::complete(&mut changes, &self.sandboxes.borrow());
        let taken = tokio::task::spawn_blocking(move || {
            self.in_force.take(changes, self.mirror.problems());
            self
        });
        Ok(taken.await?)
    }

    /// Says once that a watch cannot go on, or does again.
    fn note(&mut self, watch: &WatchId, failing: Option<&String>) {
        match failing {
            Some(reason) if self.failing.get(watch) == Some(reason) => {}
            Some(reason) => {
                tracing::warn!(
                    watched = %watch,
                    reason,
                    "configuration: the API server cannot be asked; what is known stays in force"
                );
                self.failing.insert(watch.clone(), reason.clone());
            }
            None => {
                if self.failing.remove(watch).is_some() {
                    tracing::info!(watched = %watch, "configuration: followed again");
                }
            }
        }
    }

    /// Waits until everything there is was listed once.
    async fn first_lists(&mut self, bound: Duration) -> Result<Vec<Change>> {
        let (mut changes, deadline) = (Vec::new(), Instant::now() + bound);
        let mut say_so = Instant::now() + SAY_SO;
        while !self.waiting.is_empty() {
            match timeout_at(say_so.min(deadline), self.news.recv()).await {
                Ok(Some(told)) => drop(self.hear(told, &mut changes)),
                Ok(None) => bail!("the watches of the cluster have ended"),
                Err(_) if Instant::now() >= deadline => {
                    bail!(
                        "the configuration of the cluster was not there within {bound:?}: {}",
                        self.missing()
                    )
                }
                Err(_) => {
                    tracing::info!("configuration: waiting for the first list of {}", self.missing());
                    say_so = Instant::now() + SAY_SO;
                }
            }
        }
        Ok(changes)
    }

    /// The Secrets that are named from the start, if any, so that what needs them works from the start.
    async fn first_secrets(&mut self) -> Result<Option<Vec<Change>>> {
        self.waiting = self.secrets.follow(self.in_force.objects()).begun;
        if self.waiting.is_empty() {
            return Ok(None);
        }
        let (mut changes, deadline) = (Vec::new(), Instant::now() + FIRST_SECRETS);
        while !self.waiting.is_empty() {
            match timeout_at(deadline, self.news.recv()).await {
                Ok(Some(told)) => drop(self.hear(told, &mut changes)),
                Ok(None) => bail!("the watches of the cluster have ended"),
                Err(_) => {
                    tracing::warn!("configuration: goes on without {}", self.missing());
                    break;
                }
            }
        }
        Ok(Some(changes))
    }

    /// Watches the Secrets that are named now: what has gone with those that are not any more.
    fn follow_secrets(&mut self) -> Vec<Change> {
        let mut changes = Vec::new();
        for watch in self.secrets.follow(self.in_force.objects()).ended {
            self.failing.remove(&watch);
            self.mirror.take(&watch, What::Listed(Vec::new()), &mut changes);
        }
        changes
    }

    /// What is waited for, and why it is not there.
    fn missing(&self) -> String {
        let one = |watch: &WatchId| match self.failing.get(watch) {
            Some(reason) => format!("{watch} ({reason})"),
            None => watch.to_string(),
        };
        self.waiting.iter().map(one).collect::<Vec<_>>().join(", ")
    }
}

/// Follows the cluster until nobody listens any more. `again` has everything listed anew.
async fn run(
    mut follower: Follower,
    (followed, mut inquiries): (Followed, Inquiries),
    reread: Reread,
    again: channel::Sender<()>,
) {
    loop {
        let first = tokio::select! {
            () = followed.nobody_listens() => return,
            () = reread.0.notified() => {
                again.send_replace(());
                continue;
            }
            answer = inquiries.next() => {
                // Who has asked may have gone.
                let _ = answer.send(follower.in_force.configured());
                continue;
            }
            told = follower.news.recv() => told,
            Ok(()) = follower.sandboxes.changed() => None,
        };
        let changes = match first {
            Some(first) => follower.hear_all(first),
            None => Some(addresses::changes(follower.mirror.own_pods(), &follower.sandboxes.borrow())),
        };
        let Some(mut changes) = changes else { continue };
        loop {
            let names_secrets = changes.iter().any(|change| follower.secrets.may_depend_on(change));
            follower = match follower.take(changes).await {
                Ok(follower) => follower,
                Err(error) => {
                    // Only a panic ends up here; the last snapshot stays in force.
                    tracing::error!(%error, "the configuration is no longer followed; restart the agent");
                    return;
                }
            };
            followed.publish(&follower.in_force);
            changes = if names_secrets { follower.follow_secrets() } else { Vec::new() };
            if changes.is_empty() {
                break;
            }
        }
    }
}
