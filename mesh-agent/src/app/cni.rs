//! What the CNI plugin of this node is told: whether a pod is enrolled, by what the configuration and the enrolment say.

use std::{collections::BTreeSet, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use tokio::{sync::watch, task::JoinHandle, time::timeout};

use crate::{
    admin::{KeepFile, RunDir, Socket},
    cni::{
        Answer, NAMESPACES_NAME, Namespaces, Request, SOCKET_NAME, Verb,
        install::{Installation, Places},
        serve::serve,
    },
    config::NodeConfig,
    enrolment::{Failing, namespace_id},
    proxy::Mesh,
    source::{Sandbox, Sandboxes},
    state::snapshot::{Snapshot, Workload},
    upstream::PodName,
};

/// How long a plugin waits for a pod to be enrolled, and is told why it is not: shorter than its own patience.
const ENROLLING: Duration = Duration::from_secs(25);

/// What a pod's enrolment can be told by.
#[derive(Debug, Clone)]
pub(super) struct Enrolling {
    pub mesh: Arc<Mesh>,
    pub failing: Failing,
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
    /// Told after each round of the enrolment.
    pub rounds: watch::Receiver<u64>,
    /// Where it is kept what plugins tell of pods.
    pub sandboxes: Sandboxes,
}

impl Enrolling {
    /// What a plugin is to be told, as soon as it is known.
    async fn answer(mut self, request: Request) -> Answer {
        match request.verb {
            Verb::Status => Answer::Noted,
            Verb::Del => {
                self.forget(&request);
                Answer::Noted
            }
            Verb::Check => self.verdict(&request).unwrap_or_else(|| self.not_yet(&request)),
            Verb::Add => {
                let Some(netns) = request.netns.clone().filter(|_| !request.ips.is_empty()) else {
                    return Answer::Refused("the CNI plugins before have given it no address".to_owned());
                };
                if let Some(uid) = &request.uid {
                    self.sandboxes.insert(uid, Sandbox { netns, ips: request.ips.clone() });
                }
                let known = timeout(ENROLLING, self.known(&request)).await;
                known.unwrap_or_else(|_| self.not_yet(&request))
            }
        }
    }

    /// A pod may have another sandbox by now.
    fn forget(&self, request: &Request) {
        let Some(uid) = &request.uid else { return };
        let is_it = |sandbox: Sandbox| request.netns.as_ref().is_none_or(|netns| *netns == sandbox.netns);
        if self.sandboxes.get(uid).is_some_and(is_it) {
            self.sandboxes.remove(uid);
        }
    }

    async fn known(&mut self, request: &Request) -> Answer {
        loop {
            // Seen from here on: what happens while it is looked at is looked at again.
            self.snapshots.mark_unchanged();
            self.rounds.mark_unchanged();
            if let Some(answer) = self.verdict(request) {
                return answer;
            }
            let ended = tokio::select! {
                changed = self.snapshots.changed() => changed.is_err(),
                changed = self.rounds.changed() => changed.is_err(),
            };
            if ended {
                return Answer::Refused("the agent of this node is stopping".to_owned());
            }
        }
    }

    /// `None`: it is not decided, or not done.
    fn verdict(&self, request: &Request) -> Option<Answer> {
        let snapshot = self.snapshots.borrow();
        let named = |pod: &&Arc<Workload>| *pod.namespace == *request.namespace && *pod.name == *request.pod;
        let workload = request.ips.iter().find_map(|ip| snapshot.workload_at(*ip).filter(named))?;
        if !workload.enrolled {
            return Some(Answer::NotEnrolled);
        }
        let pods = self.mesh.pods.all();
        let pod = pods.get(&PodName::from(&**workload)).filter(|pod| !pod.net().is_passed_by())?;
        // One of the same name may have been here before, as those of a StatefulSet have.
        let held = pod.workload();
        let [held, told] = [&held.netns, &request.netns].map(|path| namespace_id(path.as_deref()?));
        (held.is_some() && held == told).then_some(Answer::Enrolled)
    }

    fn not_yet(&self, request: &Request) -> Answer {
        let name = format!("{}/{}", request.namespace, request.pod);
        let failing = self.failing.view(&self.mesh).failing;
        let reason = failing.into_iter().find(|failing| failing.pod == name).map(|failing| failing.reason);
        let unknown =
            "the agent of this node has not heard of it from the API server, or is still at work on it";
        Answer::Refused(reason.unwrap_or_else(|| unknown.to_owned()))
    }
}

/// The plugin on this node, for as long as the agent runs.
#[derive(Debug)]
pub(super) struct Plugin {
    places: Places,
    keep_file: KeepFile,
    tasks: Vec<JoinHandle<()>>,
}

impl Plugin {
    /// Listens for plugins, and installs ours; `None` where the flags ask for none.
    pub fn start(config: &NodeConfig, run_dir: &RunDir, enrolling: Enrolling) -> Result<Option<Self>> {
        let Some(programs) = config.cni.cni_bin_dir.clone() else { return Ok(None) };
        let places = Places {
            programs,
            configurations: config.cni.cni_conf_dir.clone(),
            run_dir: std::path::absolute(run_dir.path()).context("--run-dir")?,
        };
        let path = places.run_dir.join(SOCKET_NAME);
        let socket = Socket::put(&path).with_context(|| format!("listening on {}", path.display()))?;
        let keep_file = socket.keep_file();
        let namespaces = keep_namespaces(
            places.run_dir.join(NAMESPACES_NAME),
            Arc::clone(&enrolling.mesh),
            enrolling.snapshots.clone(),
            enrolling.rounds.clone(),
        );
        let serving = serve(socket, move |request| enrolling.clone().answer(request));
        // What it names is there before the plugin is.
        let mut installation = Installation::new(places.clone(), &config.cni.cni_never)?;
        let keeping = async move {
            if let Err(error) = installation.keep().await {
                tracing::error!("pods may start without waiting for their enrolment: {error:#}");
            }
        };
        let tasks = vec![tokio::spawn(namespaces), tokio::spawn(serving), tokio::spawn(keeping)];
        Ok(Some(Self { places, keep_file, tasks }))
    }

    /// Ends it here. `remove`: on the node too; otherwise another agent serves it, now or later, and until then pods of
    /// enrolled namespaces wait.
    pub async fn end(self, remove: bool) {
        self.keep_file.set(!remove);
        for task in self.tasks {
            task.abort();
            let _ = task.await;
        }
        if !remove {
            return;
        }
        let namespaces = self.places.run_dir.join(NAMESPACES_NAME);
        let left = Installation::left_in(&self.places.run_dir);
        if let Err(error) = left.and_then(|left| left.map_or(Ok(()), Installation::remove)) {
            tracing::error!("the CNI plugin is not removed from this node: {error:#}");
        }
        let _ = std::fs::remove_file(namespaces);
    }
}

/// Leaves for the plugin which namespaces are enrolled, at each change.
async fn keep_namespaces(
    path: PathBuf,
    mesh: Arc<Mesh>,
    mut snapshots: watch::Receiver<Arc<Snapshot>>,
    mut rounds: watch::Receiver<u64>,
) {
    let mut left: Option<Namespaces> = None;
    loop {
        let mut enrolled: BTreeSet<String> =
            snapshots.borrow_and_update().enrolling.iter().map(|name| (**name).to_owned()).collect();
        rounds.mark_unchanged();
        // Those of pods that are enrolled by a label of their own.
        enrolled.extend(mesh.pods.all().keys().map(|name| name.namespace.to_string()));
        let now = Namespaces { enrolled };
        if left.as_ref() != Some(&now) {
            match now.write(&path) {
                Ok(()) => left = Some(now),
                Err(error) => {
                    tracing::error!("what CNI plugins go by without an agent is not up to date: {error:#}");
                }
            }
        }
        let ended = tokio::select! {
            changed = snapshots.changed() => changed.is_err(),
            changed = rounds.changed() => changed.is_err(),
        };
        if ended {
            return;
        }
    }
}
