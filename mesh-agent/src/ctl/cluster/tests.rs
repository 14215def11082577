//! Commands as users type them, against an API server in this process that runs what it is asked to in containers.

use std::sync::{Arc, Mutex};

use anyhow::Result;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::source::kubernetes::tests::fake::{Fake, Ran};

/// A cluster, and what was run in it: pod and words.
pub(in crate::ctl) struct World {
    pub fake: Fake,
    dir: TempDir,
    pub ran: Arc<Mutex<Vec<(String, String)>>>,
}

impl World {
    /// One with these agents: name of the pod and its node.
    pub async fn with(agents: &[(&str, &str)]) -> Result<Self> {
        let (fake, dir) = (Fake::start().await, tempfile::tempdir()?);
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": fake.url()}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "users": [{"name": "u", "user": {}}],
        });
        std::fs::write(dir.path().join("config"), kubeconfig.to_string())?;
        for (name, node) in agents {
            fake.put("", "pods", agent(name, node));
        }
        Ok(Self { fake, dir, ran: Arc::default() })
    }

    /// Whatever is run does this.
    fn runs(&self, ran: Ran) {
        let log = Arc::clone(&self.ran);
        self.fake.runs(move |pod, command| {
            if let Ok(mut log) = log.lock() {
                log.push((pod.to_owned(), command.join(" ")));
            }
            ran.clone()
        });
    }

    pub async fn output(&self, arguments: &str) -> (String, Result<(), Failure>) {
        let mut out = Vec::new();
        let kubeconfig = self.dir.path().join("config").display().to_string();
        let words = ["meshctl", "--kubeconfig", &kubeconfig].into_iter().chain(arguments.split(' '));
        let done = match Cli::read(words) {
            Ok(cli) => crate::ctl::run(cli, &mut out).await,
            Err(error) => Err(Failure::Usage(error.to_string())),
        };
        (String::from_utf8_lossy(&out).into_owned(), done)
    }

    /// What the command fails with, and its exit code.
    async fn failure(&self, arguments: &str) -> (u8, String) {
        let (_, done) = self.output(arguments).await;
        done.err().map(|failure| (failure.code(), failure.to_string())).unwrap_or_default()
    }

    fn ran(&self) -> Vec<(String, String)> {
        self.ran.lock().map(|ran| ran.clone()).unwrap_or_default()
    }
}

pub(in crate::ctl) fn agent(name: &str, node: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "mesh-system", "creationTimestamp": "2026-01-01T00:00:00Z",
                     "labels": {"app.kubernetes.io/name": "mesh-agent"}},
        "spec": {"nodeName": node, "containers": [{"name": "agent", "image": "mesh-agent:1"}]},
        "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}],
                   "containerStatuses": [{"name": "agent", "image": "", "imageID": "", "ready": true, "restartCount": 0,
                                          "state": {"running": {}}}]},
    })
}

fn pod(name: &str, node: Option<&str>) -> Value {
    json!({"metadata": {"name": name, "namespace": "shop"}, "spec": {"nodeName": node, "containers": []}})
}

fn said(text: &str) -> Ran {
    Ran { out: vec![text.to_owned()], code: Some(0), ..Ran::default() }
}

#[tokio::test]
async fn the_agent_of_a_pods_node_answers() -> Result<()> {
    let world = World::with(&[("agent-a", "a"), ("agent-b", "b")]).await?;
    world.fake.put("", "pods", pod("web", Some("b")));
    world.runs(Ran { out: vec!["one\n".to_owned(), "two\n".to_owned()], ..said("") });
    for (command, words) in [
        ("certs --pod shop/web", "meshctl certs"),
        ("-o json config --pod shop/web", "meshctl --output=json config"),
        ("flows --pod web -n shop", "meshctl --pod=web flows --namespace=shop"),
        ("flows --follow --pod shop/web", "meshctl --end-with-stdin --pod=shop/web flows --follow"),
        ("maps dump PODS --node b", "meshctl maps dump PODS"),
        ("status --node b", "meshctl status"),
    ] {
        let (out, done) = world.output(command).await;
        done?;
        assert_eq!(out, "one\ntwo\n", "{command}");
        let ran = world.ran();
        assert_eq!(ran.last(), Some(&("agent-b".to_owned(), words.to_owned())), "{command}");
    }
    Ok(())
}

#[tokio::test]
async fn where_there_is_one_agent_nobody_needs_to_choose() -> Result<()> {
    let world = World::with(&[("agent-a", "a")]).await?;
    world.runs(said("there\n"));
    let (out, done) = world.output("certs").await;
    done?;
    assert_eq!(out, "there\n");
    Ok(())
}

#[tokio::test]
async fn the_exit_code_there_is_the_one_here() -> Result<()> {
    let world = World::with(&[("agent-a", "a")]).await?;
    for code in [1, 3, 137] {
        world.runs(Ran { code: Some(code), errors: "meshctl: no\n".to_owned(), ..Ran::default() });
        assert_eq!(world.failure("config").await.0, code);
    }
    world.runs(Ran { out: vec!["half".to_owned()], ..Ran::default() });
    let (out, done) = world.output("config").await;
    assert_eq!(out, "half");
    let failure = done.err().map(|failure| (failure.code(), failure.to_string())).unwrap_or_default();
    assert!(
        failure.0 == 3 && failure.1.starts_with("the connection to agent-a of node a was cut"),
        "{failure:?}"
    );
    Ok(())
}

