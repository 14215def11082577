//! An agent killed under traffic: pods that ask for `open` go on untouched, all others are refused at once and nothing of
//! theirs leaves in the clear; the next agent serves all of them, and connections made meanwhile stay.

use std::{
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context as _, Result, bail, ensure};
use lab::{Agent, Lab, Pod, Recording, apps, eventually, metric, require_root};

const PORT: u16 = 7000;
const WHEN: &str = "mesh.io/when-agent-is-down";

/// How often a pod that is not served is tried.
const TRIES: usize = 5;

/// Whether a TCP connection of `from` to `to` was begun on the wire.
fn has_syn(recording: &Recording, from: &Pod, to: &Pod) -> bool {
    let (std::net::IpAddr::V4(from), std::net::IpAddr::V4(to)) = (from.ip(), to.ip()) else { return false };
    recording.frames.iter().any(|frame| {
        let ip = frame.get(14..).unwrap_or_default();
        let header = ip.first().map_or(0, |first| usize::from(first & 0xf) * 4);
        frame.get(12..14) == Some(&[8, 0])
            && ip.get(9) == Some(&6)
            && ip.get(12..16) == Some(&from.octets())
            && ip.get(16..20) == Some(&to.octets())
            // SYN without ACK.
            && ip.get(header + 13).is_some_and(|flags| flags & 0x12 == 2)
    })
}

/// Connections one after another until told; what became of each.
fn traffic(pod: &Pod, to: &Pod, stop: &Arc<AtomicBool>) -> tokio::task::JoinHandle<Vec<Result<bool>>> {
    let (pod, to, stop) = (pod.clone(), to.at(PORT), Arc::clone(stop));
    tokio::spawn(async move {
        let mut seen = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            seen.push(pod.tcp(to, 1000, &[]).await.map(|answer| answer.intact));
        }
        seen
    })
}

async fn is_served(from: &Pod, to: &Pod) -> Result<()> {
    for target in [to.at(PORT), to.at6(PORT)] {
        let answer = from.tcp(target, 1000, &[]).await?;
        ensure!(answer.intact && answer.peer == target, "{answer:?}");
    }
    Ok(())
}

async fn is_refused(from: &Pod, to: &Pod) -> Result<()> {
    for target in [to.at(PORT), to.at6(PORT)] {
        match from.tcp(target, 1000, &[]).await {
            Ok(answer) => bail!("{target} was reached: {answer:?}"),
            Err(error) => ensure!(format!("{error:#}").contains("refused"), "{target}: {error:#}"),
        }
    }
    Ok(())
}

/// A connection that says `one`, and `two` once `go` is there; each comes back.
fn long_lived(from: &Pod, to: &Pod, go: &std::path::Path) -> Result<lab::Process> {
    let script = format!(
        "exec 3<>/dev/tcp/{}/{PORT}; echo one >&3; read -r line <&3; echo \"$line\"; \
         until [ -e {} ]; do sleep 0.05; done; echo two >&3; read -r line <&3; echo \"$line\"",
        to.ip(),
        go.display()
    );
    let mut command = Command::new("bash");
    command.args(["-c", &script]);
    from.spawn(command)
}

async fn says(process: &lab::Process, expected: &str) -> Result<()> {
    eventually("an answer on a connection that stays", async || {
        let said = process.stdout();
        ensure!(said == expected, "{said:?} is not {expected:?}\n{}", process.tail());
        Ok(())
    })
    .await
}

async fn captured(agent: &Agent) -> Result<f64> {
    let metrics = agent.metrics().await?;
    Ok(metric(&metrics, "istio_tcp_connections_opened_total", &[("reporter", "source")]))
}

