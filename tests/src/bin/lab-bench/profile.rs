//! The load of a suite on the mesh alone: to see where the agents spend their time, by samples of their stacks that perf
//! takes, or to let a build of them count what it does.
//!
//! Promises: nothing is put into the kernel, neither probes nor programs: a clock of each processor interrupts what runs,
//! ten times a hundredth of a second at most. What comes out is what `perf script` says, for whoever folds it. Tested in
//! `tests/benchmarks.rs`.

use std::{
    fs::File,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use lab::{Agent, Lab};

use crate::{
    Suite,
    load::{Connections, Exchange, bulk, calls, exchange, flood},
    peers::{Course, Traffic, agents},
    rounds::Plan,
    world::finish,
};

const PERF: &str = "/usr/bin/perf";
/// Samples a second of each thread: no multiple of what else is done in time with the clock.
const FREQUENCY: &str = "499";
/// Stacks are unwound by what the compiler says of them, up to so many bytes: no build with frame pointers is needed.
const STACKS: &str = "dwarf,16384";
const EXCHANGE: Exchange = Exchange { bytes: 1024, connections: 64 };
const STREAMS: u32 = 100;

/// Puts the load of a suite on the mesh alone, and what `perf script` says of both agents into a file.
pub async fn run(suite: Suite, plan: &Plan, out: &Path) -> Result<()> {
    ensure!(Path::new(PERF).is_file(), "no {PERF}: `cargo xtask profile` installs it");
    let mesh = Mesh::of(suite).await?;
    // Beside it whatever it is called: perf writes the one while it reads the other.
    let samples = out.with_added_extension("perf");
    // Load for longer than is recorded.
    let longer = Plan { seconds: plan.seconds + 2.0, ..*plan };
    let (recorded, loaded) =
        tokio::join!(record(&mesh.agents, plan.seconds, &samples), load(suite, &longer, &mesh.course));
    finish(mesh.lab, mesh.agents).await?;
    recorded.and(loaded)?;
    let said = script(&samples, out);
    std::fs::remove_file(&samples).context("removing what perf recorded")?;
    said
}

/// Puts the load of a suite on the mesh alone, and ends the agents so that they can write what they have counted: those of
/// a build that counts its branches do (`cargo xtask dist`).
pub async fn train(suite: Suite, plan: &Plan) -> Result<()> {
    let mesh = Mesh::of(suite).await?;
    let loaded = load(suite, plan, &mesh.course).await;
    finish(mesh.lab, mesh.agents).await?;
    loaded
}

/// The agents a suite puts its load on, and the way that load takes.
struct Mesh {
    lab: Lab,
    course: Course,
    agents: Vec<Agent>,
}

impl Mesh {
    async fn of(suite: Suite) -> Result<Self> {
        let traffic = match suite {
            Suite::Http | Suite::Connections | Suite::SameNode => Traffic::Http,
            Suite::Tcp | Suite::Neighbour => Traffic::Bytes,
            Suite::Grpc => Traffic::Grpc,
            _ => bail!("{} has no load that an agent carries", suite.name()),
        };
        let lab = Lab::new("bench-profile").await?;
        let a = lab.node("a").await?;
        let b = if suite == Suite::SameNode { a.clone() } else { lab.node("b").await? };
        let course = Course::meshed(&lab, "server", traffic, &a, &b).await?;
        let nodes = if suite == Suite::SameNode { vec![&a] } else { vec![&a, &b] };
        let agents = agents(&nodes).await?;
        course.ready().await?;
        Ok(Self { lab, course, agents })
    }
}

async fn load(suite: Suite, plan: &Plan, course: &Course) -> Result<()> {
    match suite {
        Suite::Grpc => drop(calls(course, STREAMS, plan.seconds).await?),
        Suite::Tcp => drop(exchange(plan, course, EXCHANGE).await?),
        Suite::Neighbour => drop(bulk(plan, course).await?),
        Suite::Connections => {
            flood(&course.client, &course.url(), Connections::New, plan.seconds).await?;
        }
        _ => drop(flood(&course.client, &course.url(), Connections::Kept, plan.seconds).await?),
    }
    Ok(())
}

async fn record(agents: &[Agent], seconds: f64, samples: &Path) -> Result<()> {
    let processes: Vec<_> = agents.iter().map(|agent| agent.process().pid().to_string()).collect();
    let mut perf = tokio::process::Command::new(PERF);
    perf.args(["record", "--quiet", "-e", "cpu-clock", "-F", FREQUENCY, "--call-graph", STACKS]);
    perf.args(["-p", &processes.join(","), "-o"]).arg(samples).args(["--", "sleep", &seconds.to_string()]);
    let output = perf.kill_on_drop(true).output().await?;
    ensure!(output.status.success(), "perf record: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn script(samples: &Path, out: &Path) -> Result<()> {
    let file = File::create(out).with_context(|| format!("creating {}", out.display()))?;
    let mut perf = Command::new(PERF);
    // What was inlined is not asked for: that takes minutes, and a name for each call is enough.
    perf.args(["script", "--no-inline", "-i"]).arg(samples).stdout(file).stderr(Stdio::null());
    ensure!(perf.status()?.success(), "perf script cannot read what perf recorded");
    Ok(())
}
