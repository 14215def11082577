//! Objects of a cluster and what is said of them. Time stands still unless a test lets it pass.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::sync::atomic::Ordering;

use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::*;
use crate::{
    source::{
        Sandboxes, Source, kubernetes,
        kubernetes::tests::fake::{Fake, Still},
    },
    state::compile::Settings,
};

const ISTIO: &str = "networking.istio.io";

struct World {
    still: Still,
    fake: Fake,
    source: Source,
    telling: JoinHandle<()>,
}

impl World {
    /// A cluster with Service `a`, whose objects are told about.
    async fn start() -> Self {
        let (still, fake) = (Still::stand(), Fake::start().await);
        fake.define(ISTIO, "virtualservices", &["v1"]);
        fake.define(ISTIO, "destinationrules", &["v1"]);
        fake.put("", "services", json!({
            "metadata": {"name": "a", "namespace": "default"}, "spec": {"ports": [{"name": "http", "port": 80}]},
        }));
        let source = kubernetes(&fake.cluster(), Settings::default(), &Sandboxes::default()).await.unwrap();
        let telling = tokio::spawn(keep_told(fake.cluster().client(), source.problems.clone()));
        Self { still, fake, source, telling }
    }

    fn put(&self, name: &str, generation: i64, spec: &Value) {
        let now = self.fake.get_of(ISTIO, "virtualservices", "default", name).unwrap_or_default();
        self.fake.put(ISTIO, "virtualservices", json!({
            "metadata": {"name": name, "namespace": "default", "generation": generation}, "spec": spec, "status": now["status"],
        }));
    }

    /// `Type=Status` of each condition.
    fn said(&self, name: &str) -> Vec<String> {
        let object = self.fake.get_of(ISTIO, "virtualservices", "default", name).unwrap();
        let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        conditions.iter().map(|one| format!("{}={}", text(&one["type"]), text(&one["status"]))).collect()
    }

    fn writes(&self) -> usize {
        self.fake.asked("PATCH").len()
    }

    /// Lets time pass until this is said.
    async fn until(&self, name: &str, said: &[&str]) {
        while self.said(name) != said {
            self.still.pass(PACE).await;
        }
    }

    async fn pass(&self, seconds: u64) {
        for _ in 0..seconds * 4 {
            self.still.pass(Duration::from_millis(250)).await;
        }
    }
}

fn to(destination: &Value) -> Value {
    json!({"hosts": ["a"], "http": [{"route": [{"destination": destination}]}]})
}

const GOOD: [&str; 4] = ["Accepted=True", "ResolvedRefs=True", "Conflicted=False", "Effective=True"];
const UNRESOLVED: [&str; 4] = ["Accepted=True", "ResolvedRefs=False", "Conflicted=False", "Effective=True"];
const REFUSED: [&str; 4] =
    ["Accepted=False", "ResolvedRefs=Unknown", "Conflicted=Unknown", "Effective=Unknown"];

#[tokio::test(start_paused = true)]
async fn what_has_become_of_an_object_is_said_and_turned_when_it_changes() {
    let world = World::start().await;
    world.put("v", 1, &to(&json!({"host": "a", "subset": "v1"})));
    world.until("v", &UNRESOLVED).await;
    let object = world.fake.get_of(ISTIO, "virtualservices", "default", "v").unwrap();
    let condition = &object["status"]["conditions"][1];
    assert_eq!(
        (&condition["observedGeneration"], &condition["reason"]),
        (&json!(1), &json!("ReferenceNotFound"))
    );
    let message = condition["message"].as_str().unwrap();
    assert!(
        message.starts_with("spec.http[0].route[0].destination.subset: no DestinationRule defines"),
        "{message}"
    );
    // Nothing but the problems tells of the next change.
    world.pass(5).await;
    world.fake.put(ISTIO, "destinationrules", json!({
        "metadata": {"name": "a", "namespace": "default", "generation": 1}, "spec": {"host": "a", "subsets": [{"name": "v1"}]},
    }));
    world.until("v", &GOOD).await;
    world.put("v", 2, &json!({"hosts": ["a"], "http": [{"timeout": "soon"}]}));
    world.until("v", &REFUSED).await;
    world.put("v", 3, &to(&json!({"host": "a"})));
    world.until("v", &GOOD).await;
    world.put("w", 1, &to(&json!({"host": "a"})));
    world.until("w", &["Accepted=True", "ResolvedRefs=True", "Conflicted=True", "Effective=True"]).await;
    assert!(!world.telling.is_finished());
}

