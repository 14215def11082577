//! The sandboxes of this node's pods, as the container runtime's network plugin tells of them: before the API server knows a
//! pod's addresses, and while the pod's start waits for its enrolment.
//!
//! Keyed by the pods' UIDs: a name may be another pod's by now. Never says that a pod is in the mesh: that is the
//! configuration's to say. Tested below.

use std::{collections::HashMap, net::IpAddr, path::PathBuf, sync::Arc};

use tokio::sync::watch;

/// Where a pod runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sandbox {
    /// Path of its network namespace.
    pub netns: PathBuf,
    /// The addresses that the network plugins gave it.
    pub ips: Vec<IpAddr>,
}

/// All sandboxes that were told of, by the UID of their pod.
pub type ByUid = Arc<HashMap<Box<str>, Sandbox>>;

/// The sandboxes that were told of. Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub struct Sandboxes(Arc<watch::Sender<ByUid>>);

impl Default for Sandboxes {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(ByUid::default())))
    }
}

impl Sandboxes {
    /// Enters the sandbox of a pod, in place of the one it had.
    pub fn insert(&self, uid: &str, sandbox: Sandbox) {
        self.0.send_if_modified(|all| {
            let is_new = all.get(uid) != Some(&sandbox);
            if is_new {
                Arc::make_mut(all).insert(uid.into(), sandbox);
            }
            is_new
        });
    }

    /// Forgets the sandbox of a pod.
    pub fn remove(&self, uid: &str) {
        self.0.send_if_modified(|all| all.contains_key(uid) && Arc::make_mut(all).remove(uid).is_some());
    }

    /// The sandbox of a pod, if it was told of.
    pub fn get(&self, uid: &str) -> Option<Sandbox> {
        self.0.borrow().get(uid).cloned()
    }

    /// What there is, and each change of it.
    pub fn watch(&self) -> watch::Receiver<ByUid> {
        self.0.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_watches_is_told_of_what_changes_and_of_nothing_else() {
        let sandboxes = Sandboxes::default();
        let mut seen = sandboxes.watch();
        let one = Sandbox { netns: "/run/netns/one".into(), ips: vec![IpAddr::from([10, 0, 0, 1])] };
        let is_told = |seen: &mut watch::Receiver<ByUid>| {
            let told = seen.has_changed().unwrap_or(false);
            seen.mark_unchanged();
            told
        };
        sandboxes.insert("uid", one.clone());
        assert!(is_told(&mut seen) && sandboxes.clone().get("uid") == Some(one.clone()));
        sandboxes.insert("uid", one.clone());
        assert!(!is_told(&mut seen), "it is as it was");
        sandboxes.insert("uid", Sandbox { ips: Vec::new(), ..one });
        assert!(is_told(&mut seen));
        sandboxes.remove("other");
        assert!(!is_told(&mut seen));
        sandboxes.remove("uid");
        assert!(is_told(&mut seen) && sandboxes.get("uid").is_none());
    }
}
