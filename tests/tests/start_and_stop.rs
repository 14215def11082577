//! An agent leaves nothing behind however its life goes: told to stop at any moment of its start, unable to start,
//! stopped in order, crashed and cleaned up after.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use lab::{Agent, Cgroups, Lab, Node, PATIENCE, require_root};
use nix::sys::signal::Signal;

/// A moment of an agent's start, by what it has made.
type Moment = fn(&Node) -> bool;

/// How often a moment is looked for: each lasts milliseconds. Without a pause the loop would take a processor from the start
/// that it waits for.
const LOOK_EVERY: Duration = Duration::from_micros(100);
/// What one start and stop takes at most, on a busy machine too.
const ROUND: Duration = Duration::from_mins(1);

/// As a start goes.
const MOMENTS: [(&str, Moment); 7] = [
    ("at once", |_| true),
    ("its admin socket is there", |node| node.run_dir().join("admin.sock").exists()),
    ("its directory of pins is there", |node| node.bpf_dir().exists()),
    ("a map is pinned", |node| holds_something(&node.bpf_dir().join("maps"))),
    ("a program is attached", |node| holds_something(&node.bpf_dir().join("links"))),
    ("all programs are attached", |node| node.run_dir().join("bpf-dir").exists()),
    ("a pod is being enrolled", |node| holds_something(&node.bpf_dir().join("pods"))),
];

fn holds_something(dir: &Path) -> bool {
    fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some())
}

/// Nothing of an agent is on disk or pinned.
fn nothing_left(node: &Node) -> Result<()> {
    for path in [node.run_dir(), node.bpf_dir()] {
        ensure!(!path.exists(), "{} is left", path.display());
    }
    Ok(())
}

async fn wait_for(node: &Node, agent: &Agent, moment: Moment) -> Result<()> {
    let (node, process) = (node.clone(), agent.process().clone());
    tokio::task::spawn_blocking(move || {
        let deadline = Instant::now() + PATIENCE;
        while !moment(&node) {
            ensure!(process.status().is_none(), "{} has ended\n{}", process.label(), process.tail());
            ensure!(Instant::now() < deadline, "the moment did not come\n{}", process.tail());
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(())
    })
    .await?
}

#[tokio::test]
async fn an_agent_told_to_stop_while_it_starts_leaves_nothing() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let lab = Lab::new("stop-starting").await?;
    let node = lab.node("a").await?;
    for pod in 0..3 {
        node.pod(&format!("p{pod}")).start().await?;
    }
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        for (what, moment) in MOMENTS {
            let round = async {
                let agent = node.agent().spawn()?;
                wait_for(&node, &agent, moment).await?;
                agent.process().signal(signal)?;
                agent.ends().await
            };
            let ended = tokio::time::timeout(ROUND, round).await;
            let ended = ended.with_context(|| format!("{signal} when {what}: not over after {ROUND:?}"))?;
            let (status, log) = ended.with_context(|| format!("{signal} when {what}"))?;
            nothing_left(&node).with_context(|| format!("{signal} when {what}: {status}\n{log}"))?;
            // Only before the first line of its own is a signal what it is for any program.
            ensure!(status.success() || what == "at once", "{signal} when {what}: {status}\n{log}");
        }
    }
    // What the lab itself looks for: links, programs, processes.
    lab.finish().await
}

#[tokio::test]
async fn a_start_that_fails_leaves_nothing_and_binds_nothing() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let lab = Lab::new("fail-starting").await?;
    let node = lab.node("a").await?;
    let nowhere = lab.config_dir().join("nowhere");
    let elsewhere = node.cgroup().join("kubepods");
    let not_a_cgroup = lab.config_dir();
    for (agent, says) in [
        (node.agent().config_dir(nowhere), "nowhere"),
        (node.agent().arg("--trust-domain").arg("NOT A DOMAIN"), "--state-dir"),
        // Loads and attaches, and then finds itself outside.
        (node.agent().cgroups(Cgroups::At(elsewhere)), "cgroup"),
        (node.agent().cgroups(Cgroups::At(not_a_cgroup)), "cgroup"),
    ] {
        let (status, log) = agent.spawn()?.ends().await?;
        ensure!(status.code() == Some(1) && log.contains(says), "{status}, expected {says}:\n{log}");
        nothing_left(&node).with_context(|| format!("{says}\n{log}"))?;
    }
    lab.finish().await
}

#[tokio::test]
async fn a_stop_leaves_nothing_and_a_crash_is_cleaned_up_after() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let lab = Lab::new("stop").await?;
    let node = lab.node("a").await?;
    let pod = node.pod("p").start().await?;
    let agent = node.agent().start().await?;
    pod.enrolled().await?;
    ensure!(node.run_dir().join("admin.sock").exists() && node.bpf_dir().exists());
    ensure!(agent.stop().await?.success());
    nothing_left(&node)?;

    let agent = node.agent().start().await?;
    pod.enrolled().await?;
    // Not from under an agent that runs.
    let refused = node.clean().await.err().context("taken from a running agent")?;
    ensure!(format!("{refused:#}").contains("another agent"), "{refused:#}");
    ensure!(agent.readiness().await?.0);
    agent.kill().await?;
    // The maps are still there to be looked at, found by the run directory alone.
    ensure!(node.run_dir().join("bpf-dir").exists());
    let precious = node.run_dir().join("precious");
    fs::write(&precious, "of somebody else")?;
    let refused = node.clean().await.err().context("a directory with another's file was removed")?;
    ensure!(format!("{refused:#}").contains("holds precious"), "{refused:#}");
    ensure!(precious.exists() && !node.bpf_dir().exists());
    fs::remove_file(precious)?;
    node.clean().await?;
    nothing_left(&node)?;
    // Twice is fine.
    node.clean().await?;
    lab.finish().await
}

/// Signals are awaited at once, not after some time: a start takes no longer for being broken off.
#[tokio::test]
async fn a_start_is_broken_off_at_once() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let lab = Lab::new("stop-soon").await?;
    let node = lab.node("a").await?;
    let agent = node.agent().arg("--drain-deadline").arg("60").spawn()?;
    wait_for(&node, &agent, MOMENTS[5].1).await?;
    agent.process().signal(Signal::SIGTERM)?;
    let status = agent.process().wait(Duration::from_secs(10)).await?;
    ensure!(status.success(), "{status}");
    agent.ends().await?;
    nothing_left(&node)?;
    lab.finish().await
}
