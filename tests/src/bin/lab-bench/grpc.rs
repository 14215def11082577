//! gRPC's unary calls between two nodes on one connection of the client's.

use anyhow::{Result, ensure};
use lab::Lab;

use crate::{
    figures::{Figure, Measured},
    goals::{Goal, times},
    load::{H2LOAD, calls},
    meter::Meter,
    peers::{Course, Kind, Traffic, between_nodes, by_mutual_tls},
    rounds::{Plan, alternate},
    world::{each, finish},
};

const RATE: &str = "calls";
const CPU: &str = "CPU of both proxies, per call";
const STREAMS: u32 = 100;
const KINDS: [Kind; 3] = [Kind::None, Kind::Mesh, Kind::Envoy];

pub async fn run(plan: &Plan) -> Result<Measured> {
    ensure!(std::path::Path::new(H2LOAD).is_file(), "no {H2LOAD}: `cargo xtask bench grpc` installs it");
    let lab = Lab::new("bench-grpc").await?;
    let (courses, agents) = between_nodes(&lab, &KINDS, Traffic::Grpc).await?;
    let meter = Meter::new(lab.cgroup())?;
    let rounds = alternate(plan, &meter, courses.len(), async |at| measure(plan, &courses[at]).await);
    let rounds = rounds.await?;
    by_mutual_tls(&agents).await?;
    finish(lab, agents).await?;
    let names: Vec<_> = courses.iter().map(|course| course.kind.name()).collect();
    let mut measured = Measured::new("gRPC between two nodes, over mutual TLS", about(), &names, &rounds);
    let over = times(&measured.rows, RATE, Kind::Mesh.name(), Kind::Envoy.name());
    measured.goals = vec![Goal::at_least("calls per second, of the Envoy pair's", over, 2.5)];
    Ok(measured)
}

fn about() -> Vec<String> {
    vec![
        format!(
            "h2load on one connection with {STREAMS} calls at a time of gRPC's health check, each as soon as another was \
             answered; the server is the lab's own (tonic). HTTP/2 at both ends and between the proxies."
        ),
        "mesh: the client calls a Service whose port is declared `grpc`; a VirtualService routes it."
            .to_owned(),
        "Envoy pair: Envoy in both pods, HTTP/2 throughout.".to_owned(),
    ]
}

async fn measure(plan: &Plan, course: &Course) -> Result<Vec<Figure>> {
    let before = course.cpu()?;
    let done = calls(course, STREAMS, plan.seconds).await?;
    let used = course.cpu()?.saturating_sub(before);
    let mut figures = vec![Figure::new(RATE, "1/s", done.per_second)];
    if course.has_proxies() {
        figures.push(Figure::new(CPU, "µs", each(used, done.requests)));
    }
    Ok(figures)
}
