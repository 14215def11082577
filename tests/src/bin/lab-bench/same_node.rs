//! What two pods of one node pay: for HTTP through one agent, for bytes that pass from app to app, and for bytes that an agent
//! carries.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use lab::{
    Agent, Lab, Node,
    bench::{Connected, Pinged},
    binary, eventually,
    servers::as_nobody,
};

use crate::{
    figures::{Figure, Measured},
    goals::{Goal, times},
    load::{Connections, Exchange, WRK, exchange, flood},
    meter::Meter,
    peers::{APP, Course, Kind, Root, Traffic, agents},
    rounds::{Plan, alternate},
    tcp::{BULK_CPU, in_bulk},
    world::{WORKERS, ask, each, finish, hold, redirect, serve},
};

const FLOOD: &str = "requests";
const CPU: &str = "CPU of the proxies, per request";
const EXCHANGE_CPU: &str = "CPU of all, per exchange of 1 KiB";
const PING: &str = "1 byte there and back, p50";
const CONNECT: &str = "time per connection";
const RELAY_CPU: &str = "CPU of the relay, per exchange of 1 KiB";

const DIRECT: &str = "direct (mesh)";
const AGENT: &str = "through the agent";
const RELAY: &str = "tokio copy";
const NO_MESH: &str = "no mesh, bytes";
const EXCHANGE: Exchange = Exchange { bytes: 1024, connections: 16 };

/// What is measured of a course.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asks {
    Http,
    /// Bytes that nobody carries.
    Apps,
    /// Bytes that somebody carries.
    Carried,
}

struct Variant {
    name: &'static str,
    course: Course,
    asks: Asks,
}

pub async fn run(plan: &Plan) -> Result<Measured> {
    ensure!(std::path::Path::new(WRK).is_file(), "no {WRK}: `cargo xtask bench same-node` installs it");
    let lab = Lab::new("bench-node").await?;
    let (node, bare) = (lab.node("a").await?, lab.node("c").await?);
    let variants = variants(&lab, &node, &bare).await?;
    let agents = agents(&[&node]).await?;
    for Variant { course, .. } in &variants {
        course.ready().await?;
    }
    for (name, verdict) in [(DIRECT, "direct"), (AGENT, "captured")] {
        let variant = variants.iter().find(|variant| variant.name == name).context("a variant")?;
        is_carried(&agents[0], &variant.course, verdict).await?;
    }
    let meter = Meter::new(lab.cgroup())?;
    let rounds = alternate(plan, &meter, variants.len(), async |at| variants[at].measure(plan).await);
    let rounds = rounds.await?;
    finish(lab, agents).await?;
    let names: Vec<_> = variants.iter().map(|variant| variant.name).collect();
    let mut measured = Measured::new("Two pods of one node", about(), &names, &rounds);
    measured.goals = goals(&measured);
    Ok(measured)
}

async fn variants(lab: &Lab, node: &Node, bare: &Node) -> Result<Vec<Variant>> {
    let (root, mut variants) = (Root::new()?, Vec::new());
    for kind in [Kind::None, Kind::Mesh, Kind::NginxHop, Kind::Envoy] {
        if kind.is_installed() {
            let course = match kind {
                Kind::Mesh => Course::meshed(lab, "web", Traffic::Http, node, node).await?,
                _ => Course::new(kind, Traffic::Http, bare, bare, &root).await?,
            };
            variants.push(Variant { name: kind.name(), course, asks: Asks::Http });
        }
    }
    let bytes = Course::new(Kind::None, Traffic::Bytes, bare, bare, &root).await?;
    variants.push(Variant { name: NO_MESH, course: bytes, asks: Asks::Apps });
    let direct = Course::meshed(lab, "direct", Traffic::Bytes, node, node).await?;
    variants.push(Variant { name: DIRECT, course: direct, asks: Asks::Apps });
    let carried = [("mesh.io/direct", "disabled")];
    let carried = Course::meshed_with(lab, "carried", Traffic::Bytes, node, node, &carried).await?;
    variants.push(Variant { name: AGENT, course: carried, asks: Asks::Carried });
    variants.push(Variant { name: RELAY, course: relayed(bare, &root).await?, asks: Asks::Carried });
    Ok(variants)
}

/// A relay in the client's pod that copies with tokio, and gets everything by `iptables -j REDIRECT`.
async fn relayed(node: &Node, root: &Root) -> Result<Course> {
    let mut course = Course::named("relayed", Kind::None, Traffic::Bytes, node, node, root).await?;
    course.carried_by(RELAY_CGROUP);
    let mut relay: Command = as_nobody(binary("bench-app", "MESH_BENCH_APP", "lab")?);
    relay.args(["relay", "--port", RELAY_PORT]);
    serve(&course.client, RELAY_CGROUP, relay).await?;
    redirect(&course.client, RELAY_PORT).await?;
    Ok(course)
}

const RELAY_PORT: &str = "15101";
const RELAY_CGROUP: &str = "relay";

