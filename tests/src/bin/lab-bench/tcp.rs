//! What opaque TCP costs between two nodes: the mesh against none, and against pairs of proxies.

use anyhow::Result;
use lab::Lab;

use crate::{
    figures::{Figure, Measured},
    goals::{Goal, times},
    load::{Exchange, bulk, exchange},
    meter::Meter,
    peers::{Course, Kind, Traffic, between_nodes},
    rounds::{Plan, alternate},
    world::{each, finish},
};

const RATE: &str = "exchanges of 1 KiB";
const CPU: &str = "CPU of both proxies, per exchange";
const P50: &str = "1 KiB there and back on one connection, p50";
const BULK: &str = "bulk";
pub const BULK_CPU: &str = "CPU of the proxies, per GiB";
const GIB: f64 = (1_u64 << 30) as f64;
const KINDS: [Kind; 4] = [Kind::None, Kind::Mesh, Kind::Haproxy, Kind::Envoy];
const EXCHANGE: Exchange = Exchange { bytes: 1024, connections: 64 };
const ALONE: Exchange = Exchange { bytes: 1024, connections: 1 };

pub async fn run(plan: &Plan) -> Result<Measured> {
    let lab = Lab::new("bench-tcp").await?;
    let (courses, agents) = between_nodes(&lab, &KINDS, Traffic::Bytes).await?;
    let meter = Meter::new(lab.cgroup())?;
    let rounds = alternate(plan, &meter, courses.len(), async |at| measure(plan, &courses[at]).await);
    let rounds = rounds.await?;
    finish(lab, agents).await?;
    let names: Vec<_> = courses.iter().map(|course| course.kind.name()).collect();
    let mut measured =
        Measured::new("Opaque TCP between two nodes, over mutual TLS", about(), &names, &rounds);
    let over = |figure| times(&measured.rows, figure, Kind::Mesh.name(), Kind::Envoy.name());
    measured.goals = vec![
        Goal::at_most("CPU per exchange of 1 KiB, of the Envoy pair's", over(CPU), 0.7),
        Goal::at_most("CPU per GiB in bulk, of the Envoy pair's", over(BULK_CPU), 0.75),
    ];
    Ok(measured)
}

fn about() -> Vec<String> {
    vec![
        format!(
            "A client's pod on one node, a server in a pod of another that sends back what it gets. Exchanges: {} connections, \
             each sending 1 KiB as soon as the last came back. Bulk: one connection, from the client to the server. CPU is \
             what the two proxies used, the kernel's work for them included.",
            EXCHANGE.connections
        ),
        "mesh: the client dials a Service whose port is declared `tcp`; an agent on each node, TLS_AES_256_GCM_SHA384, one \
         stream of a shared connection for each of the client's."
            .to_owned(),
        "haproxy pair, Envoy pair: a TLS connection for each of the client's; haproxy with the same cipher, Envoy with the \
         one that its library chooses."
            .to_owned(),
        "ztunnel is not compared: no registry has its program.".to_owned(),
    ]
}

async fn measure(plan: &Plan, course: &Course) -> Result<Vec<Figure>> {
    let before = course.cpu()?;
    let seen = exchange(plan, course, EXCHANGE).await?;
    let used = course.cpu()?.saturating_sub(before);
    let alone = exchange(plan, course, ALONE).await?;
    let mut figures = vec![Figure::new(RATE, "1/s", seen.per_second()), Figure::new(P50, "µs", alone.p50_us)];
    if course.has_proxies() {
        figures.push(Figure::new(CPU, "µs", each(used, seen.count)));
    }
    figures.extend(in_bulk(plan, course).await?);
    Ok(figures)
}

/// Bulk, and what it costs the proxies, if there are any.
pub async fn in_bulk(plan: &Plan, course: &Course) -> Result<Vec<Figure>> {
    let before = course.cpu()?;
    let sent = bulk(plan, course).await?;
    let (gib, used) = (sent.bytes as f64 / GIB, course.cpu()?.saturating_sub(before));
    let mut figures = vec![Figure::new(BULK, "GiB/s", gib / sent.seconds)];
    if course.has_proxies() {
        figures.push(Figure::new(BULK_CPU, "s", used.as_secs_f64() / gib));
    }
    Ok(figures)
}
