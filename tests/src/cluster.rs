//! A real Kubernetes cluster, for tests that want one: kubectl, namespaces of a test's own, commands in pods.
//!
//! `cargo xtask test cluster` starts it and says by the environment where it is; without it, tests skip, or fail where
//! `MESH_REQUIRE_CLUSTER=1` forbids that. Never polls the API server: what it can tell is awaited by kubectl, with a
//! watch. Tested by `tests/cluster`.

use std::{
    ffi::OsStr,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    rc::Rc,
    sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// How long the cluster may take for one thing, with room for a machine that is busy.
const PATIENCE: &str = "--timeout=120s";

/// Tests that disturb the cluster as a whole wait for the others, and the others for them.
static GATE: RwLock<()> = RwLock::new(());

#[derive(Debug)]
#[expect(dead_code, reason = "held, not looked at")]
enum Gate {
    Shared(RwLockReadGuard<'static, ()>),
    Alone(RwLockWriteGuard<'static, ()>),
}

/// The cluster that was given to the tests.
#[derive(Debug, Clone)]
pub struct Cluster {
    kubectl: PathBuf,
    xtask: PathBuf,
    client: String,
    _gate: Rc<Gate>,
}

impl Cluster {
    /// `None` where no cluster was given, after saying so.
    pub fn given() -> Result<Option<Self>> {
        Self::behind(|| Gate::Shared(GATE.read().unwrap_or_else(PoisonError::into_inner)))
    }

    /// The same, with no other test on it at the same time.
    pub fn alone() -> Result<Option<Self>> {
        Self::behind(|| Gate::Alone(GATE.write().unwrap_or_else(PoisonError::into_inner)))
    }

    fn behind(gate: impl FnOnce() -> Gate) -> Result<Option<Self>> {
        let path = |name: &str| std::env::var_os(name).map(PathBuf::from);
        let client = std::env::var("MESH_CLUSTER_CLIENT").ok();
        if let (Some(kubectl), Some(xtask), Some(client)) =
            (path("MESH_CLUSTER_KUBECTL"), path("MESH_CLUSTER_XTASK"), client)
        {
            return Ok(Some(Self { kubectl, xtask, client, _gate: Rc::new(gate()) }));
        }
        if std::env::var_os("MESH_REQUIRE_CLUSTER").is_some_and(|value| value == "1") {
            bail!("no cluster was given, and MESH_REQUIRE_CLUSTER=1 forbids to skip");
        }
        eprintln!("skipped: it needs a cluster, which `cargo xtask test cluster` gives");
        Ok(None)
    }

    /// Ends a component of the control plane, as if it had crashed.
    pub fn stop(&self, component: &str) -> Result<()> {
        self.xtask("stop", component)
    }

    /// Starts it again; returns when the API server, if it is that, is ready.
    pub fn start(&self, component: &str) -> Result<()> {
        self.xtask("start", component)
    }

    /// What a shell on the node itself says to a script.
    pub fn on_node(&self, node: &str, script: &str) -> Result<String> {
        let number = node.trim_start_matches(|other: char| !other.is_ascii_digit());
        self.asked(&["enter", number, "sh", "-c", script])
    }

    fn xtask(&self, action: &str, component: &str) -> Result<()> {
        self.asked(&[action, component]).map(|_| ())
    }

    fn asked(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.xtask);
        let output = command.arg("cluster").args(arguments).output().context("starting xtask")?;
        if !output.status.success() {
            bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The image of the mesh, of the programs that the tests were built with.
    pub fn mesh_image() -> Result<String> {
        std::env::var("MESH_CLUSTER_IMAGE").context("MESH_CLUSTER_IMAGE: `cargo xtask test cluster` says it")
    }

    /// What helm says, with the administrator's rights.
    pub fn helm(arguments: &[&str]) -> Result<String> {
        let helm = std::env::var_os("MESH_CLUSTER_HELM");
        let mut command =
            Command::new(helm.context("MESH_CLUSTER_HELM: `cargo xtask test cluster` says it")?);
        let output = command.args(arguments).output().context("starting helm")?;
        if !output.status.success() {
            bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The image of [`Namespace::client`].
    pub fn client_image(&self) -> &str {
        &self.client
    }

    /// What kubectl says, with the administrator's rights.
    pub fn kubectl<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<String> {
        self.run(arguments, None)
    }

    /// Patches objects as somebody else would, who may not read them.
    pub fn apply_as(&self, user: &str, manifests: &str) -> Result<()> {
        let user = format!("--as={user}");
        let arguments = ["apply", "--server-side", "--force-conflicts", "--filename=-", &user];
        self.run(arguments, Some(manifests)).map(drop)
    }

    /// Applies manifests that say their namespaces.
    pub fn apply(&self, manifests: &str) -> Result<()> {
        self.run(["apply", "--filename=-"], Some(manifests)).map(drop)
    }

    /// The same, as JSON.
    pub fn get(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.kubectl([&["get", "--output=json"], arguments].concat())?;
        serde_json::from_str(&text).with_context(|| format!("kubectl get {}", arguments.join(" ")))
    }

    /// A namespace that is deleted when the test is done with it.
    pub fn namespace(&self, name: &str) -> Result<Namespace> {
        self.kubectl(["create", "namespace", name])?;
        Ok(Namespace { cluster: self.clone(), name: name.to_owned() })
    }

    /// The names of its nodes.
    pub fn nodes(&self) -> Result<Vec<String>> {
        let nodes = self.get(&["nodes"])?;
        let items = nodes["items"].as_array().context("a list of nodes")?;
        Ok(items.iter().filter_map(|node| node["metadata"]["name"].as_str()).map(str::to_owned).collect())
    }

    fn run<S: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = S>,
        input: Option<&str>,
    ) -> Result<String> {
        let mut command = Command::new(&self.kubectl);
        command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
        let mut child = command.spawn().with_context(|| format!("starting {}", self.kubectl.display()))?;
        if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
            stdin.write_all(input.as_bytes()).context("writing to kubectl")?;
        }
        let output = child.wait_with_output().context("waiting for kubectl")?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            let complained = String::from_utf8_lossy(&output.stderr);
            bail!("{command:?}: {} {}", said.trim(), complained.trim());
        }
        Ok(said)
    }
}

/// A namespace of the cluster.
#[derive(Debug)]
pub struct Namespace {
    cluster: Cluster,
    name: String,
}

impl Namespace {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What kubectl says in this namespace.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.cluster.kubectl(self.arguments(arguments))
    }

    /// The same, as JSON.
    pub fn get(&self, arguments: &[&str]) -> Result<Value> {
        self.cluster.get(&self.arguments(arguments))
    }

    /// Applies manifests.
    pub fn apply(&self, manifests: &str) -> Result<()> {
        self.cluster.run(self.arguments(&["apply", "--filename=-"]), Some(manifests)).map(|_| ())
    }

    /// Applies the manifests of a file of the workspace.
    pub fn apply_file(&self, path: &str) -> Result<()> {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
        let text = std::fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        self.apply(&text)
    }

    /// Waits until every Deployment has all its pods ready.
    pub fn deployed(&self) -> Result<()> {
        self.kubectl(&["wait", "--for=condition=Available", "deployment", "--all", PATIENCE]).map(|_| ())
    }

    /// A pod on this node that does nothing but wait for commands: busybox and curl.
    pub fn client(&self, name: &str, node: &str) -> Result<()> {
        self.apply(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\nspec:\n  nodeName: {node}\n  \
             terminationGracePeriodSeconds: 0\n  containers:\n    - name: client\n      image: {image}\n      \
             imagePullPolicy: Never\n      command: [\"sleep\", \"infinity\"]\n",
            image = self.cluster.client
        ))?;
        self.kubectl(&["wait", "--for=condition=Ready", &format!("pod/{name}"), PATIENCE]).map(|_| ())
    }

    /// What a command in a pod prints.
    pub fn exec(&self, pod: &str, command: &[&str]) -> Result<String> {
        self.kubectl(&[&["exec", pod, "--"], command].concat())
    }

    fn arguments<'a>(&'a self, arguments: &[&'a str]) -> Vec<&'a str> {
        // Before the rest: what comes after `--` is no longer kubectl's.
        [&["--namespace", self.name.as_str()], arguments].concat()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let deleted = self.cluster.kubectl(["delete", "namespace", self.name.as_str(), "--wait=false"]);
        if let Err(error) = deleted {
            eprintln!("the namespace {} stays: {error:#}", self.name);
        }
    }
}
