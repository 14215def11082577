//! Two nodes, a client and a server on the first, and a service of the server for each family.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use lab::{Agent, Pair, Pod, Service, apps, eventually};
use mesh_agent::capture::inspect;
use mesh_common::maps;
use serde_json::Value;

/// Where the server listens that says in the end what it saw.
pub const PORT: u16 = 7000;
/// Where the one listens that does not.
pub const PLAIN: u16 = 7001;

pub struct World {
    pub pair: Pair,
    pub near: Pod,
    pub service: Service,
    /// Address of the service whose endpoints are IPv6.
    pub v6: SocketAddr,
}

impl World {
    pub async fn new(name: &str) -> Result<Self> {
        Self::with(name, &[]).await
    }

    /// With these flags for both agents.
    pub async fn with(name: &str, flags: &[&str]) -> Result<Self> {
        let pair = Pair::with(name, flags).await?;
        let near = pair.a.pod("near").sa("keeper").label("app", "near").start().await?;
        near.serve(apps::tcp_echo(PORT).arg("--report")).await?;
        near.serve(apps::tcp_echo(PLAIN)).await?;
        let service = pair.lab.service("near").selector("app", "near").port("tcp", 70, PORT);
        let service = service.port("tcp-plain", 71, PLAIN).apply()?;
        pair.apply(
            "near6.yaml",
            "apiVersion: v1\nkind: Service\nmetadata: { name: near6, namespace: default }\nspec:\n  \
             clusterIPs: ['fd00:96::7706']\n  ipFamilies: [IPv6]\n  selector: { app: near }\n  \
             ports: [{ name: tcp, port: 70, targetPort: 7000 }]\n",
        )
        .await?;
        near.enrolled().await?;
        let v6 = "[fd00:96::7706]:70".parse()?;
        let world = Self { pair, near, service, v6 };
        for dialled in [world.v4(), v6] {
            if !flags.contains(&"--direct=false") {
                is_direct(&world.pair.agent_a, &world.pair.client, dialled).await?;
            }
        }
        Ok(world)
    }

    /// Address of the service whose endpoints are IPv4.
    pub fn v4(&self) -> SocketAddr {
        self.service.at(70)
    }

    /// The same, of the server that says nothing of its own.
    pub fn plain(&self) -> SocketAddr {
        self.service.at(71)
    }

    /// Echoes some bytes; whether that was without the agent.
    pub async fn dial(&self, dialled: SocketAddr) -> Result<bool> {
        let seen = self.pair.client.tcp(dialled, 1000, &["--report"]).await?;
        ensure!(seen.intact && seen.peer == dialled, "{seen:?}");
        let report = seen.report.as_ref().context("no report")?;
        ensure!(report.peer == seen.local && report.peer == report.peername, "{seen:?}");
        let verdict = verdict(&self.pair.agent_a, seen.local, dialled).await?;
        ensure!(["direct", "captured"].contains(&verdict.as_str()), "{verdict}");
        Ok(verdict == "direct")
    }
}

/// What the kernel did with an app's connection.
pub async fn verdict(agent: &Agent, local: SocketAddr, dialled: SocketAddr) -> Result<String> {
    let flow = flow(agent, "outbound", local, dialled).await?;
    Ok(flow["verdict"].as_str().unwrap_or_default().to_owned())
}

/// A flow by its ends.
pub async fn flow(agent: &Agent, direction: &str, local: SocketAddr, remote: SocketAddr) -> Result<Value> {
    let (local, remote) = (local.to_string(), remote.to_string());
    let all = agent.flows().await?;
    let is = |flow: &&Value| {
        flow["direction"] == direction && flow["local"] == *local && flow["remote"] == *remote
    };
    let found = all.as_array().context("a list")?.iter().find(is).cloned();
    found.with_context(|| format!("no {direction} flow of {local} and {remote}: {all:#}"))
}

/// Waits until this pod's connections to an address are direct in the kernel.
pub async fn is_direct(agent: &Agent, client: &Pod, dialled: SocketAddr) -> Result<()> {
    eventually("direct connections are allowed in the kernel", async || {
        ensure!(routes(agent, client, dialled)?, "{} may not dial {dialled} directly", client.name());
        Ok(())
    })
    .await
}

/// Waits until this pod's connections to an address take the agent.
pub async fn is_not_direct(agent: &Agent, client: &Pod, dialled: SocketAddr) -> Result<()> {
    eventually("no direct connections are allowed in the kernel", async || {
        ensure!(!routes(agent, client, dialled)?, "{} may dial {dialled} directly", client.name());
        Ok(())
    })
    .await
}

/// Whether the kernel chooses for this pod's connections to an address.
pub fn routes(agent: &Agent, client: &Pod, dialled: SocketAddr) -> Result<bool> {
    let cookie = cookie(agent, client)?;
    let ip = dialled.ip().to_string();
    Ok(entries(agent, maps::DIRECT)?
        .iter()
        .any(|entry| entry.key["netns"] == cookie && entry.key.to_string().contains(&ip)))
}

/// The cookie by which the kernel knows a pod.
pub fn cookie(agent: &Agent, pod: &Pod) -> Result<Value> {
    let ip = pod.ip().to_string();
    let pods = entries(agent, maps::PODS)?;
    let found = pods.into_iter().find(|entry| entry.value.to_string().contains(&ip));
    Ok(found.with_context(|| format!("{} is not enrolled", pod.name()))?.key)
}

/// What is in one of the kernel's maps.
pub fn entries(agent: &Agent, map: &str) -> Result<Vec<inspect::Element>> {
    Ok(inspect::dump(&agent.bpf_dir(), map)?.entries)
}
