//! One watch: the objects of a kind that the API server has, and what becomes of them.
//!
//! Promises that a first list is whole (pages, then told at once), that a watch goes on where it was cut off, that after an
//! answer 410 it is listed anew and what has gone meanwhile is told too, and that between two failures it waits, longer each
//! time and never as long as the others, but no longer than until one of those is answered again. What it has told stays in force
//! meanwhile. Never asks at regular times.
//! Tested in `tests/`.

use std::{collections::HashSet, fmt, pin::pin, sync::Arc};

use futures_util::{Stream, StreamExt as _};
use kube::{
    Api,
    core::DynamicObject,
    runtime::watcher::{self, Event, watcher},
};
use tokio::sync::{mpsc, watch};

use super::{
    described::Said,
    kinds::Kind,
    prune::{Detail, pruned},
    retry::Waits,
};
use crate::{
    source::file::{ReadResult, hash_of, read_object, share},
    state::resource::{ObjectKey, Origin, Refused, Resource, authorization_policy},
};

/// How long the API server keeps a watch open that has nothing to tell, seconds. Five seconds later one that says nothing, its
/// end neither, is taken for cut off.
const OPEN: u32 = 120;

/// Objects in one page of a list, as client-go has it.
const PAGE: u32 = 500;

/// Which watch.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum WatchId {
    /// All objects of a kind, by its plural.
    All(&'static str),
    /// The pods of this node.
    OwnPods,
    /// The pods of other nodes.
    OtherPods,
    /// Mesh-wide settings.
    Settings,
    /// One Secret, by namespace and name.
    Secret(Arc<str>, Arc<str>),
    /// Which kinds are defined.
    Definitions,
}

impl fmt::Display for WatchId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All(plural) => f.write_str(plural),
            Self::OwnPods => f.write_str("pods of this node"),
            Self::OtherPods => f.write_str("pods of other nodes"),
            Self::Settings => f.write_str("the ConfigMap of mesh-wide settings"),
            Self::Secret(namespace, name) => write!(f, "Secret {namespace}/{name}"),
            Self::Definitions => f.write_str("customresourcedefinitions"),
        }
    }
}

/// News of a watch.
#[derive(Debug)]
pub(super) struct Told {
    /// Which one's.
    pub watch: WatchId,
    /// What is new.
    pub what: What,
}

/// What is new.
#[derive(Debug)]
pub(super) enum What {
    /// The watch is there; its first list is to come.
    Begun,
    /// These are all.
    Listed(Vec<Seen>),
    /// This one is there, new or otherwise than before.
    Set(Box<Seen>),
    /// The one of this UID is there no more.
    Gone(ObjectKey, u64),
    /// It cannot be asked, for this reason, and is asked again.
    Failing(String),
}

/// An object as it was read.
#[derive(Debug)]
pub(super) struct Seen {
    /// Which one.
    pub key: ObjectKey,
    /// Hash of its UID: there may be another one of the name later.
    pub uid: u64,
    /// Hash of what was kept of it.
    pub hash: u64,
    /// What it says.
    pub read: Result<Resource, Refused>,
    /// What holds in its place while there is no good state of it.
    pub stand_in: Option<Resource>,
    /// What its status says, where that is asked for.
    pub said: Option<Box<Said>>,
}

/// What is watched.
pub(super) struct Watch {
    /// Which one it is.
    pub id: WatchId,
    /// The kind of its objects.
    pub kind: &'static Kind,
    /// Its version.
    pub version: &'static str,
    /// Where its objects are.
    pub api: Api<DynamicObject>,
    /// Which of them, by their fields.
    pub fields: Option<String>,
    /// How much of them is kept.
    pub detail: Detail,
}

impl Watch {
    /// Tells what there is and what becomes of it, until nobody listens. Lists anew when `again` changes.
    pub async fn follow(self, told: mpsc::Sender<Told>, mut again: watch::Receiver<()>, waits: Waits) {
        again.mark_unchanged();
        loop {
            let config = watcher::Config { field_selector: self.fields.clone(), ..config() };
            let events = watcher(self.api.clone(), config);
            tokio::select! {
                () = self.until_told_no_more(events, &told, waits.clone()) => return,
                changed = again.changed() => if changed.is_err() { return },
            }
        }
    }

    async fn until_told_no_more(
        &self,
        events: impl Stream<Item = watcher::Result<Event<DynamicObject>>>,
        told: &mpsc::Sender<Told>,
        mut waits: Waits,
    ) {
        let mut events = pin!(events);
        let (mut listed, mut names) = (Vec::new(), HashSet::new());
        while let Some(event) = events.next().await {
            let failed = event.is_err();
            // A list begins before anybody has answered.
            if !failed && !matches!(event, Ok(Event::Init)) {
                waits.answered();
            }
            let what = match event {
                Ok(Event::Init) => {
                    listed = Vec::new();
                    continue;
                }
                Ok(Event::InitApply(object)) => {
                    listed.push(self.seen(object, &mut names));
                    continue;
                }
                Ok(Event::InitDone) => What::Listed(std::mem::take(&mut listed)),
                Ok(Event::Apply(object)) => What::Set(Box::new(self.seen(object, &mut names))),
                Ok(Event::Delete(object)) => What::Gone(self.key(&object, &mut names), uid(&object)),
                Err(error) => What::Failing(reason(&error)),
            };
            if told.send(Told { watch: self.id.clone(), what }).await.is_err() {
                return;
            }
            if failed {
                waits.wait().await;
            }
        }
    }