/// The kernel says how the bytes go.
async fn is_carried(agent: &Agent, course: &Course, verdict: &str) -> Result<()> {
    let held = hold(&course.client, course.at, 1, &["--bytes"]).await?;
    eventually("the flow of a connection", async || {
        let (flows, client) = (agent.flows().await?, format!("{}:", course.client.ip()));
        let of_client = |flow: &&serde_json::Value| {
            let local = flow["local"].as_str().unwrap_or_default();
            local.starts_with(&client) && flow["direction"] == "outbound"
        };
        let flow = flows.as_array().into_iter().flatten().rfind(of_client);
        let flow = flow.with_context(|| format!("no flow of {client} in {flows}"))?;
        ensure!(flow["verdict"] == verdict, "{flow}");
        Ok(())
    })
    .await?;
    held.stop(std::time::Duration::from_secs(5)).await?;
    Ok(())
}

impl Variant {
    async fn measure(&self, plan: &Plan) -> Result<Vec<Figure>> {
        let Self { course, asks, .. } = self;
        let before = (course.cpu()?, course.cpu_of_all()?);
        if *asks == Asks::Http {
            let flood = flood(&course.client, &course.url(), Connections::Kept, plan.seconds).await?;
            let used = course.cpu()?.saturating_sub(before.0);
            let mut figures = vec![Figure::new(FLOOD, "1/s", flood.per_second)];
            if course.has_proxies() {
                figures.push(Figure::new(CPU, "µs", each(used, flood.requests)));
            }
            return Ok(figures);
        }
        let seen = exchange(plan, course, EXCHANGE).await?;
        let (used, of_all) =
            (course.cpu()?.saturating_sub(before.0), course.cpu_of_all()?.saturating_sub(before.1));
        let mut figures = vec![
            Figure::new(EXCHANGE_CPU, "µs", each(of_all, seen.count)),
            Figure::new(PING, "µs", ping(plan, course).await?.p50_us),
        ];
        if *asks == Asks::Carried {
            // Whoever has done nothing was passed by.
            ensure!(!used.is_zero(), "{}: nobody has carried anything", self.name);
            figures.push(Figure::new(RELAY_CPU, "µs", each(used, seen.count)));
            figures.extend(in_bulk(plan, course).await?);
        } else {
            figures.push(connect(plan, course).await?);
        }
        Ok(figures)
    }
}

async fn ping(plan: &Plan, course: &Course) -> Result<Pinged> {
    let (at, seconds) = (course.pinned().to_string(), plan.seconds.to_string());
    ask(plan, &course.client, &["ping", &at, "--seconds", &seconds, "--core", "0"]).await
}

async fn connect(plan: &Plan, course: &Course) -> Result<Figure> {
    let (ip, port) = (course.at.ip().to_string(), course.at.port().to_string());
    let (workers, seconds) = (WORKERS.to_string(), plan.seconds.to_string());
    let args = ["connect", &ip, "--port", &port, "--workers", &workers, "--seconds", &seconds];
    let done: Connected = ask(plan, &course.client, &args).await?;
    ensure!(done.connections > 0, "no connection was made");
    Ok(Figure::new(CONNECT, "µs", 1e6 * done.seconds / done.connections as f64))
}

fn goals(measured: &Measured) -> Vec<Goal> {
    let over = |figure, of, over| times(&measured.rows, figure, of, over);
    let mesh = Kind::Mesh.name();
    vec![
        Goal::at_most(
            "HTTP: CPU per request, of the Envoy pair's",
            over(CPU, mesh, Kind::Envoy.name()),
            0.25,
        ),
        Goal::at_least(
            "HTTP: requests per second, of nginx as one hop",
            over(FLOOD, mesh, Kind::NginxHop.name()),
            0.85,
        ),
        Goal::at_most("direct: CPU of all per exchange, of none's", over(EXCHANGE_CPU, DIRECT, NO_MESH), 1.1),
        Goal::at_most("direct: latency, of none's", over(PING, DIRECT, NO_MESH), 1.1),
        Goal::at_most("direct: time per connection, of none's", over(CONNECT, DIRECT, NO_MESH), 1.3),
        Goal::at_most("through the agent: CPU per GiB, of a tokio copy's", over(BULK_CPU, AGENT, RELAY), 0.6),
        Goal::at_most(
            "through the agent: CPU per exchange, of a tokio copy's",
            over(RELAY_CPU, AGENT, RELAY),
            0.6,
        ),
    ]
}

fn about() -> Vec<String> {
    vec![
        format!(
            "Client and server are pods of one node. HTTP: wrk, and nginx with an answer of 1 KiB. Bytes: {} connections that \
             each send 1 KiB as soon as the last came back; single bytes on one connection, its two ends on a core each; \
             connections of one byte, {WORKERS} at a time; bulk on one connection.",
            EXCHANGE.connections
        ),
        "mesh: one agent; a VirtualService routes; within a node it does not encrypt.".to_owned(),
        "nginx, one hop: at the client, in the clear. Envoy pair: in both pods, mutual TLS between them.".to_owned(),
        "direct: the port is declared `tcp`, and the kernel lets the apps talk with nobody between. Through the agent: the same \
         with `mesh.io/direct: disabled`."
            .to_owned(),
        format!(
            "tokio copy: a relay in the client's pod behind `iptables -j REDIRECT`, which copies with tokio (port {APP} is \
             dialled in both cases)."
        ),
    ]
}
