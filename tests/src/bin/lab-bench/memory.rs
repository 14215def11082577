//! What the side that holds the clients keeps in memory: idle, for each idle HTTP connection, and for each idle tunnel.

use std::{os::unix::process::ExitStatusExt as _, time::Duration};

use anyhow::{Context as _, Result, ensure};
use lab::{Lab, Process};
use tokio::time::{Instant, sleep};

use crate::{
    figures::{Figure, Measured},
    goals::Goal,
    meter::Meter,
    peers::{Course, Kind, Root, Traffic, agents},
    rounds::{Plan, alternate},
    world::{finish, hold},
};

const IDLE: &str = "idle";
const HTTP: &str = "per idle HTTP connection";
const BYTES: &str = "per idle TCP connection";
/// Connections that are held.
const HELD: u32 = 4000;
const QUICK_HELD: u32 = 100;
const KINDS: [Kind; 2] = [Kind::Mesh, Kind::Envoy];
const MB: f64 = 1e6;
const KIB: f64 = 1024.0;
const GRACE: Duration = Duration::from_secs(20);
/// How long a proxy's memory has not got less when it is at rest: some give back what was used for a moment.
const REST: Duration = Duration::from_secs(8);
const QUICK_REST: Duration = Duration::from_millis(200);
const LOOKED_AT_EVERY: Duration = Duration::from_millis(100);

pub async fn run(plan: &Plan) -> Result<Measured> {
    ensure!(Kind::Nginx.is_installed(), "nginx is the server: `cargo xtask bench memory` installs it");
    let kinds: Vec<Kind> = KINDS.into_iter().filter(|kind| kind.is_installed()).collect();
    let (held, rest) = if plan.quick { (QUICK_HELD, QUICK_REST) } else { (HELD, REST) };
    // Only for the rule of quiet rounds: what is measured lives in labs of its own, new each time.
    let idle = Lab::new("bench-memory").await?;
    let meter = Meter::new(idle.cgroup())?;
    let plan = Plan { quick: true, rounds: plan.rounds.min(3), ..*plan };
    let rounds = alternate(&plan, &meter, kinds.len(), async |at| {
        let mut figures = fresh(kinds[at], Traffic::Http, held, rest).await?;
        let bytes = fresh(kinds[at], Traffic::Bytes, held, rest).await?;
        figures.extend(bytes.into_iter().filter(|figure| figure.name != IDLE));
        Ok(figures)
    });
    let rounds = rounds.await?;
    idle.finish().await?;
    let names: Vec<_> = kinds.iter().map(|kind| kind.name()).collect();
    let mut measured = Measured::new("Memory of what holds the clients", about(held), &names, &rounds);
    // Memory is not more because the machine is busy.
    measured.noisy = false;
    let of = |figure| crate::figures::median_of(&measured.rows, Kind::Mesh.name(), figure).ok();
    measured.goals = vec![
        Goal::at_most("an idle agent", of(IDLE), 15.0).unit("MB"),
        Goal::at_most("an idle HTTP connection", of(HTTP), 12.0).aim(6.0).unit("KiB"),
        Goal::at_most("an idle TCP tunnel stream", of(BYTES), 6.0).unit("KiB"),
    ];
    Ok(measured)
}

fn about(held: u32) -> Vec<String> {
    vec![
        format!(
            "Resident memory (VmRSS) of the proxy on the client's side, started anew each time, at rest, which is when it has not \
             got less for {} s: with a client's pod and nothing open; and what it grows by for each of {held} connections, each of \
             which was used once and is then held.",
            REST.as_secs()
        ),
        "mesh: an agent with one client's pod and one Service; tunnels are streams of shared connections to the other node."
            .to_owned(),
        "Envoy: the one at the client; for bytes it has a TLS connection for each.".to_owned(),
    ]
}

/// A world of its own for what is measured once: memory that was used before is not given back.
async fn fresh(kind: Kind, traffic: Traffic, held: u32, rest: Duration) -> Result<Vec<Figure>> {
    let lab = Lab::new("bench-held").await?;
    let (a, b) = (lab.node("a").await?, lab.node("b").await?);
    let (course, agents) = if kind == Kind::Mesh {
        (Course::meshed(&lab, "server", traffic, &a, &b).await?, agents(&[&a, &b]).await?)
    } else {
        (Course::new(kind, traffic, &a, &b, &Root::new()?).await?, Vec::new())
    };
    course.enrolled().await?;
    let holder: Process = match agents.first() {
        Some(agent) => agent.process().clone(),
        None => course.outbound.clone().context("a proxy at the client")?,
    };
    // A proxy that has just been started is not all there yet; an agent is once its pods are enrolled.
    if kind != Kind::Mesh {
        course.works().await?;
    }
    let idle = at_rest(&holder, rest).await?;
    course.works().await?;
    let used = at_rest(&holder, rest).await?;
    let args: &[&str] = if traffic == Traffic::Bytes { &["--bytes"] } else { &[] };
    let clients = hold(&course.client, course.at, held, args).await?;
    let grown = at_rest(&holder, rest).await? - used;
    let ended = clients.stop(GRACE).await?;
    ensure!(ended.signal().is_some(), "the clients ended with {ended}");
    finish(lab, agents).await?;
    let per = if traffic == Traffic::Http { HTTP } else { BYTES };
    Ok(vec![
        Figure::new(IDLE, "MB", idle / MB),
        Figure::new(per, "KiB", grown.max(0.0) / KIB / f64::from(held)),
    ])
}

/// Bytes that are resident once they do not get less any more.
async fn at_rest(holder: &Process, rest: Duration) -> Result<f64> {
    let (mut least, mut since) = (u64::MAX, Instant::now());
    while since.elapsed() < rest {
        let now = holder.rss_bytes()?;
        if now < least {
            (least, since) = (now, Instant::now());
        }
        sleep(LOOKED_AT_EVERY).await;
    }
    Ok(holder.rss_bytes()? as f64)
}
