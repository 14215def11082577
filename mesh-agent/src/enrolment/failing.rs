//! What stands between pods and their enrolment.
//!
//! Promises that each reason is news once, for as long as its pod is wanted. Tested below.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{
    admin::{FailingPod, PodsView},
    proxy::Mesh,
    state::snapshot::Workload,
    upstream::PodName,
};

/// What stands between each wanted pod and its enrolment; each reason is logged once. Cheap to clone; all clones are one.
#[derive(Debug, Clone, Default)]
pub struct Failing(Arc<Mutex<HashMap<PodName, String>>>);

impl Failing {
    /// The map is whole after every change, so a panic elsewhere does not make it wrong.
    pub(super) fn reasons(&self) -> MutexGuard<'_, HashMap<PodName, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a failure. Whether it is news.
    pub(super) fn note(&self, name: &PodName, reason: &str) -> bool {
        let mut reasons = self.reasons();
        let known = reasons.get(name).is_some_and(|known| known == reason);
        if !known {
            reasons.insert(name.clone(), reason.to_owned());
        }
        !known
    }

    pub(super) fn forget(&self, name: &PodName) {
        self.reasons().remove(name);
    }

    pub(super) fn forget_where(&self, name: &PodName, is: impl FnOnce(&str) -> bool) {
        let mut reasons = self.reasons();
        if reasons.get(name).is_some_and(|reason| is(reason)) {
            reasons.remove(name);
        }
    }

    pub(super) fn keep_only(&self, wanted: &HashMap<PodName, Arc<Workload>>) {
        self.reasons().retain(|name, _| wanted.contains_key(name));
    }

    /// The pods of this node for the operator: those enrolled in `mesh`, and those that fail.
    pub fn view(&self, mesh: &Mesh) -> PodsView {
        let pods = mesh.pods.all();
        let enrolled = pods.iter().filter(|(_, pod)| !pod.net().is_passed_by());
        let mut enrolled: Vec<_> = enrolled.map(|(name, _)| name.to_string()).collect();
        let one = |(name, reason): (&PodName, &String)| FailingPod {
            pod: name.to_string(),
            reason: reason.clone(),
        };
        let mut failing: Vec<_> = self.reasons().iter().map(one).collect();
        enrolled.sort();
        failing.sort();
        PodsView { node: mesh.node.to_string(), enrolled, failing }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::pod, *};

    #[test]
    fn a_failure_is_news_once_for_as_long_as_its_pod_is_wanted() {
        let (failing, (name, workload)) = (Failing::default(), pod("a", 1, "v1"));
        let wanted = HashMap::from([(name.clone(), workload)]);
        let gone = "its network namespace is not there";
        assert!(failing.note(&name, gone));
        failing.keep_only(&wanted);
        assert!(!failing.note(&name, gone), "told a second time");
        assert!(failing.note(&name, "port 15001 is taken"), "another reason is news");
        failing.keep_only(&HashMap::new());
        assert!(failing.reasons().is_empty() && failing.note(&name, gone));
        failing.forget(&name);
        assert!(failing.reasons().is_empty());
    }
}
