//! What a request costs between two nodes: the mesh against none, and against pairs of proxies.

use anyhow::{Result, ensure};
use lab::Lab;

use crate::{
    figures::{Figure, Measured},
    goals::{Goal, times},
    load::{CONNECTIONS, Connections, RATE, RATE_CONNECTIONS, WRK, can_pace, flood, paced},
    meter::Meter,
    peers::{Course, Kind, Traffic, between_nodes, by_mutual_tls},
    rounds::{Plan, Rounds, alternate},
    world::{each, finish},
};

const FLOOD: &str = "requests";
const CPU: &str = "CPU of both proxies, per request";
const P50: &str = "p50 at 1,000/s";
const P99: &str = "p99 at 1,000/s";
const ADDED_P50: &str = "added to p50 at 1,000/s";
const ADDED_P99: &str = "added to p99 at 1,000/s";

/// The first is what the others are compared with.
const KINDS: [Kind; 6] = [Kind::None, Kind::Mesh, Kind::Bare, Kind::Nginx, Kind::Haproxy, Kind::Envoy];

pub async fn run(plan: &Plan) -> Result<Measured> {
    ensure!(std::path::Path::new(WRK).is_file(), "no {WRK}: `cargo xtask bench http` installs it");
    ensure!(Kind::Nginx.is_installed(), "nginx is the server of all: `cargo xtask bench http` installs it");
    let lab = Lab::new("bench-http").await?;
    let (courses, agents) = between_nodes(&lab, &KINDS, Traffic::Http).await?;
    let meter = Meter::new(lab.cgroup())?;
    let rounds = alternate(plan, &meter, courses.len(), async |at| measure(plan, &courses[at]).await);
    let mut rounds = rounds.await?;
    by_mutual_tls(&agents).await?;
    finish(lab, agents).await?;
    add_differences(&mut rounds);
    let names: Vec<_> = courses.iter().map(|course| course.kind.name()).collect();
    let mut measured = Measured::new("HTTP between two nodes, over mutual TLS", about(), &names, &rounds);
    for name in &names[2..] {
        let times = |figure| times(&measured.rows, figure, Kind::Mesh.name(), name).unwrap_or(f64::NAN);
        measured.findings.push(format!(
            "The mesh against the {name}: {:.2} times the requests per second, {:.2} times the CPU per request.",
            times(FLOOD),
            times(CPU),
        ));
    }
    measured.goals = goals(&measured);
    Ok(measured)
}

fn goals(measured: &Measured) -> Vec<Goal> {
    let over = |figure, kind: Kind| times(&measured.rows, figure, Kind::Mesh.name(), kind.name());
    let mut goals = vec![
        Goal::at_most("CPU per request, of the Envoy pair's", over(CPU, Kind::Envoy), 0.47).aim(0.36),
        Goal::at_most("CPU per request, of the nginx pair's", over(CPU, Kind::Nginx), 0.8),
        Goal::at_most("CPU per request, of the bare pair's", over(CPU, Kind::Bare), 1.15),
        Goal::at_least("requests per second, of the Envoy pair's", over(FLOOD, Kind::Envoy), 2.5),
    ];
    for (figure, of) in [(ADDED_P50, "p50"), (ADDED_P99, "p99")] {
        goals.push(Goal::at_most(
            format!("added to {of} at 1,000/s, of what the Envoy pair adds"),
            over(figure, Kind::Envoy),
            0.5,
        ));
        let bare = Goal::at_most(
            format!("added to {of} at 1,000/s, of what the bare pair adds"),
            over(figure, Kind::Bare),
            1.15,
        );
        goals.push(bare);
        let nginx = over(figure, Kind::Nginx);
        let what = format!("added to {of} at 1,000/s, of what the nginx pair adds");
        goals.push(Goal::at_most(what, nginx, 1.0).only_aimed_at());
    }
    goals
}

fn about() -> Vec<String> {
    vec![
        format!(
            "A client's pod on one node, nginx with an answer of 1 KiB in a pod of another. Requests: wrk with {CONNECTIONS} \
             kept connections, each asking as soon as it was answered. Latency: fortio at {RATE} requests per second on \
             {RATE_CONNECTIONS} connections; what is added is the difference to no mesh in the same round. CPU is what the \
             two proxies used during wrk's run, the kernel's work for them included. No access logs, worker threads equal to \
             cores, TLS 1.3 with both certificates verified (P-256)."
        ),
        "no mesh: the client asks the server's pod.".to_owned(),
        "mesh: the client asks a Service; a VirtualService routes it; an agent on each node, mesh-h2 between them; \
         TLS_AES_256_GCM_SHA384."
            .to_owned(),
        "bare hyper pair: proxies in both pods that do nothing but proxy, from the agent's own libraries: HTTP/2 between \
         them, same cipher. A floor, not a peer."
            .to_owned(),
        "nginx pair, haproxy pair: in both pods, HTTP/1.1 with kept connections between them, same cipher.".to_owned(),
        "Envoy pair: Envoy in both pods, HTTP/2 between them; its TLS library chooses the cipher of TLS 1.3 by itself \
         (TLS_AES_128_GCM_SHA256, the cheaper one, where the processor has AES)."
            .to_owned(),
        "ztunnel and linkerd2-proxy are not compared: no registry has their programs.".to_owned(),
    ]
}

async fn measure(plan: &Plan, course: &Course) -> Result<Vec<Figure>> {
    let before = course.cpu()?;
    let flood = flood(&course.client, &course.url(), Connections::Kept, plan.seconds).await?;
    let used = course.cpu()?.saturating_sub(before);
    let mut figures = vec![Figure::new(FLOOD, "1/s", flood.per_second)];
    if course.has_proxies() {
        figures.push(Figure::new(CPU, "µs", each(used, flood.requests)));
    }
    if plan.quick && !can_pace() {
        println!("  no latencies: fortio is not installed");
        return Ok(figures);
    }
    let paced = paced(&course.client, &course.url(), plan.seconds).await?;
    if paced.reached() || plan.quick {
        figures.push(Figure::new(P50, "ms", paced.p50));
        figures.push(Figure::new(P99, "ms", paced.p99));
    } else {
        let name = course.kind.name();
        println!("  {name}: no latencies, it answered {:.0} requests per second", paced.rate);
    }
    Ok(figures)
}

/// What each variant adds to the latencies of the first, in the same round.
fn add_differences(rounds: &mut Rounds) {
    let value = |figures: &[Figure], name| figures.iter().find(|figure| figure.name == name).map(|f| f.value);
    for round in &mut rounds.kept {
        let (first, others) = round.split_at_mut(1);
        for figures in others {
            for (of, added) in [(P50, ADDED_P50), (P99, ADDED_P99)] {
                if let (Some(without), Some(with)) = (value(&first[0], of), value(figures, of)) {
                    figures.push(Figure::new(added, "ms", with - without));
                }
            }
        }
    }
}
