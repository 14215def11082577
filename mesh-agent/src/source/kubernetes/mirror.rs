//! What the API server has, as it was told: from news of watches to changes of objects.
//!
//! Promises that an object which says what it said makes no change, that one which is refused keeps its last good state (a
//! policy without one has what refuses in its place), and that of the two watches of pods, which know nothing of each other's
//! order, the newer pod of a name holds. Tested below.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::watch::{Seen, WatchId, What};
use crate::state::{
    Problem,
    compile::Change,
    resource::{Object, ObjectKey},
};

/// An object that is there.
#[derive(Debug)]
struct Held {
    watch: WatchId,
    uid: u64,
    hash: u64,
    /// What is in force of it, if anything.
    object: Option<Arc<Object>>,
}

/// All that is there.
#[derive(Debug, Default)]
pub(super) struct Mirror {
    held: BTreeMap<ObjectKey, Held>,
    problems: BTreeMap<ObjectKey, Problem>,
    /// The pods of this node.
    own_pods: BTreeSet<ObjectKey>,
    /// Where objects are from: their names say it all.
    file: Arc<str>,
}

impl Mirror {
    /// What is wrong with objects.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.problems.values()
    }

    /// The pods of this node, as far as they are in force.
    pub fn own_pods(&self) -> impl Iterator<Item = (&ObjectKey, &Arc<Object>)> {
        let object = |key| Some((key, self.held.get(key)?.object.as_ref()?));
        self.own_pods.iter().filter_map(object)
    }

    /// Takes news over.
    pub fn take(&mut self, watch: &WatchId, what: What, changes: &mut Vec<Change>) {
        match what {
            What::Set(seen) => self.set(watch, *seen, changes),
            What::Gone(key, uid) => self.gone(watch, key, Some(uid), changes),
            What::Listed(all) => {
                let there: BTreeSet<&ObjectKey> = all.iter().map(|seen| &seen.key).collect();
                let gone =
                    self.held.iter().filter(|(key, held)| held.watch == *watch && !there.contains(key));
                let gone: Vec<ObjectKey> = gone.map(|(key, _)| key.clone()).collect();
                for key in gone {
                    self.gone(watch, key, None, changes);
                }
                for seen in all {
                    self.set(watch, seen, changes);
                }
            }
            What::Begun | What::Failing(_) => {}
        }
    }

    fn set(&mut self, watch: &WatchId, seen: Seen, changes: &mut Vec<Change>) {
        let Seen { key, uid, hash, read, stand_in, said: _ } = seen;
        let before = self.held.get(&key);
        if let Some(held) = before {
            // Its own node's watch knows more of it, and sooner, unless it is another one by now.
            let outranked = held.watch == WatchId::OwnPods && *watch != WatchId::OwnPods && held.uid == uid;
            if outranked || (held.watch == *watch && held.uid == uid && held.hash == hash) {
                return;
            }
        }
        let last = before.and_then(|held| held.object.clone());
        let is_another = before.is_some_and(|held| held.uid != uid);
        let object = match read {
            Ok(resource) => {
                self.problems.remove(&key);
                Some(Arc::new(Object { file: Arc::clone(&self.file), resource }))
            }
            Err(refused) => {
                self.problems.insert(key.clone(), refused.problem(&self.file));
                let good = last.clone().filter(|object| !is_another && !object.is_stand_in());
                let in_place = || {
                    let resource = stand_in?;
                    Some(Arc::new(Object { file: Arc::clone(&self.file), resource }))
                };
                good.or_else(in_place)
            }
        };
        match (&last, &object) {
            (Some(last), Some(now)) if Arc::ptr_eq(last, now) => {}
            (_, Some(now)) => changes.push(Change::Set(key.clone(), Arc::clone(now))),
            (Some(_), None) => changes.push(Change::Gone(key.clone())),
            (None, None) => {}
        }
        if *watch == WatchId::OwnPods {
            self.own_pods.insert(key.clone());
        } else {
            self.own_pods.remove(&key);
        }
        self.held.insert(key, Held { watch: watch.clone(), uid, hash, object });
    }

    /// `uid`: which one has gone; `None`: whichever there was.
    fn gone(&mut self, watch: &WatchId, key: ObjectKey, uid: Option<u64>, changes: &mut Vec<Change>) {
        let is_it = |held: &Held| held.watch == *watch && uid.is_none_or(|uid| uid == held.uid);
        if !self.held.get(&key).is_some_and(is_it) {
            return;
        }
        self.problems.remove(&key);
        self.own_pods.remove(&key);
        if self.held.remove(&key).is_some_and(|held| held.object.is_some()) {
            changes.push(Change::Gone(key));
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        source::file::hash_of,
        state::resource::{self, Origin, Resource, authorization_policy},
    };

    fn seen(uid: u64, value: &Value) -> Seen {
        let read = resource::read(value, Origin::ApiServer);
        let key = match &read {
            Ok((key, _)) => key.clone(),
            Err(refused) => refused.key.clone().unwrap(),
        };
        let stand_in = read.is_err().then(|| authorization_policy::stand_in(&key, value)).flatten();
        let stand_in = stand_in.map(|policy| Resource::AuthorizationPolicy(Box::new(policy)));
        Seen {
            key,
            uid,
            hash: hash_of(value),
            read: read.map(|(_, resource)| resource),
            stand_in,
            said: None,
        }
    }

    fn pod(node: &str) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": {"nodeName": node, "containers": []},
        })
    }

    fn policy(action: &str) -> Value {
        json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "p"},
            "spec": {"action": action, "rules": [{}]},
        })
    }

    /// What the news come to: `+` and `-` before names.
    fn take(mirror: &mut Mirror, watch: &WatchId, what: What) -> Vec<String> {
        let mut changes = Vec::new();
        mirror.take(watch, what, &mut changes);
        let text = |change: &Change| match change {
            Change::Set(key, _) => format!("+{key}"),
            Change::Gone(key) => format!("-{key}"),
        };
        changes.iter().map(text).collect()
    }

    fn node_of(mirror: &Mirror) -> Option<String> {
        let object = mirror.held.values().next()?.object.clone()?;
        match &object.resource {
            Resource::Pod(pod) => pod.spec.as_ref()?.node_name.clone(),
            _ => None,
        }
    }

    #[test]
    fn what_is_as_before_is_no_change_and_what_a_list_lacks_has_gone() {
        let (mut mirror, all) = (Mirror::default(), WatchId::All("pods"));
        let list = |values: &[Value]| What::Listed(values.iter().map(|value| seen(1, value)).collect());
        assert_eq!(take(&mut mirror, &all, list(&[pod("n")])), ["+Pod default/a"]);
        assert_eq!(take(&mut mirror, &all, list(&[pod("n")])), [""; 0]);
        assert_eq!(take(&mut mirror, &all, What::Set(Box::new(seen(1, &pod("m"))))), ["+Pod default/a"]);
        assert_eq!(take(&mut mirror, &all, list(&[])), ["-Pod default/a"]);
        assert_eq!(take(&mut mirror, &all, list(&[])), [""; 0]);
    }

    #[test]
    fn of_two_watches_of_pods_the_newer_pod_holds_in_whatever_order_they_tell() {
        let (own, other) = (WatchId::OwnPods, WatchId::OtherPods);
        let set = |uid: u64, node: &str| What::Set(Box::new(seen(uid, &pod(node))));
        let gone = |uid: u64| What::Gone(ObjectKey::new("Pod", "default", "a"), uid);
        let mut mirror = Mirror::default();
        // Scheduled to this node: the other watch tells of its old state, and that it is none of its own, too late.
        take(&mut mirror, &own, set(1, "here"));
        assert_eq!(take(&mut mirror, &other, set(1, "")), [""; 0]);
        assert_eq!(take(&mut mirror, &other, gone(1)), [""; 0]);
        assert_eq!(node_of(&mirror).as_deref(), Some("here"));
        // Another of its name on another node: that the first has gone is told last.
        take(&mut mirror, &other, set(2, "there"));
        assert_eq!(take(&mut mirror, &own, gone(1)), [""; 0]);
        assert_eq!(node_of(&mirror).as_deref(), Some("there"));
        // And back.
        take(&mut mirror, &own, set(3, "here"));
        assert_eq!(take(&mut mirror, &other, gone(2)), [""; 0]);
        assert_eq!(node_of(&mirror).as_deref(), Some("here"));
        assert_eq!(take(&mut mirror, &own, gone(3)), ["-Pod default/a"]);
    }

    #[test]
    fn what_is_refused_keeps_its_last_good_state_and_a_policy_without_one_refuses() {
        let (mut mirror, all) = (Mirror::default(), WatchId::All("authorizationpolicies"));
        let set = |value: &Value| What::Set(Box::new(seen(1, value)));
        let in_force = |mirror: &Mirror| mirror.held.values().next().unwrap().object.clone();
        assert_eq!(take(&mut mirror, &all, set(&policy("FORBID"))).len(), 1);
        assert!(in_force(&mirror).is_some_and(|object| object.is_stand_in()));
        let problem = mirror.problems().next().unwrap().to_string();
        assert!(problem.starts_with("AuthorizationPolicy default/p: spec.action: "), "{problem}");
        take(&mut mirror, &all, set(&policy("DENY")));
        assert_eq!(mirror.problems().count(), 0);
        let good = in_force(&mirror).unwrap();
        assert_eq!(take(&mut mirror, &all, set(&policy("FORBID"))), [""; 0]);
        assert!(in_force(&mirror).is_some_and(|object| Arc::ptr_eq(&object, &good)));
        assert_eq!(mirror.problems().count(), 1);
        assert_eq!(take(&mut mirror, &all, What::Listed(Vec::new())).len(), 1);
        assert_eq!(mirror.problems().count(), 0);
    }
}