#[tokio::test(start_paused = true)]
async fn what_is_said_leads_to_nothing_more() {
    let mut world = World::start().await;
    world.put("v", 1, &to(&json!({"host": "a"})));
    world.source.snapshots.wait_for(|snapshot| snapshot.revision == 2).await.unwrap();
    world.until("v", &GOOD).await;
    let compiled = world.source.counts.compiled.load(Ordering::Relaxed);
    world.pass(30).await;
    assert_eq!(world.writes(), 1, "{:?}", world.fake.asked("PATCH"));
    assert!(
        world.fake.asked("PATCH")[0].contains("/virtualservices/v/status"),
        "{:?}",
        world.fake.asked("PATCH")
    );
    assert_eq!(world.source.counts.compiled.load(Ordering::Relaxed), compiled, "a status is no change");
    // What somebody else takes away is said again.
    let mut object = world.fake.get_of(ISTIO, "virtualservices", "default", "v").unwrap();
    object["status"] = json!({"conditions": [{"type": "Reconciled", "status": "True"}]});
    world.fake.put(ISTIO, "virtualservices", object);
    let with_theirs: Vec<&str> = ["Reconciled=True"].into_iter().chain(GOOD).collect();
    world.until("v", &with_theirs).await;
    assert_eq!(world.writes(), 2);
}

#[tokio::test(start_paused = true)]
async fn many_objects_are_written_in_their_turn_and_one_that_always_changes_once_a_second() {
    let mut world = World::start().await;
    for number in 0..60 {
        world.put(&format!("v{number}"), 1, &json!({"hosts": [format!("{number}.example")], "http": []}));
    }
    // By then it is known what is wrong with each: nobody has its host.
    world.source.problems.wait_for(|problems| problems.len() == 60).await.unwrap();
    while world.writes() == 0 {
        world.still.pass(PACE).await;
    }
    for _ in 0..20 {
        world.still.pass(PACE).await;
    }
    let first = world.writes();
    assert!((2..=22).contains(&first), "{first} in a second");
    while world.writes() < 60 {
        world.still.pass(PACE).await;
    }
    world.pass(5).await;
    assert_eq!(world.writes(), 60);
    for generation in 2..=41 {
        world.put("v0", generation, &json!({"hosts": ["0.example"], "http": []}));
        world.still.pass(Duration::from_millis(250)).await;
    }
    let more = world.writes() - 60;
    assert!((2..=10).contains(&more), "{more} for 40 changes in ten seconds");
}

#[tokio::test(start_paused = true)]
async fn what_is_not_taken_is_tried_again() {
    let world = World::start().await;
    world.fake.forbid_writing(true);
    world.put("v", 1, &to(&json!({"host": "a"})));
    while world.writes() < 2 {
        world.pass(1).await;
    }
    assert_eq!(world.said("v"), [""; 0]);
    world.fake.forbid_writing(false);
    world.until("v", &GOOD).await;
}

#[tokio::test(start_paused = true)]
async fn what_is_tried_again_later_keeps_nobody_waiting() {
    let key = |name: &str| ObjectKey::new("VirtualService", "default", name);
    let mut queue = Queue::default();
    queue.add(&key("refused"), AGAIN);
    queue.add(&key("new"), SETTLES);
    // It waits already.
    queue.add(&key("refused"), SETTLES);
    assert_eq!(queue.due(), Some(Instant::now() + SETTLES));
    assert_eq!([queue.take(), queue.take(), queue.take()], [Some(key("new")), Some(key("refused")), None]);
}
