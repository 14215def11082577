//! Pods that join or leave the mesh just now: what their agent has not done yet, or has done before this one knew.
//!
//! Agents learn of a label one after another. Promises that no request fails for that: what goes to a pod that has just
//! joined waits until its agent takes it, and never goes in the clear instead; what goes to one that has just left still
//! goes by mutual TLS for a moment, since its agent may refuse anything else until it has learned of it. Costs the path
//! one look at a map that is empty almost always. Tested below and in the lab (`tests/tests/joining_and_leaving.rs`).

use std::{collections::HashMap, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use tokio::time::Instant;

use super::PodName;
use crate::state::snapshot::{Snapshot, Workload};

/// How long the agent of a pod that joins may take to enrol it. Many that join at once are enrolled one after another.
const JOINING: Duration = Duration::from_secs(30);

/// How long a pod that has left is still reached as before. Shorter than its agent goes on to serve it after that agent has
/// learned of it (`enrolment/leaving.rs`): that one may be ahead by the difference, or behind by this.
const LEAVING: Duration = Duration::from_secs(1);

/// What changed lately, of the pods of all nodes.
#[derive(Debug, Default)]
pub struct Transitions(ArcSwap<HashMap<PodName, Transition>>);

#[derive(Debug, Clone)]
struct Transition {
    /// As long as this it makes a difference.
    until: Instant,
    /// Set for one that has left: what it was.
    was: Option<Arc<Workload>>,
}

impl Transitions {
    /// Notes what a configuration changes that is about to be in force.
    pub fn note(&self, before: &Snapshot, after: &Snapshot) {
        let now = Instant::now();
        let mut changed: HashMap<_, _> = HashMap::clone(&self.0.load());
        changed.retain(|_, one| one.until > now);
        let others = after.workloads.changes(&before.workloads, Arc::ptr_eq);
        let (mut joined, mut left) = (Vec::new(), Vec::new());
        for (_, was, pod) in others {
            let Some(pod) = pod else { continue };
            match was.filter(|was| was.enrolled && same(was, pod)) {
                None if pod.enrolled => joined.push(pod),
                Some(was) if !pod.enrolled => left.push(was),
                _ => {}
            }
        }
        for pod in joined {
            changed.insert(PodName::from(&**pod), Transition { until: now + JOINING, was: None });
        }
        for was in left {
            let was_it = Some(Arc::clone(was));
            changed.insert(PodName::from(&**was), Transition { until: now + LEAVING, was: was_it });
        }
        if !changed.is_empty() || !self.0.load().is_empty() {
            self.0.store(Arc::new(changed));
        }
    }

    /// Until when an enrolled pod may be one that its agent has still to enrol; `None`: it is not.
    pub fn joining_until(&self, pod: &Workload) -> Option<Instant> {
        let changed = self.0.load();
        let one = changed.get(&PodName::from(pod)).filter(|one| one.was.is_none())?;
        (one.until > Instant::now()).then_some(one.until)
    }

    /// What a pod that is not enrolled was until a moment ago.
    pub fn just_left(&self, pod: &Workload) -> Option<Arc<Workload>> {
        let changed = self.0.load();
        if changed.is_empty() {
            return None;
        }
        let one = changed.get(&PodName::from(pod)).filter(|one| one.until > Instant::now())?;
        one.was.clone().filter(|was| same(was, pod))
    }
}

/// Whether it is the same pod, as whoever it was.
fn same(one: &Workload, other: &Workload) -> bool {
    one.namespace == other.namespace
        && one.name == other.name
        && one.ips == other.ips
        && one.identity == other.identity
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        identity::SpiffeId,
        state::snapshot::{Authentication, CapturePolicy},
    };

    fn pod(name: &str, account: &str, enrolled: bool) -> Arc<Workload> {
        let text = Arc::<str>::from;
        Arc::new(Workload {
            namespace: text("default"),
            name: text(name),
            ips: vec![[10, 0, 0, 1].into()],
            node: Some(text("a")),
            identity: SpiffeId {
                trust_domain: text("cluster.local"),
                namespace: text("default"),
                service_account: text(account),
            },
            labels: std::collections::BTreeMap::new(),
            view: None,
            enrolled,
            netns: None,
            announced: false,
            capture: CapturePolicy::default(),
            authorization: Arc::default(),
            authentication: Authentication::default(),
            workload_name: text(name),
            canonical_service: text(name),
            canonical_revision: text("v1"),
        })
    }

    fn of(pod: &Arc<Workload>) -> Snapshot {
        Snapshot { workloads: [(pod.ips[0], Arc::clone(pod))].into(), ..Snapshot::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_joins_is_waited_for_and_only_for_a_while() {
        let (out, within) = (pod("a", "a", false), pod("a", "a", true));
        let changes = Transitions::default();
        changes.note(&of(&within), &of(&within));
        assert_eq!(changes.joining_until(&within), None, "it was in the mesh already");
        changes.note(&of(&out), &of(&within));
        assert_eq!(changes.joining_until(&within), Some(Instant::now() + JOINING));
        assert_eq!(changes.just_left(&out), None);
        tokio::time::advance(JOINING).await;
        assert_eq!(changes.joining_until(&within), None);

        let renamed = pod("a", "b", true);
        changes.note(&of(&within), &of(&renamed));
        assert!(changes.joining_until(&renamed).is_some(), "it has to be enrolled anew as somebody else");
        changes.note(&Snapshot::default(), &of(&pod("b", "b", true)));
        assert!(changes.joining_until(&pod("b", "b", true)).is_some(), "a new pod");
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_leaves_is_what_it_was_for_a_moment() {
        let (out, within) = (pod("a", "a", false), pod("a", "a", true));
        let changes = Transitions::default();
        changes.note(&of(&within), &of(&out));
        assert_eq!(changes.just_left(&out).as_ref(), Some(&within));
        assert_eq!(changes.just_left(&pod("a", "b", false)), None, "another identity");
        assert_eq!(changes.just_left(&pod("b", "a", false)), None, "another pod at the address");
        changes.note(&of(&out), &of(&within));
        assert_eq!(changes.just_left(&out), None, "it came back");
        changes.note(&of(&within), &of(&out));
        tokio::time::advance(LEAVING).await;
        assert_eq!(changes.just_left(&out), None);
        changes.note(&of(&out), &of(&out));
        assert!(changes.0.load().is_empty(), "what is over is forgotten");
        changes.note(&of(&within), &Snapshot::default());
        assert!(changes.0.load().is_empty(), "a pod that is gone is not reached at all");
    }
}
