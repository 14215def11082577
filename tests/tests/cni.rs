//! A pod starts when it is enrolled: the CNI plugin that the agent has installed waits for it, passes on what the plugins before
//! have made, and holds back nobody else; what the agent changed on its node is as it was once it is gone.

use std::{
    fs,
    io::Write as _,
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use lab::{Agent, Lab, Node, Pod, eventually, require_root};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::{JoinHandle, spawn_blocking};

const BEFORE: &str = "{\"cniVersion\": \"1.0.0\", \"name\": \"pods\",\n \"plugins\": [{\"type\": \"ptp\"}]}";

/// A node's container runtime: its directories, and how it runs the last plugin of the chain.
struct Runtime(TempDir);

impl Runtime {
    fn new() -> Result<Self> {
        let runtime = Self(TempDir::new()?);
        for dir in [runtime.programs(), runtime.configurations()] {
            fs::create_dir(dir)?;
        }
        fs::write(runtime.list(), BEFORE)?;
        Ok(runtime)
    }

    fn programs(&self) -> PathBuf {
        self.0.path().join("bin")
    }

    fn configurations(&self) -> PathBuf {
        self.0.path().join("net.d")
    }

    fn list(&self) -> PathBuf {
        self.configurations().join("10-pods.conflist")
    }

    async fn agent(&self, node: &Node) -> Result<Agent> {
        let agent = node.agent().arg("--cni-bin-dir").arg(self.programs().to_string_lossy());
        agent.arg("--cni-conf-dir").arg(self.configurations().to_string_lossy()).start().await
    }

    /// Runs our link of the chain, as the list in force has it.
    fn runs(&self, command: &str, pod: &Pod) -> Result<JoinHandle<Result<(bool, Value)>>> {
        let list: Value = serde_json::from_str(&fs::read_to_string(self.list())?)?;
        let ours = list["plugins"].as_array().and_then(|plugins| plugins.last()).context("no plugins")?;
        let mut conf = ours.clone();
        let ip = format!("{}/32", pod.ip());
        conf["cniVersion"] = "1.0.0".into();
        conf["name"] = "pods".into();
        conf["prevResult"] = json!({"cniVersion": "1.0.0", "ips": [{"address": ip}], "interfaces": []});
        let mut plugin = Command::new(self.programs().join(ours["type"].as_str().context("no type")?));
        plugin.env_clear().env("CNI_COMMAND", command).env("CNI_CONTAINERID", pod.name());
        plugin.env("CNI_IFNAME", "eth0").env("CNI_NETNS", pod.netns().path());
        let arguments =
            format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={}", pod.namespace(), pod.name());
        plugin.env("CNI_ARGS", arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        Ok(spawn_blocking(move || {
            let mut child = plugin.spawn()?;
            child.stdin.take().context("no stdin")?.write_all(conf.to_string().as_bytes())?;
            let output = child.wait_with_output()?;
            Ok((output.status.success(), serde_json::from_slice(&output.stdout).unwrap_or(Value::Null)))
        }))
    }
}

/// What tells the agent of a pod.
fn manifest(lab: &Lab, pod: &Pod) -> PathBuf {
    lab.config_dir().join(format!("pod-{}-{}.yaml", pod.namespace(), pod.name()))
}

#[tokio::test]
async fn a_pod_starts_when_it_is_enrolled_and_nobody_else_waits() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let (lab, runtime) = (Lab::new("cni").await?, Runtime::new()?);
    let node = lab.node("a").await?;
    lab.namespace("other", false)?;
    let cart = node.pod("cart").ns("shop").start().await?;
    let job = node.pod("job").ns("other").start().await?;
    let agent = runtime.agent(&node).await?;
    cart.enrolled().await?;

    // It has its network, and the agent does not know of it yet.
    let hidden = runtime.0.path().join("cart.yaml");
    fs::rename(manifest(&lab, &cart), &hidden)?;
    cart.not_enrolled().await?;
    let adding = runtime.runs("ADD", &cart)?;
    fs::copy(&hidden, manifest(&lab, &cart))?;
    let (good, result) = adding.await??;
    ensure!(good, "{result}\n{}", agent.log().join("\n"));
    ensure!(
        [15001, 15006, 15008].iter().all(|port| cart.listens(*port)),
        "it started before it was enrolled"
    );
    ensure!(result["ips"][0]["address"] == format!("{}/32", cart.ip()), "{result}");

    let (good, result) = runtime.runs("ADD", &job)?.await??;
    ensure!(good && !job.listens(15001), "{result}");
    ensure!(runtime.runs("CHECK", &cart)?.await??.0);

    // Without an agent: enrolled namespaces wait, nobody else does, and no pod's end.
    agent.kill().await?;
    let (good, error) = runtime.runs("ADD", &cart)?.await??;
    ensure!(!good && error["code"] == 11, "{error}");
    ensure!(error["msg"].as_str().is_some_and(|msg| msg.contains("namespace shop is enrolled")), "{error}");
    ensure!(runtime.runs("ADD", &job)?.await??.0, "a pod that is not the mesh's was held back");
    ensure!(runtime.runs("DEL", &cart)?.await??.0, "a pod could not end");

    // Its successor serves what waits, and takes everything with it in the end.
    let agent = runtime.agent(&node).await?;
    ensure!(runtime.runs("ADD", &cart)?.await??.0);
    agent.stop().await?;
    ensure!(fs::read_to_string(runtime.list())? == BEFORE, "{}", fs::read_to_string(runtime.list())?);
    ensure!(fs::read_dir(runtime.programs())?.next().is_none(), "the plugin is still there");
    lab.finish().await
}

#[tokio::test]
async fn the_plugin_stays_through_an_upgrade_and_goes_with_what_a_crash_left() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let (lab, runtime) = (Lab::new("cni-up").await?, Runtime::new()?);
    let node = lab.node("a").await?;
    let cart = node.pod("cart").ns("shop").start().await?;
    let mut agent = runtime.agent(&node).await?;
    cart.enrolled().await?;
    let before = agent.upgrade().await?;
    before.wait(std::time::Duration::from_mins(1)).await?;
    ensure!(runtime.runs("CHECK", &cart)?.await??.0, "the successor does not answer");
    // Another tool rewrites its file.
    fs::write(runtime.list(), BEFORE)?;
    eventually("the plugin in the chain again", async || {
        let text = fs::read_to_string(runtime.list())?;
        ensure!(text.contains("mesh-cni"), "{text}");
        Ok(())
    })
    .await?;

    agent.kill().await?;
    let found = node.residue().await?;
    ensure!(found.iter().any(|trace| trace.to_string().contains("10-pods.conflist")), "{found:?}");
    node.clean().await?;
    ensure!(fs::read_to_string(runtime.list())? == BEFORE, "{}", fs::read_to_string(runtime.list())?);
    ensure!(fs::read_dir(runtime.programs())?.next().is_none(), "the plugin is still there");
    lab.finish().await
}
