//! Controllers: `mesh-agent controller` processes, and the agents that ask one for certificates.
//!
//! Promises: the controller runs in its node's network namespace, with a state directory of the lab, and is ready when
//! [`Node::controller`] returns. Tested by `tests/certificate_authority.rs`.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    agent::{AgentBuilder, run},
    binary, eventually,
    fetch::get_inside,
    lab::Role,
    node::Node,
    process::Process,
};

/// Where the certificate service is.
const PORT: u16 = 15012;
/// Where a controller serves `/healthz/ready`: agents of the same node have their own.
const READINESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 15023);
/// The name in its certificate, unless told otherwise.
const SERVER_NAME: &str = "mesh-controller.mesh-system.svc";
/// How long a controller may take to end.
const GRACE: Duration = Duration::from_secs(20);

/// A running controller.
#[derive(Debug)]
pub struct Controller {
    node: Node,
    process: Process,
    state_dir: PathBuf,
    root: PathBuf,
}

impl Node {
    /// Starts a controller with these flags besides what the node settles, and waits until it is ready. All controllers of
    /// a lab share one state directory, and so one authority.
    pub async fn controller(&self, flags: &[&str]) -> Result<Controller> {
        let state_dir = self.world.dir.join("controller");
        let mut command = Command::new(binary("mesh-agent", "MESH_AGENT_BIN", "mesh-agent")?);
        command.arg("controller").arg("--config").arg(self.world.config_dir());
        command.arg("--state-dir").arg(&state_dir);
        command.args(["--listen", &format!("0.0.0.0:{PORT}"), "--readiness", &READINESS.to_string()]);
        command.args(flags);
        let process = self.spawn_as(command, Role::Agent)?;
        eventually("readiness of the controller", async || {
            ensure!(process.status().is_none(), "it has ended");
            let (status, body) = get_inside(self.netns(), READINESS, "/healthz/ready").await?;
            ensure!(status.is_success(), "{status}: {body}");
            Ok(())
        })
        .await
        .with_context(|| process.tail())?;
        let root = state_dir.join("ca-cert.pem");
        Ok(Controller { node: self.clone(), process, state_dir, root })
    }
}

impl Controller {
    /// Where agents reach it.
    pub fn address(&self) -> String {
        SocketAddr::new(self.node.addresses().v4.into(), PORT).to_string()
    }

    /// Agents are to believe these roots, where they are not in its state directory.
    #[must_use]
    pub fn believed_by(self, root: PathBuf) -> Self {
        Self { root, ..self }
    }

    /// Its keys and certificates.
    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// Where the agent of this node has its token.
    pub fn token_file(&self, node: &Node) -> PathBuf {
        self.node.world.dir.join(format!("token-{}", node.name()))
    }

    /// Makes the token of this node's agent, as its operator does, and puts it where the agent looks.
    pub async fn token(&self, node: &Node) -> Result<String> {
        let path = self.token_file(node);
        let mut command = Command::new(binary("mesh-agent", "MESH_AGENT_BIN", "mesh-agent")?);
        command.args(["token", "--node", node.name()]).arg("--state-dir").arg(&self.state_dir);
        command.arg("--out").arg(&path);
        run(&self.node, command).await?;
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    }

    /// Begins an agent of this node that asks this controller; it has a token once [`Self::token`] has made one.
    pub fn agent(&self, node: &Node) -> AgentBuilder {
        [
            "--ca-address".to_owned(),
            self.address(),
            "--ca-server-name".to_owned(),
            SERVER_NAME.to_owned(),
            "--ca-root".to_owned(),
            self.root.to_string_lossy().into_owned(),
            "--ca-token".to_owned(),
            self.token_file(node).to_string_lossy().into_owned(),
        ]
        .into_iter()
        .fold(node.agent(), AgentBuilder::arg)
    }

    /// The lines of its log.
    pub fn log(&self) -> Vec<String> {
        self.process.stderr().lines().map(str::to_owned).collect()
    }

    /// The lines of its log that tell of certificates issued (`outcome` `issued`) or refused (`refused`).
    pub fn audit(&self, outcome: &str) -> Vec<String> {
        let outcome = format!("outcome=\"{outcome}\"");
        let log = self.process.stderr();
        let lines = log.lines().filter(|line| line.contains("audit:") && line.contains(&outcome));
        lines.map(str::to_owned).collect()
    }

    /// Waits for a line about certificates that contains all of these.
    pub async fn audited(&self, outcome: &str, parts: &[&str]) -> Result<()> {
        eventually("a line about a certificate", async || {
            let lines = self.audit(outcome);
            let found = lines.iter().any(|line| parts.iter().all(|part| line.contains(part)));
            ensure!(found, "no line has all of {parts:?}:\n{}", lines.join("\n"));
            Ok(())
        })
        .await
    }

    /// Stops it with SIGTERM; it must end well.
    pub async fn stop(self) -> Result<()> {
        self.node.world.forget(&self.process);
        let status = self.process.stop(GRACE).await?;
        ensure!(status.success(), "the controller ended with {status}\n{}", self.process.tail());
        Ok(())
    }
}
