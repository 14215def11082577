//! The objects of the mesh's kinds with what is said of them in their status, for who says it.
//!
//! Promises the same watches as the source's (which kinds there are, in which version, going on after cuts), and of each object
//! what would be wrong with it by itself at the generation that it has. Ends when it is dropped. Tested with who uses it.

use kube::{
    Client,
    core::{ApiResource, DynamicObject},
};
use serde_json::Value;
use tokio::sync::{mpsc, watch as channel};
use tokio_util::task::AbortOnDropHandle;

use super::{
    NEWS,
    definitions::Definitions,
    kinds::{DEFINED, Kind},
    prune::Detail,
    retry::Retry,
    start::Starter,
    watch::{Seen, Told, WatchId, What},
};
use crate::state::{Problem, resource::ObjectKey};

/// An object and its status.
#[derive(Debug, Clone)]
pub(crate) struct Description {
    /// Which one.
    pub key: ObjectKey,
    /// Its kind as the API server has it.
    pub resource: ApiResource,
    /// `metadata.resourceVersion`.
    pub version: Option<String>,
    /// `metadata.generation`: counts the changes of its `spec`.
    pub generation: Option<i64>,
    /// `status.conditions`.
    pub conditions: Vec<Value>,
    /// Why it cannot be taken as it is.
    pub refused: Option<Problem>,
}

/// News of them.
#[derive(Debug)]
pub(crate) enum Described {
    /// These are all of a kind.
    All(&'static str, Vec<Description>),
    /// This one is there, new or otherwise than before.
    Set(Box<Description>),
    /// It is there no more.
    Gone(ObjectKey),
}

/// What only a status says of an object.
#[derive(Debug)]
pub(super) struct Said {
    resource: ApiResource,
    version: Option<String>,
    generation: Option<i64>,
    conditions: Vec<Value>,
}

impl Said {
    /// By an object of this kind.
    pub fn by(kind: &Kind, version: &str, object: &DynamicObject) -> Self {
        let conditions = object.data.get("status").and_then(|status| status.get("conditions"));
        Self {
            resource: kind.resource(version),
            version: object.metadata.resource_version.clone(),
            generation: object.metadata.generation,
            conditions: conditions.and_then(Value::as_array).cloned().unwrap_or_default(),
        }
    }
}

/// Follows them.
pub(crate) struct Descriptions {
    news: mpsc::Receiver<Told>,
    /// For ever the same: nothing is listed anew because somebody says so.
    _again: channel::Sender<()>,
    _task: AbortOnDropHandle<()>,
}

impl Descriptions {
    /// Those of the cluster.
    pub fn follow(client: Client) -> Self {
        let (told, news) = mpsc::channel(NEWS);
        let (again, asked) = channel::channel(());
        let starter = Starter::new(client, told, asked, Retry::default());
        let definitions = Definitions::new(starter, Detail::Described);
        Self { news, _again: again, _task: AbortOnDropHandle::new(tokio::spawn(definitions.follow())) }
    }

    /// What is new.
    pub async fn next(&mut self) -> Option<Described> {
        loop {
            let Told { watch, what } = self.news.recv().await?;
            match what {
                What::Listed(all) => {
                    let kind = DEFINED.iter().find(|kind| watch == WatchId::All(kind.plural));
                    let Some(kind) = kind else { continue };
                    return Some(Described::All(
                        kind.name,
                        all.into_iter().filter_map(description).collect(),
                    ));
                }
                What::Set(seen) => {
                    if let Some(description) = description(*seen) {
                        return Some(Described::Set(Box::new(description)));
                    }
                }
                What::Gone(key, _) => return Some(Described::Gone(key)),
                // The source, which has the same trouble, says so.
                What::Begun | What::Failing(_) => {}
            }
        }
    }
}

fn description(seen: Seen) -> Option<Description> {
    let Said { resource, version, generation, conditions } = *seen.said?;
    let refused = seen.read.err().map(|refused| refused.problem(""));
    Some(Description { key: seen.key, resource, version, generation, conditions, refused })
}
