//! Gateways: `mesh-agent gateway` processes, each in a pod outside the mesh.
//!
//! Promises: the gateway runs in its pod's network namespace and cgroup, with the lab's configuration and certificate authority,
//! and is ready when [`Pod::gateway`] returns. One that ends by itself fails [`crate::Lab::finish`].

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::{Command, ExitStatus},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::{
    Pod, Process,
    agent::fields,
    binary, eventually,
    fetch::{get_inside, get_unix},
    lab::Role,
};

/// Where the gateway serves `/metrics`, in its pod's network namespace.
const METRICS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 15020);
/// Where it serves `/healthz/ready`.
const READINESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 15021);
/// How long it may take to end.
const GRACE: Duration = Duration::from_secs(20);

/// A running gateway.
#[derive(Debug)]
pub struct Gateway {
    pod: Pod,
    process: Process,
    run_dir: PathBuf,
}

impl Pod {
    /// Starts this pod's gateway, with these flags besides what the lab settles, and waits until it is ready.
    pub async fn gateway(&self, flags: &[&str]) -> Result<Gateway> {
        let gateway = self.unready_gateway(flags)?;
        eventually("readiness of the gateway", async || {
            ensure!(gateway.process.status().is_none(), "it has ended");
            let (ready, body) = gateway.readiness().await?;
            ensure!(ready, "{body}");
            Ok(())
        })
        .await
        .with_context(|| gateway.process.tail())?;
        Ok(gateway)
    }

    /// Starts it and returns at once, for tests of gateways that cannot become ready.
    pub fn unready_gateway(&self, flags: &[&str]) -> Result<Gateway> {
        let Self { node, inner } = self;
        let run_dir = node.world.dir.join(format!("gateway-{}-{}", inner.namespace, inner.name));
        let mut command = Command::new(binary("mesh-agent", "MESH_AGENT_BIN", "mesh-agent")?);
        command.arg("gateway").arg("--pod").arg(format!("{}/{}", inner.namespace, inner.name));
        command.arg("--config").arg(node.world.config_dir());
        command.arg("--state-dir").arg(node.world.dir.join("state"));
        command.arg("--run-dir").arg(&run_dir);
        command.args(["--metrics", &METRICS.to_string(), "--readiness", &READINESS.to_string()]);
        command.env("MESH_DRAIN_DEADLINE", "4").args(flags);
        let label = format!("{}/{}", inner.namespace, inner.name);
        let process = node.world.spawn(command, &inner.netns.path(), &inner.cgroup, &label, Role::Agent)?;
        Ok(Gateway { pod: self.clone(), process, run_dir })
    }
}

impl Gateway {
    /// Its pod.
    pub fn pod(&self) -> &Pod {
        &self.pod
    }

    /// Its process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Where its certificate authority is kept, which is that of the lab's agents.
    pub fn state_dir(&self) -> PathBuf {
        self.pod.node.world.dir.join("state")
    }

    /// What it serves at `/metrics`.
    pub async fn metrics(&self) -> Result<String> {
        let (status, body) = get_inside(self.pod.netns(), METRICS, "/metrics").await?;
        ensure!(status.is_success(), "/metrics answered {status}: {body}");
        Ok(body)
    }

    /// Whether `/healthz/ready` says yes, and what it says.
    pub async fn readiness(&self) -> Result<(bool, String)> {
        let (status, body) = get_inside(self.pod.netns(), READINESS, "/healthz/ready").await?;
        Ok((status.is_success(), body))
    }

    /// Its `/config_dump`.
    pub async fn config_dump(&self) -> Result<Value> {
        let (status, body) = get_unix(&self.run_dir.join("admin.sock"), "/config_dump").await?;
        ensure!(status.is_success(), "/config_dump answered {status}: {body}");
        serde_json::from_str(&body).context("/config_dump is no JSON")
    }

    /// Waits until what is asked of its `/config_dump` holds.
    pub async fn config(&self, what: &str, expected: impl Fn(&Value) -> Result<()>) -> Result<()> {
        eventually(what, async || expected(&self.config_dump().await?)).await
    }

    /// Runs `meshctl` against it, which is told its run directory alone, and returns standard output.
    pub async fn meshctl(&self, args: &[&str]) -> Result<String> {
        let mut command = Command::new(binary("meshctl", "MESHCTL_BIN", "mesh-agent")?);
        command.arg("--run-dir").arg(&self.run_dir).args(args);
        let output = self.pod.run(command).await?;
        ensure!(output.status.success(), "meshctl: {}{}", output.stdout, output.stderr);
        Ok(output.stdout)
    }

    /// The lines of its access log in which each of these keys has this value.
    pub fn logged(&self, expected: &[(&str, &str)]) -> Vec<String> {
        let wanted = |line: &str| {
            let line = fields(line);
            expected.iter().all(|(key, value)| line.get(*key).is_some_and(|found| found == value))
        };
        self.process.stdout().lines().filter(|line| wanted(line)).map(str::to_owned).collect()
    }

    /// It was to end, and has.
    pub fn has_ended(self) {
        self.pod.node.world.forget(&self.process);
    }

    /// Stops it with SIGTERM. It is an error if it has ended already.
    pub async fn stop(self) -> Result<ExitStatus> {
        if let Some(status) = self.process.status() {
            bail!("{} had ended by itself ({status})\n{}", self.process.label(), self.process.tail());
        }
        self.pod.node.world.forget(&self.process);
        self.process.stop(GRACE).await
    }
}
