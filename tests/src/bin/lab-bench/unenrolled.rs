//! What a node's agent costs the pods that are not in the mesh: it should be nothing.

use anyhow::{Result, ensure};
use lab::{Lab, bench::Pinged};

use crate::{
    figures::{Figure, Measured, median_of, rows},
    meter::Meter,
    rounds::{Plan, alternate},
    world::{CPU, RATE, Site, WORKERS, ask, bench_app, finish, other_core, serve},
};

/// The second is as the first, to show how far apart equals are.
const VARIANTS: [&str; 3] = ["no agent", "no agent, again", "agent"];
/// Where single bytes are sent back.
const PING_PORT: u16 = 7100;
const PING: &str = "1 byte there and back, p50";
const PING_P99: &str = "1 byte there and back, p99";

pub async fn run(plan: &Plan) -> Result<Measured> {
    let lab = Lab::new("bench-unenrolled").await?;
    let mut sites = Vec::new();
    for node in ["bare", "bare-too", "mesh"] {
        let site = Site::new(&lab, node, false).await?;
        let port = PING_PORT.to_string();
        let server = bench_app(&["answer", "--port", &port, "--core", &other_core()?.to_string()])?;
        serve(&site.server, "ping-server", server).await?;
        sites.push(site);
    }
    // The programs are attached and busy with somebody, but not with the pods that are measured.
    let enrolled = sites[2].node.pod("enrolled").start().await?;
    let agent = sites[2].agent().await?;
    enrolled.enrolled().await?;
    ensure!(!sites[2].client.listens(15001), "the agent listens in a pod that is not enrolled");
    let meter = Meter::new(lab.cgroup())?;
    let rounds =
        alternate(plan, &meter, VARIANTS.len(), async |variant| measure(plan, &sites[variant]).await);
    let rounds = rounds.await?;
    finish(lab, [agent]).await?;
    let rows = rows(&VARIANTS, &rounds);
    let mut findings = Vec::new();
    for figure in [RATE, CPU, PING] {
        let of = |variant| median_of(&rows, variant, figure);
        findings.push(format!(
            "{figure}: {:+.1} % with an agent; {:+.1} % between two nodes that have none.",
            100.0 * (of(VARIANTS[2])? / of(VARIANTS[0])? - 1.0),
            100.0 * (of(VARIANTS[1])? / of(VARIANTS[0])? - 1.0),
        ));
    }
    Ok(Measured {
        title: "Pods that are not enrolled".to_owned(),
        about: about(),
        rows,
        findings,
        goals: Vec::new(),
        discarded: rounds.discarded,
        noisy: rounds.noisy,
    })
}

fn about() -> Vec<String> {
    vec![
        format!(
            "Client and server are two pods of one node, neither enrolled: {WORKERS} clients in a closed loop make \
             connections of one byte there and one back; then one connection carries single bytes there and back, \
             its two ends on a core each."
        ),
        "no agent: two nodes of this kind, alike in everything, so that their difference shows what chance does.".to_owned(),
        "agent: on this node an agent runs and another pod is enrolled, so that all its programs are attached.".to_owned(),
    ]
}

async fn measure(plan: &Plan, site: &Site) -> Result<Vec<Figure>> {
    let (_, mut figures) = site.connect(plan, &site.client).await?;
    let (server, seconds) = (site.server.at(PING_PORT).to_string(), plan.seconds.to_string());
    let seen: Pinged =
        ask(plan, &site.client, &["ping", &server, "--seconds", &seconds, "--core", "0"]).await?;
    figures.push(Figure::new(PING, "µs", seen.p50_us));
    figures.push(Figure::new(PING_P99, "µs", seen.p99_us));
    Ok(figures)
}
