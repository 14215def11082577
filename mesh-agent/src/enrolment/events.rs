//! Says in Kubernetes' Events why a pod of this node is not enrolled, where whoever made the pod looks (`kubectl describe pod`).
//!
//! Promises an event for a cause that stands, and none for one that is gone before anybody could have read it; each cause once for
//! as long as it lasts; one event of a pod in a minute, and one of all in a second, at most. What the API server does not take
//! for good is not tried again. Tested below, against an API server in this process.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{Api, Client, api::PostParams};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};
use tokio_util::task::AbortOnDropHandle;

use super::{Enrolment, cluster::uid_of};
use crate::upstream::PodName;

/// Who says it.
const CONTROLLER: &str = "mesh.io/agent";
/// How long a cause has to stand: pods that are being made have no network for a moment.
const STANDS: Duration = Duration::from_secs(5);
/// Between two events.
const PACE: Duration = Duration::from_secs(1);
/// Between two events of one pod.
const OF_A_POD: Duration = Duration::from_mins(1);
/// Pause after the API server has not answered.
const AGAIN: Duration = Duration::from_secs(10);
/// Bytes of a note, as Kubernetes bounds them.
const LONGEST: usize = 1024;

/// Bytes of a pod's name in that of its event.
const LONGEST_NAME: usize = 230;

/// A pod that is not enrolled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    /// `metadata.uid`, where it is known.
    pub uid: Option<String>,
    /// Why.
    pub reason: String,
}

type Refusals = BTreeMap<PodName, Refusal>;

/// Says it for as long as it lives. Cheap to tell.
#[derive(Debug)]
pub struct Events {
    refused: watch::Sender<Refusals>,
    _task: AbortOnDropHandle<()>,
}

impl Events {
    /// For the pods of this node.
    pub fn start(client: Client, node: &str) -> Self {
        let (refused, told) = watch::channel(Refusals::new());
        let task = Task {
            client,
            node: node.to_owned(),
            standing: BTreeMap::new(),
            said: HashMap::new(),
            next: Instant::now(),
        };
        Self { refused, _task: AbortOnDropHandle::new(tokio::spawn(task.run(told))) }
    }

    /// These are refused now, and no others.
    pub(super) fn are_refused(&self, refused: Refusals) {
        self.refused.send_if_modified(|before| {
            let is_new = *before != refused;
            *before = refused;
            is_new
        });
    }
}

impl Enrolment {
    /// Tells which pods are refused now, where pods are a cluster's.
    pub(super) fn tell_refusals(&self) {
        let Some(events) = self.cluster.as_ref().and_then(|cluster| cluster.events.as_ref()) else { return };
        let refusal = |(name, reason): (&PodName, &String)| {
            let uid = self.wanted.pods.get(name).and_then(|pod| uid_of(pod));
            (name.clone(), Refusal { uid: uid.map(str::to_owned), reason: reason.clone() })
        };
        events.are_refused(self.failing.reasons().iter().map(refusal).collect());
    }
}

/// A refusal that lasts.
struct Standing {
    refusal: Refusal,
    since: Instant,
    said: bool,
}

struct Task {
    client: Client,
    node: String,
    standing: BTreeMap<PodName, Standing>,
    /// When something was said last of which pod.
    said: HashMap<PodName, Instant>,
    /// When the next event may be.
    next: Instant,
}

impl Task {
    async fn run(mut self, mut told: watch::Receiver<Refusals>) {
        loop {
            self.hear(&told.borrow_and_update());
            let due = self.due();
            tokio::select! {
                changed = told.changed() => if changed.is_err() { return },
                () = sleep_until(due.as_ref().map_or(self.next, |(at, _)| *at)), if due.is_some() => {
                    if let Some((_, name)) = due {
                        self.say(&name).await;
                    }
                }
            }
        }
    }

    fn hear(&mut self, refused: &Refusals) {
        self.standing.retain(|name, standing| refused.get(name) == Some(&standing.refusal));
        for (name, refusal) in refused {
            self.standing.entry(name.clone()).or_insert_with(|| Standing {
                refusal: refusal.clone(),
                since: Instant::now(),
                said: false,
            });
        }
        self.said.retain(|name, at| refused.contains_key(name) || at.elapsed() < OF_A_POD);
    }

    /// Which pod is next, and when.
    fn due(&self) -> Option<(Instant, PodName)> {
        let unsaid = self.standing.iter().filter(|(_, standing)| !standing.said);
        let at = |(name, standing): (&PodName, &Standing)| {
            let before = self.said.get(name).map_or(standing.since, |said| *said + OF_A_POD);
            ((standing.since + STANDS).max(before).max(self.next), name.clone())
        };
        unsaid.map(at).min()
    }

    async fn say(&mut self, name: &PodName) {
        let Some(standing) = self.standing.get_mut(name) else { return };
        let event = event(name, &standing.refusal, &self.node);
        let events: Api<Event> = Api::namespaced(self.client.clone(), &name.namespace);
        self.next = Instant::now() + PACE;
        match events.create(&PostParams::default(), &event).await {
            Ok(_) => {}
            // A namespace on its way out takes none; nor does one that the role leaves out.
            Err(kube::Error::Api(status)) if (400..500).contains(&status.code) && status.code != 429 => {
                tracing::warn!(pod = %name, "an Event of the pod is not taken: {} ({})", status.message, status.code);
            }
            Err(error) => {
                tracing::warn!(pod = %name, "an Event of the pod cannot be written: {error}; it is tried again");
                self.next = Instant::now() + AGAIN;
                return;
            }
        }
        standing.said = true;
        self.said.insert(name.clone(), Instant::now());
    }
}