#[tokio::test]
async fn closed_refuses_open_passes_and_the_next_agent_serves_both() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let lab = Lab::new("killed").await?;
    let (a, b) = (lab.node("a").await?, lab.node("b").await?);
    let shut = a.pod("shut").start().await?;
    let open = a.pod("open").annotation(WHEN, "open").start().await?;
    // Without a mesh: what it receives is what was sent.
    let stranger = b.pod("stranger").unenrolled().start().await?;
    for pod in [&shut, &open, &stranger] {
        pod.serve(apps::tcp_echo(PORT)).await?;
    }
    let agent = a.agent().start().await?;
    for pod in [&shut, &open] {
        pod.enrolled().await?;
        is_served(pod, &stranger).await?;
        is_served(&stranger, pod).await?;
    }
    ensure!(captured(&agent).await? >= 4.0, "not by way of the agent");

    let stop = Arc::new(AtomicBool::new(false));
    let loads = [traffic(&shut, &stranger, &stop), traffic(&open, &stranger, &stop)];
    let before = captured(&agent).await?;
    eventually("traffic of both pods", async || {
        ensure!(captured(&agent).await? >= before + 6.0);
        Ok(())
    })
    .await?;
    agent.kill().await?;
    let tap = lab.tap()?;
    for _ in 0..TRIES {
        is_refused(&shut, &stranger).await?;
        is_refused(&stranger, &shut).await?;
        is_served(&open, &stranger).await?;
        is_served(&stranger, &open).await?;
    }
    stop.store(true, Ordering::Relaxed);
    for (load, refuses) in loads.into_iter().zip([true, false]) {
        let seen = load.await?;
        let last = seen.last().context("no traffic")?;
        ensure!(last.is_err() == refuses, "{last:?}");
    }
    let recording = tap.stop()?;
    ensure!(!has_syn(&recording, &shut, &stranger), "left in the clear");
    ensure!(has_syn(&recording, &open, &stranger), "the tap sees nothing");

    let go = lab.config_dir().with_file_name("go");
    let staying = [long_lived(&open, &stranger, &go)?, long_lived(&stranger, &open, &go)?];
    for process in &staying {
        says(process, "one\n").await?;
    }
    let agent = a.agent().start().await?;
    for pod in [&shut, &open] {
        pod.enrolled().await?;
        is_served(pod, &stranger).await?;
        is_served(&stranger, pod).await?;
    }
    ensure!(captured(&agent).await? >= 4.0, "not by way of the agent");
    std::fs::write(&go, "")?;
    for process in &staying {
        says(process, "one\ntwo\n").await?;
    }
    lab.finish().await
}

/// The annotation can change while the pod runs; one that cannot be read changes nothing.
#[tokio::test]
async fn the_last_readable_annotation_counts() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let lab = Lab::new("killed-annotated").await?;
    let (a, b) = (lab.node("a").await?, lab.node("b").await?);
    let pod = a.pod("p").start().await?;
    let stranger = b.pod("stranger").unenrolled().start().await?;
    stranger.serve(apps::tcp_echo(PORT)).await?;
    let agent = a.agent().arg("--when-agent-is-down").arg("open").start().await?;
    pod.enrolled().await?;

    let seen = agent.revision().await?;
    pod.annotate(WHEN, Some("closed"))?;
    agent.revision_after(seen).await?;
    for (name, value) in [(WHEN, "ajar"), ("mesh.io/exclude-outbound-ports", "7000,http")] {
        pod.annotate(name, Some(value))?;
        agent
            .config("a problem that names annotation and value", |dump| {
                let problems = dump["problems"].to_string();
                let word = value.rsplit(',').next().unwrap_or_default();
                ensure!(problems.contains(name) && problems.contains(word), "{problems}");
                ensure!(dump["workloads"].to_string().contains("\"closed\""), "{}", dump["workloads"]);
                Ok(())
            })
            .await?;
        pod.annotate(name, (name == WHEN).then_some("closed"))?;
    }
    let lacks = |text: &serde_json::Value, what: &str| -> Result<()> {
        ensure!(!text.to_string().contains(what), "{text}");
        Ok(())
    };
    agent.config("no problem", |dump| lacks(&dump["problems"], "annotations")).await?;
    pod.annotate("mesh.io/exclude-outbound-ports", Some("7000"))?;
    eventually("the pod's connections around the agent", async || {
        is_served(&pod, &stranger).await?;
        let flows = agent.meshctl(&["flows"]).await?;
        ensure!(flows.contains("excluded"), "{flows}");
        Ok(())
    })
    .await?;
    pod.annotate("mesh.io/exclude-outbound-ports", None)?;
    agent.config("nothing excluded", |dump| lacks(&dump["workloads"], "7000")).await?;
    eventually("the end of the exclusion in the kernel", async || {
        let map = agent.meshctl(&["maps", "dump", "POLICIES", "-o", "json"]).await?;
        ensure!(!map.contains("7000"), "{map}");
        Ok(())
    })
    .await?;
    agent.kill().await?;
    is_refused(&pod, &stranger).await?;
    a.clean().await?;
    is_served(&pod, &stranger).await?;
    lab.finish().await
}
