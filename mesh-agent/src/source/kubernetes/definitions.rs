//! Which kinds of resource definitions there are: their watches begin when somebody installs them, and end with them.
//!
//! Promises that a kind which is not there is no failure, that of the versions that are served the best understood is
//! watched, and that the objects of a definition which has gone have gone too. Learns of definitions by a watch of their
//! metadata, and asks for what is served only then. Tested in `tests/definitions.rs`.

use std::{
    collections::{BTreeMap, BTreeSet},
    pin::pin,
};

use futures_util::StreamExt as _;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{
    Api,
    core::PartialObjectMeta,
    runtime::watcher::{Event, watcher},
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    kinds::{DEFINED, Kind},
    prune::Detail,
    start::Starter,
    watch::{Told, Watch, WatchId, What, config, reason},
};

/// The watches of defined kinds.
pub(super) struct Definitions {
    starter: Starter,
    /// How much is kept of their objects.
    detail: Detail,
    /// By the plural of their kind.
    running: BTreeMap<&'static str, Running>,
    /// Definitions that are there, of which it has to be asked what is served.
    unclear: BTreeSet<&'static str>,
}

struct Running {
    version: &'static str,
    task: AbortOnDropHandle<()>,
}

type Meta = PartialObjectMeta<CustomResourceDefinition>;

impl Definitions {
    /// None yet.
    pub fn new(starter: Starter, detail: Detail) -> Self {
        Self { starter, detail, running: BTreeMap::new(), unclear: BTreeSet::new() }
    }

    /// Follows them until nobody listens.
    pub async fn follow(mut self) {
        let api: Api<Meta> = Api::all(self.starter.client());
        let mut events = pin!(watcher(api, config()));
        let mut waits = self.starter.waits();
        let mut retry = waits.pace();
        let (mut listed, mut is_known) = (BTreeSet::new(), false);
        loop {
            let wait = (is_known && !self.unclear.is_empty()).then(|| retry.next()).flatten();
            let event = tokio::select! {
                event = events.next() => event,
                () = sleep(wait) => {
                    self.look().await;
                    continue;
                }
            };
            // A list begins before anybody has answered.
            if !matches!(event, None | Some(Ok(Event::Init) | Err(_))) {
                waits.answered();
            }
            match event {
                None => return,
                Some(Ok(Event::Init)) => listed.clear(),
                Some(Ok(Event::InitApply(definition))) => {
                    listed.extend(kind_of(&definition).map(|kind| kind.plural));
                }
                Some(Ok(Event::InitDone)) => {
                    is_known = true;
                    self.these_are_all(&listed).await;
                }
                Some(Ok(Event::Apply(definition))) => {
                    if let Some(kind) = kind_of(&definition) {
                        retry = waits.pace();
                        self.unclear.insert(kind.plural);
                        self.look().await;
                    }
                }
                Some(Ok(Event::Delete(definition))) => {
                    if let Some(kind) = kind_of(&definition) {
                        self.stop(kind).await;
                    }
                }
                Some(Err(error)) => {
                    self.tell(WatchId::Definitions, What::Failing(reason(&error))).await;
                    // Nobody else is to be asked meanwhile: what is served is told by the same server.
                    waits.wait().await;
                }
            }
        }
    }

    async fn these_are_all(&mut self, listed: &BTreeSet<&'static str>) {
        self.unclear.clone_from(listed);
        for kind in DEFINED.iter().filter(|kind| !listed.contains(kind.plural)) {
            self.stop(kind).await;
        }
        self.look().await;
        self.tell(WatchId::Definitions, What::Listed(Vec::new())).await;
    }

    /// Asks what is served of those that are unclear, and watches that.
    async fn look(&mut self) {
        let unclear = self.unclear.clone();
        for kind in DEFINED.iter().filter(|kind| unclear.contains(kind.plural)) {
            let id = WatchId::All(kind.plural);
            match self.served(kind).await {
                Ok(Some(version)) => {
                    self.unclear.remove(kind.plural);
                    if self.running.get(kind.plural).is_none_or(|running| running.version != version) {
                        self.start(kind, version).await;
                    }
                }
                // It was only just made: what it is to be is not served yet.
                Ok(None) => {}
                Err(error) => {
                    self.tell(id.clone(), What::Begun).await;
                    self.tell(id, What::Failing(format!("asking for its versions: {error}"))).await;
                }
            }
        }
    }

    /// The best of its versions that the API server has.
    async fn served(&self, kind: &Kind) -> kube::Result<Option<&'static str>> {
        for version in kind.versions {
            let group = format!("{}/{version}", kind.group);
            match self.starter.client().list_api_group_resources(&group).await {
                Ok(list) if list.resources.iter().any(|one| one.name == kind.plural) => {
                    return Ok(Some(version));
                }
                Ok(_) => {}
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    async fn start(&mut self, kind: &'static Kind, version: &'static str) {
        if let Some(before) = self.running.remove(kind.plural) {
            before.task.abort();
            let _ = before.task.await;
        }
        let id = WatchId::All(kind.plural);
        tracing::info!(kind = kind.name, group = kind.group, version, "configuration: this kind is watched");
        self.tell(id.clone(), What::Begun).await;
        let api = Api::all_with(self.starter.client(), &kind.resource(version));
        let watch = Watch { id, kind, version, api, fields: None, detail: self.detail };
        self.running.insert(kind.plural, Running { version, task: self.starter.start(watch) });
    }

    async fn stop(&mut self, kind: &'static Kind) {
        self.unclear.remove(kind.plural);
        let Some(running) = self.running.remove(kind.plural) else { return };
        tracing::info!(
            kind = kind.name,
            group = kind.group,
            "configuration: this kind is not defined any more"
        );
        running.task.abort();
        // What it tells now would come after what is told in its place.
        let _ = running.task.await;
        self.tell(WatchId::All(kind.plural), What::Listed(Vec::new())).await;
    }

    async fn tell(&self, watch: WatchId, what: What) {
        // Nobody listens when the source ends, and this with it.
        let _ = self.starter.told().send(Told { watch, what }).await;
    }
}

/// The kind that a definition defines, if it is one that is read.
fn kind_of(definition: &Meta) -> Option<&'static Kind> {
    let name = definition.metadata.name.as_deref()?;
    DEFINED.iter().find(|kind| kind.definition() == name)
}

/// For ever, if there is nothing to wait for.
async fn sleep(wait: Option<std::time::Duration>) {
    match wait {
        Some(wait) => tokio::time::sleep(wait).await,
        None => std::future::pending().await,
    }
}
