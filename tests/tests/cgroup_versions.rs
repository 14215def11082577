//! The agent finds by itself where to attach its programs: on a machine that has cgroup2 beside the controllers of cgroup v1, and on
//! one that has cgroup2 alone.

use anyhow::{Result, ensure};
use lab::{Cgroups, Lab, apps, require_root};

const APP: u16 = 8080;

/// Two pods on one node: the agent attached as it finds, one asks the other by it.
async fn captures(name: &str, cgroups: Cgroups) -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let lab = Lab::new(name).await?;
    let node = lab.node("a").await?;
    let server = node.pod("server").label("app", "server").start().await?;
    let client = node.pod("client").start().await?;
    server.serve(apps::http(APP)).await?;
    let service = lab.service("server").selector("app", "server").port("http", 80, APP).apply()?;
    let agent = node.agent().cgroups(cgroups).start().await?;
    for pod in [&server, &client] {
        pod.enrolled().await?;
    }
    let answer = client.http_get(&service.url(80, "/"), &[]).await?;
    ensure!(answer.status == 200 && answer.pod() == Some("server"), "{answer:?}");
    // Nobody knows who has asked, where nothing was captured.
    let captured = [("reporter", "destination"), ("src.workload", "client"), ("status", "200")];
    agent.logged(&captured).await?;
    lab.finish().await
}

#[tokio::test]
async fn beside_the_controllers_of_version_1() -> Result<()> {
    captures("cgroups-found", Cgroups::Found).await
}

#[tokio::test]
async fn where_there_is_version_2_alone() -> Result<()> {
    captures("cgroups-v2", Cgroups::Version2Alone).await
}
