//! What busy connections pay for idle ones beside them.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::{Lab, Node, Pod};

use crate::{
    figures::{Figure, Measured},
    goals::{Goal, times},
    load::asks,
    meter::Meter,
    peers::{Course, Kind, Traffic, agents, by_mutual_tls},
    rounds::{Plan, alternate},
    world::{finish, hold},
};

const VARIANTS: [&str; 2] = ["none idle", "many idle"];
const RATE: &str = "requests";
const P50: &str = "p50 of the busy ones";
const P99: &str = "p99 of the busy ones";
/// Connections, idle ones in all and busy ones.
const COUNTS: [u32; 2] = [10_000, 1000];
const QUICK_COUNTS: [u32; 2] = [200, 50];
/// Pods that share the idle ones: a pod has a limit of its own.
const HOLDERS: u32 = 4;
const GRACE: Duration = Duration::from_secs(20);

pub async fn run(plan: &Plan) -> Result<Measured> {
    ensure!(Kind::Nginx.is_installed(), "nginx is the server: `cargo xtask bench idle` installs it");
    let [idle, busy] = if plan.quick { QUICK_COUNTS } else { COUNTS };
    let lab = Lab::new("bench-idle").await?;
    let (a, b) = (lab.node("a").await?, lab.node("b").await?);
    let course = Course::meshed(&lab, "server", Traffic::Http, &a, &b).await?;
    let holders = holders(&a).await?;
    let agents = agents(&[&a, &b]).await?;
    for holder in &holders {
        holder.enrolled().await?;
    }
    course.ready().await?;
    let meter = Meter::new(lab.cgroup())?;
    let rounds = alternate(plan, &meter, VARIANTS.len(), async |at| {
        let mut held = Vec::new();
        for holder in holders.iter().filter(|_| at == 1) {
            held.push(hold(holder, course.at, idle / HOLDERS, &[]).await?);
        }
        let seen = asks(plan, &course, busy, None).await?;
        for clients in held {
            ensure!(clients.status().is_none(), "the idle ones have ended\n{}", clients.tail());
            clients.stop(GRACE).await?;
        }
        Ok(vec![
            Figure::new(RATE, "1/s", seen.per_second()),
            Figure::new(P50, "ms", seen.p50_us / 1000.0),
            Figure::new(P99, "ms", seen.p99_us / 1000.0),
        ])
    });
    let rounds = rounds.await?;
    by_mutual_tls(&agents).await?;
    finish(lab, agents).await?;
    let title = "Busy connections beside idle ones";
    let mut measured = Measured::new(title, about(idle, busy), &VARIANTS, &rounds);
    let over = times(&measured.rows, P99, VARIANTS[1], VARIANTS[0]);
    measured.goals = vec![Goal::at_most(format!("p99 beside {idle} idle ones, of without them"), over, 1.2)];
    Ok(measured)
}

fn about(idle: u32, busy: u32) -> Vec<String> {
    vec![format!(
        "Two nodes with an agent each. {busy} kept HTTP connections of one pod ask again as soon as they were answered; {idle} of \
         {HOLDERS} other pods of the node have asked once, and do nothing."
    )]
}

async fn holders(node: &Node) -> Result<Vec<Pod>> {
    let mut holders = Vec::new();
    for number in 0..HOLDERS {
        holders.push(node.pod(&format!("holder-{number}")).sa("client").start().await?);
    }
    Ok(holders)
}
