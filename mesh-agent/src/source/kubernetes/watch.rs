//! One watch: the objects of a kind that the API server has, and what becomes of them.
//!
//! Promises that a first list is whole (pages, then told at once), that a watch goes on where it was cut off, that after an
//! answer 410 it is listed anew and what has gone meanwhile is told too, and that between two failures it waits, longer each
//! time and never as long as the others, but no longer than until one of those is answered again. What it has told stays in force
//! meanwhile. Never asks at regular times.
//! Tested in `tests/`.

use std::{collections::HashSet, fmt, pin::pin, sync::Arc, time::Duration};

use futures_util::StreamExt as _;
use kube::{
    Api,
    core::DynamicObject,
    runtime::{
        utils::Backoff,
        watcher::{self, Event, watcher},
    },
};
use tokio::sync::{mpsc, watch};

use super::{
    described::Said,
    kinds::Kind,
    prune::{Detail, pruned},
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
    pub async fn follow(self, told: mpsc::Sender<Told>, mut again: watch::Receiver<()>, retry: Retry) {
        again.mark_unchanged();
        loop {
            tokio::select! {
                () = self.until_told_no_more(&told, retry.clone()) => return,
                changed = again.changed() => if changed.is_err() { return },
            }
        }
    }

    async fn until_told_no_more(&self, told: &mpsc::Sender<Told>, mut retry: Retry) {
        let config = watcher::Config { field_selector: self.fields.clone(), ..config() };
        let mut events = pin!(watcher(self.api.clone(), config));
        let (mut listed, mut names) = (Vec::new(), HashSet::new());
        while let Some(event) = events.next().await {
            let failed = event.is_err();
            // A list begins before anybody has answered.
            if !failed && !matches!(event, Ok(Event::Init)) {
                retry.answered();
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
                retry.wait().await;
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

/// How long it is waited before the next try. Clones know of each other: once one is answered again, the others need not wait.
#[derive(Debug, Clone)]
pub struct Retry {
    least: Duration,
    most: Duration,
    next: Duration,
    /// There was no answer since this one waited.
    failing: bool,
    /// Changes when one of them is answered again.
    back: Arc<watch::Sender<()>>,
    seen: watch::Receiver<()>,
}

impl Retry {
    /// From the first failure on, up to the most.
    pub fn new(least: Duration, most: Duration) -> Self {
        let (back, seen) = watch::channel(());
        Self { least, most, next: least, failing: false, back: Arc::new(back), seen }
    }

    /// Until the next try is due: never sooner than the least, or two that are answered in turn would not let each other rest.
    pub async fn wait(&mut self) {
        self.failing = true;
        let time = self.next().unwrap_or(self.most);
        tokio::time::sleep(self.least.min(time)).await;
        tokio::select! {
            () = tokio::time::sleep(time.saturating_sub(self.least)) => {}
            // The sender is here.
            _ = self.seen.changed() => {}
        }
    }

    /// There was an answer.
    pub fn answered(&mut self) {
        if std::mem::take(&mut self.failing) {
            self.reset();
            self.back.send_replace(());
            self.seen.mark_unchanged();
        }
    }
}

impl Default for Retry {
    /// As client-go has it: 0.8 to 30 seconds.
    fn default() -> Self {
        Self::new(Duration::from_millis(800), Duration::from_secs(30))
    }
}

impl Iterator for Retry {
    type Item = Duration;

    /// Between one and two times what it is: a thousand agents do not come back at the same moment.
    fn next(&mut self) -> Option<Duration> {
        let now = self.next;
        self.next = (now * 2).min(self.most);
        Some(now.mul_f64(1.0 + fastrand::f64()))
    }
}

impl Backoff for Retry {
    fn reset(&mut self) {
        self.next = self.least;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_wait_is_longer_than_the_one_before_up_to_the_most() {
        let (least, most) = (Duration::from_millis(100), Duration::from_secs(1));
        let mut retry = Retry::new(least, most);
        for base in [100, 200, 400, 800, 1000, 1000].map(Duration::from_millis) {
            let wait = retry.next().unwrap_or_default();
            assert!(wait >= base && wait <= base * 2, "{wait:?} for {base:?}");
        }
        retry.reset();
        assert!(retry.next().is_some_and(|wait| wait <= least * 2));
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_on_once_another_is_answered() {
        let (least, hour) = (Duration::from_secs(1), Duration::from_hours(1));
        let mut one = Retry { next: hour, ..Retry::new(least, hour) };
        let (mut waiting, mut late) = (one.clone(), one.clone());
        let began = tokio::time::Instant::now();
        // An answer of who had not failed is no news.
        one.answered();
        one.failing = true;
        tokio::join!(waiting.wait(), async {
            tokio::time::sleep(least * 2).await;
            one.answered();
        });
        assert_eq!(began.elapsed(), least * 2);
        // Who was asking at that moment hears of it too, and each hears of it once.
        late.wait().await;
        assert_eq!(began.elapsed(), least * 3);
        assert_eq!(one.next, least);
        for retry in [one, waiting, late] {
            let mut retry = Retry { next: hour, ..retry };
            let began = tokio::time::Instant::now();
            retry.wait().await;
            assert!(began.elapsed() >= hour);
        }
    }
}