/// As `kube`'s recorder makes it, which counts an event of another cause to the one before and keeps its words.
fn event(name: &PodName, refusal: &Refusal, node: &str) -> Event {
    let pod = ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        namespace: Some(name.namespace.to_string()),
        name: Some(name.name.to_string()),
        uid: refusal.uid.clone(),
        ..ObjectReference::default()
    };
    // Names have 253 characters at most, all of them ASCII.
    let stem = name.name.get(..LONGEST_NAME).unwrap_or(&name.name);
    let stem = stem.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
    Event {
        metadata: ObjectMeta {
            namespace: Some(name.namespace.to_string()),
            name: Some(format!("{stem}.{:016x}", fastrand::u64(..))),
            ..ObjectMeta::default()
        },
        type_: Some("Warning".to_owned()),
        reason: Some("EnrolmentRefused".to_owned()),
        action: Some("Enrol".to_owned()),
        note: Some(note(&refusal.reason)),
        regarding: Some(pod),
        event_time: Some(MicroTime(Timestamp::now())),
        reporting_controller: Some(CONTROLLER.to_owned()),
        reporting_instance: Some(node.to_owned()),
        ..Event::default()
    }
}

fn note(reason: &str) -> String {
    let mut note = format!("cannot be enrolled as it is wanted: {reason}");
    if note.len() > LONGEST {
        note.truncate(note.floor_char_boundary(LONGEST));
    }
    note
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::Value;

    use super::{super::tests::pod, *};
    use crate::source::kubernetes::tests::fake::{Fake, Still};

    /// A node whose pods are refused for these reasons.
    struct Node {
        still: Still,
        fake: Fake,
        events: Events,
    }

    impl Node {
        async fn new() -> Self {
            let (still, fake) = (Still::stand(), Fake::start().await);
            let events = Events::start(fake.cluster().client(), "node-a");
            Self { still, fake, events }
        }

        fn refuse(&self, pods: &[(&str, &str)]) {
            let one = |(name, reason): &(&str, &str)| {
                (
                    pod(name, 1, "v1").0,
                    Refusal { uid: Some(format!("uid-of-{name}")), reason: (*reason).to_owned() },
                )
            };
            self.events.are_refused(pods.iter().map(one).collect());
        }

        fn written(&self) -> Vec<Value> {
            self.fake.all("events.k8s.io", "events")
        }

        async fn pass(&self, seconds: u64) {
            for _ in 0..seconds {
                self.still.pass(Duration::from_secs(1)).await;
            }
        }

        async fn until_written(&self, count: usize) {
            while self.written().len() < count {
                self.pass(1).await;
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_cause_that_stands_is_an_event_of_its_pod_once() {
        let node = Node::new().await;
        node.refuse(&[("one", "its network namespace is not there")]);
        node.until_written(1).await;
        let event = &node.written()[0];
        assert_eq!(event["metadata"]["namespace"], "default");
        assert_eq!((&event["type"], &event["reason"]), (&"Warning".into(), &"EnrolmentRefused".into()));
        assert_eq!(event["note"], "cannot be enrolled as it is wanted: its network namespace is not there");
        assert_eq!(
            (&event["regarding"]["name"], &event["regarding"]["uid"]),
            (&"one".into(), &"uid-of-one".into())
        );
        assert_eq!(event["reportingInstance"], "node-a");
        // The same is told at each look.
        node.refuse(&[("one", "its network namespace is not there")]);
        node.pass(300).await;
        assert_eq!(node.fake.asked("events").len(), 1, "{:?}", node.fake.asked("events"));
        // Another cause is another event, not too soon after one.
        node.refuse(&[("one", "port 15001 is taken")]);
        node.until_written(2).await;
        node.refuse(&[("one", "there is no certificate")]);
        node.pass(50).await;
        assert_eq!(node.written().len(), 2, "two within a minute");
        node.until_written(3).await;
    }

    #[test]
    fn names_and_notes_have_their_bounds() {
        let refusal = Refusal { uid: None, reason: "é".repeat(LONGEST) };
        let name = format!("{}-{}", "a".repeat(LONGEST_NAME - 1), "b".repeat(20));
        let event = event(&PodName { namespace: "n".into(), name: name.into() }, &refusal, "node-a");
        let name = event.metadata.name.unwrap();
        assert!(
            name.starts_with(&format!("{}.", "a".repeat(LONGEST_NAME - 1))) && name.len() <= 253,
            "{name}"
        );
        assert!(event.note.is_some_and(|note| note.len() <= LONGEST));
    }

    #[tokio::test(start_paused = true)]
    async fn what_passes_by_itself_is_none() {
        let node = Node::new().await;
        for _ in 0..10 {
            node.refuse(&[("one", "its network namespace is not there")]);
            node.pass(4).await;
            node.refuse(&[]);
            node.pass(1).await;
        }
        assert_eq!(node.fake.asked("POST"), [""; 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn many_pods_have_theirs_in_their_turn_and_what_failed_is_tried_again() {
        let node = Node::new().await;
        node.fake.be_silent(true);
        let names: Vec<String> = (0..20).map(|number| format!("p{number}")).collect();
        let refused: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "no")).collect();
        node.refuse(&refused);
        node.pass(6).await;
        assert_eq!(node.fake.asked("POST").len(), 1, "one at a time");
        node.fake.cut();
        node.fake.be_silent(false);
        node.until_written(1).await;
        let first = node.written().len();
        for _ in 0..50 {
            node.still.pass(Duration::from_millis(100)).await;
        }
        let more = node.written().len() - first;
        assert!((1..=6).contains(&more), "{more} in five seconds");
        node.until_written(20).await;
        node.pass(120).await;
        assert_eq!(node.written().len(), 20);
    }
}
