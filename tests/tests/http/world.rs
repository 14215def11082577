//! Two nodes, a client on the first, and the same app on both: near, on the client's node, and far.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use lab::{Agent, Pair, Pod, Service, apps, eventually, fields, metric, require_root};

/// The app's ports as services call them, all of them leading to one port of the app.
pub const HTTP: u16 = 80;
/// Declared HTTP/2.
pub const HTTP2: u16 = 81;
/// Declared nothing.
pub const UNDECLARED: u16 = 82;
/// gRPC.
pub const GRPC: u16 = 50051;

/// Where the HTTP app listens.
pub const APP: u16 = 8080;

/// One app with its service.
#[derive(Debug)]
pub struct Side {
    pub pod: Pod,
    pub service: Service,
}

impl Side {
    pub fn name(&self) -> &str {
        self.pod.name()
    }

    pub fn url(&self, path: &str) -> String {
        self.service.url(HTTP, path)
    }

    pub fn at(&self, port: u16) -> SocketAddr {
        self.service.at(port)
    }
}

/// Waits until the series of an agent's metric with these labels say exactly this: what ends by a client that leaves is
/// counted once the agent has noticed.
pub async fn counted(agent: &Agent, name: &str, labels: &[(&str, &str)], count: u64) -> Result<()> {
    eventually("what is counted", async || {
        let metrics = agent.metrics().await?;
        let seen = metric(&metrics, name, labels);
        let others: Vec<_> = metrics.lines().filter(|line| line.starts_with(name)).collect();
        ensure!((seen - count as f64).abs() < f64::EPSILON, "{seen}, not {count}: {labels:?} in {others:#?}");
        Ok(())
    })
    .await
}

/// Waits until an agent's access log has exactly so many lines in which each of these keys has this value.
pub async fn logged_times(agent: &Agent, expected: &[(&str, &str)], count: usize) -> Result<()> {
    eventually("lines of the access log", async || {
        let lines = agent.access_log();
        let wanted = |line: &&String| {
            let line = fields(line);
            expected.iter().all(|(key, value)| line.get(*key).is_some_and(|found| found == value))
        };
        let seen = lines.iter().filter(wanted).count();
        let last = &lines[lines.len().saturating_sub(20)..];
        ensure!(seen == count, "{seen} lines, not {count}: {expected:?}; the last are\n{}", last.join("\n"));
        Ok(())
    })
    .await
}

/// The world of these tests.
pub struct World {
    pub pair: Pair,
    pub near: Side,
    pub far: Side,
}

impl World {
    /// `None`, said so, where the lab cannot run.
    pub async fn new(name: &str) -> Result<Option<Self>> {
        Self::with(name, &[]).await
    }

    /// The same, with these flags for both agents.
    pub async fn with(name: &str, flags: &[&str]) -> Result<Option<Self>> {
        if !require_root()? {
            return Ok(None);
        }
        let pair = Pair::with(name, flags).await?;
        let near = pair.a.pod("near").sa("near").label("app", "near").start().await?;
        let far = pair.b.pod("far").sa("far").label("app", "far").start().await?;
        let mut sides = Vec::new();
        for pod in [near, far] {
            pod.serve(apps::http(APP)).await?;
            pod.serve(apps::grpc(9000)).await?;
            let service = pair.lab.service(pod.name()).selector("app", pod.name());
            let service = service.port("http", HTTP, APP).port("http2", HTTP2, APP);
            let service = service.port("odd", UNDECLARED, APP).port("grpc", GRPC, 9000).apply()?;
            sides.push(Side { pod, service });
        }
        pair.settled().await?;
        for side in &sides {
            side.pod.enrolled().await?;
        }
        let (far, near) = (sides.pop(), sides.pop());
        let sides = near.zip(far).ok_or_else(|| anyhow::anyhow!("two were made"))?;
        Ok(Some(Self { pair, near: sides.0, far: sides.1 }))
    }

    /// Both, one after the other.
    pub fn both(&self) -> [&Side; 2] {
        [&self.near, &self.far]
    }

    pub fn client(&self) -> &Pod {
        &self.pair.client
    }

    /// Waits until the client's agent has counted exactly so many requests with these labels, as their source.
    pub async fn requests(&self, labels: &[(&str, &str)], count: u64) -> Result<()> {
        let labels = [&[("reporter", "source"), ("source_workload", "client")], labels].concat();
        counted(&self.pair.agent_a, "istio_requests_total", &labels, count).await
    }

    pub async fn finish(self) -> Result<()> {
        self.pair.finish().await
    }
}
