//! How long a pod waits to be in the mesh, on a node that is full of others.

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};
use lab::{Agent, Lab, Node, Pod, bench::percentile, eventually, eventually_within};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::task::JoinSet;

use crate::{
    figures::{Figure, Measured, pooled},
    meter::Meter,
    rounds::{Plan, alternate},
    world::finish,
};

/// Pods on the node.
const PODS: usize = 200;
const QUICK_PODS: usize = 8;
/// Enrolments in each round.
const EACH_ROUND: usize = 20;
const QUICK_EACH_ROUND: usize = 2;
/// How many pods are made at a time.
const AT_ONCE: usize = 8;
/// How long an agent may take to enrol all of them.
const FIRST_ROUND: Duration = Duration::from_mins(2);

const FIGURE: &str = "manifest to enrolled";

pub async fn run(plan: &Plan) -> Result<Measured> {
    let (count, each_round) = if plan.quick { (QUICK_PODS, QUICK_EACH_ROUND) } else { (PODS, EACH_ROUND) };
    let lab = Lab::new("bench-enrolment").await?;
    let node = lab.node("full").await?;
    let pods = make(&node, count).await?;
    let started = Instant::now();
    let agent = node.agent().arg("--access-log=off").spawn()?;
    all_enrolled(&agent, count).await?;
    let first_round = started.elapsed();
    let meter = Meter::new(lab.cgroup())?;
    let mut next = pods.iter().cycle();
    let rounds = alternate(plan, &meter, 1, async |_| {
        let mut figures = Vec::new();
        for pod in next.by_ref().take(each_round) {
            figures.push(Figure::new(FIGURE, "ms", 1000.0 * enrol(&agent, pod).await?.as_secs_f64()));
        }
        Ok(figures)
    });
    let rounds = rounds.await?;
    finish(lab, [agent]).await?;
    let all: Vec<f64> = rounds.kept.iter().flatten().flatten().map(|figure| figure.value).collect();
    let row = |name, share| pooled("mesh", Figure::new(name, "ms", percentile(&all, share)), all.clone());
    Ok(Measured {
        title: format!("Enrolling a pod beside {} others", count - 1),
        about: about(count),
        rows: vec![row("manifest to enrolled, p50", 0.5), row("manifest to enrolled, p99", 0.99)],
        findings: vec![format!(
            "{} enrolments; an agent that starts on such a node has all {count} pods enrolled after {:.2} s.",
            all.len(),
            first_round.as_secs_f64()
        )],
        goals: Vec::new(),
        discarded: rounds.discarded,
        noisy: rounds.noisy,
    })
}

fn about(count: usize) -> Vec<String> {
    vec![format!(
        "{count} pods on one node, each with a service account of its own. One after the other leaves the mesh by its label \
         and joins again: from the moment its manifest is written to the moment the agent logs it as enrolled, its \
         listeners and kernel tables in place. The time includes the 50 ms of quiet that the agent waits for after a change \
         of its directory, and reading all of it again."
    )]
}

async fn make(node: &Node, count: usize) -> Result<Vec<Pod>> {
    let (mut making, mut pods) = (JoinSet::new(), Vec::new());
    for number in 0..count {
        if making.len() == AT_ONCE
            && let Some(pod) = making.join_next().await
        {
            pods.push(pod??);
        }
        let name = format!("pod-{number}");
        making.spawn(node.pod(&name).sa(&name).start());
    }
    while let Some(pod) = making.join_next().await {
        pods.push(pod??);
    }
    Ok(pods)
}

async fn all_enrolled(agent: &Agent, count: usize) -> Result<()> {
    eventually_within(FIRST_ROUND, "the enrolment of all pods", async || {
        ensure!(agent.process().status().is_none(), "the agent has ended\n{}", agent.process().tail());
        let enrolled = agent.log().iter().filter(|line| line.contains("pod enrolled")).count();
        ensure!(enrolled >= count, "{enrolled} of {count} pods are enrolled");
        Ok(())
    })
    .await
}

/// When the agent has enrolled the pod, each time that it has.
fn enrolled_at(agent: &Agent, pod: &Pod) -> Result<Vec<SystemTime>> {
    let name = format!("pod={}/{} ", pod.namespace(), pod.name());
    let lines = agent.log();
    let lines = lines.iter().filter(|line| line.contains("pod enrolled") && line.contains(&name));
    let time = |line: &String| {
        let stamp = line.split_whitespace().next().unwrap_or_default();
        let at =
            OffsetDateTime::parse(stamp, &Rfc3339).with_context(|| format!("no time begins {line:?}"))?;
        Ok(SystemTime::from(at))
    };
    lines.map(time).collect()
}

/// The pod leaves the mesh, and joins it again: how long that took.
async fn enrol(agent: &Agent, pod: &Pod) -> Result<Duration> {
    pod.enrol(false)?;
    pod.not_enrolled().await?;
    let before = enrolled_at(agent, pod)?.len();
    let written = SystemTime::now();
    pod.enrol(true)?;
    let enrolled = eventually("the pod's enrolment", async || {
        let times = enrolled_at(agent, pod)?;
        ensure!(times.len() > before, "{} is not enrolled", pod.name());
        times.last().copied().context("no time")
    });
    let enrolled = enrolled.await?;
    enrolled.duration_since(written).context("the pod was enrolled before its manifest was written")
}