#[tokio::test]
async fn every_failure_says_what_to_do() -> Result<()> {
    let world = World::with(&[("agent-a", "a"), ("agent-b", "b")]).await?;
    world.fake.put("", "pods", pod("web", Some("c")));
    world.fake.put("", "pods", pod("pending", None));
    let mut broken = agent("agent-d", "d");
    broken["status"]["containerStatuses"][0]["state"] = json!({"waiting": {"reason": "ImagePullBackOff"}});
    world.fake.put("", "pods", broken);
    for (command, code, says) in [
        (
            "certs",
            2,
            "say whose agent is to answer, with --pod NAMESPACE/NAME or --node; nodes with an agent: a, b, d",
        ),
        ("certs --pod shop/none", 1, "there is no pod shop/none; `kubectl get pods --namespace shop` shows"),
        ("certs --pod shop/pending", 1, "pod shop/pending is on no node yet"),
        ("certs --pod shop/web", 3, "there is no agent on node c in namespace mesh-system: is that where"),
        ("certs --node d", 3, "the agent of node d does not run (ImagePullBackOff): `kubectl describe pod"),
        ("status --mesh-namespace other", 3, "there is no agent on any node in namespace other"),
        ("certs --context other", 2, "the cluster: "),
        ("certs --node a --pod b/c", 2, "error: the argument"),
    ] {
        let failure = world.failure(command).await;
        assert!(failure.0 == code && failure.1.starts_with(says), "{command}: {failure:?}");
    }
    world.runs(said(""));
    world.fake.forbid("pods/exec", true);
    let (code, text) = world.failure("certs --node a").await;
    assert!(code == 1 && text.contains("verb `create,get` on `pods/exec`"), "{text}");
    world.fake.forbid("pods", true);
    let (code, text) = world.failure("certs --pod shop/web").await;
    assert!(code == 1 && text.starts_with("you may not get pods in namespace shop"), "{text}");
    world.fake.stop().await;
    let (code, text) = world.failure("status").await;
    assert!(code == 3 && text.starts_with("the API server cannot be asked: "), "{text}");
    Ok(())
}

#[tokio::test]
async fn the_status_of_all_nodes_has_a_line_for_each() -> Result<()> {
    let world = World::with(&[("agent-a", "a"), ("agent-b", "b")]).await?;
    let status = json!({"version": "mesh-agent 1", "ready": true, "waiting_for": [], "config_revision": 7,
                        "enrolled": ["shop/web"], "failing": [], "certificates": 2, "problems": ["one"],
                        "overload": {"level": "none"}});
    world.runs(said(&status.to_string()));
    let (table, done) = world.output("status").await;
    done?;
    let cells: Vec<Vec<&str>> = table
        .lines()
        .map(|line| line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect())
        .collect();
    assert_eq!(cells[0][..4], ["NODE", "AGENT", "VERSION", "READY"]);
    assert_eq!(cells[1], ["a", "agent-a", "mesh-agent 1", "yes", "7", "1", "0", "2", "1", "none"]);
    assert_eq!(cells[2][..2], ["b", "agent-b"]);
    assert_eq!(world.ran()[0].1, "meshctl --output=json status");

    world.runs(Ran { errors: "meshctl: no agent answers\n".to_owned(), code: Some(3), ..Ran::default() });
    let (json, done) = world.output("status -o json").await;
    assert_eq!(done.err().map(|failure| failure.code()), Some(3));
    let nodes: Value = serde_json::from_str(&json)?;
    assert_eq!(nodes[1]["error"], "meshctl: no agent answers");
    Ok(())
}

#[test]
fn of_two_agents_on_a_node_the_ready_and_newest_answers() -> Result<()> {
    let ready = agent("ready", "a");
    let mut unready = agent("unready", "a");
    unready["status"]["conditions"] = json!([]);
    unready["metadata"]["creationTimestamp"] = "2026-02-01T00:00:00Z".into();
    let mut newer = agent("newer", "a");
    newer["metadata"]["creationTimestamp"] = "2026-02-01T00:00:00Z".into();
    let mut leaving = agent("leaving", "a");
    leaving["metadata"]["creationTimestamp"] = "2026-03-01T00:00:00Z".into();
    leaving["metadata"]["deletionTimestamp"] = "2026-03-01T00:00:00Z".into();
    let mut starting = agent("starting", "a");
    starting["status"] = json!({"phase": "Pending"});
    for (pods, answers, trouble) in [
        (vec![&ready, &unready, &leaving], Some("ready"), None),
        (vec![&newer, &ready], Some("newer"), None),
        (vec![&starting, &unready], Some("unready"), None),
        (vec![&starting], Some("starting"), Some("its pod is Pending")),
        (vec![&leaving], None, None),
    ] {
        let pods =
            pods.into_iter().map(|pod| serde_json::from_value(pod.clone())).collect::<Result<_, _>>()?;
        let nodes = agents::of_nodes(pods);
        let agent = nodes.get("a");
        assert_eq!(agent.map(|agent| agent.pod.as_str()), answers);
        assert_eq!(agent.and_then(|agent| agent.trouble.as_deref()), trouble);
    }
    Ok(())
}