    fn key(&self, object: &DynamicObject, names: &mut HashSet<Arc<str>>) -> ObjectKey {
        let text = |text: &Option<String>| Arc::from(text.as_deref().unwrap_or_default());
        let (mut kind, mut namespace) = (self.kind.name.into(), text(&object.metadata.namespace));
        share(names, &mut kind);
        share(names, &mut namespace);
        ObjectKey { kind, namespace, name: text(&object.metadata.name) }
    }

    fn seen(&self, object: DynamicObject, names: &mut HashSet<Arc<str>>) -> Seen {
        let (key, uid) = (self.key(&object, names), uid(&object));
        let api_version = self.kind.resource(self.version).api_version;
        let described = self.detail == Detail::Described;
        let said = described.then(|| Box::new(Said::by(self.kind, self.version, &object)));
        let value = pruned(self.kind, &api_version, self.detail, object);
        let hash = hash_of(&value);
        let read: ReadResult = read_object(&value, Origin::ApiServer);
        let stand_in = read.is_err().then(|| authorization_policy::stand_in(&key, &value)).flatten();
        let stand_in = stand_in.map(|policy| Resource::AuthorizationPolicy(Box::new(policy)));
        let read = read.map(|(_, resource)| resource);
        let read = read.map_err(|refused| Refused { key: Some(key.clone()), ..refused });
        Seen { key, uid, hash, read, stand_in, said }
    }
}

/// How everything is watched.
pub(super) fn config() -> watcher::Config {
    watcher::Config::default().timeout(OPEN).page_size(PAGE)
}

fn uid(object: &DynamicObject) -> u64 {
    hash_of(&object.metadata.uid)
}

/// What an operator can do something with.
pub(super) fn reason(error: &watcher::Error) -> String {
    let cause = match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => error,
        watcher::Error::WatchError(status) => return format!("{} ({})", status.message, status.code),
        watcher::Error::NoResourceVersion => return error.to_string(),
    };
    match cause {
        kube::Error::Api(status) if status.code == 403 => {
            format!("{}: its role has to allow list and watch (docs/kubernetes.md)", status.message)
        }
        kube::Error::Api(status) => format!("{} ({})", status.message, status.code),
        error => format!("{:#}", anyhow::Error::msg(error.to_string())),
    }
}

/// What has gone, or has changed since it was read, is written by nobody: then there is news of it, and that is no failure.
///
/// # Errors
/// All others.
pub fn unless_changed<T>(written: kube::Result<T>) -> kube::Result<()> {
    match written {
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        other => other.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::stream;

    use super::{
        super::{kinds::POD, retry::Retry, tests::fake::Fake},
        *,
    };

    fn watch_of_pods(fake: &Fake) -> Watch {
        let (kind, version) = (&POD, POD.versions[0]);
        let api = Api::all_with(fake.cluster().client(), &kind.resource(version));
        Watch { id: WatchId::All(kind.plural), kind, version, api, fields: None, detail: Detail::Whole }
    }

    #[tokio::test(start_paused = true)]
    async fn lists_that_fail_do_not_wake_one_another() {
        let fake = Fake::start().await;
        let (told, mut heard) = mpsc::channel(1);
        let waits = Waits::from(Retry::default());
        // A list that is refused begins each time, and so far nobody has answered.
        let refused = || {
            let turns = stream::iter([true, false]).cycle();
            turns.map(|begins| if begins { Ok(Event::Init) } else { Err(watcher::Error::NoResourceVersion) })
        };
        let (one, other) = (watch_of_pods(&fake), watch_of_pods(&fake));
        let failing = async {
            let mut failures = 0;
            while let Some(Told { what, .. }) = heard.recv().await {
                failures += u32::from(matches!(what, What::Failing(_)));
                // Half an hour of them, for whoever keeps waking the others.
                assert!(failures < 1000, "nobody waits");
            }
            failures
        };
        let following = async {
            let both = futures_util::future::join(
                one.until_told_no_more(refused(), &told, waits.clone()),
                other.until_told_no_more(refused(), &told, waits.clone()),
            );
            let _ = tokio::time::timeout(Duration::from_mins(10), both).await;
            drop(told);
        };
        let ((), failures) = tokio::join!(following, failing);
        // Of each: some six until the longest wait, of 30 to 60 seconds, and then one for each of these.
        assert!((20..60).contains(&failures), "{failures} failures in ten minutes");
    }
}
