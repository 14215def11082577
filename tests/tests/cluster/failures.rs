//! The mesh while something else fails: the API server away, an agent killed. What runs goes on, nothing is sent in the clear, and
//! everything is well again soon afterwards.

use std::{
    thread::sleep,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, ensure};
use lab::cluster::Cluster;

use crate::{
    installed::{Mesh, SYSTEM, meshed},
    load,
};

/// Seconds after an agent has started again within which all has to be well.
const WELL_AGAIN: u64 = 10;

/// Ends the agent of a node as a crash would.
const KILL: &str = "for one in /proc/[0-9]*; do \
                    if [ \"$(cat $one/comm 2>/dev/null)\" = mesh-agent ] && tr '\\0' ' ' < $one/cmdline | grep -q ' node'; \
                    then kill -9 ${one#/proc/} && echo killed; fi; done";

fn now() -> Result<u64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())
}

#[test]
fn the_api_server_is_away_for_a_minute_and_no_request_fails() -> Result<()> {
    let Some(cluster) = Cluster::alone()? else { return Ok(()) };
    let mesh = Mesh::install(&cluster)?;
    let namespace = meshed(&cluster, "alone")?;
    let gone_on = (|| {
        let nodes = load::begin(&cluster, &namespace)?;
        cluster.stop("kube-apiserver")?;
        let gone = now()?;
        // A minute without it is what is promised.
        sleep(Duration::from_mins(1));
        cluster.start("kube-apiserver")?;
        let back = now()?;
        for node in &nodes {
            let answers = load::end(&namespace, node)?;
            let failed: Vec<_> = answers.iter().filter(|(_, status)| status != "200").collect();
            ensure!(failed.is_empty(), "requests of {node} between {gone} and {back} failed: {failed:?}");
            let meanwhile = answers.iter().filter(|(sent, _)| (gone..=back).contains(sent)).count();
            ensure!(meanwhile > 60, "{node} sent {meanwhile} requests while there was no API server");
        }
        // And what changes afterwards is followed.
        mesh.ready()?;
        namespace.kubectl(&["rollout", "restart", "deployment/server"])?;
        namespace.kubectl(&["rollout", "status", "deployment/server", "--timeout=120s"])?;
        for node in &nodes {
            let status = "curl -s -o /dev/null -w '%{http_code}' --max-time 10 http://server/passwd";
            let status = namespace.exec(node, &["sh", "-c", status])?;
            ensure!(status == "200", "{node}: {status}");
        }
        Ok(())
    })();
    gone_on.with_context(|| mesh.said())
}

#[test]
fn a_killed_agent_takes_nothing_new_and_all_is_well_again() -> Result<()> {
    let Some(cluster) = Cluster::alone()? else { return Ok(()) };
    let mesh = Mesh::install(&cluster)?;
    let namespace = meshed(&cluster, "killed")?;
    let well_again = (|| {
        let nodes = load::begin(&cluster, &namespace)?;
        let node = nodes.first().context("a node")?;
        let agent = mesh.agent_on(node)?["metadata"]["name"].as_str().context("a name")?.to_owned();
        let killed = now()?;
        let said = cluster.on_node(node, KILL)?;
        ensure!(said.trim() == "killed", "no agent was killed on {node}: {said:?}");
        let again = "--for=jsonpath={.status.containerStatuses[0].restartCount}=1";
        let agent = format!("pod/{agent}");
        for wait in [again, "--for=condition=Ready"] {
            cluster.kubectl(["wait", wait, &agent, "--namespace", SYSTEM, "--timeout=120s"])?;
        }
        let started = now()?;
        for node in &nodes {
            load::goes_on_until(&namespace, node, started + WELL_AGAIN + 5)?;
        }
        for other in &nodes {
            let answers = load::end(&namespace, other)?;
            let failed: Vec<u64> =
                answers.iter().filter(|(_, status)| status != "200").map(|(sent, _)| *sent).collect();
            let may_fail = killed.saturating_sub(1)..=started + WELL_AGAIN;
            let bad: Vec<_> = failed.iter().filter(|sent| !may_fail.contains(sent)).collect();
            ensure!(bad.is_empty(), "{other}: killed {killed}, ready {started}, and failed at {bad:?}");
            // Whoever is refused is refused at once: nobody waits for an agent that is not there.
            let times: Vec<u64> = answers.iter().map(|(sent, _)| *sent).collect();
            let longest = times.windows(2).map(|two| two[1].saturating_sub(two[0])).max().unwrap_or_default();
            ensure!(longest <= 5, "{other}: nothing was sent for {longest} s");
            println!(
                "{other}: {} of {} failed, the agent was away for {} s",
                failed.len(),
                answers.len(),
                started - killed
            );
            ensure!(other != node || !failed.is_empty(), "{other} did not notice that its agent was gone");
        }
        Ok(())
    })();
    well_again.with_context(|| mesh.said())
}
