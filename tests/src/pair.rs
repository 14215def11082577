//! The world most promises are tested in: two nodes, an agent on each, a client pod on the first.
//!
//! Promises: what [`Pair::apply`] wrote is in force in both agents when it returns. Tested by everything that uses it.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Result, ensure};

use crate::{Agent, Lab, Node, Pod};

/// Two nodes with an agent each, and a client on node `a`.
#[derive(Debug)]
pub struct Pair {
    /// The lab; services are made with it.
    pub lab: Lab,
    /// The client's node.
    pub a: Node,
    /// The other node.
    pub b: Node,
    /// Agent of node `a`.
    pub agent_a: Agent,
    /// Agent of node `b`.
    pub agent_b: Agent,
    /// An enrolled pod without an app.
    pub client: Pod,
    markers: AtomicU32,
}

impl Pair {
    /// Makes the world; both agents are ready and the client is enrolled.
    pub async fn new(name: &str) -> Result<Self> {
        Self::with(name, &[]).await
    }

    /// The same, with these flags for both agents.
    pub async fn with(name: &str, flags: &[&str]) -> Result<Self> {
        let lab = Lab::new(name).await?;
        let (a, b) = (lab.node("a").await?, lab.node("b").await?);
        let client = a.pod("client").sa("client").label("app", "client").start().await?;
        let agent = |node: &Node| flags.iter().fold(node.agent(), |agent, flag| agent.arg(*flag)).start();
        let (agent_a, agent_b) = tokio::try_join!(agent(&a), agent(&b))?;
        client.enrolled().await?;
        Ok(Self { lab, a, b, agent_a, agent_b, client, markers: AtomicU32::new(0) })
    }

    /// Writes a manifest and waits until both agents have it in force.
    pub async fn apply(&self, file: &str, yaml: &str) -> Result<()> {
        self.lab.apply(file, yaml)?;
        self.settled().await
    }

    /// Waits until everything written so far is in force: an agent reads its whole directory at once, so a service
    /// written last says that all before it was read.
    pub async fn settled(&self) -> Result<()> {
        let marker = format!("marker-{}", self.markers.fetch_add(1, Ordering::Relaxed));
        let host = self.lab.service(&marker).port("tcp", 1, 1).apply()?.host();
        for agent in [&self.agent_a, &self.agent_b] {
            agent
                .config("what was written is in force", |dump| {
                    ensure!(dump.to_string().contains(&host), "{host} is not there yet");
                    Ok(())
                })
                .await?;
        }
        self.lab.delete(&format!("service-default-{marker}.yaml"))
    }

    /// Ends both agents, which must succeed, and finds nothing left of them or the lab.
    pub async fn finish(self) -> Result<()> {
        for agent in [self.agent_a, self.agent_b] {
            let name = agent.node().name().to_owned();
            let status = agent.stop().await?;
            ensure!(status.success(), "the agent of node {name} ended with {status}");
        }
        self.lab.finish().await
    }
}

/// The sum of the series of a metric whose labels contain all of these; 0 where there is none yet.
pub fn metric(exposition: &str, name: &str, labels: &[(&str, &str)]) -> f64 {
    let wanted: BTreeMap<&str, &str> = labels.iter().copied().collect();
    exposition
        .lines()
        .filter_map(|line| line.strip_prefix(name))
        .filter(|rest| rest.starts_with(['{', ' ']))
        .filter(|rest| wanted.iter().all(|(key, value)| rest.contains(&format!("{key}=\"{value}\""))))
        .filter_map(|rest| rest.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}
